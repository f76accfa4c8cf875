//! Made-up machines, and who runs where on them.

use std::path::Path;

use proptest::prelude::*;

use super::*;

/// Writes a machine: for each CPU its package, core and node.
fn machine(dir: &Path, cpus: &[(usize, usize, usize)], isolated: &str) {
    let write = |path: String, text: &str| {
        let path = dir.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let base = "sys/devices/system";
    write(format!("{base}/cpu/online"), &format!("0-{}\n", cpus.len() - 1));
    write(format!("{base}/cpu/isolated"), &format!("{isolated}\n"));
    let mut nodes: std::collections::BTreeMap<usize, Vec<usize>> = std::collections::BTreeMap::new();
    for (id, (package, core, node)) in cpus.iter().enumerate() {
        write(format!("{base}/cpu/cpu{id}/topology/physical_package_id"), &format!("{package}\n"));
        write(format!("{base}/cpu/cpu{id}/topology/core_id"), &format!("{core}\n"));
        nodes.entry(*node).or_default().push(id);
    }
    for (node, cpus) in nodes {
        write(format!("{base}/node/node{node}/cpulist"), &format!("{}\n", ranges(&cpus)));
    }
}

fn read(cpus: &[(usize, usize, usize)], isolated: &str, allowed: &[usize]) -> Topology {
    let dir = tempfile::tempdir().unwrap();
    machine(dir.path(), cpus, isolated);
    Topology::read(dir.path(), allowed)
}

/// `n` cores with one thread.
fn plain(n: usize) -> Topology {
    let cpus: Vec<_> = (0..n).map(|id| (0, id, 0)).collect();
    read(&cpus, "", &(0..n).collect::<Vec<_>>())
}

/// A server: two packages with four cores each, two threads a core, numbered as Linux does on x86: CPU 0 to 7 are first
/// threads, 8 to 15 their siblings. A node per package.
fn server() -> Topology {
    let cpus: Vec<_> = (0..16).map(|id| (id % 8 / 4, id % 4, id % 8 / 4)).collect();
    read(&cpus, "", &(0..16).collect::<Vec<_>>())
}

fn want(policy: &str) -> Want {
    Want { name: "disk0".into(), policy: policy.parse().unwrap(), weight: DEFAULT_WEIGHT }
}

fn cpus(placement: &Placement) -> Vec<Option<usize>> {
    placement.vcps.iter().map(|place| place.cpu).collect()
}

#[test]
fn a_server_is_read_as_it_is() {
    let host = server();
    assert_eq!(host.describe(), "2 packages, 8 cores with 2 threads, 2 NUMA nodes");
    assert_eq!(host.siblings(5), [13]);
    assert_eq!((host.cpu(5).unwrap().package, host.cpu(5).unwrap().node), (1, 1));
    assert_eq!(plain(1).describe(), "1 package, 1 core with 1 thread, 1 NUMA node");
}

#[test]
fn isolated_cpus_may_be_used_where_the_control_group_allows_them() {
    let dir = tempfile::tempdir().unwrap();
    machine(dir.path(), &[(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0)], "2-3");
    // What a process is allowed by default leaves them out.
    assert_eq!(all(&Topology::read(dir.path(), &[0, 1])), "0-1");
    std::fs::create_dir_all(dir.path().join("proc/self")).unwrap();
    std::fs::create_dir_all(dir.path().join("sys/fs/cgroup/vms/a")).unwrap();
    std::fs::write(dir.path().join("proc/self/cgroup"), "0::/vms/a\n").unwrap();
    std::fs::write(dir.path().join("sys/fs/cgroup/vms/a/cpuset.cpus.effective"), "1-3\n").unwrap();
    let host = Topology::read(dir.path(), &[0, 1]);
    assert_eq!(all(&host), "1-3");
    assert!(host.describe().ends_with("; 3 of 4 threads may be used; isolated: 2-3"), "{}", host.describe());
    // The first that is isolated from the end.
    assert_eq!(cpus(&place(&host, &[want("own-core")], 1, None).unwrap()), [Some(3)]);
    let error = place(&host, &[want("0")], 1, None).unwrap_err();
    assert_eq!(
        error,
        "disk0: CPU 0 is not among the CPUs that this process may use, by its control group: 1-3"
    );
}

#[test]
fn the_cpuset_of_version_1_counts_too() {
    let dir = tempfile::tempdir().unwrap();
    machine(dir.path(), &[(0, 0, 0), (0, 1, 0)], "");
    std::fs::create_dir_all(dir.path().join("proc/self")).unwrap();
    std::fs::create_dir_all(dir.path().join("sys/fs/cgroup/cpuset/vms")).unwrap();
    std::fs::write(dir.path().join("proc/self/cgroup"), "4:memory:/x\n3:cpuset:/vms\n0::/\n").unwrap();
    std::fs::write(dir.path().join("sys/fs/cgroup/cpuset/vms/cpuset.effective_cpus"), "1\n").unwrap();
    assert_eq!(all(&Topology::read(dir.path(), &[0, 1])), "1");
}

#[test]
fn without_a_wish_a_vcp_gets_the_last_cpu_and_vcpus_the_rest() {
    let p = place(&plain(3), &[want("auto")], 2, None).unwrap();
    assert_eq!((cpus(&p), p.vcpus), (vec![Some(2)], vec![Some(vec![0, 1]); 2]));
    // vCPUs that would share a CPU are not confined.
    assert_eq!(place(&plain(2), &[want("auto")], 2, None).unwrap().vcpus, vec![None, None]);
    // All without a wish share.
    assert_eq!(cpus(&place(&plain(4), &[want("auto"), want("auto")], 2, None).unwrap()), [Some(3), Some(3)]);
    // One CPU is shared by everybody.
    let p = place(&plain(1), &[want("auto")], 1, None).unwrap();
    assert_eq!((cpus(&p), p.vcpus), (vec![None], vec![None]));
    // Without VCPs nothing is confined.
    assert_eq!(place(&plain(2), &[], 1, None).unwrap().vcpus, vec![None]);
}

#[test]
fn named_cpus_and_lists_count() {
    let p = place(&plain(4), &[want("0")], 2, Some(&[2, 3])).unwrap();
    assert_eq!((cpus(&p), p.vcpus), (vec![Some(0)], vec![Some(vec![2]), Some(vec![3])]));
    assert!(place(&plain(2), &[want("2")], 1, None).unwrap_err().contains("CPU 2 is not among"));
    assert!(place(&plain(2), &[], 1, Some(&[5])).unwrap_err().starts_with("a vCPU: CPU 5"));
    // A list shorter than the vCPUs is a set for all of them.
    assert_eq!(place(&plain(4), &[], 3, Some(&[0, 1])).unwrap().vcpus, vec![Some(vec![0, 1]); 3]);
}

#[test]
fn a_core_of_its_own_is_the_whole_core() {
    let p = place(&server(), &[want("own-core"), want("own-core")], 2, None).unwrap();
    assert_eq!(cpus(&p), [Some(7), Some(6)]);
    assert_eq!(p.vcps[0].node, Some(1));
    let vcpus = p.vcpus[0].clone().unwrap();
    for cpu in [6, 7, 14, 15] {
        assert!(!vcpus.contains(&cpu), "{vcpus:?}");
    }
    let error =
        place(&plain(2), &[want("own-core"), want("own-core"), want("own-core")], 1, None).unwrap_err();
    assert_eq!(
        error,
        "disk0: no core of its own is left of the 2 that may be used (taken: 1 by disk0, 0 by disk0)"
    );
    let error = place(&plain(2), &[want("own-core"), want("own-core")], 1, None).unwrap_err();
    assert!(error.starts_with("no CPU is left for 1 of 1 vCPUs"), "{error}");
}

#[test]
fn a_sibling_shares_the_core_of_its_vcpu() {
    let p = place(&server(), &[want("sibling:1")], 2, None).unwrap();
    let (vcp, vcpu) = (p.vcps[0].cpu.unwrap(), p.vcpus[1].clone().unwrap());
    assert_eq!(server().siblings(vcp), vcpu);
    assert!(!p.vcpus[0].clone().unwrap().contains(&vcp));
    // The user's list says where the vCPU is.
    let p = place(&server(), &[want("sibling")], 2, Some(&[3, 4])).unwrap();
    assert_eq!(cpus(&p), [Some(11)]);
    let error = place(&plain(4), &[want("sibling")], 2, None).unwrap_err();
    assert!(error.contains("no core of this host has a second hardware thread"), "{error}");
    let error = place(&server(), &[want("sibling:7")], 2, None).unwrap_err();
    assert!(error.contains("there is no vCPU 7"), "{error}");
    // Both threads of the core are vCPUs'.
    let error = place(&server(), &[want("sibling")], 2, Some(&[3, 11])).unwrap_err();
    assert_eq!(error, "disk0: no sibling of vCPU 0 is free (taken: 3 by vCPU 0, 11 by vCPU 1)");
}

#[test]
fn groups_share_a_thread_by_weight() {
    let mut wants = [want("shared:slow"), want("shared:slow"), want("shared:fast"), want("3")];
    wants[1].weight = 400;
    let p = place(&plain(6), &wants, 1, None).unwrap();
    assert_eq!(cpus(&p), [Some(5), Some(5), Some(4), Some(3)]);
    assert_eq!((p.vcps[1].nice, p.vcps[0].nice), (0, 6), "a quarter, in steps of 1.25");
    let error = place(&plain(2), &[want("0"), want("1"), want("shared:a")], 1, None).unwrap_err();
    assert!(error.contains("no CPU is left for its group (taken: 0 by disk0, 1 by disk0)"), "{error}");
}

#[test]
fn policies_are_written_as_they_are_read() {
    for text in ["auto", "3", "own-core", "sibling:2", "shared", "shared:disks"] {
        assert_eq!(text.parse::<Policy>().unwrap().to_string(), text);
    }
    for text in ["", "core", "own-core:1", "sibling:x", "shared:", "-1", "auto:1"] {
        assert!(text.parse::<Policy>().unwrap_err().contains("is not a place"), "{text}");
    }
    let number: Policy = serde_json::from_str("3").unwrap();
    assert_eq!(
        (number, serde_json::to_string(&Policy::OwnCore).unwrap()),
        (Policy::Named(3), "\"own-core\"".into())
    );
}

#[test]
fn lists_that_are_none_are_refused() {
    for text in ["3-1", "x", "0-99999999", "1-", "-"] {
        assert_eq!(topology::parse_list(text), None, "{text}");
    }
    assert_eq!(topology::parse_list("0-2,5\n").unwrap().into_iter().collect::<Vec<_>>(), [0, 1, 2, 5]);
}

proptest! {
    /// Whatever the machine and the wishes: only usable CPUs, a core of one's own is nobody else's, and no panic.
    #[test]
    fn any_machine(
        cpus in proptest::collection::vec((0usize..2, 0usize..4, 0usize..2), 1..12),
        allowed in proptest::collection::btree_set(0usize..12, 1..12),
        policies in proptest::collection::vec(0usize..6, 0..5),
        vcpus in 1u8..4,
    ) {
        let allowed: Vec<usize> = allowed.into_iter().collect();
        let host = read(&cpus, "", &allowed);
        let policy = |n: usize| match n {
            0 => Policy::Auto,
            1 => Policy::Named(1),
            2 => Policy::OwnCore,
            3 => Policy::SiblingOf(0),
            4 => Policy::Shared("a".into()),
            _ => Policy::Shared("b".into()),
        };
        let wants: Vec<Want> = policies
            .iter()
            .enumerate()
            .map(|(i, n)| Want { name: format!("disk{i}"), policy: policy(*n), weight: 100 })
            .collect();
        if let Ok(p) = place(&host, &wants, vcpus, None) {
            for cpu in p.vcps.iter().filter_map(|place| place.cpu).chain(p.vcpus.iter().flatten().flatten().copied()) {
                prop_assert!(host.cpu(cpu).is_some());
            }
            for (i, want) in wants.iter().enumerate().filter(|(_, want)| want.policy == Policy::OwnCore) {
                let own = p.vcps[i].cpu.unwrap();
                let core: Vec<usize> = host.siblings(own).into_iter().chain([own]).collect();
                for (j, other) in p.vcps.iter().enumerate() {
                    // Without a wish one shares with whoever is there if nothing is free.
                    let may = j == i || wants[j].policy == Policy::Auto;
                    prop_assert!(may || !core.contains(&other.cpu.unwrap_or(usize::MAX)), "{want:?}");
                }
                for vcpu in &p.vcpus {
                    prop_assert!(vcpu.as_ref().is_some_and(|cpus| cpus.iter().all(|cpu| !core.contains(cpu))));
                }
            }
        }
    }
}

fn held(want: &Want, cpu: usize) -> (Want, VcpPlace) {
    (want.clone(), VcpPlace { cpu: Some(cpu), ..VcpPlace::default() })
}

fn named(name: &str, policy: &str) -> Want {
    Want { name: name.into(), ..want(policy) }
}

#[test]
fn a_later_vcp_knows_of_the_others() {
    let host = plain(4);
    let first = named("disk0", "own-core");
    let others = [held(&first, 3)];
    let vcpus = [Some(vec![0]), Some(vec![1, 2])];
    // The core that is not the first one's, and which the second vCPU then leaves.
    let placed = place_later(&host, &others, &vcpus, &named("disk1", "own-core")).unwrap();
    assert_eq!((cpus(&placed), placed.vcpus), (vec![Some(2)], vec![Some(vec![0]), Some(vec![1])]));
    // Nothing is left for a vCPU that may run anywhere.
    let error = place_later(&plain(2), &[held(&first, 1)], &[None], &named("disk1", "own-core")).unwrap_err();
    assert!(
        error.contains("disk1: no CPU would be left for vCPU 0") && error.contains("1 by disk0"),
        "{error}"
    );
    let error = place_later(&plain(2), &[held(&first, 1)], &[Some(vec![0])], &named("disk1", "own-core"))
        .unwrap_err();
    assert!(error.contains("no core of its own") && error.contains("0 by vCPU 0"), "{error}");
}

#[test]
fn a_later_vcp_joins_its_group() {
    let host = plain(4);
    let others = [held(&named("disk0", "shared:a"), 2), held(&named("net0", "auto"), 3)];
    let at = |policy: &str| {
        place_later(&host, &others, &[Some(vec![0])], &named("disk1", policy)).map(|p| cpus(&p)[0])
    };
    assert_eq!(at("shared:a"), Ok(Some(2)));
    assert_eq!(at("auto"), Ok(Some(3)));
    assert_eq!(at("shared:b"), Ok(Some(1)), "a thread that nobody has");
    assert_eq!(at("3"), Ok(Some(3)), "what is named is meant");
    assert!(at("9").unwrap_err().contains("CPU 9 is not among"));
}

#[test]
fn a_later_sibling_needs_a_vcpu_that_stays_where_it_is() {
    let host = server();
    let at = |vcpus: &[Option<Vec<usize>>]| {
        place_later(&host, &[], vcpus, &named("disk1", "sibling")).map(|placed| cpus(&placed)[0])
    };
    assert_eq!(at(&[Some(vec![5])]), Ok(Some(13)));
    assert!(at(&[None]).unwrap_err().contains("vcp ctl pin vcpu0"), "{:?}", at(&[None]));
    assert!(at(&[]).unwrap_err().contains("no vCPU 0"));
    let taken = [held(&named("disk0", "13"), 13)];
    let error = place_later(&host, &taken, &[Some(vec![5])], &named("disk1", "sibling")).unwrap_err();
    assert!(error.contains("13 by disk0"), "{error}");
}

#[test]
fn guest_memory_is_where_its_vcps_are() {
    let host = server();
    let decide = |policies: &[&str], wish| {
        let wants: Vec<Want> =
            policies.iter().enumerate().map(|(n, policy)| named(&format!("disk{n}"), policy)).collect();
        let placement = place(&host, &wants, 1, None).unwrap();
        memory_place(&host, &wants, &placement, wish)
    };
    assert_eq!(decide(&["1"], None).unwrap(), MemoryPlace { node: Some(0), afar: vec![] });
    let most = decide(&["1", "5", "6"], None).unwrap();
    assert_eq!(most, MemoryPlace { node: Some(1), afar: vec!["disk0 on node 0".into()] });
    assert_eq!(decide(&["5"], Some(0)).unwrap().afar, ["disk0 on node 1"]);
    let error = decide(&["5"], Some(7)).unwrap_err();
    assert!(error.contains("memory-node=7") && error.contains("0-1"), "{error}");
    // No VCP of ours: the vCPUs decide, if they agree.
    let vcpus = |cpus: &[usize]| Placement { vcps: vec![], vcpus: vec![Some(cpus.to_vec())] };
    assert_eq!(memory_place(&host, &[], &vcpus(&[4, 5]), None).unwrap().node, Some(1));
    assert_eq!(memory_place(&host, &[], &vcpus(&[3, 4]), None).unwrap().node, None);
    assert_eq!(memory_place(&plain(4), &[], &vcpus(&[3]), None).unwrap().node, None, "one node");
}
