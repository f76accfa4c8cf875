//! The receiving half of a channel: slots become messages, each checked against the rules before anybody sees it.

use std::time::{Duration, Instant};

use super::{Channel, Error, Lane, PeerState, Token};
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
    // The whole way of an ordinary message is in this one function, and what is called apart from it returns what fits
    // a register: a message that is put together in memory and then moved is loaded in other pieces than it was stored in, and
    // the processor waits for the stores (9 ns for each message, where all the rest takes 4).
    #[inline(always)]
    pub fn receive(&mut self) -> Result<Option<Incoming>, Error> {
        if let Some(index) = self.settle.take() {
            self.settled(index);
        }
        if self.blocked
            && let Some(violation) = self.failed
        {
            return Err(Error::Violation(violation));
        }
        'lanes: for number in 0..self.lanes.len() {
            let lane = &mut self.lanes[number];
            if lane.rx.should_release() {
                self.kick |= lane.rx.release();
            }
            loop {
                let lane = &mut self.lanes[number];
                let desc = match lane.rx.pop() {
                    Ok(Some(desc)) => desc,
                    Ok(None) => {
                        // A message for the queue itself may have come.
                        self.idle &= lane.rx.head() == lane.rx.released();
                        break;
                    }
                    Err(violation) => {
                        self.note(violation);
                        break 'lanes;
                    }
                };
                self.idle = false;
                if desc.flags & !flags::ALL != 0 {
                    self.note(Violation::Flags(desc.flags));
                    break 'lanes;
                }
                if desc.kind() == flags::COMPLETION {
                    if !self.completion(number, &desc) {
                        break 'lanes;
                    }
                    self.stats.rx_messages += 1;
                    return Ok(Some(Incoming::Completion(Completion {
                        token: Token(desc.cookie),
                        code: desc.opcode,
                        value: desc.value,
                        len: desc.len,
                    })));
                }
                let (mut first, mut segment, mut single) = (desc, None, true);
                if lane.staged.first.is_none() && !desc.has(flags::MORE) {
                    // The common case: a whole message in one slot.
                    lane.staged.slots = 0;
                    if desc.has(flags::INLINE) {
                        if desc.len > most_inline(&desc) {
                            self.note(Violation::Inline(desc.len));
                            break 'lanes;
                        }
                    } else {
                        match self.regions.check(&desc, self.agreed.segment_max) {
                            Ok(checked) => segment = Some(checked),
                            Err(violation) => {
                                self.note(violation);
                                break 'lanes;
                            }
                        }
                    }
                } else {
                    match self.chain(number, desc) {
                        Chained::Part => continue,
                        Chained::Broken => break 'lanes,
                        Chained::Whole => {}
                    }
                    let staged = &self.lanes[number].staged;
                    (first, segment, single) = (staged.head, staged.segments.first().copied(), false);
                }
                let value = if first.has(flags::INLINE) { first.value } else { 0 };
                if first.kind() == flags::ONE_WAY {
                    self.stats.rx_messages += 1;
                    return Ok(Some(Incoming::OneWay(OneWay {
                        opcode: first.opcode,
                        lane: number as u8,
                        words: [first.cookie, value],
                        len: if single && segment.is_none() { first.len } else { 0 },
                        replay: first.has(flags::REPLAY),
                        first: segment,
                        index: self.lanes[number].rx.head(),
                    })));
                }
                if first.has(flags::REPLAY) && self.held.has(first.cookie) {
                    // Sent again by a peer that attached again, while the first copy is still being worked on: one answer
                    // is due.
                    self.stats.replays_merged += 1;
                    continue;
                }
                let lane = &mut self.lanes[number];
                // An answer follows, soon if this is a round trip.
                lane.tx.prepare();
                let place = if single {
                    self.held.insert_one(first.cookie, number as u8, segment)
                } else {
                    self.held.insert(first.cookie, number as u8, &lane.staged.segments)
                };
                let Some((index, generation)) = place else {
                    self.note(Violation::Window(self.agreed.window_theirs));
                    break 'lanes;
                };
                if let Some(clock) = &mut self.clock {
                    clock.taken[index as usize] = clock.now();
                }
                self.stats.rx_messages += 1;
                return Ok(Some(Incoming::Request(Request {
                    opcode: first.opcode,
                    lane: number as u8,
                    value,
                    replay: first.has(flags::REPLAY),
                    cookie: first.cookie,
                    index,
                    generation,
                })));
            }
        }
        // A thread that looks all the time looks for as little as there can be.
        if self.idle {
            return Ok(None);
        }
        match self.nothing() {
            Nothing::Yet => Ok(None),
            Nothing::EverAgain => Err(self.failed.map_or(Error::Gone, Error::Violation)),
        }
    }

    /// The peer broke a rule.
    #[cold]
    #[inline(never)]
    fn note(&mut self, violation: Violation) {
        self.idle = false;
        let _ = self.fail(violation);
    }

    #[inline(never)]
    fn nothing(&mut self) -> Nothing {
        if self.failed.is_some() {
            return Nothing::EverAgain;
        }
        for number in 0..self.lanes.len() {
            let lane = &mut self.lanes[number];
            self.kick |= lane.rx.release();
            if lane.staged.first.is_some()
                && lane.staged.since.is_some_and(|since| since.elapsed() > CHAIN_DEADLINE)
            {
                self.note(Violation::ChainLate);
                return Nothing::EverAgain;
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
            return Nothing::EverAgain;
        }
        // Nothing is owed, awaited or late until something comes.
        self.idle = self.replay.is_empty() && self.lanes.iter().all(|lane| lane.staged.first.is_none());
        Nothing::Yet
    }

    /// Whether there is a message, or part of one.
    #[inline]
    #[must_use]
    pub fn has_message(&self) -> bool {
        self.lanes.iter().any(|lane| lane.rx.has_message())
    }

    /// A slot of a message with several. A whole message is in the lane's [`Staged`].
    #[inline(never)]
    fn chain(&mut self, number: usize, desc: Desc) -> Chained {
        match self.chain_checked(number, desc) {
            Ok(false) => Chained::Part,
            Ok(true) => Chained::Whole,
            Err(violation) => {
                self.note(violation);
                Chained::Broken
            }
        }
    }

    fn chain_checked(&mut self, number: usize, desc: Desc) -> Result<bool, Violation> {
        let Lane { rx, staged, .. } = &mut self.lanes[number];
        let max = self.agreed.chain_max;
        match staged.first {
            None => {
                staged.first = Some(desc);
                (staged.slots, staged.since) = (0, None);
                staged.segments.clear();
            }
            Some(first) => {
                let same = flags::KIND | flags::REPLAY;
                if desc.flags & same != first.flags & same || desc.has(flags::INLINE) {
                    return Err(Violation::ChainFlags(desc.flags));
                }
            }
        }
        staged.slots += 1;
        if staged.slots > max || (staged.slots == max && desc.has(flags::MORE)) {
            return Err(Violation::ChainLength(max));
        }
        if desc.has(flags::INLINE) {
            if desc.len > most_inline(&desc) {
                return Err(Violation::Inline(desc.len));
            }
        } else {
            staged.segments.push(self.regions.check(&desc, self.agreed.segment_max)?);
        }
        if desc.has(flags::MORE) {
            if staged.since.is_none() && !rx.has_message() {
                staged.since = Some(Instant::now());
            }
            return Ok(false);
        }
        staged.head = staged.first.take().unwrap_or(desc);
        Ok(true)
    }

    /// Notes the end of a request; false if there is no such request.
    #[inline(always)]
    fn completion(&mut self, number: usize, desc: &Desc) -> bool {
        let lane = &mut self.lanes[number];
        if desc.flags != flags::COMPLETION || lane.staged.first.is_some() {
            self.note(Violation::CompletionFlags(desc.flags));
            return false;
        }
        let Some(index) = self.flight.find(desc.cookie) else {
            self.note(Violation::Cookie(desc.cookie));
            return false;
        };
        // The next request follows, soon if this is a round trip.
        lane.tx.prepare();
        if let Some(clock) = &self.clock {
            self.stats.latency.note(clock.now().saturating_duration_since(clock.sent[index as usize]));
        }
        // Not free yet: the application deals with it until it asks for the next message.
        self.settle = Some(index);
        true
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

/// Most bytes in a slot, by what it is.
#[inline]
fn most_inline(desc: &Desc) -> u32 {
    if desc.kind() == flags::ONE_WAY { 16 } else { 8 }
}

/// What became of a slot of a message with several.
enum Chained {
    /// There is more to come.
    Part,
    /// It was the last one.
    Whole,
    /// It breaks a rule.
    Broken,
}

/// What nothing to receive means.
enum Nothing {
    Yet,
    /// The peer broke a rule, or is gone.
    EverAgain,
}
