//! Devices that come while the guest runs: a thread gets the backend ready, however long its login takes, and the machine
//! plugs the device in when it is.

use std::thread::JoinHandle;

use super::Machine;
use super::backends::{self, Backend};
use super::command::{Command, CommandError, Message, Reply, ReplyTo};
use super::status::DeviceKind;
use crate::error::{Error, Result};
use crate::placement::topology::Topology;
use crate::placement::{self, VcpPlace, Want};

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
        let wish = match &command {
            Command::AddDisk(disk) => backends::disk_wish(&name, disk),
            Command::AddNet(net) => backends::net_wish(&name, net),
            _ => None,
        };
        let place = match wish.map(|wish| self.make_room(wish)).transpose() {
            Ok(place) => place.unwrap_or_default(),
            Err(e) => return reply.give(Err(e)),
        };
        let interrupt = match self.abort.try_clone().map_err(Error::os("duplicate a descriptor")) {
            Ok(interrupt) => interrupt,
            Err(e) => return reply.give(Err(e.into())),
        };
        let (control, programs, device) = (self.control.clone(), self.programs.clone(), name.clone());
        let work = move || {
            let backend = match command {
                Command::AddDisk(disk) => {
                    backends::start_one_disk(&programs, &device, &disk, place, &interrupt)
                }
                Command::AddNet(net) => {
                    backends::start_net(&programs, &device, index, &net, place, &interrupt)
                }
                _ => return,
            };
            control.post(Message::Work(Box::new(move |machine| machine.arrived(&device, backend, reply))));
        };
        match std::thread::Builder::new().name(format!("{name}-start")).spawn(work) {
            Ok(thread) => self.coming.push(Coming { name, thread }),
            // Who asked is told that nobody answers.
            Err(e) => {
                tracing::error!(device = name, error = %e, "cannot start a thread");
                self.places.retain(|(want, _)| want.name != name);
            }
        }
    }

    /// Finds a place for one more VCP beside those that are there, and has vCPUs make room for it.
    fn make_room(&mut self, want: Want) -> std::result::Result<VcpPlace, CommandError> {
        let host = Topology::of_host()?;
        // Those that have gone make room.
        let (devices, coming) = (&self.devices, &self.coming);
        self.places.retain(|(want, _)| devices.has(&want.name) || coming.iter().any(|c| c.name == want.name));
        let placed = placement::place_later(&host, &self.places, &self.placement.vcpus, &want)
            .map_err(CommandError::Conflict)?;
        let place = placed.vcps.first().copied().unwrap_or_default();
        for (id, cpus) in placed.vcpus.into_iter().enumerate() {
            if let Some(cpus) = cpus.filter(|cpus| self.placement.vcpus.get(id) != Some(&Some(cpus.clone())))
            {
                tracing::info!(vcpu = id, ?cpus, device = want.name, "the vCPU makes room");
                self.pin_vcpu(id, cpus)?;
            }
        }
        self.places.push((want, place));
        Ok(place)
    }

    /// A backend is there, or is not to be had.
    fn arrived(&mut self, name: &str, backend: Result<Backend>, reply: ReplyTo) {
        self.coming.retain(|coming| coming.name != name);
        let added = backend.and_then(|backend| self.devices.add_backend(&self.vm, backend, None));
        if added.is_err() {
            self.places.retain(|(want, _)| want.name != name);
        }
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
