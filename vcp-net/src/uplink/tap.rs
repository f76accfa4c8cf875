//! A TAP device of the host, with headers: frames pass unfinished in both directions.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

use rustix::net::{AddressFamily, SocketType, socket};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vcp_core::device::Wait;
use vcp_core::handover::state::{BadState, NotNow};
use vcp_core::handover::{FdIndex, Fds};
use vcp_core::sock::{Gather, IovStorage};

use super::{Ingress, Sender, Sent, Taken, Uplink, sys};
use crate::frame::vnet::{HEADER_BYTES, SHORT_HEADER_BYTES};
use crate::frame::{MAX_FRAME_BYTES, Offloads, OutFrame, VnetHeader};

/// Frames that are read in a turn.
const PER_TURN: usize = 64;

/// See the module.
#[derive(Debug)]
pub struct Tap {
    name: String,
    tun: File,
    /// It passes UDP segmentation as well.
    uso: bool,
    mtu: usize,
    storage: IovStorage,
    buffer: Box<[u8]>,
    /// Bytes of a frame in the buffer that its target had no room for.
    pending: usize,
    /// Such a frame waits: there is no use in reading more.
    held: bool,
    counters: Counters,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Counters {
    read: u64,
    written: u64,
    full: u64,
    refused: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    name: String,
    fd: FdIndex,
    uso: bool,
    mtu: usize,
    pending: Vec<u8>,
    counters: Counters,
}

impl Tap {
    /// The device `name`. It need not exist if this process may create it; whoever made it can give it to an ordinary user.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn open(name: &str) -> io::Result<Self> {
        let tun = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")?;
        sys::attach_tap(&tun, name)?;
        let uso = sys::set_tap_offloads(&tun)?;
        let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
        let mtu = sys::mtu(any.as_fd(), name)?;
        Ok(Self::new(name.to_owned(), tun, uso, mtu))
    }

    fn new(name: String, tun: File, uso: bool, mtu: usize) -> Self {
        Self {
            name,
            tun,
            uso,
            mtu,
            storage: IovStorage::new(),
            buffer: vec![0; HEADER_BYTES + MAX_FRAME_BYTES].into(),
            pending: 0,
            held: false,
            counters: Counters::default(),
        }
    }

    /// Goes on where another process stopped.
    pub(super) fn restore(state: Value, fds: &mut Fds) -> Result<Self, BadState> {
        let failed = |source| BadState::Json { what: "a TAP uplink", source };
        let State { name, fd, uso, mtu, pending, counters } =
            serde_json::from_value(state).map_err(failed)?;
        let mut tap = Self::new(name, File::from(fds.take(fd)?), uso, mtu);
        let room = tap.buffer.get_mut(..pending.len());
        let room = room.ok_or_else(|| BadState::Text("a frame that is longer than any".into()))?;
        room.copy_from_slice(&pending);
        (tap.pending, tap.counters) = (pending.len(), counters);
        Ok(tap)
    }

    /// Gives the frame in the buffer to the switch.
    fn pass_on(&mut self, len: usize, into: &mut dyn Ingress) -> bool {
        let Some((header, bytes)) = self.buffer[..len].split_at_checked(HEADER_BYTES) else { return true };
        let mut short = [0; SHORT_HEADER_BYTES];
        short.copy_from_slice(&header[..SHORT_HEADER_BYTES]);
        match into.frame(&OutFrame::of(VnetHeader::parse(&short), bytes)) {
            Taken::Done => true,
            Taken::Full => false,
        }
    }
}

impl Uplink for Tap {
    fn kind(&self) -> &'static str {
        "tap"
    }

    fn offloads(&self) -> Offloads {
        Offloads { uso4: self.uso, uso6: self.uso, ..Offloads::ALL }
    }

    fn mtu(&self) -> usize {
        self.mtu
    }

    fn send(&mut self, frame: &OutFrame<'_>, _from: Sender) -> Sent {
        let header = frame.meta.emit();
        let total = HEADER_BYTES + frame.total_bytes();
        let mut gather = Gather::new(&mut self.storage);
        gather.push_bytes(&header);
        gather.push_bytes(frame.prefix);
        gather.push_frame(&frame.frame, frame.skip, frame.len_bytes);
        if gather.len_bytes() != total {
            // In more pieces than one call takes.
            self.counters.refused += 1;
            return Sent::Refused;
        }
        match gather.write(&self.tun) {
            Ok(_) => {
                self.counters.written += 1;
                Sent::Done
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.counters.full += 1;
                Sent::Full
            }
            // The device is down, or the kernel finds the header wrong.
            Err(_) => {
                self.counters.refused += 1;
                Sent::Refused
            }
        }
    }

    fn receive(&mut self, into: &mut dyn Ingress, _now: Instant) -> bool {
        let mut moved = false;
        if self.pending != 0 {
            if !self.pass_on(self.pending, into) {
                self.held = true;
                return false;
            }
            (self.pending, moved) = (0, true);
        }
        self.held = false;
        for _ in 0..PER_TURN {
            match (&self.tun).read(&mut self.buffer) {
                Ok(len) => {
                    moved = true;
                    self.counters.read += 1;
                    if !self.pass_on(len, into) {
                        (self.pending, self.held) = (len, true);
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nothing is there, or the device is down.
                Err(_) => break,
            }
        }
        moved
    }

    fn waits<'a>(&'a self, add: &mut dyn FnMut(Wait<'a>)) {
        // A frame that waits for room is woken by the ring that has none.
        if !self.held {
            add(Wait { fd: Some(self.tun.as_fd()), ..Wait::default() });
        }
    }

    fn status(&self) -> Value {
        json!({ "kind": "tap", "name": self.name, "mtu": self.mtu, "uso": self.uso, "counters": self.counters })
    }

    fn export(&self, fds: &mut Fds, _now: Instant) -> Result<Value, NotNow> {
        let state = State {
            name: self.name.clone(),
            fd: fds.put_copy(&self.tun)?,
            uso: self.uso,
            mtu: self.mtu,
            pending: self.buffer[..self.pending].to_vec(),
            counters: self.counters,
        };
        serde_json::to_value(state).map_err(|error| NotNow::Never(error.to_string()))
    }
}
