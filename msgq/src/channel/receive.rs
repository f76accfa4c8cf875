//! The receiving half of a channel: slots become messages, each checked against the rules before anybody sees it.

use std::time::{Duration, Instant};

use super::{Channel, Error, Lane, PeerState, Staged, Token};
use crate::error::Violation;
use crate::layout::{Desc, flags};
use crate::region::{PeerSlice, RawBuf, Segment};
use crate::shm::Outside;

/// How long the rest of a message may take.
const CHAIN_DEADLINE: Duration = Duration::from_secs(1);

/// A message that arrived.
#[derive(Debug)]
pub enum Incoming {
    /// One without an answer.
    OneWay(OneWay),
    /// One that wants an answer.
    Request(Request),
    /// The answer to one of this side's.
    Completion(Completion),
}

/// A message without an answer. Its data may be read until the next [`receive`](Channel::receive).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OneWay {
    /// The sender's opcode.
    pub opcode: u16,
    /// Its priority.
    pub lane: u8,
    /// Inline bytes as two words. Zero with data; then the second word is the head's value.
    pub words: [u64; 2],
    /// Inline bytes that count.
    pub len: u32,
    /// It may have been received before, from the peer's earlier incarnation or epoch.
    pub replay: bool,
    first: Option<Segment>,
    index: u64,
}

/// A request of the peer, to be completed once.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a request that is not completed stays in the peer's window"]
pub struct Request {
    /// The sender's opcode.
    pub opcode: u16,
    /// Its priority.
    pub lane: u8,
    /// The eight bytes with it, or 0.
    pub value: u64,
    /// It may have been received before, in an earlier epoch.
    pub replay: bool,
    /// The peer's number for it; with the channel, the same when it is sent again.
    pub cookie: u64,
    pub(super) index: u32,
    pub(super) generation: u32,
}

/// The answer to a request. It counts as dealt with at the next [`receive`](Channel::receive): until then its buffers are
/// in the caller's hands, it has its place in the window, and a death before leads to the request being sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The request.
    pub token: Token,
    /// The peer's code.
    pub code: u16,
    /// The peer's value.
    pub value: u64,
    /// The peer's length. Not checked against anything.
    pub len: u32,
}

impl Channel {
    /// Takes the next message, the most urgent lane first. When there is none, slots are given back to the peer.
    ///
    /// # Errors
    /// The peer broke a rule, or is gone and everything it published was received.
    #[inline(always)]
    pub fn receive(&mut self) -> Result<Option<Incoming>, Error> {
        if let Some(index) = self.settle.take() {
            self.settled(index);
        }
        if self.blocked
            && let Some(violation) = self.failed
        {
            return Err(violation.into());
        }
        for number in 0..self.lanes.len() {
            let lane = &mut self.lanes[number];
            if lane.rx.should_release() {
                self.kick |= lane.rx.release();
            }
            loop {
                let lane = &mut self.lanes[number];
                let desc = match lane.rx.pop() {
                    Ok(Some(desc)) => desc,
                    Ok(None) => break,
                    Err(violation) => return Err(self.fail(violation)),
                };
                match self.slot(number, desc) {
                    Ok(Some(incoming)) => {
                        self.stats.rx_messages += 1;
                        return Ok(Some(incoming));
                    }
                    // Part of a message, or one that is here already.
                    Ok(None) => {}
                    Err(violation) => return Err(self.fail(violation)),
                }
            }
        }
        self.nothing()
    }

    #[inline(never)]
    fn nothing(&mut self) -> Result<Option<Incoming>, Error> {
        for lane in &mut self.lanes {
            self.kick |= lane.rx.release();
            if lane.staged.first.is_some()
                && lane.staged.since.is_some_and(|since| since.elapsed() > CHAIN_DEADLINE)
            {
                return Err(self.fail(Violation::ChainLate));
            }
        }
        if self.kick {
            self.commit();
        }
        if !self.replay.is_empty() {
            let _ = self.pump_replay();
            self.commit();
        }
        if self.peer == PeerState::Gone {
            return Err(Error::Gone);
        }
        Ok(None)
    }

    /// Whether there is a message, or part of one.
    #[inline]
    #[must_use]
    pub fn has_message(&self) -> bool {
        self.lanes.iter().any(|lane| lane.rx.has_message())
    }

    /// One slot: checked, and put together with those before it.
    #[inline(always)]
    fn slot(&mut self, number: usize, desc: Desc) -> Result<Option<Incoming>, Violation> {
        if desc.flags & !flags::ALL != 0 {
            return Err(Violation::Flags(desc.flags));
        }
        let Lane { rx, staged, .. } = &mut self.lanes[number];
        if desc.kind() == flags::COMPLETION {
            if desc.flags != flags::COMPLETION || staged.first.is_some() {
                return Err(Violation::CompletionFlags(desc.flags));
            }
            return self.completion(number, &desc).map(Some);
        }
        // The common case first: a whole message in one slot.
        if staged.first.is_none() && !desc.has(flags::MORE) {
            staged.slots = 0;
            let segment = if desc.has(flags::INLINE) {
                check_inline(&desc)?;
                None
            } else {
                Some(self.regions.check(&desc, self.agreed.segment_max)?)
            };
            if desc.kind() == flags::ONE_WAY {
                let words = if segment.is_none() { [desc.cookie, desc.value] } else { [desc.cookie, 0] };
                return Ok(Some(Incoming::OneWay(OneWay {
                    opcode: desc.opcode,
                    lane: number as u8,
                    words,
                    len: if segment.is_none() { desc.len } else { 0 },
                    replay: desc.has(flags::REPLAY),
                    first: segment,
                    index: rx.head(),
                })));
            }
            let segments = segment.as_slice();
            return self.hold(number, &desc, segments);
        }
        self.chain(number, desc)
    }

    /// A slot of a message with several.
    #[inline(never)]
    fn chain(&mut self, number: usize, desc: Desc) -> Result<Option<Incoming>, Violation> {
        let Lane { rx, staged, .. } = &mut self.lanes[number];
        let max = self.agreed.chain_max;
        let first = match staged.first {
            None => {
                *staged = Staged {
                    first: Some(desc),
                    slots: 0,
                    segments: std::mem::take(&mut staged.segments),
                    since: None,
                };
                staged.segments.clear();
                desc
            }
            Some(first) => {
                let same = flags::KIND | flags::REPLAY;
                if desc.flags & same != first.flags & same || desc.has(flags::INLINE) {
                    return Err(Violation::ChainFlags(desc.flags));
                }
                first
            }
        };
        staged.slots += 1;
        if staged.slots > max || (staged.slots == max && desc.has(flags::MORE)) {
            return Err(Violation::ChainLength(max));
        }
        if desc.has(flags::INLINE) {
            check_inline(&desc)?;
        } else {
            staged.segments.push(self.regions.check(&desc, self.agreed.segment_max)?);
        }
        if desc.has(flags::MORE) {
            if staged.since.is_none() && !rx.has_message() {
                staged.since = Some(Instant::now());
            }
            return Ok(None);
        }
        staged.first = None;
        if first.kind() == flags::ONE_WAY {
            let value = if first.has(flags::INLINE) { first.value } else { 0 };
            return Ok(Some(Incoming::OneWay(OneWay {
                opcode: first.opcode,
                lane: number as u8,
                words: [first.cookie, value],
                len: 0,
                replay: first.has(flags::REPLAY),
                first: staged.segments.first().copied(),
                index: rx.head(),
            })));
        }
        let segments = std::mem::take(&mut staged.segments);
        let held = self.hold(number, &first, &segments);
        self.lanes[number].staged.segments = segments;
        held
    }

    #[inline]
    fn hold(
        &mut self,
        number: usize,
        first: &Desc,
        segments: &[Segment],
    ) -> Result<Option<Incoming>, Violation> {
        let replay = first.has(flags::REPLAY);
        if replay && self.held.has(first.cookie) {
            // Sent again by a peer that attached again, while the first copy is still being worked on: one answer is due.
            self.stats.replays_merged += 1;
            return Ok(None);
        }
        // An answer follows, soon if this is a round trip.
        self.lanes[number].tx.prepare();
        let Some((index, generation)) = self.held.insert(first.cookie, number as u8, segments) else {
            return Err(Violation::Window(self.agreed.window_theirs));
        };
        Ok(Some(Incoming::Request(Request {
            opcode: first.opcode,
            lane: number as u8,
            value: if first.has(flags::INLINE) { first.value } else { 0 },
            replay,
            cookie: first.cookie,
            index,
            generation,
        })))
    }

    #[inline]
    fn completion(&mut self, number: usize, desc: &Desc) -> Result<Incoming, Violation> {
        let index = self.flight.find(desc.cookie).ok_or(Violation::Cookie(desc.cookie))?;
        // The next request follows, soon if this is a round trip.
        self.lanes[number].tx.prepare();
        if let Some(started) = &self.started {
            self.stats.latency(started[index as usize].elapsed().as_nanos() as u64);
        }
        // Not free yet: the application deals with it until it asks for the next message.
        self.settle = Some(index);
        Ok(Incoming::Completion(Completion {
            token: Token(desc.cookie),
            code: desc.opcode,
            value: desc.value,
            len: desc.len,
        }))
    }

    /// The application has dealt with the completion of this entry.
    #[inline]
    pub(super) fn settled(&mut self, index: u32) {
        for buf in self.flight.bufs(index) {
            if let Some(Some((pool, _))) = self.pools.get(usize::from(buf.region)) {
                pool.inner.release(buf.index);
            }
        }
        self.flight.end(index);
    }

    /// What a request refers to.
    #[inline]
    #[must_use]
    pub fn segments(&self, request: &Request) -> &[Segment] {
        self.held.segments(request.index, request.generation).unwrap_or(&[])
    }

    /// What a message without answer refers to; nothing once its slot was given back, when its sender may have used the
    /// memory for something else. That happens at the next [`receive`](Self::receive) or sleep, and may happen when a
    /// request is sent.
    #[must_use]
    pub fn data<'a>(&'a self, message: &'a OneWay) -> &'a [Segment] {
        let Some(lane) = self.lanes.get(usize::from(message.lane)) else { return &[] };
        if message.index != lane.rx.head() || lane.rx.released() >= message.index {
            return &[];
        }
        if lane.staged.slots > 1 { &lane.staged.segments } else { message.first.as_slice() }
    }

    /// The memory of a segment, if its region is still there.
    #[inline]
    #[must_use]
    pub fn slice(&self, segment: Segment) -> Option<PeerSlice<'_>> {
        self.regions.slice(segment)
    }

    /// Copies bytes out of buffer `which` of a completed request: what the peer filled in, or what was sent.
    ///
    /// # Errors
    /// There is no such buffer (any more), or the range is not inside it.
    pub fn read_back(
        &self,
        completion: &Completion,
        which: usize,
        offset: usize,
        to: &mut [u8],
    ) -> Result<(), Outside> {
        let gone = Outside { offset, len: to.len(), size: 0 };
        let index = self.flight.find(completion.token.0).ok_or(gone)?;
        let buf = self.flight.bufs(index).get(which).ok_or(gone)?;
        match self.pools.get(usize::from(buf.region)) {
            Some(Some((pool, _))) => pool.inner.read(buf.index, offset, to),
            _ => Err(gone),
        }
    }

    /// Takes the first buffer of a completed request back into the caller's hands: its region, and the number for
    /// [`Pool::from_raw`](crate::region::Pool::from_raw) or [`blank_from_raw`](crate::region::Pool::blank_from_raw).
    /// What is not taken back is free at the next [`receive`](Self::receive).
    #[inline]
    pub fn take_back(&mut self, completion: &Completion) -> Option<(u16, RawBuf)> {
        let index = self.flight.find(completion.token.0)?;
        if self.settle != Some(index) {
            return None;
        }
        let buf = self.flight.take_buf(index, 0)?;
        let (pool, _) = self.pools.get(usize::from(buf.region))?.as_ref()?;
        Some((buf.region, pool.inner.take_back(buf.index)))
    }
}

#[inline]
fn check_inline(desc: &Desc) -> Result<(), Violation> {
    let most = if desc.kind() == flags::ONE_WAY { 16 } else { 8 };
    if desc.len > most { Err(Violation::Inline(desc.len)) } else { Ok(()) }
}
