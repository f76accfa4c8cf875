//! The system calls that a confined `vcp-iscsi` makes, by io_uring and without: all that it does works with what its seccomp
//! list has, and it holds a ring only where it is to use one. (`vcp-core/tests/confine.rs` shows that a ring is not to be had
//! otherwise.)

use std::fs;
use std::time::Duration;

use anyhow::{Context, ensure};
use vcp_tests::backend::Backend;
use vcp_tests::front::Driver;
use vcp_tests::load::Load;
use vcp_tests::proc::Stream;
use vcp_tests::proxy::Proxy;
use vcp_tests::target::{self, Kind, Spec, Target};
use vcp_tests::{Result, pattern};

const DEADLINE: Duration = Duration::from_secs(30);
const LONG: usize = 128 << 10;

/// Descriptors of io_uring instances that a process has.
fn rings(pid: u32) -> Result<usize> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).context("descriptors of the backend")?;
    // One that is closed meanwhile is no ring.
    let links = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
    Ok(links.filter(|link| link.to_string_lossy().contains("[io_uring]")).count())
}

/// Short and long requests, flushes, a connection that is cut and made anew, and an end. Returns what it says it uses.
fn works(io: &str) -> Result<String> {
    let target = Target::start(Kind::Ours, &Spec::disk(16 << 20))?;
    let proxy = Proxy::start(target.portal())?;
    let url = target.url_at(proxy.addr(), 0);
    let backend = Backend::vcp_iscsi(&url, &["--io", io, "--confine", "require"])?;
    let ready = backend.proc().stream(Stream::Out);
    let told = |name: &str| {
        let word = ready.split_whitespace().find_map(|word| word.strip_prefix(name));
        word.map(str::to_owned).with_context(|| format!("no {name} in: {ready}"))
    };
    let uses = told("io=")?;
    ensure!(told("confined=")? == "yes", "not confined: {ready}");
    let pid = backend.proc().pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    ensure!(status.lines().any(|line| line.split_whitespace().eq(["Seccomp:", "2"])), "no filter: {status}");
    ensure!(rings(pid)? == usize::from(uses == "uring"), "--io {io} has {} rings", rings(pid)?);

    let mut driver = Driver::connect(backend.socket(), 1)?;
    let mut load = Load::new(9, 512);
    load.run(&mut driver, 0, 16, 300, |_| Ok(()))?;
    proxy.cut_now(true);
    load.run(&mut driver, 0, 16, 300, |_| Ok(())).context("after a cut")?;
    driver.flush()?;
    load.verify_all(&mut driver)?;
    let (at, data) = (8 << 20, pattern::make(5, 8 << 20, LONG));
    driver.write(at, &data)?;
    ensure!(driver.read(at, LONG)? == data, "a long request");
    let (status, took) = backend.proc().terminate(DEADLINE)?;
    ensure!(status.success(), "ended with {status} after {took:?}: {}", backend.proc().tail());
    Ok(uses)
}

#[test]
fn all_works_with_plain_calls_in_confinement() -> Result<()> {
    if target::have(Kind::Ours) {
        ensure!(works("plain")? == "plain", "not as asked for");
    }
    Ok(())
}

#[test]
fn all_works_by_io_uring_in_confinement() -> Result<()> {
    if !target::have(Kind::Ours) {
        return Ok(());
    }
    if works("auto")? == "plain" {
        println!("this kernel has no io_uring for us");
        return Ok(());
    }
    ensure!(works("uring")? == "uring", "not as asked for");
    Ok(())
}
