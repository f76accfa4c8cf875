//! `vcp run`: puts a virtual machine together, runs its event loop, takes it apart.
//!
//! Threads: this one (console input, entropy, signals), one per vCPU, and for each vhost-user device a keeper and its
//! connection's watchdog. Order of the start: everything that is in the user's hand (kernel, initrd, memory), then the
//! backends; the runtime directory goes when they are connected. Order of the end: vCPUs stop, keepers stop, devices stop
//! their queues, the terminal is restored, connections close, VCPs end.

use std::io::{ErrorKind, IsTerminal, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};

use crate::affinity::{self, Placement};
use crate::boot::Kernel;
use crate::boot::linux::resets_by_triple_fault;
use crate::boot::ring3::abi::EXIT_PORT;
use crate::bus::{Bus, BusDevice};
use crate::cli::RunArgs;
use crate::config::{DiskSpec, NetSpec, VmConfig};
use crate::devices::console::{Console, Stdout, UART_LEN};
use crate::devices::power::{ACPI_PM_LEN, AcpiPm, ExitPort, I8042, I8042_LEN};
use crate::error::{Error, Result};
use crate::exit::{ExitReason, ExitSignal};
use crate::kvm::vcpu::{VcpuContext, Vcpus};
use crate::kvm::{self, Vm};
use crate::layout::{
    ACPI_PM_PORT, COM1_GSI, COM1_PORT, I8042_PORT, VIRTIO_GSIS, VIRTIO_MMIO_START, VIRTIO_MMIO_STRIDE,
};
use crate::terminal::{self, RawMode};
use crate::vcp::process::READY_TIMEOUT;
use crate::vcp::runtime_dir::RuntimeDir;
use crate::vcp::{self, IscsiVcp, Keeper, Source, VcpProcess};
use crate::virtio::VirtioDevice;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::rng::Rng;
use crate::virtio::vhost_user::link::Link;
use crate::virtio::vhost_user::{VhostUserDevice, blk, net};
use crate::{acpi, kvm::memory, kvm::regs, signal};

type Subscriber = Box<dyn MutEventSubscriber>;

/// Virtio devices that every machine has: the entropy device.
const OWN_DEVICES: usize = 1;

/// Runs a virtual machine until it ends.
pub fn run(args: &RunArgs) -> Result<()> {
    terminal::install_panic_hook();
    let config = args.config()?;
    let kernel = Kernel::open(&config.kernel)?;
    let signals = signal::install_end_handlers()?;
    let exit = ExitSignal::new()?;
    let allowed = affinity::allowed()?;
    let wanted: Vec<_> = config.disks.iter().filter(|d| d.url.is_some()).map(|d| d.cpu).collect();
    let placement = affinity::place(&allowed, &wanted, config.vcpus, config.vcpu_cpus.as_deref())
        .map_err(Error::Usage)?;
    // The machine first, with all that lies in its memory: what fails here fails sooner, and no target was troubled.
    let machine = Machine::new(&config, kernel, exit.clone())?;
    let backends = match start_backends(args, &config, &placement, &signals) {
        Err(Error::Interrupted) => {
            tracing::info!("ended by a signal while starting");
            return Ok(());
        }
        other => other?,
    };
    warn_of_emulation(machine.is_ring3);
    machine.run(&config, backends, &placement, signals)
}

/// Says what would otherwise show as a guest that crawls; after all that may fail, so that an error is one line.
fn warn_of_emulation(is_ring3: bool) {
    if !is_ring3 && std::path::Path::new("/sys/module/kvm_pvm").exists() {
        tracing::warn!(
            "this host's KVM (kvm_pvm) emulates ring 0 in software: a Linux guest is far too slow to be of use; see `vcp check`"
        );
    }
}

/// A device with what its keeper needs.
struct Backend {
    device: VhostUserDevice,
    source: Source,
    process: Option<VcpProcess>,
}

/// Connects to backends that already run, starts the others, and connects to those. Their sockets are gone when this
/// returns: a connection needs no name, and what has no name is not left behind, however the monitor ends.
fn start_backends(
    args: &RunArgs,
    config: &VmConfig,
    placement: &Placement,
    signals: &OwnedFd,
) -> Result<Vec<Backend>> {
    // A backend that is not there is told before a VCP logs in anywhere.
    let given = config.disks.iter().enumerate().map(|(i, disk)| {
        let connect = |socket: &PathBuf| connect_disk(i, disk, socket, Source::Socket(socket.clone()), None);
        disk.socket.as_ref().map(connect).transpose()
    });
    let given = given.collect::<Result<Vec<_>>>()?;
    let nets =
        config.nets.iter().enumerate().map(|(i, net)| connect_net(i, net)).collect::<Result<Vec<_>>>()?;
    let program = vcp::find_program(args.vcp_iscsi.as_deref());
    let dir = config.disks.iter().any(|d| d.url.is_some()).then(RuntimeDir::create).transpose()?;
    let mut processes = Vec::new();
    // All start at once, then all are waited for: logins take place side by side.
    let mut cpus = placement.vcps.iter();
    for (i, disk) in config.disks.iter().enumerate() {
        let (Some(url), Some(dir)) = (&disk.url, &dir) else { continue };
        let vcp = IscsiVcp {
            device: disk_name(i),
            url: url.clone(),
            instance: dir.socket(&disk_name(i)).display().to_string(),
            read_only: disk.read_only,
            queues: disk.queues.unwrap_or(1),
            cpu: cpus.next().copied().flatten(),
        };
        let process = VcpProcess::start(&program, &vcp, &dir.socket(&vcp.device))?;
        processes.push((i, vcp, process));
    }
    for (_, vcp, process) in &mut processes {
        process.wait_ready(Some(READY_TIMEOUT), signals)?;
        tracing::info!(device = vcp.device, pid = process.pid(), "vcp-iscsi is ready");
    }
    let mut backends: Vec<_> = given.into_iter().flatten().collect();
    for (i, vcp, process) in processes {
        let (Some(disk), Some(dir)) = (config.disks.get(i), &dir) else { continue };
        let socket = dir.socket(&vcp.device);
        let source = Source::Process(program.clone(), Box::new(vcp));
        backends.push(connect_disk(i, disk, &socket, source, Some(process))?);
    }
    backends.sort_by_key(|(i, _)| *i);
    Ok(backends.into_iter().map(|(_, backend)| backend).chain(nets).collect())
}

fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

/// Shakes hands with the backend of disk number `index`.
fn connect_disk(
    index: usize,
    disk: &DiskSpec,
    socket: &Path,
    source: Source,
    process: Option<VcpProcess>,
) -> Result<(usize, Backend)> {
    let (name, queues) = (disk_name(index), disk.queues.unwrap_or(1));
    let link = Link::connect(&name, socket, queues)?;
    let recovers = disk.reconnect.unwrap_or(true);
    let device = VhostUserDevice::new(&name, blk::kind(queues, disk.packed), link, recovers)?;
    Ok((index, Backend { device, source, process }))
}

fn connect_net(index: usize, spec: &NetSpec) -> Result<Backend> {
    let name = format!("net{index}");
    let mac = spec.mac_bytes().map_err(Error::Usage)?.unwrap_or_else(|| net::default_mac(index as u8));
    let Some(socket) = &spec.socket else {
        return Err(Error::Usage(format!("{name} has no socket")));
    };
    let (link, recovers) = (Link::connect(&name, socket, 2)?, spec.reconnect.unwrap_or(true));
    let device = VhostUserDevice::new(&name, net::kind(mac), link, recovers)?;
    Ok(Backend { device, source: Source::Socket(socket.clone()), process: None })
}

/// A machine that is ready to run but for its devices.
struct Machine {
    vm: Vm,
    exit: ExitSignal,
    is_ring3: bool,
    windows: Vec<acpi::Window>,
    vcpus: Vec<kvm_ioctls::VcpuFd>,
}

impl Machine {
    fn new(config: &VmConfig, kernel: Kernel, exit: ExitSignal) -> Result<Self> {
        let windows = windows(config.disks.len() + config.nets.len() + OWN_DEVICES)?;
        let is_ring3 = kernel.is_ring3();
        let kvm = kvm::open()?;
        let memory = memory::create(config.memory_bytes, config.hugepages)?;
        let vm = Vm::new(kvm, memory, !is_ring3)?;
        let vcpus =
            (0..config.vcpus).map(|id| vm.create_vcpu(id, config.vcpus)).collect::<Result<Vec<_>>>()?;
        // An unstable counter has no frequency: the guest is told 0.
        let tsc_khz = vcpus.first().and_then(|v| v.get_tsc_khz().ok()).map_or(0, u64::from);
        let memory = vm.memory();
        let rsdp = if is_ring3 { 0 } else { acpi::write(memory, config.vcpus, &windows)? };
        let entry = kernel.load(memory, config, tsc_khz, rsdp, windows.len())?;
        if let Some(first) = vcpus.first() {
            regs::set_entry(first, memory, entry)?;
        }
        Ok(Self { vm, exit, is_ring3, windows, vcpus })
    }

    fn run(
        self,
        config: &VmConfig,
        backends: Vec<Backend>,
        placement: &Placement,
        signals: OwnedFd,
    ) -> Result<()> {
        let mut events = EventManager::<Subscriber>::new().map_err(|e| event_error(&e))?;
        let mut mmio = Bus::default();
        let mut transports = Vec::new();
        let mut keepers = Vec::new();
        for Backend { mut device, source, process } in backends {
            let (front, channel) = device.keep();
            transports.push(self.add_device(transports.len(), Box::new(device), &mut mmio)?);
            keepers.push(Keeper::start(front, channel, source, process, self.exit.clone())?);
        }
        let (rng, rng_queue) = Rng::new();
        let transport = self.add_device(transports.len(), Box::new(rng), &mut mmio)?;
        if let Some(kick) = transport.kick(0) {
            events.add_subscriber(Box::new(rng_queue.worker(kick.clone())));
        }
        transports.push(transport);
        let is_ring3 = self.is_ring3;
        let terminal = std::io::stdin().is_terminal();
        let (console, irq, input) = Console::new(Box::new(Stdout), self.exit.clone(), terminal, is_ring3)?;
        self.vm.irqfd(&irq, COM1_GSI)?;
        let pio = ports(console, &self.exit, is_ring3);
        events.add_subscriber(Box::new(Wake { signals, exit: self.exit.clone() }));
        say_ready(config)?;
        let raw = RawMode::enter();
        events.add_subscriber(Box::new(input));
        let context = VcpuContext { pio: Arc::new(pio), mmio: Arc::new(mmio), exit: self.exit.clone() };
        let vcpus = Vcpus::start(self.vcpus, &context, &placement.vcpus)?;
        let reason = wait(&mut events, &self.exit);
        let stopped = vcpus.stop();
        // From here on nobody is started again. The processes themselves end last.
        let processes: Vec<_> = keepers.into_iter().map(Keeper::stop).collect();
        // A device whose vCPU thread did not stop may be locked; one without a backend has nothing to stop.
        if stopped {
            for transport in &transports {
                transport.shut_down();
            }
        }
        drop(raw);
        drop((context, transports));
        drop(processes);
        outcome(reason?, config)
    }

    fn add_device(
        &self,
        index: usize,
        device: Box<dyn VirtioDevice>,
        mmio: &mut Bus,
    ) -> Result<Arc<MmioTransport>> {
        let window = self.windows.get(index).ok_or_else(too_many_devices)?;
        let transport = Arc::new(MmioTransport::new(device, self.vm.memory().clone())?);
        transport.bind(&self.vm, window.base, window.gsi)?;
        mmio.insert(window.base, VIRTIO_MMIO_STRIDE, transport.clone());
        Ok(transport)
    }
}

fn too_many_devices() -> Error {
    Error::Usage(format!("more than {} disks and nets", VIRTIO_GSIS.len() - OWN_DEVICES))
}

/// The windows of that many virtio devices.
fn windows(count: usize) -> Result<Vec<acpi::Window>> {
    let gsis = VIRTIO_GSIS.get(..count).ok_or_else(too_many_devices)?;
    let bases = (0..).map(|i| VIRTIO_MMIO_START + VIRTIO_MMIO_STRIDE * i);
    Ok(bases.zip(gsis).map(|(base, &gsi)| acpi::Window { base, gsi }).collect())
}

fn ports(console: Arc<Console>, exit: &ExitSignal, ring3: bool) -> Bus {
    let mut pio = Bus::default();
    let mut devices: Vec<(u16, u64, Arc<dyn BusDevice>)> = vec![(COM1_PORT, UART_LEN, console)];
    if ring3 {
        devices.push((EXIT_PORT, 1, Arc::new(ExitPort(exit.clone()))));
    } else {
        devices.push((ACPI_PM_PORT, ACPI_PM_LEN, Arc::new(AcpiPm(exit.clone()))));
        devices.push((I8042_PORT, I8042_LEN, Arc::new(I8042(exit.clone()))));
    }
    for (port, len, device) in devices {
        pio.insert(u64::from(port), len, device);
    }
    pio
}

/// The line that scripts wait for; the guest's console follows it.
fn say_ready(config: &VmConfig) -> Result<()> {
    let line = format!(
        "ready: guest started, {} vcpus, {} MiB, {} disks, {} nets\n",
        config.vcpus,
        config.memory_bytes >> 20,
        config.disks.len(),
        config.nets.len()
    );
    Stdout.write_all(line.as_bytes()).map_err(Error::os("write to standard output"))
}

fn wait(events: &mut EventManager<Subscriber>, exit: &ExitSignal) -> Result<ExitReason> {
    loop {
        if let Some(reason) = exit.reason() {
            return Ok(reason);
        }
        match events.run() {
            Ok(_) => {}
            Err(event_manager::Error::Epoll(e))
                if std::io::Error::from_raw_os_error(e.errno()).kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(event_error(&e)),
        }
    }
}

fn event_error(e: &event_manager::Error) -> Error {
    Error::Os { action: "run the event loop", source: std::io::Error::other(e.to_string()) }
}

/// What the way the guest ended means for the user.
fn outcome(reason: ExitReason, config: &VmConfig) -> Result<()> {
    match reason {
        ExitReason::PowerOff | ExitReason::Reset | ExitReason::User | ExitReason::GuestCode(0) => Ok(()),
        ExitReason::Signal(signal) => {
            tracing::info!(signal, "ended by a signal");
            Ok(())
        }
        ExitReason::TripleFault if resets_by_triple_fault(&config.cmdline) => Ok(()),
        ExitReason::TripleFault => Err(Error::GuestFailed("the guest crashed: triple fault".into())),
        ExitReason::GuestCode(code) => Err(Error::GuestFailed(format!("the guest ended with code {code}"))),
        ExitReason::VcpuFailed(text) | ExitReason::Internal(text) => Err(Error::GuestFailed(text)),
        ExitReason::BackendGone { device, reason } => {
            Err(Error::GuestFailed(format!("{device}: {reason}; the guest was stopped")))
        }
    }
}

/// Wakes the event loop for the end of the run and for signals.
struct Wake {
    signals: OwnedFd,
    exit: ExitSignal,
}

impl MutEventSubscriber for Wake {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for event in [self.signals.as_raw_fd(), self.exit.event().as_raw_fd()] {
            if let Err(e) = ops.add(Events::new_raw(event, EventSet::IN)) {
                self.exit.give(ExitReason::Internal(format!("signals cannot be watched: {e}")));
            }
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let _ = self.exit.event().read();
        let _ = rustix::io::read(&self.signals, &mut [0u8; 8]);
        if let Some(signal) = signal::received() {
            self.exit.give(ExitReason::Signal(signal));
        }
    }
}
