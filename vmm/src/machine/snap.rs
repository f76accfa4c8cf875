//! Snapshots: a paused machine written to a file, and a machine made from one.
//!
//! ```text
//! paused -> queues rest, nothing in flight (a thread: backends may take their time)
//!        -> vCPUs, interrupt controllers, devices are read (the loop: all that could raise an interrupt rests)
//!        -> memory is written (a thread) -> queues go on -> still paused
//! ```
//!
//! The file says nothing of where disks are, and holds no secret of theirs: who restores gives the same disks and nets in
//! the same order. A disk's content is not in it: it must be as it was when the snapshot was made.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::Machine;
use super::command::{CommandError, Message, Reply, ReplyTo};
use super::status::{DeviceKind, RunState};
use crate::devices::console::SavedConsole;
use crate::error::{Error, Result};
use crate::kvm::GuestMemory;
use crate::kvm::saved::{SavedVcpu, SavedVm, save_vcpu};
use crate::snapshot;
use crate::virtio::{SavedTransport, Transport};

/// A machine in a snapshot.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Saved {
    /// Guest memory, bytes.
    pub memory_bytes: u64,
    /// A bare-metal guest.
    pub is_ring3: bool,
    /// Devices are on PCI.
    pub pci: bool,
    /// The kernel's command line, which says what a reset is.
    pub cmdline: String,
    pub(super) vm: SavedVm,
    pub(super) vcpus: Vec<SavedVcpu>,
    pub(super) console: SavedConsole,
    pub(super) events: Option<[u32; 3]>,
    pub(super) pci_address: Option<u32>,
    pub(super) panicked: bool,
    pub(super) devices: Vec<SavedDevice>,
}

impl Saved {
    /// Number of disks and of nets.
    pub(super) fn counts(&self) -> (usize, usize) {
        let count = |kind| self.devices.iter().filter(|device| device.kind == kind).count();
        (count(DeviceKind::Disk), count(DeviceKind::Net))
    }
}

/// A device in a snapshot.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedDevice {
    pub(super) name: String,
    pub(super) kind: DeviceKind,
    /// Slot of the bus, and where its registers are given room; none on virtio-mmio.
    pub(super) slot: Option<(u8, u64)>,
    pub(super) transport: Option<SavedTransport>,
}

/// A device that is to be saved.
pub(super) struct Target {
    pub(super) saved: SavedDevice,
    pub(super) transport: Arc<dyn Transport>,
}

/// The file that guest memory is.
pub(super) fn memory_file(memory: &GuestMemory) -> Result<&std::fs::File> {
    let file = memory.iter().next().and_then(|region| region.file_offset());
    file.map(vm_memory::FileOffset::file).ok_or_else(|| Error::Snapshot("guest memory is in no file".into()))
}

impl Machine {
    /// Begins to write a snapshot.
    pub(super) fn snapshot(&mut self, path: PathBuf, reply: ReplyTo) {
        if self.state != RunState::Paused {
            let reason = "a running machine cannot be saved: pause it first";
            return reply.give(Err(CommandError::Conflict(reason.into())));
        }
        if let Err(e) = self.not_saving() {
            return reply.give(Err(e));
        }
        let (targets, control) = (self.devices.targets(), self.control.clone());
        self.on_a_thread(move || {
            let rested = rest(&targets);
            control.post(Message::Work(Box::new(move |machine| {
                machine.saving = None;
                match rested {
                    Ok(()) => machine.write_snapshot(path, targets, reply),
                    Err(e) => reply.give(Err(e.into())),
                }
            })));
        });
    }

    /// An error while a snapshot is being written: what would disturb it has to wait.
    pub(super) fn not_saving(&self) -> std::result::Result<(), CommandError> {
        match self.saving {
            Some(_) => Err(CommandError::Conflict("a snapshot is being written".into())),
            None => Ok(()),
        }
    }

    /// The queues rest: reads the machine and has its memory written.
    fn write_snapshot(&mut self, path: PathBuf, targets: Vec<Target>, reply: ReplyTo) {
        let saved = self.save();
        let (memory, control) = (self.vm.memory().clone(), self.control.clone());
        self.on_a_thread(move || {
            let written = saved.and_then(|mut saved| {
                let mut transports = Vec::new();
                for Target { saved: device, transport } in targets {
                    saved.devices.push(SavedDevice { transport: Some(transport.save()), ..device });
                    transports.push(transport);
                }
                let len = memory.iter().map(GuestMemoryRegion::len).sum();
                let written = memory_file(&memory).and_then(|file| snapshot::write(&path, &saved, file, len));
                // They go on whatever became of the file.
                transports.iter().map(|transport| transport.go_on()).fold(written, Result::and)
            });
            control.post(Message::Work(Box::new(move |machine| {
                machine.saving = None;
                reply.give(written.map(|()| Reply::Done).map_err(CommandError::from));
            })));
        });
    }

    /// All but devices and memory.
    fn save(&mut self) -> Result<Saved> {
        let msrs = Arc::new(self.vm.msr_indices()?);
        let vcpus = self.vcpus.each(|_| {
            let msrs = msrs.clone();
            Box::new(move |vcpu| save_vcpu(vcpu, &msrs))
        });
        let vcpus = vcpus.ok_or_else(|| Error::Snapshot("a vCPU has ended".into()))?;
        Ok(Saved {
            memory_bytes: self.config.memory_bytes,
            is_ring3: self.hotplug.is_none(),
            pci: self.pci_ports.is_some(),
            cmdline: self.config.cmdline.clone(),
            vm: self.vm.save()?,
            vcpus: vcpus.into_iter().collect::<Result<_>>()?,
            console: self.console.save(),
            events: self.hotplug.as_ref().map(|hotplug| hotplug.save()),
            pci_address: self.pci_ports.as_ref().map(|ports| ports.address()),
            panicked: self.panic.has_panicked(),
            devices: Vec::new(),
        })
    }

    fn on_a_thread(&mut self, work: impl FnOnce() + Send + 'static) {
        match std::thread::Builder::new().name("snapshot".into()).spawn(work) {
            Ok(thread) => self.saving = Some(thread),
            // Who asked is told that nobody answers.
            Err(e) => tracing::error!(error = %e, "cannot start a thread"),
        }
    }
}

/// Has all queues rest, or none.
fn rest(targets: &[Target]) -> Result<()> {
    for (done, target) in targets.iter().enumerate() {
        if let Err(e) = target.transport.quiesce() {
            for target in targets.iter().take(done + 1) {
                if let Err(e) = target.transport.go_on() {
                    tracing::error!(device = target.saved.name, error = %crate::chain(&e), "the queues do not go on");
                }
            }
            return Err(e);
        }
    }
    Ok(())
}
