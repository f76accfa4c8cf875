//! [`Gather`] and [`Scatter`]: one `sendmsg`/`recvmsg` over a mix of private bytes and guest memory.
//!
//! They borrow everything they point to until they are used up, so that safe code in other crates can move data
//! between a socket and guest memory without a copy. They never block: a call that cannot proceed gives
//! [`ErrorKind::WouldBlock`](std::io::ErrorKind::WouldBlock).
//!
//! `gather` and `scatter` build messages, `iov` has what both are made of and the two system calls, `datagram` adds addresses
//! and control data, `peer` tells who is at the other end. What outlives the call, because a ring sends it, is
//! [`SendBatch`](crate::uring::SendBatch).

mod datagram;
mod gather;
mod iov;
mod peer;
mod scatter;

pub use datagram::{Datagram, Unreachable, discard};
pub use gather::Gather;
pub(crate) use iov::Taken;
pub use iov::{IOV_MAX, IovStorage};
pub(crate) use peer::peer_uid;
pub use scatter::Scatter;

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::mem::GuestBuf;

    #[test]
    fn pieces_travel_in_order_and_split_where_pushed() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut storage = IovStorage::new();
        let data = GuestBuf::for_test_pieces(&[3, 5, 8]);
        data.copy_from(0, b"abcdefghijklmnop");
        let mut gather = Gather::new(&mut storage);
        assert_eq!(gather.push_bytes(b"<"), 1);
        assert_eq!(gather.push_guest(&data, 1, 9), 9);
        assert_eq!(gather.push_bytes(b">"), 1);
        assert_eq!(gather.send(&a).unwrap(), 11);

        let into = GuestBuf::for_test_pieces(&[2, 7]);
        let (mut head, mut tail) = ([0; 1], [0; 8]);
        let mut scatter = Scatter::new(&mut storage);
        scatter.push_bytes_mut(&mut head);
        scatter.push_guest(&into, 0, 9);
        scatter.push_bytes_mut(&mut tail);
        assert_eq!(scatter.recv(&b).unwrap(), 11);
        let mut middle = [0; 9];
        into.copy_to(0, &mut middle);
        assert_eq!((&head, &middle, tail[0]), (b"<", b"bcdefghij", b'>'));
    }

    #[test]
    fn an_empty_socket_would_block_and_a_closed_one_is_zero() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut storage = IovStorage::new();
        let mut byte = [0; 1];
        let mut scatter = Scatter::new(&mut storage);
        scatter.push_bytes_mut(&mut byte);
        assert_eq!(scatter.recv(&b).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(a);
        let mut scatter = Scatter::new(&mut storage);
        scatter.push_bytes_mut(&mut byte);
        assert_eq!(scatter.recv(&b).unwrap(), 0);
        assert_eq!(Scatter::new(&mut storage).recv(&b).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let mut gather = Gather::new(&mut storage);
        gather.push_bytes(b"x");
        assert_eq!(gather.send(&b).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_full_vector_takes_no_more_and_says_so() {
        let mut storage = IovStorage::new();
        let data = GuestBuf::for_test_pieces(&vec![1; IOV_MAX + 10]);
        let mut gather = Gather::new(&mut storage);
        assert_eq!(gather.push_bytes(b"h"), 1);
        assert_eq!(gather.push_guest(&data, 0, data.len_bytes()), IOV_MAX - 1);
        assert!(gather.is_full());
        assert_eq!(gather.push_bytes(b"t"), 0);
        assert_eq!(gather.len_bytes(), IOV_MAX);
    }
}
