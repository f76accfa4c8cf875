//! [`Ring`]: an io_uring instance for the data thread, with which one system call does all that is queued and waits.
//!
//! It owns what the kernel works on: a receive's buffer and a send's bytes go in by value and come back with the result, a
//! descriptor is shared and kept until its operation has ended. So nothing that the rest of the program does can take memory
//! or a descriptor number away from under an operation, and guest memory is never armed for a receive at all: what is armed
//! while the thread sleeps is private. An operation whose descriptor nobody else holds any more is cancelled by the next
//! [`Ring::submit`] or [`Ring::wait`].
//!
//! It can do five things: send, receive, poll, write, cancel. The kernel is told so before the first operation
//! (`IORING_REGISTER_RESTRICTIONS`): what a seccomp filter forbids is not to be had through the ring either.
#![allow(unsafe_code)] // The kernel reads and writes memory behind the compiler's back.

mod choose;
mod send;
#[cfg(test)]
mod tests;

pub use choose::{IoMode, Unavailable, choose};
pub use send::SendBatch;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode};

/// Entries of the submission queue: what one pass queues. More is submitted in several calls.
const ENTRIES: u32 = 256;
/// Operations that the table has room for before it allocates: the queues of four devices and their sockets.
const OPS: usize = 128;

/// `user_data` of what has no place in the table.
const SIGNAL: u64 = u64::MAX;
const CANCEL: u64 = u64::MAX - 1;

/// What is added to an event descriptor.
static ONE: u64 = 1;

/// Names an operation until its result was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    index: u32,
    generation: u32,
}

impl Token {
    fn user_data(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }
}

#[derive(Debug)]
enum Work {
    /// Tells of each event until its descriptor goes.
    Watch,
    /// Tells once.
    Poll(u32),
    Recv(Box<[u8]>),
    Send(Box<SendBatch>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// In the submission queue, or the kernel has it.
    Underway,
    Done(i32),
}

#[derive(Debug)]
struct Op {
    fd: Arc<OwnedFd>,
    work: Work,
    state: State,
    cancelled: bool,
    /// Nobody takes its result.
    unwanted: bool,
}

#[derive(Debug, Default)]
struct Place {
    generation: u32,
    op: Option<Op>,
}

/// How often what was called.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// `io_uring_enter`.
    pub enters: u64,
    /// Signals that could not be written.
    pub failed_signals: u64,
}

/// See the [module](self).
pub struct Ring {
    ring: IoUring,
    places: Vec<Place>,
    free: Vec<u32>,
    /// Entries that found no room in the queue.
    backlog: VecDeque<Entry>,
    /// Descriptors of signals that are queued.
    signals: Vec<Arc<OwnedFd>>,
    /// Operations in the queue whose success makes no completion.
    silent: Vec<Token>,
    enabled: bool,
    counts: Counts,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ops = self.places.iter().filter(|place| place.op.is_some()).count();
        f.debug_struct("Ring").field("ops", &ops).field("enabled", &self.enabled).finish_non_exhaustive()
    }
}

// SAFETY: the pointers in it go to memory that it owns itself (buffers and send batches in boxes) or keeps mapped (guest
// memory), none of which is bound to a thread. The kernel accepts calls only from the thread that called `enable`.
unsafe impl Send for Ring {}

impl Ring {
    fn of(ring: IoUring) -> Self {
        Self {
            ring,
            places: Vec::with_capacity(OPS),
            free: Vec::with_capacity(OPS),
            backlog: VecDeque::with_capacity(OPS),
            signals: Vec::with_capacity(ENTRIES as usize),
            silent: Vec::with_capacity(OPS),
            enabled: false,
            counts: Counts::default(),
        }
    }

    /// Starts it, on the thread that is to use it from here on.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn enable(&mut self) -> io::Result<()> {
        if !self.enabled {
            self.ring.submitter().register_enable_rings()?;
            self.enabled = true;
        }
        Ok(())
    }

    /// How often what was called.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Whether something is queued that [`submit`](Self::submit) would submit.
    #[must_use]
    pub fn has_queued(&mut self) -> bool {
        !self.backlog.is_empty() || !self.ring.submission().is_empty()
    }

    /// Whether something ended, as far as that is known without a system call.
    #[must_use]
    pub fn has_news(&mut self) -> bool {
        let queue = self.ring.submission();
        let news = queue.taskrun() || queue.cq_overflow();
        drop(queue);
        news || !self.ring.completion().is_empty()
    }

    /// Whether a result waits to be taken.
    #[must_use]
    pub fn has_results(&self) -> bool {
        let ended = |op: &Op| matches!(op.state, State::Done(_));
        self.places.iter().any(|place| place.op.as_ref().is_some_and(ended))
    }

    /// From here on, each event of `fd` ends a wait, until nobody else holds it. Its events are never read.
    pub fn watch(&mut self, fd: &Arc<OwnedFd>) {
        let token = self.place(fd, Work::Watch);
        self.start(token);
    }

    /// Adds one to an event descriptor, which has to be non-blocking, with the next call.
    pub fn signal(&mut self, fd: &Arc<OwnedFd>) {
        // `RWF_NOWAIT`: one that is full, or that somebody made blocking, costs its owner the signal and nobody the time.
        let entry = opcode::Write::new(Fd(fd.as_raw_fd()), (&raw const ONE).cast(), size_of_val(&ONE) as u32)
            .offset(u64::MAX)
            .rw_flags(libc::RWF_NOWAIT)
            .build()
            .flags(Flags::SKIP_SUCCESS)
            .user_data(SIGNAL);
        self.signals.push(Arc::clone(fd));
        self.push(entry);
    }

    /// Queues a send. It takes what the socket buffer takes and has ended when the next call returns.
    pub fn send(&mut self, fd: &Arc<OwnedFd>, batch: Box<SendBatch>) -> Token {
        let token = self.place(fd, Work::Send(batch));
        self.silent.push(token);
        self.start(token);
        token
    }

    /// Queues a receive into `buffer`, which ends when something is there.
    pub fn recv(&mut self, fd: &Arc<OwnedFd>, buffer: Box<[u8]>) -> Token {
        let token = self.place(fd, Work::Recv(buffer));
        self.start(token);
        token
    }

    /// Queues a wait until `fd` is readable, writable, or either.
    pub fn poll(&mut self, fd: &Arc<OwnedFd>, readable: bool, writable: bool) -> Token {
        let mut events = 0;
        if readable {
            events |= libc::POLLIN as u32;
        }
        if writable {
            events |= libc::POLLOUT as u32;
        }
        let token = self.place(fd, Work::Poll(events));
        self.start(token);
        token
    }

    /// Ends a poll whose result is not wanted any more.
    pub fn drop_poll(&mut self, token: Token) {
        if !self.take_poll(token) {
            self.cancel(token);
            if let Some(op) = self.op(token) {
                op.unwanted = true;
            }
        }
    }

    /// Cancels an operation; it ends all the same.
    fn cancel(&mut self, token: Token) {
        if let Some(op) = self.op(token)
            && !op.cancelled
            && !matches!(op.state, State::Done(_))
        {
            op.cancelled = true;
            let entry = opcode::AsyncCancel::new(token.user_data())
                .build()
                .flags(Flags::SKIP_SUCCESS)
                .user_data(CANCEL);
            self.push(entry);
        }
    }

    /// The result of a send, once it has ended: bytes that the socket took (`WouldBlock`: none).
    pub fn take_send(&mut self, token: Token) -> Option<(Box<SendBatch>, io::Result<usize>)> {
        match self.take(token)? {
            (Work::Send(batch), result) => Some((batch, result)),
            _ => None,
        }
    }

    /// The result of a receive, once it has ended: 0 bytes when the peer closed its side.
    pub fn take_recv(&mut self, token: Token) -> Option<(Box<[u8]>, io::Result<usize>)> {
        match self.take(token)? {
            (Work::Recv(buffer), result) => Some((buffer, result)),
            _ => None,
        }
    }

    /// Whether a poll has ended; it is forgotten then.
    pub fn take_poll(&mut self, token: Token) -> bool {
        self.take(token).is_some()
    }

    /// Does what is queued, without waiting.
    ///
    /// # Errors
    /// The kernel is out of memory.
    pub fn submit(&mut self) -> io::Result<()> {
        self.enter(0, None)
    }

    /// Does what is queued and waits until something ended (that is not a send) or `limit` is over.
    ///
    /// # Errors
    /// The kernel is out of memory.
    pub fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.enter(1, limit)
    }

    /// Ends all receives and polls that are underway; watches stay. What ended before that has its result.
    ///
    /// # Errors
    /// The kernel is out of memory.
    pub fn quiesce(&mut self) -> io::Result<()> {
        self.end_all(false)
    }

    fn end_all(&mut self, watches: bool) -> io::Result<()> {
        loop {
            let mut left = 0;
            for index in 0..self.places.len() {
                let place = &self.places[index];
                let Some(op) = &place.op else { continue };
                if matches!(op.state, State::Done(_)) || matches!(op.work, Work::Watch) && !watches {
                    continue;
                }
                left += 1;
                let token = Token { index: index as u32, generation: place.generation };
                self.cancel(token);
            }
            if left == 0 {
                return Ok(());
            }
            self.wait(Some(Duration::from_millis(100)))?;
        }
    }

    fn place(&mut self, fd: &Arc<OwnedFd>, work: Work) -> Token {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place::default());
            (self.places.len() - 1) as u32
        });
        let place = &mut self.places[index as usize];
        place.generation = place.generation.wrapping_add(1) & (u32::MAX >> 1);
        place.op =
            Some(Op { fd: Arc::clone(fd), work, state: State::Underway, cancelled: false, unwanted: false });
        Token { index, generation: place.generation }
    }

    fn op(&mut self, token: Token) -> Option<&mut Op> {
        self.places
            .get_mut(token.index as usize)
            .filter(|place| place.generation == token.generation)?
            .op
            .as_mut()
    }

    fn forget(&mut self, index: u32) -> Option<Op> {
        let op = self.places.get_mut(index as usize)?.op.take();
        if op.is_some() {
            self.free.push(index);
        }
        op
    }

    fn take(&mut self, token: Token) -> Option<(Work, io::Result<usize>)> {
        let State::Done(result) = self.op(token)?.state else { return None };
        let op = self.forget(token.index)?;
        let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        Some((op.work, result))
    }

    /// Queues the entry of an operation.
    fn start(&mut self, token: Token) {
        let Some(op) = self.op(token) else { return };
        let fd = Fd(op.fd.as_raw_fd());
        let entry = match &mut op.work {
            Work::Watch => opcode::PollAdd::new(fd, libc::POLLIN as u32).multi(true).build(),
            Work::Poll(events) => opcode::PollAdd::new(fd, *events).build(),
            Work::Recv(buffer) => opcode::Recv::new(fd, buffer.as_mut_ptr(), buffer.len() as u32).build(),
            // All or as much as there is room for, and at once: only what falls short makes a completion.
            Work::Send(batch) => opcode::SendMsg::new(fd, batch.header())
                .flags((libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT | libc::MSG_WAITALL) as u32)
                .build()
                .flags(Flags::SKIP_SUCCESS),
        };
        op.state = State::Underway;
        self.push(entry.user_data(token.user_data()));
    }

    fn push(&mut self, entry: Entry) {
        // Behind what waits, so that the order stays.
        if !self.backlog.is_empty() || !self.try_push(&entry) {
            self.backlog.push_back(entry);
        }
    }

    fn try_push(&mut self, entry: &Entry) -> bool {
        // SAFETY: what the entry points to stays where it is until the operation has ended: a static, or memory of an
        // operation in `places` - a buffer or a batch in a box of its own, whose pieces are owned by it or kept mapped -
        // which is given back, or dropped, only in the state `Done`. Its descriptor is held by `places` or `signals`.
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    /// Cancels what nobody can be waiting for, forgets what nobody took.
    fn sweep(&mut self) {
        for index in 0..self.places.len() {
            let place = &self.places[index];
            let token = Token { index: index as u32, generation: place.generation };
            match &place.op {
                Some(op) if Arc::strong_count(&op.fd) == 1 => match op.state {
                    State::Done(_) => drop(self.forget(token.index)),
                    State::Underway => self.cancel(token),
                },
                _ => {}
            }
        }
    }

    fn enter(&mut self, want: usize, limit: Option<Duration>) -> io::Result<()> {
        self.sweep();
        loop {
            while let Some(entry) = self.backlog.pop_front() {
                if !self.try_push(&entry) {
                    self.backlog.push_front(entry);
                    break;
                }
            }
            let last = self.backlog.is_empty();
            // What ended already is not waited for.
            let want = if last && self.ring.completion().is_empty() { want } else { 0 };
            self.counts.enters += 1;
            let timespec = limit.map(Timespec::from);
            let submitter = self.ring.submitter();
            let entered = match &timespec {
                Some(limit) if want != 0 => {
                    submitter.submit_with_args(want, &SubmitArgs::new().timespec(limit))
                }
                _ => submitter.submit_and_wait(want),
            };
            let harvested = self.harvest();
            match entered {
                Ok(_) => {}
                // The time is over, or a signal came, both of which end a wait.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => {}
                // The completion queue is full or memory short: it was emptied just now.
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) && harvested => {}
                Err(error) => return Err(error),
            }
            if self.ring.submission().is_empty() && self.backlog.is_empty() {
                break;
            }
        }
        self.signals.clear();
        // Sends end within the call; those of which nothing was heard went out whole.
        for at in 0..self.silent.len() {
            let token = self.silent[at];
            if let Some(op) = self.op(token)
                && let (State::Underway, Work::Send(batch)) = (op.state, &op.work)
            {
                op.state = State::Done(i32::try_from(batch.len_bytes()).unwrap_or(i32::MAX));
            }
        }
        self.silent.clear();
        Ok(())
    }

    /// Takes all completions; whether there were any.
    fn harvest(&mut self) -> bool {
        let mut any = false;
        loop {
            let Some(completion) = self.ring.completion().next() else { break };
            any = true;
            let (user_data, result) = (completion.user_data(), completion.result());
            if user_data == SIGNAL {
                self.counts.failed_signals += 1;
                continue;
            }
            let token = Token { index: user_data as u32, generation: (user_data >> 32) as u32 };
            let more = cqueue::more(completion.flags());
            let Some(op) = self.op(token) else { continue };
            match op.work {
                Work::Watch if more => {}
                // A watch ends by itself where completions are short of room; an error is for good.
                Work::Watch if result >= 0 && !op.cancelled => self.start(token),
                Work::Watch => drop(self.forget(token.index)),
                _ if op.unwanted || Arc::strong_count(&op.fd) == 1 => drop(self.forget(token.index)),
                _ => op.state = State::Done(result),
            }
        }
        any
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.enabled && self.end_all(true).is_ok() {
            return;
        }
        if !self.enabled {
            // Nothing was ever submitted.
            return;
        }
        // The kernel may still write to what is underway: such memory is better lost.
        for place in &mut self.places {
            std::mem::forget(place.op.take());
        }
    }
}
