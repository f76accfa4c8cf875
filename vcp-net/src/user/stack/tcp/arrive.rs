//! From guest to socket: one `sendmsg` out of the guest's memory per frame.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{Shutdown, shutdown};
use vcp_core::sock::{Gather, discard};

use super::{End, Key, TcpFlows, errno};
use crate::frame::OutFrame;
use crate::uplink::Sender;
use crate::user::packet::{Link, Packet};
use crate::user::stack::control;
use crate::user::stack::shared::Shared;
use crate::user::tcp::State;
use crate::user::tcp::segment::{SYN, Segment};

/// Room that a guest knows of below which the socket is asked for more.
pub(super) const LOW_ROOM: u32 = 256 << 10;

impl TcpFlows {
    /// Takes a segment of a guest.
    pub(in crate::user::stack) fn segment(
        &mut self,
        frame: &OutFrame<'_>,
        l4: &[u8],
        packet: &Packet,
        link: Link,
        from: Sender,
        shared: &mut Shared,
    ) {
        let Some(seg) = Segment::parse(l4).filter(|seg| usize::from(seg.header_bytes) <= packet.l4_bytes())
        else {
            shared.counters.drops.malformed += 1;
            return;
        };
        let header = usize::from(seg.header_bytes);
        let payload = (packet.l4_bytes() - header) as u32;
        let key = Key { guest: (packet.src, seg.from), remote: (packet.dst, seg.to), vid: link.vid };
        let found = self.keys.get(&key).copied();
        let fresh = seg.flags & (SYN | 0x14) == SYN;
        let old =
            found.and_then(|at| self.flows.get(at)).is_some_and(|flow| flow.conn.state == State::TimeWait);
        if let Some(at) = found.filter(|_| old && fresh) {
            // The guest uses the same numbers again.
            self.end(at, End::Well, shared);
        } else if let Some(at) = found {
            self.arrived(at, frame, &seg, payload, packet, link, shared);
            return;
        }
        if fresh {
            self.open(key, &seg, packet, link, from, shared);
            return;
        }
        shared.counters.drops.no_connection += 1;
        self.refuse(&seg, payload, packet, link, shared);
    }

    /// A segment of a connection.
    #[allow(clippy::too_many_arguments)] // What a packet is, in parts.
    fn arrived(
        &mut self,
        at: u32,
        frame: &OutFrame<'_>,
        seg: &Segment,
        payload: u32,
        packet: &Packet,
        link: Link,
        shared: &mut Shared,
    ) {
        let Some(flow) = self.flows.get_mut(at) else { return };
        flow.link = Some(link);
        let now = shared.ms;
        let outcome = flow.conn.segment(seg, payload, packet.src.is_ipv6(), now);
        shared.counters.tcp_odd += u64::from(outcome.odd);
        if outcome.reset {
            if flow.conn.state == State::SynSent {
                shared.counters.tcp_refused += 1;
            }
            self.end(at, End::Guest, shared);
            return;
        }
        if outcome.opened {
            if seg.has(SYN) {
                shared.counters.tcp_opened.1 += 1;
                flow.readable = true;
                Self::measure(flow, shared);
            } else {
                shared.counters.tcp_opened.0 += 1;
            }
        }
        let Some(socket) = &flow.socket else {
            self.queue(at);
            return;
        };
        if outcome.acked != 0 {
            let mut left = outcome.acked;
            while left != 0 {
                shared.counters.calls += 1;
                match discard(socket, left as usize) {
                    Ok(0) => break,
                    Ok(gone) => left -= (gone as u32).min(left),
                    Err(error) => {
                        let error = errno(&error);
                        self.failed(at, error, shared);
                        return;
                    }
                }
            }
            flow.peek_at = flow.peek_at.saturating_sub(outcome.acked);
            // Where the kernel cannot peek at an offset, what is thrown away now has hidden the end behind it.
            flow.readable |= flow.hung_up && !flow.conn.host_ended();
        }
        if outcome.out_of_order {
            self.out_of_order(at, frame, seg, &outcome, packet, shared);
        } else if outcome.deliver != 0 || outcome.fin {
            let offset = packet.l4_at + usize::from(seg.header_bytes) + outcome.skip as usize;
            let len = outcome.deliver as usize;
            let taken = match send(socket, frame, offset, len, shared) {
                Ok(taken) => taken,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => {
                    self.failed(at, errno(&error), shared);
                    return;
                }
            };
            shared.counters.tcp_out_bytes += taken as u64;
            let fin = outcome.fin && taken == len;
            if fin {
                shared.counters.calls += 1;
                let _ = shutdown(socket, Shutdown::Write);
            }
            flow.conn.received(taken as u32, fin, now);
            let short = taken < len;
            let gap = flow.ahead.is_some();
            shared.counters.tcp_short += u64::from(short);
            if !fin && (short || flow.conn.told_room() < LOW_ROOM) {
                Self::measure(flow, shared);
                if short || flow.conn.told_room() < u32::from(flow.conn.mss()) {
                    let token = flow.token;
                    if let Some(socket) = &flow.socket {
                        shared.watch_again(socket, token);
                    }
                }
            }
            if gap && !self.fill(at, shared) {
                return;
            }
        }
        self.finish(at, shared);
        self.queue(at);
        self.schedule(at);
    }

    /// Closes the socket of a connection that is over, whose guest may still have missed it.
    fn finish(&mut self, at: u32, shared: &mut Shared) {
        let Some(flow) = self.flows.get_mut(at) else { return };
        if flow.conn.state == State::TimeWait && flow.socket.take().is_some() {
            shared.counters.calls += 1;
        }
    }
}

/// Sends part of a frame; how much of it the socket took.
fn send(
    socket: &OwnedFd,
    frame: &OutFrame<'_>,
    offset: usize,
    len: usize,
    shared: &mut Shared,
) -> io::Result<usize> {
    if len == 0 {
        return Ok(0);
    }
    shared.counters.calls += 1;
    let copy;
    let mut gather = Gather::new(&mut shared.storage);
    match offset.checked_sub(frame.prefix.len()) {
        Some(at) => {
            gather.push_frame(&frame.frame, frame.skip + at, len);
        }
        None => {
            copy = control::copy(frame, offset, offset + len);
            gather.push_bytes(&copy);
        }
    }
    gather.send(socket)
}
