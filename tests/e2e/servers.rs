//! The poll server and the epoll server are the same device: one trace of requests, the same answers.

use anyhow::ensure;
use vcp_tests::backend::Backend;
use vcp_tests::front::{Driver, Op};
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{Result, pattern};

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
