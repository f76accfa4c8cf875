//! The sending half of a channel: one-way messages, requests, completions, and when to kick.

use super::flight::SentBuf;
use super::{Channel, Error, Request};
use crate::error::Violation;
use crate::layout::{Desc, flags};
use crate::region::Parcel;

/// Why a message was not taken. Nothing of it was published, and its parcels are still the caller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The ring has no room now.
    #[error("the ring is full")]
    Full,
    /// So many requests are without completion as were agreed.
    #[error("the window is used up")]
    Window,
    /// More slots than a message may have.
    #[error("a message of {slots} slots, of {max} allowed")]
    Length {
        /// Slots that it would take.
        slots: usize,
        /// Most that were agreed.
        max: u16,
    },
    /// No such lane.
    #[error("lane {0} does not exist")]
    Lane(u8),
    /// A parcel longer than agreed.
    #[error("{0} bytes in one segment")]
    Segment(u32),
    /// A parcel of a pool that is not announced on this channel, or not acknowledged yet.
    #[error("region {0} is not announced on this channel")]
    Pool(u16),
    /// More than 16 inline bytes.
    #[error("{0} inline bytes")]
    Inline(usize),
    /// The request is not held any more: it was of an earlier epoch whose peer has forgotten it.
    #[error("nobody waits for this request")]
    Stale,
    /// The channel does no more.
    #[error(transparent)]
    Channel(#[from] Error),
}

impl From<Violation> for SendError {
    fn from(violation: Violation) -> Self {
        Self::Channel(violation.into())
    }
}

/// What a message says besides its data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// Priority; 0 is looked at first.
    pub lane: u8,
    /// What is asked for. The queue does not care.
    pub opcode: u16,
    /// Eight bytes with the message. A request with data and without these takes one slot less.
    pub value: Option<u64>,
}

/// A request in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub(super) u64);

impl Token {
    /// A number below the window that no other request in flight has: an index for the application's own table.
    #[inline]
    #[must_use]
    pub fn slot(self) -> u32 {
        self.0 as u32
    }

    /// The whole number, which no other request of this channel has or had for a long time; the same after a re-attach.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The application's code.
    pub code: u16,
    /// The application's value.
    pub value: u64,
    /// Bytes written, say.
    pub len: u32,
}

impl Channel {
    /// Room for `slots` slots of an ordinary message, with the completions' share left.
    #[inline(always)]
    fn room(&mut self, lane: u8, slots: u64) -> Result<(), SendError> {
        if self.blocked {
            self.cannot_send()?;
        }
        let reserve = u64::from(self.agreed.window_theirs);
        let tx = &mut self.lanes.get_mut(usize::from(lane)).ok_or(SendError::Lane(lane))?.tx;
        match tx.free(slots + reserve) {
            Ok(free) if free >= slots + reserve => Ok(()),
            Ok(_) => self.no_room(lane, slots + reserve),
            Err(violation) => Err(self.fail(violation).into()),
        }
    }

    #[cold]
    fn no_room(&mut self, lane: u8, wanted: u64) -> Result<(), SendError> {
        self.wanted = Some((lane, wanted));
        self.stats.full += 1;
        Err(SendError::Full)
    }

    #[cold]
    fn cannot_send(&mut self) -> Result<(), SendError> {
        if let Some(violation) = self.failed {
            return Err(violation.into());
        }
        self.pump_replay()?;
        if self.replay.is_empty() { Ok(()) } else { Err(SendError::Full) }
    }

    /// Sends up to 16 bytes without expecting an answer.
    ///
    /// # Errors
    /// [`SendError`].
    #[inline]
    pub fn send(&mut self, lane: u8, opcode: u16, bytes: &[u8]) -> Result<(), SendError> {
        let mut inline = [0; 16];
        inline.get_mut(..bytes.len()).ok_or(SendError::Inline(bytes.len()))?.copy_from_slice(bytes);
        let [low, high] =
            [0, 8].map(|at| u64::from_le_bytes(inline[at..at + 8].try_into().expect("eight bytes")));
        self.send_words(lane, opcode, [low, high], bytes.len() as u32)
    }

    /// As [`send`](Self::send), with the bytes as two words of which the first `len` bytes count.
    ///
    /// # Errors
    /// [`SendError`].
    #[inline(always)]
    pub fn send_words(&mut self, lane: u8, opcode: u16, words: [u64; 2], len: u32) -> Result<(), SendError> {
        if len > 16 {
            return Err(SendError::Inline(len as usize));
        }
        self.room(lane, 1)?;
        let [cookie, value] = words;
        let flags = flags::ONE_WAY | flags::INLINE;
        self.lanes[usize::from(lane)].tx.push(Desc { cookie, value, opcode, flags, len, ..Desc::default() });
        self.stats.tx_messages += 1;
        Ok(())
    }

    /// Sends data without expecting an answer. The buffers are free again when the peer's head has passed the message.
    /// The parcels are taken out of `data` if it is sent, and left there otherwise.
    ///
    /// # Errors
    /// [`SendError`].
    pub fn send_data(&mut self, head: Head, data: &mut Vec<Parcel<'_>>) -> Result<(), SendError> {
        let count = self.check(&head, data)?;
        self.room(head.lane, count as u64)?;
        let lane = &mut self.lanes[usize::from(head.lane)];
        for number in 0..count {
            lane.tx.push(slot(number, count, flags::ONE_WAY, 0, &head, data));
        }
        let last = lane.tx.tail() - 1;
        lane.one_way.extend(data.drain(..).map(|parcel| (last, parcel.pool().region(), parcel.sent())));
        self.reclaim(head.lane);
        self.stats.tx_messages += 1;
        Ok(())
    }

    /// Frees buffers of one-way messages that the peer's head has passed, as last seen. Called by itself when data is
    /// sent; a sender that waits for a buffer calls it after [`arm`](Self::arm) or a wait.
    pub fn reclaim(&mut self, lane: u8) {
        let Some(lane) = self.lanes.get_mut(usize::from(lane)) else { return };
        if lane.tx.refresh().is_err() {
            // Found out again, and reported, by whoever sends next.
            return;
        }
        while let Some(&(index, region, buf)) = lane.one_way.front() {
            if index >= lane.tx.head() {
                break;
            }
            lane.one_way.pop_front();
            if let Some(Some((pool, _))) = self.pools.get(usize::from(region)) {
                pool.inner.release(buf);
            }
        }
    }

    /// Sends a request. The parcels are taken out of `data` if it is sent, and left there otherwise.
    ///
    /// # Errors
    /// [`SendError`].
    #[inline]
    pub fn request(&mut self, head: Head, data: &mut Vec<Parcel<'_>>) -> Result<Token, SendError> {
        let count = self.check(&head, data)?;
        let token = self.begin(&head, data, count)?;
        for parcel in data.drain(..) {
            let region = parcel.pool().region();
            self.flight.add_buf(token.slot(), SentBuf { region, index: parcel.sent() });
        }
        Ok(token)
    }

    /// Sends a request with one parcel, which comes back if it is not sent.
    ///
    /// # Errors
    /// [`SendError`], with the parcel.
    #[inline]
    pub fn request_one<'p>(
        &mut self,
        head: Head,
        parcel: Parcel<'p>,
    ) -> Result<Token, (SendError, Parcel<'p>)> {
        let data = std::slice::from_ref(&parcel);
        match self.check(&head, data).and_then(|count| self.begin(&head, data, count)) {
            Ok(token) => {
                let region = parcel.pool().region();
                self.flight.add_buf(token.slot(), SentBuf { region, index: parcel.sent() });
                Ok(token)
            }
            Err(error) => Err((error, parcel)),
        }
    }

    /// Sends a request without data.
    ///
    /// # Errors
    /// [`SendError`].
    #[inline]
    pub fn ask(&mut self, lane: u8, opcode: u16, value: u64) -> Result<Token, SendError> {
        self.begin(&Head { lane, opcode, value: Some(value) }, &[], 1)
    }

    #[inline]
    fn begin(&mut self, head: &Head, data: &[Parcel<'_>], count: usize) -> Result<Token, SendError> {
        let Some((_, cookie)) = self.flight.next().filter(|_| self.in_flight() < self.agreed.window_mine)
        else {
            self.stats.window_full += 1;
            return Err(SendError::Window);
        };
        self.room(head.lane, count as u64)?;
        let in_flight = self.flight.in_flight() + 1;
        let lane = &mut self.lanes[usize::from(head.lane)];
        // The peer has a slot for each completion as long as those in flight and those taken but not released are no
        // more than the window (rule R9).
        if u64::from(in_flight) + (lane.rx.head() - lane.rx.released()) > u64::from(self.agreed.window_mine) {
            self.kick |= lane.rx.release();
            self.idle = false;
        }
        let slot = |number| slot(number, count, flags::REQUEST, cookie, head, data);
        self.flight.begin(head.lane, count, slot);
        for number in 0..count {
            lane.tx.push(slot(number));
        }
        if let Some(clock) = &mut self.clock {
            clock.sent[cookie as u32 as usize] = clock.now();
        }
        self.stats.tx_messages += 1;
        self.stats.in_flight_high = self.stats.in_flight_high.max(in_flight);
        Ok(Token(cookie))
    }

    /// Answers a request. There is always room for this.
    ///
    /// # Errors
    /// Nobody waits for it any more, or the channel does no more.
    #[inline]
    #[expect(clippy::needless_pass_by_value, reason = "a request is answered once")]
    pub fn complete(&mut self, request: Request, status: Status) -> Result<(), SendError> {
        if let Some(violation) = self.failed {
            return Err(violation.into());
        }
        let Some((cookie, lane)) = self.held.answer(request.index, request.generation) else {
            self.stats.stale_completions += 1;
            return Err(SendError::Stale);
        };
        // It may have come in an epoch with more lanes.
        let lane = usize::from(lane).min(self.lanes.len() - 1);
        let tx = &mut self.lanes[lane].tx;
        match tx.free(1) {
            Ok(0) => return Err(self.fail(Violation::Reserve).into()),
            Ok(_) => {}
            Err(violation) => return Err(self.fail(violation).into()),
        }
        tx.push(Desc {
            cookie,
            value: status.value,
            opcode: status.code,
            flags: flags::COMPLETION,
            len: status.len,
            ..Desc::default()
        });
        self.held.end(request.index);
        if let Some(clock) = &self.clock {
            let taken = clock.taken[request.index as usize];
            self.stats.service.note(clock.now().saturating_duration_since(taken));
        }
        self.stats.tx_messages += 1;
        Ok(())
    }

    /// Ends a batch: kicks the peer, once at most, if it sleeps. To be called after the last message of a batch; sleeping
    /// ([`arm`](Self::arm), [`wait`](Self::wait)) does it, too.
    #[inline]
    pub fn commit(&mut self) {
        let mut kick = std::mem::take(&mut self.kick);
        let mut news = kick;
        for lane in &mut self.lanes {
            news |= lane.tx.has_news();
            kick |= lane.tx.should_kick();
        }
        if news {
            self.stats.tx_batches += 1;
            if kick {
                self.stats.kicks += 1;
                self.ringer.ring();
            } else {
                self.stats.kicks_suppressed += 1;
            }
        }
    }

    /// A batch: commits when it is dropped.
    pub fn batch(&mut self) -> Batch<'_> {
        Batch { channel: self }
    }

    /// Checks what the caller gave; the number of slots.
    #[inline]
    fn check(&self, head: &Head, data: &[Parcel<'_>]) -> Result<usize, SendError> {
        let slots = data.len() + usize::from(head.value.is_some() || data.is_empty());
        if slots > usize::from(self.agreed.chain_max) {
            return Err(SendError::Length { slots, max: self.agreed.chain_max });
        }
        for parcel in data {
            let number = parcel.pool().region();
            match self.pools.get(usize::from(number)) {
                Some(Some((pool, true))) if std::sync::Arc::ptr_eq(&pool.inner, &parcel.pool().inner) => {}
                _ => return Err(SendError::Pool(number)),
            }
            if parcel.len() > self.agreed.segment_max {
                return Err(SendError::Segment(parcel.len()));
            }
        }
        Ok(slots)
    }

    /// Sends again what the previous epoch left unanswered, as far as there is room.
    pub(super) fn pump_replay(&mut self) -> Result<(), SendError> {
        while let Some(again) = self.replay.front() {
            let number = usize::from(again.lane).min(self.lanes.len() - 1);
            let lane = &mut self.lanes[number];
            let reserve = u64::from(self.agreed.window_theirs);
            let wanted = again.slots.len() as u64 + reserve;
            match lane.tx.free(wanted) {
                Ok(free) if free >= wanted => {}
                Ok(_) => {
                    self.wanted = Some((number as u8, wanted));
                    return Ok(());
                }
                Err(violation) => return Err(self.fail(violation).into()),
            }
            for desc in &again.slots {
                lane.tx.push(Desc { flags: desc.flags | flags::REPLAY, ..*desc });
            }
            let last = lane.tx.tail() - 1;
            lane.one_way.extend(again.bufs.iter().map(|&(region, buf)| (last, region, buf)));
            self.stats.replays += 1;
            self.replay.pop_front();
        }
        self.blocked = self.failed.is_some();
        Ok(())
    }
}

/// Slot `number` of a message of `count` slots.
#[inline]
fn slot(number: usize, count: usize, kind: u16, cookie: u64, head: &Head, data: &[Parcel<'_>]) -> Desc {
    let inline = head.value.is_some() || data.is_empty();
    let flags = if number + 1 < count { kind | flags::MORE } else { kind };
    match number.checked_sub(usize::from(inline)) {
        None => Desc {
            cookie,
            value: head.value.unwrap_or(0),
            opcode: head.opcode,
            flags: flags | flags::INLINE,
            len: if kind == flags::ONE_WAY { 16 } else { 8 },
            ..Desc::default()
        },
        Some(at) => {
            let parcel = &data[at];
            Desc {
                cookie,
                value: parcel.offset(),
                region: parcel.pool().region(),
                opcode: head.opcode,
                flags,
                generation: parcel.pool().generation(),
                len: parcel.len(),
            }
        }
    }
}

/// Messages that are committed together. Dropping it commits.
#[derive(Debug)]
pub struct Batch<'c> {
    channel: &'c mut Channel,
}

impl std::ops::Deref for Batch<'_> {
    type Target = Channel;

    fn deref(&self) -> &Channel {
        self.channel
    }
}

impl std::ops::DerefMut for Batch<'_> {
    fn deref_mut(&mut self) -> &mut Channel {
        self.channel
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        self.channel.commit();
    }
}
