//! The last operation: gives frames to their targets, finished where a target does not take them as they are.

use std::time::Instant;

use vcp_core::queue::RingError;
use vcp_core::queue::burst::{BurstRing, Out, Put};
use vcp_core::vu::port::Port;

use super::account::{Account, Reason};
use super::back::Member;
use super::line::From;
use super::rewrite::{Head, Rewrite};
use super::work::{Fate, Frames, Item, PortId, Work};
use crate::capture::Capture;
use crate::frame::ether::IPV6;
use crate::frame::gso::{Finished, finish_frame};
use crate::frame::layers::HEADERS_BYTES;
use crate::frame::vnet::HEADER_BYTES;
use crate::frame::{Gso, OutFrame};
use crate::port::{NetPort, OnFull, Vlan, receive_queue};
use crate::uplink::{Sender, Sent, Uplink};

/// Where frames can go.
pub struct Targets<'a> {
    /// What the line knows of the ports.
    pub members: &'a mut [Member],
    /// The ports.
    pub ports: &'a mut [Port<NetPort>],
    /// The uplink.
    pub uplink: &'a mut dyn Uplink,
    /// Counters.
    pub account: &'a mut Account,
    /// Who looks at frames.
    pub capture: Option<&'a mut Capture>,
    /// Where the burst comes from.
    pub from: PortId,
    /// Now.
    pub now: Instant,
}

/// What became of a frame at one target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gave {
    /// The target has it.
    Done,
    /// It is dropped.
    Dropped(Reason),
    /// There is no room now; the target has got so many pieces of it already.
    Full(u32),
}

/// See the module.
#[derive(Debug)]
pub struct Enqueue {
    /// What changes on the way.
    pub rewrite: Rewrite,
    /// Times that a burst was held up because its target had no room.
    pub held: u64,
    head: Box<Head>,
}

impl Default for Enqueue {
    fn default() -> Self {
        Self { rewrite: Rewrite::default(), held: 0, head: Box::new([0; HEADERS_BYTES + 4]) }
    }
}

impl Enqueue {
    /// Gives the frames of a burst to their targets; returns how many are done with.
    pub fn run(&mut self, work: &Work, frames: &Frames<'_>, from: From, targets: &mut Targets<'_>) -> usize {
        let items = work.items();
        let mut at = 0;
        while let Some(item) = items.get(at) {
            match item.fate {
                Fate::Drop(_) => at += 1,
                Fate::Many(set) => {
                    for port in set.iter() {
                        // One target that has no room does not keep a frame from the others, nor is it waited for.
                        match self.give(item, frames, at, port, targets, 0) {
                            Gave::Done => count_out(targets.account.of(port, 0), item),
                            Gave::Dropped(reason) => targets.account.of(port, 0).drop_to(reason),
                            Gave::Full(_) => targets.account.of(port, 0).drop_to(Reason::Full),
                        }
                    }
                    at += 1;
                }
                Fate::To(port) => {
                    let run = items[at..].iter().take_while(|it| it.fate == item.fate).count();
                    let done = self.give_run(&items[at..at + run], frames, at, port, from, targets);
                    at += done;
                    if done < run {
                        self.held += 1;
                        return at;
                    }
                }
                Fate::Open => at += 1,
            }
        }
        at
    }

    /// Gives frames to one target, one after the other; returns how many are done with.
    fn give_run(
        &mut self,
        items: &[Item],
        frames: &Frames<'_>,
        first: usize,
        port: PortId,
        from: From,
        targets: &mut Targets<'_>,
    ) -> usize {
        let mut done = 0;
        if first == 0 && Self::is_simple(port, from, targets) {
            done = self.give_simply(items, frames, port, targets);
        }
        for (at, item) in items.iter().enumerate().skip(done) {
            // Only the very first frame of a queue can have been given in part.
            let partial = match targets.members.get_mut(from.port.index()) {
                Some(member) if first + at == 0 => {
                    std::mem::take(&mut member.partial[usize::from(from.pair)])
                }
                _ => 0,
            };
            match self.give(item, frames, first + at, port, targets, partial) {
                Gave::Done => count_out(targets.account.of(port, 0), item),
                Gave::Dropped(reason) => targets.account.of(port, 0).drop_to(reason),
                Gave::Full(pieces) => {
                    if self.waits(port, targets) {
                        if let Some(member) = targets.members.get_mut(from.port.index()) {
                            member.partial[usize::from(from.pair)] = pieces;
                            return at;
                        }
                        // An uplink's frame that was given in part is not given again; the rest of it is lost.
                        if pieces == 0 {
                            return at;
                        }
                    }
                    targets.account.of(port, 0).drop_to(Reason::Full);
                }
            }
        }
        items.len()
    }

    /// Whether a target is waited for that has no room.
    fn waits(&self, port: PortId, targets: &mut Targets<'_>) -> bool {
        let Some(member) = targets.members.get_mut(port.index()) else {
            return targets.uplink.waits_when_full();
        };
        if member.spec.on_full == OnFull::Drop {
            return false;
        }
        member.full_since.get_or_insert(targets.now);
        !member.is_stuck(targets.now)
    }

    /// Whether frames can go to a port without looking at more than their fate.
    fn is_simple(port: PortId, from: From, targets: &Targets<'_>) -> bool {
        let Some(member) = targets.members.get(port.index()) else { return false };
        let partial =
            targets.members.get(from.port.index()).is_some_and(|it| it.partial[usize::from(from.pair)] != 0);
        let seen = targets.capture.as_ref().is_some_and(|capture| capture.wants_out(port));
        let plain = member.spec.vlan == Vlan::default() && member.spec.mtu.is_none();
        plain && member.spec.pairs == 1 && !partial && !seen
    }

    /// The usual case, without detours: frames that need nothing done, for a port that takes everything. Returns how many
    /// were given; what stopped it is for the others to find out.
    fn give_simply(
        &mut self,
        items: &[Item],
        frames: &Frames<'_>,
        port: PortId,
        targets: &mut Targets<'_>,
    ) -> usize {
        let target = &mut targets.ports[port.index()];
        let (device, rings) = target.parts();
        if device.filters().is_some() {
            return 0;
        }
        let (header, count_at) = (device.header_bytes(), device.count_at());
        let Some(ring) = receive_queue(rings, 0) else { return 0 };
        // The first one's length stands for all.
        let near = header + items.first().map_or(0, |item| item.len_bytes as usize);
        if let Err(error) = ring.look_ahead(items.len(), near) {
            // The frames go the long way, and find nobody there.
            rings.broke(0, &error);
            return 0;
        }
        let plain: [u8; HEADER_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        let (mut done, mut bytes, mut broken) = (0, 0, None);
        for (at, item) in items.iter().enumerate() {
            if !item.meta.is_plain() || item.ether.tag.is_some() || item.vid != 0 {
                break;
            }
            let frame = frames.get(at, item.meta);
            let out = Out {
                header: &plain[..header],
                count_at,
                prefix: frame.prefix,
                frame: frame.frame,
                skip: frame.skip,
                len_bytes: frame.len_bytes,
            };
            match ring.put(&out) {
                Ok(Put::Done) => {}
                Ok(_) => break,
                Err(error) => {
                    broken = Some(error);
                    break;
                }
            }
            done += 1;
            bytes += u64::from(item.len_bytes);
        }
        ring.want(false);
        if let Some(error) = broken {
            rings.broke(0, &error);
        }
        if done != 0 {
            target.touch();
            targets.members[port.index()].full_since = None;
            let tally = targets.account.of(port, 0);
            tally.out_frames += done as u64;
            tally.out_bytes += bytes;
        }
        done
    }

    /// Gives one frame to one target, from its piece number `from` on.
    fn give(
        &mut self,
        item: &Item,
        frames: &Frames<'_>,
        at: usize,
        port: PortId,
        targets: &mut Targets<'_>,
        from: u32,
    ) -> Gave {
        let frame = frames.get(at, item.meta);
        if port == PortId::UPLINK {
            return self.give_uplink(item, frame, targets, from);
        }
        let Some(member) = targets.members.get_mut(port.index()) else { return Gave::Dropped(Reason::Down) };
        let (out, l3_at) = match self.rewrite.run(item, frame, &member.spec.vlan, &mut self.head) {
            Ok(out) => out,
            Err(reason) => return Gave::Dropped(reason),
        };
        if is_too_long(&out, l3_at, member.spec.mtu.map_or(usize::MAX, usize::from)) {
            return Gave::Dropped(Reason::Mtu);
        }
        let ports = targets.ports.len();
        let target = &mut targets.ports[port.index()];
        let (device, rings) = target.parts();
        if let Some(filter) = device.filters()
            && !filter.wants(item.ether.dst, (item.vid != 0).then_some(item.vid))
        {
            return Gave::Dropped(Reason::Filtered);
        }
        let pairs = device.pairs();
        let pair = if pairs > 1 { member.steer.pair(&out, item.ether.ethertype, l3_at, pairs) } else { 0 };
        let (header, count_at, offloads) = (device.header_bytes(), device.count_at(), device.offloads());
        let Some(ring) = receive_queue(rings, pair) else { return Gave::Dropped(Reason::Down) };
        let capture = targets.capture.as_deref_mut().filter(|capture| capture.wants_out(port));
        let seen = capture.map(|capture| Seen { capture, port, ports, now: targets.now });
        let mut sink = Sink { ring, header, count_at, seen, refused: None, error: None };
        let v6 = item.ether.ethertype == IPV6;
        let finished = if offloads.take(&out.meta, v6) {
            if sink.put(&out) { Finished::Done } else { Finished::Stopped(0) }
        } else {
            let mut pieces = 0;
            let finished = finish_frame(&out, item.ether.ethertype, l3_at, offloads, from, &mut |piece| {
                let taken = sink.put(piece);
                pieces += u64::from(taken);
                taken
            });
            let tally = targets.account.of(port, 0);
            tally.finished += u64::from(finished == Finished::Done);
            tally.pieces += pieces;
            finished
        };
        let (refused, error) = (sink.refused, sink.error.take());
        sink.ring.want(refused == Some(Put::Full) && member.spec.on_full == OnFull::Wait);
        target.touch();
        match (finished, refused, error) {
            (_, _, Some(error)) => {
                let (_, rings) = target.parts();
                rings.broke(2 * pair, &error);
                Gave::Dropped(Reason::Broken)
            }
            (Finished::Malformed(_), ..) => Gave::Dropped(Reason::Unfinishable),
            (Finished::Done, ..) => {
                member.full_since = None;
                Gave::Done
            }
            (Finished::Stopped(_), Some(Put::TooLong), _) => Gave::Dropped(Reason::Mtu),
            (Finished::Stopped(pieces), ..) => {
                if pieces > from {
                    // It moves.
                    member.full_since = None;
                }
                Gave::Full(pieces)
            }
        }
    }

    /// Gives one frame to the uplink, which is a trunk of all VLANs.
    fn give_uplink(
        &mut self,
        item: &Item,
        frame: OutFrame<'_>,
        targets: &mut Targets<'_>,
        from: u32,
    ) -> Gave {
        let trunk = Vlan::default();
        let sender = Sender { port: targets.from, vid: item.vid, now: targets.now };
        let (out, l3_at) = match self.rewrite.run(item, frame, &trunk, &mut self.head) {
            Ok(out) => out,
            Err(reason) => return Gave::Dropped(reason),
        };
        let uplink = &mut *targets.uplink;
        let capture = targets.capture.as_deref_mut().filter(|capture| capture.wants_out(PortId::UPLINK));
        let mut seen = capture.map(|capture| Seen {
            capture,
            port: PortId::UPLINK,
            ports: targets.ports.len(),
            now: targets.now,
        });
        if is_too_long(&out, l3_at, uplink.mtu()) {
            return Gave::Dropped(Reason::Mtu);
        }
        let offloads = uplink.offloads();
        if offloads.take(&out.meta, item.ether.ethertype == IPV6) {
            return match uplink.send(&out, sender) {
                Sent::Done => {
                    if let Some(seen) = &mut seen {
                        seen.went(&out);
                    }
                    Gave::Done
                }
                Sent::Full => Gave::Full(0),
                Sent::Refused => Gave::Dropped(Reason::Refused),
            };
        }
        let (mut last, mut pieces) = (Sent::Done, 0);
        let finished = finish_frame(&out, item.ether.ethertype, l3_at, offloads, from, &mut |piece| {
            last = uplink.send(piece, sender);
            pieces += u64::from(last == Sent::Done);
            if let (Sent::Done, Some(seen)) = (last, &mut seen) {
                seen.went(piece);
            }
            last == Sent::Done
        });
        let tally = targets.account.of(PortId::UPLINK, 0);
        tally.finished += u64::from(finished == Finished::Done);
        tally.pieces += pieces;
        match (finished, last) {
            (Finished::Done, _) => Gave::Done,
            (Finished::Malformed(_), _) => Gave::Dropped(Reason::Unfinishable),
            (Finished::Stopped(_), Sent::Refused) => Gave::Dropped(Reason::Refused),
            (Finished::Stopped(at), _) => Gave::Full(at),
        }
    }
}

fn count_out(tally: &mut super::account::Tally, item: &Item) {
    tally.out_frames += 1;
    tally.out_bytes += u64::from(item.len_bytes);
}

/// Whether a packet, or each of those that it makes, is longer than `mtu`.
fn is_too_long(out: &OutFrame<'_>, l3_at: usize, mtu: usize) -> bool {
    let whole = out.total_bytes() - l3_at;
    if whole <= mtu {
        return false;
    }
    match out.meta.gso() {
        None => true,
        Some(kind) => {
            // `parse` has made sure of the headers; where the payload begins is theirs to say.
            let mut head = [0; HEADERS_BYTES];
            let len = out.copy_to(0, &mut head);
            let l4_at = usize::from(out.meta.csum_start);
            let l4_bytes = match kind {
                Gso::Udp => 8,
                Gso::Tcp4 | Gso::Tcp6 => {
                    head[..len].get(l4_at + 12).map_or(usize::MAX >> 1, |byte| usize::from(byte >> 4) * 4)
                }
            };
            l4_at.saturating_sub(l3_at) + l4_bytes + usize::from(out.meta.gso_size) > mtu
        }
    }
}

/// Who looks at the frames that a target gets.
struct Seen<'a> {
    capture: &'a mut Capture,
    port: PortId,
    ports: usize,
    now: Instant,
}

impl Seen<'_> {
    fn went(&mut self, frame: &OutFrame<'_>) {
        self.capture.went_out(self.port, frame, self.ports, self.now);
    }
}

/// A receive queue that takes finished frames.
struct Sink<'a> {
    seen: Option<Seen<'a>>,
    ring: &'a mut BurstRing,
    header: usize,
    count_at: Option<usize>,
    refused: Option<Put>,
    error: Option<RingError>,
}

impl Sink<'_> {
    fn put(&mut self, frame: &OutFrame<'_>) -> bool {
        let header = frame.meta.emit();
        let out = Out {
            header: &header[..self.header],
            count_at: self.count_at,
            prefix: frame.prefix,
            frame: frame.frame,
            skip: frame.skip,
            len_bytes: frame.len_bytes,
        };
        match self.ring.put(&out) {
            Ok(Put::Done) => {
                if let Some(seen) = &mut self.seen {
                    seen.went(frame);
                }
                true
            }
            Ok(refused) => {
                self.refused = Some(refused);
                false
            }
            Err(error) => {
                self.error = Some(error);
                false
            }
        }
    }
}
