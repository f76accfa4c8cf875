//! On made-up hierarchies of ordinary files; the kernel's own is in the helper VM (`tests/e2e/confined.rs`).

use super::*;

const BOUNDS: Bounds = Bounds { cpu_percent: Some(50), memory_bytes: 64 << 20, tasks: 64, weight: 100 };

/// A made-up hierarchy, with these processes in `/vms/a`.
fn hierarchy(controllers: &str, procs: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("cgroup.controllers"), controllers).unwrap();
    std::fs::write(dir.path().join("cgroup.procs"), "1\n").unwrap();
    let base = dir.path().join("vms/a");
    std::fs::create_dir_all(&base).unwrap();
    std::fs::write(base.join("cgroup.controllers"), controllers).unwrap();
    std::fs::write(base.join("cgroup.procs"), procs).unwrap();
    std::fs::write(base.join("cgroup.type"), "domain\n").unwrap();
    dir
}

fn refused(dir: &Path, own: &str, privileged: bool) -> String {
    Groups::prepare(dir, own, 7, privileged).unwrap_err()
}

#[test]
fn what_is_in_the_way_is_said() {
    let dir = hierarchy("io", "7\n");
    let error = refused(dir.path(), "0::/vms/a\n", false);
    assert!(error.contains("none of the controllers") && error.contains("Delegate=yes"), "{error}");
    let dir = hierarchy("cpu memory pids", "7\n8\n");
    let error = refused(dir.path(), "0::/vms/a\n", false);
    assert!(error.contains("other processes"), "{error}");
    let error = refused(dir.path(), "4:memory:/x\n", true);
    assert!(error.contains("version 2"), "{error}");
    std::fs::remove_file(dir.path().join("cgroup.controllers")).unwrap();
    let error = refused(dir.path(), "0::/vms/a\n", true);
    assert!(error.contains("not mounted"), "{error}");
}

#[test]
fn root_goes_to_the_top_where_its_own_group_will_not_do() {
    let dir = hierarchy("cpu memory pids", "7\n8\n");
    let place = Place::find(dir.path(), "0::/vms/a\n", 7, true).unwrap();
    assert_eq!((place.name.as_str(), place.alone), ("/", false));
    let place = Place::find(hierarchy("cpu pids", "7\n").path(), "0::/vms/a\n", 7, true).unwrap();
    assert_eq!((place.name.as_str(), place.alone), ("/vms/a", true));
    assert_eq!(place.offered, ["cpu", "pids"]);
}

#[test]
fn bounds_are_written_and_usage_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let write_all = |files: &[(&str, &str)]| {
        for (file, text) in files {
            std::fs::write(dir.path().join(file), text).unwrap();
        }
    };
    write_all(&[("cpu.max", ""), ("cpu.weight", ""), ("memory.max", ""), ("pids.max", "")]);
    let group = |bounds| Group { path: dir.path().to_owned(), bounds };
    let read = |file: &str| std::fs::read_to_string(dir.path().join(file)).unwrap();
    group(BOUNDS).set(&["cpu", "memory", "pids"]).unwrap();
    assert_eq!((read("cpu.max"), read("cpu.weight")), ("10000 20000".into(), "100".into()));
    assert_eq!((read("memory.max"), read("pids.max")), ((64u64 << 20).to_string(), "64".into()));
    let least = Bounds { cpu_percent: Some(MIN_CPU_PERCENT), ..BOUNDS };
    group(least).set(&["cpu"]).unwrap();
    assert!(read("cpu.max").starts_with("1000 "), "less than the kernel takes: {}", read("cpu.max"));
    // Files of controllers that are not there are left alone.
    std::fs::remove_file(dir.path().join("pids.max")).unwrap();
    group(BOUNDS).set(&["cpu", "memory"]).unwrap();
    assert!(group(BOUNDS).set(&["pids"]).is_err());
    write_all(&[
        ("cpu.stat", "usage_usec 5\nuser_usec 3\nnr_throttled 2\nthrottled_usec 7\n"),
        ("memory.current", "4096\n"),
        ("memory.events", "low 0\noom 3\noom_kill 2\n"),
        ("pids.events", "max 9\n"),
    ]);
    let expected =
        Usage { memory_bytes: 4096, tasks: 0, cpu_us: 5, throttled_us: 7, oom_kills: 2, refused_tasks: 9 };
    assert_eq!(group(BOUNDS).usage(), expected);
}

#[test]
fn what_a_killed_monitor_left_is_removed_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["vcp-12", "vcp-12/disk0", "vcp-13.2", "vcp-x", "other", "vcp-14"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
    }
    let alive = lock(&dir.path().join("vcp-14")).unwrap();
    sweep(dir.path());
    let there = |name: &str| dir.path().join(name).exists();
    assert!(!there("vcp-12") && !there("vcp-13.2"));
    assert!(there("vcp-x") && there("other") && there("vcp-14"));
    drop(alive);
    // A number that is used again.
    let (first, _lock) = make_locked(dir.path(), 14).unwrap();
    assert_ne!(first, dir.path().join("vcp-14"));
    sweep(dir.path());
    assert!(!there("vcp-14") && first.exists());
}
