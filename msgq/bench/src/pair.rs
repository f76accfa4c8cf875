//! Two sides: a forked process on the second hardware thread, this one on the first; and the control.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Seconds after which a measurement that hangs is killed.
const WATCHDOG_S: u32 = 60;

pub fn pin(cpu: usize) {
    // SAFETY: plain data, written by the macro and read by the call.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

/// With `MSGQ_BENCH_FIFO` set, both sides run before everything else on their hardware threads: for a machine that others use
/// at the same time. Only for measurements in which nobody sleeps.
fn first(on: bool) {
    if std::env::var_os("MSGQ_BENCH_FIFO").is_some() {
        // SAFETY: plain data, read by the call; refused where it is not allowed.
        unsafe {
            let param = libc::sched_param { sched_priority: i32::from(on) };
            let policy = if on { libc::SCHED_FIFO } else { libc::SCHED_OTHER };
            libc::sched_setscheduler(0, policy, &raw const param);
        }
    }
}

/// The first two hardware threads that this process may use.
pub fn cpus() -> (usize, usize) {
    use std::sync::OnceLock;
    static CPUS: OnceLock<(usize, usize)> = OnceLock::new();
    *CPUS.get_or_init(|| {
        // SAFETY: as in `pin`.
        let allowed: Vec<usize> = unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set);
            (0..libc::CPU_SETSIZE as usize).filter(|&cpu| libc::CPU_ISSET(cpu, &set)).collect()
        };
        (allowed[0], *allowed.get(1).unwrap_or(&allowed[0]))
    })
}

/// A page that both sides of a fork share.
pub fn shared() -> &'static [AtomicU64; 512] {
    // SAFETY: a fresh mapping of a page, never unmapped, of which only atomics are made.
    unsafe {
        let page = libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        assert!(page != libc::MAP_FAILED, "no page");
        &*page.cast()
    }
}

/// Runs `there` in a forked process on the second hardware thread and `here` in this one on the first.
pub fn run<T>(here: impl FnOnce() -> T, there: impl FnOnce()) -> T {
    let (one, second) = cpus();
    // SAFETY: this program has no other threads when it forks; the child ends without unwinding.
    unsafe {
        libc::alarm(WATCHDOG_S);
        let child = libc::fork();
        assert!(child >= 0, "no process");
        if child == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // Its own, should the parent be gone already.
            libc::alarm(WATCHDOG_S);
            pin(second);
            first(true);
            there();
            libc::_exit(0);
        }
        pin(one);
        first(true);
        let result = here();
        first(false);
        let mut status = 0;
        libc::waitpid(child, &raw mut status, 0);
        assert_eq!(status, 0, "the other side failed");
        libc::alarm(0);
        result
    }
}

pub fn spin_until(word: &AtomicU64, value: u64) {
    while word.load(Ordering::Acquire) != value {
        std::hint::spin_loop();
    }
}

/// The control: one line there and back.
pub fn line_round_trip() -> f64 {
    const ROUNDS: u64 = 20_000;
    let page = shared();
    let word = &page[0];
    let result = run(
        || {
            word.store(1, Ordering::Release);
            spin_until(word, 2);
            let started = Instant::now();
            for n in 1..=ROUNDS {
                word.store(2 * n + 1, Ordering::Release);
                spin_until(word, 2 * n + 2);
            }
            started.elapsed().as_nanos() as f64 / ROUNDS as f64
        },
        || {
            for n in 0..=ROUNDS {
                spin_until(word, 2 * n + 1);
                word.store(2 * n + 2, Ordering::Release);
            }
        },
    );
    // SAFETY: the page of `shared`, which nobody uses any more.
    unsafe { libc::munmap(page.as_ptr().cast_mut().cast(), 4096) };
    result
}

/// As [`quantiles`], with the median in place of the mean: a sleep that somebody else made long says nothing.
pub fn median(times: Vec<u32>) -> crate::Sample {
    let mut sample = quantiles(times);
    sample.more["mean"] = sample.value.into();
    sample.value = sample.more["p50"].as_f64().unwrap_or(sample.value);
    sample
}

/// Mean and quantiles of round trips in nanoseconds.
pub fn quantiles(mut times: Vec<u32>) -> crate::Sample {
    let mean = times.iter().map(|&ns| f64::from(ns)).sum::<f64>() / times.len() as f64;
    times.sort_unstable();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    crate::Sample {
        value: mean,
        more: serde_json::json!({ "p50": at(0.5), "p99": at(0.99), "p99.9": at(0.999) }),
    }
}
