//! The poll server and the epoll server are the same device: one trace of requests, the same answers.

use anyhow::ensure;
use rustix::process::Signal;
use vcp_tests::backend::Backend;
use vcp_tests::front::{Driver, Op};
use vcp_tests::load::Load;
use vcp_tests::proc::Stream;
use vcp_tests::target::{Kind, LunSpec, Spec, Target};
use vcp_tests::{Result, pattern};

use crate::support::{COMMAND, vcp_iscsi};

const SIZE: u64 = 8 << 20;

/// Requests of every kind, right and wrong, from a seed.
fn trace(seed: u64) -> Vec<Op> {
    let mut state = seed;
    let mut next = move |below: u64| {
        // Knuth's MMIX generator; its high bits are the good ones.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut ops = Vec::new();
    for n in 0..400 {
        // Some of them reach beyond the end.
        let offset = next(SIZE / 512 + 16) * 512;
        let len = (next(128) + 1) * 512;
        ops.push(match next(10) {
            0..4 => Op::Write { offset, data: pattern::make(n, offset, len as usize) },
            4..7 => Op::Read { offset, len: len as usize },
            7 => Op::Flush,
            8 => Op::Discard { offset, len },
            _ => Op::WriteZeroes { offset, len, unmap: next(2) == 1 },
        });
    }
    ops
}

struct Run {
    features: u64,
    config: vcp_tests::front::Config,
    answers: Vec<std::result::Result<Vec<u8>, vcp_tests::front::Failure>>,
    image: Vec<u8>,
}

fn run(server: &str, ops: &[Op]) -> Result<Run> {
    let target = Target::start(Kind::Ours, &Spec::disk(SIZE))?;
    let backend = Backend::vcp_iscsi(&target.url(0), &["--server", server, "--queues", "2"])?;
    let mut driver = Driver::connect(backend.socket(), 2)?;
    let mut answers = Vec::new();
    for (n, op) in ops.iter().enumerate() {
        driver.set_pieces(1 + n % 5);
        answers.push(driver.request(n % 2, op)?);
    }
    driver.flush()?;
    let image = std::fs::read(&target.luns()[0].image)?;
    Ok(Run { features: driver.features(), config: driver.config()?, answers, image })
}

#[test]
fn poll_and_epoll_servers_answer_a_trace_alike() -> Result<()> {
    let ops = trace(42);
    let poll = run("poll", &ops)?;
    let epoll = run("epoll", &ops)?;
    assert_eq!(poll.features, epoll.features, "features");
    assert_eq!(poll.config, epoll.config, "configuration");
    for (n, op) in ops.iter().enumerate() {
        ensure!(poll.answers[n] == epoll.answers[n], "request {n} was answered differently: {op:?}");
    }
    let failed = poll.answers.iter().filter(|a| a.is_err()).count();
    ensure!(failed > 0 && failed < 100, "{failed} of {} requests failed", ops.len());
    ensure!(poll.image == epoll.image, "the disks differ");
    Ok(())
}

/// One process with two devices on one data thread; either of SIGTERM and SIGINT ends it.
#[test]
fn several_disks_in_one_vcp_do_not_mix() -> Result<()> {
    for (server, signal) in [("poll", Signal::INT), ("epoll", Signal::TERM)] {
        let target = Target::start(Kind::Ours, &Spec::luns([LunSpec::new(SIZE), LunSpec::new(2 * SIZE)]))?;
        let dir = tempfile::tempdir()?;
        let sockets = [dir.path().join("a.sock"), dir.path().join("b.sock")];
        let disk = |n: usize| format!("socket={},url={}", sockets[n].display(), target.url(n));
        let proc =
            vcp_iscsi(["serve", "--server", server, "--disk", &disk(0), "--disk", &disk(1)])?.spawn()?;
        proc.wait_line(Stream::Out, "ready:", COMMAND)?;
        let mut drivers = [Driver::connect(&sockets[0], 1)?, Driver::connect(&sockets[1], 1)?];
        for (n, driver) in drivers.iter_mut().enumerate() {
            assert_eq!(driver.config()?.size_bytes, SIZE * (n as u64 + 1));
            driver.write(0, &pattern::make(n as u64, 0, 65536))?;
        }
        let mut loads = [Load::new(1, 512), Load::new(2, 512)];
        for _ in 0..3 {
            // Each fills its queue before either waits.
            for n in 0..2 {
                loads[n].fill(&mut drivers[n], 0, 16)?;
            }
            for n in 0..2 {
                loads[n].run(&mut drivers[n], 0, 16, 100, |_| Ok(()))?;
            }
        }
        for n in 0..2 {
            loads[n].verify_all(&mut drivers[n])?;
        }
        proc.signal(signal)?;
        let status = proc.wait(COMMAND)?;
        ensure!(status.code() == Some(0), "{server}: {status} after {signal:?}");
    }
    Ok(())
}
