//! `vcp run`: a virtual machine put together, run and taken apart.
//!
//! | module | is |
//! | --- | --- |
//! | `mod.rs` | the order of start and end, and the loop between |
//! | [`command`] | what other threads ask of a running machine, and how |
//! | `act` | what is done about it |
//! | `snap` | snapshots |
//! | [`status`] | what a machine tells of itself |
//! | `devices`, `backends`, `switch`, `plug` | virtio devices, the processes behind them, and how both come later |
//! | `legacy` | ports |
//! | `outcome` | what the way the guest ended means |
//!
//! Threads: this one (console input, entropy, signals, commands), one per vCPU, and for each vhost-user device a keeper
//! and its connection's watchdog. Order of the start: everything that is in the user's hand (kernel, initrd, memory),
//! then the backends; the runtime directory goes when they are connected. Order of the end: vCPUs stop, keepers stop,
//! devices stop their queues, the terminal is restored, connections close, VCPs end.

mod act;
mod backends;
pub mod command;
mod devices;
mod legacy;
mod outcome;
mod plug;
mod snap;
pub mod status;
mod switch;

use std::io::{ErrorKind, IsTerminal, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use rustix::event::{EventfdFlags, eventfd};

use self::backends::Backend;
use self::command::{Commands, Control, Message};
use self::devices::{Backplane, Devices, PciBackplane, Places};
use self::snap::Saved;
use self::status::{DeviceKind, RunState};
use crate::boot::Kernel;
use crate::bus::Bus;
use crate::config::{MAX_MEMORY_BYTES, MAX_VCPUS, Transport, VmConfig};
use crate::devices::console::{Console, Stdout};
use crate::devices::hotplug::Hotplug;
use crate::devices::panic::PanicNotifier;
use crate::error::{Error, Result};
use crate::exit::{ExitReason, ExitSignal};
use crate::kvm::saved::restore_vcpu;
use crate::kvm::vcpu::{VcpuContext, Vcpus};
use crate::kvm::{self, Vm, memory, regs};
use crate::layout::{COM1_GSI, PCI_ECAM_LEN, PCI_ECAM_START, PCI_MMIO_END, PCI_MMIO_START};
use crate::pci::bus::{ConfigPorts, Ecam, Memory, PciBus};
use crate::placement::topology::Topology;
use crate::placement::{self, Placement, VcpPlace, Want};
use crate::snapshot::Snapshot;
use crate::terminal::{self, RawMode};
use crate::vcp::Programs;
use crate::vcp::cgroup::Groups;
use crate::virtio::balloon::{self, Balloon};
use crate::virtio::rng::Rng;
use crate::{acpi, api, confine, signal, vcp};

type Subscriber = Box<dyn MutEventSubscriber>;

/// Whether the guest has a balloon: it is a matter of small pages, and bare-metal guests have no use for one.
fn has_balloon(config: &VmConfig, is_ring3: bool) -> bool {
    !is_ring3 && !config.hugepages
}

/// Runs a virtual machine until it ends.
pub fn run(mut config: VmConfig) -> Result<()> {
    terminal::install_panic_hook();
    // Before anything is started: a second monitor with the same socket ends here.
    let sockets = api::server::Sockets::bind(&config)?;
    let snapshot = config.restore.clone().map(|path| take_over(&mut config, &path)).transpose()?;
    let kernel = if snapshot.is_none() { Some(Kernel::open(&config.kernel)?) } else { None };
    let signals = signal::install_end_handlers()?;
    let exit = ExitSignal::new()?;
    // Before anybody is confined, for it cannot be.
    vcp::spawn::prepare();
    let host = Topology::of_host()?;
    let wishes = backends::wishes(&config);
    let placement =
        placement::place(&host, &wishes, config.vcpus, config.vcpu_cpus.as_deref()).map_err(Error::Usage)?;
    place_memory(&host, &wishes, &placement, &mut config)?;
    // Before KVM makes threads of its own, which count as processes of the group that this one may have to leave.
    let groups = groups(&config);
    // The board first, with all that lies in its memory: what fails here fails sooner, and no target was troubled.
    let board = match (kernel, &snapshot) {
        (Some(kernel), _) => Board::new(&config, kernel)?,
        (None, Some(snapshot)) => Board::restore(&config, snapshot)?,
        (None, None) => return Err(Error::Usage("there is neither a kernel nor a snapshot".into())),
    };
    let saved = snapshot.map(|snapshot| snapshot.machine);
    let programs = Programs {
        iscsi: vcp::find_program("vcp-iscsi", config.vcp_iscsi.as_deref()),
        net: vcp::find_program("vcp-net", config.vcp_net.as_deref()),
        groups,
        guest_bytes: config.memory_bytes,
    };
    let backends = match backends::start_all(&programs, &config, &placement, &signals) {
        Err(Error::Interrupted) => {
            tracing::info!("ended by a signal while starting");
            return Ok(());
        }
        other => other?,
    };
    warn_of_emulation(board.is_ring3);
    match &programs.groups {
        Err(why) if !backends.is_empty() => {
            tracing::warn!("not confined: VCPs have no control groups: {why}");
        }
        Err(_) => {}
        Ok(groups) => {
            groups.missing().iter().for_each(|missing| tracing::warn!("not confined: {missing}"));
        }
    }
    let (control, commands) = Control::new()?;
    let name = config.name.clone();
    let api_control = control.clone();
    let parts = Parts { config, board, saved, backends, placement, programs, control, exit };
    let machine = Machine::start(parts, signals, &commands)?;
    let _api = sockets.serve(&name, api_control)?;
    confine::thread(confine::Kind::Main);
    machine.run(&commands)
}

/// Decides on which NUMA node the guest's memory is, and tells of VCPs that are on another.
fn place_memory(
    host: &Topology,
    wishes: &[Want],
    placement: &Placement,
    config: &mut VmConfig,
) -> Result<()> {
    let place = placement::memory_place(host, wishes, placement, config.memory_node).map_err(Error::Usage)?;
    if let Some(node) = place.node {
        tracing::info!(node, "guest memory comes from this NUMA node");
        for vcp in &place.afar {
            tracing::warn!(
                "{vcp} reaches guest memory on node {node} across: give it a CPU there, or --memory-node"
            );
        }
    }
    config.memory_node = place.node;
    Ok(())
}

/// Opens a snapshot, and makes of the user's description what it was made of.
fn take_over(config: &mut VmConfig, path: &std::path::Path) -> Result<Snapshot<Saved>> {
    let snapshot = Snapshot::<Saved>::open(path)?;
    let saved = &snapshot.machine;
    let (disks, nets) = saved.counts();
    if (config.disks.len(), config.nets.len()) != (disks, nets) {
        return Err(Error::Usage(format!(
            "the snapshot is of a machine with {disks} disks and {nets} nets: give the same ones in the same order, not {} and {}",
            config.disks.len(),
            config.nets.len()
        )));
    }
    let (vcpus, memory_bytes) = (saved.vcpus.len(), saved.memory_bytes);
    let vcpus = u8::try_from(vcpus).ok().filter(|n| (1..=MAX_VCPUS).contains(n));
    let fits = memory_bytes == snapshot.memory_len() && memory_bytes <= MAX_MEMORY_BYTES;
    let Some(vcpus) = vcpus.filter(|_| fits) else {
        return Err(Error::Snapshot(format!("{}: it is of an impossible machine", path.display())));
    };
    (config.vcpus, config.memory_bytes) = (vcpus, memory_bytes);
    config.cmdline.clone_from(&saved.cmdline);
    config.transport = Some(if saved.pci { Transport::Pci } else { Transport::Mmio });
    Ok(snapshot)
}

/// Control groups for VCPs, if any of them will be ours.
fn groups(config: &VmConfig) -> std::result::Result<Arc<Groups>, String> {
    let ours = config.disks.iter().any(|disk| disk.url.is_some())
        || config.nets.iter().any(|net| net.user || net.tap.is_some())
        || config.api_socket.is_some();
    if !ours {
        return Err("there was no VCP to bound".into());
    }
    Groups::of_host().map(Arc::new)
}

/// Says what would otherwise show as a guest that crawls; after all that may fail, so that an error is one line.
fn warn_of_emulation(is_ring3: bool) {
    if !is_ring3 && std::path::Path::new("/sys/module/kvm_pvm").exists() {
        tracing::warn!(
            "this host's KVM (kvm_pvm) emulates ring 0 in software: a Linux guest is far too slow to be of use; see `vcp check`"
        );
    }
}

/// Memory with all that the guest finds in it, and vCPUs that do not run yet.
struct Board {
    vm: Vm,
    is_ring3: bool,
    /// Windows of virtio-mmio devices; none with PCI.
    windows: Vec<acpi::Window>,
    pci: bool,
    vcpus: Vec<kvm_ioctls::VcpuFd>,
}

impl Board {
    fn new(config: &VmConfig, kernel: Kernel) -> Result<Self> {
        let is_ring3 = kernel.is_ring3();
        let pci = has_pci(config, is_ring3)?;
        // Entropy and balloon are the monitor's own.
        let own = 1 + usize::from(has_balloon(config, is_ring3));
        let count = config.disks.len() + config.nets.len() + own;
        let windows = devices::windows(if pci { 0 } else { count })?;
        let kvm = kvm::open()?;
        let memory = memory::create_on(config.memory_bytes, config.hugepages, config.memory_node)?;
        let vm = Vm::new(kvm, memory, !is_ring3)?;
        let vcpus =
            (0..config.vcpus).map(|id| vm.create_vcpu(id, config.vcpus)).collect::<Result<Vec<_>>>()?;
        // An unstable counter has no frequency: the guest is told 0.
        let tsc_khz = vcpus.first().and_then(|v| v.get_tsc_khz().ok()).map_or(0, u64::from);
        let memory = vm.memory();
        let platform = acpi::Platform { vcpus: config.vcpus, windows: &windows, pci };
        let rsdp = if is_ring3 { 0 } else { acpi::write(memory, &platform)? };
        let entry = kernel.load(memory, config, tsc_khz, rsdp, windows.len())?;
        if let Some(first) = vcpus.first() {
            regs::set_entry(first, memory, entry)?;
        }
        Ok(Self { vm, is_ring3, windows, pci, vcpus })
    }

    /// The board of a snapshot.
    fn restore(config: &VmConfig, snapshot: &Snapshot<Saved>) -> Result<Self> {
        let saved = &snapshot.machine;
        let windows = devices::windows(if saved.pci { 0 } else { saved.devices.len() })?;
        let kvm = kvm::open()?;
        let memory = memory::create_on(config.memory_bytes, config.hugepages, config.memory_node)?;
        snapshot.load_memory(snap::memory_file(&memory)?)?;
        let vm = Vm::new(kvm, memory, !saved.is_ring3)?;
        let vcpus =
            (0..config.vcpus).map(|id| vm.create_vcpu(id, config.vcpus)).collect::<Result<Vec<_>>>()?;
        vm.restore(&saved.vm)?;
        for (vcpu, saved) in vcpus.iter().zip(&saved.vcpus) {
            restore_vcpu(vcpu, saved)?;
        }
        Ok(Self { vm, is_ring3: saved.is_ring3, windows, pci: saved.pci, vcpus })
    }
}

/// Whether devices are on PCI: yes, but for bare-metal guests, which know virtio-mmio only.
fn has_pci(config: &VmConfig, is_ring3: bool) -> Result<bool> {
    match (config.transport, is_ring3) {
        (Some(Transport::Pci), true) => Err(Error::Usage(
            "a bare-metal guest has its devices on virtio-mmio: leave out --transport".into(),
        )),
        (Some(transport), _) => Ok(transport == Transport::Pci),
        (None, is_ring3) => Ok(!is_ring3),
    }
}

/// What a machine is started with.
struct Parts {
    config: VmConfig,
    board: Board,
    /// The snapshot that the board is of.
    saved: Option<Saved>,
    backends: Vec<Backend>,
    placement: Placement,
    programs: Programs,
    control: Control,
    exit: ExitSignal,
}

/// A machine that runs. It belongs to the event loop's thread.
pub struct Machine {
    config: VmConfig,
    placement: Placement,
    vm: Vm,
    exit: ExitSignal,
    control: Control,
    devices: Devices,
    /// VCPs of ours with what was wanted for them and where they are; those that are being started, too.
    places: Vec<(Want, VcpPlace)>,
    /// Devices whose backends are being started, and what ends that.
    coming: Vec<plug::Coming>,
    abort: OwnedFd,
    /// How the guest is told of events; a bare-metal guest cannot be.
    hotplug: Option<Arc<Hotplug>>,
    panic: PanicNotifier,
    balloon: Option<balloon::Handle>,
    console: Arc<Console>,
    pci_ports: Option<Arc<ConfigPorts>>,
    /// The thread that works on a snapshot.
    saving: Option<std::thread::JoinHandle<()>>,
    state: RunState,
    started: Instant,
    events: EventManager<Subscriber>,
    vcpus: Vcpus,
    raw: Option<RawMode>,
    /// Last, for with it go the control groups: KVM's own threads must have left them.
    programs: Programs,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").finish_non_exhaustive()
    }
}

impl Machine {
    /// Connects devices and console to the board, and lets the guest go.
    fn start(parts: Parts, signals: OwnedFd, commands: &Commands) -> Result<Self> {
        let Parts { config, board, saved, backends, placement, programs, control, exit } = parts;
        let Board { vm, is_ring3, windows, pci, vcpus } = board;
        let abort = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(Error::os("create an eventfd"))?;
        let mut events = EventManager::<Subscriber>::new().map_err(|e| event_error(&e))?;
        let mmio = Arc::new(Bus::default());
        let bus = pci.then(PciBus::new);
        let hotplug = if is_ring3 { None } else { Some(legacy::hotplug(&vm, bus.clone(), &control)?) };
        let backplane = match (&bus, &hotplug) {
            (Some(bus), Some(hotplug)) => {
                mmio.insert(PCI_ECAM_START, PCI_ECAM_LEN, Arc::new(Ecam(bus.clone())));
                mmio.insert(PCI_MMIO_START, PCI_MMIO_END - PCI_MMIO_START, Arc::new(Memory(bus.clone())));
                Backplane::Pci(PciBackplane::new(bus.clone(), hotplug.clone())?)
            }
            _ => Backplane::Mmio(windows),
        };
        let mut devices = Devices::new(backplane, mmio.clone(), exit.clone());
        let mut places = Places::of(saved.as_ref());
        for backend in backends {
            let place = places.next(backend.kind);
            devices.add_backend(&vm, backend, place)?;
        }
        let (rng, rng_queue) = Rng::new();
        let transport = devices.add_own(&vm, DeviceKind::Rng, Box::new(rng), places.next(DeviceKind::Rng))?;
        if let Some(kick) = transport.kick(0) {
            events.add_subscriber(Box::new(rng_queue.worker(kick.clone())));
        }
        let with_balloon = match &saved {
            Some(saved) => saved.devices.iter().any(|device| device.kind == DeviceKind::Balloon),
            None => has_balloon(&config, is_ring3),
        };
        let mut balloon = None;
        if with_balloon {
            let (device, handle) = Balloon::new();
            let place = places.next(DeviceKind::Balloon);
            let transport = devices.add_own(&vm, DeviceKind::Balloon, Box::new(device), place)?;
            let kicks = (0..).map_while(|queue| transport.kick(queue).cloned()).collect();
            events.add_subscriber(Box::new(handle.worker(kicks)));
            balloon = Some(handle);
        }
        let terminal = std::io::stdin().is_terminal();
        let (console, irq, input) = Console::new(Box::new(Stdout), exit.clone(), terminal, is_ring3)?;
        vm.irqfd(&irq, COM1_GSI)?;
        let panic = PanicNotifier::default();
        let pci_ports = bus.map(|bus| Arc::new(ConfigPorts::new(bus)));
        let pio = Arc::new(match &hotplug {
            None => legacy::bare_ports(console.clone(), &exit),
            Some(hotplug) => {
                legacy::ports(console.clone(), &exit, hotplug.clone(), &panic, pci_ports.clone())
            }
        });
        let wake = legacy::Wake { signals, exit: exit.clone(), commands: commands.wake.clone() };
        events.add_subscriber(Box::new(wake));
        say_ready(&config)?;
        let raw = RawMode::enter();
        events.add_subscriber(Box::new(input));
        let places = backends::wishes(&config).into_iter().zip(placement.vcps.iter().copied()).collect();
        let context = VcpuContext { pio, mmio, exit: exit.clone() };
        let vcpus = Vcpus::start(vcpus, &context, &placement.vcpus, saved.is_some())?;
        let mut machine = Self {
            config,
            placement,
            programs,
            vm,
            exit,
            control,
            devices,
            places,
            coming: Vec::new(),
            abort,
            hotplug,
            panic,
            balloon,
            console,
            pci_ports,
            saving: None,
            state: RunState::Running,
            started: Instant::now(),
            events,
            vcpus,
            raw,
        };
        if let Some(saved) = &saved {
            machine.restore(saved)?;
        }
        Ok(machine)
    }

    /// Brings devices to where they were, and lets the guest go on.
    fn restore(&mut self, saved: &Saved) -> Result<()> {
        self.console.restore(&saved.console, Box::new(Stdout))?;
        if let (Some(hotplug), Some(events)) = (&self.hotplug, saved.events) {
            hotplug.restore(events);
        }
        if let (Some(ports), Some(address)) = (&self.pci_ports, saved.pci_address) {
            ports.set_address(address);
        }
        self.panic.restore(saved.panicked);
        self.devices.restore(saved)?;
        if !self.vcpus.pause() {
            return Err(Error::Snapshot("a vCPU does not begin".into()));
        }
        self.state = RunState::Paused;
        self.go_on();
        Ok(())
    }

    /// Runs until the guest ends, and takes the machine apart.
    fn run(mut self, commands: &Commands) -> Result<()> {
        let reason = self.serve(commands);
        self.turn_away();
        self.log_exits();
        let stopped = self.vcpus.stop();
        // From here on nobody is started again. The processes themselves end last.
        let processes = self.devices.stop_keepers();
        // A device whose vCPU thread did not stop may be locked; one without a backend has nothing to stop.
        if stopped {
            self.devices.shut_down();
        }
        drop(self.raw.take());
        drop(self.devices);
        drop(processes);
        outcome::of(reason?, &self.config, self.panic.has_panicked())
    }

    /// What the guest's processors came out for.
    fn log_exits(&self) {
        for vcpu in 0..self.vcpus.count() {
            let Some(e) = self.vcpus.exits(vcpu) else { continue };
            tracing::info!(
                vcpu,
                total = e.total(),
                io_in = e.io_in,
                io_out = e.io_out,
                mmio_read = e.mmio_read,
                mmio_write = e.mmio_write,
                interrupted = e.interrupted,
                other = e.other,
                "exits to the monitor"
            );
        }
    }

    /// The event loop.
    fn serve(&mut self, commands: &Commands) -> Result<ExitReason> {
        loop {
            if let Some(reason) = self.exit.reason() {
                return Ok(reason);
            }
            match self.events.run() {
                Ok(_) => {}
                Err(event_manager::Error::Epoll(e))
                    if std::io::Error::from_raw_os_error(e.errno()).kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(event_error(&e)),
            }
            while let Ok(message) = commands.receiver.try_recv() {
                match message {
                    Message::Command(command, reply) => self.act(command, reply),
                    Message::Work(work) => work(self),
                }
            }
        }
    }
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

fn event_error(e: &event_manager::Error) -> Error {
    Error::Os { action: "run the event loop", source: std::io::Error::other(e.to_string()) }
}

#[cfg(test)]
mod tests;
