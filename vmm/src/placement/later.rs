//! A VCP that comes while the guest runs: placed with knowledge of those that are there, and of where the vCPUs are. What
//! was promised to others holds; vCPUs that may run on several CPUs give one up where a core is to be had that way.

use super::topology::{self, Topology};
use super::{Placement, Policy, Taken, VcpPlace, Want, by, is_free, nice, own_core, usable};

/// VCPs that run, with what was wanted for them and where they are.
pub type Others = [(Want, VcpPlace)];

/// A place for one more, and the vCPUs' CPUs with it.
///
/// # Errors
/// In words for the user: why it cannot be, and what is taken by whom.
pub fn place_later(
    host: &Topology,
    others: &Others,
    vcpus: &[Option<Vec<usize>>],
    want: &Want,
) -> Result<Placement, String> {
    let mut taken: Taken =
        others.iter().filter_map(|(other, place)| Some((place.cpu?, other.name.clone()))).collect();
    // The whole of a core that was promised.
    for (other, place) in others.iter().filter(|(other, _)| other.policy == Policy::OwnCore) {
        let siblings = place.cpu.map(|cpu| host.siblings(cpu)).unwrap_or_default();
        taken.extend(siblings.into_iter().map(|cpu| (cpu, other.name.clone())));
    }
    let mut vcpus = vcpus.to_vec();
    for (id, cpus) in vcpus.iter().enumerate() {
        if let Some([cpu]) = cpus.as_deref() {
            taken.push((*cpu, format!("vCPU {id}")));
        }
    }
    let cpu = match &want.policy {
        Policy::Named(cpu) => {
            usable(host, &want.name, *cpu)?;
            Some(*cpu)
        }
        Policy::OwnCore => Some(core(host, want, &mut taken, &mut vcpus)?),
        Policy::SiblingOf(vcpu) => Some(sibling(host, want, *vcpu, &taken, &vcpus)?),
        Policy::Auto | Policy::Shared(_) => shared(host, others, want, &taken)?,
    };
    let most = others.iter().map(|(other, _)| other.weight).fold(want.weight, u32::max);
    let node = cpu.and_then(|cpu| host.cpu(cpu)).map(|cpu| cpu.node);
    let place = VcpPlace { cpu, node, weight: want.weight, nice: nice(want.weight, most) };
    Ok(Placement { vcps: vec![place], vcpus })
}

/// A core that nobody has; vCPUs that are not held to one CPU leave it.
fn core(
    host: &Topology,
    want: &Want,
    taken: &mut Taken,
    vcpus: &mut [Option<Vec<usize>>],
) -> Result<usize, String> {
    let cpu = own_core(host, want, taken)?;
    let mut core = host.siblings(cpu);
    core.push(cpu);
    let open = vcpus.iter().filter(|cpus| cpus.as_ref().is_none_or(|cpus| cpus.len() > 1)).count();
    let all: Vec<usize> = host.cpus.iter().map(|cpu| cpu.id).collect();
    for (id, cpus) in vcpus.iter_mut().enumerate() {
        let left: Vec<usize> = match cpus.as_deref() {
            // It is held to one CPU, which is not of this core.
            Some([_]) => continue,
            Some(cpus) => cpus.iter().copied().filter(|cpu| !core.contains(cpu)).collect(),
            None => all.iter().copied().filter(|cpu| is_free(taken, *cpu)).collect(),
        };
        if left.is_empty() {
            return Err(format!(
                "{}: no CPU would be left for vCPU {id} ({open} of {} are not held to one CPU; {})",
                want.name,
                vcpus.len(),
                by(taken)
            ));
        }
        *cpus = Some(left);
    }
    Ok(cpu)
}

/// The other thread of the core of a vCPU that is held to one CPU.
fn sibling(
    host: &Topology,
    want: &Want,
    vcpu: usize,
    taken: &Taken,
    vcpus: &[Option<Vec<usize>>],
) -> Result<usize, String> {
    let name = &want.name;
    let cpu = match vcpus.get(vcpu).map(Option::as_deref) {
        None => {
            return Err(format!(
                "{name}: there is no vCPU {vcpu} to be a sibling of; the guest has {}",
                vcpus.len()
            ));
        }
        Some(Some([cpu])) => *cpu,
        Some(_) => {
            return Err(format!(
                "{name}: vCPU {vcpu} is not held to one CPU: pin it first (vcp ctl pin vcpu{vcpu} N)"
            ));
        }
    };
    let free = host.siblings(cpu).into_iter().find(|sibling| is_free(taken, *sibling));
    free.ok_or_else(|| format!("{name}: no sibling of vCPU {vcpu}, on CPU {cpu}, is free ({})", by(taken)))
}

/// The thread of its group, or one for a new group.
fn shared(host: &Topology, others: &Others, want: &Want, taken: &Taken) -> Result<Option<usize>, String> {
    if let Some((_, place)) = others.iter().find(|(other, _)| other.policy == want.policy) {
        return Ok(place.cpu);
    }
    if host.cpus.len() < 2 {
        return Ok(None);
    }
    let free = host.cpus.iter().rev().map(|cpu: &topology::Cpu| cpu.id).find(|cpu| is_free(taken, *cpu));
    match (free, &want.policy) {
        (Some(cpu), _) => Ok(Some(cpu)),
        (None, Policy::Auto) => Ok(host.cpus.last().map(|cpu| cpu.id)),
        (None, _) => Err(format!("{}: no CPU is left for its group ({})", want.name, by(taken))),
    }
}
