//! What guests send behind a gap: it is kept, as far as there is room, told to them, and goes to the socket when the gap is
//! filled. None of it is acknowledged before the socket has it, so that all of it may be thrown away: a process that takes
//! over has none of it.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{Shutdown, shutdown};
use vcp_core::sock::Gather;

use super::arrive::LOW_ROOM;
use super::{TcpFlows, errno};
use crate::frame::OutFrame;
use crate::user::packet::{Packet, TCP, finished};
use crate::user::stack::shared::Shared;
use crate::user::tcp::reassembly::Kept;
use crate::user::tcp::segment::{HEADER_MAX, Segment};
use crate::user::tcp::{Outcome, Pool, Reassembly};

impl TcpFlows {
    /// A segment that is not the next: it is kept, and the guest is told at once (RFC 5681, 4.2).
    pub(super) fn out_of_order(
        &mut self,
        at: u32,
        frame: &OutFrame<'_>,
        seg: &Segment,
        outcome: &Outcome,
        packet: &Packet,
        shared: &mut Shared,
    ) {
        let Self { flows, pool, .. } = self;
        let Some(flow) = flows.get_mut(at) else { return };
        let next = flow.conn.expects();
        if outcome.ahead != 0 || outcome.fin {
            let ahead = flow.ahead.get_or_insert_with(|| Box::new(Reassembly::new(flow.port.0)));
            let from = packet.l4_at + usize::from(seg.header_bytes);
            let piece = (seg.seq, outcome.ahead, outcome.fin);
            let Kept { bytes, refused, again } = ahead.put(pool, next, piece, |offset, bytes| {
                frame.copy_to(from + offset as usize, bytes);
            });
            shared.counters.tcp_kept_bytes += u64::from(bytes);
            shared.counters.tcp_not_kept_bytes += u64::from(refused);
            flow.conn.holds(ahead.told(next), again);
            if ahead.is_empty() {
                flow.ahead = None;
            }
        }
        // It may send on meanwhile, if the socket has room.
        let end = flow.ahead.as_ref().and_then(|ahead| ahead.end()).unwrap_or(next);
        if flow.conn.can_sack() && flow.conn.edge().wrapping_sub(end) < LOW_ROOM {
            Self::measure(flow, shared);
        }
        if !shared.has_room() {
            // Then it is told with what goes out next.
            return;
        }
        let (Some(link), Some(mut answer)) = (flow.link, flow.conn.ack(shared.ms)) else { return };
        (answer.from, answer.to) = (flow.key.remote.1, flow.key.guest.1);
        shared.counters.tcp_sacks += u64::from(answer.sack[0] != (0, 0));
        let mut bytes = [0; HEADER_MAX];
        let len = answer.emit(&mut bytes);
        let ends = (flow.key.remote.0, flow.key.guest.0);
        shared.push(finished(shared.config.mac, link, ends, TCP, &bytes[..len], 16));
    }

    /// A gap may be filled: what follows goes to the socket, as much as it takes. False: the connection is no more.
    pub(super) fn fill(&mut self, at: u32, shared: &mut Shared) -> bool {
        let Self { flows, pool, .. } = self;
        let Some(flow) = flows.get_mut(at) else { return false };
        let Some(mut ahead) = flow.ahead.take() else { return true };
        let mut failed = None;
        loop {
            let next = flow.conn.expects();
            ahead.advance(pool, next);
            let Some(socket) = flow.socket.as_ref().filter(|_| !flow.conn.guest_ended()) else {
                ahead.clear(pool);
                break;
            };
            if ahead.ends(next) {
                shared.counters.calls += 1;
                let _ = shutdown(socket, Shutdown::Write);
                flow.conn.received(0, true, shared.ms);
                continue;
            }
            let ready = ahead.ready(next);
            if ready == 0 {
                break;
            }
            match send(socket, &ahead, pool, next, shared) {
                Ok(taken) if taken != 0 => {
                    shared.counters.tcp_out_bytes += taken as u64;
                    shared.counters.tcp_filled_bytes += taken as u64;
                    flow.conn.received(taken as u32, false, shared.ms);
                }
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                    failed = Some(errno(&error));
                    break;
                }
                _ => {
                    // The rest stays, and goes when the socket says that it has room.
                    shared.counters.tcp_short += 1;
                    shared.watch_again(socket, flow.token);
                    break;
                }
            }
        }
        flow.conn.holds(ahead.told(flow.conn.expects()), None);
        if !ahead.is_empty() {
            flow.ahead = Some(ahead);
        }
        if let Some(error) = failed {
            self.failed(at, error, shared);
            return false;
        }
        if let Some(flow) = self.flows.get_mut(at)
            && flow.conn.told_room() < LOW_ROOM
        {
            Self::measure(flow, shared);
        }
        true
    }
}

/// Sends what follows `next`; how much of it the socket took.
fn send(
    socket: &OwnedFd,
    ahead: &Reassembly,
    pool: &Pool,
    next: u32,
    shared: &mut Shared,
) -> io::Result<usize> {
    shared.counters.calls += 1;
    let mut gather = Gather::new(&mut shared.storage);
    ahead.each(pool, next, |bytes| gather.push_bytes(bytes) == bytes.len());
    gather.send(socket)
}
