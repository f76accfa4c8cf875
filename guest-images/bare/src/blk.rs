//! A virtio-blk disk (virtio 1.2, 5.2) with a fixed set of request slots, driven by polling.

use core::fmt;
use core::hint::spin_loop;
use core::ptr::{read_volatile, write_volatile};

use virtio_drivers::device::common::Feature;
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::{DeviceStatus, Transport};

use crate::config::Config;
use crate::memory;
use crate::packed::PackedRing;
use crate::ring::{Parts, Ring};
use crate::runtime::{Clock, println};

/// Bytes in a sector, the unit of addresses and capacity.
pub const SECTOR: u64 = 512;

const F_SIZE_MAX: u64 = 1 << 1;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_RING_PACKED: u64 = 1 << 34;
const NAMES: [(u64, &str); 12] = [
    (F_SIZE_MAX, "SIZE_MAX"),
    (1 << 2, "SEG_MAX"),
    (F_RO, "RO"),
    (F_BLK_SIZE, "BLK_SIZE"),
    (F_FLUSH, "FLUSH"),
    (1 << 10, "TOPOLOGY"),
    (1 << 11, "CONFIG_WCE"),
    (1 << 12, "MQ"),
    (1 << 13, "DISCARD"),
    (1 << 14, "WRITE_ZEROES"),
    (1 << 29, "EVENT_IDX"),
    (F_RING_PACKED, "PACKED"),
];

/// Why the guest ends with status 1.
#[derive(Debug)]
pub enum Error {
    /// No window has a block device.
    NoDisk,
    /// The monitor did not tell the frequency of the time-stamp counter.
    NoClock,
    /// A word of the command line is wrong.
    Config(&'static str),
    /// There is not enough guest memory.
    Memory,
    /// The device breaks the rules.
    Device(&'static str),
    /// A request failed with this status.
    Status(Op, u64, u8),
    /// Nothing was completed for too long.
    Timeout(u64, u16),
    /// Something else came back than was written: sector, byte in the block.
    Mismatch(u64, usize),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDisk => write!(f, "no virtio-blk device in any virtio-mmio window"),
            Self::NoClock => write!(f, "the monitor does not tell the frequency of the time-stamp counter"),
            Self::Config(what) => write!(f, "{what}"),
            Self::Memory => {
                write!(f, "not enough guest memory; take a lower qd= or bs=, or a larger --memory")
            }
            Self::Device(what) => write!(f, "the device is broken: {what}"),
            Self::Status(op, sector, status) => {
                write!(f, "{op:?} at sector {sector} failed with status {status}")
            }
            Self::Timeout(secs, inflight) => {
                write!(f, "no completion for {secs} s, {inflight} requests in flight")
            }
            Self::Mismatch(sector, byte) => {
                write!(f, "wrong data at sector {sector}, byte {byte} of the block")
            }
        }
    }
}

/// Request types (virtio 1.2, 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Op {
    /// Reads data.
    Read = 0,
    /// Writes data.
    Write = 1,
    /// Makes what was written durable.
    Flush = 4,
    /// Reads the serial number, 20 bytes.
    GetId = 8,
}

/// Where one slot's request lies in guest memory.
#[derive(Clone, Copy, Default)]
struct Slot {
    op: u32,
    sector: u64,
    started: u64,
    busy: bool,
}

/// A finished request.
pub struct Done {
    /// Its slot.
    pub slot: u16,
    /// From submission to completion, in ticks.
    pub ticks: u64,
}

/// The disk's queue, of either layout.
enum Queue {
    Split(Ring),
    Packed(PackedRing),
}

/// Has whichever it is do something.
macro_rules! ring {
    ($queue:expr, $ring:ident => $do:expr) => {
        match $queue {
            Queue::Split($ring) => $do,
            Queue::Packed($ring) => $do,
        }
    };
}

/// An open disk.
pub struct Disk {
    transport: MmioTransport<'static>,
    ring: Queue,
    offered: u64,
    capacity: u64,
    slots: &'static mut [Slot],
    headers: *mut u8,
    statuses: *mut u8,
    data: &'static mut [u8],
    inflight: u16,
    /// The clock that latencies are taken from.
    pub clock: Clock,
    timeout_secs: u64,
}

impl Disk {
    /// Initialises the device (virtio 1.2, 3.1.1) with one queue and memory for its slots.
    pub fn open(mut transport: MmioTransport<'static>, config: &Config, clock: Clock) -> Result<Self, Error> {
        transport.set_status(DeviceStatus::empty());
        transport.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
        let offered = transport.read_device_features();
        if offered & Feature::VERSION_1.bits() == 0 {
            return Err(Error::Device("it does not offer VERSION_1"));
        }
        let mut wanted = Feature::VERSION_1.bits() | Feature::RING_EVENT_IDX.bits();
        wanted |= F_SIZE_MAX | F_RO | F_BLK_SIZE | F_FLUSH;
        if config.indirect {
            wanted |= Feature::RING_INDIRECT_DESC.bits();
        }
        // Offered only where the user asked the monitor for it (packed=on).
        wanted |= F_RING_PACKED;
        let mut features = offered & wanted;
        if features & Feature::RING_INDIRECT_DESC.bits() == 0 {
            features &= !F_RING_PACKED;
        }
        transport.write_driver_features(features);
        let so_far = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK;
        transport.set_status(so_far);
        if !transport.get_status().contains(DeviceStatus::FEATURES_OK) {
            return Err(Error::Device("it refuses a subset of the features that it offers"));
        }
        let capacity = capacity(&transport)?;
        let has = |feature: Feature| features & feature.bits() != 0;
        let ring = if features & F_RING_PACKED != 0 {
            Queue::Packed(PackedRing::new(&mut transport)?)
        } else {
            let (indirect, event_idx) = (has(Feature::RING_INDIRECT_DESC), has(Feature::RING_EVENT_IDX));
            Queue::Split(Ring::new(&mut transport, indirect, event_idx)?)
        };
        transport.set_status(so_far | DeviceStatus::DRIVER_OK);

        let count = ring!(&ring, ring => ring.slots()).min(config.depth);
        if count < config.depth {
            println!("guest: the queue holds {count} requests, not qd={}", config.depth);
        }
        let n = usize::from(count);
        let data_bytes = config.block_bytes.max(config.seq_block_bytes);
        let data = memory::take(n * data_bytes).ok_or(Error::Memory)?;
        let slots = memory::take(n * size_of::<Slot>()).ok_or(Error::Memory)?;
        // SAFETY: page aligned, long enough, exclusively ours; all-zero is a Slot that is not busy.
        let slots = unsafe { core::slice::from_raw_parts_mut(slots.as_mut_ptr().cast::<Slot>(), n) };
        let headers = memory::take(n * 16).ok_or(Error::Memory)?.as_mut_ptr();
        let statuses = memory::take(n).ok_or(Error::Memory)?.as_mut_ptr();
        let timeout_secs = config.timeout_secs;
        let inflight = 0;
        Ok(Self {
            transport,
            ring,
            offered,
            capacity,
            slots,
            headers,
            statuses,
            data,
            inflight,
            clock,
            timeout_secs,
        })
    }

    /// Prints what the disk is.
    pub fn identify(&mut self, number: u32) -> Result<(), Error> {
        let block = self.block_bytes();
        let capacity = self.capacity;
        let mib = self.len_bytes() >> 20;
        self.start(0, Op::GetId, 0, 20)?;
        let id = match self.wait_all() {
            Ok(()) => {
                let id = self.data(0, 20);
                let end = id.iter().position(|b| *b == 0).unwrap_or(20);
                core::str::from_utf8(&id[..end]).unwrap_or("(not UTF-8)")
            }
            // Optional for the device.
            Err(Error::Status(..)) => "(none)",
            Err(e) => return Err(e),
        };
        println!(
            "disk {number}: capacity {capacity} sectors ({mib} MiB), block {block} bytes, serial {id:?}"
        );
        let (offered, slots) = (self.offered, ring!(&self.ring, ring => ring.slots()));
        println!("disk {number}: features {offered:#x}{}, {slots} slots", Features(offered));
        Ok(())
    }

    /// Returns the logical block size in bytes.
    fn block_bytes(&self) -> usize {
        match self.offered & F_BLK_SIZE {
            0 => SECTOR as usize,
            _ => self.transport.read_config_space::<u32>(20).unwrap_or(SECTOR as u32) as usize,
        }
    }

    /// Returns `config` with requests that this disk takes: no segment beyond SIZE_MAX.
    pub fn fit(&self, config: &Config) -> Result<Config, Error> {
        let block = self.block_bytes();
        let is_whole = |bytes: usize| block != 0 && bytes.is_multiple_of(block);
        if !is_whole(config.block_bytes) || !is_whole(config.seq_block_bytes) {
            return Err(Error::Config("bs= and seqbs= are multiples of the disk's block size"));
        }
        let size_max = match self.offered & F_SIZE_MAX {
            0 => 0,
            _ => self.transport.read_config_space::<u32>(8).unwrap_or(0) as usize,
        };
        // qemu-storage-daemon 7.2 offers the feature and says 0, which can only mean no limit.
        let size_max = if size_max == 0 { usize::MAX } else { size_max };
        let mut config = *config;
        for bytes in [&mut config.block_bytes, &mut config.seq_block_bytes] {
            if *bytes > size_max {
                println!("guest: requests of {size_max} bytes instead of {bytes}: the disk's SIZE_MAX");
                *bytes = size_max / block * block;
            }
        }
        if config.block_bytes.min(config.seq_block_bytes) == 0 {
            return Err(Error::Device("its SIZE_MAX is less than its block size"));
        }
        Ok(config)
    }

    /// Returns whether the disk refuses writes.
    pub fn read_only(&self) -> bool {
        self.offered & F_RO != 0
    }

    /// Returns whether the disk has a write cache to flush.
    pub fn has_flush(&self) -> bool {
        self.offered & F_FLUSH != 0
    }

    /// Returns the capacity in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.capacity.saturating_mul(SECTOR)
    }

    /// Reads the capacity anew; returns the number of sectors if it is another one than before.
    pub fn capacity_change(&mut self) -> Result<Option<u64>, Error> {
        let now = capacity(&self.transport)?;
        let before = core::mem::replace(&mut self.capacity, now);
        Ok((now != before).then_some(now))
    }

    /// Returns the number of slots.
    pub fn depth(&self) -> u16 {
        self.slots.len() as u16
    }

    /// Returns the number of requests in flight.
    pub fn inflight(&self) -> u16 {
        self.inflight
    }

    /// Returns how often the device was kicked.
    pub fn kicks(&self) -> u64 {
        ring!(&self.ring, ring => ring.kicks)
    }

    /// Returns the data of a slot that is not in flight.
    pub fn data(&mut self, slot: u16, len: usize) -> &mut [u8] {
        assert!(!self.slots[usize::from(slot)].busy);
        let each = self.data.len() / self.slots.len();
        &mut self.data[usize::from(slot) * each..][..len]
    }

    /// Submits a request in a free slot; its data, if it writes, is what [`Disk::data`] holds.
    pub fn start(&mut self, slot: u16, op: Op, sector: u64, len: usize) -> Result<(), Error> {
        let each = self.data.len() / self.slots.len();
        let at = usize::from(slot);
        assert!(len <= each && !self.slots[at].busy);
        let header = self.headers.wrapping_add(16 * at);
        let status = self.statuses.wrapping_add(at);
        // SAFETY: this slot's header and status; the slot is not in flight.
        unsafe {
            write_volatile(header.cast::<u32>(), op as u32);
            write_volatile(header.add(8).cast::<u64>(), sector);
            write_volatile(status, 0xff);
        }
        let data = self.data[at * each..].as_ptr() as u64;
        let device_writes = matches!(op, Op::Read | Op::GetId);
        let parts =
            Parts { header: header as u64, data, data_len: len as u32, device_writes, status: status as u64 };
        self.slots[at] = Slot { op: op as u32, sector, started: self.clock.now(), busy: true };
        ring!(&mut self.ring, ring => {
            ring.prepare(slot, parts);
            ring.submit(slot);
        });
        self.inflight += 1;
        Ok(())
    }

    /// Takes one completion if there is one.
    pub fn poll(&mut self) -> Result<Option<Done>, Error> {
        let Some(slot) = ring!(&mut self.ring, ring => ring.complete())? else { return Ok(None) };
        let at = usize::from(slot);
        let Some(state) = self.slots.get_mut(at).filter(|s| s.busy) else {
            return Err(Error::Device("it completed a request twice"));
        };
        state.busy = false;
        self.inflight -= 1;
        // SAFETY: this slot's status, which the device has written.
        let status = unsafe { read_volatile(self.statuses.add(at)) };
        if status != 0 {
            let op =
                [Op::Read, Op::Write, Op::Flush, Op::GetId].into_iter().find(|op| *op as u32 == state.op);
            return Err(Error::Status(op.unwrap_or(Op::Read), state.sector, status));
        }
        Ok(Some(Done { slot, ticks: self.clock.now().wrapping_sub(state.started) }))
    }

    /// Kicks if needed and waits for a completion.
    pub fn wait(&mut self) -> Result<Done, Error> {
        self.kick();
        let end = self.clock.now() + self.clock.ticks(self.timeout_secs);
        loop {
            if let Some(done) = self.poll()? {
                return Ok(done);
            }
            if self.clock.now() > end {
                return Err(Error::Timeout(self.timeout_secs, self.inflight));
            }
            spin_loop();
        }
    }

    /// Kicks the device if it wants to be.
    pub fn kick(&mut self) {
        ring!(&mut self.ring, ring => ring.kick(&mut self.transport));
    }

    /// Waits until nothing is in flight.
    pub fn wait_all(&mut self) -> Result<(), Error> {
        while self.inflight > 0 {
            self.wait()?;
        }
        Ok(())
    }

    /// Makes everything written durable; nothing may be in flight.
    pub fn flush(&mut self) -> Result<(), Error> {
        if self.has_flush() {
            self.start(0, Op::Flush, 0, 0)?;
            self.wait_all()?;
        }
        Ok(())
    }
}

/// The capacity in sectors, in halves: the configuration space is aligned to 4 bytes.
fn capacity(transport: &MmioTransport<'static>) -> Result<u64, Error> {
    let half = |at| transport.read_config_space::<u32>(at).map(u64::from);
    transport
        .read_consistent(|| Ok(half(0)? | half(4)? << 32))
        .map_err(|_| Error::Device("its configuration space has no capacity"))
}

struct Features(u64);

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        NAMES.iter().filter(|(bit, _)| self.0 & bit != 0).try_for_each(|(_, name)| write!(f, " {name}"))
    }
}
