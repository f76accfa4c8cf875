//! Who runs where: a hardware thread for each VCP and each vCPU, decided from the host's [`topology`] and from what the
//! user wants, or refused with the reason. Pure; whoever starts a thread confines it.

mod later;
mod memory;
pub mod topology;

pub use later::{Others, place_later};
pub use memory::{MemoryPlace, memory_place};

use std::str::FromStr;

use self::topology::{Topology, ranges};

/// What the user wants for a VCP: `cpu=` of a disk or a net.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// The last thread that may be used, together with all others that have no wish.
    #[default]
    Auto,
    /// This thread.
    Named(usize),
    /// A core on which nothing else of this guest runs, not even on the other threads of it.
    OwnCore,
    /// Another thread of the core of this vCPU: they share caches, and a hand-over of a cache line is short.
    SiblingOf(usize),
    /// One thread for all VCPs of the group of this name, which get shares of it.
    Shared(String),
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (word, rest) = text.split_once(':').map_or((text, None), |(word, rest)| (word, Some(rest)));
        match (word, rest) {
            ("auto", None) => Ok(Self::Auto),
            ("own-core", None) => Ok(Self::OwnCore),
            ("sibling", None) => Ok(Self::SiblingOf(0)),
            ("sibling", Some(vcpu)) if vcpu.parse::<u8>().is_ok() => {
                Ok(Self::SiblingOf(vcpu.parse().unwrap_or_default()))
            }
            ("shared", None) => Ok(Self::Shared(String::new())),
            ("shared", Some(group)) if !group.is_empty() => Ok(Self::Shared(group.to_owned())),
            (number, None) if number.parse::<usize>().is_ok() => {
                Ok(Self::Named(number.parse().unwrap_or_default()))
            }
            _ => Err(format!(
                "cpu={text} is not a place: give the number of a CPU, auto, own-core, sibling[:VCPU] or shared[:GROUP]"
            )),
        }
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Named(cpu) => write!(f, "{cpu}"),
            Self::OwnCore => f.write_str("own-core"),
            Self::SiblingOf(vcpu) => write!(f, "sibling:{vcpu}"),
            Self::Shared(group) if group.is_empty() => f.write_str("shared"),
            Self::Shared(group) => write!(f, "shared:{group}"),
        }
    }
}

impl<'de> serde::Deserialize<'de> for Policy {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(usize),
            Text(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Number(cpu) => Ok(Self::Named(cpu)),
            Either::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

impl serde::Serialize for Policy {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Named(cpu) => serializer.serialize_u64(*cpu as u64),
            other => serializer.collect_str(other),
        }
    }
}

/// Weight of a VCP that has no other: that of a control group.
pub const DEFAULT_WEIGHT: u32 = 100;

/// One VCP's wish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// Device, for messages.
    pub name: String,
    /// Where.
    pub policy: Policy,
    /// Its share of a thread that it shares with others, relative to theirs (1 to 10000).
    pub weight: u32,
}

/// Where one VCP runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpPlace {
    /// Its hardware thread; `None`: not pinned.
    pub cpu: Option<usize>,
    /// The NUMA node of that.
    pub node: Option<usize>,
    /// Its weight, for a control group.
    pub weight: u32,
    /// The priority, in steps below the monitor's, that gives about the same share where there is no control group.
    pub nice: i32,
}

/// Who runs where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Each VCP, in the order of the wishes.
    pub vcps: Vec<VcpPlace>,
    /// CPUs of each vCPU; `None`: not confined.
    pub vcpus: Vec<Option<Vec<usize>>>,
}

/// A thread that is taken, and by whom.
type Taken = Vec<(usize, String)>;

/// Decides who runs where, or says why it cannot be.
///
/// vCPUs without a list get what no VCP has if that is a CPU for each of them; else they are not confined, since vCPUs
/// that wait for each other on one CPU are slower than a VCP that is sometimes disturbed. Where a VCP was promised a core
/// or a sibling of its own, that is not good enough, and the placement is refused.
///
/// # Errors
/// In words for the user: who cannot be placed, why, and what is taken by whom.
pub fn place(
    host: &Topology,
    wants: &[Want],
    vcpus: u8,
    vcpu_cpus: Option<&[usize]>,
) -> Result<Placement, String> {
    let count = usize::from(vcpus);
    let mut taken = Taken::new();
    for cpu in vcpu_cpus.unwrap_or(&[]) {
        usable(host, "a vCPU", *cpu)?;
    }
    let mut vcpu_place: Vec<Option<usize>> = vec![None; count];
    if let Some(cpus) = vcpu_cpus {
        for (vcpu, cpu) in cpus.iter().enumerate().take(count) {
            if cpus.len() >= count {
                vcpu_place[vcpu] = Some(*cpu);
            }
            taken.push((*cpu, format!("vCPU {vcpu}")));
        }
    }
    let mut cpus: Vec<Option<usize>> = vec![None; wants.len()];
    // What can be satisfied in one way only goes first.
    for (want, cpu) in wants.iter().zip(&mut cpus) {
        if let Policy::Named(named) = want.policy {
            usable(host, &want.name, named)?;
            taken.push((named, want.name.clone()));
            *cpu = Some(named);
        }
    }
    for (want, cpu) in wants.iter().zip(&mut cpus) {
        if let Policy::SiblingOf(vcpu) = want.policy {
            *cpu = Some(sibling(host, want, vcpu, &mut vcpu_place, &mut taken)?);
        }
    }
    for (want, cpu) in wants.iter().zip(&mut cpus) {
        if want.policy == Policy::OwnCore {
            *cpu = Some(own_core(host, want, &mut taken)?);
        }
    }
    share(host, wants, &mut cpus, &mut taken)?;
    let strict = wants.iter().any(|want| matches!(want.policy, Policy::OwnCore | Policy::SiblingOf(_)));
    let vcpus = place_vcpus(host, count, vcpu_cpus, &vcpu_place, &taken, strict)?;
    let most = wants.iter().map(|want| want.weight).max().unwrap_or(DEFAULT_WEIGHT);
    let vcps = wants.iter().zip(cpus).map(|(want, cpu)| VcpPlace {
        cpu,
        node: cpu.and_then(|cpu| host.cpu(cpu)).map(|cpu| cpu.node),
        weight: want.weight,
        nice: nice(want.weight, most),
    });
    Ok(Placement { vcps: vcps.collect(), vcpus })
}

fn all(host: &Topology) -> String {
    ranges(&host.cpus.iter().map(|cpu| cpu.id).collect::<Vec<_>>())
}

fn usable(host: &Topology, who: &str, cpu: usize) -> Result<(), String> {
    match host.cpu(cpu) {
        Some(_) => Ok(()),
        None => {
            let why = if host.cgroup.as_ref().is_some_and(|cgroup| !cgroup.contains(&cpu)) {
                ", by its control group"
            } else {
                ""
            };
            Err(format!(
                "{who}: CPU {cpu} is not among the CPUs that this process may use{why}: {}",
                all(host)
            ))
        }
    }
}

fn by(taken: &Taken) -> String {
    let mut parts: Vec<String> = taken.iter().map(|(cpu, who)| format!("{cpu} by {who}")).collect();
    parts.dedup();
    if parts.is_empty() { "none is taken".into() } else { format!("taken: {}", parts.join(", ")) }
}

fn is_free(taken: &Taken, cpu: usize) -> bool {
    taken.iter().all(|(other, _)| *other != cpu)
}

fn sibling(
    host: &Topology,
    want: &Want,
    vcpu: usize,
    places: &mut [Option<usize>],
    taken: &mut Taken,
) -> Result<usize, String> {
    let name = &want.name;
    let count = places.len();
    let Some(place) = places.get_mut(vcpu) else {
        return Err(format!("{name}: there is no vCPU {vcpu} to be a sibling of; the guest has {count}"));
    };
    if host.cores().iter().all(|core| core.len() < 2) {
        return Err(format!(
            "{name}: no core of this host has a second hardware thread that may be used: give it a thread by number or own-core"
        ));
    }
    let pair = match *place {
        Some(cpu) => host
            .siblings(cpu)
            .into_iter()
            .find(|sibling| is_free(taken, *sibling))
            .map(|sibling| (cpu, sibling)),
        None => host.cores().iter().find_map(|core| {
            let mut free = core.iter().map(|cpu| cpu.id).filter(|cpu| is_free(taken, *cpu));
            Some((free.next()?, free.next()?))
        }),
    };
    let Some((cpu, sibling)) = pair else {
        return Err(format!("{name}: no sibling of vCPU {vcpu} is free ({})", by(taken)));
    };
    if place.replace(cpu).is_none() {
        taken.push((cpu, format!("vCPU {vcpu}")));
    }
    taken.push((sibling, name.clone()));
    Ok(sibling)
}

fn own_core(host: &Topology, want: &Want, taken: &mut Taken) -> Result<usize, String> {
    let cores = host.cores();
    let free = |core: &&Vec<&topology::Cpu>| core.iter().all(|cpu| is_free(taken, cpu.id));
    // One that nobody else is put on first, then from the end: the kernel's own work tends to be at the beginning.
    let isolated = |core: &&Vec<&topology::Cpu>| core.iter().all(|cpu| cpu.isolated);
    let core = cores.iter().rev().filter(free).find(isolated).or_else(|| cores.iter().rev().find(free));
    let Some(core) = core else {
        let name = &want.name;
        let have = cores.len();
        return Err(format!(
            "{name}: no core of its own is left of the {have} that may be used ({})",
            by(taken)
        ));
    };
    let ids: Vec<usize> = core.iter().map(|cpu| cpu.id).collect();
    taken.extend(ids.iter().map(|cpu| (*cpu, want.name.clone())));
    Ok(ids[0])
}

/// VCPs that share: a thread for each group, and one for all without a wish.
fn share(
    host: &Topology,
    wants: &[Want],
    cpus: &mut [Option<usize>],
    taken: &mut Taken,
) -> Result<(), String> {
    let mut groups: Vec<(&Policy, usize)> = Vec::new();
    for (want, cpu) in wants.iter().zip(cpus) {
        if !matches!(want.policy, Policy::Auto | Policy::Shared(_)) {
            continue;
        }
        if let Some((_, at)) = groups.iter().find(|(policy, _)| **policy == want.policy) {
            *cpu = Some(*at);
            continue;
        }
        let mut free = host.cpus.iter().rev().filter(|cpu| is_free(taken, cpu.id));
        let at = match (free.next(), &want.policy) {
            // On a single CPU there is nothing to choose.
            _ if host.cpus.len() < 2 => continue,
            (Some(free), _) => free.id,
            // Without a wish it may share with whoever is there.
            (None, Policy::Auto) => host.cpus.last().map_or(0, |cpu| cpu.id),
            (None, _) => {
                return Err(format!("{}: no CPU is left for its group ({})", want.name, by(taken)));
            }
        };
        groups.push((&want.policy, at));
        taken.push((at, want.name.clone()));
        *cpu = Some(at);
    }
    Ok(())
}

fn place_vcpus(
    host: &Topology,
    count: usize,
    list: Option<&[usize]>,
    places: &[Option<usize>],
    taken: &Taken,
    strict: bool,
) -> Result<Vec<Option<Vec<usize>>>, String> {
    if let Some(cpus) = list.filter(|cpus| cpus.len() < count) {
        return Ok(vec![Some(cpus.to_vec()); count]);
    }
    let rest: Vec<usize> = host.cpus.iter().map(|cpu| cpu.id).filter(|cpu| is_free(taken, *cpu)).collect();
    let open = places.iter().filter(|place| place.is_none()).count();
    if strict && rest.is_empty() && open > 0 {
        return Err(format!("no CPU is left for {open} of {count} vCPUs ({})", by(taken)));
    }
    let confines = strict || rest.len() >= open && rest.len() < host.cpus.len();
    let others = confines.then_some(rest);
    Ok(places.iter().map(|place| place.map(|cpu| vec![cpu]).or_else(|| others.clone())).collect())
}

/// How many steps lower the priority is at which the scheduler gives about `weight` where others of the same thread have
/// `most`: each step is a factor of 1.25.
fn nice(weight: u32, most: u32) -> i32 {
    let ratio = f64::from(most.max(1)) / f64::from(weight.max(1));
    (ratio.ln() / 1.25f64.ln()).round().clamp(0.0, 19.0) as i32
}

#[cfg(test)]
mod tests;
