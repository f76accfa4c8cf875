//! What a machine does about the commands that it is given. Runs on the event loop's thread: nothing here waits for a
//! backend, a target or the guest.

use super::Machine;
use super::command::{Answer, Command, CommandError, PinTarget, Reply, ReplyTo, Restart};
use super::status::{DeviceKind, RunState, Status, VcpuStatus};
use crate::affinity;
use crate::config::MIN_MEMORY_BYTES;
use crate::exit::ExitReason;
use crate::virtio::balloon;

impl Machine {
    /// Carries out one command.
    pub(super) fn act(&mut self, command: Command, reply: ReplyTo) {
        tracing::debug!(?command, "command");
        let answer = match command {
            Command::Status => Ok(Reply::Status(Box::new(self.status()))),
            Command::Pause => self.pause(),
            Command::Resume => self.resume(),
            Command::Shutdown => self.press_power_button(),
            Command::Kill => {
                self.exit.give(ExitReason::User);
                Ok(Reply::Done)
            }
            Command::AddDisk(_) | Command::AddNet(_) => return self.plug(command, reply),
            Command::RemoveDisk(name) => return self.devices.ask_back(&name, DeviceKind::Disk, reply),
            Command::RemoveNet(name) => return self.devices.ask_back(&name, DeviceKind::Net, reply),
            Command::Resize { memory_bytes } => self.resize(memory_bytes),
            Command::Snapshot(path) => return self.snapshot(path, reply),
            // Answered when it is done.
            Command::Pin { target: PinTarget::Device(name), cpus } => {
                return self.pin_vcp(&name, cpus, reply);
            }
            Command::Pin { target: PinTarget::Vcpu(id), cpus } => self.pin_vcpu(id, cpus),
            Command::RestartVcp { device, how } => return self.restart_vcp(&device, how, reply),
            Command::RateLimits { device, limits } => match self.devices.keeper(&device) {
                None => Err(CommandError::NotFound(format!("device {device} with a backend"))),
                Some(keeper) => return keeper.limit(limits, self::answer(reply)),
            },
        };
        reply.give(answer);
    }

    fn status(&self) -> Status {
        let vcpu = |id| VcpuStatus {
            id,
            thread_id: self.vcpus.thread_id(id).unwrap_or(0),
            cpus: self.placement.vcpus.get(id).cloned().flatten(),
            exits: self.vcpus.exits(id).unwrap_or_default(),
            kvm: self.vcpus.kvm_exits(id),
        };
        Status {
            state: self.state,
            pid: std::process::id(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            memory_bytes: self.config.memory_bytes,
            balloon_bytes: self.balloon.as_ref().map(balloon::Handle::held_bytes),
            panicked: self.panic.has_panicked(),
            vcpus: (0..self.vcpus.count()).map(vcpu).collect(),
            devices: self.devices.status(),
        }
    }

    /// Has the guest's balloon hold what it shall not use.
    fn resize(&self, memory_bytes: u64) -> Answer {
        let all = self.config.memory_bytes;
        let Some(balloon) = &self.balloon else {
            let reason =
                "this guest has no balloon: bare-metal guests and guests on huge pages keep their memory";
            return Err(CommandError::Conflict(reason.into()));
        };
        if !(MIN_MEMORY_BYTES..=all).contains(&memory_bytes) {
            return Err(CommandError::Invalid(format!(
                "{memory_bytes} bytes are out of range: the guest has {all}, and needs {MIN_MEMORY_BYTES} at least"
            )));
        }
        if balloon.ask_for(all - memory_bytes) {
            Ok(Reply::Done)
        } else {
            Err(CommandError::Conflict("the guest has no driver for its balloon (virtio_balloon)".into()))
        }
    }

    fn press_power_button(&self) -> Answer {
        match &self.hotplug {
            Some(hotplug) => {
                hotplug.press();
                Ok(Reply::Done)
            }
            None => Err(CommandError::Conflict("a bare-metal guest has no power button: use kill".into())),
        }
    }

    fn pause(&mut self) -> Answer {
        if self.state == RunState::Running {
            if !self.vcpus.pause() {
                let reason = "a vCPU does not stop: it waits for a backend, or for who reads the console";
                return Err(CommandError::Failed(reason.into()));
            }
            self.vm.stop_clock();
            self.state = RunState::Paused;
        }
        Ok(Reply::Done)
    }

    fn resume(&mut self) -> Answer {
        self.not_saving()?;
        self.go_on();
        Ok(Reply::Done)
    }

    /// Lets paused vCPUs go on.
    pub(super) fn go_on(&mut self) {
        if self.state == RunState::Paused {
            self.vm.start_clock();
            let told = self.vcpus.each(|_| {
                Box::new(|vcpu| {
                    // Its watchdogs must not take the pause for a hang. A guest without kvmclock has no use for it.
                    let _ = vcpu.kvmclock_ctrl();
                })
            });
            if told.is_none() {
                tracing::debug!("a vCPU has ended while paused");
            }
            self.vcpus.resume();
            self.state = RunState::Running;
        }
    }

    pub(super) fn pin_vcpu(&mut self, id: usize, cpus: Vec<usize>) -> Answer {
        let thread = self.vcpus.thread_id(id).filter(|_| id < self.vcpus.count());
        let Some(thread) = thread else { return Err(CommandError::NotFound(format!("vCPU {id}"))) };
        affinity::confine(thread, self.allowed(&cpus)?)
            .map_err(|e| CommandError::Failed(crate::chain(&e)))?;
        if let Some(place) = self.placement.vcpus.get_mut(id) {
            *place = Some(cpus);
        }
        Ok(Reply::Done)
    }

    fn pin_vcp(&mut self, device: &str, cpus: Vec<usize>, reply: ReplyTo) {
        match (self.allowed(&cpus), self.devices.keeper(device)) {
            (Err(error), _) => reply.give(Err(error)),
            (_, None) => reply.give(Err(CommandError::NotFound(format!("VCP of a device {device}")))),
            (Ok(_), Some(keeper)) => {
                // Those that come later see it where it is.
                if let (Some((_, place)), [cpu]) =
                    (self.places.iter_mut().find(|(want, _)| want.name == device), &cpus[..])
                {
                    place.cpu = Some(*cpu);
                }
                keeper.pin(cpus, answer(reply));
            }
        }
    }

    /// CPUs that this process may use, all of them.
    fn allowed<'a>(&self, cpus: &'a [usize]) -> std::result::Result<&'a [usize], CommandError> {
        let allowed = affinity::allowed().map_err(|e| CommandError::Failed(crate::chain(&e)))?;
        if cpus.is_empty() {
            return Err(CommandError::Invalid("no CPU is named".into()));
        }
        match cpus.iter().find(|cpu| !allowed.contains(cpu)) {
            None => Ok(cpus),
            Some(cpu) => {
                let list = allowed.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
                let text = format!("CPU {cpu} is not among the CPUs that this process may use: {list}");
                Err(CommandError::Invalid(text))
            }
        }
    }

    fn restart_vcp(&mut self, device: &str, how: Restart, reply: ReplyTo) {
        let Some(keeper) = self.devices.keeper(device) else {
            return reply.give(Err(CommandError::NotFound(format!("device {device} with a backend"))));
        };
        match how {
            Restart::Kill => keeper.restart(answer(reply)),
            Restart::Upgrade => keeper.upgrade(answer(reply)),
        }
    }
}

/// Passes a keeper's answer on.
fn answer(reply: ReplyTo) -> crate::vcp::keeper::Reply {
    Box::new(move |how| reply.give(how.map(|()| Reply::Done).map_err(CommandError::Failed)))
}
