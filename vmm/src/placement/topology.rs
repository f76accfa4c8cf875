//! The host's hardware threads as sysfs tells of them: packages, cores with their threads, NUMA nodes, isolated CPUs, and
//! what the control group of this process allows. Pure over a directory that stands for `/`, so that tests use made-up
//! machines.

use std::collections::BTreeSet;
use std::fs::read_to_string;
use std::path::Path;

pub use vcp_core::poll::cpu_ranges as ranges;

/// One hardware thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Its number.
    pub id: usize,
    /// Its package (socket).
    pub package: usize,
    /// Its core, within the package.
    pub core: usize,
    /// NUMA node.
    pub node: usize,
    /// The kernel puts nothing on it by itself (`isolcpus=`, isolated partitions).
    pub isolated: bool,
}

/// The machine, as far as this process may use it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// The threads that may be used, by number.
    pub cpus: Vec<Cpu>,
    /// Number of threads that are online.
    pub online: usize,
    /// What the control group allows, if it says.
    pub cgroup: Option<Vec<usize>>,
    /// NUMA nodes that have memory.
    pub nodes: Vec<usize>,
}

impl Topology {
    /// Reads it below `root`. `affinity`: CPUs that this process may run on now.
    ///
    /// A CPU that is isolated is not in the affinity of anybody who has not asked for it; it may be used if the control
    /// group allows it.
    pub fn read(root: &Path, affinity: &[usize]) -> Self {
        let cpu_dir = root.join("sys/devices/system/cpu");
        let online = list(&cpu_dir.join("online")).unwrap_or_else(|| affinity.iter().copied().collect());
        let isolated = list(&cpu_dir.join("isolated")).unwrap_or_default();
        let cgroup = cgroup_cpus(root);
        let nodes = nodes(root);
        let may = |cpu: &usize| {
            let grouped = cgroup.as_ref().is_none_or(|cgroup| cgroup.contains(cpu));
            online.contains(cpu)
                && (affinity.contains(cpu) && grouped
                    || isolated.contains(cpu) && grouped && cgroup.is_some())
        };
        let cpu = |id: usize| {
            let number = |name: &str| number(&cpu_dir.join(format!("cpu{id}/topology/{name}")));
            Cpu {
                id,
                package: number("physical_package_id").unwrap_or(0),
                core: number("core_id").unwrap_or(id),
                node: nodes.iter().find(|(_, cpus)| cpus.contains(&id)).map_or(0, |(node, _)| *node),
                isolated: isolated.contains(&id),
            }
        };
        Self {
            cpus: online.iter().copied().filter(may).map(cpu).collect(),
            online: online.len(),
            cgroup: cgroup.map(|cpus| cpus.into_iter().collect()),
            nodes: with_memory(root, &nodes),
        }
    }

    /// This host's.
    ///
    /// # Errors
    /// The affinity of this process cannot be read.
    pub fn of_host() -> crate::error::Result<Self> {
        Ok(Self::read(Path::new("/"), &crate::affinity::allowed()?))
    }

    /// The thread of this number, if it may be used.
    pub fn cpu(&self, id: usize) -> Option<&Cpu> {
        self.cpus.iter().find(|cpu| cpu.id == id)
    }

    /// The cores that may be used, each with its threads that may be.
    pub fn cores(&self) -> Vec<Vec<&Cpu>> {
        let mut cores: Vec<Vec<&Cpu>> = Vec::new();
        for cpu in &self.cpus {
            let same = |core: &&mut Vec<&Cpu>| {
                core.first().is_some_and(|first| (first.package, first.core) == (cpu.package, cpu.core))
            };
            match cores.iter_mut().find(same) {
                Some(core) => core.push(cpu),
                None => cores.push(vec![cpu]),
            }
        }
        cores
    }

    /// The other threads of a thread's core that may be used.
    pub fn siblings(&self, id: usize) -> Vec<usize> {
        let Some(of) = self.cpu(id) else { return Vec::new() };
        let same = |cpu: &&Cpu| cpu.id != id && (cpu.package, cpu.core) == (of.package, of.core);
        self.cpus.iter().filter(same).map(|cpu| cpu.id).collect()
    }

    /// In words, for people: `2 packages, 8 cores with 2 threads, 2 NUMA nodes; isolated: 6-7`.
    pub fn describe(&self) -> String {
        let count = |of: fn(&Cpu) -> usize| self.cpus.iter().map(of).collect::<BTreeSet<_>>().len();
        let cores = self.cores();
        let threads = cores.iter().map(Vec::len).max().unwrap_or(0);
        let plural = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let mut text = format!(
            "{}, {} with {}, {}",
            plural(count(|cpu| cpu.package), "package"),
            plural(cores.len(), "core"),
            plural(threads, "thread"),
            plural(count(|cpu| cpu.node), "NUMA node"),
        );
        if self.cpus.len() < self.online {
            text.push_str(&format!("; {} of {} threads may be used", self.cpus.len(), self.online));
        }
        let isolated: Vec<usize> = self.cpus.iter().filter(|cpu| cpu.isolated).map(|cpu| cpu.id).collect();
        if !isolated.is_empty() {
            text.push_str(&format!("; isolated: {}", ranges(&isolated)));
        }
        text
    }
}

fn number(path: &Path) -> Option<usize> {
    read_to_string(path).ok()?.trim().parse().ok()
}

fn list(path: &Path) -> Option<BTreeSet<usize>> {
    parse_list(&read_to_string(path).ok()?)
}

/// `0-3,8` as the kernel writes it; `None` if it is something else.
pub fn parse_list(text: &str) -> Option<BTreeSet<usize>> {
    let mut cpus = BTreeSet::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        // A list longer than any machine is none.
        if last < first || last > 65_535 {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// Nodes with memory; a kernel that does not say has given some to each node, or knows no nodes.
fn with_memory(root: &Path, nodes: &[(usize, BTreeSet<usize>)]) -> Vec<usize> {
    let told = list(&root.join("sys/devices/system/node/has_memory")).filter(|told| !told.is_empty());
    let mut all: Vec<usize> = match told {
        Some(told) => told.into_iter().collect(),
        None => nodes.iter().map(|(node, _)| *node).collect(),
    };
    if all.is_empty() {
        all.push(0);
    }
    all.sort_unstable();
    all
}

fn nodes(root: &Path) -> Vec<(usize, BTreeSet<usize>)> {
    let Ok(entries) = std::fs::read_dir(root.join("sys/devices/system/node")) else { return Vec::new() };
    let node = |entry: std::fs::DirEntry| {
        let number = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
        Some((number, list(&entry.path().join("cpulist"))?))
    };
    entries.flatten().filter_map(node).collect()
}

/// The CPUs of this process's control group: version 2, else the cpuset hierarchy of version 1.
fn cgroup_cpus(root: &Path) -> Option<BTreeSet<usize>> {
    let own = read_to_string(root.join("proc/self/cgroup")).ok()?;
    let base = root.join("sys/fs/cgroup");
    for line in own.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let path = path.trim_start_matches('/');
        let file = if controllers.is_empty() {
            base.join(path).join("cpuset.cpus.effective")
        } else if controllers.split(',').any(|name| name == "cpuset") {
            base.join("cpuset").join(path).join("cpuset.effective_cpus")
        } else {
            continue;
        };
        if let Some(cpus) = list(&file).filter(|cpus| !cpus.is_empty()) {
            return Some(cpus);
        }
    }
    None
}
