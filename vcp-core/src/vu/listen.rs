//! [`SocketFile`]: a listening Unix socket in the file system that cleans up after itself.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::handover::Fds;
use crate::handover::state::{BadState, SocketState};

/// Why a socket file cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process listens there.
    #[error("{0} is in use by another process")]
    InUse(PathBuf),
    /// Something that is no socket is in the way.
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("cannot listen on {path}")]
    Io {
        /// The socket file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A listening socket; its file is removed on drop if it is still ours.
#[derive(Debug)]
pub struct SocketFile {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file that we made.
    identity: (u64, u64),
    /// Another process goes on listening: the file stays.
    released: bool,
}

impl SocketFile {
    /// Listens on `path`. A socket file that nobody listens on is left from a process that died and is replaced.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Io { path: path.into(), source };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path)?;
                UnixListener::bind(path).map_err(failed)?
            }
            result => result.map_err(failed)?,
        };
        listener.set_nonblocking(true).map_err(failed)?;
        let meta = std::fs::symlink_metadata(path).map_err(failed)?;
        Ok(Self { listener, path: path.into(), identity: (meta.dev(), meta.ino()), released: false })
    }

    /// The next connection, if one waits.
    ///
    /// # Errors
    /// What `accept` reports, except that nobody waits.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                Ok(Some(stream))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            // The peer left between connect and accept, or a signal came: nobody waits.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The same socket as the `vhost` crate's listener, for its own daemon.
    pub(crate) fn listener(&self) -> io::Result<vhost::vhost_user::Listener> {
        self.listener.try_clone().map(Into::into)
    }

    /// For another process.
    pub(crate) fn export(&self, fds: &mut Fds) -> io::Result<SocketState> {
        Ok(SocketState {
            path: std::path::absolute(&self.path)?,
            identity: self.identity,
            fd: fds.put_copy(&self.listener)?,
        })
    }

    /// From another process. The file stays until this one is the owner and [says so](Self::own).
    pub(crate) fn import(state: SocketState, fds: &mut Fds) -> Result<Self, BadState> {
        let SocketState { path, identity, fd } = state;
        let listener = UnixListener::from(fds.take(fd)?);
        let listens = rustix::net::sockopt::socket_acceptconn(&listener).unwrap_or(false);
        if !listens {
            return Err(BadState::Text(format!("what is to listen on {} does not listen", path.display())));
        }
        let failed = |source| BadState::System { what: "use a listening socket", source };
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { listener, path, identity, released: true })
    }

    /// The file stays when this is dropped.
    pub(crate) fn release(&mut self) {
        self.released = true;
    }

    /// The file goes when this is dropped.
    pub(crate) fn own(&mut self) {
        self.released = false;
    }

    /// The socket file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for SocketFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        let ours =
            std::fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |source| ListenError::Io { path: path.into(), source };
    let meta = std::fs::symlink_metadata(path).map_err(failed)?;
    if !meta.file_type().is_socket() {
        return Err(ListenError::NotASocket(path.into()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        // Somebody accepted, or has a full backlog.
        _ => Err(ListenError::InUse(path.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "the standard library leaves the file behind");
        let socket = SocketFile::bind(&path).unwrap();
        assert!(matches!(SocketFile::bind(&path), Err(ListenError::InUse(_))));
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_is_no_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"precious").unwrap();
        assert!(matches!(SocketFile::bind(&path), Err(ListenError::NotASocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_replaced_file_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = SocketFile::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _second = SocketFile::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
    }
}
