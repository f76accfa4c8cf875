//! The in-flight log under crashes at every store, and under front ends that hand over anything.

mod crashes;
mod hostile_log;
#[path = "../../../tests/support/packed.rs"]
pub(crate) mod packed;
#[path = "../../../tests/support/mod.rs"]
pub(crate) mod split;

use std::collections::HashMap;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::{Ring, RingAddresses, RingError, StartAt};
use crate::mem::GuestMap;
use crate::queue::log::{LogArea, LogFormat};
use packed::PackedDriver;
use split::DriverRing;

const SIZE: u16 = 8;
const RING: u64 = 0x1000;
const TABLES: u64 = 0x4000;
const DATA: u64 = 0x8000;

/// A driver of either kind of ring; each request has a number, which it carries in its first eight bytes.
#[derive(Debug)]
pub(crate) struct Driver {
    kind: Kind,
    outstanding: HashMap<u16, u64>,
    next: u64,
}

#[derive(Debug)]
enum Kind {
    Split(DriverRing),
    Packed(PackedDriver),
}

impl Driver {
    pub(crate) fn new(map: &Arc<GuestMap>, is_packed: bool) -> Self {
        let kind = if is_packed {
            Kind::Packed(PackedDriver::new(map, RING, SIZE, true))
        } else {
            Kind::Split(DriverRing::new(map, RING, SIZE, true))
        };
        Self { kind, outstanding: HashMap::new(), next: 1 }
    }

    pub(crate) fn map(&self) -> &Arc<GuestMap> {
        match &self.kind {
            Kind::Split(ring) => &ring.map,
            Kind::Packed(ring) => &ring.map,
        }
    }

    pub(crate) fn is_packed(&self) -> bool {
        matches!(self.kind, Kind::Packed(_))
    }

    pub(crate) fn addresses(&self) -> RingAddresses {
        match &self.kind {
            Kind::Split(ring) => {
                RingAddresses { size: SIZE, desc: ring.desc, avail: ring.avail, used: ring.used }
            }
            Kind::Packed(ring) => ring.at,
        }
    }

    /// What a front end sends that learned nothing from the process before: QEMU knows the used index of a split ring
    /// and nothing of a packed one.
    pub(crate) fn base(&self) -> u32 {
        match &self.kind {
            Kind::Split(ring) => ring.used_idx().into(),
            Kind::Packed(_) => 0x8000_8000,
        }
    }

    /// Adds a request of `descs` descriptors (0: an indirect one), if there is room.
    pub(crate) fn add(&mut self, descs: usize) {
        let place = self.next % 16;
        let data = DATA + 0x100 * place;
        let buffers: Vec<_> = (0..descs.max(2) as u64).map(|n| (data + 16 * n, 16, n != 0)).collect();
        let table = TABLES + 0x100 * place;
        let number = self.next;
        self.map().write_obj(number.to_le(), GuestAddress(data)).unwrap();
        let id = match (&mut self.kind, descs) {
            (Kind::Split(ring), 0) => ring.add_indirect(table, &buffers),
            (Kind::Split(ring), _) => ring.add(&buffers),
            (Kind::Packed(ring), 0) => ring.add_indirect(table, &buffers),
            (Kind::Packed(ring), _) => ring.add(&buffers),
        };
        if let Some(id) = id {
            self.next += 1;
            assert!(self.outstanding.insert(id, number).is_none());
        }
    }

    /// Numbers of the requests that were answered. An answer to what is not outstanding panics.
    pub(crate) fn collect(&mut self) -> Vec<u64> {
        let mut numbers = Vec::new();
        loop {
            let used = match &mut self.kind {
                Kind::Split(ring) => ring.take_used(),
                Kind::Packed(ring) => ring.take_used(),
            };
            let Some((id, _)) = used else { return numbers };
            numbers.push(self.outstanding.remove(&id).expect("answered twice"));
        }
    }

    pub(crate) fn start(
        &self,
        base: u32,
        log: Option<&Arc<LogArea>>,
    ) -> Result<(Ring, Option<Vec<u16>>), RingError> {
        let start = StartAt {
            in_order: false,
            burst: None,
            queue: 1,
            at: self.addresses(),
            base,
            packed: self.is_packed(),
            event_idx: true,
            indirect: true,
            log,
            forget: false,
        };
        Ring::start(&start, self.map())
    }
}

pub(crate) fn memory() -> Arc<GuestMap> {
    Arc::new(GuestMap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap())
}

pub(crate) fn area(is_packed: bool) -> Arc<LogArea> {
    let format = if is_packed { LogFormat::Packed } else { LogFormat::Split };
    let (spec, file) = LogArea::create(2, SIZE, format).unwrap();
    Arc::new(LogArea::map(spec, file, format).unwrap())
}

/// Numbers with no pattern.
fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 31)
}
