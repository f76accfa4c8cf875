//! `vcp run`: puts a virtual machine together, runs its event loop, takes it apart.
//!
//! Threads: this one (console input, entropy, signals, watches), one per vCPU, one watchdog per vhost-user connection.
//! Order of the end: vCPUs stop, devices stop their queues, connections close, VCPs end, the runtime directory goes,
//! the terminal is restored.

use std::io::{ErrorKind, IsTerminal, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};

use crate::affinity::{self, Placement};
use crate::boot::Kernel;
use crate::boot::linux::resets_by_triple_fault;
use crate::boot::ring3::abi::EXIT_PORT;
use crate::bus::{Bus, BusDevice};
use crate::cli::RunArgs;
use crate::config::VmConfig;
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
use crate::vcp::runtime_dir::RuntimeDir;
use crate::vcp::{self, IscsiVcp, READY_TIMEOUT, VcpProcess};
use crate::virtio::VirtioDevice;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::rng::Rng;
use crate::virtio::vhost_user::link::Link;
use crate::virtio::vhost_user::{VhostUserDevice, blk, net};
use crate::{acpi, kvm::memory, kvm::regs, signal};

type Subscriber = Box<dyn MutEventSubscriber>;

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
    warn_of_emulation(&kernel);
    // The machine first: it fails sooner and leaves nothing behind.
    let machine = Machine::new(&config, &kernel, exit.clone())?;
    let backends = match Backends::start(args, &config, &placement, &signals) {
        Err(Error::Interrupted) => {
            tracing::info!("ended by a signal while starting");
            return Ok(());
        }
        other => other?,
    };
    machine.run(&config, kernel, backends, &placement, signals)
}

/// Says early what would otherwise show as a guest that crawls.
fn warn_of_emulation(kernel: &Kernel) {
    if !kernel.is_ring3() && std::path::Path::new("/sys/module/kvm_pvm").exists() {
        tracing::warn!(
            "this host's KVM (kvm_pvm) emulates ring 0 in software: a Linux guest is far too slow to be of use; see `vcp check`"
        );
    }
}

/// The processes and connections behind the devices. Dropped in order: connections are with the devices by then, so
/// processes end before their directory goes.
struct Backends {
    devices: Vec<VhostUserDevice>,
    processes: Vec<(String, VcpProcess)>,
    _dir: Option<RuntimeDir>,
}

impl Backends {
    fn start(args: &RunArgs, config: &VmConfig, placement: &Placement, signals: &OwnedFd) -> Result<Self> {
        let program = vcp::find_program(args.vcp_iscsi.as_deref());
        let dir = config.disks.iter().any(|d| d.url.is_some()).then(RuntimeDir::create).transpose()?;
        let mut backends = Self { devices: Vec::new(), processes: Vec::new(), _dir: dir };
        // All start at once, then all are waited for: logins take place side by side.
        let mut sockets = Vec::new();
        let mut cpus = placement.vcps.iter();
        for (i, disk) in config.disks.iter().enumerate() {
            let device = format!("disk{i}");
            match (&disk.url, &disk.socket, &backends._dir) {
                (Some(url), _, Some(dir)) => {
                    let socket = dir.path().join(format!("{device}.sock"));
                    let vcp = IscsiVcp {
                        device: device.clone(),
                        url: url.clone(),
                        socket: socket.clone(),
                        read_only: disk.read_only,
                        queues: disk.queues.unwrap_or(1),
                        cpu: cpus.next().copied().flatten(),
                    };
                    backends.processes.push((device, VcpProcess::start(&program, &vcp)?));
                    sockets.push(socket);
                }
                (_, Some(socket), _) => sockets.push(socket.clone()),
                _ => return Err(Error::Usage(format!("{device} has neither url nor socket"))),
            }
        }
        for (device, process) in &mut backends.processes {
            process.wait_ready(READY_TIMEOUT, signals)?;
            tracing::info!(device, pid = process.pid(), "vcp-iscsi is ready");
        }
        for (i, (disk, socket)) in config.disks.iter().zip(&sockets).enumerate() {
            let name = format!("disk{i}");
            let queues = disk.queues.unwrap_or(1);
            backends.devices.push(blk::new(&name, Link::connect(&name, socket, queues)?, queues)?);
        }
        for (i, spec) in config.nets.iter().enumerate() {
            let name = format!("net{i}");
            let mac = spec.mac_bytes().map_err(Error::Usage)?.unwrap_or_else(|| net::default_mac(i as u8));
            let Some(socket) = &spec.socket else {
                return Err(Error::Usage(format!("{name} has no socket")));
            };
            backends.devices.push(net::new(&name, Link::connect(&name, socket, 2)?, mac)?);
        }
        Ok(backends)
    }
}

/// A machine without devices that have backends.
struct Machine {
    vm: Vm,
    exit: ExitSignal,
    tsc_khz: u64,
    vcpus: Vec<kvm_ioctls::VcpuFd>,
}

impl Machine {
    fn new(config: &VmConfig, kernel: &Kernel, exit: ExitSignal) -> Result<Self> {
        let kvm = kvm::open()?;
        let memory = memory::create(config.memory_bytes, config.hugepages)?;
        let vm = Vm::new(kvm, memory, !kernel.is_ring3())?;
        let vcpus =
            (0..config.vcpus).map(|id| vm.create_vcpu(id, config.vcpus)).collect::<Result<Vec<_>>>()?;
        // An unstable counter has no frequency: the guest is told 0.
        let tsc_khz = vcpus.first().and_then(|v| v.get_tsc_khz().ok()).map_or(0, u64::from);
        Ok(Self { vm, exit, tsc_khz, vcpus })
    }

    fn run(
        self,
        config: &VmConfig,
        kernel: Kernel,
        mut backends: Backends,
        placement: &Placement,
        signals: OwnedFd,
    ) -> Result<()> {
        let mut events = EventManager::<Subscriber>::new().map_err(|e| event_error(&e))?;
        let mut mmio = Bus::default();
        let mut windows = Vec::new();
        let mut transports = Vec::new();
        for (name, process) in &mut backends.processes {
            tracing::debug!(device = name, "watching its VCP");
            events.add_subscriber(Box::new(process.watch(self.exit.clone())?));
        }
        for device in backends.devices.drain(..) {
            events.add_subscriber(Box::new(device.link().hangup_watch(self.exit.clone())?));
            transports.push(self.add_device(Box::new(device), &mut mmio, &mut windows)?);
        }
        let (rng, rng_queue) = Rng::new();
        let transport = self.add_device(Box::new(rng), &mut mmio, &mut windows)?;
        if let Some(kick) = transport.kick(0) {
            events.add_subscriber(Box::new(rng_queue.worker(kick.clone())));
        }
        transports.push(transport);
        let is_ring3 = kernel.is_ring3();
        let memory = self.vm.memory().clone();
        let rsdp = if is_ring3 { 0 } else { acpi::write(&memory, config.vcpus, &windows)? };
        let entry = kernel.load(&memory, config, self.tsc_khz, rsdp, windows.len())?;
        if let Some(first) = self.vcpus.first() {
            regs::set_entry(first, &memory, entry)?;
        }
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
        // A device whose vCPU thread did not stop may be locked; one whose backend is gone has nothing to stop.
        let backend_gone = matches!(reason, Ok(ExitReason::BackendGone { .. }));
        if stopped && !backend_gone {
            for transport in &transports {
                transport.shut_down();
            }
        }
        drop(raw);
        let mut outcome = outcome(reason?, config);
        if let Err(Error::GuestFailed(text)) = &mut outcome {
            // What became of a process says more than that its socket closed.
            for (name, process) in &mut backends.processes {
                if let Some(ended) = process.ended().filter(|_| text.starts_with(&format!("{name}:"))) {
                    *text = format!("{name}: {ended}; the guest was stopped");
                }
            }
        }
        outcome
    }

    fn add_device(
        &self,
        device: Box<dyn VirtioDevice>,
        mmio: &mut Bus,
        windows: &mut Vec<acpi::Window>,
    ) -> Result<Arc<MmioTransport>> {
        let index = windows.len();
        let too_many = || Error::Usage(format!("more than {} virtio devices", VIRTIO_GSIS.len()));
        let gsi = *VIRTIO_GSIS.get(index).ok_or_else(too_many)?;
        let base = VIRTIO_MMIO_START + VIRTIO_MMIO_STRIDE * index as u64;
        let transport = Arc::new(MmioTransport::new(device, self.vm.memory().clone())?);
        transport.bind(&self.vm, base, gsi)?;
        mmio.insert(base, VIRTIO_MMIO_STRIDE, transport.clone());
        windows.push(acpi::Window { base, gsi });
        Ok(transport)
    }
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
        ExitReason::BackendGone { device, reason } => Err(Error::GuestFailed(format!(
            "{device}: the vhost-user backend {reason}; the guest was stopped"
        ))),
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
