//! What a process has when it comes into being, seen from inside and from outside.

use std::io::Read;

use super::*;

fn plan(script: &str, spaces: Spaces) -> (Plan, std::fs::File) {
    let (output, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let stderr = rustix::io::fcntl_dupfd_cloexec(std::io::stderr(), 0).unwrap();
    let plan = Plan {
        program: "/bin/sh".into(),
        args: vec!["-c".into(), script.into()],
        env: vec![("GREETING".into(), "hello".into())],
        fds: vec![null.into(), theirs, stderr],
        spaces,
        needs_net: false,
        outer_id: 0x7fff_0000,
        node: None,
        cgroup: None,
        nice: 0,
    };
    (plan, output.into())
}

fn run(script: &str, spaces: Spaces) -> (Spawned, String, Ended) {
    let (plan, mut output) = plan(script, spaces);
    let spawned = spawn(plan).unwrap();
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    let ended = spawned.status(true).unwrap().unwrap();
    (spawned, text, ended)
}

#[test]
fn environment_descriptors_and_exit_code() {
    let (_, text, ended) =
        run("echo $GREETING; env | grep -c HOME; ls /proc/self/fd | tr '\\n' ' '; exit 7", Spaces::NONE);
    // `ls` has one more, for the directory.
    assert_eq!(text.trim(), "hello\n0\n0 1 2 3");
    assert_eq!(ended, Ended::Code(7));
}

#[test]
fn its_priority_is_below_the_one_of_who_starts_it() {
    let priority = |nice: i32| -> i32 {
        let (plan, mut output) = plan("cut -d ' ' -f 19 /proc/self/stat", Spaces::NONE);
        let spawned = spawn(Plan { nice, ..plan }).unwrap();
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        assert_eq!(spawned.status(true).unwrap().unwrap(), Ended::Code(0));
        text.trim().parse().unwrap()
    };
    let usual = priority(0);
    assert_eq!(priority(3), (usual + 3).min(19));
    assert_eq!(priority(19), 19);
}

#[test]
fn it_can_be_killed_and_says_by_what() {
    let (_, _, ended) = run("kill -9 $$", Spaces::NONE);
    assert_eq!(ended, Ended::Signal(9));
}

#[test]
fn what_cannot_be_executed_is_an_error() {
    let (mut wrong, _) = plan("", Spaces::NONE);
    wrong.program = "/nonexistent/program".into();
    assert_eq!(spawn(wrong).unwrap_err().kind(), io::ErrorKind::NotFound);
    let (mut wrong, _) = plan("", Spaces::NONE);
    wrong.program = "/etc/passwd".into();
    assert_eq!(spawn(wrong).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn namespaces_of_its_own_with_a_user_that_is_nobody_outside() {
    let (spawned, text, ended) = run(
        "for n in user mnt pid ipc uts; do readlink /proc/self/ns/$n; done; id -u; echo $$",
        Spaces::LOCAL,
    );
    assert_eq!(ended, Ended::Code(0));
    if spawned.spaces != Spaces::LOCAL {
        eprintln!("not here: {:?}", spawned.missing);
        return;
    }
    let lines: Vec<&str> = text.lines().collect();
    // `/proc` is the host's, so that what it shows of the pid namespace is that of the reader.
    for (name, inside) in ["user", "mnt", "pid", "ipc", "uts"].iter().zip(&lines) {
        let outside = std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        assert_ne!(outside.to_str().unwrap(), *inside, "{name}");
    }
    assert_eq!(lines[5..], ["0", "1"], "root and process 1 of its own world");
}

#[test]
fn root_gives_it_a_user_that_has_nothing() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(dir.path(), private).unwrap();
    std::fs::write(dir.path().join("secret"), "x").unwrap();
    let (_, text, _) = run(&format!("cat {}/secret || echo refused", dir.path().display()), Spaces::LOCAL);
    assert_eq!(text.trim(), "refused");
}

#[test]
fn a_fork_bomb_is_bounded() {
    let script = "n=0; while [ $n -lt 200 ]; do sleep 1000 & n=$((n + 1)); done 2>/dev/null; echo all";
    let (spawned, text, ended) = run(script, Spaces::LOCAL);
    if spawned.spaces.user {
        // The shell gives up when it cannot fork any more; with the first process of the namespace the others end.
        assert_ne!((text.trim(), ended), ("all", Ended::Code(0)));
    }
}

#[test]
fn it_sees_no_process_but_itself() {
    let (spawned, text, _) = run(&format!("kill -0 {} && echo seen", std::process::id()), Spaces::LOCAL);
    assert!(!spawned.spaces.pid || text.trim() != "seen");
}

#[test]
fn it_dies_with_the_thread_that_starts_processes_only() {
    // Started from a thread that ends; the process goes on.
    let (plan, mut output) = plan("sleep 0.2; echo alive", Spaces::LOCAL);
    let spawned = std::thread::spawn(|| spawn(plan).unwrap()).join().unwrap();
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(text.trim(), "alive");
    spawned.status(true).unwrap();
}

#[test]
fn without_the_network_there_is_no_interface_that_is_up() {
    let script = "cat /proc/self/net/dev 2>/dev/null | tail -n +3 | cut -d: -f1 | tr -d ' '; readlink /proc/self/ns/net";
    let (spawned, text, _) = run(script, Spaces { net: true, ..Spaces::LOCAL });
    if !spawned.spaces.net {
        assert!(spawned.missing.iter().any(|missing| missing.contains("net")), "{:?}", spawned.missing);
        return;
    }
    let outside = std::fs::read_link("/proc/self/ns/net").unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_ne!(lines.last().copied(), outside.to_str());
    assert!(lines[..lines.len() - 1].iter().all(|name| ["lo", "tunl0", "sit0"].contains(name)), "{text}");
}

#[test]
fn what_is_missing_is_one_line_with_the_reason() {
    let error = io::Error::from(io::ErrorKind::PermissionDenied);
    let text = without(Spaces { net: true, ..Spaces::LOCAL }, Spaces::NONE, &error);
    assert!(text.starts_with("own namespaces (user, mount, pid, ipc, uts, net): "), "{text}");
    assert!(text.contains("unprivileged_userns_clone") && !text.contains('\n'), "{text}");
}
