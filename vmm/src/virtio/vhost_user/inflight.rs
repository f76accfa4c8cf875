//! The in-flight log (vhost-user, "Inflight I/O tracking"): shared memory in which a backend keeps what it has taken and
//! not yet returned. The backend makes it and writes it; the monitor only keeps it, and gives it to the backend that
//! comes after. It is never mapped here, so that nothing in it can harm the monitor.

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::fs::FileType;
use rustix::io::FdFlags;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

use super::link::Link;
use crate::error::{Error, Result};

/// Largest log that is taken, bytes: 64 queues of 32768 entries of a packed ring's 32 bytes each.
const MAX_LEN_BYTES: u64 = 64 << 20;
/// What a log needs for each entry of a queue at least, bytes (a split ring's; a packed ring's entry has twice that).
const ENTRY_BYTES: u64 = 16;

/// The log of one device, from the first start of its queues until the driver resets it.
#[derive(Debug)]
pub struct InflightLog {
    file: File,
    len_bytes: u64,
    offset: u64,
    queues: u16,
    size: u16,
}

impl InflightLog {
    /// `GET_INFLIGHT_FD`: has the backend make a log for `queues` queues of `size` entries.
    pub fn get(device: &str, link: &Link, queues: u16, size: u16) -> Result<Self> {
        let wanted = VhostUserInflight::new(0, 0, queues, size);
        let (got, file) = link.call("GET_INFLIGHT_FD", |f| f.get_inflight_fd(&wanted))?;
        let log = Self { file, len_bytes: got.mmap_size, offset: got.mmap_offset, queues, size };
        let lacks = |reason: String| Error::BackendLacks { device: device.to_owned(), reason };
        if (got.num_queues, got.queue_size) != (queues, size) {
            return Err(lacks(format!(
                "gave an in-flight log for {} queues of {} entries, asked for {queues} of {size}",
                got.num_queues, got.queue_size
            )));
        }
        log.check().map_err(lacks)?;
        // It comes without, and the processes that are started here must not inherit it.
        rustix::io::fcntl_setfd(&log.file, FdFlags::CLOEXEC)
            .map_err(Error::os("set a descriptor's flags"))?;
        Ok(log)
    }

    fn check(&self) -> std::result::Result<(), String> {
        let least = u64::from(self.queues) * u64::from(self.size) * ENTRY_BYTES;
        if !(least..=MAX_LEN_BYTES).contains(&self.len_bytes) {
            return Err(format!(
                "gave an in-flight log of {} bytes, which cannot be: {least} to {MAX_LEN_BYTES}",
                self.len_bytes
            ));
        }
        let stat = rustix::fs::fstat(&self.file)
            .map_err(|e| format!("gave an in-flight log that cannot be used: {e}"))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err("gave an in-flight log that is no memory".into());
        }
        let end = self.offset.checked_add(self.len_bytes);
        if end.is_none_or(|end| end > stat.st_size as u64) {
            return Err(format!(
                "gave an in-flight log of {} bytes at {} in a file of {}",
                self.len_bytes, self.offset, stat.st_size
            ));
        }
        Ok(())
    }

    /// `SET_INFLIGHT_FD`: gives the log to a backend. What is in it is in flight.
    pub fn set(&self, link: &Link) -> Result<()> {
        let message = VhostUserInflight::new(self.len_bytes, self.offset, self.queues, self.size);
        link.call("SET_INFLIGHT_FD", |f| f.set_inflight_fd(&message, self.file.as_raw_fd()))
    }
}
