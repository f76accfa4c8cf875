//! The private directory of one run, for its sockets. Removed on every way out of the process that can be caught.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// Directories to be removed, known to the panic hook.
static LIVE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A directory with mode 0700 that exists as long as this value.
#[derive(Debug)]
pub struct RuntimeDir {
    path: PathBuf,
}

impl RuntimeDir {
    /// Creates a directory with an unguessable name under `$XDG_RUNTIME_DIR`, or under the temporary directory.
    pub fn create() -> Result<Self> {
        let base = std::env::var_os("XDG_RUNTIME_DIR")
            .map(PathBuf::from)
            .filter(|p| p.is_dir())
            .unwrap_or_else(std::env::temp_dir);
        let mut random = [0u8; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(Error::os("get random bytes"))?;
        let path = base.join(format!("vcp-{}-{:016x}", std::process::id(), u64::from_ne_bytes(random)));
        // Fails if the name exists, whatever it is.
        std::fs::DirBuilder::new().mode(0o700).create(&path).map_err(|source| Error::File {
            action: "create the runtime directory",
            path: path.clone(),
            source,
        })?;
        LIVE.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
        Ok(Self { path })
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

/// Removes every directory that is still there, for the panic hook.
pub fn remove_all() {
    // A panic while the list is locked must not deadlock the hook.
    if let Ok(mut live) = LIVE.try_lock() {
        for path in live.drain(..) {
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
}
