//! CPU time of another process.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

/// Returns the user and system time that a process and its threads have taken: to the nanosecond where the scheduler
/// keeps count, else in steps of a clock tick (10 ms). Threads that ended before are only in the latter.
pub(super) fn time(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {path}; is {pid} the backend's?"))?;
    let ticks = parse(&text, rustix::param::clock_ticks_per_second())
        .with_context(|| format!("{path} is not as expected"))?;
    Ok(of_threads(pid).filter(|exact| !exact.is_zero()).unwrap_or(ticks))
}

/// Takes utime and stime (fields 14 and 15) out of a stat line. The command (field 2) may itself have blanks and
/// parentheses.
fn parse(stat: &str, ticks_per_second: u64) -> Option<Duration> {
    let (_, after) = stat.rsplit_once(')')?;
    let mut fields = after.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(Duration::from_secs_f64((user + system) as f64 / ticks_per_second as f64))
}

/// Sums up the first field of each thread's `schedstat`: nanoseconds on a hardware thread.
fn of_threads(pid: u32) -> Option<Duration> {
    let mut nanos = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
        // One that ends just now is left out.
        if let Ok(text) = fs::read_to_string(thread.ok()?.path().join("schedstat")) {
            nanos += text.split_whitespace().next()?.parse::<u64>().ok()?;
        }
    }
    Some(Duration::from_nanos(nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_line_with_blanks_in_the_command() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 250 50 9 9 20 0 1 0 5";
        assert_eq!(parse(stat, 100), Some(Duration::from_secs(3)));
        assert_eq!(parse("7 (x) S 1", 100), None);
    }

    #[test]
    fn own_time_is_read() {
        let before = time(std::process::id()).unwrap();
        let mut sum = 0u64;
        while time(std::process::id()).unwrap() == before {
            sum = std::hint::black_box(sum + 1);
        }
    }
}
