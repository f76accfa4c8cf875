//! Threads of other processes, by their name: where they run, and where they are to run.

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};

/// The data thread of a VCP.
pub const DATA: &str = "vcp-data";

/// The thread of process `pid` that is called `name`.
pub fn find(pid: u32, name: &str) -> Option<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let named = |task: &std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name)
    };
    tasks.flatten().find(named)?.file_name().to_str()?.parse().ok()
}

/// Has the thread of process `pid` that is called `name` run on these CPUs and no others.
///
/// # Errors
/// In words for the user.
pub fn pin(pid: u32, name: &str, cpus: &[usize]) -> Result<(), String> {
    let thread = find(pid, name).and_then(Pid::from_raw);
    let Some(thread) = thread else { return Err(format!("process {pid} has no thread {name}")) };
    let mut set = CpuSet::new();
    for cpu in cpus {
        if *cpu >= CpuSet::MAX_CPU {
            return Err(format!("there is no CPU {cpu}"));
        }
        set.set(*cpu);
    }
    sched_setaffinity(Some(thread), &set).map_err(|e| format!("cannot move {name} of process {pid}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_found_by_its_name_and_moved() {
        let allowed = crate::affinity::allowed().unwrap();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new()
            .name("vcp-test-pin".into())
            .spawn(move || {
                ready.send(()).unwrap();
                let _ = ended.recv();
                rustix::thread::sched_getaffinity(None).unwrap()
            })
            .unwrap();
        is_ready.recv().unwrap();
        let own = std::process::id();
        pin(own, "vcp-test-pin", &allowed[..1]).unwrap();
        assert!(pin(own, "no such thread", &allowed).unwrap_err().contains("no thread"));
        assert!(pin(own, "vcp-test-pin", &[usize::MAX]).is_err());
        drop(end);
        let set = thread.join().unwrap();
        assert!(set.is_set(allowed[0]) && set.count() == 1);
    }
}
