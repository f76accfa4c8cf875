//! [`Gate`]: where the thread of a connection waits for its next message, and can be kept from taking it.
//!
//! A hand-over needs every connection between two messages: one that is read in half, or being answered, cannot be told
//! to another process. What the front end sends meanwhile stays in the socket.

use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

/// What the thread may do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Take the next message (or see the end of the connection).
    Message,
    /// End, and leave everything as it is: the connection is another process's now.
    Leave,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// The thread is to stop at the gate.
    Closing,
    /// It did.
    Closed,
    /// For good.
    Left,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    wake: std::os::fd::OwnedFd,
}

impl Gate {
    pub(crate) fn new() -> rustix::io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { state: Mutex::new(State::Open), changed: Condvar::new(), wake })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: State) {
        *self.lock() = state;
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        self.changed.notify_all();
    }

    /// The thread's side: waits until something is there to read and the gate is open.
    pub(crate) fn pass(&self, socket: &UnixStream) -> rustix::io::Result<Turn> {
        loop {
            let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::new(&self.wake, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error),
            }
            let [readable, woken] = fds.map(|fd| !fd.revents().is_empty());
            if woken {
                let mut count = [0; 8];
                let _ = rustix::io::read(&self.wake, &mut count);
                let mut state = self.lock();
                if *state == State::Closing {
                    *state = State::Closed;
                    self.changed.notify_all();
                }
                while *state == State::Closed {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                if *state == State::Left {
                    return Ok(Turn::Leave);
                }
            } else if readable {
                return Ok(Turn::Message);
            }
        }
    }

    /// Stops the thread at the gate; false if it did not come by in time (the gate is open again then).
    pub(crate) fn close(&self, limit: Duration) -> bool {
        self.set(State::Closing);
        let by = Instant::now() + limit;
        let mut state = self.lock();
        while *state == State::Closing {
            let left = by.saturating_duration_since(Instant::now());
            if left.is_zero() {
                *state = State::Open;
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Lets a thread that was stopped go on.
    pub(crate) fn open(&self) {
        self.set(State::Open);
    }

    /// Ends a thread that was stopped.
    pub(crate) fn leave(&self) {
        self.set(State::Left);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;
    use std::sync::mpsc::{RecvTimeoutError, channel};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn a_closed_gate_keeps_the_message_in_the_socket() {
        let (mut front, back) = UnixStream::pair().unwrap();
        let gate = Arc::new(Gate::new().unwrap());
        let (turns, taken) = channel();
        let (theirs, socket) = (Arc::clone(&gate), back.try_clone().unwrap());
        let thread = std::thread::spawn(move || {
            loop {
                let turn = theirs.pass(&socket).unwrap();
                turns.send(turn).unwrap();
                if turn == Turn::Leave {
                    return;
                }
                std::io::Read::read_exact(&mut &socket, &mut [0]).unwrap();
            }
        });
        assert!(gate.close(LIMIT));
        front.write_all(b"1").unwrap();
        assert_eq!(taken.recv_timeout(Duration::from_millis(50)), Err(RecvTimeoutError::Timeout));
        gate.open();
        assert_eq!(taken.recv_timeout(LIMIT), Ok(Turn::Message));
        assert!(gate.close(LIMIT));
        front.write_all(b"2").unwrap();
        gate.leave();
        assert_eq!(taken.recv_timeout(LIMIT), Ok(Turn::Leave));
        thread.join().unwrap();
        let mut left = [0];
        std::io::Read::read_exact(&mut &back, &mut left).unwrap();
        assert_eq!(&left, b"2", "what was not taken is there for the next owner");
    }

    #[test]
    fn a_gate_that_nobody_comes_by_stays_open() {
        let gate = Gate::new().unwrap();
        assert!(!gate.close(Duration::from_millis(1)));
        assert_eq!(*gate.lock(), State::Open);
    }
}
