//! Tells a service manager that the service is ready: systemd's `sd_notify` protocol, one datagram to `$NOTIFY_SOCKET`.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The service manager, if there is one. Found before the process is confined: afterwards it makes no such sockets.
#[derive(Debug, Default)]
pub struct Manager(Option<UnixDatagram>);

impl Manager {
    /// The one that `$NOTIFY_SOCKET` names. A failure is logged: the service itself works, and a manager that waits will
    /// say so.
    #[must_use]
    pub fn find() -> Self {
        let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return Self::default() };
        Self(
            connect(&socket)
                .inspect_err(|error| tracing::warn!(%error, "no way to the service manager"))
                .ok(),
        )
    }

    /// Sends `state` (such as `READY=1`).
    pub fn notify(&self, state: &str) {
        if let Some(socket) = &self.0
            && let Err(error) = socket.send(state.as_bytes())
        {
            tracing::warn!(%error, "cannot tell the service manager ({state})");
        }
    }
}

fn connect(socket: &OsStr) -> io::Result<UnixDatagram> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(socket)?,
        _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "NOTIFY_SOCKET is no socket address")),
    };
    let own = UnixDatagram::unbound()?;
    own.connect_addr(&address)?;
    Ok(own)
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
        Manager(connect(path.as_os_str()).ok()).notify("READY=1");
        Manager(connect(format!("@{name}").as_ref()).ok()).notify("STOPPING=1");
        for (socket, words) in [(by_path, "READY=1"), (by_name, "STOPPING=1")] {
            let mut buf = [0; 64];
            let len = socket.recv(&mut buf).unwrap();
            assert_eq!(&buf[..len], words.as_bytes());
        }
        assert!(connect("relative".as_ref()).is_err());
        assert!(connect(dir.path().join("nobody").as_os_str()).is_err());
    }
}
