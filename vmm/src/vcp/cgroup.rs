//! A control group (version 2) for each VCP: processor time, memory and number of processes bounded by the kernel, where
//! this process may make groups; and words for it where it may not.
//!
//! All groups of a monitor lie in one directory, `vcp-PID`, which is locked as long as the monitor lives; the kernel lets go
//! of the lock when it dies, however that is, and the next monitor removes what is not locked. It lies in the monitor's own
//! group if that was delegated to it, else, for root, at the top.
//!
//! A group that has processes of its own cannot hand controllers to groups below it ("no internal processes"). The monitor
//! therefore moves itself into a leaf beside its VCPs, if it is alone in its group, as it is in a service with
//! `Delegate=yes`, and back at the end. Nothing else is ever moved. Pure over a directory that stands for `/sys/fs/cgroup`.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};

/// What the names of monitors' groups begin with.
const PREFIX: &str = "vcp-";
/// The monitor's own leaf.
const MONITOR: &str = "monitor";
/// Controllers that are wanted for the groups, and what each is for.
const CONTROLLERS: [(&str, &str); 3] =
    [("cpu", "cpu.max and cpu.weight"), ("memory", "memory.max"), ("pids", "pids.max")];
/// The period of `cpu.max`, microseconds: the longest pause of a VCP that has used its time up. A thousandth of a second
/// is the least that the kernel takes for the time itself.
const PERIOD_US: u64 = 20_000;
/// Least of `cpu.max` that makes a thousandth of a second in a period, percent.
pub const MIN_CPU_PERCENT: u32 = 5;

/// Bounds of one VCP, for all its processes together: the one that serves, the one that stands by, one that takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Percent of one hardware thread, at least [`MIN_CPU_PERCENT`]; `None`: no bound.
    pub cpu_percent: Option<u32>,
    /// Bytes, the guest's memory included: pages of it that the VCP touches first are charged to the VCP.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub tasks: u32,
    /// Share of a thread that it shares with others, relative to theirs; 1 to 10000.
    pub weight: u32,
}

/// The groups of this monitor.
#[derive(Debug)]
pub struct Groups {
    base: PathBuf,
    dir: PathBuf,
    enabled: Vec<&'static str>,
    missing: Vec<String>,
    /// The monitor has moved itself, and goes back at the end: controllers that it has handed down in `base`.
    moved: Option<Vec<&'static str>>,
    _lock: OwnedFd,
}

/// The group of one VCP. Removed when dropped, which the kernel allows once its processes have ended.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
    bounds: Bounds,
}

/// What a group's processes have used so far. What the kernel does not count is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Processes and threads now.
    pub tasks: u64,
    /// Processor time, microseconds.
    pub cpu_us: u64,
    /// Time for which threads were stopped by `cpu.max`, microseconds.
    pub throttled_us: u64,
    /// Processes that were killed because of `memory.max`.
    pub oom_kills: u64,
    /// Times a thread could not be started because of `pids.max`.
    pub refused_tasks: u64,
}

impl Groups {
    /// Prepares groups for this process. `root` stands for `/sys/fs/cgroup`, `own` is `/proc/self/cgroup`'s content;
    /// `privileged`: it may use the top of the hierarchy where its own group will not do.
    ///
    /// # Errors
    /// It cannot be done; in words, with what would help.
    pub fn prepare(root: &Path, own: &str, pid: u32, privileged: bool) -> Result<Self, String> {
        let place = Place::find(root, own, pid, privileged)?;
        sweep(&place.base);
        let (dir, lock) = make_locked(&place.base, pid)
            .map_err(|e| format!("no control group can be made in {}: {e}", place.name))?;
        let mut groups = Self {
            base: place.base,
            dir,
            enabled: Vec::new(),
            missing: Vec::new(),
            moved: None,
            _lock: lock,
        };
        let handed = hand_down(&groups.base, &place.offered);
        if handed.is_err() && place.alone {
            // The only process there steps aside.
            let leaf = groups.dir.join(MONITOR);
            let aside =
                std::fs::create_dir(&leaf).and_then(|()| write(&leaf.join("cgroup.procs"), &pid.to_string()));
            aside
                .map_err(|e| format!("this process cannot be moved to a group below {}: {e}", place.name))?;
            groups.moved = Some(place.offered.clone());
            hand_down(&groups.base, &place.offered)
                .map_err(|e| format!("controllers cannot be handed down in {}: {e}", place.name))?;
        } else {
            handed.map_err(|e| format!("controllers cannot be handed down in {}: {e}", place.name))?;
        }
        hand_down(&groups.dir, &place.offered)
            .map_err(|e| format!("controllers cannot be handed down in {}: {e}", groups.dir.display()))?;
        let lacks = CONTROLLERS.iter().filter(|(name, _)| !place.offered.contains(name));
        groups.missing = lacks
            .map(|(name, what)| format!("{what}: the group {} has no controller {name}", place.name))
            .collect();
        groups.enabled = place.offered;
        Ok(groups)
    }

    /// Whether [`Groups::of_host`] could do it, without doing anything: where groups would lie.
    ///
    /// # Errors
    /// See [`Groups::prepare`].
    pub fn look() -> Result<String, String> {
        let (root, own) = host()?;
        let place = Place::find(&root, &own, std::process::id(), is_root())?;
        match rustix::fs::access(&place.base, rustix::fs::Access::WRITE_OK) {
            Ok(()) => Ok(format!("{} in {}", place.offered.join(", "), place.name)),
            Err(e) => Err(format!("no control group can be made in {}: {e}", place.name)),
        }
    }

    /// Groups on this host.
    ///
    /// # Errors
    /// See [`Groups::prepare`].
    pub fn of_host() -> Result<Self, String> {
        let (root, own) = host()?;
        Self::prepare(&root, &own, std::process::id(), is_root())
    }

    /// What of the bounds is not kept, each with the reason.
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// Whether groups have this controller.
    pub fn has(&self, controller: &str) -> bool {
        self.enabled.contains(&controller)
    }

    /// Makes the group of a VCP.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn make(&self, device: &str, bounds: Bounds) -> io::Result<Group> {
        let group = Group { path: self.dir.join(device), bounds };
        match std::fs::create_dir(&group.path) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            other => other?,
        }
        group.set(&self.enabled)?;
        Ok(group)
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        if let Some(handed) = &self.moved {
            // Bottom up: a group that hands controllers down has no processes of its own.
            let take_back = |dir: &Path| {
                let text = handed.iter().map(|name| format!("-{name}")).collect::<Vec<_>>().join(" ");
                write(&dir.join("cgroup.subtree_control"), &text)
            };
            let back = take_back(&self.dir)
                .and_then(|()| take_back(&self.base))
                .and_then(|()| write(&self.base.join("cgroup.procs"), &std::process::id().to_string()));
            if let Err(error) = back {
                tracing::debug!(%error, "this process stays in the control group that it made");
            }
        }
        remove(&self.dir);
    }
}

impl Group {
    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its directory, for who starts a process in it; `None` if it is gone.
    pub fn open(&self) -> Option<OwnedFd> {
        let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::DIRECTORY;
        rustix::fs::open(&self.path, flags, Mode::empty()).ok()
    }

    /// Its bounds.
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    fn set(&self, enabled: &[&str]) -> io::Result<()> {
        let bounds = self.bounds;
        let quota = |percent: u32| (u64::from(percent) * PERIOD_US / 100).to_string();
        let cpu = bounds.cpu_percent.map_or("max".into(), quota);
        for (controller, file, text) in [
            ("cpu", "cpu.max", format!("{cpu} {PERIOD_US}")),
            ("cpu", "cpu.weight", bounds.weight.clamp(1, 10_000).to_string()),
            ("memory", "memory.max", bounds.memory_bytes.to_string()),
            ("memory", "memory.swap.max", "0".into()),
            ("pids", "pids.max", bounds.tasks.to_string()),
        ] {
            if !enabled.contains(&controller) {
                continue;
            }
            let result = write(&self.path.join(file), &text);
            // Not there without swap accounting.
            if file != "memory.swap.max" {
                result?;
            }
        }
        Ok(())
    }

    /// What its processes have used.
    pub fn usage(&self) -> Usage {
        let read = |file: &str| std::fs::read_to_string(self.path.join(file)).unwrap_or_default();
        let number = |file: &str| read(file).trim().parse().unwrap_or(0);
        let field = |text: &str, name: &str| {
            let of = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok();
            text.lines().find_map(of).unwrap_or(0)
        };
        let cpu = read("cpu.stat");
        Usage {
            memory_bytes: number("memory.current"),
            tasks: number("pids.current"),
            cpu_us: field(&cpu, "usage_usec"),
            throttled_us: field(&cpu, "throttled_usec"),
            oom_kills: field(&read("memory.events"), "oom_kill"),
            refused_tasks: field(&read("pids.events"), "max"),
        }
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

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A whole value at once, as the kernel wants it; a file that is not there is not made.
fn write(file: &Path, text: &str) -> io::Result<()> {
    use std::io::Write;
    std::fs::OpenOptions::new().write(true).open(file)?.write_all(text.as_bytes())
}

fn words(file: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

/// Has the groups below `dir` use these controllers.
fn hand_down(dir: &Path, controllers: &[&str]) -> io::Result<()> {
    let file = dir.join("cgroup.subtree_control");
    let there = words(&file);
    let lacks: Vec<String> = controllers
        .iter()
        .filter(|name| !there.iter().any(|t| t == *name))
        .map(|n| format!("+{n}"))
        .collect();
    if lacks.is_empty() { Ok(()) } else { write(&file, &lacks.join(" ")) }
}

/// A group in which groups with bounds can be made.
struct Place {
    /// As the kernel names it.
    name: String,
    base: PathBuf,
    /// Controllers that it has to hand down.
    offered: Vec<&'static str>,
    /// This process is the only one in it.
    alone: bool,
}

impl Place {
    fn find(root: &Path, own: &str, pid: u32, privileged: bool) -> Result<Self, String> {
        let Some(name) = own.lines().find_map(|line| line.strip_prefix("0::")) else {
            return Err("there are no control groups of version 2 on this host".into());
        };
        if !root.join("cgroup.controllers").exists() {
            return Err(format!("control groups of version 2 are not mounted at {}", root.display()));
        }
        let first = Self::at(root, name, pid);
        match first {
            Err(_) if privileged && name != "/" => Self::at(root, "/", pid).or(first),
            _ => first,
        }
    }

    fn at(root: &Path, name: &str, pid: u32) -> Result<Self, String> {
        let base = root.join(name.trim_start_matches('/'));
        let has = words(&base.join("cgroup.controllers"));
        let offered: Vec<&'static str> =
            CONTROLLERS.iter().map(|(name, _)| *name).filter(|name| has.iter().any(|h| h == name)).collect();
        if offered.is_empty() && !base.join("cgroup.type").exists() {
            return Err("no controller of control groups is of version 2 on this host: boot it with version 2 alone (systemd.unified_cgroup_hierarchy=1)".into());
        }
        if offered.is_empty() {
            return Err(format!(
                "the control group {name} has none of the controllers cpu, memory and pids: start vcp in a group that \
                 they are delegated to, e.g. a service with Delegate=yes, or systemd-run --user --scope -p Delegate=yes"
            ));
        }
        let procs = words(&base.join("cgroup.procs"));
        let alone = procs == [pid.to_string()];
        let enabled = words(&base.join("cgroup.subtree_control"));
        let ready = offered.iter().all(|name| enabled.iter().any(|e| e == name));
        // Only the top of all is without this file, and may have processes beside groups.
        let is_top = !base.join("cgroup.type").exists();
        if !ready && !is_top && !alone && !procs.is_empty() {
            return Err(format!(
                "the control group {name} has other processes than this one, which the kernel does not allow beside groups \
                 with bounds: start vcp in a group of its own, e.g. systemd-run --scope -p Delegate=yes"
            ));
        }
        Ok(Self { name: name.to_owned(), base, offered, alone: alone && !is_top })
    }
}

/// Makes the directory of a monitor, and locks it.
fn make_locked(base: &Path, pid: u32) -> io::Result<(PathBuf, OwnedFd)> {
    /// Another monitor may take it for an abandoned one before it is locked; another process namespace has the same numbers.
    const TRIES: u32 = 16;
    for n in 0..TRIES {
        let dir = base.join(if n == 0 { format!("{PREFIX}{pid}") } else { format!("{PREFIX}{pid}.{n}") });
        match std::fs::create_dir(&dir) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
            other => other?,
        }
        if let Some(lock) = lock(&dir).filter(|_| dir.is_dir()) {
            return Ok((dir, lock));
        }
    }
    Err(ErrorKind::AlreadyExists.into())
}

/// Locks the directory of a monitor; `None` if another one has it.
fn lock(dir: &Path) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::open(dir, flags, Mode::empty()).ok()?;
    rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok().then_some(dir)
}

/// Removes what monitors that were killed have left.
fn sweep(base: &Path) {
    let Ok(entries) = std::fs::read_dir(base) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        let ours = number.is_some_and(|number| number.split('.').all(|part| part.parse::<u32>().is_ok()));
        if ours && let Some(_lock) = lock(&entry.path()) {
            // Processes whose monitor has died are ending. The file is not there before Linux 5.14.
            let _ = write(&entry.path().join("cgroup.kill"), "1");
            remove(&entry.path());
        }
    }
}

/// Removes a monitor's directory with the groups in it. The kernel keeps one that has processes.
fn remove(dir: &Path) {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        /// A process that was killed leaves its group a little later.
        const TRIES: u32 = 50;
        let busy =
            |result: &io::Result<()>| matches!(result, Err(e) if e.raw_os_error() == Some(libc::EBUSY));
        let mut tries = 0;
        while busy(&std::fs::remove_dir(entry.path())) && tries < TRIES {
            tries += 1;
            std::thread::sleep(std::time::Duration::from_millis(4));
        }
    }
    if let Err(error) = std::fs::remove_dir(dir) {
        tracing::debug!(path = %dir.display(), %error, "control groups stay until the next start");
    }
}

#[cfg(test)]
#[path = "cgroup_tests.rs"]
mod tests;
