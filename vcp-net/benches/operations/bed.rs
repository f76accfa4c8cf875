//! What the benchmarks of the operations share: bursts of frames where they lie when an operation sees them, in the
//! transmit queue of a guest, and a clock that tells nanoseconds per frame.
//!
//! All of it is hot: the same burst comes again and again, so that what is measured is the operation and not the way of
//! cache lines between processors. `cargo xtask bench net --part frames` measures that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use vcp_core::mem::GuestMap;
use vcp_core::queue::RingAddresses;
use vcp_core::queue::burst::{Batch, BurstRing, BurstSetup, Direction, MAX_BURST};
use vcp_net::frame::vnet::HEADER_BYTES;
use vcp_net::frame::{Mac, Offloads};
use vcp_net::switch::parse::Parse;
use vcp_net::switch::work::{Frames, PortId, Work};
use vm_memory::{Bytes, GuestAddress};

/// Frames per burst.
const BURSTS: [usize; 4] = [1, 8, 32, MAX_BURST];
/// Names, and frame lengths without their checksum. IMIX: 7 of 64, 4 of 570, 1 of 1518, mixed.
const LENGTHS: [(&str, &[usize]); 3] =
    [("64", &[60]), ("1518", &[1514]), ("imix", &[60, 566, 60, 60, 566, 60, 1514, 566, 60, 60, 566, 60])];

/// How long each case is measured. The machine is anyone's, so rather often than long.
const MEASURE: Duration = Duration::from_millis(300);
const WARM_UP: Duration = Duration::from_millis(60);

/// Where rings and buffers are in a guest's memory.
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x8000;
const USED: u64 = 0x1_0000;
/// What one buffer has.
pub(crate) const BUFFER_BYTES: u64 = 2048;

const F_WRITE: u16 = 2;

/// The port that frames come from, and the one that they go to.
pub(crate) const FROM: PortId = PortId(0);
pub(crate) const TO: PortId = PortId(1);

/// The station behind port `at`.
pub(crate) fn station(at: u64) -> Mac {
    Mac(0x0200_0000_0010 + at)
}

/// A guest's memory.
pub(crate) fn memory(bytes: u64) -> Arc<GuestMap> {
    Arc::new(GuestMap::from_ranges(&[(GuestAddress(0), bytes as usize)]).expect("memory"))
}

/// A ring that a driver filled with buffers, one for each entry; memory for all of it begins at `base`.
pub(crate) struct Driver {
    pub(crate) map: Arc<GuestMap>,
    base: u64,
    size: u16,
    given: u16,
    used: u16,
}

impl Driver {
    /// In memory of its own.
    pub(crate) fn new(size: u16, writable: bool) -> Self {
        Self::at(&memory(Self::memory_bytes(size)), 0, size, writable)
    }

    pub(crate) fn memory_bytes(size: u16) -> u64 {
        0x2_0000 + u64::from(size) * BUFFER_BYTES
    }

    /// In memory that is there.
    pub(crate) fn at(map: &Arc<GuestMap>, base: u64, size: u16, writable: bool) -> Self {
        let this = Self { map: Arc::clone(map), base, size, given: 0, used: 0 };
        for at in 0..size {
            let flags = if writable { F_WRITE } else { 0 };
            this.describe(at, BUFFER_BYTES as u32, flags);
            let slot = base + AVAIL + 4 + 2 * u64::from(at);
            this.map.write_obj(at, GuestAddress(slot)).expect("in memory");
        }
        this
    }

    fn describe(&self, at: u16, len_bytes: u32, flags: u16) {
        let desc = GuestAddress(self.base + DESC + 16 * u64::from(at));
        let word = u64::from(len_bytes) | u64::from(flags) << 32;
        self.map.write_obj([self.buffer(at).0, word], desc).expect("in memory");
    }

    fn buffer(&self, at: u16) -> GuestAddress {
        GuestAddress(self.base + 0x2_0000 + BUFFER_BYTES * u64::from(at))
    }

    /// Writes a frame into the next buffer, behind a header that leaves nothing undone.
    pub(crate) fn fill(&mut self, frame: &[u8]) {
        let at = self.given % self.size;
        let buffer = self.buffer(at);
        self.map.write_slice(&[0; HEADER_BYTES], buffer).expect("in memory");
        self.map.write_slice(frame, GuestAddress(buffer.0 + HEADER_BYTES as u64)).expect("in memory");
        self.describe(at, (HEADER_BYTES + frame.len()) as u32, 0);
        self.give(1);
    }

    /// Gives the device `count` buffers more. They are always in the same order.
    pub(crate) fn give(&mut self, count: u16) {
        self.given = self.given.wrapping_add(count);
        self.map.write_obj(self.given, GuestAddress(self.base + AVAIL + 2)).expect("in memory");
    }

    /// Gives again what the device has used; how many buffers.
    pub(crate) fn give_used(&mut self) -> u16 {
        let used: u16 = self.map.read_obj(GuestAddress(self.base + USED + 2)).expect("in memory");
        let count = used.wrapping_sub(self.used);
        self.used = used;
        self.give(count);
        count
    }

    /// Where it is.
    pub(crate) fn addresses(&self) -> RingAddresses {
        let at = |offset| self.base + offset;
        RingAddresses { size: self.size, desc: at(DESC), avail: at(AVAIL), used: at(USED) }
    }
}

/// A burst that was fetched from a transmit queue.
pub(crate) struct Burst {
    batch: Batch,
}

impl Burst {
    /// These frames.
    fn new(frames: &[Vec<u8>]) -> Self {
        let mut driver = Driver::new(MAX_BURST as u16, false);
        frames.iter().for_each(|frame| driver.fill(frame));
        let setup = BurstSetup {
            at: driver.addresses(),
            base: 0,
            packed: false,
            event_idx: true,
            indirect: true,
            in_order: false,
            direction: Direction::FromDriver,
        };
        let mut ring = BurstRing::new(&setup, &driver.map).expect("a ring");
        let mut batch = Batch::default();
        let fetched = ring.fetch(&mut batch, MAX_BURST).expect("a good ring");
        assert_eq!(fetched, frames.len());
        Self { batch }
    }

    /// As operations see it.
    pub(crate) fn frames(&self) -> Frames<'_> {
        Frames::Ring(&self.batch, HEADER_BYTES)
    }

    /// What `parse` makes of it.
    pub(crate) fn parsed(&self) -> Work {
        let mut work = Work::default();
        Parse::default().run(&mut work, &self.frames(), Some(Offloads::ALL));
        assert_eq!(work.open().count(), self.batch.len());
        work
    }
}

/// A UDP datagram over IPv4 in a frame of `len` bytes, from [`FROM`]'s station to [`TO`]'s.
pub(crate) fn udp(len: usize) -> Vec<u8> {
    let mut bytes = station(1).bytes().to_vec();
    bytes.extend(station(0).bytes());
    bytes.extend([0x08, 0]);
    bytes.extend([0x45, 0]);
    bytes.extend((len as u16 - 14).to_be_bytes());
    bytes.extend([0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes.extend([0x30, 0x39, 0x30, 0x3a]);
    bytes.extend((len as u16 - 34).to_be_bytes());
    bytes.resize(len, 0);
    bytes
}

/// Puts a tag of VLAN `vid` into a frame.
pub(crate) fn tag(frame: &mut Vec<u8>, vid: u16) {
    let [a, b] = vid.to_be_bytes();
    frame.splice(12..12, [0x81, 0, a, b]);
}

/// Criterion as these benchmarks want it.
pub(crate) fn criterion() -> Criterion {
    let criterion = Criterion::default().sample_size(15).warm_up_time(WARM_UP).without_plots();
    criterion.configure_from_args()
}

/// Measures `operation` over bursts of all lengths and sizes: `change` makes of the frames what the case is about, `state` is
/// made anew for each, `run` is what is measured. What is told as time is that of *one frame*.
pub(crate) fn each<S>(
    criterion: &mut Criterion,
    operation: &str,
    change: impl Fn(usize, &mut Vec<u8>),
    state: impl Fn(&Burst) -> S,
    mut run: impl FnMut(&mut S, &Burst),
) {
    let mut group = criterion.benchmark_group(operation);
    for (name, lengths) in LENGTHS {
        for count in BURSTS {
            let frames = (0..count).map(|at| {
                let mut frame = udp(lengths[at % lengths.len()]);
                change(at, &mut frame);
                frame
            });
            let burst = Burst::new(&frames.collect::<Vec<_>>());
            let mut state = state(&burst);
            // By its own clock, which is slower by the size of the burst.
            group.measurement_time(MEASURE / count as u32);
            group.bench_function(BenchmarkId::new(name, count), |bencher| {
                bencher.iter_custom(|times| {
                    let begin = Instant::now();
                    for _ in 0..times {
                        run(&mut state, &burst);
                    }
                    begin.elapsed() / count as u32
                });
            });
        }
    }
    group.finish();
}

/// What a case makes of a frame.
pub(crate) type Change<'a> = &'a dyn Fn(usize, &mut Vec<u8>);

/// Frames as they are.
pub(crate) fn unchanged(_at: usize, _frame: &mut Vec<u8>) {}
