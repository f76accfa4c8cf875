//! A hostile guest and front end: they write what they like where they like in the guest's memory, rings and all, and in
//! the in-flight log, while the block device model works on it, on a split or a packed ring.
//!
//! Holds: no panic and no endless loop; the engine is asked for nothing outside the disk or the limits (the engine in
//! memory asserts it); a chain taken is given back at most once, and exactly once unless its ring failed; the used index
//! never runs ahead of what was taken; a ring that broke a rule is not touched again.
#![no_main]

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use vcp_core::device::{RingDevice, Rings};
use vcp_core::mem::GuestMap;
use vcp_core::queue::log::{LogArea, LogFormat};
use vcp_core::queue::{
    Chain, ChainId, PackedQueue, PackedStart, RingAddresses, RingError, SplitQueue, SplitStart, VirtQueue,
};
use vcp_iscsi::blk::BlkDevice;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

mod engine {
    pub use vcp_iscsi::engine::*;
}
#[path = "../../vcp-iscsi/tests/support/mem_engine.rs"]
#[allow(dead_code)]
mod mem_engine;

use mem_engine::{MemEngine, lun};

const MEMORY_BYTES: usize = 64 << 10;
const DESC: u64 = 0x0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Steps of a run: more only make it slow.
const MAX_OPS: usize = 64;

/// One queue, as a server runs it.
struct One {
    map: Arc<GuestMap>,
    queue: Option<Box<dyn VirtQueue>>,
    log: Arc<LogArea>,
    /// The log as the front end sees it.
    log_file: File,
    size: u16,
    /// Heads that the log said were in flight, newest first.
    again: Vec<u16>,
    epoch: u32,
    inflight: HashSet<(u16, u32)>,
    taken: u64,
    given: u64,
}

impl Rings for One {
    fn take(&mut self, queue: u16, chain: &mut Chain) -> bool {
        if queue != 0 {
            return false;
        }
        let Some(ring) = &mut self.queue else { return false };
        let taken = match self.again.pop() {
            Some(head) => ring.take_again(&self.map, head, chain).map(|()| true),
            None => ring.take(&self.map, chain),
        };
        match taken {
            Ok(true) => {
                chain.id = ChainId { queue, head: chain.id.head, epoch: self.epoch };
                // The driver may offer a head twice: both are requests, and both are answered.
                self.inflight.insert((chain.id.head, self.epoch));
                self.taken += 1;
                true
            }
            Ok(false) => false,
            Err(_) => {
                self.queue = None;
                false
            }
        }
    }

    fn complete(&mut self, id: ChainId, len_bytes: u32) {
        self.given += 1;
        assert!(self.given <= self.taken, "more answers than requests");
        self.inflight.remove(&(id.head, id.epoch));
        if id.epoch == self.epoch
            && let Some(ring) = &mut self.queue
            && ring.put_used(&self.map, id.head, len_bytes).is_err()
        {
            self.queue = None;
        }
    }

    fn wanted(&self, id: ChainId) -> bool {
        self.queue.is_some() && id.epoch == self.epoch
    }

    fn fail(&mut self, id: ChainId, _error: RingError) {
        self.given += 1;
        self.inflight.remove(&(id.head, id.epoch));
        self.queue = None;
    }
}

impl One {
    /// Starts the ring where `how` says: at a base, with an empty log, or where the log says.
    fn start(&mut self, flags: u8, base: u32, how: u8) {
        self.size = 1 << (flags & 7).min(6);
        let (event_idx, indirect) = (flags & 8 != 0, flags & 16 != 0);
        self.epoch += 1;
        let (queue, again) = if flags & 32 != 0 {
            let log = self.log.queue(0, self.size, LogFormat::Packed).ok();
            let start = match (how % 3, log) {
                (1, Some(log)) => PackedStart::Fresh(base, log),
                (2, Some(log)) => PackedStart::Recover(base, log),
                _ => PackedStart::Base(base),
            };
            let at = RingAddresses { size: self.size, desc: DESC, avail: AVAIL, used: USED };
            match PackedQueue::start(at, event_idx, indirect, start, &self.map) {
                Ok((queue, again)) => (Some(Box::new(queue) as Box<dyn VirtQueue>), again),
                Err(_) => (None, None),
            }
        } else {
            let mut queue = Queue::new(256).expect("a power of two");
            queue.set_size(self.size);
            queue.try_set_desc_table_address(GuestAddress(DESC)).expect("aligned");
            queue.try_set_avail_ring_address(GuestAddress(AVAIL)).expect("aligned");
            queue.try_set_used_ring_address(GuestAddress(USED)).expect("aligned");
            queue.set_event_idx(event_idx);
            let log = self.log.queue(0, self.size, LogFormat::Split).ok();
            let start = match (how % 3, log) {
                (1, Some(log)) => SplitStart::Fresh(base as u16, log),
                (2, Some(log)) => SplitStart::Recover(base as u16, log),
                _ => SplitStart::Base(base as u16),
            };
            match SplitQueue::start(queue, indirect, start, &self.map) {
                Ok((queue, again)) => (Some(Box::new(queue) as Box<dyn VirtQueue>), again),
                Err(_) => (None, None),
            }
        };
        self.queue = queue;
        self.again = again.unwrap_or_default();
        assert!(self.again.len() <= usize::from(self.size), "more in flight than the ring has entries");
    }

    fn publish(&mut self) {
        let Some(ring) = &mut self.queue else { return };
        if ring.publish(&self.map).is_err() {
            self.queue = None;
        }
    }
}

/// Takes bytes off the input.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    fn word(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes([self.byte()?, self.byte()?]))
    }
}

fn run(data: &[u8]) -> Option<()> {
    let mut input = Input(data);
    let flags = input.byte()?;
    let map = Arc::new(GuestMap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).expect("memory"));
    let mut unit = lun(if flags & 64 != 0 { 4096 } else { 512 }, 64);
    unit.read_only = flags & 128 != 0;
    let mut device = BlkDevice::new(MemEngine::new(unit, 4), 1);
    device.set_features(device.features());
    let format = if flags & 32 != 0 { LogFormat::Packed } else { LogFormat::Split };
    let (spec, log_file) = LogArea::create(1, 64, format).expect("a memfd");
    let log = LogArea::map(spec, log_file.try_clone().expect("a descriptor"), format).expect("our own area");
    let mut one = One {
        map: Arc::clone(&map),
        queue: None,
        log: Arc::new(log),
        log_file,
        size: 1,
        again: Vec::new(),
        epoch: 0,
        inflight: HashSet::new(),
        taken: 0,
        given: 0,
    };
    one.start(flags, if flags & 32 != 0 { 0x8000_8000 } else { 0 }, 1);
    let mut avail = 0u16;
    let now = Instant::now();
    for _ in 0..MAX_OPS {
        let Some(op) = input.byte() else { break };
        match op % 8 {
            // A descriptor that is likely to mean something.
            0 | 1 => {
                let index = u64::from(input.byte()? & 63);
                let (addr, len, kind, next) = (input.word()?, input.word()?, input.byte()?, input.byte()?);
                let at = DESC + 16 * index;
                let words = [
                    u64::from(addr),
                    u64::from(len & 0x1fff) | u64::from(kind & 7) << 32 | u64::from(next & 63) << 48,
                ];
                for (word, at) in words.iter().zip([at, at + 8]) {
                    map.write_obj(*word, GuestAddress(at)).expect("inside");
                }
            }
            // A request header.
            2 => {
                let (addr, kind, sector) = (input.word()?, input.byte()?, input.byte()?);
                let header = [u64::from(kind % 15), u64::from(sector)];
                for (word, at) in header.iter().zip([u64::from(addr), u64::from(addr) + 8]) {
                    let _ = map.write_obj(*word, GuestAddress(at));
                }
            }
            // Anything anywhere.
            3 => {
                let (addr, len) = (input.word()?, usize::from(input.byte()?).min(input.0.len()));
                let (bytes, rest) = input.0.split_at(len);
                input.0 = rest;
                let _ = map.write(bytes, GuestAddress(addr.into()));
            }
            // A head made available; the index as it should be, or not.
            4 | 5 => {
                let (head, jump) = (input.byte()?, input.byte()?);
                let slot = AVAIL + 4 + 2 * u64::from(avail % one.size);
                map.write_obj(u16::from(head & 63), GuestAddress(slot)).expect("inside");
                avail = avail.wrapping_add(if jump < 250 { 1 } else { u16::from(jump) * 13 });
                map.write_obj(avail, GuestAddress(AVAIL + 2)).expect("inside");
            }
            6 => {
                // As long as there is work; a hostile guest may keep a device busy, but only with what it offered.
                for _ in 0..4096 {
                    if !device.poll(&mut one, now) {
                        break;
                    }
                }
                one.publish();
            }
            _ => match input.byte()? % 5 {
                0 => {
                    let base = u32::from(input.word()?) | u32::from(input.word()?) << 16;
                    one.start((input.byte()? & !32) | (flags & 32), base, input.byte()?);
                }
                4 => {
                    let (offset, value) = (input.word()? & 0xfff, input.byte()?);
                    let _ = one.log_file.write_at(&[value], offset.into());
                }
                1 => {
                    let armed = one.queue.as_mut().map(|ring| ring.arm(&map));
                    if matches!(armed, Some(Err(_))) {
                        one.queue = None;
                    }
                }
                2 => {
                    if one.queue.as_mut().is_some_and(|ring| ring.disarm(&map).is_err()) {
                        one.queue = None;
                    }
                }
                _ => {
                    let (offset, value) = (input.byte()?, input.byte()?);
                    device.write_config(offset.into(), &[value]);
                    device.set_features(device.features() & !(u64::from(value) << (offset & 31)));
                }
            },
        }
    }
    // Whatever was taken comes back, of whatever life of the ring.
    for _ in 0..65536 {
        if !device.poll(&mut one, now) {
            break;
        }
    }
    if one.queue.is_none() {
        // No more is taken, so all must be back.
        assert_eq!(one.given, one.taken, "requests without an answer: {:?}", one.inflight);
    }
    Some(())
}

fuzz_target!(|data: &[u8]| {
    run(data);
});
