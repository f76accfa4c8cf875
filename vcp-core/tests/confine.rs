//! A test per restriction: a child process confines itself, then tries to get out.
#![allow(unsafe_code)] // Attacks: what they call has no safe wrapper, and must not succeed.

use std::io::{ErrorKind, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};
use std::sync::Arc;
use std::time::Duration;

use vcp_core::process::confine::{Confinement, Mode};
use vcp_core::uring::{self, IoMode, Ring};

/// Names the case in the child's environment, and the directory that it may use.
const CASE: &str = "VCP_CONFINE_CASE";
const DIR: &str = "VCP_CONFINE_DIR";
/// The child did what it was to do.
const HELD: i32 = 77;

/// Runs one case of [`child`] in a process of its own.
fn run(case: &str, dir: &Path) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(CASE, case)
        .env(DIR, dir)
        .output()
        .unwrap()
}

fn status(case: &str) -> (ExitStatus, String) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("outside"), "secret").unwrap();
    for part in ["read", "write", "remove"] {
        std::fs::create_dir(dir.path().join(part)).unwrap();
        std::fs::write(dir.path().join(part).join("file"), part).unwrap();
    }
    let output = run(case, dir.path());
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status, text)
}

/// The case ran to its end and found everything as it should be.
#[track_caller]
fn held(case: &str) {
    let (status, text) = status(case);
    assert_eq!(status.code(), Some(HELD), "{case}: {status}: {text}");
}

/// The attempt ended the process.
#[track_caller]
fn killed(case: &str) {
    let (status, text) = status(case);
    assert_eq!(status.signal(), Some(libc::SIGSYS), "{case}: {status}: {text}");
}

/// As [`refused`], where the file is not there at all in the process's own root directory.
fn no_file<T>(what: &str, result: std::io::Result<T>) {
    match result {
        Ok(_) => panic!("{what}: worked"),
        Err(error) => assert!(
            matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::NotFound),
            "{what}: {error}"
        ),
    }
}

fn refused<T>(what: &str, result: std::io::Result<T>) {
    match result {
        Ok(_) => panic!("{what}: worked"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{what}: {error}"),
    }
}

/// Not a test of its own: the confined process of the others.
#[test]
fn child() {
    let Ok(case) = std::env::var(CASE) else { return };
    let dir = PathBuf::from(std::env::var_os(DIR).unwrap());
    // Before: what a VCP opens first.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // As `--io plain` and `--io auto` do.
    let plain = case != "a ring";
    let ring = uring::choose(if plain { IoMode::Plain } else { IoMode::Auto }).unwrap();
    // Of a library, say, that made one for itself.
    let left_over = uring::choose(if case == "no ring" { IoMode::Auto } else { IoMode::Plain }).unwrap();
    // One that was given to it.
    let given = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let _peer = listener.accept().unwrap();
    let confinement = Confinement {
        read: match &*case {
            // As a path and what it leads to may be the same, and files lie in directories.
            "named twice" => {
                ["read/file", "read/file", "write/file", "read"].map(|path| dir.join(path)).into()
            }
            _ => vec![dir.join("read"), dir.join("not there")],
        },
        write: vec![dir.join("write")],
        remove: vec![dir.join("remove")],
        max_fds: 64,
        local_sockets: false,
        listens: false,
        network: case != "no network",
        max_private_bytes: 256 << 20,
    };
    let report = confinement.apply_with(Mode::Require, ring.is_some()).unwrap();
    assert_eq!(report.summary(), "yes", "{report:?}");
    for part in ["own mount, IPC and UTS namespaces", "a root directory with nothing but what it needs"] {
        assert!(report.done.contains(&part), "{report:?}");
    }
    match (case.as_str(), ring) {
        ("no ring", _) => without_ring(left_over),
        ("named twice", _) => {
            for part in ["read", "write"] {
                assert_eq!(std::fs::read_to_string(dir.join(part).join("file")).unwrap(), part);
            }
        }
        // Nothing to show where the kernel has none.
        ("a ring", ring) => ring.into_iter().for_each(with_ring),
        _ => attempt(&case, &dir, &listener, given),
    }
    std::process::exit(HELD);
}

/// Calls one of the system calls of io_uring with arguments that no kernel takes; what came of it.
fn call(number: libc::c_long) -> std::io::Result<()> {
    // SAFETY: no memory is involved: the descriptor is none, and all pointers are null.
    let result = unsafe { libc::syscall(number, -1, 0, 0, 0, 0, 0) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// With `--io plain`: no ring can be made, and one that is there after all cannot be used.
fn without_ring(left_over: Option<Ring>) {
    refused("make a ring", call(libc::SYS_io_uring_setup));
    refused("enter a ring", call(libc::SYS_io_uring_enter));
    refused("change a ring", call(libc::SYS_io_uring_register));
    if let Some(mut ring) = left_over {
        refused("start a ring", ring.enable());
    }
    assert!(matches!(uring::choose(IoMode::Auto), Ok(None)), "falls back to plain calls");
}

/// With a ring that was made before: it works, and no other can be made.
fn with_ring(mut ring: Ring) {
    ring.enable().unwrap();
    let event = Arc::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap());
    ring.watch(&event);
    ring.signal(&event);
    ring.wait(Some(Duration::from_secs(10))).unwrap();
    let mut count = [0; 8];
    rustix::io::read(&event, &mut count).unwrap();
    assert_eq!((u64::from_ne_bytes(count), ring.counts().failed_signals), (1, 0));
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"data").unwrap();
    let ours = Arc::new(ours.into());
    let received = ring.recv(&ours, vec![0; 8].into());
    ring.wait(Some(Duration::from_secs(10))).unwrap();
    assert!(ring.take_recv(received).is_some_and(|(_, result)| matches!(result, Ok(4))));
    refused("make another", call(libc::SYS_io_uring_setup));
    assert!(uring::choose(IoMode::Uring).is_err(), "another ring");
}

fn attempt(case: &str, dir: &Path, listener: &TcpListener, mut given: TcpStream) {
    let inside = |part: &str| dir.join(part).join("file");
    match case {
        "keeps what it needs" => {
            // Read from the kernel at its first use, which is when a front end brings an in-flight log.
            assert_ne!(rustix::param::page_size(), 0);
            assert_eq!(std::fs::read_to_string(inside("read")).unwrap(), "read");
            std::fs::write(inside("write"), "new").unwrap();
            std::fs::rename(inside("write"), dir.join("write/other")).unwrap();
            std::fs::remove_file(dir.join("write/other")).unwrap();
            std::fs::remove_file(inside("remove")).unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            server.write_all(b"x").unwrap();
            drop(client);
            drop(UnixStream::pair().unwrap());
            assert_eq!(std::thread::spawn(|| 5).join().unwrap(), 5);
        }
        "files" => {
            no_file("a file outside", std::fs::read(dir.join("outside")));
            no_file("the password file", std::fs::read("/etc/passwd"));
            no_file("its own environment", std::fs::read("/proc/self/environ"));
            no_file("a device", std::fs::File::open("/dev/kvm"));
            for gone in ["/usr", "/proc/self", "/dev/null", "/root"] {
                assert!(std::fs::metadata(gone).is_err(), "{gone} is there");
            }
            refused("write where it may read", std::fs::write(inside("read"), "x"));
            refused("make a file where it may remove", std::fs::write(dir.join("remove/new"), "x"));
            refused("remove where it may read", std::fs::remove_file(inside("read")));
            // Refused by whoever is asked first: it would also leave a mount.
            assert!(std::fs::rename(inside("write"), dir.join("gone")).is_err());
            refused("make a directory", std::fs::create_dir(dir.join("write/dir")));
            refused("make a link", std::os::unix::fs::symlink("/etc/shadow", dir.join("write/link")));
        }
        "sockets" => {
            refused("listen on a port", TcpListener::bind("127.0.0.1:0"));
            refused("listen on a path", UnixListener::bind(dir.join("write/socket")));
            refused("connect to a path", UnixStream::connect(dir.join("write/socket")));
            // SAFETY: no memory is involved.
            let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
            refused("a packet socket", if raw < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) });
            // SAFETY: no memory is involved.
            let raw = unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP) };
            refused("a raw socket", if raw < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) });
            // What a resolver does.
            UdpSocket::bind("127.0.0.1:0").unwrap();
        }
        "no network" => {
            let address = listener.local_addr().unwrap();
            refused("a connection", TcpStream::connect(address));
            refused("a datagram socket", UdpSocket::bind("127.0.0.1:0"));
            refused("listen on a port", TcpListener::bind("127.0.0.1:0"));
            refused("connect to a path", UnixStream::connect(dir.join("write/socket")));
            // SAFETY: no memory is involved.
            let raw = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, 0) };
            refused("a netlink socket", if raw < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) });
            // What it was given works, and leads nowhere else: not after it was disconnected, not with data ahead.
            given.write_all(b"x").unwrap();
            use std::os::fd::AsRawFd;
            let (fd, any) =
                (given.as_raw_fd(), libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] });
            let len = size_of::<libc::sockaddr>() as u32;
            // SAFETY: the address is valid for its length.
            let result = unsafe { libc::connect(fd, &raw const any, len) };
            let refusal = std::io::Error::last_os_error();
            refused("disconnect", if result < 0 { Err(refusal) } else { Ok(()) });
            // SAFETY: a byte of a constant, and the address above.
            let sent =
                unsafe { libc::sendto(fd, b"x".as_ptr().cast(), 1, libc::MSG_FASTOPEN, &raw const any, len) };
            let refusal = std::io::Error::last_os_error();
            refused("connect by sending", if sent < 0 { Err(refusal) } else { Ok(()) });
            drop(UnixStream::pair().unwrap());
        }
        "descriptors" => {
            let mut kept = Vec::new();
            let error = loop {
                match listener.try_clone() {
                    Ok(fd) => kept.push(fd),
                    Err(error) => break error,
                }
            };
            assert_eq!(error.raw_os_error(), Some(libc::EMFILE));
            assert!(kept.len() < 64);
        }
        "memory" => {
            let mut much: Vec<u8> = Vec::new();
            assert!(much.try_reserve_exact(512 << 20).is_err(), "more than the limit");
            much.try_reserve_exact(16 << 20).unwrap();
        }
        "file size" => {
            let file = std::fs::File::create(dir.join("write/large")).unwrap();
            // SAFETY: the disposition of a signal, before the call that would raise it.
            unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
            assert_eq!(file.set_len(1 << 30).unwrap_err().raw_os_error(), Some(libc::EFBIG));
        }
        "limits stay" => {
            for resource in [libc::RLIMIT_NOFILE, libc::RLIMIT_DATA, libc::RLIMIT_CORE] {
                let more = libc::rlimit { rlim_cur: 1 << 30, rlim_max: 1 << 30 };
                // SAFETY: `more` is a valid structure for the call.
                let result = unsafe { libc::setrlimit(resource, &raw const more) };
                let refusal = std::io::Error::last_os_error();
                refused("raise a limit", if result < 0 { Err(refusal) } else { Ok(()) });
            }
        }
        "code" => {
            // SAFETY: a new mapping, which is never used.
            let page = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    4096,
                    libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
            let refusal = std::io::Error::last_os_error();
            refused("executable memory", if page == libc::MAP_FAILED { Err(refusal) } else { Ok(()) });
        }
        "processes" => refused("a process", Command::new("/bin/true").spawn()),
        "signals" => {
            // SAFETY: no memory is involved; signal 0 only asks whether it could be sent.
            let result = unsafe { libc::kill(libc::getppid(), 0) };
            let refusal = std::io::Error::last_os_error();
            refused("a signal to another process", if result < 0 { Err(refusal) } else { Ok(()) });
        }
        "debug" => {
            // SAFETY: no memory is involved.
            let result = unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1) };
            let refusal = std::io::Error::last_os_error();
            refused("be traceable again", if result < 0 { Err(refusal) } else { Ok(()) });
        }
        "exec" => panic!("{}", Command::new("/bin/true").exec()),
        "ptrace" => {
            // SAFETY: the pointers are null, which this request allows.
            unsafe { libc::ptrace(libc::PTRACE_ATTACH, libc::getppid(), 0, 0) };
        }
        "memory of others" => {
            let mut byte = 0_u8;
            let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
            let remote = libc::iovec { iov_base: 0x1000 as *mut _, iov_len: 1 };
            // SAFETY: `local` covers one byte of this frame.
            unsafe { libc::process_vm_readv(libc::getppid(), &raw const local, 1, &raw const remote, 1, 0) };
        }
        "mount" => {
            // SAFETY: both strings are terminated.
            unsafe { libc::umount2(c"/".as_ptr(), libc::MNT_DETACH) };
        }
        "namespace" => {
            // SAFETY: a user namespace changes no memory.
            unsafe { libc::unshare(libc::CLONE_NEWUSER) };
        }
        case => panic!("no case {case}"),
    }
}

#[test]
fn it_keeps_what_it_needs() {
    held("keeps what it needs");
}

/// `/etc/resolv.conf` of the host was once left empty by this.
#[test]
fn a_file_that_is_named_twice_keeps_what_is_in_it() {
    held("named twice");
}

#[test]
fn no_files_but_those_it_was_given() {
    held("files");
}

#[test]
fn no_sockets_but_to_targets() {
    held("sockets");
}

#[test]
fn no_network_but_what_it_was_given() {
    held("no network");
}

#[test]
fn descriptors_are_bounded() {
    held("descriptors");
}

#[test]
fn memory_is_bounded() {
    held("memory");
}

#[test]
fn files_are_bounded() {
    held("file size");
}

#[test]
fn limits_cannot_be_raised() {
    held("limits stay");
}

#[test]
fn no_new_code() {
    held("code");
}

#[test]
fn no_processes() {
    held("processes");
}

#[test]
fn no_signals_to_others() {
    held("signals");
}

#[test]
fn not_traceable_again() {
    held("debug");
}

#[test]
fn without_a_ring_there_is_no_io_uring() {
    held("no ring");
}

#[test]
fn with_a_ring_there_is_that_one() {
    held("a ring");
}

#[test]
fn what_only_an_attacker_does_ends_the_process() {
    for case in ["exec", "ptrace", "memory of others", "mount", "namespace"] {
        killed(case);
    }
}
