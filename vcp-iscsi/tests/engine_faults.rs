//! The engine against a target that misbehaves at chosen moments: what the device model hears of it, and what it must
//! never hear.
#![allow(unreachable_pub, dead_code)] // The support module is shared in style with the others.

use std::time::{Duration, Instant};

use iscsi::scsi::sense::asc;
use iscsi::scsi::{SenseKey, Status};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vcp_core::mem::GuestBuf;
use vcp_iscsi::engine::{Completion, Engine, Op, Outcome, Request};
use vcp_iscsi::portal::{IscsiEngine, Options};

#[path = "support/faulty_target.rs"]
mod faulty_target;
use faulty_target::{Fault, Faulty};

/// Nothing in here takes longer unless it is broken.
const DEADLINE: Duration = Duration::from_secs(20);

fn options(target: &Faulty) -> Options {
    let mut options = Options::new(target.url().parse().unwrap());
    options.timeouts.command = Duration::from_millis(300);
    options.timeouts.task_management = Duration::from_millis(300);
    options.timeouts.backoff_max = Duration::from_millis(200);
    options
}

struct Bench {
    target: Faulty,
    engine: IscsiEngine,
}

impl Bench {
    fn new() -> Self {
        let target = Faulty::start(2048);
        let engine = IscsiEngine::open(options(&target)).unwrap();
        Self { target, engine }
    }

    /// Polls until `check` holds, sleeping as a data thread does.
    fn until(
        &mut self,
        done: &mut Vec<Completion>,
        mut check: impl FnMut(&mut IscsiEngine, &[Completion]) -> bool,
    ) {
        let end = Instant::now() + DEADLINE;
        loop {
            let now = Instant::now();
            assert!(now < end, "nothing happens: {}", self.engine.status());
            let moved = self.engine.poll(now, done);
            if check(&mut self.engine, done) {
                return;
            }
            if moved {
                continue;
            }
            let wait = self.engine.wait();
            let limit = wait.deadline.unwrap_or(end).min(end).saturating_duration_since(now);
            let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
            let mut events = PollFlags::IN;
            if wait.writable {
                events |= PollFlags::OUT;
            }
            match wait.fd {
                Some(fd) => poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&limit)),
                None => poll(&mut [], Some(&limit)),
            }
            .unwrap();
        }
    }

    fn run(&mut self, op: Op, lba: u64, data: GuestBuf) -> Completion {
        let blocks = (data.len_bytes() / 512) as u32;
        self.engine.submit(Request { tag: 77, op, lba, blocks, data });
        let mut done = Vec::new();
        self.until(&mut done, |_, done| !done.is_empty());
        assert_eq!((done.len(), done[0].tag), (1, 77), "answered exactly once");
        done.remove(0)
    }

    fn write(&mut self, lba: u64, fill: u8, bytes: usize) -> Outcome {
        let data = GuestBuf::for_test(bytes);
        data.copy_from(0, &vec![fill; bytes]);
        self.run(Op::Write { fua: false }, lba, data).outcome
    }

    fn read(&mut self, lba: u64, bytes: usize) -> (Outcome, Vec<u8>) {
        let data = GuestBuf::for_test(bytes);
        data.copy_from(0, &vec![0xEE; bytes]);
        let completion = self.run(Op::Read, lba, data);
        let mut out = vec![0; bytes];
        completion.data.copy_to(0, &mut out);
        (completion.outcome, out)
    }
}

#[test]
fn whatever_repetition_cures_does_not_reach_the_guest() {
    let cures = [
        Fault::Status(Status::BUSY),
        Fault::Status(Status::TASK_SET_FULL),
        Fault::Status(Status::TASK_ABORTED),
        Fault::Sense(SenseKey::UnitAttention, asc::POWER_ON_OR_RESET),
        Fault::Sense(SenseKey::UnitAttention, asc::NEXUS_LOSS),
        Fault::Sense(SenseKey::UnitAttention, asc::CLEARED_BY_ISCSI_EVENT),
        Fault::Sense(SenseKey::UnitAttention, asc::LUNS_CHANGED),
        Fault::Sense(SenseKey::UnitAttention, 0xABCD),
        Fault::Sense(SenseKey::NotReady, asc::BECOMING_READY),
        Fault::Sense(SenseKey::NotReady, asc::ALUA_TRANSITION),
        Fault::Sense(SenseKey::AbortedCommand, asc::PROTOCOL_SERVICE_CRC),
        Fault::Half,
        Fault::TargetFailure,
        Fault::Hang,
        Fault::Close(false),
        Fault::Close(true),
    ];
    let mut bench = Bench::new();
    for (n, &fault) in cures.iter().enumerate() {
        let fill = n as u8 + 1;
        if fault != Fault::Half {
            // A write has no short form of the target machine's making.
            bench.target.fault(&[fault]);
        }
        assert_eq!(bench.write(8, fill, 16384), Outcome::Ok, "{fault:?}");
        assert!(
            bench.target.state.lock().unwrap().disk[4096..4096 + 16384].iter().all(|&b| b == fill),
            "{fault:?}"
        );
        if fault != Fault::TargetFailure {
            // With a read, the status comes in the Data-In, which has no response code.
            bench.target.fault(&[fault]);
        }
        let (outcome, data) = bench.read(8, 16384);
        assert_eq!(outcome, Outcome::Ok, "{fault:?}");
        assert!(data.iter().all(|&b| b == fill), "{fault:?}");
        assert!(bench.target.state.lock().unwrap().faults.is_empty(), "{fault:?} did not happen");
    }
    assert!(bench.target.state.lock().unwrap().aborts >= 2, "hung tasks were aborted");
    // Every session had the same name, so that each ended the one before.
    let isids = bench.target.state.lock().unwrap().isids.clone();
    assert!(isids.len() >= 5 && isids.iter().all(|isid| *isid == isids[0]), "{isids:?}");
    let stats = bench.engine.stats();
    assert_eq!((stats.failed, stats.sessions_lost, stats.sessions_regained), (0, 4, 4));
}

#[test]
fn what_repetition_does_not_cure_is_told_once_and_soon() {
    let mut bench = Bench::new();
    for fault in [
        Fault::Sense(SenseKey::MediumError, asc::UNRECOVERED_READ_ERROR),
        Fault::Sense(SenseKey::HardwareError, asc::INTERNAL_TARGET_FAILURE),
        Fault::Sense(SenseKey::DataProtect, asc::WRITE_PROTECTED),
        Fault::Sense(SenseKey::DataProtect, asc::SPACE_ALLOCATION_FAILED),
        Fault::Status(Status::RESERVATION_CONFLICT),
    ] {
        bench.target.fault(&[fault]);
        assert_eq!(bench.write(0, 1, 4096), Outcome::IoError, "{fault:?}");
    }
    // Always short: an error after a few attempts, never a success.
    bench.target.fault(&[Fault::Half; 16]);
    assert_eq!(bench.read(0, 4096).0, Outcome::IoError);
    bench.target.state.lock().unwrap().faults.clear();
    assert_eq!(bench.read(0, 4096).0, Outcome::Ok);
    let seen = bench.engine.stats().violations;
    assert!(seen.iter().any(|(words, n)| words.contains("bytes are missing") && *n >= 4), "{seen:?}");
}

#[test]
fn a_wrong_data_digest_is_repeated() {
    let target = Faulty::start(2048);
    let mut options = options(&target);
    options.data_digest = vcp_iscsi::portal::options::DigestChoice::Crc32c;
    options.header_digest = vcp_iscsi::portal::options::DigestChoice::Crc32c;
    let engine = IscsiEngine::open(options).unwrap();
    let mut bench = Bench { target, engine };
    assert_eq!(bench.write(0, 0x5A, 32768), Outcome::Ok);
    bench.target.fault(&[Fault::BadDigest]);
    let (outcome, data) = bench.read(0, 32768);
    assert_eq!(outcome, Outcome::Ok);
    assert!(data.iter().all(|&b| b == 0x5A));
    assert!(bench.engine.stats().violations.iter().any(|(words, _)| words.contains("data digest")));
    assert_eq!(bench.engine.stats().sessions_lost, 0);
}

#[test]
fn a_resized_unit_is_noticed() {
    let mut bench = Bench::new();
    assert_eq!(bench.engine.lun().blocks, 2048);
    bench.target.fault(&[Fault::Resize(4096)]);
    assert_eq!(bench.write(0, 1, 512), Outcome::Ok);
    assert!(bench.engine.take_change());
    assert!(!bench.engine.take_change());
    assert_eq!(bench.engine.lun().blocks, 4096);
    assert_eq!(bench.write(4095, 9, 512), Outcome::Ok);
    assert_eq!(bench.write(4096, 9, 512), Outcome::IoError, "behind the end");
}

#[test]
fn another_unit_at_the_same_address_is_not_touched() {
    let mut bench = Bench::new();
    assert_eq!(bench.write(0, 1, 512), Outcome::Ok);
    bench.target.state.lock().unwrap().serial = "FAULTY-2".into();
    bench.target.cut();
    let data = GuestBuf::for_test(512);
    data.copy_from(0, &[2; 512]);
    bench.engine.submit(Request { tag: 1, op: Op::Write { fua: false }, lba: 0, blocks: 1, data });
    let mut done = Vec::new();
    bench.until(&mut done, |engine, _| engine.stats().sessions_lost >= 3);
    assert!(done.is_empty());
    assert_eq!(bench.target.state.lock().unwrap().disk[0], 1);
    // When the right one is back, so is the request.
    bench.target.state.lock().unwrap().serial = "FAULTY-1".into();
    bench.until(&mut done, |_, done| !done.is_empty());
    assert_eq!(done[0].outcome, Outcome::Ok);
    assert_eq!(bench.target.state.lock().unwrap().disk[0], 2);
}

#[test]
fn requests_wait_while_the_target_is_away_unless_nobody_waits_for_them() {
    let mut bench = Bench::new();
    bench.target.state.lock().unwrap().refuse_logins = true;
    bench.target.cut();
    for tag in 0..10 {
        let data = GuestBuf::for_test(512);
        bench.engine.submit(Request { tag, op: Op::Read, lba: tag, blocks: 1, data });
    }
    let mut done = Vec::new();
    let logins = bench.target.state.lock().unwrap().isids.len();
    let state = std::sync::Arc::clone(&bench.target.state);
    bench.until(&mut done, |_, _| state.lock().unwrap().isids.len() >= logins + 3);
    assert!(done.is_empty());
    bench.engine.abandon();
    bench.until(&mut done, |_, done| done.len() == 10);
    assert!(done.iter().all(|c| c.outcome == Outcome::IoError));
    // Later requests are served when the target is back.
    state.lock().unwrap().refuse_logins = false;
    assert_eq!(bench.read(0, 512).0, Outcome::Ok);
}

#[test]
fn requests_fail_while_the_target_is_away_for_longer_than_is_waited_for() {
    let target = Faulty::start(2048);
    let mut options = options(&target);
    let limit = Duration::from_millis(400);
    options.timeouts.give_up = Some(limit);
    let engine = IscsiEngine::open(options).unwrap();
    let mut bench = Bench { target, engine };
    let state = std::sync::Arc::clone(&bench.target.state);
    state.lock().unwrap().refuse_logins = true;
    bench.target.cut();
    let start = Instant::now();
    assert_eq!(bench.read(0, 512).0, Outcome::IoError);
    assert!(start.elapsed() >= limit);
    // The time counts from the loss, not from the request.
    let start = Instant::now();
    assert_eq!(bench.read(0, 512).0, Outcome::IoError);
    assert!(start.elapsed() < limit);
    state.lock().unwrap().refuse_logins = false;
    bench.until(&mut Vec::new(), |engine, _| engine.status()["state"] == "up");
    assert_eq!(bench.read(0, 512).0, Outcome::Ok);
}

#[test]
fn without_fua_a_forced_write_is_followed_by_a_flush() {
    let target = Faulty::start(2048);
    target.state.lock().unwrap().fua = false;
    let engine = IscsiEngine::open(options(&target)).unwrap();
    assert!(engine.lun().write_cache && !engine.lun().fua);
    let mut bench = Bench { target, engine };
    let data = GuestBuf::for_test(4096);
    assert_eq!(bench.run(Op::Write { fua: true }, 0, data).outcome, Outcome::Ok);
    assert_eq!(bench.target.state.lock().unwrap().flushes, 1);
    assert_eq!(bench.run(Op::Flush, 0, GuestBuf::new()).outcome, Outcome::Ok);
    assert_eq!(bench.target.state.lock().unwrap().flushes, 2);
}

#[test]
fn a_success_for_data_that_was_not_sent_yet_is_none() {
    const BYTES: usize = 256 << 10;
    let target = Faulty::start(32 * 512);
    // A forced write becomes a flush when it succeeds, and gives its data up.
    target.state.lock().unwrap().fua = false;
    let engine = IscsiEngine::open(options(&target)).unwrap();
    let mut bench = Bench { target, engine };
    // More than sockets hold.
    bench.target.fault(&[Fault::Early; 32]);
    for tag in 0..32 {
        let data = GuestBuf::for_test(BYTES);
        let (op, blocks) = (Op::Write { fua: true }, (BYTES / 512) as u32);
        bench.engine.submit(Request { tag, op, lba: tag * u64::from(blocks), blocks, data });
    }
    let mut done = Vec::new();
    bench.until(&mut done, |_, done| done.len() == 32);
    assert!(done.iter().all(|c| c.outcome == Outcome::Ok));
    let seen = bench.engine.stats().violations;
    assert!(seen.iter().any(|(words, _)| words.contains("not all data was fetched")), "{seen:?}");
    assert_eq!(bench.engine.stats().sessions_lost, 1, "it read nothing any more");
}

#[test]
fn another_portal_group_is_reset_before_anything_is_repeated() {
    let mut bench = Bench::new();
    assert_eq!(bench.write(0, 1, 512), Outcome::Ok);
    // Nothing underway: nothing to reset.
    bench.target.state.lock().unwrap().group = 2;
    bench.target.cut();
    bench.until(&mut Vec::new(), |engine, _| engine.stats().sessions_regained == 1);
    assert_eq!(bench.write(0, 2, 512), Outcome::Ok);
    // The same group ended the old session with the login.
    bench.target.fault(&[Fault::Close(false)]);
    assert_eq!(bench.write(0, 3, 512), Outcome::Ok);
    assert_eq!(bench.target.state.lock().unwrap().resets, 0);

    // Another one, with a write in doubt; it cannot be sure of it at first.
    let state = std::sync::Arc::clone(&bench.target.state);
    let resets_and_byte = || {
        let state = state.lock().unwrap();
        (state.resets, state.disk[0])
    };
    state.lock().unwrap().group = 3;
    state.lock().unwrap().refuse_resets = true;
    bench.target.fault(&[Fault::Close(false)]);
    let data = GuestBuf::for_test(512);
    data.copy_from(0, &[4; 512]);
    bench.engine.submit(Request { tag: 1, op: Op::Write { fua: false }, lba: 0, blocks: 1, data });
    let mut done = Vec::new();
    let lost = bench.engine.stats().sessions_lost;
    bench.until(&mut done, |engine, _| engine.stats().sessions_lost >= lost + 3);
    assert!(done.is_empty());
    assert_eq!(resets_and_byte(), (0, 3));
    state.lock().unwrap().refuse_resets = false;
    bench.until(&mut done, |_, done| !done.is_empty());
    assert_eq!(done[0].outcome, Outcome::Ok);
    assert_eq!(resets_and_byte(), (1, 4));
    assert_eq!(bench.read(0, 512).0, Outcome::Ok);
    assert_eq!(state.lock().unwrap().resets, 1);
}

#[test]
fn an_engine_that_knows_its_unit_starts_without_a_session() {
    let bench = Bench::new();
    let (found, lun) = (bench.engine.found().clone(), bench.engine.lun().clone());
    let options = std::sync::Arc::new(options(&bench.target));
    let now = Instant::now();
    let engine = IscsiEngine::detached(options, iscsi::scsi::Lun::ZERO, found, now);
    assert!(!engine.is_connected() && *engine.lun() == lun);
    // Takes the session of the same name over.
    let mut bench = Bench { target: bench.target, engine };
    assert_eq!(bench.write(0, 7, 512), Outcome::Ok);
    assert!(bench.engine.is_connected());
    let isids = bench.target.state.lock().unwrap().isids.clone();
    assert_eq!((isids.len(), &isids[0]), (2, &isids[1]));
}

#[test]
fn closing_takes_no_longer_than_allowed() {
    let mut bench = Bench::new();
    let start = Instant::now();
    bench.engine.close(Duration::from_secs(5));
    assert!(start.elapsed() < Duration::from_secs(3), "an idle session ends at once");

    let mut bench = Bench::new();
    bench.target.fault(&[Fault::Hang]);
    bench.engine.submit(Request { tag: 1, op: Op::Read, lba: 0, blocks: 1, data: GuestBuf::for_test(512) });
    let mut done = Vec::new();
    let state = std::sync::Arc::clone(&bench.target.state);
    bench.until(&mut done, |_, _| state.lock().unwrap().faults.is_empty());
    let start = Instant::now();
    bench.engine.close(Duration::from_millis(200));
    assert!(start.elapsed() < Duration::from_secs(2));
}
