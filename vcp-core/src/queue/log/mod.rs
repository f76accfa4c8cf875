//! The in-flight log: which requests of which queue were taken and not given back, in memory that outlives this process
//! (vhost-user specification, "Inflight I/O tracking"; `docs/decisions/in-flight-log.md`).
//!
//! The front end keeps the memory: it gets it from one process (`GET_INFLIGHT_FD`, [`LogArea::create`]) and hands it to the
//! next (`SET_INFLIGHT_FD`, [`LogArea::map`]). `SplitLog` and `PackedLog` are the two formats of a queue's part. Nothing
//! found in it is trusted: what does not hold together is a [`LogError`], and the queue does not start.
//!
//! **Order of stores.** A killed process stops between two instructions. Everything it stored before in program order is
//! seen by whoever maps the memory later (its end and the new connection pass through the kernel), nothing after is. So
//! the log needs no fence instructions, only that compiler and processor keep the order of its stores among themselves
//! and with those to the ring. Each is a `Release` store, and a `SeqCst` fence stands between the publication and what
//! clears the log after it.

mod packed;
mod split;

pub(crate) use packed::PackedLog;
pub(crate) use split::SplitLog;

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Queue regions start at multiples of this, so that two queues share no cache line.
const ALIGN: usize = 64;
/// What `version` is in a region that is in use.
const VERSION: u16 = 1;
/// Offsets that both formats share.
const FEATURES: usize = 0;
const VERSION_AT: usize = 8;
const DESC_NUM: usize = 10;

/// Why a log cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// Number of queues or queue size zero or above the device's.
    #[error("in-flight log for {queues} queues of {size} entries; the device has {max_queues} of {max_size}")]
    Geometry {
        /// Queues asked for.
        queues: u16,
        /// Entries asked for.
        size: u16,
        /// Queues of the device.
        max_queues: u16,
        /// Largest queue.
        max_size: u16,
    },
    /// The area is smaller than its queues need, or does not lie in its file.
    #[error(
        "in-flight log of {len_bytes} bytes at {offset}: {need_bytes} are needed, the file has {file_bytes}"
    )]
    Size {
        /// Size of the area in bytes.
        len_bytes: u64,
        /// Its offset in the file.
        offset: u64,
        /// What the queues need.
        need_bytes: u64,
        /// Size of the file.
        file_bytes: u64,
    },
    /// An offset that cannot be mapped.
    #[error("offset {0:#x} of the in-flight log is not a multiple of the page size")]
    Offset(u64),
    /// The file could be cut short under us, which would raise SIGBUS.
    #[error("the file of the in-flight log is not sealed against shrinking and cannot be")]
    NotSealed,
    /// The system refused.
    #[error("cannot {what} the in-flight log: {error}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why.
        error: String,
    },
    /// A version or features that this code does not know.
    #[error("in-flight log of version {version} with features {features:#x}")]
    Unknown {
        /// The version.
        version: u16,
        /// The feature bits.
        features: u64,
    },
    /// The log belongs to a queue of another size.
    #[error("in-flight log of {logged} entries for a queue of {size}")]
    QueueSize {
        /// What the log says.
        logged: u16,
        /// What the ring has.
        size: u16,
    },
    /// The log does not fit the ring, or contradicts itself.
    #[error("in-flight log contradicts {0}")]
    Contradiction(&'static str),
}

/// Which of the two formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// `QueueRegionSplit`.
    Split,
    /// `QueueRegionPacked`.
    Packed,
}

impl LogFormat {
    /// Bytes from one queue's region to the next.
    #[must_use]
    pub fn stride(self, queue_size: u16) -> usize {
        let bytes = match self {
            Self::Split => split::HEADER + split::ENTRY * usize::from(queue_size),
            Self::Packed => packed::HEADER + packed::ENTRY * usize::from(queue_size),
        };
        bytes.next_multiple_of(ALIGN)
    }

    /// Bytes of the whole area.
    #[must_use]
    pub fn area_bytes(self, queues: u16, queue_size: u16) -> u64 {
        self.stride(queue_size) as u64 * u64::from(queues)
    }
}

/// The area as the messages describe it (`VhostUserInflight`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogSpec {
    /// Size in bytes.
    pub len_bytes: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Number of queues.
    pub queues: u16,
    /// Entries of each queue.
    pub queue_size: u16,
}

/// The log of all queues of a device, mapped.
#[derive(Debug)]
pub struct LogArea {
    map: MmapRegion<()>,
    spec: LogSpec,
}

impl LogArea {
    /// A new, zeroed area, sealed so that nobody can change its size.
    ///
    /// # Errors
    /// [`LogError::System`].
    pub fn create(queues: u16, queue_size: u16, format: LogFormat) -> Result<(LogSpec, File), LogError> {
        let failed = |error: rustix::io::Errno| LogError::System { what: "create", error: error.to_string() };
        let len_bytes = format.area_bytes(queues, queue_size);
        let fd = rustix::fs::memfd_create(c"vcp-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(failed)?;
        rustix::fs::ftruncate(&fd, len_bytes).map_err(failed)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(failed)?;
        Ok((LogSpec { len_bytes, offset: 0, queues, queue_size }, fd.into()))
    }

    /// Maps the area that a front end hands over.
    ///
    /// # Errors
    /// [`LogError`]: it does not lie in its file, is too small for its queues, or its file could shrink.
    pub fn map(spec: LogSpec, file: File, format: LogFormat) -> Result<Self, LogError> {
        let failed =
            |error: rustix::io::Errno| LogError::System { what: "examine", error: error.to_string() };
        let stat = rustix::fs::fstat(file.as_fd()).map_err(failed)?;
        let file_bytes = u64::try_from(stat.st_size).unwrap_or(0);
        let need_bytes = format.area_bytes(spec.queues, spec.queue_size);
        let fits = spec.offset.checked_add(spec.len_bytes).is_some_and(|end| end <= file_bytes);
        if !fits || spec.len_bytes < need_bytes || need_bytes == 0 {
            let LogSpec { len_bytes, offset, .. } = spec;
            return Err(LogError::Size { len_bytes, offset, need_bytes, file_bytes });
        }
        if !spec.offset.is_multiple_of(rustix::param::page_size() as u64) {
            return Err(LogError::Offset(spec.offset));
        }
        // Seals exist on memfd only, so this also refuses files, pipes and devices.
        let sealed = rustix::fs::fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
            || rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).is_ok();
        if !sealed {
            return Err(LogError::NotSealed);
        }
        // What the queues may need, as the features can still change; a huge area costs the front end, not us.
        let map_bytes = spec.len_bytes.min(LogFormat::Packed.area_bytes(spec.queues, spec.queue_size));
        let map = MmapRegion::from_file(FileOffset::new(file, spec.offset), map_bytes as usize)
            .map_err(|error| LogError::System { what: "map", error: error.to_string() })?;
        Ok(Self { map, spec })
    }

    /// As the front end described it.
    #[must_use]
    pub fn spec(&self) -> LogSpec {
        self.spec
    }

    /// The memory that it lies in, for handing it on to another process.
    #[must_use]
    pub fn file(&self) -> Option<&File> {
        self.map.file_offset().map(FileOffset::file)
    }

    #[cfg(test)]
    pub(crate) fn memory(&self) -> &MmapRegion<()> {
        &self.map
    }

    /// The region of queue `queue`, whose ring has `size` entries.
    pub fn queue(self: &Arc<Self>, queue: usize, size: u16, format: LogFormat) -> Result<QueueLog, LogError> {
        let stride = format.stride(self.spec.queue_size);
        let base = queue * stride;
        if size > self.spec.queue_size {
            return Err(LogError::QueueSize { logged: self.spec.queue_size, size });
        }
        // The format may have changed since the area was mapped.
        if queue >= usize::from(self.spec.queues) || base + stride > self.map.size() {
            let LogSpec { len_bytes, offset, .. } = self.spec;
            let need_bytes = (base + stride) as u64;
            return Err(LogError::Size { len_bytes, offset, need_bytes, file_bytes: self.map.size() as u64 });
        }
        Ok(QueueLog { area: Arc::clone(self), base, desc_num: self.spec.queue_size })
    }

    /// Marks every region as not in use: the device was reset, so nothing is in flight any more.
    pub(crate) fn forget(self: &Arc<Self>, format: LogFormat) {
        for queue in 0..usize::from(self.spec.queues) {
            if let Ok(log) = self.queue(queue, 0, format) {
                log.put(VERSION_AT, 0u16);
            }
        }
    }
}

/// One queue's region: stores in the order of the program, loads of values that anybody may have written.
#[derive(Debug)]
pub struct QueueLog {
    area: Arc<LogArea>,
    base: usize,
    desc_num: u16,
}

impl QueueLog {
    fn get<T: AtomicAccess + Default>(&self, offset: usize) -> T {
        // Inside the region by construction, and aligned because regions and fields are.
        let slice = self.area.map.as_volatile_slice();
        slice.load(self.base + offset, Ordering::Acquire).unwrap_or_default()
    }

    fn put<T: AtomicAccess>(&self, offset: usize, value: T) {
        super::crash::point();
        let stored = self.area.map.as_volatile_slice().store(value, self.base + offset, Ordering::Release);
        debug_assert!(stored.is_ok(), "offset {offset} of a log region");
    }

    /// Whether the region is in use; an error if it is not of a kind that this code knows.
    fn in_use(&self) -> Result<bool, LogError> {
        let (version, features) = (self.get(VERSION_AT), self.get(FEATURES));
        match (version, features) {
            (0, _) => Ok(false),
            (VERSION, 0) => {
                let logged = self.get(DESC_NUM);
                if logged == self.desc_num {
                    Ok(true)
                } else {
                    Err(LogError::QueueSize { logged, size: self.desc_num })
                }
            }
            _ => Err(LogError::Unknown { version, features }),
        }
    }

    /// Takes the region into use with `fill`; a crash on the way leaves it not in use.
    fn initialise(&self, fill: impl FnOnce(&Self)) {
        self.put(VERSION_AT, 0u16);
        self.put(FEATURES, 0u64);
        self.put(DESC_NUM, self.desc_num);
        fill(self);
        self.put(VERSION_AT, VERSION);
    }
}
