//! A process confines a thread as the monitor does, and tries what it must not.
#![allow(unsafe_code)] // Attacks: what they call has no safe wrapper, and must not succeed.

use std::io::ErrorKind;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};

use super::*;

const CASE: &str = "VCP_MONITOR_CASE";
const HELD: i32 = 77;

fn run(case: &str) -> (ExitStatus, String) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "confine::tests::child", "--nocapture", "--test-threads=1"])
        .env(CASE, case)
        .output()
        .unwrap();
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[track_caller]
fn held(case: &str) {
    let (status, text) = run(case);
    assert_eq!(status.code(), Some(HELD), "{case}: {status}: {text}");
}

#[track_caller]
fn killed(case: &str) {
    let (status, text) = run(case);
    assert_eq!(status.signal(), Some(libc::SIGSYS), "{case}: {status}: {text}");
}

fn refused<T>(what: &str, result: std::io::Result<T>) {
    match result {
        Ok(_) => panic!("{what}: worked"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{what}: {error}"),
    }
}

/// Not a test of its own.
#[test]
fn child() {
    let Ok(case) = std::env::var(CASE) else { return };
    let kind = match case.split(' ').next() {
        Some("vcpu") => Kind::Vcpu,
        Some("keeper") => Kind::Keeper,
        Some("attach") => Kind::Attach,
        Some("api") => Kind::Api,
        _ => Kind::Main,
    };
    let kvm = std::fs::File::open("/dev/kvm").ok();
    thread(kind);
    match &*case {
        "vcpu" => {
            refused("a file", std::fs::read("/etc/hostname"));
            refused("a socket", std::os::unix::net::UnixStream::connect("/nonexistent"));
            refused("a network socket", std::net::UdpSocket::bind("127.0.0.1:0"));
            refused("a thread", std::thread::Builder::new().spawn(|| {}));
            // What it needs.
            let memory = vec![1u8; 8 << 20];
            assert_eq!(memory.iter().map(|b| u64::from(*b)).sum::<u64>(), 8 << 20);
            println!("console");
            if let Some(kvm) = kvm {
                use std::os::fd::AsRawFd;
                // SAFETY: KVM_GET_API_VERSION takes no pointer.
                assert_eq!(unsafe { libc::ioctl(kvm.as_raw_fd(), 0xae00, 0) }, 12);
                // SAFETY: FS_IOC_GETFLAGS with a pointer to a long on this stack.
                let other = unsafe { libc::ioctl(kvm.as_raw_fd(), 0x8008_6601, &mut 0i64) };
                let error = std::io::Error::last_os_error();
                refused("another ioctl", if other < 0 { Err(error) } else { Ok(()) });
            }
        }
        "main" => {
            refused("a network socket", std::net::UdpSocket::bind("127.0.0.1:0"));
            // SAFETY: a signal to nobody in particular, which must be refused.
            let sent = unsafe { libc::kill(1, 0) };
            let error = std::io::Error::last_os_error();
            refused("a signal", if sent < 0 { Err(error) } else { Ok(()) });
            // A thread of its own, narrower still.
            let narrower = std::thread::spawn(|| {
                thread(Kind::Vcpu);
                std::fs::read("/etc/hostname").unwrap_err().kind()
            });
            assert_eq!(narrower.join().unwrap(), ErrorKind::PermissionDenied);
            assert!(std::fs::read_dir("/").is_ok());
        }
        "keeper" | "attach" | "api" => {
            refused("a network socket", std::net::UdpSocket::bind("127.0.0.1:0"));
            assert_eq!(std::thread::spawn(|| 5).join().unwrap(), 5);
            if case == "attach" {
                refused("a file", std::fs::read("/etc/hostname"));
            }
        }
        _ if case.ends_with("exec") => panic!("{}", Command::new("/bin/true").exec()),
        _ if case.ends_with("code") => {
            // SAFETY: a new mapping, which is never used.
            let page = unsafe {
                let (protection, flags) =
                    (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0)
            };
            let error = std::io::Error::last_os_error();
            refused("executable memory", if page == libc::MAP_FAILED { Err(error) } else { Ok(()) });
        }
        _ if case.ends_with("ptrace") => {
            // SAFETY: the pointers are null, which this request allows.
            unsafe { libc::ptrace(libc::PTRACE_ATTACH, libc::getppid(), 0, 0) };
        }
        _ if case.ends_with("memory") => {
            let mut byte = 0_u8;
            let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
            let remote = libc::iovec { iov_base: 0x1000 as *mut _, iov_len: 1 };
            // SAFETY: `local` covers one byte of this frame.
            unsafe { libc::process_vm_readv(libc::getppid(), &raw const local, 1, &raw const remote, 1, 0) };
        }
        other => panic!("no case {other}"),
    }
    std::process::exit(HELD);
}

#[test]
fn each_kind_has_what_it_needs_and_no_more() {
    for kind in ["vcpu", "main", "keeper", "attach", "api"] {
        held(kind);
        held(&format!("{kind} code"));
    }
}

#[test]
fn what_only_an_attacker_does_ends_the_monitor() {
    for kind in ["vcpu", "main", "keeper", "attach", "api"] {
        for attack in ["exec", "ptrace", "memory"] {
            killed(&format!("{kind} {attack}"));
        }
    }
}
