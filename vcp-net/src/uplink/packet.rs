//! A network interface of the host, through a packet socket with headers: the kernel finishes what goes out, and leaves
//! what comes in as unfinished as it has it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vcp_core::device::Wait;
use vcp_core::handover::state::{BadState, NotNow};
use vcp_core::handover::{FdIndex, Fds};
use vcp_core::sock::{Gather, IovStorage};

use super::{Ingress, Sender, Sent, Taken, Uplink, sys};
use crate::frame::ether::{TAG_BYTES, VLAN};
use crate::frame::vnet::SHORT_HEADER_BYTES;
use crate::frame::{MAX_FRAME_BYTES, Offloads, OutFrame, VnetHeader};

/// Frames that are received in a turn.
const PER_TURN: usize = 64;
/// Bytes of both addresses.
const ADDRESSES: usize = 12;

/// See the module.
#[derive(Debug)]
pub struct Packet {
    name: String,
    socket: OwnedFd,
    mtu: usize,
    storage: IovStorage,
    buffer: Box<[u8]>,
    /// A frame in the buffer that its target had no room for: its length and tag.
    pending: Option<(usize, Option<u16>)>,
    counters: Counters,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Counters {
    received: u64,
    sent: u64,
    full: u64,
    refused: u64,
    too_long: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    name: String,
    fd: FdIndex,
    mtu: usize,
    pending: Option<(Vec<u8>, Option<u16>)>,
    counters: Counters,
}

impl Packet {
    /// The interface `name`. This needs `CAP_NET_RAW`, which is given up afterwards.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn open(name: &str) -> io::Result<Self> {
        let socket = sys::open_packet(name)?;
        let mtu = sys::mtu(socket.as_fd(), name)?;
        Ok(Self::new(name.to_owned(), socket, mtu))
    }

    fn new(name: String, socket: OwnedFd, mtu: usize) -> Self {
        Self {
            name,
            socket,
            mtu,
            storage: IovStorage::new(),
            buffer: vec![0; SHORT_HEADER_BYTES + MAX_FRAME_BYTES].into(),
            pending: None,
            counters: Counters::default(),
        }
    }

    /// Goes on where another process stopped.
    pub(super) fn restore(state: Value, fds: &mut Fds) -> Result<Self, BadState> {
        let failed = |source| BadState::Json { what: "a packet uplink", source };
        let State { name, fd, mtu, pending, counters } = serde_json::from_value(state).map_err(failed)?;
        let mut this = Self::new(name, fds.take(fd)?, mtu);
        this.counters = counters;
        if let Some((bytes, tag)) = pending {
            let room = this.buffer.get_mut(..bytes.len());
            let room = room.ok_or_else(|| BadState::Text("a frame that is longer than any".into()))?;
            room.copy_from_slice(&bytes);
            this.pending = Some((bytes.len(), tag));
        }
        Ok(this)
    }

    /// Gives the frame in the buffer to the switch.
    fn pass_on(&self, len: usize, tag: Option<u16>, into: &mut dyn Ingress) -> Taken {
        let Some((header, bytes)) = self.buffer[..len].split_first_chunk::<SHORT_HEADER_BYTES>() else {
            return Taken::Done;
        };
        let meta = VnetHeader::parse(header);
        let frame = OutFrame::of(meta, bytes);
        match (tag, bytes.get(..ADDRESSES)) {
            (Some(tci), Some(addresses)) => {
                // As it was on the wire.
                let mut head = [0; ADDRESSES + TAG_BYTES];
                head[..ADDRESSES].copy_from_slice(addresses);
                head[ADDRESSES..ADDRESSES + 2].copy_from_slice(&VLAN.to_be_bytes());
                head[ADDRESSES + 2..].copy_from_slice(&tci.to_be_bytes());
                into.frame(&OutFrame {
                    meta: meta.shifted(TAG_BYTES as i16),
                    prefix: &head,
                    frame: frame.frame,
                    skip: ADDRESSES,
                    len_bytes: bytes.len() - ADDRESSES,
                })
            }
            _ => into.frame(&frame),
        }
    }
}

impl Uplink for Packet {
    fn kind(&self) -> &'static str {
        "packet"
    }

    fn offloads(&self) -> Offloads {
        // Packet sockets know segmentation of TCP; that of UDP by the kernel's version, which is not relied on.
        Offloads { uso4: false, uso6: false, ..Offloads::ALL }
    }

    fn mtu(&self) -> usize {
        self.mtu
    }

    fn send(&mut self, frame: &OutFrame<'_>, _from: Sender) -> Sent {
        let header = frame.meta.emit();
        let total = SHORT_HEADER_BYTES + frame.total_bytes();
        let mut gather = Gather::new(&mut self.storage);
        gather.push_bytes(&header[..SHORT_HEADER_BYTES]);
        gather.push_bytes(frame.prefix);
        gather.push_frame(&frame.frame, frame.skip, frame.len_bytes);
        if gather.len_bytes() != total {
            // In more pieces than one call takes.
            self.counters.refused += 1;
            return Sent::Refused;
        }
        match gather.send(&self.socket) {
            Ok(_) => {
                self.counters.sent += 1;
                Sent::Done
            }
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock
                    || error.raw_os_error() == Some(libc::ENOBUFS) =>
            {
                self.counters.full += 1;
                Sent::Full
            }
            // The interface is down, or the kernel finds the header wrong.
            Err(_) => {
                self.counters.refused += 1;
                Sent::Refused
            }
        }
    }

    fn receive(&mut self, into: &mut dyn Ingress, _now: Instant) -> bool {
        let mut moved = false;
        if let Some((len, tag)) = self.pending {
            if self.pass_on(len, tag, into) == Taken::Full {
                return false;
            }
            (self.pending, moved) = (None, true);
        }
        for _ in 0..PER_TURN {
            match sys::receive_packet(&self.socket, &mut self.buffer) {
                Ok((len, tag)) => {
                    moved = true;
                    self.counters.received += 1;
                    if self.pass_on(len, tag, into) == Taken::Full {
                        self.pending = Some((len, tag));
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::InvalidData => self.counters.too_long += 1,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nothing is there, or the interface is down.
                Err(_) => break,
            }
        }
        moved
    }

    fn waits<'a>(&'a self, add: &mut dyn FnMut(Wait<'a>)) {
        // A frame that waits for room is woken by the ring that has none.
        if self.pending.is_none() {
            add(Wait { fd: Some(self.socket.as_fd()), ..Wait::default() });
        }
    }

    fn status(&self) -> Value {
        json!({ "kind": "packet", "name": self.name, "mtu": self.mtu, "counters": self.counters })
    }

    fn export(&self, fds: &mut Fds, _now: Instant) -> Result<Value, NotNow> {
        let state = State {
            name: self.name.clone(),
            fd: fds.put_copy(&self.socket)?,
            mtu: self.mtu,
            pending: self.pending.map(|(len, tag)| (self.buffer[..len].to_vec(), tag)),
            counters: self.counters,
        };
        serde_json::to_value(state).map_err(|error| NotNow::Never(error.to_string()))
    }
}
