//! What /proc tells of a process.

use std::fs;
use std::time::Duration;

use anyhow::Context;

use crate::Result;

/// Returns the CPU time (user and system) that a process, with all its threads, has used; resolution 10 ms.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    cpu_time_in(&format!("/proc/{pid}/stat"))
}

/// Returns the CPU time that the first thread of a process has used; resolution 10 ms.
pub fn cpu_time_of_first(pid: u32) -> Result<Duration> {
    cpu_time_in(&format!("/proc/{pid}/task/{pid}/stat"))
}

fn cpu_time_in(path: &str) -> Result<Duration> {
    let stat = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    // The name in parentheses may have spaces; utime and stime are fields 14 and 15.
    let rest = stat.rsplit_once(')').context("no name in stat")?.1;
    let ticks: Vec<u64> = rest.split_whitespace().skip(11).take(2).filter_map(|f| f.parse().ok()).collect();
    let hz = rustix::param::clock_ticks_per_second();
    Ok(Duration::from_secs_f64(ticks.iter().sum::<u64>() as f64 / hz as f64))
}

/// Returns the command line of a process, words separated by spaces.
pub fn cmdline(pid: u32) -> Result<String> {
    let path = format!("/proc/{pid}/cmdline");
    let bytes = fs::read(&path).with_context(|| format!("read {path}"))?;
    Ok(String::from_utf8_lossy(&bytes).replace('\0', " "))
}

/// Returns the children of a process, whichever of its threads has started them.
pub fn children(pid: u32) -> Result<Vec<u32>> {
    let path = format!("/proc/{pid}/task");
    let mut children = Vec::new();
    for task in fs::read_dir(&path).with_context(|| format!("read {path}"))? {
        // A thread may end meanwhile.
        let text = fs::read_to_string(task?.path().join("children")).unwrap_or_default();
        children.extend(text.split_whitespace().filter_map(|p| p.parse::<u32>().ok()));
    }
    Ok(children)
}

/// Returns whether a process has a thread of this name.
pub fn has_thread(pid: u32, name: &str) -> bool {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    let named = |task: fs::DirEntry| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name)
    };
    tasks.flatten().any(named)
}

/// Returns the children of a monitor that serve a device; those that stand by have no data thread.
pub fn vcps(monitor: u32) -> Result<Vec<u32>> {
    Ok(children(monitor)?.into_iter().filter(|pid| has_thread(*pid, "vcp-data")).collect())
}

/// Returns how many descriptors a process has open.
pub fn descriptors(pid: u32) -> Result<usize> {
    let path = format!("/proc/{pid}/fd");
    Ok(fs::read_dir(&path).with_context(|| format!("read {path}"))?.count())
}

/// Returns how many threads a process has.
pub fn threads(pid: u32) -> Result<usize> {
    let path = format!("/proc/{pid}/task");
    Ok(fs::read_dir(&path).with_context(|| format!("read {path}"))?.count())
}

/// Returns the private memory of a process in KiB: what it has for itself, without what it shares with others (the guest's
/// memory, say).
pub fn private_kib(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    line.trim().trim_end_matches(" kB").parse().with_context(|| format!("RssAnon: {line}"))
}
