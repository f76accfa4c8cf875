//! A connection whose sends and receives a runner's ring carries out.
//!
//! The ring has the arena while a send is underway, which is until its next call returns, and the staging buffer while a
//! receive is armed, which is most of the time. Payload for guest memory is received by a call of this side as ever; the ring
//! then only waits until there is some.

use std::io;

use rustix::io::Errno;
use vcp_core::uring::{Ring, SendBatch, Token};

use super::{Data, Jobs, Piece, RX_BATCH_BYTES, Wire, WireError};

/// What the ring has.
#[derive(Debug, Default)]
pub(super) struct InRing {
    recv: Option<Token>,
    send: Option<Token>,
    poll: Option<Poll>,
    /// A batch for the next send.
    spare: Option<Box<SendBatch>>,
}

#[derive(Debug)]
struct Poll {
    token: Token,
    readable: bool,
    writable: bool,
}

impl InRing {
    pub(super) fn is_receiving(&self) -> bool {
        self.recv.is_some()
    }
}

impl Wire {
    /// Whether a runner's ring does the calls.
    pub(in crate::portal) fn is_in_ring(&self) -> bool {
        self.in_ring.is_some()
    }

    /// Gives the ring what is to be done; whether there is more that it could not be given.
    pub(in crate::portal) fn submit_to(&mut self, jobs: &Jobs, ring: &mut Ring) -> bool {
        let mut state = self.in_ring.take().unwrap_or_default();
        let mut again = self.ended.is_some() || !self.staged.is_empty();
        if state.send.is_none() && !self.blocked && !self.pieces.is_empty() {
            let mut batch = state.spare.take().unwrap_or_default();
            again |= self.unfilled | self.gather(&mut batch, jobs);
            state.send = Some(ring.send(self.stream.shared(), batch));
        }
        self.in_ring = Some(state);
        let ring_receives = self.ring_receives(jobs);
        let Some(state) = &mut self.in_ring else { return again };
        if ring_receives && state.recv.is_none() && !again {
            self.staged = 0..0;
            state.recv = Some(ring.recv(self.stream.shared(), std::mem::take(&mut self.staging)));
        }
        let (readable, writable) = (!ring_receives && self.drained, self.blocked);
        again |= !ring_receives && !self.drained;
        let same = |poll: &Poll| poll.readable == readable && poll.writable == writable;
        if !state.poll.as_ref().is_some_and(same) {
            if let Some(old) = state.poll.take() {
                ring.drop_poll(old.token);
            }
            if readable || writable {
                let token = ring.poll(self.stream.shared(), readable, writable);
                state.poll = Some(Poll { token, readable, writable });
            }
        }
        again
    }

    /// Puts what is queued into a batch; whether some did not fit.
    fn gather(&mut self, batch: &mut SendBatch, jobs: &Jobs) -> bool {
        batch.begin(std::mem::take(&mut self.arena));
        for piece in &self.pieces {
            let (pushed, len_bytes) = match *piece {
                Piece::Private { at, len_bytes } => (batch.push_private(at, len_bytes), len_bytes),
                Piece::Slot { slot, at, len_bytes } => match jobs.data(slot) {
                    Data::Guest(data) => (batch.push_guest(data, at, len_bytes), len_bytes),
                    Data::Private(data) => (batch.push_copy(&data[at..at + len_bytes]), len_bytes),
                },
            };
            if pushed < len_bytes {
                return true;
            }
        }
        false
    }

    /// Takes what ended.
    pub(in crate::portal) fn reap_from(&mut self, jobs: &mut Jobs, ring: &mut Ring) {
        let Some(mut state) = self.in_ring.take() else { return };
        if let Some((mut batch, result)) = state.send.and_then(|token| ring.take_send(token)) {
            state.send = None;
            self.stats.sends += 1;
            let all = batch.len_bytes();
            self.arena = batch.take_arena();
            state.spare = Some(batch);
            match result {
                Ok(sent) => {
                    self.blocked = sent < all;
                    self.stats.sent_bytes += sent as u64;
                    self.sent(sent, jobs);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.blocked = true,
                Err(error) => self.fail(error.into()),
            }
        }
        if let Some((staging, result)) = state.recv.and_then(|token| ring.take_recv(token)) {
            state.recv = None;
            self.staging = staging;
            match result {
                Ok(0) => self.fail(WireError::Closed),
                Ok(got) => {
                    self.stats.receives += 1;
                    self.stats.received_bytes += got as u64;
                    self.staged = 0..got;
                    // Whether there is more, the next receive tells.
                    self.drained = got < self.staging.len();
                    self.much = got >= RX_BATCH_BYTES;
                }
                Err(error) => match Errno::from_io_error(&error) {
                    // Cancelled, or nothing after all.
                    Some(Errno::CANCELED | Errno::INTR | Errno::AGAIN) => {}
                    _ => self.fail(error.into()),
                },
            }
        }
        if let Some(poll) = state.poll.take_if(|poll| ring.take_poll(poll.token)) {
            self.drained &= !poll.readable;
            self.blocked &= !poll.writable;
        }
        self.in_ring = Some(state);
    }

    /// The first reason counts.
    fn fail(&mut self, error: WireError) {
        self.ended.get_or_insert(error);
    }

    /// Makes its own calls from here on. Nothing of it may be under way in the ring.
    pub(in crate::portal) fn leave_ring(&mut self) {
        self.in_ring = None;
        self.drained = false;
    }
}
