//! `VHOST_USER_SET_STATUS` and `_GET_STATUS`: the driver's progress (VIRTIO 1.2, 2.1), which a front end tells and may ask
//! for again.
//!
//! `vhost` 0.18 knows these messages by their numbers only, and takes them for mistakes. So they are taken from the socket
//! before the crate sees them. The status is kept and nothing else: a ring starts and stops by its own messages, and a
//! front end that stops its rings writes 0 behind it, which is no reason to forget what they had.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

/// `VHOST_USER_SET_STATUS` and `_GET_STATUS`.
pub(super) const SET_STATUS: u32 = 39;
pub(super) const GET_STATUS: u32 = 40;
/// Flags of a message: protocol version 1, is a reply, wants a reply.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// Takes the next message, which is one of the two, and answers it. `acks`: replies can be asked for.
///
/// # Errors
/// The socket's, or of kind `InvalidData` where the message is malformed.
pub(super) fn answer(mut socket: &UnixStream, status: &mut u8, acks: bool) -> io::Result<()> {
    let mut header = [0; 12];
    socket.read_exact(&mut header)?;
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let (request, flags, size) = (word(0), word(4), word(8));
    let expected = if request == SET_STATUS { 8 } else { 0 };
    if flags & (VERSION_MASK | REPLY) != VERSION || size != expected {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a status message is malformed"));
    }
    let value = if request == SET_STATUS {
        let mut value = [0; 8];
        socket.read_exact(&mut value)?;
        let taken = u8::try_from(u64::from_ne_bytes(value));
        if let Ok(taken) = taken {
            tracing::debug!(status = taken, "the driver's status");
            *status = taken;
        }
        if flags & NEED_REPLY == 0 || !acks {
            return Ok(());
        }
        u64::from(taken.is_err())
    } else {
        u64::from(*status)
    };
    let words = [request, VERSION | REPLY, 8].map(u32::to_ne_bytes);
    let mut reply = words.concat();
    reply.extend(value.to_ne_bytes());
    socket.write_all(&reply)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(request: u32, flags: u32, value: Option<u64>) -> Vec<u8> {
        let size = if value.is_some() { 8 } else { 0 };
        let mut bytes = [request, flags, size].map(u32::to_ne_bytes).concat();
        bytes.extend(value.map(u64::to_ne_bytes).into_iter().flatten());
        bytes
    }

    #[test]
    fn a_status_is_kept_told_and_acknowledged() {
        let (front, back) = UnixStream::pair().unwrap();
        let mut status = 0;
        let reply = || {
            let mut reply = [0; 20];
            (&front).read_exact(&mut reply).unwrap();
            let value = u64::from_ne_bytes(reply[12..].try_into().unwrap());
            (u32::from_ne_bytes(reply[..4].try_into().unwrap()), reply[4], value)
        };
        let mut say = |bytes: &[u8], acks| {
            (&front).write_all(bytes).unwrap();
            answer(&back, &mut status, acks)
        };
        say(&message(SET_STATUS, VERSION, Some(0xb)), true).unwrap();
        say(&message(GET_STATUS, VERSION, None), true).unwrap();
        say(&message(SET_STATUS, VERSION | NEED_REPLY, Some(0xf)), true).unwrap();
        say(&message(SET_STATUS, VERSION | NEED_REPLY, Some(0x100)), true).unwrap();
        say(&message(SET_STATUS, VERSION | NEED_REPLY, Some(7)), false).unwrap();
        for wrong in [message(SET_STATUS, VERSION, None), message(GET_STATUS, 2, None)] {
            assert_eq!(say(&wrong, true).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        assert_eq!(reply(), (GET_STATUS, 5, 0xb));
        assert_eq!(reply(), (SET_STATUS, 5, 0));
        assert_eq!(reply(), (SET_STATUS, 5, 1), "no status has so many bits");
        assert_eq!(status, 7);
    }
}
