//! A Unix socket that listens and has no name: its file was removed as soon as it was there. Who holds a descriptor of
//! the file connects through `/proc/self/fd`, nobody else can, and nothing is left behind, however anybody dies.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use super::runtime_dir::RuntimeDir;
use crate::error::{Error, Result};

/// The way to a listening socket. Cheap to clone.
#[derive(Clone, Debug)]
pub struct HiddenSocket(Arc<OwnedFd>);

impl HiddenSocket {
    /// Makes one; the second half is what listens, for the process that serves it.
    pub fn create(name: &str) -> Result<(Self, OwnedFd)> {
        let dir = RuntimeDir::create_unswept()?;
        let path = dir.socket(name);
        let fail = |source| Error::File { action: "listen on a Unix socket at", path: path.clone(), source };
        let listener = UnixListener::bind(&path).map_err(fail)?;
        // A successor is another user than who has made it. In its directory nobody else finds it.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).map_err(fail)?;
        let file = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty());
        let file = file.map_err(|e| fail(e.into()))?;
        // The directory goes with `dir`, and the name of the socket with it.
        Ok((Self(Arc::new(file)), listener.into()))
    }

    /// The descriptor that leads to it.
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        self.0.clone()
    }

    /// Its name for this process, as long as the value lives.
    pub fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

impl AsFd for HiddenSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn it_has_no_name_and_can_be_connected_to() {
        let (socket, listener) = HiddenSocket::create("disk0").unwrap();
        let listener = UnixListener::from(listener);
        let name = listener.local_addr().unwrap().as_pathname().unwrap().to_owned();
        assert!(!name.exists() && !name.parent().unwrap().exists());
        for _ in 0..3 {
            let _ours = UnixStream::connect(socket.path()).unwrap();
            listener.accept().unwrap();
        }
        drop(listener);
        assert!(UnixStream::connect(socket.path()).is_err());
    }
}
