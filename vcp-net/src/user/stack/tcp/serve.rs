//! From socket to guest: one `recvmsg` that leaves the data in the socket (it is thrown away there when the guest has
//! acknowledged it), straight into the guest's memory where the port allows it, as one frame of up to 64 KiB.

use std::io;

use vcp_core::sock::Scatter;

use super::{Flow, TcpFlows, Turn};
use crate::frame::checksum::fold;
use crate::frame::{OutFrame, VnetHeader};
use crate::uplink::{Ingress, Room, Taken};
use crate::user::packet::{Link, TCP, ether_bytes, finished, ip, pseudo};
use crate::user::stack::shared::Shared;
use crate::user::sys;
use crate::user::tcp::Next;
use crate::user::tcp::segment::HEADER_MAX;

/// Longest IPv4 packet.
const PACKET_MAX: usize = 65_535;
/// Frames for one connection before it is another one's turn.
const FRAMES_PER_TURN: usize = 4;
/// Most bytes in flight where the kernel cannot peek at an offset.
const PEEK_MAX: u32 = 65_536;

impl TcpFlows {
    /// One connection's turn.
    pub(super) fn serve(
        flow: &mut Flow,
        into: &mut dyn Ingress,
        shared: &mut Shared,
        moved: &mut bool,
    ) -> Turn {
        let Some(link) = flow.link else { return Turn::Done };
        for _ in 0..FRAMES_PER_TURN {
            match flow.conn.next(flow.readable, shared.ms) {
                Next::Nothing => return Turn::Done,
                Next::Bare => {
                    let before = flow.conn.clone();
                    let mss = PACKET_MAX as u16 - if flow.key.guest.0.is_ipv6() { 60 } else { 40 };
                    let mut seg = flow.conn.bare(mss, shared.ms);
                    (seg.from, seg.to) = (flow.key.remote.1, flow.key.guest.1);
                    let mut bytes = [0; HEADER_MAX];
                    let len = seg.emit(&mut bytes);
                    let ends = (flow.key.remote.0, flow.key.guest.0);
                    let frame = finished(shared.config.mac, link, ends, TCP, &bytes[..len], 16);
                    if into.frame(&OutFrame::of(VnetHeader::default(), &frame)) == Taken::Full {
                        flow.conn = before;
                        return Turn::Full;
                    }
                    *moved = true;
                }
                Next::Data { offset, max } => match Self::data(flow, link, offset, max, into, shared) {
                    Ok(sent) => *moved |= sent,
                    Err(turn) => return turn,
                },
            }
        }
        Turn::Again
    }

    /// Sends bytes of the socket's queue as one frame; whether there were any.
    fn data(
        flow: &mut Flow,
        link: Link,
        offset: u32,
        max: u32,
        into: &mut dyn Ingress,
        shared: &mut Shared,
    ) -> Result<bool, Turn> {
        let Some(socket) = &flow.socket else { return Err(Turn::Done) };
        let v6 = flow.key.guest.0.is_ipv6();
        let mss = usize::from(flow.conn.mss());
        let l4_at = ether_bytes(link) + if v6 { 40 } else { 20 };
        let l4_bytes = flow.conn.data_header_bytes();
        let headers = l4_at + l4_bytes;
        let port = into.find(link.vid, link.mac);
        let offloads = port.map(|port| into.offloads(port)).unwrap_or_default();
        let whole = if v6 { offloads.tso6 } else { offloads.tso4 };
        let longest = if whole { PACKET_MAX - (headers - ether_bytes(link)) } else { mss };
        let mut len = longest.min(max as usize);
        if !shared.peeks {
            len = len.min(PEEK_MAX.saturating_sub(offset) as usize);
            if len == 0 {
                return Err(Turn::Done);
            }
        } else if flow.peek_at != offset {
            shared.counters.calls += 1;
            if sys::set_peek_offset(socket, offset).is_err() {
                return Err(Turn::Over);
            }
            flow.peek_at = offset;
        }
        shared.counters.calls += 1;
        let mut room = match port.filter(|_| whole) {
            Some(port) => {
                // A guest with little room gets what it has room for.
                if matches!(into.direct(port, headers + len), Room::Full) {
                    len = len.min(mss);
                }
                into.direct(port, headers + len)
            }
            None => Room::Unfit,
        };
        if matches!(room, Room::Full) {
            return Err(Turn::Full);
        }
        let Shared { storage, buffer, counters, peeks, ms, config, head, .. } = shared;
        let mut skipped = if *peeks { Vec::new() } else { vec![0; offset as usize] };
        let got = {
            let mut scatter = Scatter::new(storage);
            if !*peeks && offset != 0 {
                scatter.push_bytes_mut(&mut skipped);
            }
            match &mut room {
                Room::Ready(direct) => {
                    direct.scatter(headers, len, &mut scatter);
                }
                _ => {
                    scatter.push_bytes_mut(&mut buffer[headers..headers + len]);
                }
            }
            scatter.peek(socket)
        };
        let skip = if *peeks { 0 } else { offset as usize };
        let got = match got {
            // All that there is was seen before.
            Ok(got) if skip != 0 && got <= skip => {
                flow.readable = false;
                return Ok(false);
            }
            Ok(0) => {
                flow.conn.ended(offset);
                flow.readable = false;
                return Ok(false);
            }
            Ok(got) => got - skip,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                flow.readable = false;
                return Ok(false);
            }
            Err(_) => return Err(Turn::Over),
        };
        flow.peek_at = offset + got as u32;
        let before = flow.conn.clone();
        let mut seg = flow.conn.data(offset, got as u32, got < len, *ms);
        (seg.from, seg.to) = (flow.key.remote.1, flow.key.guest.1);
        let mut l4 = [0; HEADER_MAX];
        seg.emit(&mut l4);
        let ends = (flow.key.remote.0, flow.key.guest.0);
        head.clear();
        ip(head, config.mac, link, ends, TCP, l4_bytes + got);
        let sum = fold(pseudo(ends.0, ends.1, TCP, l4_bytes + got));
        l4[16..18].copy_from_slice(&sum.to_be_bytes());
        head.extend_from_slice(&l4[..l4_bytes]);
        let meta = if got > mss {
            VnetHeader::tcp(v6, l4_at, headers, mss as u16)
        } else {
            VnetHeader::partial(l4_at, 16)
        };
        counters.tcp_in_bytes += got as u64;
        counters.tcp_in_frames += 1;
        if let Room::Ready(direct) = room {
            counters.tcp_direct += 1;
            direct.commit(&meta, head, headers + got);
            return Ok(true);
        }
        buffer[..headers].copy_from_slice(head);
        if into.frame(&OutFrame::of(meta, &buffer[..headers + got])) == Taken::Full {
            flow.conn = before;
            counters.tcp_in_bytes -= got as u64;
            counters.tcp_in_frames -= 1;
            return Err(Turn::Full);
        }
        Ok(true)
    }
}
