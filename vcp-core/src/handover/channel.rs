//! [`Channel`]: messages with descriptors over a local stream socket.
//!
//! A message is a header (length of the text, number of descriptors), the descriptors in batches of at most
//! [`BATCH`], one byte each batch, and the text (JSON). The byte keeps each batch to a receive of its own.

use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::{Fds, Message};

/// Descriptors sent at once; the kernel takes 253.
const BATCH: usize = 64;
/// First bytes of every message: what is no such message is told apart at once.
const MAGIC: u32 = u32::from_le_bytes(*b"vcpH");
/// Longest text; a state of 64 devices with 64 queues each stays below.
const MAX_TEXT_BYTES: usize = 32 << 20;
/// Most descriptors of a message.
const MAX_FDS: usize = 8192;

/// Why a message could not be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other process ended or closed the channel.
    #[error("the other process ended or gave up")]
    Closed,
    /// Nothing came in time.
    #[error("the other process took longer than {} ms", .0.as_millis())]
    Late(Duration),
    /// The system refused.
    #[error("the channel to the other process failed")]
    Io(#[from] io::Error),
    /// What came is no message that this version knows.
    #[error("the other process sent what this version does not understand: {0}")]
    Text(String),
}

/// A connection between two processes. Every call has a time limit.
#[derive(Debug)]
pub struct Channel(UnixStream);

impl Channel {
    /// Over a connected stream socket.
    ///
    /// # Errors
    /// The system refused.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self(stream))
    }

    /// Sends a message with descriptors. When this returns without an error, the other process can receive all of it
    /// whatever happens to this one.
    ///
    /// # Errors
    /// [`ChannelError`]; the message was then not sent in full, and none can follow it.
    pub fn send(&self, message: &Message, fds: &Fds, limit: Duration) -> Result<(), ChannelError> {
        let text = serde_json::to_vec(message).map_err(|error| ChannelError::Text(error.to_string()))?;
        let (len, count) = (text.len(), fds.borrowed().count());
        if len > MAX_TEXT_BYTES || count > MAX_FDS {
            return Err(ChannelError::Text(format!("{len} bytes with {count} descriptors are too many")));
        }
        let mut header = [0; 12];
        header[..4].copy_from_slice(&MAGIC.to_le_bytes());
        header[4..8].copy_from_slice(&(len as u32).to_le_bytes());
        header[8..].copy_from_slice(&(count as u32).to_le_bytes());
        let by = Deadline::new(limit);
        if count == 0 {
            // In one piece, so that it is all there or not at all: `Owned` depends on it.
            let mut whole = header.to_vec();
            whole.extend_from_slice(&text);
            return self.send_bytes(&whole, &by);
        }
        self.send_bytes(&header, &by)?;
        let all: Vec<BorrowedFd<'_>> = fds.borrowed().collect();
        for batch in all.chunks(BATCH) {
            self.send_batch(batch, &by)?;
        }
        self.send_bytes(&text, &by)
    }

    fn send_bytes(&self, mut bytes: &[u8], by: &Deadline) -> Result<(), ChannelError> {
        while !bytes.is_empty() {
            match rustix::net::send(&self.0, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) => self.again(error, PollFlags::OUT, by)?,
            }
        }
        Ok(())
    }

    fn send_batch(&self, batch: &[BorrowedFd<'_>], by: &Deadline) -> Result<(), ChannelError> {
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            ancillary.push(SendAncillaryMessage::ScmRights(batch));
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.0, &[IoSlice::new(b"F")], &mut ancillary, flags) {
                Ok(_) => return Ok(()),
                Err(error) => self.again(error, PollFlags::OUT, by)?,
            }
        }
    }

    /// The next message and its descriptors.
    ///
    /// # Errors
    /// [`ChannelError`]; nothing more can be received then.
    pub fn receive(&self, limit: Duration) -> Result<(Message, Fds), ChannelError> {
        let by = Deadline::new(limit);
        let mut header = [0; 12];
        self.receive_bytes(&mut header, &by)?;
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (len, count) = (word(4) as usize, word(8) as usize);
        if word(0) != MAGIC || len > MAX_TEXT_BYTES || count > MAX_FDS {
            return Err(ChannelError::Text("not a hand-over message".into()));
        }
        let mut fds = Vec::with_capacity(count);
        while fds.len() < count {
            let wanted = (count - fds.len()).min(BATCH);
            let got = self.receive_batch(&by)?;
            if got.len() != wanted {
                return Err(ChannelError::Text(format!("{} descriptors instead of {wanted}", got.len())));
            }
            fds.extend(got);
        }
        let mut text = vec![0; len];
        self.receive_bytes(&mut text, &by)?;
        let message = serde_json::from_slice(&text).map_err(|error| ChannelError::Text(error.to_string()))?;
        Ok((message, fds.into_iter().collect()))
    }

    fn receive_bytes(&self, bytes: &mut [u8], by: &Deadline) -> Result<(), ChannelError> {
        let mut at = 0;
        while at < bytes.len() {
            match rustix::net::recv(&self.0, &mut bytes[at..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(ChannelError::Closed),
                Ok((got, _)) => at += got,
                Err(error) => self.again(error, PollFlags::IN, by)?,
            }
        }
        Ok(())
    }

    fn receive_batch(&self, by: &Deadline) -> Result<Vec<std::os::fd::OwnedFd>, ChannelError> {
        loop {
            let mut byte = [0; 1];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            match recvmsg(&self.0, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, flags) {
                Ok(got) if got.bytes == 0 => return Err(ChannelError::Closed),
                Ok(_) => {
                    let mut fds = Vec::new();
                    for message in ancillary.drain() {
                        if let RecvAncillaryMessage::ScmRights(some) = message {
                            fds.extend(some);
                        }
                    }
                    return Ok(fds);
                }
                Err(error) => self.again(error, PollFlags::IN, by)?,
            }
        }
    }

    /// After this, nothing more can be sent to this side: what the other process has not sent by now it cannot send
    /// any more (its send fails). What it has sent can still be received.
    pub fn close_door(&self) {
        // Fails only where the peer is gone already.
        let _ = self.0.shutdown(Shutdown::Read);
    }

    /// Whether the other process closed its side or ended.
    #[must_use]
    pub fn is_hung_up(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::new(&self.0, PollFlags::RDHUP)];
        poll(&mut fds, Some(&now)).is_ok()
            && fds[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)
    }

    /// Waits where the call would have blocked; every other error is one.
    fn again(&self, error: Errno, flags: PollFlags, by: &Deadline) -> Result<(), ChannelError> {
        match error {
            Errno::INTR => Ok(()),
            Errno::PIPE | Errno::CONNRESET => Err(ChannelError::Closed),
            Errno::AGAIN => loop {
                let Some(left) = by.at.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
                else {
                    return Err(ChannelError::Late(by.limit));
                };
                let timeout = Timespec {
                    tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                    tv_nsec: i64::from(left.subsec_nanos()),
                };
                match poll(&mut [PollFd::new(&self.0, flags)], Some(&timeout)) {
                    Ok(0) | Err(Errno::INTR) => {}
                    Ok(_) => return Ok(()),
                    Err(error) => return Err(ChannelError::Io(error.into())),
                }
            },
            error if error.kind() == ErrorKind::BrokenPipe => Err(ChannelError::Closed),
            error => Err(ChannelError::Io(error.into())),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A time limit and when it is over.
struct Deadline {
    limit: Duration,
    at: Instant,
}

impl Deadline {
    fn new(limit: Duration) -> Self {
        Self { limit, at: Instant::now() + limit }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn pair() -> (Channel, Channel) {
        let (a, b) = UnixStream::pair().unwrap();
        (Channel::new(a).unwrap(), Channel::new(b).unwrap())
    }

    fn refusal(why: &str) -> Message {
        Message::Refused { why: why.into() }
    }

    #[test]
    fn messages_and_descriptors_arrive_as_sent() {
        let (a, b) = pair();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut fds = Fds::default();
        // More than one batch; the text longer than a socket buffer.
        let places: Vec<_> = (0..150).map(|_| fds.put_copy(&writer).unwrap()).collect();
        let why = "x".repeat(1 << 20);
        let text = why.clone();
        let sender = std::thread::spawn(move || a.send(&refusal(&text), &fds, LIMIT).map(|()| a));
        let (message, mut got) = b.receive(LIMIT).unwrap();
        let a = sender.join().unwrap().unwrap();
        assert!(matches!(message, Message::Refused { why: text } if text == why));
        assert_eq!(got.len(), 150);
        let last = got.take(places[149]).unwrap();
        drop((writer, got));
        rustix::io::write(&last, b"!").unwrap();
        let mut byte = [0; 1];
        rustix::io::read(&reader, &mut byte).unwrap();
        assert_eq!(&byte, b"!");

        a.send(&refusal("next"), &Fds::default(), LIMIT).unwrap();
        assert!(matches!(b.receive(LIMIT).unwrap().0, Message::Refused { .. }));
        drop(a);
        assert!(matches!(b.receive(LIMIT), Err(ChannelError::Closed)));
    }

    /// What decides on the owner: after the door was closed nothing can come any more, and what came before is there.
    #[test]
    fn a_closed_door_lets_nothing_in_and_loses_nothing() {
        let (a, b) = pair();
        a.send(&Message::Owned {}, &Fds::default(), LIMIT).unwrap();
        b.close_door();
        assert!(matches!(b.receive(LIMIT).unwrap().0, Message::Owned {}));
        assert!(matches!(b.receive(LIMIT), Err(ChannelError::Closed)));
        assert!(matches!(a.send(&Message::Owned {}, &Fds::default(), LIMIT), Err(ChannelError::Closed)));

        let (a, b) = pair();
        b.close_door();
        assert!(matches!(a.send(&Message::Owned {}, &Fds::default(), LIMIT), Err(ChannelError::Closed)));
        assert!(matches!(b.receive(LIMIT), Err(ChannelError::Closed)));
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for bytes in
            [&b"GET / HTTP/1.1\r\n\r\n"[..], b"vcpH\xff\xff\xff\xff\0\0\0\0", b"vcpH\x02\0\0\0\0\0\0\0{}"]
        {
            let (a, b) = UnixStream::pair().unwrap();
            io::Write::write_all(&mut &a, bytes).unwrap();
            let error = Channel::new(b).unwrap().receive(LIMIT).unwrap_err();
            assert!(matches!(error, ChannelError::Text(_)), "{error}");
        }
        let (_a, b) = pair();
        let error = b.receive(Duration::from_millis(1)).unwrap_err();
        assert!(matches!(error, ChannelError::Late(_)), "{error}");
    }

    #[test]
    fn unknown_fields_are_refused() {
        let text = r#"{"message":"prepared","more":1}"#;
        assert!(serde_json::from_str::<Message>(text).is_err());
        assert!(serde_json::from_str::<Message>(r#"{"message":"prepared"}"#).is_ok());
    }
}
