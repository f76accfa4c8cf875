//! The device model against an engine in memory, without rings: chains are made directly.

use std::collections::VecDeque;
use std::time::Instant;

use vcp_core::device::{RingDevice, Rings};
use vcp_core::mem::GuestBuf;
use vcp_core::queue::{Chain, ChainId, RingError};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use super::BlkDevice;
use crate::blk::config::bit;
use crate::engine;
use crate::engine::{Lun, Op};

#[path = "../../tests/support/mem_engine.rs"]
#[allow(dead_code, unreachable_pub)] // Shared with the integration tests.
mod mem_engine;

use mem_engine::{MemEngine, lun};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

#[derive(Debug, PartialEq, Eq)]
enum End {
    Used(u32),
    Failed(RingError),
}

/// One queue of chains made by hand.
#[derive(Default)]
struct Hand {
    waiting: VecDeque<(u16, GuestBuf, GuestBuf)>,
    ended: Vec<(u16, End)>,
    /// The ring is gone; what was taken from it comes back all the same.
    gone: bool,
}

impl Rings for Hand {
    fn take(&mut self, queue: u16, chain: &mut Chain) -> bool {
        if queue != 0 {
            return false;
        }
        let Some((head, readable, writable)) = self.waiting.pop_front() else { return false };
        chain.id = ChainId { queue, head, epoch: 0 };
        (chain.readable, chain.writable) = (readable, writable);
        true
    }

    fn available(&self, queue: u16) -> u16 {
        if queue == 0 { self.waiting.len() as u16 } else { 0 }
    }

    fn complete(&mut self, id: ChainId, len_bytes: u32) {
        self.ended.push((id.head, End::Used(len_bytes)));
    }

    fn wanted(&self, _id: ChainId) -> bool {
        !self.gone
    }

    fn fail(&mut self, id: ChainId, error: RingError) {
        self.ended.push((id.head, End::Failed(error)));
    }
}

struct Bed {
    device: BlkDevice<MemEngine>,
    hand: Hand,
    next: u16,
}

impl Bed {
    fn new(lun: Lun, depth: usize) -> Self {
        let mut device = BlkDevice::new(MemEngine::new(lun, depth), 1);
        device.set_features(device.features());
        Self { device, hand: Hand::default(), next: 0 }
    }

    /// Queues a request; the returned buffer is the device-writable part.
    fn push(&mut self, kind: u32, sector: u64, payload: &[u8], writable: usize) -> (u16, GuestBuf) {
        let readable = GuestBuf::for_test_pieces(&[10, 6 + payload.len()]);
        readable.copy_from(0, &kind.to_le_bytes());
        readable.copy_from(8, &sector.to_le_bytes());
        readable.copy_from(16, payload);
        let out = GuestBuf::for_test(writable);
        if writable > 0 {
            out.copy_from(0, &vec![0xee; writable]);
        }
        self.next += 1;
        self.hand.waiting.push_back((self.next, readable, out.slice(0, writable)));
        (self.next, out)
    }

    fn run(&mut self) {
        while self.device.poll(&mut self.hand, Instant::now()) {}
    }

    /// Carries one request out; returns status, used length and the writable part before the status.
    fn one(&mut self, kind: u32, sector: u64, payload: &[u8], data_bytes: usize) -> (u8, u32, Vec<u8>) {
        let (head, out) = self.push(kind, sector, payload, data_bytes + 1);
        self.run();
        let at = self.hand.ended.iter().position(|(ended, _)| *ended == head).expect("the request ended");
        let (_, end) = self.hand.ended.remove(at);
        let End::Used(used) = end else { panic!("{end:?}") };
        let mut bytes = vec![0; data_bytes + 1];
        out.copy_to(0, &mut bytes);
        let status = bytes.pop().unwrap();
        (status, used, bytes)
    }

    fn log(&self) -> Vec<(Op, u64, u32)> {
        std::mem::take(&mut self.device.engine().control.lock().unwrap().log)
    }
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn a_large_write_is_split_and_reads_back() {
    let mut bed = Bed::new(lun(4096, 64), 4);
    let data: Vec<u8> = (0..20 * 4096u32).map(|byte| (byte % 251) as u8).collect();
    assert_eq!(bed.one(OUT, 16, &data, 0), (0, 1, vec![]));
    let plain = Op::Write { fua: false };
    assert_eq!(bed.log(), [(plain, 2, 7), (plain, 9, 7), (plain, 16, 6)]);
    let (status, used, back) = bed.one(IN, 16, &[], data.len());
    assert_eq!((status, used as usize), (0, data.len() + 1));
    assert!(back == data, "data differs");
}

#[test]
fn requests_wait_in_the_ring_while_the_engine_is_full() {
    let mut bed = Bed::new(lun(512, 1000), 3);
    for block in 0..50 {
        bed.push(IN, block * 20, &[], 512 * 20 + 1);
    }
    bed.device.engine().control.lock().unwrap().held = true;
    bed.run();
    assert_eq!(bed.hand.waiting.len(), 49, "one request of three parts fills the engine");
    assert!(!bed.device.has_room());
    bed.device.engine().control.lock().unwrap().held = false;
    bed.run();
    assert_eq!(bed.hand.ended.len(), 50);
    assert!(bed.hand.ended.iter().all(|(_, end)| *end == End::Used(512 * 20 + 1)));
    assert_eq!(bed.device.engine().control.lock().unwrap().peak_inflight, 3);
    assert_eq!(bed.device.metrics().inflight.get(), 0);
}

#[test]
fn nothing_more_is_submitted_for_a_ring_that_is_gone() {
    for (kind, payload, room) in [(IN, 0, 512 * 50), (OUT, 512 * 50, 0)] {
        let mut bed = Bed::new(lun(512, 1000), 2);
        bed.device.write_config(32, &[0]);
        bed.device.engine().control.lock().unwrap().held = true;
        let (head, out) = bed.push(kind, 0, &vec![1; payload], room + 1);
        bed.run();
        assert_eq!(bed.log().len(), 2, "as many parts as the engine takes");
        bed.hand.gone = true;
        bed.device.engine().control.lock().unwrap().held = false;
        bed.run();
        assert_eq!(bed.log(), [], "no further part, no flush");
        assert_eq!(bed.hand.ended, [(head, End::Used(room as u32 + 1))], "given back all the same");
        let mut status = [0; 1];
        out.copy_to(room, &mut status);
        assert_eq!(status, [0xee], "not written");
        bed.hand.gone = false;
        assert_eq!(bed.one(IN, 0, &[], 512).0, 0, "the device goes on");
    }
}

#[test]
fn the_features_stay_those_that_were_offered_first() {
    let mut bed = Bed::new(lun(512, 64), 4);
    let before = bed.device.features();
    let changed = Lun { read_only: true, max_discard_blocks: 0, ..lun(512, 64) };
    bed.device.engine().control.lock().unwrap().changed = Some(changed);
    bed.run();
    assert_eq!(bed.device.features(), before, "a front end that reconnects finds what it was offered");
    assert_eq!(bed.one(OUT, 0, &[0; 512], 0).0, 1);
    assert_eq!(bed.one(DISCARD, 0, &range(0, 1, 0), 0).0, 2);
}

/// Queues that always have one more request, which ends at once.
struct Endless {
    header: GuestBuf,
    taken: Vec<u32>,
}

impl Rings for Endless {
    fn take(&mut self, queue: u16, chain: &mut Chain) -> bool {
        chain.id = ChainId { queue, head: 0, epoch: 0 };
        chain.readable = self.header.slice(0, 16);
        chain.writable = self.header.slice(16, 1);
        self.taken[usize::from(queue)] += 1;
        true
    }

    fn complete(&mut self, _id: ChainId, _len_bytes: u32) {}

    fn wanted(&self, _id: ChainId) -> bool {
        true
    }

    fn fail(&mut self, id: ChainId, error: RingError) {
        panic!("{id:?}: {error}");
    }
}

#[test]
fn a_pass_is_bounded_and_all_queues_have_their_turn() {
    let mut device = BlkDevice::new(MemEngine::new(lun(512, 64), 4), 64);
    let mut rings = Endless { header: GuestBuf::for_test(17), taken: vec![0; 64] };
    rings.header.copy_from(0, &GET_ID.to_le_bytes());
    device.poll(&mut rings, Instant::now());
    let first: u32 = rings.taken.iter().sum();
    assert!(first <= 64, "{first} requests in one pass keep other devices waiting");
    for _ in 0..64 {
        device.poll(&mut rings, Instant::now());
    }
    let (least, most) = (rings.taken.iter().min().unwrap(), rings.taken.iter().max().unwrap());
    assert!(*least > 0 && most - least <= 32, "{:?}", rings.taken);
}

#[test]
fn room_that_a_request_has_no_use_for_is_zeroed_or_refused() {
    let mut bed = Bed::new(lun(512, 64), 4);
    for (kind, payload) in [(FLUSH, &[][..]), (OUT, &[1; 512])] {
        assert_eq!(bed.one(kind, 0, payload, 100), (0, 101, vec![0; 100]));
        assert_eq!(bed.one(kind, 0, payload, 4097).0, 1, "to clear it all would keep others waiting");
    }
    assert_eq!(bed.one(GET_ID, 0, &[], 30).2[20..], [0; 10]);
    assert_eq!(bed.one(GET_ID, 0, &[], 1 << 20).0, 1);
}

#[test]
fn one_failed_part_fails_the_request_after_all_parts_ended() {
    let mut bed = Bed::new(lun(512, 100), 2);
    bed.device.engine().control.lock().unwrap().bad_block = Some(8);
    let (status, used, _) = bed.one(IN, 0, &[], 512 * 30);
    assert_eq!((status, used), (1, 512 * 30 + 1));
    assert!(bed.log().len() < 5, "parts after the failure are not tried");
    assert_eq!(bed.one(IN, 20, &[], 512).0, 0, "the device goes on");
    assert_eq!((bed.device.metrics().read.failed.get(), bed.device.metrics().read.ok.get()), (1, 1));
}

/// The target may have lost power with the session, and with it what an earlier step had written to its cache. (Found by
/// simulation.)
#[test]
fn a_write_in_several_steps_begins_again_when_a_session_was_lost_between_them() {
    let mut bed = Bed::new(lun(512, 100), 2);
    let lose_after = |bed: &Bed, n| bed.device.engine().control.lock().unwrap().lose_after = Some(n);
    let first = (Op::Write { fua: false }, 0, 7);
    let second = (Op::Write { fua: false }, 7, 3);
    lose_after(&bed, 1);
    assert_eq!(bed.one(OUT, 0, &[9; 512 * 10], 0).0, 0);
    assert_eq!(bed.log(), [first, second, first, second]);
    // Lost with its only step: that one was answered before or repeated whole.
    lose_after(&bed, 1);
    assert_eq!(bed.one(OUT, 0, &[9; 512], 0).0, 0);
    assert_eq!(bed.log().len(), 1);
    // The FLUSH of a write that is to be durable is a step as well.
    bed.device.write_config(32, &[0]);
    let one = (Op::Write { fua: false }, 0, 1);
    lose_after(&bed, 1);
    assert_eq!(bed.one(OUT, 0, &[5; 512], 0).0, 0);
    assert_eq!(bed.log(), [one, (Op::Flush, 0, 0), one, (Op::Flush, 0, 0)]);
    assert!(bed.one(IN, 0, &[], 512).2.iter().all(|&byte| byte == 5), "with its data");
    // Without a volatile cache, each step is safe.
    let mut bed = Bed::new(Lun { write_cache: false, ..lun(512, 100) }, 2);
    lose_after(&bed, 1);
    assert_eq!(bed.one(OUT, 0, &[9; 512 * 10], 0).0, 0);
    assert_eq!(bed.log(), [first, second]);
}

#[test]
fn bad_requests_get_the_status_that_the_specification_names() {
    let mut bed = Bed::new(lun(4096, 64), 4);
    assert_eq!(bed.one(IN, 0, &[], 512).0, 1, "less than a block");
    assert_eq!(bed.one(IN, 1, &[], 4096).0, 1, "not on a block");
    assert_eq!(bed.one(IN, 64 * 8, &[], 4096).0, 1, "past the end");
    assert_eq!(bed.one(IN, u64::MAX - 7, &[], 4096).0, 1, "far past the end");
    assert_eq!(bed.one(OUT, 63 * 8, &[0; 8192], 0).0, 1, "across the end");
    assert_eq!(bed.one(OUT, 0, &[0; 100], 0).0, 1, "not whole sectors");
    assert_eq!(bed.one(77, 0, &[], 0).0, 2, "unknown type");
    assert_eq!(bed.one(DISCARD, 0, &range(0, 7, 0), 0).0, 1, "not whole blocks");
    assert_eq!(bed.log(), [], "none of it reached the engine");
    assert_eq!(bed.one(IN, 0, &[], 0), (0, 1, vec![]), "nothing to read is read");
}

#[test]
fn framing_without_header_or_status_breaks_the_queue() {
    let mut bed = Bed::new(lun(512, 64), 4);
    bed.hand.waiting.push_back((1, GuestBuf::for_test(15), GuestBuf::for_test(1)));
    bed.hand.waiting.push_back((2, GuestBuf::for_test(16), GuestBuf::new()));
    bed.run();
    assert!(bed.hand.ended.iter().all(|(_, end)| matches!(end, End::Failed(RingError::Framing(_)))));
    assert_eq!(bed.hand.ended.len(), 2);
}

#[test]
fn a_read_only_unit_refuses_every_change() {
    let mut bed = Bed::new(Lun { read_only: true, ..lun(512, 64) }, 4);
    assert_eq!(bed.one(OUT, 0, &[0; 512], 0).0, 1);
    assert_eq!(bed.one(DISCARD, 0, &range(0, 1, 0), 0).0, 1);
    assert_eq!(bed.one(WRITE_ZEROES, 0, &range(0, 1, 0), 0).0, 1);
    assert_eq!(bed.one(IN, 0, &[], 512).0, 0);
    assert_eq!(bed.log().len(), 1);
}

#[test]
fn the_serial_number_is_the_units() {
    let mut bed = Bed::new(lun(512, 64), 4);
    let (status, used, id) = bed.one(GET_ID, 0, &[], 20);
    assert_eq!((status, used), (0, 21));
    assert_eq!(&id, b"MEM0123456789\0\0\0\0\0\0\0");
    assert_eq!(bed.one(GET_ID, 0, &[], 5).2, b"MEM01");
}

#[test]
fn discard_and_write_zeroes_are_cut_to_the_units_limits() {
    let mut bed = Bed::new(lun(512, 1000), 4);
    let two = [range(0, 10, 0), range(100, 3, 0), range(50, 0, 0), range(200, 10, 0)].concat();
    assert_eq!(bed.one(DISCARD, 0, &two, 0), (0, 1, vec![]));
    assert_eq!(bed.log(), [(Op::Discard, 0, 10), (Op::Discard, 100, 3), (Op::Discard, 200, 10)]);
    assert_eq!(bed.one(WRITE_ZEROES, 0, &[range(8, 5, 1), range(90, 5, 0)].concat(), 0).0, 0);
    let (unmap, keep) = (Op::WriteZeroes { unmap: true }, Op::WriteZeroes { unmap: false });
    assert_eq!(bed.log(), [(unmap, 8, 5), (keep, 90, 5)]);
    assert_eq!(bed.one(DISCARD, 0, &range(0, 11, 0), 0).0, 1, "more than announced");
}

#[test]
fn cache_modes_decide_what_follows_a_write() {
    let write = [7; 512];
    // Write back: nothing, and FLUSH reaches the unit.
    let mut bed = Bed::new(lun(512, 64), 4);
    bed.one(OUT, 0, &write, 0);
    bed.one(FLUSH, 0, &[], 0);
    assert_eq!(bed.log(), [(Op::Write { fua: false }, 0, 1), (Op::Flush, 0, 0)]);
    // The guest turns the cache off.
    bed.device.write_config(32, &[0]);
    assert_eq!(bed.one(OUT, 0, &[7; 512 * 8], 0).0, 0);
    assert_eq!(bed.log().last(), Some(&(Op::Flush, 0, 0)), "made durable after its last part");
    assert_eq!(bed.one(WRITE_ZEROES, 0, &range(0, 1, 0), 0).0, 0);
    assert_eq!(bed.log(), [(Op::WriteZeroes { unmap: false }, 0, 1), (Op::Flush, 0, 0)]);
    let mut mode = [9; 1];
    bed.device.read_config(32, &mut mode);
    assert_eq!(mode, [0]);
    bed.device.write_config(32, &[1]);
    bed.one(OUT, 0, &write, 0);
    assert_eq!(bed.log(), [(Op::Write { fua: false }, 0, 1)]);
    // With FUA no flush is needed.
    let mut bed = Bed::new(Lun { fua: true, ..lun(512, 64) }, 4);
    bed.device.write_config(32, &[0]);
    bed.one(OUT, 0, &write, 0);
    assert_eq!(bed.log(), [(Op::Write { fua: true }, 0, 1)]);
    // A driver that did not take FLUSH expects durable writes.
    bed.device
        .set_features(bed.device.features() & !(bit(VIRTIO_BLK_F_FLUSH) | bit(VIRTIO_BLK_F_CONFIG_WCE)));
    bed.one(OUT, 0, &write, 0);
    assert_eq!(bed.log(), [(Op::Write { fua: true }, 0, 1)]);
    // A unit without a cache needs nothing at all.
    let mut bed = Bed::new(Lun { write_cache: false, ..lun(512, 64) }, 4);
    bed.device.write_config(32, &[0]);
    bed.one(OUT, 0, &write, 0);
    assert_eq!(bed.one(FLUSH, 0, &[], 0).0, 0);
    assert_eq!(bed.log(), [(Op::Write { fua: false }, 0, 1)]);
}

#[test]
fn a_cache_mode_that_changes_under_way_is_that_of_the_next_write() {
    let mut bed = Bed::new(Lun { fua: true, ..lun(512, 64) }, 1);
    bed.device.write_config(32, &[0]);
    bed.device.engine().control.lock().unwrap().held = true;
    bed.push(OUT, 0, &[7; 512 * 20], 1);
    bed.run();
    bed.device.write_config(32, &[1]);
    let unit = Lun { fua: false, ..lun(512, 64) };
    bed.device.engine().control.lock().unwrap().changed = Some(unit);
    bed.device.engine().control.lock().unwrap().held = false;
    bed.run();
    let fua = Op::Write { fua: true };
    assert_eq!(bed.log(), [(fua, 0, 7), (fua, 7, 7), (fua, 14, 6)]);
    bed.one(OUT, 0, &[7; 512], 0);
    assert_eq!(bed.log(), [(Op::Write { fua: false }, 0, 1)]);
}

#[test]
fn a_failed_write_is_not_followed_by_a_flush() {
    let mut bed = Bed::new(lun(512, 64), 4);
    bed.device.write_config(32, &[0]);
    bed.device.engine().control.lock().unwrap().bad_block = Some(3);
    assert_eq!(bed.one(OUT, 0, &[7; 512 * 5], 0).0, 1);
    assert_eq!(bed.log(), [(Op::Write { fua: false }, 0, 5)]);
}

#[test]
fn only_the_cache_mode_can_be_written() {
    let mut bed = Bed::new(lun(512, 64), 4);
    let mut before = [0; 60];
    bed.device.read_config(0, &mut before);
    bed.device.write_config(0, &[0xff; 8]);
    bed.device.write_config(32, &[2]);
    bed.device.write_config(u32::MAX, &[0]);
    let mut after = [0; 60];
    bed.device.read_config(0, &mut after);
    assert_eq!(before, after);
    assert_eq!(bed.device.metrics().refused_config_writes.get(), 3);
    let mut past = [7; 8];
    bed.device.read_config(58, &mut past);
    assert_eq!(past, [0; 8]);
}

#[test]
fn a_unit_that_grew_is_told_once() {
    let mut bed = Bed::new(lun(512, 64), 4);
    bed.device.engine().control.lock().unwrap().changed = Some(lun(512, 128));
    bed.run();
    assert!(bed.device.take_config_change() && !bed.device.take_config_change());
    let mut capacity = [0; 8];
    bed.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 128);
}

/// Runs the device over virtual time, woken only when it says or has something to do; returns when it is done.
fn run_in_virtual_time(bed: &mut Bed, start: Instant, wakes: &mut u32) -> Instant {
    let mut now = start;
    loop {
        while bed.device.poll(&mut bed.hand, now) {}
        if bed.hand.waiting.is_empty() && bed.device.metrics().inflight.get() == 0 {
            return now;
        }
        *wakes += 1;
        assert!(!bed.device.has_room(), "it would take one, but did not");
        let deadline = bed.device.wait().deadline.expect("something wakes it");
        assert!(deadline > now, "it does not spin while it waits for tokens");
        now = deadline;
    }
}

#[test]
fn a_limited_device_leaves_requests_in_the_ring_and_loses_none() {
    let start = Instant::now();
    let mut bed = Bed::new(lun(512, 1000), 8);
    let args = serde_json::json!({"iops": 1000, "iops_burst": 10});
    bed.device.command("limit", args.as_object().unwrap(), start).unwrap().unwrap();
    for n in 0..110 {
        bed.push(IN, n, &[], 513);
    }
    bed.device.poll(&mut bed.hand, start);
    assert_eq!(bed.hand.waiting.len(), 102, "no more than the engine takes");
    let mut wakes = 0;
    let end = run_in_virtual_time(&mut bed, start, &mut wakes);
    assert_eq!(bed.hand.ended.len(), 110);
    assert!(bed.hand.ended.iter().all(|(_, end)| *end == End::Used(513)));
    let took = (end - start).as_millis();
    assert!((99..=105).contains(&took), "110 requests at 1000/s with a burst of 10 took {took} ms");
    assert!(wakes <= 105, "{wakes} wake-ups");
    let last = bed.device.wait().deadline.expect("the last one took the last token");
    assert!(!bed.device.poll(&mut bed.hand, last));
    assert_eq!(bed.device.wait().deadline, None, "nothing to wait for any more: it sleeps");
    assert!(bed.device.has_room());
    // What was held back has waited in the ring, and that is told.
    let waited = bed.device.metrics().read.ring_wait.snapshot();
    assert_eq!(waited.count, 110);
    assert!(waited.quantile_ns(0.99) >= 90_000_000, "{waited:?}");
}

#[test]
fn bytes_are_limited_as_well_and_one_large_request_passes() {
    let start = Instant::now();
    let mut bed = Bed::new(lun(512, 1000), 8);
    let args = serde_json::json!({"bps": "1M", "bps_burst": "64K"});
    bed.device.command("limit", args.as_object().unwrap(), start).unwrap().unwrap();
    // Each is larger than the burst.
    for _ in 0..10 {
        bed.push(IN, 0, &[], (128 << 10) + 1);
    }
    let end = run_in_virtual_time(&mut bed, start, &mut 0);
    let took = (end - start).as_millis();
    // 1.25 MiB but for the burst and what is owed for the last one.
    assert!((1000..=1200).contains(&took), "took {took} ms");
    let metrics = bed.device.metrics();
    assert_eq!((metrics.read.ok.get(), metrics.read.bytes.get()), (10, 10 * (128 << 10)));
}

#[test]
fn limits_change_at_run_time() {
    let start = Instant::now();
    let mut bed = Bed::new(lun(512, 1000), 8);
    let limit = |bed: &mut Bed, args: serde_json::Value, now| {
        bed.device
            .command("limit", args.as_object().unwrap(), now)
            .unwrap()
            .map(|rest| rest.finish().unwrap())
    };
    limit(&mut bed, serde_json::json!({"iops": 1, "iops_burst": 1}), start).unwrap();
    for n in 0..3 {
        bed.push(IN, n, &[], 513);
    }
    while bed.device.poll(&mut bed.hand, start) {}
    assert_eq!(bed.hand.ended.len(), 1);
    let answer = limit(&mut bed, serde_json::json!({"iops": null}), start).unwrap();
    assert_eq!(answer, serde_json::json!({"limits": {"iops": null, "bps": null}}));
    while bed.device.poll(&mut bed.hand, start) {}
    assert_eq!(bed.hand.ended.len(), 3, "free at once");
    assert!(limit(&mut bed, serde_json::json!({"iops": "x"}), start).is_err());
    assert!(bed.device.command("nonsense", &serde_json::Map::new(), start).is_none());
}

#[test]
fn queues_share_a_limit() {
    let start = Instant::now();
    let mut device = BlkDevice::new(MemEngine::new(lun(512, 64), 4), 8);
    let mut rings = Endless { header: GuestBuf::for_test(17), taken: vec![0; 8] };
    rings.header.copy_from(0, &GET_ID.to_le_bytes());
    let args = serde_json::json!({"iops": 1000, "iops_burst": 3});
    device.command("limit", args.as_object().unwrap(), start).unwrap().unwrap();
    let mut now = start;
    while now < start + std::time::Duration::from_secs(4) {
        device.poll(&mut rings, now);
        now = device.wait().deadline.unwrap();
    }
    let (least, most) = (rings.taken.iter().min().unwrap(), rings.taken.iter().max().unwrap());
    assert!(*least > 400 && most - least <= 32, "{:?}", rings.taken);
}

#[test]
fn behind_the_new_end_of_a_unit_that_shrank_requests_fail() {
    let mut bed = Bed::new(lun(512, 64), 4);
    let resize = |bed: &mut Bed, blocks| {
        bed.device.engine().control.lock().unwrap().changed = Some(lun(512, blocks));
        bed.run();
        bed.log();
    };
    assert_eq!(bed.one(IN, 40, &[], 512).0, 0);
    resize(&mut bed, 32);
    assert!(bed.device.take_config_change());
    assert_eq!(bed.one(IN, 31, &[], 512).0, 0);
    assert_eq!(bed.log().len(), 1);
    for (kind, payload, room) in [(IN, vec![], 512), (OUT, vec![1; 512], 0), (DISCARD, range(40, 1, 0), 0)] {
        let sector = if kind == DISCARD { 0 } else { 32 };
        assert_eq!(bed.one(kind, sector, &payload, room).0, 1);
    }
    assert_eq!(bed.log(), [], "none of it reached the engine");
    assert_eq!(bed.device.status()["shrunk"], 1);
    // Growing is no trouble.
    resize(&mut bed, 48);
    assert!(bed.device.take_config_change());
    assert_eq!(bed.one(IN, 47, &[], 512).0, 0);
    assert_eq!(bed.device.status()["shrunk"], 1);
}
