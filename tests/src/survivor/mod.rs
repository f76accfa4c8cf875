//! A vhost-user-blk front end that outlives its backends, as QEMU does with `reconnect=`: its rings, its memory and the
//! in-flight log stay, and each backend gets them anew.

mod ring;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures as Protocol,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Result;
use ring::{Part, Ring};

/// Bytes of a request's data.
pub const CHUNK: usize = 4096;
/// Requests in flight per queue at most.
pub const DEPTH: usize = 32;
/// Entries of each ring.
const QUEUE_SIZE: u16 = 128;
/// Where our memory lies in the address space that the backend is told of.
const USER: u64 = 0x7000_0000_0000;
/// Memory of a request: header and status in the first page, data in the second.
const SLOT: u64 = 8192;
const STATUS: u64 = 16;
const TABLE: u64 = 64;
const DATA: u64 = 4096;
/// What an epoll event is about.
const CALLED: u64 = 0;
const GONE: u64 = 1;
/// How long a set-up message may take.
const MESSAGE: Duration = Duration::from_secs(20);

const VERSION_1: u64 = 1 << 32;
const RING_PACKED: u64 = 1 << 34;
const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const BLK_MQ: u64 = 1 << 12;
const BLK_FLUSH: u64 = 1 << 9;

/// What to do with a chunk of the disk.
#[derive(Clone, Debug)]
pub enum Ask {
    /// Read [`CHUNK`] bytes at this offset.
    Read(u64),
    /// Write these [`CHUNK`] bytes at this offset.
    Write(u64, Vec<u8>),
    /// Flush.
    Flush,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// The slot that was given to [`Survivor::submit`].
    pub slot: usize,
    /// The status byte.
    pub status: u8,
    /// Data of a read.
    pub data: Vec<u8>,
}

/// What [`Survivor::wait`] saw.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// There may be answers.
    Answers,
    /// The backend is gone.
    Gone,
}

struct Queue {
    ring: Ring,
    kick: EventFd,
    call: EventFd,
    /// Whether the request in a slot is a read.
    reads: Vec<bool>,
}

/// See the module.
pub struct Survivor {
    memory: Arc<GuestMemoryMmap>,
    file: File,
    queues: Vec<Queue>,
    packed: bool,
    log: Option<(VhostUserInflight, File)>,
    connection: Option<(Frontend, UnixStream)>,
    /// Call descriptors and the end of the connection.
    waiting: Epoll,
    started: u64,
}

impl std::fmt::Debug for Survivor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Survivor").field("queues", &self.queues.len()).finish_non_exhaustive()
    }
}

fn slots_at(queues: usize) -> u64 {
    queues as u64 * Ring::bytes(QUEUE_SIZE)
}

impl Survivor {
    /// Rings and memory for `queues` queues, without a backend.
    pub fn new(queues: usize, packed: bool) -> Result<Self> {
        let len = slots_at(queues) + (queues * DEPTH) as u64 * SLOT;
        let file = File::from(rustix::fs::memfd_create("survivor", MemfdFlags::CLOEXEC)?);
        file.set_len(len)?;
        let range = (GuestAddress(0), usize::try_from(len)?, Some(FileOffset::new(file.try_clone()?, 0)));
        let memory = Arc::new(GuestMemoryMmap::from_ranges_with_files([range])?);
        let queue = |n: usize| {
            let base = n as u64 * Ring::bytes(QUEUE_SIZE);
            Ok(Queue {
                ring: Ring::new(&memory, base, QUEUE_SIZE, packed, DEPTH),
                kick: EventFd::new(0)?,
                call: EventFd::new(EFD_NONBLOCK)?,
                reads: vec![false; DEPTH],
            })
        };
        let queues = (0..queues).map(queue).collect::<Result<Vec<_>>>()?;
        let waiting = Epoll::new()?;
        for queue in &queues {
            let event = EpollEvent::new(EventSet::IN, CALLED);
            waiting.ctl(ControlOperation::Add, queue.call.as_raw_fd(), event)?;
        }
        Ok(Self { memory, file, queues, packed, log: None, connection: None, waiting, started: 0 })
    }

    /// Connects to a backend and hands it everything; what the log says is in flight is its business now.
    pub fn connect(&mut self, socket: &Path) -> Result<()> {
        self.leave()?;
        let stream = UnixStream::connect(socket).context("connect")?;
        stream.set_read_timeout(Some(MESSAGE))?;
        stream.set_write_timeout(Some(MESSAGE))?;
        let watch = stream.try_clone()?;
        let mut front = Frontend::from_stream(stream, self.queues.len() as u64);
        front.set_owner()?;
        let mut wanted = VERSION_1 | INDIRECT_DESC | EVENT_IDX | PROTOCOL_FEATURES | BLK_FLUSH;
        wanted |= if self.packed { RING_PACKED } else { 0 };
        wanted |= if self.queues.len() > 1 { BLK_MQ } else { 0 };
        let offered = front.get_features()?;
        ensure!(offered & wanted == wanted, "features {:#x} are missing", wanted & !offered);
        front.set_features(wanted)?;
        let protocol = Protocol::MQ | Protocol::CONFIG | Protocol::REPLY_ACK | Protocol::INFLIGHT_SHMFD;
        let offered = front.get_protocol_features()?;
        ensure!(offered.contains(protocol), "protocol features {:?} are missing", protocol - offered);
        front.set_protocol_features(protocol)?;
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        if self.log.is_none() {
            let geometry = VhostUserInflight::new(0, 0, u16::try_from(self.queues.len())?, QUEUE_SIZE);
            self.log = Some(front.get_inflight_fd(&geometry).context("GET_INFLIGHT_FD")?);
        }
        let (spec, file) = self.log.as_ref().context("no log")?;
        front.set_inflight_fd(spec, file.as_raw_fd()).context("SET_INFLIGHT_FD")?;
        front.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: self.file.metadata()?.len(),
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }])?;
        for (n, queue) in self.queues.iter().enumerate() {
            front.set_vring_num(n, QUEUE_SIZE)?;
            front.set_vring_base(n, queue.ring.base()?)?;
            front.set_vring_addr(
                n,
                &VringConfigData {
                    queue_max_size: QUEUE_SIZE,
                    queue_size: QUEUE_SIZE,
                    flags: 0,
                    desc_table_addr: USER + queue.ring.desc,
                    used_ring_addr: USER + queue.ring.device,
                    avail_ring_addr: USER + queue.ring.driver,
                    log_addr: None,
                },
            )?;
            front.set_vring_kick(n, &queue.kick).with_context(|| format!("start queue {n}"))?;
            front.set_vring_call(n, &queue.call)?;
            front.set_vring_enable(n, true)?;
        }
        // Level-triggered: an end that came before is told as well.
        let event = EpollEvent::new(EventSet::READ_HANG_UP, GONE);
        self.waiting.ctl(ControlOperation::Add, watch.as_raw_fd(), event)?;
        self.connection = Some((front, watch));
        Ok(())
    }

    /// Ends the connection. It is told not to be watched any more: closing it is not enough for that while another process has
    /// it, too (any child between its fork and its exec), and then the end of this one would be taken for the next one's.
    fn leave(&mut self) -> Result<()> {
        if let Some((_, watch)) = self.connection.take() {
            let none = EpollEvent::default();
            self.waiting.ctl(ControlOperation::Delete, watch.as_raw_fd(), none).context("watch no longer")?;
        }
        Ok(())
    }

    /// The connection once more, as a child has it between its fork and its exec.
    pub fn duplicate(&self) -> Result<UnixStream> {
        let (_, watch) = self.connection.as_ref().context("not connected")?;
        Ok(watch.try_clone()?)
    }

    /// Requests in flight on `queue`.
    pub fn in_flight(&self, queue: usize) -> usize {
        self.queues[queue].ring.in_flight()
    }

    fn slot(&self, queue: usize, slot: usize) -> u64 {
        slots_at(self.queues.len()) + (queue * DEPTH + slot) as u64 * SLOT
    }

    /// Puts a request into the free slot `slot` of `queue`.
    pub fn submit(&mut self, queue: usize, slot: usize, ask: &Ask) -> Result<()> {
        let at = self.slot(queue, slot);
        let (kind, offset) = match ask {
            Ask::Read(offset) => (0u32, *offset),
            Ask::Write(offset, data) => {
                ensure!(data.len() == CHUNK, "{} bytes are no chunk", data.len());
                self.memory.write_slice(data, GuestAddress(at + DATA))?;
                (1, *offset)
            }
            Ask::Flush => (4, 0),
        };
        if kind == 0 {
            // What was there before must not pass for what was read.
            self.memory.write_slice(&[0xee; CHUNK], GuestAddress(at + DATA))?;
        }
        self.memory.write_obj(u64::from(kind.to_le()), GuestAddress(at))?;
        self.memory.write_obj((offset / 512).to_le(), GuestAddress(at + 8))?;
        self.memory.write_obj(0xffu8, GuestAddress(at + STATUS))?;
        let data_len = if kind == 4 { 0 } else { CHUNK as u32 };
        let parts = [
            Part { addr: at, len: 16, writable: false },
            Part { addr: at + DATA, len: data_len, writable: kind == 0 },
            Part { addr: at + STATUS, len: 1, writable: true },
        ];
        self.started += 1;
        let table = self.started.is_multiple_of(2).then_some(at + TABLE);
        let queue = &mut self.queues[queue];
        queue.reads[slot] = kind == 0;
        if queue.ring.offer(u16::try_from(slot)?, parts, table)? {
            queue.kick.write(1)?;
        }
        Ok(())
    }

    /// The answers that are there.
    pub fn answers(&mut self, queue: usize) -> Result<Vec<Answer>> {
        let mut answers = Vec::new();
        while let Some((slot, _)) = self.queues[queue].ring.take_used()? {
            let slot = usize::from(slot);
            let at = self.slot(queue, slot);
            let status = self.memory.read_obj(GuestAddress(at + STATUS))?;
            let mut data = vec![0; if self.queues[queue].reads[slot] { CHUNK } else { 0 }];
            self.memory.read_slice(&mut data, GuestAddress(at + DATA))?;
            answers.push(Answer { slot, status, data });
        }
        Ok(answers)
    }

    /// Waits until a queue was interrupted or the backend is gone. An answer without its interrupt is a failure after
    /// `deadline`, as it would be in a guest.
    pub fn wait(&self, deadline: Duration) -> Result<Event> {
        let end = Instant::now() + deadline;
        ensure!(self.connection.is_some(), "not connected");
        loop {
            for queue in &self.queues {
                if queue.ring.arm()? {
                    return Ok(Event::Answers);
                }
            }
            let left = end.saturating_duration_since(Instant::now());
            let mut events = [EpollEvent::default(); 8];
            // Rounded up, so that the last wait is no spin.
            let left_ms = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
            match self.waiting.wait(left_ms, &mut events) {
                Ok(0) if left.is_zero() => {
                    for (n, queue) in self.queues.iter().enumerate() {
                        ensure!(!queue.ring.arm()?, "queue {n}: an answer without its interrupt");
                    }
                    bail!("no answer within {deadline:?}: {} in flight", self.in_flight(0));
                }
                Ok(ready) => {
                    if events[..ready].iter().any(|event| event.data() == GONE) {
                        return Ok(Event::Gone);
                    }
                    for queue in &self.queues {
                        let _ = queue.call.read();
                    }
                    if ready > 0 {
                        return Ok(Event::Answers);
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("wait for interrupts"),
            }
        }
    }
}
