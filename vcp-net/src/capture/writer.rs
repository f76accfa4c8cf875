//! [`Writer`]: the thread that writes a capture's file.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender};

/// What a capture gives its frames to. [`start`](Self::start) makes the file.
#[derive(Debug)]
pub struct Writer {
    head: Vec<u8>,
    limit_bytes: u64,
    to_write: Receiver<Vec<u8>>,
    give_back: SyncSender<Vec<u8>>,
}

impl Writer {
    pub(super) fn new(
        head: Vec<u8>,
        limit_bytes: u64,
        to_write: Receiver<Vec<u8>>,
        give_back: SyncSender<Vec<u8>>,
    ) -> Self {
        Self { head, limit_bytes, to_write, give_back }
    }

    /// Makes a new file in `dir`, that nobody else reads, and a thread that writes it until the capture ends, or the file
    /// is as long as it may be.
    ///
    /// # Errors
    /// The file cannot be made, in words for the user.
    pub fn start(self, dir: &Path, number: u64) -> Result<(PathBuf, std::thread::JoinHandle<()>), String> {
        let path = dir.join(format!("vcp-net-{}-{number}.pcapng", std::process::id()));
        let failed = |error: std::io::Error| format!("cannot write {}: {error}", path.display());
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
        file.write_all(&self.head).map_err(failed)?;
        let thread = std::thread::Builder::new().name("capture".into());
        let thread = thread.spawn(move || self.run(&mut file)).map_err(failed)?;
        Ok((path, thread))
    }

    fn run(self, file: &mut File) {
        let mut written = self.head.len() as u64;
        while let Ok(mut bytes) = self.to_write.recv() {
            if written + bytes.len() as u64 > self.limit_bytes {
                tracing::info!(limit_bytes = self.limit_bytes, "a capture is as long as it may be");
                return;
            }
            if let Err(error) = file.write_all(&bytes) {
                tracing::warn!(%error, "a capture ends: it cannot be written");
                return;
            }
            written += bytes.len() as u64;
            if bytes.is_empty() {
                // A question whether there is somebody.
                continue;
            }
            bytes.clear();
            let _ = self.give_back.try_send(bytes);
        }
    }
}
