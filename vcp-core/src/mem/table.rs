//! [`MemTable`]: the memory table of one vhost-user connection.
//!
//! The front end names memory three ways: by guest physical address (descriptors), by its own virtual address (the
//! rings), and by file and offset (what is mapped). The table checks each region before it is mapped and translates
//! front-end addresses to guest physical ones.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{FileType, SealFlags};
use serde::{Deserialize, Serialize};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::GuestMap;

/// Most regions of a table (`GET_MAX_MEM_SLOTS`): four times what one `SET_MEM_TABLE` message carries, so that a guest
/// can be given memory piece by piece. Each region is a mapping and may be a step in the search for an address.
pub const MAX_REGIONS: usize = 32;

/// Why a memory region was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// Address plus size overflows, or the size is zero.
    #[error("memory region {guest_addr:#x}+{len_bytes:#x} (front end {user_addr:#x}) is empty or overflows")]
    BadRange {
        /// Guest physical address.
        guest_addr: u64,
        /// Front-end virtual address.
        user_addr: u64,
        /// Size in bytes.
        len_bytes: u64,
    },
    /// Two regions share guest physical or front-end virtual addresses.
    #[error("memory region {guest_addr:#x}+{len_bytes:#x} overlaps another one")]
    Overlap {
        /// Guest physical address.
        guest_addr: u64,
        /// Size in bytes.
        len_bytes: u64,
    },
    /// More than [`MAX_REGIONS`].
    #[error("more than {MAX_REGIONS} memory regions")]
    TooMany,
    /// The file ends before the region: touching the rest would raise SIGBUS.
    #[error("memory file of {file_bytes:#x} bytes ends before offset {offset:#x} + {len_bytes:#x}")]
    FileTooSmall {
        /// Size of the file.
        file_bytes: u64,
        /// Offset of the region in the file.
        offset: u64,
        /// Size of the region in bytes.
        len_bytes: u64,
    },
    /// Not something that can be mapped as memory.
    #[error("memory region is backed by a {0:?}, not by a file")]
    NotAFile(FileType),
    /// `REM_MEM_REG` for a region that is not there.
    #[error("no memory region {guest_addr:#x}+{len_bytes:#x}")]
    NoSuchRegion {
        /// Guest physical address.
        guest_addr: u64,
        /// Size in bytes.
        len_bytes: u64,
    },
    /// `fstat` failed.
    #[error("cannot examine the memory file")]
    Stat(#[source] rustix::io::Errno),
    /// `mmap` failed.
    #[error("cannot map memory region {guest_addr:#x}+{len_bytes:#x}")]
    Map {
        /// Guest physical address.
        guest_addr: u64,
        /// Size in bytes.
        len_bytes: u64,
        /// What failed.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
}

/// One region as the front end describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionSpec {
    /// Guest physical address of the first byte.
    pub guest_addr: u64,
    /// Size in bytes.
    pub len_bytes: u64,
    /// Address of the first byte in the front end's own address space.
    pub user_addr: u64,
    /// Offset of the first byte in the file.
    pub offset: u64,
}

impl RegionSpec {
    fn check(&self) -> Result<(), MemError> {
        let bad = self.len_bytes == 0
            || usize::try_from(self.len_bytes).is_err()
            || self.guest_addr.checked_add(self.len_bytes).is_none()
            || self.user_addr.checked_add(self.len_bytes).is_none()
            || self.offset.checked_add(self.len_bytes).is_none();
        if bad {
            return Err(MemError::BadRange {
                guest_addr: self.guest_addr,
                user_addr: self.user_addr,
                len_bytes: self.len_bytes,
            });
        }
        Ok(())
    }

    fn overlaps(&self, other: &Self) -> bool {
        let meet = |a: u64, b: u64| a < b + other.len_bytes && b < a + self.len_bytes;
        meet(self.guest_addr, other.guest_addr) || meet(self.user_addr, other.user_addr)
    }
}

#[derive(Clone, Debug)]
struct Region {
    spec: RegionSpec,
    mapped: Arc<GuestRegionMmap<()>>,
}

/// The memory table of one connection. Regions stay mapped across changes of the table: a region that is in both the
/// old and the new table is the same mapping only for `ADD_MEM_REG`/`REM_MEM_REG`; `SET_MEM_TABLE` maps anew.
#[derive(Clone, Debug, Default)]
pub struct MemTable {
    regions: Vec<Region>,
}

impl MemTable {
    /// A table of the given regions (`SET_MEM_TABLE`).
    ///
    /// # Errors
    /// [`MemError`].
    pub fn new(regions: impl IntoIterator<Item = (RegionSpec, File)>) -> Result<Self, MemError> {
        let mut table = Self::default();
        for (spec, file) in regions {
            table.add(spec, file)?;
        }
        Ok(table)
    }

    /// Adds a region (`ADD_MEM_REG`).
    ///
    /// # Errors
    /// [`MemError`]; the table is then unchanged.
    pub fn add(&mut self, spec: RegionSpec, file: File) -> Result<(), MemError> {
        spec.check()?;
        if self.regions.len() >= MAX_REGIONS {
            return Err(MemError::TooMany);
        }
        if self.regions.iter().any(|region| region.spec.overlaps(&spec)) {
            return Err(MemError::Overlap { guest_addr: spec.guest_addr, len_bytes: spec.len_bytes });
        }
        let mapped = Arc::new(map(&spec, file)?);
        self.regions.push(Region { spec, mapped });
        self.regions.sort_by_key(|region| region.spec.guest_addr);
        Ok(())
    }

    /// Removes a region (`REM_MEM_REG`); guest address, size and front-end address identify it.
    ///
    /// # Errors
    /// [`MemError::NoSuchRegion`].
    pub fn remove(&mut self, guest_addr: u64, len_bytes: u64, user_addr: u64) -> Result<(), MemError> {
        let same = |region: &Region| {
            let spec = &region.spec;
            (spec.guest_addr, spec.len_bytes, spec.user_addr) == (guest_addr, len_bytes, user_addr)
        };
        let at = self.regions.iter().position(same);
        let at = at.ok_or(MemError::NoSuchRegion { guest_addr, len_bytes })?;
        self.regions.remove(at);
        Ok(())
    }

    /// The guest physical address of a front-end virtual address, if the table has it.
    #[must_use]
    pub fn guest_addr(&self, user_addr: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = user_addr.checked_sub(region.spec.user_addr)?;
            (offset < region.spec.len_bytes).then(|| region.spec.guest_addr + offset)
        })
    }

    /// The regions as one map for the data path.
    #[must_use]
    pub fn map(&self) -> Arc<GuestMap> {
        let regions = self.regions.iter().map(|region| Arc::clone(&region.mapped)).collect();
        // Sorted and free of overlaps by construction; an empty table is the empty map.
        Arc::new(GuestMap::from_arc_regions(regions).unwrap_or_default())
    }

    /// The regions and the files behind them, in the order of their guest addresses.
    pub fn regions(&self) -> impl Iterator<Item = (RegionSpec, &File)> {
        self.regions.iter().filter_map(|region| Some((region.spec, region.mapped.file_offset()?.file())))
    }

    /// Number of regions.
    #[must_use]
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }
}

fn map(spec: &RegionSpec, file: File) -> Result<GuestRegionMmap<()>, MemError> {
    let stat = rustix::fs::fstat(file.as_fd()).map_err(MemError::Stat)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    match kind {
        FileType::RegularFile => {
            let file_bytes = u64::try_from(stat.st_size).unwrap_or(0);
            if file_bytes < spec.offset + spec.len_bytes {
                return Err(MemError::FileTooSmall {
                    file_bytes,
                    offset: spec.offset,
                    len_bytes: spec.len_bytes,
                });
            }
            // A memfd that can still shrink could be cut under us, and touching it would then kill this process with
            // SIGBUS. Seal it where the front end allows that (a shrinking guest memory serves nobody); say so where
            // it does not.
            let sealed = rustix::fs::fcntl_get_seals(&file)
                .is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
                || rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).is_ok();
            if !sealed {
                tracing::debug!(
                    guest_addr = spec.guest_addr,
                    "guest memory file cannot be sealed against shrinking; the front end is trusted not to"
                );
            }
        }
        // Device memory (dax, vfio): no size to check.
        FileType::CharacterDevice => {}
        other => return Err(MemError::NotAFile(other)),
    }
    let (guest_addr, len_bytes) = (spec.guest_addr, spec.len_bytes);
    let mapping = MmapRegion::from_file(FileOffset::new(file, spec.offset), len_bytes as usize)
        .map_err(|source| MemError::Map { guest_addr, len_bytes, source })?;
    GuestRegionMmap::new(mapping, GuestAddress(guest_addr)).ok_or(MemError::BadRange {
        guest_addr,
        user_addr: spec.user_addr,
        len_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(len_bytes: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len_bytes).unwrap();
        file
    }

    fn spec(guest_addr: u64, len_bytes: u64, user_addr: u64) -> RegionSpec {
        RegionSpec { guest_addr, len_bytes, user_addr, offset: 0 }
    }

    #[test]
    fn translates_front_end_addresses() {
        let mut table = MemTable::new([(spec(0x1000, 0x2000, 0x7000_0000), file(0x2000))]).unwrap();
        table.add(spec(0x10_0000, 0x1000, 0x8000_0000), file(0x1000)).unwrap();
        assert_eq!(table.guest_addr(0x7000_0010), Some(0x1010));
        assert_eq!(table.guest_addr(0x7000_2000), None);
        assert_eq!(table.guest_addr(0x8000_0fff), Some(0x10_0fff));
        table.remove(0x10_0000, 0x1000, 0x8000_0000).unwrap();
        assert_eq!(table.guest_addr(0x8000_0fff), None);
        assert!(matches!(table.remove(0x10_0000, 0x1000, 0x8000_0000), Err(MemError::NoSuchRegion { .. })));
    }

    #[test]
    fn refuses_what_would_lead_outside() {
        let refused = |spec: RegionSpec, file_bytes| MemTable::new([(spec, file(file_bytes))]).unwrap_err();
        assert!(matches!(refused(spec(0, 0, 0), 0), MemError::BadRange { .. }));
        assert!(matches!(refused(spec(u64::MAX, 2, 0), 2), MemError::BadRange { .. }));
        assert!(matches!(refused(spec(0, 2, u64::MAX), 2), MemError::BadRange { .. }));
        assert!(matches!(refused(spec(0, 0x2000, 0), 0x1fff), MemError::FileTooSmall { .. }));
        let far = RegionSpec { offset: u64::MAX, ..spec(0, 1, 0) };
        assert!(matches!(refused(far, 1), MemError::BadRange { .. }));
        let past = RegionSpec { offset: 0x1000, ..spec(0, 0x1000, 0) };
        assert!(matches!(refused(past, 0x1000), MemError::FileTooSmall { .. }));
    }

    #[test]
    fn refuses_overlap_in_either_address_space() {
        let mut table = MemTable::new([(spec(0x1000, 0x1000, 0x7000), file(0x1000))]).unwrap();
        for bad in [
            spec(0x1fff, 0x10, 0x9000_0000),
            spec(0x9000_0000, 0x10, 0x7fff),
            spec(0, 0x10_0000, 0xa000_0000),
        ] {
            let error = table.add(bad, file(0x10_0000)).unwrap_err();
            assert!(matches!(error, MemError::Overlap { .. }), "{error}");
        }
        table.add(spec(0x2000, 0x10, 0x8000), file(0x10)).unwrap();
        assert_eq!(table.len(), 2);
    }

    #[test]
    fn refuses_a_pipe() {
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let error = MemTable::new([(spec(0, 0x1000, 0), File::from(reader))]).unwrap_err();
        assert!(matches!(error, MemError::NotAFile(_)), "{error}");
    }

    #[test]
    fn refuses_more_regions_than_slots() {
        let mut table = MemTable::default();
        for at in 0..MAX_REGIONS as u64 {
            table.add(spec(at << 20, 0x1000, at << 20), file(0x1000)).unwrap();
        }
        let error = table.add(spec(1 << 40, 0x1000, 1 << 40), file(0x1000)).unwrap_err();
        assert!(matches!(error, MemError::TooMany));
    }
}
