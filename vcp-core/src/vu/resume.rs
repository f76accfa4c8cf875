//! Goes on with a front end's connection that another process began.
//!
//! What `vhost`'s [`BackendReqHandler`] knows of a connection (the features that were acknowledged) cannot be set from
//! outside. So it is told by messages, over a socket pair of our own, and then its end of the pair is made the real
//! connection.
#![allow(unsafe_code)] // `dup3` onto a descriptor that another crate owns has no safe form.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use vhost::vhost_user::BackendReqHandler;

use super::handler::Handler;

/// `VHOST_USER_GET_FEATURES`, `_SET_FEATURES`, `_SET_PROTOCOL_FEATURES`.
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_PROTOCOL_FEATURES: u32 = 16;
/// Message flags: protocol version 1, no reply wanted.
const VERSION: u32 = 1;

/// The receiver of the requests on `connection`, in the state it is in after `features` and `protocol` were acknowledged.
/// The messages do not go beyond `handler`, whose port is brought in by itself.
pub(super) fn requests(
    connection: &UnixStream,
    handler: &Arc<Mutex<Handler>>,
    features: u64,
    protocol: u64,
) -> io::Result<BackendReqHandler<Mutex<Handler>>> {
    let lock = || handler.lock().unwrap_or_else(PoisonError::into_inner);
    let (theirs, mut ours) = UnixStream::pair()?;
    let mut requests = BackendReqHandler::from_stream(theirs, Arc::clone(handler));
    lock().silent = true;
    let mut told = Ok(());
    for (request, value) in
        [(GET_FEATURES, None), (SET_FEATURES, Some(features)), (SET_PROTOCOL_FEATURES, Some(protocol))]
    {
        told = told.and_then(|()| {
            ours.write_all(&message(request, value))?;
            requests.handle_request().map_err(|error| io::Error::other(error.to_string()))
        });
    }
    lock().silent = false;
    told?;
    // The reply to GET_FEATURES.
    ours.read_exact(&mut [0; 20])?;
    let target = requests.as_raw_fd();
    // SAFETY: `dup3` touches no memory. `target` is the descriptor of a socket that `requests` owns and keeps; it stays
    // open and owned by it, and refers to another socket from here on. Nothing else uses that descriptor: `theirs` was
    // moved into `requests`.
    if unsafe { libc::dup3(connection.as_raw_fd(), target, libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `requests` owns the descriptor and outlives the borrow.
    let socket = unsafe { BorrowedFd::borrow_raw(target) };
    let flags = rustix::fs::fcntl_getfl(socket)?;
    rustix::fs::fcntl_setfl(socket, flags - rustix::fs::OFlags::NONBLOCK)?;
    Ok(requests)
}

fn message(request: u32, value: Option<u64>) -> Vec<u8> {
    let payload = value.map_or(Vec::new(), |value| value.to_ne_bytes().to_vec());
    let words = [request, VERSION, payload.len() as u32];
    words.iter().flat_map(|word| word.to_ne_bytes()).chain(payload).collect()
}
