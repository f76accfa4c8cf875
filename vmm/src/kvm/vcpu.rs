//! vCPU threads: run the guest, hand its port and memory accesses to the buses, say why it stopped.
//!
//! A running vCPU is stopped by a flag and a signal that makes `KVM_RUN` return. The signal may arrive just before
//! `KVM_RUN` starts and be lost, so that the one who stops repeats it until the thread is gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

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

/// The running vCPU threads.
#[derive(Debug)]
pub struct Vcpus {
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Vcpus {
    /// Starts one thread per vCPU, each confined to the host CPUs given for it (`None`: wherever the process may).
    pub fn start(vcpus: Vec<VcpuFd>, context: &VcpuContext, cpus: &[Option<Vec<usize>>]) -> Result<Self> {
        crate::signal::install_kick_handler()?;
        let mut running = Self { threads: Vec::new(), stop: Arc::new(AtomicBool::new(false)) };
        for (id, fd) in vcpus.into_iter().enumerate() {
            let (context, stop) = (context.clone(), running.stop.clone());
            let cpus = cpus.get(id).cloned().flatten();
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn(move || {
                    if let Some(cpus) = cpus
                        && let Err(e) = affinity::confine_thread(&cpus)
                    {
                        tracing::warn!(vcpu = id, error = %e, "cannot pin the vCPU thread");
                    }
                    run(id, fd, &context, &stop);
                })
                .map_err(Error::os("start a vCPU thread"))?;
            running.threads.push(thread);
        }
        Ok(running)
    }

    /// Stops all vCPUs. False if a thread did not stop in time; it is left behind for the process' end.
    pub fn stop(mut self) -> bool {
        self.halt()
    }

    fn halt(&mut self) -> bool {
        self.stop.store(true, Ordering::Release);
        let deadline = Instant::now() + STOP_DEADLINE;
        while let Some(thread) = self.threads.pop() {
            while !thread.is_finished() {
                if Instant::now() > deadline {
                    tracing::warn!("a vCPU thread does not stop");
                    return false;
                }
                // An error means that the thread has just ended.
                let _ = thread.kill(SIGRTMIN());
                std::thread::park_timeout(KICK_INTERVAL);
            }
            let _ = thread.join();
        }
        true
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.halt();
    }
}

fn run(id: usize, mut vcpu: VcpuFd, context: &VcpuContext, stop: &AtomicBool) {
    // A panic in a device must end the run, not leave a guest with one vCPU missing.
    struct OnPanic<'a>(&'a ExitSignal);
    impl Drop for OnPanic<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                self.0.give(ExitReason::Internal("a vCPU thread panicked".into()));
            }
        }
    }
    let _guard = OnPanic(&context.exit);
    while !stop.load(Ordering::Acquire) {
        let reason = match vcpu.run() {
            Ok(exit) => handle(exit, context),
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => None,
            Err(e) => Some(ExitReason::VcpuFailed(format!("KVM cannot run vCPU {id}: {e}"))),
        };
        if let Some(mut reason) = reason {
            if let ExitReason::VcpuFailed(text) = &mut reason
                && let Ok(regs) = vcpu.get_regs()
            {
                text.push_str(&format!(" (vCPU {id}, rip {:#x})", regs.rip));
            }
            if let (ExitReason::TripleFault, Ok(regs), Ok(sregs)) =
                (&reason, vcpu.get_regs(), vcpu.get_sregs())
            {
                tracing::debug!(vcpu = id, ?regs, cr2 = format_args!("{:#x}", sregs.cr2), "triple fault");
            }
            context.exit.give(reason);
            return;
        }
    }
    if let Ok(regs) = vcpu.get_regs() {
        tracing::debug!(vcpu = id, rip = format_args!("{:#x}", regs.rip), "stopped");
    }
}

/// Handles one exit; a reason ends the run.
fn handle(exit: VcpuExit<'_>, context: &VcpuContext) -> Option<ExitReason> {
    match exit {
        // KVM tells the bytes of a repeated string instruction in one go. All our ports are byte registers, and a wider
        // access to one has no meaning but the same, so that each byte is an access of its own.
        VcpuExit::IoOut(port, data) => {
            for byte in data {
                if !context.pio.write(u64::from(port), &[*byte]) {
                    tracing::trace!(port = format_args!("{port:#x}"), byte, "write to an empty port");
                }
            }
            None
        }
        VcpuExit::IoIn(port, data) => {
            for byte in data.chunks_mut(1) {
                context.pio.read(u64::from(port), byte);
            }
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
