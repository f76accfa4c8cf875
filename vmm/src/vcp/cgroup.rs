//! A control group (version 2) for each VCP: processor time, memory and number of processes bounded by the kernel, where
//! this process may make groups; and words for it where it may not.
//!
//! A group that has processes of its own cannot hand controllers to groups below it ("no internal processes"). The monitor
//! therefore moves itself into a leaf beside its VCPs, if it is alone in its group, as it is in a service with
//! `Delegate=yes`. Nothing else is ever moved. Pure over a directory that stands for `/sys/fs/cgroup`.

use std::io;
use std::path::{Path, PathBuf};

/// What the names of our groups begin with.
const PREFIX: &str = "vcp-";
/// Controllers that are wanted for the groups.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// Most processes and threads of a VCP: data, set-up, control, resolver, hand-over and some more.
const MAX_TASKS: u32 = 64;
/// The period of `cpu.max`, microseconds.
const PERIOD_US: u64 = 100_000;

/// Bounds of one VCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Percent of one hardware thread; `None`: no bound.
    pub cpu_percent: Option<u32>,
    /// Bytes.
    pub memory_bytes: u64,
    /// Share of a thread that it shares with others, relative to theirs; 1 to 10000.
    pub weight: u32,
}

/// The group of this monitor, below which it may make others.
#[derive(Debug)]
pub struct Groups {
    base: PathBuf,
    own: String,
}

/// The group of one VCP. Removed when dropped, which the kernel allows once its processes have ended.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
}

impl Groups {
    /// Prepares the group of this process. `root` stands for `/sys/fs/cgroup`, `own` is `/proc/self/cgroup`'s content.
    ///
    /// # Errors
    /// It cannot be done; in words, with what would help.
    pub fn prepare(root: &Path, own: &str, pid: u32) -> Result<Self, String> {
        let (path, base) = usable(root, own, pid)?;
        sweep(&base);
        let enabled = std::fs::read_to_string(base.join("cgroup.subtree_control")).unwrap_or_default();
        if !CONTROLLERS.iter().all(|name| has(&enabled, name)) {
            let write = |file: PathBuf, text: String| {
                std::fs::write(&file, text).map_err(|e| format!("{} cannot be written: {e}", file.display()))
            };
            if path != "/" {
                let leaf = base.join(format!("{PREFIX}{pid}-monitor"));
                std::fs::create_dir(&leaf).map_err(|e| format!("no group can be made in {path}: {e}"))?;
                write(leaf.join("cgroup.procs"), pid.to_string())?;
            }
            let all = CONTROLLERS.map(|name| format!("+{name}")).join(" ");
            write(base.join("cgroup.subtree_control"), all)?;
        }
        Ok(Self { base, own: format!("{PREFIX}{pid}") })
    }

    /// Whether [`Groups::of_host`] could do it, without doing anything: the group of this process.
    ///
    /// # Errors
    /// See [`Groups::prepare`].
    pub fn look() -> Result<String, String> {
        let (root, own) = host()?;
        let (path, base) = usable(&root, &own, std::process::id())?;
        match rustix::fs::access(&base, rustix::fs::Access::WRITE_OK) {
            Ok(()) => Ok(path),
            Err(e) => Err(format!("no group can be made in {path}: {e}")),
        }
    }

    /// The group of this process on this host.
    ///
    /// # Errors
    /// See [`Groups::prepare`].
    pub fn of_host() -> Result<Self, String> {
        let (root, own) = host()?;
        Self::prepare(&root, &own, std::process::id())
    }

    /// Makes the group of a VCP.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn make(&self, device: &str, bounds: Bounds) -> io::Result<Group> {
        let group = Group { path: self.base.join(format!("{}-{device}", self.own)) };
        match std::fs::create_dir(&group.path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
        group.set(bounds)?;
        Ok(group)
    }
}

impl Group {
    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Changes its bounds.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn set(&self, bounds: Bounds) -> io::Result<()> {
        let quota = |percent: u32| (u64::from(percent) * PERIOD_US / 100).to_string();
        let cpu = bounds.cpu_percent.map_or("max".into(), quota);
        for (file, text) in [
            ("cpu.max", format!("{cpu} {PERIOD_US}")),
            ("cpu.weight", bounds.weight.clamp(1, 10_000).to_string()),
            ("memory.max", bounds.memory_bytes.to_string()),
            ("memory.swap.max", "0".into()),
            ("pids.max", MAX_TASKS.to_string()),
        ] {
            let result = std::fs::write(self.path.join(file), text);
            // Not there without swap accounting.
            if file != "memory.swap.max" {
                result?;
            }
        }
        Ok(())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "a control group stays until the next start");
        }
    }
}

/// Where version 2 is mounted, and what the kernel says of this process's groups.
fn host() -> Result<(PathBuf, String), String> {
    let own = std::fs::read_to_string("/proc/self/cgroup").map_err(|e| e.to_string())?;
    // Where both versions are mounted, the second is here.
    let unified = Path::new("/sys/fs/cgroup/unified");
    let root = if unified.is_dir() { unified } else { Path::new("/sys/fs/cgroup") };
    Ok((root.to_owned(), own))
}

fn has(words: &str, name: &str) -> bool {
    words.split_whitespace().any(|word| word == name)
}

/// The group of the process and its directory, if groups with bounds can be made below it.
fn usable(root: &Path, own: &str, pid: u32) -> Result<(String, PathBuf), String> {
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::")) else {
        return Err("control groups are not of version 2 on this host".into());
    };
    let base = root.join(path.trim_start_matches('/'));
    let read = |file: &str| std::fs::read_to_string(base.join(file)).unwrap_or_default();
    let offered = read("cgroup.controllers");
    let lacking: Vec<&str> = CONTROLLERS.into_iter().filter(|name| !has(&offered, name)).collect();
    if !lacking.is_empty() {
        return Err(format!(
            "the group {path} has no controller {}: start vcp in a group that they are delegated to, e.g. a service with Delegate=yes",
            lacking.join(", ")
        ));
    }
    let enabled = read("cgroup.subtree_control");
    let ready = CONTROLLERS.iter().all(|name| has(&enabled, name));
    if !ready && path != "/" && read("cgroup.procs").lines().any(|line| line.trim() != pid.to_string()) {
        return Err(format!(
            "the group {path} has other processes than this one, which the kernel does not allow beside groups with bounds"
        ));
    }
    Ok((path.to_owned(), base))
}

/// Removes what monitors that were killed have left: groups of ours without a process whose monitor is gone.
fn sweep(base: &Path) {
    let Ok(entries) = std::fs::read_dir(base) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid =
            name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split_once('-')?.0.parse::<u32>().ok());
        let Some(pid) = pid else { continue };
        if !Path::new(&format!("/proc/{pid}")).exists() {
            // The kernel keeps one that has processes.
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { cpu_percent: Some(50), memory_bytes: 64 << 20, weight: 100 };

    /// A made-up hierarchy, with this process alone in `/vms/a`.
    fn hierarchy(controllers: &str, procs: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("vms/a");
        std::fs::create_dir_all(&base).unwrap();
        std::fs::write(base.join("cgroup.controllers"), controllers).unwrap();
        std::fs::write(base.join("cgroup.procs"), procs).unwrap();
        std::fs::write(base.join("cgroup.subtree_control"), "").unwrap();
        dir
    }

    #[test]
    fn bounds_are_written_and_the_monitor_moves_aside() {
        let dir = hierarchy("cpuset cpu io memory pids", "7\n");
        let groups = Groups::prepare(dir.path(), "0::/vms/a\n", 7).unwrap();
        let base = dir.path().join("vms/a");
        let read = |file: &str| std::fs::read_to_string(base.join(file)).unwrap();
        assert_eq!(read("vcp-7-monitor/cgroup.procs"), "7");
        assert_eq!(read("cgroup.subtree_control"), "+cpu +memory +pids");
        let group = groups.make("disk0", BOUNDS).unwrap();
        assert_eq!(read("vcp-7-disk0/cpu.max"), "50000 100000");
        assert_eq!(read("vcp-7-disk0/memory.max"), (64u64 << 20).to_string());
        assert_eq!(
            (read("vcp-7-disk0/pids.max"), read("vcp-7-disk0/cpu.weight")),
            ("64".into(), "100".into())
        );
        group.set(Bounds { cpu_percent: None, weight: 0, ..BOUNDS }).unwrap();
        assert_eq!(
            (read("vcp-7-disk0/cpu.max"), read("vcp-7-disk0/cpu.weight")),
            ("max 100000".into(), "1".into())
        );
    }

    #[test]
    fn what_is_in_the_way_is_said() {
        let dir = hierarchy("cpu", "7\n");
        let error = Groups::prepare(dir.path(), "0::/vms/a\n", 7).unwrap_err();
        assert!(error.contains("no controller memory, pids") && error.contains("Delegate=yes"), "{error}");
        let dir = hierarchy("cpu memory pids", "7\n8\n");
        let error = Groups::prepare(dir.path(), "0::/vms/a\n", 7).unwrap_err();
        assert!(error.contains("other processes"), "{error}");
        let error = Groups::prepare(dir.path(), "4:memory:/x\n", 7).unwrap_err();
        assert!(error.contains("not of version 2"), "{error}");
    }

    #[test]
    fn what_a_killed_monitor_left_is_removed_and_nothing_else() {
        let dir = hierarchy("cpu memory pids", "7\n");
        let base = dir.path().join("vms/a");
        let own = std::process::id();
        for name in
            ["vcp-4194305-disk0".into(), format!("vcp-{own}-disk0"), "vcp-x-disk0".into(), "other".into()]
        {
            std::fs::create_dir(base.join::<String>(name)).unwrap();
        }
        Groups::prepare(dir.path(), "0::/vms/a\n", 7).unwrap();
        assert!(!base.join("vcp-4194305-disk0").exists());
        assert!(base.join(format!("vcp-{own}-disk0")).exists() && base.join("other").exists());
        assert!(base.join("vcp-x-disk0").exists());
    }
}
