//! The way from the set-up thread to the data thread: a queue that is looked at between batches.
//!
//! The data thread pays one relaxed-cost load per pass while nothing is there; it takes the lock only when something
//! is. A sleeping data thread is woken through the event descriptor, which stays readable until it was drained.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

/// See the module.
#[derive(Debug)]
pub struct Mailbox<T> {
    queue: Mutex<VecDeque<T>>,
    pending: AtomicBool,
    wake: Arc<OwnedFd>,
}

impl<T> Mailbox<T> {
    /// An empty mailbox.
    ///
    /// # Errors
    /// No event descriptor could be had.
    pub fn new() -> rustix::io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        Ok(Self { queue: Mutex::default(), pending: AtomicBool::new(false), wake })
    }

    /// Appends a message and wakes the reader.
    pub fn send(&self, message: T) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(message);
        self.pending.store(true, Ordering::Release);
        self.wake();
    }

    /// Wakes the reader without a message.
    pub fn wake(&self) {
        // Fails only when the counter is full, and then the descriptor is readable anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// The event descriptor that wakes the reader.
    pub(crate) fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.wake
    }

    /// Whether something is there. Cheap enough for every pass.
    #[inline]
    pub fn has_mail(&self) -> bool {
        self.pending.load(Ordering::Acquire)
    }

    /// Takes the oldest message; clears the wake-up once the queue is empty.
    pub fn take(&self) -> Option<T> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let message = queue.pop_front();
        if queue.is_empty() {
            // Under the lock: a sender either pushed before (and its message was seen) or sets the flag after.
            self.pending.store(false, Ordering::Release);
        }
        message
    }

    /// Makes the descriptor unreadable until the next send. Call before the last look at [`has_mail`](Self::has_mail).
    pub fn clear_wake(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
    }
}

impl<T> AsFd for Mailbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Many senders, one reader that sleeps on the descriptor alone: a lost wake-up would end in the poll's timeout.
    #[test]
    fn no_message_and_no_wake_up_is_lost() {
        const PER_SENDER: u32 = 20_000;
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let senders: Vec<_> = (0..3)
            .map(|_| {
                let mailbox = Arc::clone(&mailbox);
                std::thread::spawn(move || (0..PER_SENDER).for_each(|n| mailbox.send(n)))
            })
            .collect();
        let mut got = 0;
        while got < 3 * PER_SENDER {
            mailbox.clear_wake();
            if mailbox.has_mail() {
                while mailbox.take().is_some() {
                    got += 1;
                }
                continue;
            }
            let mut fds = [rustix::event::PollFd::new(&*mailbox, rustix::event::PollFlags::IN)];
            let timeout = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
            assert_eq!(
                rustix::event::poll(&mut fds, Some(&timeout)).unwrap(),
                1,
                "slept with {got} messages taken"
            );
        }
        senders.into_iter().for_each(|sender| sender.join().unwrap());
        assert!(mailbox.take().is_none());
    }
}
