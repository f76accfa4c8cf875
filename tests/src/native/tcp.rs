//! The guest's TCP: one connection, payload of zeroes, everything in order or not at all. It fills the peer's window, cuts
//! rows of segments where the link takes them (and segments of the MTU where not), acknowledges once for all that came
//! together, and sends everything again from the first byte that is missing when nothing moves.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::bail;

use super::link::{Frame, Link};
use crate::Result;

/// Bytes of the headers: Ethernet, IPv4, TCP without options.
pub(super) const HEADERS: usize = 54;
/// The guest's address.
const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const PORT: u16 = 40_000;
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;
/// The guest's window: 64 KiB times 128.
const SCALE: u8 = 7;
const WINDOW: u16 = 0xffff;
/// Bytes that a row of segments has at most.
const ROW: usize = 65_000;
/// After so long without progress everything is sent again.
const STALL: Duration = Duration::from_millis(200);

/// What frames the guest sends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) offloads: bool,
    pub(super) mtu: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Resolving,
    Opening,
    Open,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Conn {
    link: Link,
    address: Ipv4Addr,
    gateway: Ipv4Addr,
    gateway_mac: [u8; 6],
    port: u16,
    shape: Shape,
    state: State,
    /// The first byte that is not acknowledged, the next one to send, the last one that was ever sent.
    una: u32,
    next: u32,
    most: u32,
    /// What the peer takes.
    mss: usize,
    window: u32,
    scale: u8,
    /// The next byte of the peer.
    expected: u32,
    same: u32,
    /// Where sending again ends: duplicates that it causes do not begin it anew (RFC 6582).
    recover: u32,
    progress: Instant,
    /// Bytes that came in order.
    pub(super) received: u64,
    /// Times that everything was sent again.
    pub(super) resent: u64,
}

impl Conn {
    pub(super) fn new(link: Link, address: Ipv4Addr, gateway: Ipv4Addr, port: u16, shape: Shape) -> Self {
        Self {
            link,
            address,
            gateway,
            gateway_mac: [0xff; 6],
            port,
            shape,
            state: State::Resolving,
            una: 1000,
            next: 1000,
            most: 1000,
            mss: 536,
            window: 0,
            scale: 0,
            expected: 0,
            same: 0,
            recover: 1000,
            // It asks at once.
            progress: Instant::now().checked_sub(STALL).unwrap_or_else(Instant::now),
            received: 0,
            resent: 0,
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.state == State::Open
    }

    pub(super) fn in_flight(&self) -> u32 {
        self.most.wrapping_sub(self.una)
    }

    /// Takes what came, and sends what has to be sent now.
    pub(super) fn poll(&mut self) -> Result<()> {
        let before = self.expected;
        let (mut frames, mut answer) = (0, false);
        while let Some((frame, len)) = self.link.receive()? {
            frames += 1;
            match u16::from_be_bytes([frame[12], frame[13]]) {
                0x0806 => self.resolve(&frame)?,
                0x0800 if frame[23] == 6 => answer |= self.segment(&frame, len)?,
                _ => {}
            }
        }
        if frames != 0 {
            self.link.give_room()?;
        }
        if answer || before != self.expected {
            self.send_segment(ACK, self.next, 0)?;
        }
        if self.progress.elapsed() >= STALL {
            self.again()?;
        }
        self.link.flush()
    }

    fn again(&mut self) -> Result<()> {
        self.progress = Instant::now();
        match self.state {
            State::Resolving => self.ask(1, [0xff; 6], [0; 6], self.gateway),
            State::Opening => self.send_segment(SYN, self.una, 0),
            State::Open if self.una != self.next => {
                self.resent += 1;
                self.recover = self.most;
                self.next = self.una;
                self.refill()
            }
            State::Open => Ok(()),
        }
    }

    /// Sends what was sent before.
    fn refill(&mut self) -> Result<()> {
        let left = self.most.wrapping_sub(self.next) as usize;
        let len = left.min(self.unit());
        if len != 0 {
            self.send_segment(ACK | PSH, self.next, len)?;
            self.next = self.next.wrapping_add(len as u32);
        }
        Ok(())
    }

    /// Payload of a frame.
    fn unit(&self) -> usize {
        if self.shape.offloads { ROW / self.mss * self.mss } else { self.mss }
    }

    /// Fills the peer's window, as far as the link has room.
    pub(super) fn fill(&mut self) -> Result<()> {
        let unit = self.unit();
        loop {
            let out = self.next.wrapping_sub(self.una);
            let room = self.window.saturating_sub(out) as usize;
            // No silly windows.
            if room < unit && (out != 0 || room < self.mss) || !self.link.has_room()? {
                break;
            }
            let len = room.min(unit);
            self.send_segment(ACK | PSH, self.next, len)?;
            self.next = self.next.wrapping_add(len as u32);
            self.note_most();
        }
        self.link.flush()
    }

    /// Sends a message.
    pub(super) fn send(&mut self, len: usize) -> Result<()> {
        self.progress = Instant::now();
        self.send_segment(ACK | PSH, self.next, len)?;
        self.next = self.next.wrapping_add(len as u32);
        self.note_most();
        self.link.flush()
    }

    fn note_most(&mut self) {
        if self.next.wrapping_sub(self.most) < 1 << 31 {
            self.most = self.next;
        }
    }

    /// What follows is not to meet a timer of what was before.
    pub(super) fn stop_filling(&mut self) {
        self.progress = Instant::now();
    }

    fn resolve(&mut self, frame: &Frame) -> Result<()> {
        let sender = Ipv4Addr::new(frame[28], frame[29], frame[30], frame[31]);
        let target = Ipv4Addr::new(frame[38], frame[39], frame[40], frame[41]);
        let mac = [frame[22], frame[23], frame[24], frame[25], frame[26], frame[27]];
        if frame[21] == 1 && target == self.address {
            return self.ask(2, mac, mac, sender);
        }
        if frame[21] == 2 && sender == self.gateway && self.state == State::Resolving {
            self.gateway_mac = mac;
            self.state = State::Opening;
            self.progress = Instant::now();
            self.send_segment(SYN, self.una, 0)?;
            self.next = self.una.wrapping_add(1);
            self.note_most();
        }
        Ok(())
    }

    /// An ARP request (1) or reply (2).
    fn ask(&mut self, what: u8, to: [u8; 6], target_mac: [u8; 6], target: Ipv4Addr) -> Result<()> {
        let mut frame = [0; HEADERS + 8];
        frame[..6].copy_from_slice(&to);
        frame[6..12].copy_from_slice(&MAC);
        frame[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, what]);
        frame[22..28].copy_from_slice(&MAC);
        frame[28..32].copy_from_slice(&self.address.octets());
        frame[32..38].copy_from_slice(&target_mac);
        frame[38..42].copy_from_slice(&target.octets());
        self.link.send(&frame[..60], 0, None)
    }

    /// A segment came; whether it asks for an answer by itself.
    fn segment(&mut self, frame: &Frame, len: usize) -> Result<bool> {
        let word = |at: usize| u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]);
        let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
        let (seq, ack, flags) = (word(38), word(42), frame[47]);
        let headers = 20 + usize::from(frame[46] >> 4) * 4;
        let window = u32::from(u16::from_be_bytes([frame[48], frame[49]]));
        // A row of segments may say nothing of its length.
        let total = if total == 0 { len - 14 } else { total };
        let payload = total.saturating_sub(headers);
        if flags & (RST | FIN) != 0 {
            bail!("the peer ended the connection (flags {flags:#x}) in {:?}", self.state);
        }
        if flags & SYN != 0 {
            if self.state == State::Opening {
                self.options(&frame[54..(14 + headers).min(frame.len())]);
                (self.expected, self.una, self.window) = (seq.wrapping_add(1), ack, window);
                self.state = State::Open;
            }
            self.progress = Instant::now();
            return Ok(true);
        }
        let acked = ack.wrapping_sub(self.una);
        if acked != 0 && acked <= self.in_flight() {
            self.una = ack;
            // Sent again from too far behind.
            if self.next.wrapping_sub(self.una) >= 1 << 31 {
                self.next = self.una;
            }
            (self.progress, self.same) = (Instant::now(), 0);
            if self.next != self.most {
                self.refill()?;
            }
        } else if acked == 0 && payload == 0 && self.una != self.next {
            let moved = self.window != window << self.scale;
            self.same = if moved { 0 } else { self.same + 1 };
            if self.same == 3 && self.una.wrapping_sub(self.recover) < 1 << 31 {
                self.resent += 1;
                self.recover = self.most;
                self.next = self.una;
                self.refill()?;
            }
        }
        self.window = window << self.scale;
        if payload == 0 {
            return Ok(false);
        }
        if seq == self.expected {
            self.expected = self.expected.wrapping_add(payload as u32);
            self.received += payload as u64;
            return Ok(false);
        }
        // Another part than the next one: what is missing is asked for.
        Ok(true)
    }

    fn options(&mut self, mut options: &[u8]) {
        while let [kind, rest @ ..] = options {
            options = match (kind, rest) {
                (0, _) => return,
                (1, rest) => rest,
                (2, [4, a, b, ..]) => {
                    let most = self.shape.mtu - 40;
                    self.mss = usize::from(u16::from_be_bytes([*a, *b])).min(most);
                    &rest[3..]
                }
                (3, [3, scale, ..]) => {
                    self.scale = *scale;
                    &rest[2..]
                }
                (_, [len, ..]) => rest.get(usize::from(*len).max(2) - 1..).unwrap_or(&[]),
                _ => return,
            };
        }
    }

    fn send_segment(&mut self, flags: u8, seq: u32, payload: usize) -> Result<()> {
        let mut frame = [0; HEADERS + 8];
        let options = if flags & SYN == 0 { 0 } else { 8 };
        let l4 = 20 + options + payload;
        frame[..6].copy_from_slice(&self.gateway_mac);
        frame[6..12].copy_from_slice(&MAC);
        frame[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
        frame[16..18].copy_from_slice(&(20 + l4 as u16).to_be_bytes());
        frame[20..24].copy_from_slice(&[0x40, 0, 64, 6]);
        frame[26..30].copy_from_slice(&self.address.octets());
        frame[30..34].copy_from_slice(&self.gateway.octets());
        let header = !fold(sum(&frame[14..34]));
        frame[24..26].copy_from_slice(&header.to_be_bytes());
        frame[34..36].copy_from_slice(&PORT.to_be_bytes());
        frame[36..38].copy_from_slice(&self.port.to_be_bytes());
        frame[38..42].copy_from_slice(&seq.to_be_bytes());
        if flags & ACK != 0 {
            frame[42..46].copy_from_slice(&self.expected.to_be_bytes());
        }
        frame[46] = ((20 + options) as u8 / 4) << 4;
        frame[47] = flags;
        frame[48..50].copy_from_slice(&WINDOW.to_be_bytes());
        if options != 0 {
            let mss = (self.shape.mtu - 40) as u16;
            frame[54..56].copy_from_slice(&[2, 4]);
            frame[56..58].copy_from_slice(&mss.to_be_bytes());
            frame[58..62].copy_from_slice(&[3, 3, SCALE, 1]);
        }
        let pseudo = sum(&frame[26..34]) + 6 + l4 as u64;
        // Zeroes add nothing to a checksum.
        let whole = pseudo + sum(&frame[34..54 + options]);
        let field = if self.shape.offloads { fold(pseudo) } else { !fold(whole) };
        frame[50..52].copy_from_slice(&field.to_be_bytes());
        let mss = (payload > self.mss).then_some(self.mss);
        self.link.send(&frame[..HEADERS + options], payload, Some(mss))
    }
}

fn sum(bytes: &[u8]) -> u64 {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let whole: u64 = pairs.iter().map(|&pair| u64::from(u16::from_be_bytes(pair))).sum();
    whole + rest.first().map_or(0, |&last| u64::from(last) << 8)
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
