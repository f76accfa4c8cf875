//! Probe guests: a few bytes of machine code that count down a register and leave through a port, timed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuExit;
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use crate::kvm::regs::{self, Entry};
use crate::kvm::{self, Vm, memory};
use crate::layout::{KERNEL_START, START_INFO};

/// Privilege level of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ring {
    /// As a kernel runs.
    Zero,
    /// As a bare-metal guest of this project runs.
    Three,
}

const MEMORY_BYTES: u64 = 4 << 20;
const INSTRUCTIONS_PER_TURN: f64 = 2.0;
/// Turns of the first run: short even where each instruction takes a microsecond.
const FIRST_TURNS: u32 = 100_000;
/// Turns of the second run, made where the first was too short to tell.
const SECOND_TURNS: u32 = 10_000_000;
const LONG_ENOUGH: Duration = Duration::from_millis(10);
/// A probe that takes longer than this hangs.
const DEADLINE: Duration = Duration::from_secs(10);

/// Tries until a probe is believed to be slow: on a busy host the scheduler takes its thread's CPU away now and then.
const TRIES: u32 = 3;

/// Speed of a loop in this ring, in million instructions a second: the best of some tries, or the first that reaches
/// `enough`.
pub(super) fn measure(ring: Ring, enough: f64) -> Result<f64, String> {
    let mut best = 0.0f64;
    for _ in 0..TRIES {
        best = best.max(measure_once(ring)?);
        if best >= enough {
            break;
        }
    }
    Ok(best)
}

fn measure_once(ring: Ring) -> Result<f64, String> {
    let mut turns = FIRST_TURNS;
    let mut time = within_deadline(ring, turns)?;
    if time < LONG_ENOUGH {
        turns = SECOND_TURNS;
        time = within_deadline(ring, turns)?;
    }
    Ok(f64::from(turns) * INSTRUCTIONS_PER_TURN / time.as_secs_f64() / 1e6)
}

fn within_deadline(ring: Ring, turns: u32) -> Result<Duration, String> {
    crate::signal::install_kick_handler().map_err(|e| crate::chain(&e))?;
    let stop = Arc::new(AtomicBool::new(false));
    let (done, result) = channel();
    let thread = std::thread::Builder::new().name("probe".into()).spawn({
        let stop = stop.clone();
        move || {
            // Nobody listens after the deadline.
            let _ = done.send(run(ring, turns, &stop));
        }
    });
    let thread = thread.map_err(|e| e.to_string())?;
    let outcome = match result.recv_timeout(DEADLINE) {
        Ok(outcome) => outcome,
        Err(RecvTimeoutError::Timeout) => Err(format!("the probe guest did not end within {DEADLINE:?}")),
        Err(RecvTimeoutError::Disconnected) => Err("the probe guest's thread broke".into()),
    };
    stop.store(true, Ordering::Release);
    while !thread.is_finished() {
        let _ = thread.kill(SIGRTMIN());
        std::thread::park_timeout(Duration::from_millis(5));
    }
    let _ = thread.join();
    outcome
}

fn run(ring: Ring, turns: u32, stop: &AtomicBool) -> Result<Duration, String> {
    let text = |e: crate::Error| crate::chain(&e);
    let memory = memory::create(MEMORY_BYTES, false).map_err(text)?;
    let vm = Vm::new(kvm::open().map_err(text)?, memory.clone(), false).map_err(text)?;
    let mut vcpu = vm.create_vcpu(0, 1).map_err(text)?;
    // mov ecx, turns; again: dec ecx; jnz again; out 0xf4, al; jmp $
    let mut code = vec![0xb9];
    code.extend(turns.to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xfc, 0xe6, 0xf4, 0xeb, 0xfe]);
    crate::boot::put(&memory, KERNEL_START, &code).map_err(text)?;
    let entry = match ring {
        Ring::Zero => Entry::Linux64 { rip: KERNEL_START, boot_params: START_INFO },
        Ring::Three => Entry::Ring3 { rip: KERNEL_START, boot_info: START_INFO },
    };
    regs::set_entry(&vcpu, &memory, entry).map_err(text)?;
    let start = Instant::now();
    while !stop.load(Ordering::Acquire) {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0xf4, _)) => return Ok(start.elapsed()),
            Ok(VcpuExit::Intr) => {}
            Ok(other) => return Err(format!("the probe guest stopped: {other:?}")),
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(e) => return Err(format!("KVM cannot run the probe guest: {e}")),
        }
    }
    Err("the probe guest was stopped".into())
}
