//! The private directory in which VCPs put their sockets until the monitor has connected: a new one for each start, so
//! that none is there while the guest runs. Removed on every way out of the
//! process that can be caught; what a monitor that was killed leaves is removed by the next one.
//!
//! A directory in use is locked (flock) by its monitor, and the kernel lets go of the lock when that dies. This holds where
//! a process id would not: ids are used again, and mean nothing in another container that shares the directory.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::error::{Error, Result};

/// What the names begin with.
const PREFIX: &str = "vcp-";

/// Directories to be removed, known to the panic hook.
static LIVE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A directory with mode 0700 that exists as long as this value.
#[derive(Debug)]
pub struct RuntimeDir {
    path: PathBuf,
    _lock: OwnedFd,
}

impl RuntimeDir {
    /// Creates a directory with an unguessable name under `$XDG_RUNTIME_DIR`, or under the temporary directory.
    pub fn create() -> Result<Self> {
        Self::sweep_all();
        Self::create_in(&base())
    }

    /// Removes what monitors that were killed have left.
    pub fn sweep_all() {
        sweep(&base());
    }

    /// The same while the guest runs: nothing is looked for that others have left.
    pub fn create_unswept() -> Result<Self> {
        Self::create_in(&base())
    }

    /// Where a device's socket is.
    pub fn socket(&self, device: &str) -> PathBuf {
        self.path.join(format!("{device}.sock"))
    }

    fn create_in(base: &Path) -> Result<Self> {
        /// Another monitor may take the directory for an abandoned one before it is locked.
        const TRIES: u32 = 10;
        for _ in 0..TRIES {
            let mut random = [0u8; 8];
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
                .map_err(Error::os("get random bytes"))?;
            let name = format!("{PREFIX}{}-{:016x}", std::process::id(), u64::from_ne_bytes(random));
            let path = base.join(name);
            // Fails if the name exists, whatever it is.
            std::fs::DirBuilder::new().mode(0o700).create(&path).map_err(|source| Error::File {
                action: "create the runtime directory",
                path: path.clone(),
                source,
            })?;
            let Some(lock) = lock(&path).filter(|_| path.is_dir()) else { continue };
            LIVE.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
            return Ok(Self { path, _lock: lock });
        }
        let source = std::io::Error::from(ErrorKind::WouldBlock);
        Err(Error::File { action: "lock a runtime directory in", path: base.to_owned(), source })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        let mut live = LIVE.lock().unwrap_or_else(PoisonError::into_inner);
        live.retain(|p| *p != self.path);
        remove(&self.path);
    }
}

fn base() -> PathBuf {
    std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|p| p.is_dir())
        .unwrap_or_else(std::env::temp_dir)
}

/// Removes every directory that is still there, for the panic hook.
pub fn remove_all() {
    // A panic while the list is locked must not deadlock the hook.
    if let Ok(mut live) = LIVE.try_lock() {
        for path in live.drain(..) {
            remove(&path);
        }
    }
}

/// Locks a directory of ours; `None` if its monitor lives, or if it is none of ours.
fn lock(path: &Path) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::open(path, flags, Mode::empty()).ok()?;
    let stat = rustix::fs::fstat(&dir).ok()?;
    let ours = stat.st_uid == rustix::process::geteuid().as_raw() && stat.st_mode & 0o777 == 0o700;
    (ours && rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok()).then_some(dir)
}

/// `vcp-`, a process id, `-`, 16 hexadecimal digits.
fn is_name(name: &str) -> bool {
    name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')).is_some_and(|(pid, random)| {
        pid.parse::<u32>().is_ok() && random.len() == 16 && random.bytes().all(|b| b.is_ascii_hexdigit())
    })
}

/// Removes what monitors that were killed have left.
fn sweep(base: &Path) {
    let Ok(entries) = std::fs::read_dir(base) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(is_name)) {
        let path = entry.path();
        if let Some(_lock) = lock(&path) {
            tracing::debug!(path = %path.display(), "removing what a killed monitor has left");
            remove(&path);
        }
    }
}

fn remove(path: &Path) {
    if let Err(e) = std::fs::remove_dir_all(path) {
        tracing::warn!(path = %path.display(), error = %e, "cannot remove the runtime directory");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn private_and_removed() {
        let dir = RuntimeDir::create().unwrap();
        let path = dir.path().to_owned();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        std::fs::write(path.join("x"), b"x").unwrap();
        drop(dir);
        assert!(!path.exists());
    }

    #[test]
    fn the_next_run_removes_what_a_killed_one_left_and_nothing_else() {
        let base = tempfile::tempdir().unwrap();
        let alive = RuntimeDir::create_in(base.path()).unwrap();
        let make = |name: &str, mode| {
            let path = base.path().join(name);
            std::fs::DirBuilder::new().mode(mode).create(&path).unwrap();
            std::fs::write(path.join("disk0.sock"), b"").unwrap();
            path
        };
        let left = make("vcp-1-00112233445566ff", 0o700);
        let others = [
            make("vcp-1-0011", 0o700),
            make("vcp-tests-00112233445566ff", 0o700),
            make("vcp-1-00112233445566fe", 0o755),
        ];
        sweep(base.path());
        let next = RuntimeDir::create_in(base.path()).unwrap();
        assert!(!left.exists());
        assert!(alive.path().is_dir() && next.path().is_dir());
        assert!(others.iter().all(|path| path.is_dir()));
    }
}
