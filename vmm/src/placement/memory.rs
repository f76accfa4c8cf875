//! Which NUMA node guest memory comes from: the node of those who move most of it, its VCPs.

use super::topology::{Topology, ranges};
use super::{Placement, Want};

/// Where guest memory is to come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlace {
    /// The node; `None`: wherever the kernel takes it from.
    pub node: Option<usize>,
    /// VCPs that are on another node, in words, for they reach it across.
    pub afar: Vec<String>,
}

/// Decides where guest memory comes from: what the user says, else the node on which most VCPs are, else that of the vCPUs
/// if they are all on one. On a host with one node there is nothing to decide.
///
/// # Errors
/// The user's node has no memory; in words, with those that have.
pub fn memory_place(
    host: &Topology,
    wants: &[Want],
    placement: &Placement,
    wish: Option<usize>,
) -> Result<MemoryPlace, String> {
    let node = match wish {
        Some(node) if !host.nodes.contains(&node) => {
            return Err(format!(
                "memory-node={node}: there is no memory on that node of this host, but on {}",
                ranges(&host.nodes)
            ));
        }
        Some(node) => Some(node),
        None if host.nodes.len() < 2 => None,
        None => of_most(host, placement).or_else(|| of_all(host, placement)),
    };
    let afar = wants.iter().zip(&placement.vcps).filter_map(|(want, place)| {
        let (own, memory) = (place.node?, node?);
        (own != memory).then(|| format!("{} on node {own}", want.name))
    });
    Ok(MemoryPlace { node, afar: afar.collect() })
}

/// The node with memory on which most VCPs are; of several the first.
fn of_most(host: &Topology, placement: &Placement) -> Option<usize> {
    let count = |node: usize| placement.vcps.iter().filter(|place| place.node == Some(node)).count();
    host.nodes.iter().copied().rev().filter(|node| count(*node) > 0).max_by_key(|node| count(*node))
}

/// The node on which all vCPUs are.
fn of_all(host: &Topology, placement: &Placement) -> Option<usize> {
    let mut nodes = Vec::new();
    for cpus in &placement.vcpus {
        nodes.extend(cpus.as_ref()?.iter().filter_map(|cpu| host.cpu(*cpu)).map(|cpu| cpu.node));
    }
    nodes.dedup();
    let [node] = nodes[..] else { return None };
    host.nodes.contains(&node).then_some(node)
}
