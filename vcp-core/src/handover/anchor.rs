//! What is left of the first process after a hand-over: its process number.
//!
//! Whoever started it - a monitor, systemd, a script - watches that number, signals it and waits for it. Unless that one
//! arranged the hand-over itself and knows the new number, the old process stays as an *anchor*, and does nothing but
//! pass signals on and end as its successor ends. It holds no guest memory and no socket of a target or front end.
//!
//! Anchor and successor are joined by a *lifeline*, a socket pair whose other end each successor hands to the next, so that
//! there is one anchor however often there was a hand-over. A byte to the successor is the number of a signal to act
//! on; a byte to the anchor says that the successor ended well. The end of the anchor is the end of the successor, at once:
//! whoever killed the anchor meant the disk, and is about to start it again.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};

use crate::process::Signals;

/// Stays as the anchor of whoever holds the other end of `lifeline`, until that one ends. Returns whether it ended well.
///
/// # Errors
/// The system refused; the successor ends then.
pub fn hold(mut lifeline: UnixStream, signals: &Signals) -> io::Result<bool> {
    lifeline.set_nonblocking(true)?;
    loop {
        let mut fds = [PollFd::new(signals, PollFlags::IN), PollFd::new(&lifeline, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [signal, spoke] = fds.map(|fd| !fd.revents().is_empty());
        if signal && let Some(signal) = signals.take() {
            // A successor that is gone needs none; one that is handing over itself leaves it for the next.
            let _ = lifeline.write_all(&[u8::try_from(signal).unwrap_or_default()]);
        }
        if spoke {
            match lifeline.read(&mut [0]) {
                Ok(len) => return Ok(len != 0),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(_) => return Ok(false),
            }
        }
    }
}

/// The successor's end of a lifeline.
#[derive(Debug)]
pub struct Lifeline(UnixStream);

/// What came over a [`Lifeline`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Nothing.
    None,
    /// The anchor got a signal.
    Signal(u8),
    /// The anchor is gone.
    End,
}

impl Lifeline {
    /// Holds on to `fd`.
    ///
    /// # Errors
    /// The system refused.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let stream = UnixStream::from(fd);
        stream.set_nonblocking(true)?;
        Ok(Self(stream))
    }

    /// What came.
    pub fn listen(&mut self) -> Word {
        let mut byte = [0];
        match self.0.read(&mut byte) {
            Ok(0) => Word::End,
            Ok(_) => Word::Signal(byte[0]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                Word::None
            }
            Err(_) => Word::End,
        }
    }

    /// The descriptor, for the next successor.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.0
    }

    /// This process ends well.
    pub fn finish(mut self) {
        let _ = self.0.write_all(&[0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_passed_on_and_the_end_is_told() {
        for well in [true, false] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            // An embedded process's signal is 0.
            let (signals, end) = Signals::embedded().unwrap();
            let anchor = std::thread::spawn(move || hold(ours, &signals).unwrap());
            drop(end);
            theirs.read_exact(&mut [0]).unwrap();
            if well {
                theirs.write_all(&[0]).unwrap();
            }
            drop(theirs);
            assert_eq!(anchor.join().unwrap(), well);
        }
    }
}
