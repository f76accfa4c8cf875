//! vCPU threads: run the guest, hand its port and memory accesses to the buses, say why it stopped; stop, go on, and do
//! something else with their vCPU while they are stopped.
//!
//! A running vCPU is stopped by a flag and a signal that makes `KVM_RUN` return. The signal may arrive just before
//! `KVM_RUN` starts and be lost, so that the one who stops repeats it until the thread is where it should be.

use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use super::exits::{ExitCounters, ExitKind};
use super::stats::{KvmExits, VcpuStats};
use crate::affinity;
use crate::bus::Bus;
use crate::error::{Error, Result};
use crate::exit::{ExitReason, ExitSignal};

/// How often a vCPU thread is kicked while it is being stopped.
const KICK_INTERVAL: Duration = Duration::from_millis(5);
/// How long the vCPU threads get to stop before they are given up. One may sit in a write to a console that nobody
/// reads, or wait for a backend.
const STOP_DEADLINE: Duration = Duration::from_secs(3);

/// The buses and the way out, shared by all vCPUs.
#[derive(Clone, Debug)]
pub struct VcpuContext {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Where a vCPU says that the guest has ended.
    pub exit: ExitSignal,
}

/// What the threads shall do.
const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

type Job = Box<dyn FnOnce(&mut VcpuFd) + Send>;

/// Where a thread is.
#[derive(Default)]
struct Place {
    /// It waits with its vCPU in a state that can be read.
    parked: bool,
    /// It has ended.
    ended: bool,
    job: Option<Job>,
}

/// What one thread shares with the machine.
#[derive(Default)]
struct Shared {
    want: AtomicU8,
    places: Mutex<Vec<Place>>,
    changed: Condvar,
}

impl Shared {
    fn places(&self) -> MutexGuard<'_, Vec<Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, what: u8) {
        // Under the lock, so that a thread that is about to wait sees it.
        let _places = self.places();
        self.want.store(what, Ordering::Release);
        self.changed.notify_all();
    }
}

/// One vCPU's thread as others see it.
#[derive(Debug)]
struct Thread {
    handle: JoinHandle<()>,
    id: Arc<AtomicI32>,
    counters: Arc<ExitCounters>,
    stats: Option<VcpuStats>,
}

/// The running vCPU threads.
pub struct Vcpus {
    threads: Vec<Thread>,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Vcpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vcpus").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}

impl Vcpus {
    /// Starts one thread per vCPU, each confined to the host CPUs given for it (`None`: wherever the process may).
    /// `paused`: they do not run before [`Vcpus::resume`].
    pub fn start(
        vcpus: Vec<VcpuFd>,
        context: &VcpuContext,
        cpus: &[Option<Vec<usize>>],
        paused: bool,
    ) -> Result<Self> {
        crate::signal::install_kick_handler()?;
        let shared = Shared::default();
        shared.want.store(if paused { PAUSE } else { RUN }, Ordering::Release);
        shared.places().resize_with(vcpus.len(), Place::default);
        let mut running = Self { threads: Vec::new(), shared: Arc::new(shared) };
        for (id, fd) in vcpus.into_iter().enumerate() {
            let (counters, thread_id) = (Arc::new(ExitCounters::default()), Arc::new(AtomicI32::new(0)));
            let mut worker = Worker {
                id,
                fd,
                context: context.clone(),
                shared: running.shared.clone(),
                counters: counters.clone(),
            };
            let stats = VcpuStats::open(&worker.fd);
            if let Err(e) = &stats {
                tracing::debug!(vcpu = id, "KVM does not tell its statistics: {e}");
            }
            let cpus = cpus.get(id).cloned().flatten();
            let handle = std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn({
                    let thread_id = thread_id.clone();
                    move || {
                        thread_id.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
                        if let Some(cpus) = cpus
                            && let Err(e) = affinity::confine_thread(&cpus)
                        {
                            tracing::warn!(vcpu = id, error = %e, "cannot pin the vCPU thread");
                        }
                        crate::confine::thread(crate::confine::Kind::Vcpu);
                        worker.work();
                    }
                })
                .map_err(Error::os("start a vCPU thread"))?;
            running.threads.push(Thread { handle, id: thread_id, counters, stats: stats.ok() });
        }
        Ok(running)
    }

    /// Number of vCPUs.
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// The thread of a vCPU on the host; 0 before it runs.
    pub fn thread_id(&self, vcpu: usize) -> Option<i32> {
        self.threads.get(vcpu).map(|thread| thread.id.load(Ordering::Acquire))
    }

    /// The exits of a vCPU.
    pub fn exits(&self, vcpu: usize) -> Option<super::exits::Exits> {
        self.threads.get(vcpu).map(|thread| thread.counters.read())
    }

    /// The exits of a vCPU as KVM counts them, if it tells.
    pub fn kvm_exits(&self, vcpu: usize) -> Option<KvmExits> {
        self.threads.get(vcpu)?.stats.as_ref()?.read().ok()
    }

    /// Stops all vCPUs until [`Vcpus::resume`]. False if one did not stop in time; all go on then.
    pub fn pause(&self) -> bool {
        self.shared.want(PAUSE);
        let paused = self.kick_until(|place| place.parked || place.ended);
        if !paused {
            self.resume();
        }
        paused
    }

    /// Lets the vCPUs go on.
    pub fn resume(&self) {
        self.shared.want(RUN);
    }

    /// Has each vCPU's own thread do something with it, one after the other, while they are paused. `None` if one of them
    /// is not paused.
    pub fn each<T: Send + 'static>(
        &self,
        mut job: impl FnMut(usize) -> Box<dyn FnOnce(&mut VcpuFd) -> T + Send>,
    ) -> Option<Vec<T>> {
        (0..self.count())
            .map(|id| {
                let (sender, receiver) = mpsc::sync_channel(1);
                let job = job(id);
                let mut places = self.shared.places();
                let place = places.get_mut(id).filter(|place| place.parked)?;
                place.job = Some(Box::new(move |vcpu| {
                    let _ = sender.send(job(vcpu));
                }));
                drop(places);
                self.shared.changed.notify_all();
                receiver.recv().ok()
            })
            .collect()
    }

    /// Stops all vCPUs for good. False if a thread did not stop in time; it is left behind for the process' end.
    pub fn stop(mut self) -> bool {
        self.halt()
    }

    fn halt(&mut self) -> bool {
        self.shared.want(STOP);
        if !self.kick_until(|place| place.ended) {
            tracing::warn!("a vCPU thread does not stop");
            self.threads.clear();
            return false;
        }
        for thread in self.threads.drain(..) {
            let _ = thread.handle.join();
        }
        true
    }

    /// Kicks those threads that are not there yet until all are, or the deadline is over.
    fn kick_until(&self, there: impl Fn(&Place) -> bool) -> bool {
        let deadline = Instant::now() + STOP_DEADLINE;
        let mut places = self.shared.places();
        loop {
            let late: Vec<_> = places.iter().zip(&self.threads).filter(|(place, _)| !there(place)).collect();
            if late.is_empty() {
                return true;
            }
            if Instant::now() > deadline {
                return false;
            }
            for (_, thread) in late {
                // An error means that the thread has just ended.
                let _ = thread.handle.kill(SIGRTMIN());
            }
            let waited = self.shared.changed.wait_timeout(places, KICK_INTERVAL);
            places = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.halt();
    }
}

/// What a vCPU thread works with.
struct Worker {
    id: usize,
    fd: VcpuFd,
    context: VcpuContext,
    shared: Arc<Shared>,
    counters: Arc<ExitCounters>,
}

/// Says that the thread is over, and ends the run if it panicked: a guest does not go on with one vCPU missing.
impl Drop for Worker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.context.exit.give(ExitReason::Internal("a vCPU thread panicked".into()));
        }
        if let Some(place) = self.shared.places().get_mut(self.id) {
            place.ended = true;
        }
        self.shared.changed.notify_all();
    }
}

impl Worker {
    fn work(&mut self) {
        loop {
            match self.shared.want.load(Ordering::Acquire) {
                RUN => {}
                PAUSE => {
                    self.park();
                    continue;
                }
                _ => break,
            }
            let reason = match self.fd.run() {
                Ok(exit) => {
                    self.counters.count(kind(&exit));
                    handle(exit, &self.context)
                }
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                    self.counters.count(ExitKind::Interrupted);
                    None
                }
                Err(e) => Some(ExitReason::VcpuFailed(format!("KVM cannot run vCPU {}: {e}", self.id))),
            };
            if let Some(reason) = reason {
                return self.end(reason);
            }
        }
        if let Ok(regs) = self.fd.get_regs() {
            tracing::debug!(vcpu = self.id, rip = format_args!("{:#x}", regs.rip), "stopped");
        }
    }

    /// Waits until the vCPU shall go on or end, and does what it is given meanwhile.
    fn park(&mut self) {
        // An access that was handled here is completed by KVM when it is entered again: only then are the registers whole.
        self.fd.set_kvm_immediate_exit(1);
        let entered = self.fd.run();
        if let Ok(exit) = entered {
            // Completing one access of a string instruction may bring the next, which is due as any other.
            if let Some(reason) = handle(exit, &self.context) {
                self.fd.set_kvm_immediate_exit(0);
                self.context.exit.give(reason);
                return;
            }
            self.fd.set_kvm_immediate_exit(0);
            return;
        }
        self.fd.set_kvm_immediate_exit(0);
        let shared = self.shared.clone();
        let mut places = shared.places();
        loop {
            let Some(place) = places.get_mut(self.id) else { return };
            if let Some(job) = place.job.take() {
                drop(places);
                job(&mut self.fd);
                places = shared.places();
                continue;
            }
            let paused = shared.want.load(Ordering::Acquire) == PAUSE;
            if std::mem::replace(&mut place.parked, paused) != paused {
                shared.changed.notify_all();
            }
            if !paused {
                return;
            }
            places = shared.changed.wait(places).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The guest is over for this vCPU's sake.
    fn end(&mut self, mut reason: ExitReason) {
        if let ExitReason::VcpuFailed(text) = &mut reason
            && let Ok(regs) = self.fd.get_regs()
        {
            text.push_str(&format!(" (vCPU {}, rip {:#x})", self.id, regs.rip));
        }
        if let (ExitReason::TripleFault, Ok(regs), Ok(sregs)) =
            (&reason, self.fd.get_regs(), self.fd.get_sregs())
        {
            tracing::debug!(vcpu = self.id, ?regs, cr2 = format_args!("{:#x}", sregs.cr2), "triple fault");
        }
        self.context.exit.give(reason);
    }
}

fn kind(exit: &VcpuExit<'_>) -> ExitKind {
    match exit {
        VcpuExit::IoIn(..) => ExitKind::IoIn,
        VcpuExit::IoOut(..) => ExitKind::IoOut,
        VcpuExit::MmioRead(..) => ExitKind::MmioRead,
        VcpuExit::MmioWrite(..) => ExitKind::MmioWrite,
        VcpuExit::Intr => ExitKind::Interrupted,
        _ => ExitKind::Other,
    }
}

/// Handles one exit; a reason ends the run.
fn handle(exit: VcpuExit<'_>, context: &VcpuContext) -> Option<ExitReason> {
    match exit {
        VcpuExit::IoOut(port, data) => {
            if !context.pio.write_ports(u64::from(port), data) {
                tracing::trace!(port = format_args!("{port:#x}"), ?data, "write to an empty port");
            }
            None
        }
        VcpuExit::IoIn(port, data) => {
            context.pio.read_ports(u64::from(port), data);
            None
        }
        VcpuExit::MmioRead(addr, data) => {
            context.mmio.read(addr, data);
            None
        }
        VcpuExit::MmioWrite(addr, data) => {
            if !context.mmio.write(addr, data) {
                tracing::trace!(addr = format_args!("{addr:#x}"), len = data.len(), "write to nowhere");
            }
            None
        }
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => None,
        VcpuExit::Shutdown => Some(ExitReason::TripleFault),
        VcpuExit::Hlt => Some(ExitReason::VcpuFailed("the guest halted with no way to go on".into())),
        VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN, _) => Some(ExitReason::PowerOff),
        VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_RESET, _) => Some(ExitReason::Reset),
        VcpuExit::InternalError => Some(ExitReason::VcpuFailed(
            "KVM could not emulate an instruction of the guest; `vcp check` tells what this host's KVM can run".into(),
        )),
        VcpuExit::FailEntry(code, cpu) => {
            Some(ExitReason::VcpuFailed(format!("the processor refused to enter the guest (code {code:#x} on CPU {cpu})")))
        }
        VcpuExit::MemoryFault { gpa, .. } => Some(ExitReason::VcpuFailed(format!("guest memory at {gpa:#x} cannot be mapped"))),
        other => Some(ExitReason::VcpuFailed(format!("KVM stopped the guest: {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::kvm::regs::{self, Entry};
    use crate::kvm::{Vm, memory};

    /// A vCPU that counts in rax, in ring 3, where every KVM runs it; none where there is no KVM.
    fn counting() -> Option<(Vm, Vcpus, ExitSignal)> {
        let kvm = crate::kvm::open().ok()?;
        let vm = Vm::new(kvm, memory::create(8 << 20, false).unwrap(), false).unwrap();
        let vcpu = vm.create_vcpu(0, 1).unwrap();
        // again: inc rax; jmp again
        vm.memory().write_slice(&[0x48, 0xff, 0xc0, 0xeb, 0xfb], GuestAddress(0x10_0000)).unwrap();
        regs::set_entry(&vcpu, vm.memory(), Entry::Ring3 { rip: 0x10_0000, boot_info: 0 }).unwrap();
        let exit = ExitSignal::new().unwrap();
        let context =
            VcpuContext { pio: Arc::new(Bus::default()), mmio: Arc::new(Bus::default()), exit: exit.clone() };
        let vcpus = Vcpus::start(vec![vcpu], &context, &[None], true).unwrap();
        Some((vm, vcpus, exit))
    }

    fn rax(vcpus: &Vcpus) -> u64 {
        vcpus.each(|_| Box::new(|vcpu| vcpu.get_regs().unwrap().rax)).unwrap()[0]
    }

    #[test]
    fn a_paused_vcpu_stands_still_and_goes_on() {
        let Some((_vm, vcpus, exit)) = counting() else { return };
        assert!(vcpus.pause());
        assert_eq!(rax(&vcpus), 0, "it was started paused");
        let mut last = 0;
        for _ in 0..20 {
            vcpus.resume();
            let deadline = Instant::now() + Duration::from_secs(20);
            loop {
                assert!(vcpus.pause());
                let now = rax(&vcpus);
                assert_eq!(now, rax(&vcpus), "it runs while paused");
                if now > last {
                    last = now;
                    break;
                }
                assert!(Instant::now() < deadline, "it does not go on");
                vcpus.resume();
            }
        }
        // Nothing can be done with one that runs.
        vcpus.resume();
        assert!(vcpus.exits(0).unwrap().interrupted > 0);
        assert!(vcpus.stop());
        assert_eq!(exit.reason(), None);
    }
}
