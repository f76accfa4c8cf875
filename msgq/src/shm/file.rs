//! Files behind shared memory: made and sealed here, and checked when they come from a peer.
//!
//! | file | written by | seals |
//! | --- | --- | --- |
//! | control memory, region the peer may read | its owner, through the mapping made before it was sealed | FUTURE_WRITE, SHRINK, GROW, SEAL |
//! | region the peer may write | both | SHRINK, GROW, SEAL |
//! | flight log | its owner; no peer ever has it | SHRINK, GROW, SEAL |

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

use super::Mapping;

/// `TMPFS_MAGIC`: the kernel's own instance behind every memfd without huge pages.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Who may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only the owner.
    Owner,
    /// Owner and peer.
    Both,
}

impl Access {
    /// The seals of a file of this kind.
    #[must_use]
    pub fn seals(self) -> SealFlags {
        let common = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        match self {
            Self::Owner => common | SealFlags::FUTURE_WRITE,
            Self::Both => common,
        }
    }
}

/// Why a peer's file is not acceptable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// The system refused something.
    #[error("cannot {what}: {error}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        error: rustix::io::Errno,
    },
    /// Seals are missing.
    #[error("seals are {found:#x}, of {needed:#x} needed")]
    Seals {
        /// Seals that the file has.
        found: u32,
        /// Seals that it must have.
        needed: u32,
    },
    /// Another size than announced.
    #[error("file of {found} bytes, announced as {announced}")]
    Size {
        /// Its size.
        found: u64,
        /// What was said.
        announced: u64,
    },
    /// Pages are missing, which this process would have to pay for when it reads them.
    #[error("file of {size} bytes has only {allocated} allocated")]
    Holes {
        /// Its size.
        size: u64,
        /// Bytes allocated.
        allocated: u64,
    },
    /// Not ordinary anonymous memory: accesses could fault.
    #[error("file system {0:#x} is not that of anonymous memory")]
    Kind(u64),
}

fn system(what: &'static str) -> impl Fn(rustix::io::Errno) -> FileError {
    move |error| FileError::System { what, error }
}

/// Makes a file of `len` zeroed and allocated bytes, maps it to be written, and seals it.
///
/// # Errors
/// The system has not enough memory or descriptors.
pub fn create(name: &str, len: usize, access: Access) -> Result<(OwnedFd, Mapping), FileError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // NOEXEC_SEAL keeps the file from ever being run; kernels before 6.3 do not know it.
    let file = rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL)
        .or_else(|_| rustix::fs::memfd_create(name, flags))
        .map_err(system("create a memory file"))?;
    // Allocates, so that no access faults later for want of memory, on whichever side it happens.
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len as u64)
        .map_err(system("allocate memory"))?;
    let mapping = Mapping::read_write(&file, len).map_err(system("map memory"))?;
    rustix::fs::fcntl_add_seals(&file, access.seals()).map_err(system("seal a memory file"))?;
    Ok((file, mapping))
}

/// Checks a peer's file before anything of it is mapped: it cannot shrink, is as large as announced, and is memory.
///
/// # Errors
/// What is wrong with it.
pub fn check(file: impl AsFd, announced: u64, access: Access) -> Result<(), FileError> {
    let seals = rustix::fs::fcntl_get_seals(&file).map_err(system("read the seals"))?;
    if !seals.contains(access.seals()) {
        return Err(FileError::Seals { found: seals.bits(), needed: access.seals().bits() });
    }
    let kind = rustix::fs::fstatfs(&file).map_err(system("read the kind of file"))?.f_type;
    if kind as u64 != TMPFS_MAGIC {
        return Err(FileError::Kind(kind as u64));
    }
    let stat = rustix::fs::fstat(&file).map_err(system("read the size"))?;
    let found = u64::try_from(stat.st_size).unwrap_or(0);
    if found != announced || found == 0 || !found.is_multiple_of(4096) {
        return Err(FileError::Size { found, announced });
    }
    let allocated = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
    if allocated < found {
        return Err(FileError::Holes { size: found, allocated });
    }
    Ok(())
}

/// Size of a file.
///
/// # Errors
/// It cannot be read.
pub(crate) fn size(file: impl AsFd) -> Result<u64, FileError> {
    let stat = rustix::fs::fstat(&file).map_err(system("read the size"))?;
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}
