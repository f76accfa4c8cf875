//! A vhost-user front end with a driver, and a server to talk to: both in this process, joined by a real socket.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vcp_core::handover::giver::Giving;
use vcp_core::mem::GuestMap;
use vcp_core::poll::PollMode;
use vcp_core::process::Signals;
use vcp_core::uring::{self, IoMode};
use vcp_core::vu::listen::SocketFile;
use vcp_core::vu::{DeviceSpec, ServeError, ServeOptions};
use vcp_iscsi::blk::BlkDevice;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::driver::DriverRing;
use super::engine::Lun;
use super::mem_engine::{Control, MemEngine};

/// Longest wait for anything that should happen.
pub const DEADLINE: Duration = Duration::from_secs(20);
pub const MEMORY_BYTES: u64 = 16 << 20;
/// Where the front end claims to have the guest's memory.
const USER_BASE: u64 = 0x7f12_0000_0000;
const RING_PACKED: u64 = 1 << 34;
const PROTOCOL: u64 = 1 << 30;
const EVENT_IDX: u64 = 1 << 29;

/// Which server runs the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Poll(PollMode),
    /// As `Poll`, with io_uring (where this kernel has it).
    Ring(PollMode),
    Epoll,
}

pub struct Server {
    pub dir: tempfile::TempDir,
    pub control: Arc<Mutex<Control>>,
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Server {
    pub fn start(kind: Kind, lun: Lun, depth: usize, queues: u16) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let engine = MemEngine::new(lun, depth);
        let control = Arc::clone(&engine.control);
        let device = BlkDevice::new(engine, queues);
        let socket = SocketFile::bind(&dir.path().join("vu")).unwrap();
        let specs = vec![DeviceSpec { name: "disk0".into(), socket, device }];
        let (signals, stop) = Signals::embedded().unwrap();
        let (poll, io) = match kind {
            Kind::Poll(mode) => (mode, IoMode::Plain),
            Kind::Ring(mode) => (mode, IoMode::Auto),
            Kind::Epoll => (PollMode::Adaptive, IoMode::Plain),
        };
        let ring = uring::choose(io).unwrap();
        let giving = Giving { program: "test".into(), offer: serde_json::json!({"offered": 1}) };
        let control_socket = Some(SocketFile::bind(&dir.path().join("ctl")).unwrap());
        let options = ServeOptions {
            poll,
            ring: ring.into(),
            control: control_socket,
            giving: Some(giving),
            ..ServeOptions::default()
        };
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let extra = Box::new(serde_json::Map::new);
            let ready = move || ready.send(()).unwrap();
            match kind {
                Kind::Poll(_) | Kind::Ring(_) => {
                    vcp_core::vu::serve(specs, options, &signals, extra, ready).map(drop)
                }
                Kind::Epoll => vcp_core::epoll::serve(specs, options, &signals, extra, ready),
            }
        });
        is_ready.recv_timeout(DEADLINE).expect("the server gets ready");
        Self { dir, control, stop: Some(stop), thread: Some(thread) }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("vu")
    }

    pub fn hold(&self, held: bool) {
        self.control.lock().unwrap().held = held;
    }

    /// Asks the control socket.
    pub fn ask(&self, request: &str) -> serde_json::Value {
        use std::io::{BufRead, BufReader, Write};
        let mut stream = UnixStream::connect(self.dir.path().join("ctl")).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        writeln!(stream, "{request}").unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// Ends the server; what it says.
    pub fn result(&mut self) -> Result<(), ServeError> {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap()
    }

    /// Ends the server; how long that took.
    pub fn end(mut self) -> Duration {
        let start = Instant::now();
        self.result().unwrap();
        assert!(!self.socket().exists(), "the socket file stays behind");
        start.elapsed()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Guest memory that outlives connections, as a guest's does.
pub struct Guest {
    pub file: File,
    pub map: Arc<GuestMap>,
}

impl Guest {
    pub fn new() -> Self {
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("guest", flags).unwrap());
        file.set_len(MEMORY_BYTES).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(0), MEMORY_BYTES as usize, Some(offset))];
        let map = Arc::new(GuestMap::from_ranges_with_files(ranges).unwrap());
        Self { file, map }
    }

    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY_BYTES,
            userspace_addr: USER_BASE,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    pub fn ring(&self, queue: u16, size: u16) -> DriverRing {
        DriverRing::new(&self.map, 0x1_0000 * (1 + u64::from(queue)), size, true)
    }
}

/// One queue of a connected front end.
pub struct Queue {
    pub ring: DriverRing,
    pub kick: EventFd,
    pub call: EventFd,
    pub err: EventFd,
}

pub struct Front {
    pub frontend: Frontend,
    pub queues: Vec<Queue>,
    pub features: u64,
}

impl Front {
    /// Connects and negotiates; no ring runs yet.
    pub fn connect(path: &Path, queues: u16) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut frontend = Frontend::from_stream(stream, queues.into());
        frontend.set_owner().unwrap();
        // It drives split rings.
        let features = frontend.get_features().unwrap() & !RING_PACKED;
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        }
        assert_eq!(frontend.get_queue_num().unwrap(), u64::from(queues));
        assert!(features & (PROTOCOL | EVENT_IDX) == PROTOCOL | EVENT_IDX);
        frontend.set_features(features).unwrap();
        Self { frontend, queues: Vec::new(), features }
    }

    /// Connects and starts the given rings, each from its own position as far as the device used it.
    pub fn start(path: &Path, guest: &Guest, rings: Vec<DriverRing>) -> Self {
        let mut front = Self::connect(path, rings.len() as u16);
        front.frontend.set_mem_table(&[guest.region()]).unwrap();
        for (index, ring) in rings.into_iter().enumerate() {
            let base = ring.used_idx();
            front.start_ring(index, ring, base);
        }
        front
    }

    pub fn start_ring(&mut self, index: usize, ring: DriverRing, base: u16) {
        let eventfd = || EventFd::new(libc_nonblock()).unwrap();
        let queue = Queue { ring, kick: eventfd(), call: eventfd(), err: eventfd() };
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, queue.ring.size).unwrap();
        let config = VringConfigData {
            queue_max_size: queue.ring.size,
            queue_size: queue.ring.size,
            flags: 0,
            desc_table_addr: USER_BASE + queue.ring.desc,
            used_ring_addr: USER_BASE + queue.ring.used,
            avail_ring_addr: USER_BASE + queue.ring.avail,
            log_addr: None,
        };
        frontend.set_vring_addr(index, &config).unwrap();
        frontend.set_vring_base(index, base).unwrap();
        frontend.set_vring_call(index, &queue.call).unwrap();
        frontend.set_vring_err(index, &queue.err).unwrap();
        frontend.set_vring_kick(index, &queue.kick).unwrap();
        frontend.set_vring_enable(index, true).unwrap();
        self.queues.insert(index, queue);
    }
}

fn libc_nonblock() -> i32 {
    rustix::event::EventfdFlags::NONBLOCK.bits() as i32
}

/// A request as a test describes it.
#[derive(Clone, Debug)]
pub struct Io {
    pub kind: u32,
    pub sector: u64,
    /// Device-readable after the header.
    pub out: Vec<u8>,
    /// Device-writable before the status.
    pub in_bytes: u32,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    pub status: u8,
    pub used_len: u32,
    pub data: Vec<u8>,
}

impl Queue {
    /// Guest memory for the request in `place`.
    fn place(place: u64) -> u64 {
        0x10_0000 + place * 0x4_0000
    }

    /// Adds a request in one of 48 places and kicks if the device wants it; returns the head.
    pub fn submit(&mut self, place: u64, io: &Io) -> u16 {
        let at = Self::place(place);
        let map = Arc::clone(&self.ring.map);
        map.write_obj(io.kind.to_le(), GuestAddress(at)).unwrap();
        map.write_obj(io.sector.to_le(), GuestAddress(at + 8)).unwrap();
        map.write_obj(0xffu8, GuestAddress(at + 16)).unwrap();
        let data = at + 0x1000;
        map.write_slice(&io.out, GuestAddress(data)).unwrap();
        let mut buffers = vec![(at, 16, false)];
        // Two pieces where that is possible.
        let halves = |len: u32| [(data, len / 2), (data + u64::from(len / 2), len - len / 2)];
        buffers.extend(
            halves(io.out.len() as u32).iter().filter(|half| half.1 > 0).map(|half| (half.0, half.1, false)),
        );
        buffers
            .extend(halves(io.in_bytes).iter().filter(|half| half.1 > 0).map(|half| (half.0, half.1, true)));
        buffers.push((at + 16, 1, true));
        let old = self.ring.avail_idx;
        let head = if place.is_multiple_of(2) {
            self.ring.add(&buffers)
        } else {
            self.ring.add_indirect(at + 0x100, &buffers)
        };
        let head = head.expect("the ring has room");
        if self.ring.needs_kick(old) {
            self.kick.write(1).unwrap();
        }
        head
    }

    /// Waits for the next used element, by the call descriptor alone.
    pub fn wait(&mut self) -> (u16, u32) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(used) = self.ring.take_used() {
                return used;
            }
            if self.ring.arm() {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(wait_readable(&self.call, left), "no used element in time");
            let _ = self.call.read();
        }
    }

    /// What the request in `place` left in memory.
    pub fn result(&self, place: u64, io: &Io, used_len: u32) -> Done {
        let at = Self::place(place);
        let mut data = vec![0; io.in_bytes as usize];
        self.ring.map.read_slice(&mut data, GuestAddress(at + 0x1000)).unwrap();
        let status = self.ring.map.read_obj(GuestAddress(at + 16)).unwrap();
        Done { status, used_len, data }
    }

    /// One request from start to end.
    pub fn one(&mut self, io: &Io) -> Done {
        let head = self.submit(0, io);
        let (used, len) = self.wait();
        assert_eq!(used, head);
        self.result(0, io, len)
    }

    pub fn read(&mut self, sector: u64, bytes: u32) -> Done {
        self.one(&Io { kind: 0, sector, out: Vec::new(), in_bytes: bytes })
    }

    pub fn write(&mut self, sector: u64, data: &[u8]) -> Done {
        self.one(&Io { kind: 1, sector, out: data.to_vec(), in_bytes: 0 })
    }
}

pub fn wait_readable(fd: &impl AsRawFd, timeout: Duration) -> bool {
    let epoll = Epoll::new().unwrap();
    epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::IN, 0)).unwrap();
    let mut events = [EpollEvent::default()];
    epoll.wait(timeout.as_millis() as i32, &mut events).unwrap() == 1
}
