//! The third-party front end: `virtio-driver` over vhost-user, with deadlines on everything.

mod arena;
mod message;

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags as Blk, VirtioBlkQueue, VirtioBlkReqBuf,
    VirtioBlkTransport, VirtioFeatureFlags as Virtio,
};

use crate::Result;
use arena::Arena;
pub use message::BackendMessages;

/// How long one request may take; recovery of a connection is within it.
pub const REQUEST: Duration = Duration::from_secs(60);
/// How long the vhost-user set-up may take.
const CONNECT: Duration = Duration::from_secs(20);
/// Entries of each virtqueue; a request takes three to five.
const QUEUE_SIZE: u16 = 256;
/// Requests in flight per queue at most.
pub const DEPTH: usize = 32;
/// Longest request in bytes.
pub const MAX_BYTES: usize = 1 << 20;

/// What a request did not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// VIRTIO_BLK_S_IOERR.
    Io,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
    /// A status that the standard does not know.
    Other(i32),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io => f.write_str("VIRTIO_BLK_S_IOERR"),
            Self::Unsupported => f.write_str("VIRTIO_BLK_S_UNSUPP"),
            Self::Other(n) => write!(f, "status {n}"),
        }
    }
}

impl std::error::Error for Failure {}

/// What to ask of the disk. Offsets and lengths are in bytes, multiples of 512.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read `len` bytes at `offset`.
    Read {
        /// Where.
        offset: u64,
        /// How much.
        len: usize,
    },
    /// Write these bytes at `offset`.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Make durable what was completed before.
    Flush,
    /// Give back a range.
    Discard {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Zero a range.
    WriteZeroes {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// May be deallocated.
        unmap: bool,
    },
}

/// A completed request.
#[derive(Debug)]
pub struct Done {
    /// The number that [`Driver::submit`] gave.
    pub id: u64,
    /// Data of a read, or what failed.
    pub result: std::result::Result<Vec<u8>, Failure>,
    /// The buffer that it used, see [`Driver::memory`]; the next request may use it again.
    pub buffer: usize,
}

/// What the device says in its configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Logical block size in bytes; 0 without VIRTIO_BLK_F_BLK_SIZE.
    pub block_bytes: u32,
    /// Segments in a request.
    pub seg_max: u32,
    /// Bytes in a segment.
    pub size_max: u32,
    /// Request queues.
    pub queues: u16,
    /// Write-back cache.
    pub write_cache: bool,
    /// Sectors in a discard segment.
    pub max_discard_sectors: u32,
    /// Discard segments in a request.
    pub max_discard_segments: u32,
    /// Alignment of a discard in sectors.
    pub discard_alignment: u32,
    /// Sectors in a write-zeroes segment.
    pub max_write_zeroes_sectors: u32,
}

struct Slot {
    id: u64,
    read_len: Option<usize>,
}

struct Queue {
    ring: VirtioBlkQueue<'static, usize>,
    free: Vec<usize>,
    slots: Vec<Option<Slot>>,
    done: VecDeque<Done>,
    in_flight: usize,
}

/// A disk behind a vhost-user socket.
pub struct Driver {
    // Dropped in this order: the connection first, so that the device lets go of the memory.
    transport: Box<VirtioBlkTransport>,
    queues: Vec<Queue>,
    arena: Arena,
    features: u64,
    next_id: u64,
    pieces: usize,
    socket: PathBuf,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("queues", &self.queues.len()).finish_non_exhaustive()
    }
}

/// All features that this front end knows to use.
pub fn all_features() -> u64 {
    (Virtio::VERSION_1 | Virtio::RING_EVENT_IDX | Virtio::RING_INDIRECT_DESC).bits() | Blk::all().bits()
}

impl Driver {
    /// Connects to a backend and starts `queues` queues, with every feature that both sides know.
    pub fn connect(socket: &Path, queues: usize) -> Result<Self> {
        Self::connect_with(socket, queues, all_features())
    }

    /// The same with the given features at most.
    pub fn connect_with(socket: &Path, queues: usize, features: u64) -> Result<Self> {
        let path = socket.to_str().context("socket path is not UTF-8")?.to_owned();
        // virtio-driver waits for answers without a deadline; a thread of its own lets us have one.
        let (sender, made) = channel();
        thread::spawn(move || {
            let made = Self::set_up(&path, queues, features);
            let _ = sender.send(made);
        });
        match made.recv_timeout(CONNECT) {
            Ok(made) => made.with_context(|| format!("connect to {}", socket.display())),
            Err(RecvTimeoutError::Timeout) => bail!("{} did not answer within {CONNECT:?}", socket.display()),
            Err(RecvTimeoutError::Disconnected) => bail!("the set-up of {} panicked", socket.display()),
        }
    }

    fn set_up(path: &str, queues: usize, features: u64) -> Result<Self> {
        let vhost: VhostUser<VirtioBlkConfig, VirtioBlkReqBuf> = VhostUser::new(path, features)?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(vhost);
        let features = transport.get_features();
        let arena = Arena::new(&mut *transport, queues * DEPTH, MAX_BYTES)?;
        let rings = VirtioBlkQueue::setup_queues(&mut *transport, queues, QUEUE_SIZE)?;
        let queues = rings.into_iter().enumerate().map(|(n, mut ring)| {
            ring.set_used_notif_enabled(true);
            Queue {
                ring,
                free: (n * DEPTH..(n + 1) * DEPTH).rev().collect(),
                slots: (0..DEPTH).map(|_| None).collect(),
                done: VecDeque::new(),
                in_flight: 0,
            }
        });
        Ok(Self {
            queues: queues.collect(),
            transport,
            arena,
            features,
            next_id: 0,
            pieces: 1,
            socket: path.into(),
        })
    }

    /// Cuts the data of each following request into this many descriptors.
    pub fn set_pieces(&mut self, pieces: usize) {
        self.pieces = pieces;
    }

    /// Negotiated features.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether a virtio-blk feature was negotiated.
    pub fn has(&self, feature: Blk) -> bool {
        self.features & feature.bits() == feature.bits()
    }

    /// Number of queues in use.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// Reads the configuration space.
    pub fn config(&self) -> Result<Config> {
        let c = self.transport.get_config().context("read the configuration space")?;
        // Copies out of a packed structure.
        let (capacity, blk_size, seg_max, size_max, num_queues) =
            (c.capacity, c.blk_size, c.seg_max, c.size_max, c.num_queues);
        let (ds, dg, da, wz) = (
            c.max_discard_sectors,
            c.max_discard_seg,
            c.discard_sector_alignment,
            c.max_write_zeroes_sectors,
        );
        Ok(Config {
            size_bytes: capacity.to_native() * 512,
            block_bytes: blk_size.to_native(),
            seg_max: seg_max.to_native(),
            size_max: size_max.to_native(),
            queues: num_queues.to_native(),
            write_cache: c.writeback != 0,
            max_discard_sectors: ds.to_native(),
            max_discard_segments: dg.to_native(),
            discard_alignment: da.to_native(),
            max_write_zeroes_sectors: wz.to_native(),
        })
    }

    /// Turns the write cache on or off, as the guest's driver does (VIRTIO_BLK_F_CONFIG_WCE).
    pub fn set_write_cache(&mut self, on: bool) -> Result<()> {
        message::set_write_cache(&self.socket, on)
    }

    /// Asks for the back end's messages.
    pub fn backend_messages(&mut self) -> Result<BackendMessages> {
        BackendMessages::open(&self.socket)
    }

    /// Requests that `queue` still has in flight.
    pub fn in_flight(&self, queue: usize) -> usize {
        self.queues[queue].in_flight
    }

    /// Puts a request into a queue and kicks; returns its number.
    pub fn submit(&mut self, queue: usize, op: &Op) -> Result<u64> {
        let q = &mut self.queues[queue];
        let slot = q.free.pop().context("all requests of the queue are in flight")?;
        let ring = &mut q.ring;
        let mut read_len = None;
        let queued = match op {
            Op::Read { offset, len } => {
                read_len = Some(*len);
                if *len > self.arena.slot_bytes() {
                    bail!("read of {len} bytes is longer than a buffer");
                }
                self.arena.read(ring, *offset, slot, *len, self.pieces)
            }
            Op::Write { offset, data } => self
                .arena
                .put(slot, data)
                .and_then(|()| self.arena.write(ring, *offset, slot, data.len(), self.pieces)),
            Op::Flush => ring.flush(slot).map_err(Into::into),
            Op::Discard { offset, len } => ring.discard(*offset, *len, slot).map_err(Into::into),
            Op::WriteZeroes { offset, len, unmap } => {
                ring.write_zeroes(*offset, *len, *unmap, slot).map_err(Into::into)
            }
        };
        if let Err(e) = queued {
            q.free.push(slot);
            return Err(e).context("queue a request");
        }
        let id = self.next_id;
        self.next_id += 1;
        q.slots[slot % DEPTH] = Some(Slot { id, read_len });
        q.in_flight += 1;
        if q.ring.avail_notif_needed() {
            self.transport.get_submission_notifier(queue).notify().context("kick")?;
        }
        Ok(id)
    }

    /// What is in a buffer now: after its request was answered, nobody but the driver may change it.
    pub fn memory(&self, buffer: usize, len: usize) -> Result<Vec<u8>> {
        let mut data = vec![0; len];
        self.arena.get(buffer, &mut data)?;
        Ok(data)
    }

    /// Fills a buffer whose request was answered.
    pub fn set_memory(&self, buffer: usize, data: &[u8]) -> Result<()> {
        self.arena.put(buffer, data)
    }

    /// Waits for the next completion on a queue.
    pub fn wait(&mut self, queue: usize, deadline: Duration) -> Result<Done> {
        let end = Instant::now() + deadline;
        loop {
            self.collect(queue)?;
            if let Some(done) = self.queues[queue].done.pop_front() {
                return Ok(done);
            }
            if self.queues[queue].in_flight == 0 {
                bail!("queue {queue} has nothing in flight");
            }
            let left = end.saturating_duration_since(Instant::now());
            let fd = self.transport.get_completion_fd(queue);
            let time = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let ready = poll(&mut [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)], Some(&time));
            match ready {
                Ok(0) => bail!(
                    "queue {queue} completed none of its {} requests within {deadline:?}",
                    self.queues[queue].in_flight
                ),
                Ok(_) => {
                    fd.read().context("read the call descriptor")?;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e).context("wait for the call descriptor"),
            }
        }
    }

    fn collect(&mut self, queue: usize) -> Result<()> {
        let q = &mut self.queues[queue];
        for completion in q.ring.completions() {
            let slot = completion.context;
            let Some(entry) = q.slots[slot % DEPTH].take() else {
                return Err(anyhow!("queue {queue} completed slot {slot} twice"));
            };
            let result = match -completion.ret {
                0 => Ok(match entry.read_len {
                    Some(len) => {
                        let mut data = vec![0; len];
                        self.arena.get(slot, &mut data)?;
                        data
                    }
                    None => Vec::new(),
                }),
                5 => Err(Failure::Io),
                95 => Err(Failure::Unsupported),
                other => Err(Failure::Other(other)),
            };
            q.free.push(slot);
            q.in_flight -= 1;
            q.done.push_back(Done { id: entry.id, result, buffer: slot });
        }
        Ok(())
    }

    /// Does one request on a queue that has nothing else in flight. The inner result is the device's answer.
    pub fn request(&mut self, queue: usize, op: &Op) -> Result<std::result::Result<Vec<u8>, Failure>> {
        let id = self.submit(queue, op)?;
        let done = self.wait(queue, REQUEST)?;
        if done.id != id {
            bail!("request {id} was waited for, {} came", done.id);
        }
        Ok(done.result)
    }

    /// Reads on queue 0.
    pub fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>> {
        self.request(0, &Op::Read { offset, len })?.with_context(|| format!("read {len} bytes at {offset}"))
    }

    /// Writes on queue 0.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let op = Op::Write { offset, data: data.to_vec() };
        self.request(0, &op)?.with_context(|| format!("write {} bytes at {offset}", data.len()))?;
        Ok(())
    }

    /// Flushes on queue 0.
    pub fn flush(&mut self) -> Result<()> {
        self.request(0, &Op::Flush)?.context("flush")?;
        Ok(())
    }

    /// Discards on queue 0.
    pub fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        let op = Op::Discard { offset, len };
        self.request(0, &op)?.with_context(|| format!("discard {len} bytes at {offset}"))?;
        Ok(())
    }

    /// Writes zeroes on queue 0.
    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let op = Op::WriteZeroes { offset, len, unmap };
        self.request(0, &op)?.with_context(|| format!("write {len} zeroes at {offset}"))?;
        Ok(())
    }
}
