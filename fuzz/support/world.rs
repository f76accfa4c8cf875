//! A network of its own for a target whose input opens sockets: nothing that it says leaves the process.

use std::os::fd::AsRawFd;

/// Moves the process, which has one thread yet, into a network that has nothing but a loopback interface.
///
/// # Panics
/// The system does not allow it: without it the target would talk to the host's networks.
pub fn leave() {
    // SAFETY: no pointer is passed.
    let alone = unsafe {
        libc::unshare(libc::CLONE_NEWNET) == 0 || libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET) == 0
    };
    assert!(alone, "no network of its own: {}", std::io::Error::last_os_error());
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("a socket");
    // SAFETY: all zeroes is an `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo\0") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request is valid during the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) };
    assert_eq!(done, 0, "the loopback interface stays down: {}", std::io::Error::last_os_error());
}
