//! The pulse of a VCP: a page of counters that its data thread writes and its supervisor reads, without a call, a lock
//! or an answer between them. A supervisor that asked would wait for what it watches.
//!
//! The supervisor makes the page (a memfd of [`PAGE_BYTES`], sealed against any change of size) and passes its descriptor
//! to the process it starts. Each field is one aligned 64-bit word with a single writer, stored whole. What the writer
//! says is its word, no more: a supervisor concludes from a pulse that stands still that something is wrong, and
//! never from one that moves that all is well.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use serde::Serialize;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{FileOffset, VolatileMemory};

/// Size of the page in bytes.
pub const PAGE_BYTES: usize = 4096;
/// First word of a page that a VCP has begun to write: the layout below.
const LAYOUT: u64 = 0x5643_5020_0000_0001;
/// Seals that keep a mapping of the page valid: without them a peer could cut it short under a reader.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// The words, by their place.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Field {
    Layout,
    Passes,
    BusyNs,
    LookNs,
    SleepNs,
    Sleeping,
    InFlight,
    Completed,
    StoppedNs,
}

/// What a supervisor reads from the page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Beat {
    /// Passes of the data thread over its devices. Grows at least every [`MAX_SLEEP`](crate::poll::MAX_SLEEP) while
    /// requests are under way.
    pub passes: u64,
    /// Nanoseconds in passes in which something moved.
    pub busy_ns: u64,
    /// Nanoseconds of looking for work that was not there.
    pub look_ns: u64,
    /// Nanoseconds asleep.
    pub sleep_ns: u64,
    /// It sleeps now.
    pub sleeping: bool,
    /// Requests in flight when it last looked.
    pub inflight: u64,
    /// Requests that it has given back.
    pub completed: u64,
    /// How long requests were not taken when this process took over from another, in nanoseconds; 0 if it did not.
    pub stopped_ns: u64,
}

/// The supervisor's side.
#[derive(Debug)]
pub struct PulsePage {
    file: OwnedFd,
    region: MmapRegion<()>,
}

impl PulsePage {
    /// Makes a page.
    ///
    /// # Errors
    /// The system refused.
    pub fn create() -> io::Result<Self> {
        let file = memfd_create("vcp-pulse", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, PAGE_BYTES as u64)?;
        fcntl_add_seals(&file, SEALS | SealFlags::SEAL)?;
        let region = map(&file, libc::PROT_READ)?;
        Ok(Self { file, region })
    }

    /// The counters now; all zero as long as the VCP has not begun.
    #[must_use]
    pub fn read(&self) -> Beat {
        let get = |field| word(&self.region, field).map_or(0, |word| word.load(Ordering::Relaxed));
        if get(Field::Layout) != LAYOUT {
            return Beat::default();
        }
        Beat {
            passes: get(Field::Passes),
            busy_ns: get(Field::BusyNs),
            look_ns: get(Field::LookNs),
            sleep_ns: get(Field::SleepNs),
            sleeping: get(Field::Sleeping) != 0,
            inflight: get(Field::InFlight),
            completed: get(Field::Completed),
            stopped_ns: get(Field::StoppedNs),
        }
    }
}

impl AsFd for PulsePage {
    /// What the VCP is given.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The VCP's side.
#[derive(Debug)]
pub struct Pulse(MmapRegion<()>);

impl Pulse {
    /// The page that this process was started with as descriptor `fd` (`--pulse-fd`).
    ///
    /// # Errors
    /// It is no such page.
    pub fn adopt(fd: i32) -> io::Result<Self> {
        let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why.to_owned());
        if fd < 0 {
            return Err(invalid("descriptors start at 0"));
        }
        let this = pidfd_open(getpid(), PidfdFlags::empty())?;
        // A copy under a number that nothing else owns.
        let file = pidfd_getfd(&this, fd, PidfdGetfdFlags::empty())?;
        if fstat(&file)?.st_size != PAGE_BYTES as i64 {
            return Err(invalid("it has not the size of a pulse page"));
        }
        if !fcntl_get_seals(&file)?.contains(SEALS) {
            return Err(invalid("it is not sealed against changes of its size"));
        }
        let pulse = Self(map(&file, libc::PROT_READ | libc::PROT_WRITE)?);
        pulse.set(Field::Layout, LAYOUT);
        Ok(pulse)
    }

    #[inline]
    pub(crate) fn set(&self, field: Field, value: u64) {
        if let Some(word) = word(&self.0, field) {
            word.store(value, Ordering::Relaxed);
        }
    }
}

fn map(file: &OwnedFd, protection: i32) -> io::Result<MmapRegion<()>> {
    MmapRegionBuilder::new(PAGE_BYTES)
        .with_file_offset(FileOffset::new(file.try_clone()?.into(), 0))
        .with_mmap_prot(protection)
        .with_mmap_flags(libc::MAP_SHARED)
        .build()
        .map_err(io::Error::other)
}

/// A word of the page. There always is one; the bounds are checked by the library all the same.
#[inline]
fn word(region: &MmapRegion<()>, field: Field) -> Option<&AtomicU64> {
    region.get_atomic_ref::<AtomicU64>(field as usize * size_of::<u64>()).ok()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn what_one_side_writes_the_other_reads() {
        let page = PulsePage::create().unwrap();
        assert_eq!(page.read(), Beat::default());
        let pulse = Pulse::adopt(page.as_fd().as_raw_fd()).unwrap();
        pulse.set(Field::Passes, 7);
        pulse.set(Field::Sleeping, 1);
        assert_eq!(page.read(), Beat { passes: 7, sleeping: true, ..Beat::default() });
    }

    #[test]
    fn a_page_without_a_layout_says_nothing() {
        let page = PulsePage::create().unwrap();
        let pulse = Pulse::adopt(page.as_fd().as_raw_fd()).unwrap();
        pulse.set(Field::Passes, 7);
        pulse.set(Field::Layout, LAYOUT + 1);
        assert_eq!(page.read(), Beat::default());
    }

    #[test]
    fn what_could_be_cut_short_is_refused() {
        let file = memfd_create("x", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, PAGE_BYTES as u64).unwrap();
        assert!(Pulse::adopt(file.as_raw_fd()).unwrap_err().to_string().contains("not sealed"));
        ftruncate(&file, 1).unwrap();
        assert!(Pulse::adopt(file.as_raw_fd()).unwrap_err().to_string().contains("size"));
        assert!(Pulse::adopt(-1).is_err());
        // And a peer cannot cut the real one.
        let page = PulsePage::create().unwrap();
        assert!(ftruncate(&page, 0).is_err() && fcntl_add_seals(&page, SealFlags::WRITE).is_err());
    }
}
