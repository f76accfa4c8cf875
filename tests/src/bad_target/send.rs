//! A connection's sending side: counters, digests, bytes.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use iscsi::digest::digest_bytes;
use iscsi::params::Negotiated;
use iscsi::pdu::Opcode;
use iscsi::pdu::framing::Digests;
use iscsi::scsi::Lun;
use iscsi::serial::Serial;
use socket2::SockRef;

use super::answer::{Numbers, Out};
use super::task::Task;

/// A connection, and the session that it has or had: commands that hang outlive it until the session is reinstated.
#[derive(Debug)]
pub struct Conn {
    /// Its number.
    pub id: usize,
    pub(super) stream: TcpStream,
    /// Nothing ended it yet.
    pub open: bool,
    /// Nothing is read or sent.
    pub stalled: bool,
    /// In full feature phase.
    pub negotiated: Option<Negotiated>,
    pub(super) digests: Digests,
    /// InitiatorName, ISID and portal group: the session's name (RFC 7143 4.4.3.1).
    pub name: Option<(String, [u8; 6], u16)>,
    pub(super) stat_sn: Serial,
    pub(super) exp_cmd_sn: Serial,
    pub(super) window: u32,
    /// Highest MaxCmdSN told in a way that counts.
    pub(super) max_told: Serial,
    /// ExpStatSN of the initiator.
    pub(super) acknowledged: Serial,
    pub(super) tasks: BTreeMap<u32, Task>,
    pub(super) hung: Vec<Task>,
    /// Our pings.
    pub(super) pings: BTreeMap<u32, Lun>,
    pub(super) logged_out: bool,
    pub(super) next_ttt: u32,
    /// The text that is being sent in pieces: to which task, under which tag, what is left.
    pub(super) text: Option<(u32, u32, Vec<u8>)>,
    /// Answers still to come.
    pub(super) later: usize,
    /// What was sent while stalled.
    pub(super) held_back: Vec<Out>,
}

impl Conn {
    pub(super) fn new(id: usize, stream: TcpStream) -> Self {
        let _ = stream.set_write_timeout(Some(Duration::from_secs(5)));
        let _ = stream.set_nodelay(true);
        Self {
            id,
            stream,
            open: true,
            stalled: false,
            negotiated: None,
            digests: Digests::default(),
            name: None,
            stat_sn: Serial(0),
            exp_cmd_sn: Serial(0),
            window: 1,
            max_told: Serial(0),
            acknowledged: Serial(0),
            tasks: BTreeMap::new(),
            hung: Vec::new(),
            pings: BTreeMap::new(),
            logged_out: false,
            next_ttt: 0x100,
            text: None,
            later: 0,
            held_back: Vec::new(),
        }
    }

    /// Ends it, by FIN or RST.
    pub fn close(&mut self, reset: bool) {
        self.open = false;
        if reset {
            let _ = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
        }
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// The bytes of a PDU, with counters as of now.
    fn bytes(&mut self, out: &mut Out) -> Vec<u8> {
        if out.numbers == Numbers::None {
            return out.data.clone();
        }
        let stat_sn = match out.numbers {
            Numbers::Status => Some(self.stat_sn.take()),
            Numbers::Next => Some(self.stat_sn),
            Numbers::Window | Numbers::None | Numbers::Fin => None,
        };
        let max = self.exp_cmd_sn.add(self.window).sub(1);
        let header = &mut out.header;
        header[24..28].copy_from_slice(&stat_sn.map_or([0; 4], |sn| sn.0.to_be_bytes()));
        header[28..32].copy_from_slice(&self.exp_cmd_sn.0.to_be_bytes());
        header[32..36].copy_from_slice(&max.0.to_be_bytes());
        for edit in &out.edits {
            edit.apply(header);
        }
        let word = |at: usize| {
            Serial(u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]))
        };
        let (exp, max) = (word(28), word(32));
        if !max.is_before(exp.sub(1)) && max.is_after(self.max_told) {
            self.max_told = max;
        }
        if header[0] & 0x3F == Opcode::NopIn as u8 && header[20..24] != [0xFF; 4] {
            let ttt = u32::from_be_bytes([header[20], header[21], header[22], header[23]]);
            self.pings.insert(ttt, Lun(header[8..16].try_into().unwrap_or_default()));
        }
        let mut bytes = header.to_vec();
        if self.digests.header {
            bytes.extend_from_slice(&digest_bytes(header));
            if out.spoil_header {
                bytes[50] ^= 0x55;
            }
        }
        let from = bytes.len();
        bytes.extend_from_slice(&out.data);
        bytes.resize(from + out.data.len().next_multiple_of(4), 0);
        if self.digests.data && !out.data.is_empty() {
            let digest = digest_bytes(&bytes[from..]);
            bytes.extend_from_slice(&digest);
            if out.spoil_data {
                bytes[from] ^= 0x55;
            }
        }
        bytes
    }

    /// Sends PDUs, up to `truncate` bytes of them; what was sent.
    pub(super) fn send(&mut self, outs: Vec<Out>, truncate: Option<usize>) -> Vec<[u8; 48]> {
        if !self.open {
            return Vec::new();
        }
        if self.stalled {
            self.held_back.extend(outs);
            return Vec::new();
        }
        let mut bytes = Vec::new();
        let mut sent = Vec::new();
        let fin = outs.iter().any(|out| out.numbers == Numbers::Fin);
        for mut out in outs.into_iter().filter(|out| out.numbers != Numbers::Fin) {
            bytes.extend(self.bytes(&mut out));
            sent.push(out.header);
        }
        if let Some(n) = truncate {
            bytes.truncate(n);
        }
        if self.stream.write_all(&bytes).is_err() || truncate.is_some() {
            self.close(false);
        } else if fin {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        sent
    }
}
