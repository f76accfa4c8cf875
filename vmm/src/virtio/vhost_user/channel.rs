//! The backend's own channel (`SET_BACKEND_REQ_FD`): messages that a backend sends unasked. One is understood,
//! `CONFIG_CHANGE_MSG`; others are refused where they want an answer.
//!
//! The reader never waits and never keeps more than one message. Descriptors that come along are closed by the kernel,
//! since no room is given for them.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::error::{Error, Result};

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE_MSG: u32 = 2;
const HEADER_BYTES: usize = 12;
/// Largest payload of a vhost-user message.
const MAX_PAYLOAD_BYTES: usize = 0x1000;
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// Messages that are read in one go; more wait for the next.
const MAX_BATCH: usize = 64;

/// Our end of a backend's channel.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    /// What has come of the next message.
    begun: Vec<u8>,
}

/// What reading brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// The configuration space has changed.
    pub config_change: bool,
    /// The backend has closed its end.
    pub closed: bool,
}

impl Channel {
    /// A channel; the second descriptor is for the backend.
    pub fn pair() -> Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair().map_err(Error::os("create a socket pair"))?;
        ours.set_nonblocking(true).map_err(Error::os("set a socket's flags"))?;
        Ok((Self { stream: ours, begun: Vec::new() }, theirs))
    }

    /// Reads what is there. An error says what the backend did wrong; the channel is of no use after it.
    pub fn read(&mut self) -> std::result::Result<Heard, String> {
        let mut heard = Heard::default();
        for _ in 0..MAX_BATCH {
            match self.message()? {
                Some((request, flags)) => {
                    heard.config_change |= request == CONFIG_CHANGE_MSG;
                    if flags & NEED_REPLY != 0 {
                        self.answer(request)?;
                    }
                }
                None => {
                    heard.closed = self.closed();
                    break;
                }
            }
        }
        Ok(heard)
    }

    /// The next whole message, if it is there: request and flags.
    fn message(&mut self) -> std::result::Result<Option<(u32, u32)>, String> {
        loop {
            let missing = match self.header()? {
                Some((request, flags, len)) if self.begun.len() == HEADER_BYTES + len => {
                    self.begun.clear();
                    return Ok(Some((request, flags)));
                }
                Some((_, _, len)) => HEADER_BYTES + len - self.begun.len(),
                None => HEADER_BYTES - self.begun.len(),
            };
            let mut buffer = [0u8; MAX_PAYLOAD_BYTES];
            let len = missing.min(buffer.len());
            match recv(&self.stream, &mut buffer[..len], RecvFlags::DONTWAIT) {
                Ok((_, 0)) | Err(Errno::AGAIN | Errno::CONNRESET) => return Ok(None),
                Ok((_, got)) => self.begun.extend_from_slice(&buffer[..got.min(len)]),
                Err(Errno::INTR) => {}
                Err(e) => return Err(format!("cannot be read: {e}")),
            }
        }
    }

    /// The checked header of the message that has begun.
    fn header(&self) -> std::result::Result<Option<(u32, u32, usize)>, String> {
        let Some(header) = self.begun.get(..HEADER_BYTES) else { return Ok(None) };
        let word = |i: usize| u32::from_ne_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
        let (request, flags, len) = (word(0), word(4), word(8) as usize);
        if flags & VERSION_MASK != VERSION || flags & REPLY != 0 {
            return Err(format!("sent a message with flags {flags:#x}"));
        }
        if len > MAX_PAYLOAD_BYTES {
            return Err(format!("sent a message of {len} bytes, at most {MAX_PAYLOAD_BYTES} are allowed"));
        }
        Ok(Some((request, flags, len)))
    }

    /// Answers before anything is done about the message: a backend that waits for it could not answer `GET_CONFIG`.
    fn answer(&self, request: u32) -> std::result::Result<(), String> {
        let refused = u32::from(request != CONFIG_CHANGE_MSG);
        let words = [request, VERSION | REPLY, 8, refused, 0].map(u32::to_ne_bytes).concat();
        match send(&self.stream, &words, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) if sent == words.len() => Ok(()),
            Ok(_) | Err(Errno::AGAIN) => Err("does not read the answers it asks for".into()),
            Err(e) => Err(format!("cannot be answered: {e}")),
        }
    }

    fn closed(&self) -> bool {
        matches!(
            recv(&self.stream, &mut [0u8], RecvFlags::DONTWAIT | RecvFlags::PEEK),
            Ok((_, 0)) | Err(Errno::CONNRESET)
        )
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use proptest::prelude::*;

    use super::*;

    fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let header = [request, flags, payload.len() as u32].map(u32::to_ne_bytes).concat();
        [header, payload.to_vec()].concat()
    }

    #[test]
    fn changes_are_heard_in_pieces_and_answered_where_asked() {
        let (mut channel, mut theirs) = Channel::pair().unwrap();
        let change = message(CONFIG_CHANGE_MSG, VERSION | NEED_REPLY, &[]);
        theirs.write_all(&change[..7]).unwrap();
        assert_eq!(channel.read(), Ok(Heard::default()));
        theirs.write_all(&change[7..]).unwrap();
        assert_eq!(channel.read(), Ok(Heard { config_change: true, closed: false }));
        let mut answer = [0u8; 20];
        theirs.read_exact(&mut answer).unwrap();
        assert_eq!(answer[12..], [0; 8]);
        // Another request is refused, and is no change.
        theirs.write_all(&message(3, VERSION | NEED_REPLY, &[1; 40])).unwrap();
        assert_eq!(channel.read(), Ok(Heard::default()));
        theirs.read_exact(&mut answer).unwrap();
        assert_eq!(answer[12..], [1, 0, 0, 0, 0, 0, 0, 0]);
        drop(theirs);
        assert!(channel.read().unwrap().closed);
    }

    #[test]
    fn rule_breakers_are_told_apart() {
        for bytes in [
            message(CONFIG_CHANGE_MSG, 0, &[]),
            message(CONFIG_CHANGE_MSG, VERSION | REPLY, &[]),
            [2u32, VERSION, 0x1001].map(u32::to_ne_bytes).concat(),
            [2u32, VERSION, u32::MAX].map(u32::to_ne_bytes).concat(),
        ] {
            let (mut channel, mut theirs) = Channel::pair().unwrap();
            theirs.write_all(&bytes).unwrap();
            assert!(channel.read().is_err());
        }
    }

    #[test]
    fn a_backend_that_does_not_read_its_answers_is_given_up() {
        let (mut channel, mut theirs) = Channel::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let change = message(CONFIG_CHANGE_MSG, VERSION | NEED_REPLY, &[]);
        for _ in 0..1_000_000 {
            while theirs.write_all(&change).is_ok() {}
            if channel.read().is_err() {
                return;
            }
        }
        panic!("answers go nowhere and nobody minds");
    }

    proptest! {
        /// Any bytes in any pieces: an error or not, no panic, and never more kept than a message.
        #[test]
        fn any_bytes(pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..20)) {
            let (mut channel, mut theirs) = Channel::pair().unwrap();
            for piece in pieces {
                theirs.write_all(&piece).unwrap();
                if channel.read().is_err() {
                    break;
                }
                prop_assert!(channel.begun.len() < HEADER_BYTES + MAX_PAYLOAD_BYTES);
            }
        }
    }
}
