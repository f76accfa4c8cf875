//! Facts of the host that are read rather than tried.

use std::fs::read_to_string;

use kvm_ioctls::Cap;
use rustix::process::{Resource, getrlimit};

use super::{Item, Status};
use crate::affinity;
use crate::placement::topology::Topology;

/// KVM's API version since Linux 2.6.22.
const KVM_API_VERSION: i32 = 12;
/// Memory that a VCP may want to lock: less than this is worth a word.
const MEMLOCK_WANTED_BYTES: u64 = 8 << 20;

/// Processors: virtualisation flags, CPUs that may be used, siblings.
pub(super) fn processors() -> Vec<Item> {
    let cpuinfo = read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags: Vec<&str> = cpuinfo
        .lines()
        .find(|l| l.starts_with("flags"))
        .map_or(Vec::new(), |l| l.split_whitespace().collect());
    let has = |flag: &str| flags.contains(&flag);
    let virtualised = if has("hypervisor") { "; this host is itself a virtual machine" } else { "" };
    let hardware = match (has("vmx"), has("svm")) {
        (true, _) => Item::ok("virtualisation", format!("vmx (Intel){virtualised}")),
        (_, true) => Item::ok("virtualisation", format!("svm (AMD){virtualised}")),
        _ if has("hypervisor") => Item::new(
            "virtualisation",
            Status::Warn,
            format!("no vmx or svm flag{virtualised}"),
            "enable nested virtualisation where this machine is hosted, for Linux guests at full speed",
        ),
        _ => Item::new(
            "virtualisation",
            Status::No,
            "no vmx or svm flag",
            "enable virtualisation in the firmware's set-up",
        ),
    };
    let modules: Vec<&str> = ["kvm_intel", "kvm_amd", "kvm_pvm"]
        .into_iter()
        .filter(|m| std::path::Path::new("/sys/module").join(m).exists())
        .collect();
    let modules = match modules.as_slice() {
        [] => Item::new(
            "kvm module",
            Status::Warn,
            "none of kvm_intel, kvm_amd, kvm_pvm",
            "modprobe kvm_intel or kvm_amd, unless KVM is built in",
        ),
        ["kvm_pvm"] => Item::new(
            "kvm module",
            Status::Warn,
            "kvm_pvm",
            "it runs ring 3 of a guest natively and emulates ring 0",
        ),
        list => Item::ok("kvm module", list.join(", ")),
    };
    vec![hardware, modules, cpus(), topology()]
}

fn allowed() -> Vec<usize> {
    affinity::allowed().unwrap_or_default()
}

fn cpus() -> Item {
    let cpus = allowed();
    let list = cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    match cpus.len() {
        0 => Item::new("allowed CPUs", Status::Warn, "unknown", "check the affinity mask (taskset -p $$)"),
        1 => Item::new(
            "allowed CPUs",
            Status::Warn,
            list,
            "guest and VCPs share one CPU: allow more (taskset, cpuset)",
        ),
        _ => Item::ok("allowed CPUs", list),
    }
}

fn topology() -> Item {
    let host = match Topology::of_host() {
        Ok(host) => host,
        Err(e) => {
            return Item::new("topology", Status::Warn, crate::chain(&e), "check /sys/devices/system/cpu");
        }
    };
    let text = host.describe();
    let pairs: Vec<String> = host
        .cores()
        .iter()
        .filter(|core| core.len() > 1)
        .map(|core| core.iter().map(|cpu| cpu.id.to_string()).collect::<Vec<_>>().join("+"))
        .collect();
    if pairs.is_empty() {
        return Item::ok("topology", text);
    }
    Item::new(
        "topology",
        Status::Warn,
        format!("{text}; siblings {}", pairs.join(" ")),
        "a VCP next to another guest's thread shares its core: cpu=own-core, or cpu=sibling for its own guest",
    )
}

/// `/dev/kvm`: there, openable, its limits and capabilities. The flag says whether it can be used.
pub(super) fn kvm() -> (Vec<Item>, bool) {
    let kvm = match crate::kvm::open() {
        Ok(kvm) => kvm,
        Err(e) => {
            let text = crate::chain(&e);
            let advice = match &e {
                crate::Error::KvmOpen { hint, .. } => *hint,
                _ => "",
            };
            return (vec![Item::new("/dev/kvm", Status::No, text, advice)], false);
        }
    };
    let version = kvm.get_api_version();
    let mut usable = version == KVM_API_VERSION;
    let mut items = vec![if usable {
        Item::ok("/dev/kvm", format!("open, API version {version}"))
    } else {
        Item::new(
            "/dev/kvm",
            Status::No,
            format!("API version {version}"),
            "only version 12 is supported: use a current kernel",
        )
    }];
    let limits = format!(
        "{} vCPUs ({} recommended), {} memory slots",
        kvm.get_max_vcpus(),
        kvm.get_nr_vcpus(),
        kvm.get_nr_memslots()
    );
    items.push(Item::ok("KVM limits", limits));
    for (cap, name) in [
        (Cap::Irqchip, "irqchip"),
        (Cap::Irqfd, "irqfd"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::UserMemory, "user memory"),
    ] {
        if kvm.check_extension(cap) {
            items.push(Item::ok(name, "yes"));
        } else {
            usable = false;
            items.push(Item::new(name, Status::No, "not supported by this KVM", "use a current kernel"));
        }
    }
    (items, usable)
}

/// Huge pages.
pub(super) fn memory() -> Vec<Item> {
    let read = |file: &str| -> Option<u64> {
        read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{file}")).ok()?.trim().parse().ok()
    };
    let item = match (read("nr_hugepages"), read("free_hugepages")) {
        (Some(0), _) => Item::new(
            "huge pages",
            Status::Warn,
            "the pool of 2 MiB pages is empty",
            "for --hugepages: echo N > /proc/sys/vm/nr_hugepages",
        ),
        (Some(all), Some(free)) => Item::ok("huge pages", format!("{free} of {all} pages of 2 MiB are free")),
        _ => Item::new("huge pages", Status::Warn, "not supported by this kernel", "do without --hugepages"),
    };
    vec![item]
}

/// What this process may do.
pub(super) fn rights() -> Vec<Item> {
    let limit = getrlimit(Resource::Memlock).current;
    let memlock = match limit {
        None => Item::ok("locked memory", "unlimited"),
        Some(bytes) if bytes >= MEMLOCK_WANTED_BYTES => {
            Item::ok("locked memory", format!("{} MiB", bytes >> 20))
        }
        Some(bytes) => Item::new(
            "locked memory",
            Status::Warn,
            format!("{} KiB", bytes >> 10),
            "raise it: ulimit -l, or LimitMEMLOCK= of the service",
        ),
    };
    let status = read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(|v| v.trim().to_owned());
    let capabilities = field("CapEff:").and_then(|v| u64::from_str_radix(&v, 16).ok()).unwrap_or(0);
    let root = rustix::process::geteuid().is_root();
    let rights = match (root, capabilities) {
        (true, _) => Item::new(
            "rights",
            Status::Warn,
            "runs as root",
            "not needed: an unprivileged user in the group kvm is enough",
        ),
        (false, 0) => Item::ok("rights", "unprivileged, no capabilities"),
        (false, bits) => Item::ok("rights", format!("unprivileged, capabilities {bits:#x}")),
    };
    let groups = match crate::vcp::cgroup::Groups::look() {
        Ok(where_to) => Item::ok("control groups", where_to),
        Err(why) => Item::new(
            "control groups",
            Status::Warn,
            why,
            "VCPs run without cpu.max, memory.max and pids.max",
        ),
    };
    vec![memlock, rights, groups]
}
