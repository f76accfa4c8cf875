//! Tells a service manager that the service is ready: systemd's `sd_notify` protocol, one datagram to `$NOTIFY_SOCKET`.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Sends `state` (such as `READY=1`) to the service manager, if there is one. A failure is logged: the service itself
/// works, and a manager that waits will say so.
pub fn notify(state: &str) {
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET")
        && let Err(error) = send(&socket, state)
    {
        tracing::warn!(%error, "cannot tell the service manager ({state})");
    }
}

fn send(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(socket)?,
        _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "NOTIFY_SOCKET is no socket address")),
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manager_hears_of_it_by_path_and_by_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n");
        let by_path = UnixDatagram::bind(&path).unwrap();
        let name = format!("vcp-notify-test-{}", std::process::id());
        let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        send(path.as_os_str(), "READY=1").unwrap();
        send(format!("@{name}").as_ref(), "STOPPING=1").unwrap();
        for (socket, words) in [(by_path, "READY=1"), (by_name, "STOPPING=1")] {
            let mut buf = [0; 64];
            let len = socket.recv(&mut buf).unwrap();
            assert_eq!(&buf[..len], words.as_bytes());
        }
        assert!(send("relative".as_ref(), "READY=1").is_err());
        assert!(send(dir.path().join("nobody").as_os_str(), "READY=1").is_err());
    }
}
