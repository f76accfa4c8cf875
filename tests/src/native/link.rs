//! The way from the guest to a back end: the rings of a vhost-user-net device, or QEMU's stream socket, on which each frame
//! has its length in front (4 bytes, network order).

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};

use anyhow::{Context, ensure};
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures as Protocol};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Result;

/// The beginning of a frame: all headers, with TCP's options.
pub(super) type Frame = [u8; 94];
/// Bytes of the header in front of a frame (VIRTIO 1.2, 5.1.6).
const HEADER: usize = 12;

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;
const MRG_RXBUF: u64 = 1 << 15;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;
const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const WRITE: u16 = 2;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT` and `VIRTQ_USED_F_NO_NOTIFY`: the guest looks all the time.
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// Entries of the receive ring, and bytes of each of its buffers (a page, as Linux has them).
const RX: u16 = 1024;
const RX_BYTES: u64 = 4096;
/// Entries of the transmit ring, and bytes of each of its buffers.
const TX: u16 = 64;
const TX_BYTES: u64 = 68 << 10;
/// Where the parts of memory are.
const RX_RING: u64 = 0;
const TX_RING: u64 = 0x1_0000;
const RX_DATA: u64 = 0x2_0000;
const TX_DATA: u64 = RX_DATA + RX as u64 * RX_BYTES;
const MEMORY: u64 = TX_DATA + TX as u64 * TX_BYTES;
/// Where our memory lies in the address space that the back end is told of.
const USER: u64 = 0x7000_0000_0000;
/// Bytes that are gathered before they are written to a stream.
const GATHER: usize = 256 << 10;

/// See the module.
#[derive(Debug)]
pub enum Link {
    /// A vhost-user-net device.
    Rings(Box<Rings>),
    /// A stream.
    Stream(Box<Stream>),
}

impl Link {
    /// The rings of a device.
    ///
    /// # Errors
    /// The back end is not there, or does not offer what is needed.
    pub fn rings(socket: &Path, offloads: bool) -> Result<Self> {
        Ok(Self::Rings(Box::new(Rings::connect(socket, offloads)?)))
    }

    /// A stream socket.
    ///
    /// # Errors
    /// The back end is not there.
    pub fn stream(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).context("connect")?;
        stream.set_nonblocking(true)?;
        let (out, got) = (Vec::with_capacity(2 * GATHER), vec![0; GATHER]);
        Ok(Self::Stream(Box::new(Stream { stream, out, written: 0, got, from: 0, to: 0 })))
    }

    pub(super) fn has_offloads(&self) -> bool {
        matches!(self, Self::Rings(rings) if rings.offloads)
    }

    /// Whether another frame can be sent.
    pub(super) fn has_room(&mut self) -> Result<bool> {
        match self {
            Self::Rings(rings) => Ok(rings.tx.in_flight(&rings.memory)? < TX),
            Self::Stream(stream) => {
                if stream.out.len() - stream.written >= GATHER {
                    stream.flush()?;
                }
                Ok(stream.out.len() - stream.written < GATHER)
            }
        }
    }

    /// Sends headers and `payload` zeroes behind them. `tcp`: its checksum may be left to the back end, and its segmentation, if
    /// it has the length of segments.
    pub(super) fn send(&mut self, head: &[u8], payload: usize, tcp: Option<Option<usize>>) -> Result<()> {
        match self {
            Self::Rings(rings) => rings.send(head, payload, tcp),
            Self::Stream(stream) => {
                let len = (head.len() + payload) as u32;
                stream.out.extend(len.to_be_bytes());
                stream.out.extend(head);
                stream.out.resize(stream.out.len() + payload, 0);
                Ok(())
            }
        }
    }

    /// What was sent is on its way.
    pub(super) fn flush(&mut self) -> Result<()> {
        match self {
            Self::Rings(rings) => rings.tx.publish(&rings.memory),
            Self::Stream(stream) => stream.flush(),
        }
    }

    /// The beginning of the next frame that came, and its length.
    pub(super) fn receive(&mut self) -> Result<Option<(Frame, usize)>> {
        match self {
            Self::Rings(rings) => rings.receive(),
            Self::Stream(stream) => stream.receive(),
        }
    }

    /// What came was looked at.
    pub(super) fn give_room(&mut self) -> Result<()> {
        match self {
            Self::Rings(rings) => rings.rx.publish(&rings.memory),
            Self::Stream(_) => Ok(()),
        }
    }
}

/// The driver's side of a split ring, whose descriptors are used in their order again and again.
#[derive(Debug)]
struct Ring {
    base: u64,
    size: u16,
    next: u16,
    published: u16,
    used: u16,
    kick: EventFd,
    call: EventFd,
}

impl Ring {
    fn new(base: u64, size: u16) -> Result<Self> {
        let (kick, call) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        Ok(Self { base, size, next: 0, published: 0, used: 0, kick, call })
    }

    fn avail(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used(&self) -> u64 {
        (self.avail() + 6 + 2 * u64::from(self.size)).next_multiple_of(64)
    }

    /// Offers descriptor `next` with this buffer.
    fn offer(&mut self, memory: &GuestMemoryMmap, addr: u64, len: u32, flags: u16) -> Result<()> {
        let at = self.next % self.size;
        let word = u64::from(len) | u64::from(flags) << 32;
        memory.write_obj([addr, word], GuestAddress(self.base + 16 * u64::from(at)))?;
        memory.write_obj(at, GuestAddress(self.avail() + 4 + 2 * u64::from(at)))?;
        self.next = self.next.wrapping_add(1);
        Ok(())
    }

    fn publish(&mut self, memory: &GuestMemoryMmap) -> Result<()> {
        if self.published == self.next {
            return Ok(());
        }
        self.published = self.next;
        memory.store(self.next.to_le(), GuestAddress(self.avail() + 2), Ordering::Release)?;
        fence(Ordering::SeqCst);
        let flags: u16 = memory.load(GuestAddress(self.used()), Ordering::Relaxed)?;
        if u16::from_le(flags) & NO_NOTIFY == 0 {
            self.kick.write(1)?;
        }
        Ok(())
    }

    fn used_index(&self, memory: &GuestMemoryMmap) -> Result<u16> {
        Ok(u16::from_le(memory.load(GuestAddress(self.used() + 2), Ordering::Acquire)?))
    }

    fn in_flight(&mut self, memory: &GuestMemoryMmap) -> Result<u16> {
        if self.next.wrapping_sub(self.used) >= self.size {
            self.used = self.used_index(memory)?;
        }
        Ok(self.next.wrapping_sub(self.used))
    }
}

/// See [`Link::rings`].
#[derive(Debug)]
pub struct Rings {
    memory: GuestMemoryMmap,
    rx: Ring,
    tx: Ring,
    offloads: bool,
    _file: File,
    _front: FrontEnd,
}

/// A connection, which stays open.
struct FrontEnd(#[allow(dead_code)] Frontend);

impl std::fmt::Debug for FrontEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FrontEnd")
    }
}

impl Rings {
    fn connect(socket: &Path, offloads: bool) -> Result<Self> {
        let file = File::from(rustix::fs::memfd_create("native", MemfdFlags::CLOEXEC)?);
        file.set_len(MEMORY)?;
        let range = (GuestAddress(0), usize::try_from(MEMORY)?, Some(FileOffset::new(file.try_clone()?, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range])?;
        let (mut rx, tx) = (Ring::new(RX_RING, RX)?, Ring::new(TX_RING, TX)?);
        for ring in [&rx, &tx] {
            memory.store(NO_INTERRUPT.to_le(), GuestAddress(ring.avail()), Ordering::Relaxed)?;
        }
        for at in 0..RX {
            rx.offer(&memory, RX_DATA + RX_BYTES * u64::from(at), RX_BYTES as u32, WRITE)?;
        }
        memory.store(rx.next.to_le(), GuestAddress(rx.avail() + 2), Ordering::Release)?;
        rx.published = rx.next;
        let mut front = Frontend::from_stream(UnixStream::connect(socket).context("connect")?, 2);
        front.set_owner()?;
        let mut wanted = VERSION_1 | PROTOCOL_FEATURES | MRG_RXBUF;
        if offloads {
            wanted |= CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4;
        }
        let offered = front.get_features()?;
        ensure!(offered & wanted == wanted, "features {:#x} are missing", wanted & !offered);
        front.set_features(wanted)?;
        let offered = front.get_protocol_features()?;
        front.set_protocol_features(offered & Protocol::REPLY_ACK)?;
        if offered.contains(Protocol::REPLY_ACK) {
            front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        front.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        }])?;
        for (n, ring) in [&rx, &tx].into_iter().enumerate() {
            front.set_vring_num(n, ring.size)?;
            front.set_vring_base(n, 0)?;
            front.set_vring_addr(
                n,
                &VringConfigData {
                    queue_max_size: ring.size,
                    queue_size: ring.size,
                    flags: 0,
                    desc_table_addr: USER + ring.base,
                    used_ring_addr: USER + ring.used(),
                    avail_ring_addr: USER + ring.avail(),
                    log_addr: None,
                },
            )?;
            front.set_vring_kick(n, &ring.kick)?;
            front.set_vring_call(n, &ring.call)?;
            front.set_vring_enable(n, true)?;
        }
        Ok(Self { memory, rx, tx, offloads, _file: file, _front: FrontEnd(front) })
    }

    fn send(&mut self, head: &[u8], payload: usize, tcp: Option<Option<usize>>) -> Result<()> {
        // An answer must not wait for room.
        while self.tx.in_flight(&self.memory)? >= TX {
            self.tx.publish(&self.memory)?;
        }
        let mut bytes = [0; HEADER + 62];
        if let (true, Some(segments)) = (self.offloads, tcp) {
            bytes[0] = NEEDS_CSUM;
            bytes[6..10].copy_from_slice(&[34, 0, 16, 0]);
            if let Some(mss) = segments {
                bytes[1] = GSO_TCPV4;
                bytes[2] = head.len() as u8;
                bytes[4..6].copy_from_slice(&(mss as u16).to_le_bytes());
            }
        }
        bytes[HEADER..HEADER + head.len()].copy_from_slice(head);
        let at = TX_DATA + TX_BYTES * u64::from(self.tx.next % TX);
        self.memory.write_slice(&bytes[..HEADER + head.len()], GuestAddress(at))?;
        self.tx.offer(&self.memory, at, (HEADER + head.len() + payload) as u32, 0)
    }

    fn receive(&mut self) -> Result<Option<(Frame, usize)>> {
        let index = self.rx.used_index(&self.memory)?;
        if index == self.rx.used {
            return Ok(None);
        }
        let (mut frame, mut total, mut count, mut taken) = ([0; 94], 0, 1u16, 0);
        while taken < count {
            ensure!(
                index.wrapping_sub(self.rx.used) != 0,
                "a frame in {count} buffers, of which {taken} came"
            );
            let at = self.rx.used() + 4 + 8 * u64::from(self.rx.used % RX);
            let [id, len]: [u32; 2] = self.memory.read_obj(GuestAddress(at))?;
            let buffer = RX_DATA + RX_BYTES * u64::from(id % u32::from(RX));
            if taken == 0 {
                let mut bytes = [0; HEADER + 94];
                let near = bytes.len().min(len as usize);
                self.memory.read_slice(&mut bytes[..near], GuestAddress(buffer))?;
                count = u16::from_le_bytes([bytes[10], bytes[11]]).max(1);
                frame.copy_from_slice(&bytes[HEADER..]);
            }
            total += len as usize;
            taken += 1;
            self.rx.used = self.rx.used.wrapping_add(1);
            self.rx.offer(&self.memory, buffer, RX_BYTES as u32, WRITE)?;
        }
        Ok(Some((frame, total.saturating_sub(HEADER))))
    }
}

/// See [`Link::stream`].
#[derive(Debug)]
pub struct Stream {
    stream: UnixStream,
    out: Vec<u8>,
    written: usize,
    got: Vec<u8>,
    from: usize,
    to: usize,
}

impl Stream {
    fn flush(&mut self) -> Result<()> {
        while self.written < self.out.len() {
            match self.stream.write(&self.out[self.written..]) {
                Ok(len) => self.written += len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if self.written > GATHER {
                        self.out.drain(..self.written);
                        self.written = 0;
                    }
                    return Ok(());
                }
                Err(error) => return Err(error).context("write to the back end"),
            }
        }
        self.out.clear();
        self.written = 0;
        Ok(())
    }

    fn receive(&mut self) -> Result<Option<(Frame, usize)>> {
        loop {
            let here = &self.got[self.from..self.to];
            if let Some((len, rest)) = here.split_first_chunk::<4>() {
                let len = u32::from_be_bytes(*len) as usize;
                ensure!(len <= self.got.len() - 4, "a frame of {len} bytes");
                if let Some(bytes) = rest.get(..len) {
                    let mut frame = [0; 94];
                    let near = len.min(frame.len());
                    frame[..near].copy_from_slice(&bytes[..near]);
                    self.from += 4 + len;
                    return Ok(Some((frame, len)));
                }
            }
            self.got.copy_within(self.from..self.to, 0);
            (self.from, self.to) = (0, self.to - self.from);
            match self.stream.read(&mut self.got[self.to..]) {
                Ok(0) => anyhow::bail!("the back end closed the stream"),
                Ok(len) => self.to += len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error).context("read from the back end"),
            }
        }
    }
}
