//! Devices that come while the guest runs: a thread gets the backend ready, however long its login takes, and the machine
//! plugs the device in when it is.

use std::thread::JoinHandle;

use super::Machine;
use super::backends::{self, Backend};
use super::command::{Command, CommandError, Message, Reply, ReplyTo};
use super::status::DeviceKind;
use crate::error::{Error, Result};

/// A device that is on its way.
pub(super) struct Coming {
    name: String,
    thread: JoinHandle<()>,
}

impl Machine {
    /// Adds a device.
    pub(super) fn plug(&mut self, command: Command, reply: ReplyTo) {
        let (kind, checked) = match &command {
            Command::AddDisk(spec) => (DeviceKind::Disk, spec.validate()),
            Command::AddNet(spec) => (DeviceKind::Net, spec.validate()),
            _ => return reply.give(Err(CommandError::NotYet("adding that"))),
        };
        if let Err(reason) = checked {
            return reply.give(Err(CommandError::Invalid(reason)));
        }
        if let Some(reason) = self.devices.cannot_add() {
            return reply.give(Err(reason));
        }
        let name = |index: usize| match kind {
            DeviceKind::Net => backends::net_name(index),
            _ => backends::disk_name(index),
        };
        let taken = |name: &String| self.devices.has(name) || self.coming.iter().any(|c| c.name == *name);
        let Some((index, name)) = (0..256).map(|i| (i, name(i))).find(|(_, name)| !taken(name)) else {
            return reply.give(Err(CommandError::Conflict("there are no names left".into())));
        };
        let interrupt = match self.abort.try_clone().map_err(Error::os("duplicate a descriptor")) {
            Ok(interrupt) => interrupt,
            Err(e) => return reply.give(Err(e.into())),
        };
        let (control, programs, device) = (self.control.clone(), self.programs.clone(), name.clone());
        let work = move || {
            let backend = match command {
                Command::AddDisk(disk) => backends::start_one_disk(&programs, &device, &disk, &interrupt),
                Command::AddNet(net) => backends::start_net(&programs, &device, index, &net, &interrupt),
                _ => return,
            };
            control.post(Message::Work(Box::new(move |machine| machine.arrived(&device, backend, reply))));
        };
        match std::thread::Builder::new().name(format!("{name}-start")).spawn(work) {
            Ok(thread) => self.coming.push(Coming { name, thread }),
            // Who asked is told that nobody answers.
            Err(e) => tracing::error!(device = name, error = %e, "cannot start a thread"),
        }
    }

    /// A backend is there, or is not to be had.
    fn arrived(&mut self, name: &str, backend: Result<Backend>, reply: ReplyTo) {
        self.coming.retain(|coming| coming.name != name);
        let added = backend.and_then(|backend| self.devices.add_backend(&self.vm, backend, None));
        reply.give(match added {
            Ok(()) => {
                self.devices.announce(name);
                Ok(Reply::Added(name.to_owned()))
            }
            Err(e) => Err(e.into()),
        });
    }

    /// Ends what is on its way, at the end of the run.
    pub(super) fn turn_away(&mut self) {
        // Fails only if the counter is full, and then it is signalled.
        let _ = rustix::io::write(&self.abort, &1u64.to_ne_bytes());
        for coming in self.coming.drain(..) {
            let _ = coming.thread.join();
        }
        if let Some(thread) = self.saving.take() {
            let _ = thread.join();
        }
    }
}
