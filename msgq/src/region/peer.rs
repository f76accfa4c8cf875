//! The peer's regions: files that it announced, mapped here, and the check that every reference in a message passes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::error::Violation;
use crate::layout::Desc;
use crate::shm::file::Access;
use crate::shm::{Mapping, Outside};

/// Bytes of a peer's region that a message refers to: checked when it was received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// The region.
    pub region: u16,
    /// First byte.
    pub offset: u64,
    /// Number of bytes, at least 1.
    pub len: u32,
}

/// One region of the peer.
#[derive(Clone, Debug)]
pub struct PeerRegion {
    file: Arc<OwnedFd>,
    map: Arc<Mapping>,
    generation: u16,
    access: Access,
    size: u64,
}

impl PeerRegion {
    /// Maps a file that was checked.
    pub(crate) fn new(file: OwnedFd, size: u64, generation: u16, access: Access) -> rustix::io::Result<Self> {
        let len = usize::try_from(size).map_err(|_| rustix::io::Errno::NOMEM)?;
        let map = match access {
            Access::Owner => Mapping::read_only(&file, len)?,
            Access::Both => Mapping::read_write(&file, len)?,
        };
        Ok(Self { file: Arc::new(file), map: Arc::new(map), generation, access, size })
    }

    /// Who may write it.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }

    /// Bytes of it.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Its generation.
    #[must_use]
    pub fn generation(&self) -> u16 {
        self.generation
    }

    /// The file, for those who map it themselves. Its seals and size were checked.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// All of them, by number.
#[derive(Debug, Default)]
pub struct PeerRegions {
    table: Vec<Option<PeerRegion>>,
}

impl PeerRegions {
    /// Puts a region into the table, instead of an earlier one with its number.
    pub(crate) fn insert(&mut self, number: u16, region: PeerRegion) {
        let at = usize::from(number);
        if self.table.len() <= at {
            self.table.resize_with(at + 1, || None);
        }
        self.table[at] = Some(region);
    }

    /// Takes a region away. References to it are violations from here on; mappings in use live on.
    pub(crate) fn remove(&mut self, number: u16) -> bool {
        self.table.get_mut(usize::from(number)).and_then(Option::take).is_some()
    }

    /// The region with this number.
    #[inline]
    #[must_use]
    pub fn get(&self, number: u16) -> Option<&PeerRegion> {
        self.table.get(usize::from(number))?.as_ref()
    }

    /// Numbers and regions.
    pub fn iter(&self) -> impl Iterator<Item = (u16, &PeerRegion)> {
        let numbered = self.table.iter().enumerate();
        numbered.filter_map(|(number, region)| Some((number as u16, region.as_ref()?)))
    }

    /// Bytes of all of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.iter().map(|(_, region)| region.size).sum()
    }

    /// Checks a private copy of a descriptor.
    #[inline]
    pub(crate) fn check(&self, desc: &Desc, max_len: u32) -> Result<Segment, Violation> {
        let region = self.get(desc.region).ok_or(Violation::Region(desc.region))?;
        if region.generation != desc.generation {
            return Err(Violation::Generation { region: desc.region, generation: desc.generation });
        }
        if desc.len == 0 || desc.len > max_len {
            return Err(Violation::Length(desc.len));
        }
        match desc.value.checked_add(desc.len.into()) {
            Some(end) if end <= region.size => {}
            _ => {
                return Err(Violation::Range {
                    region: desc.region,
                    offset: desc.value,
                    len: desc.len,
                    size: region.size,
                });
            }
        }
        Ok(Segment { region: desc.region, offset: desc.value, len: desc.len })
    }

    /// The memory of a segment, if its region is still there.
    #[must_use]
    pub fn slice(&self, segment: Segment) -> Option<PeerSlice<'_>> {
        let region = self.get(segment.region)?;
        let end = segment.offset.checked_add(segment.len.into())?;
        (end <= region.size).then_some(PeerSlice {
            region,
            // Inside the mapping, whose length is a `usize`.
            offset: segment.offset as usize,
            len: segment.len as usize,
        })
    }
}

/// Memory of the peer. It may change at any time: there is no slice of it, only copies.
#[derive(Clone, Copy, Debug)]
pub struct PeerSlice<'a> {
    region: &'a PeerRegion,
    offset: usize,
    len: usize,
}

impl PeerSlice<'_> {
    /// Bytes of it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether this side may write it.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.region.access == Access::Both
    }

    fn range(&self, offset: usize, len: usize) -> Result<usize, Outside> {
        Outside::check(offset, len, self.len)?;
        Ok(self.offset + offset)
    }

    /// Copies bytes out. Check the copy.
    ///
    /// # Errors
    /// The range is not inside.
    #[inline]
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), Outside> {
        self.region.map.read(self.range(offset, to.len())?, to)
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// The range is not inside, or this side may not write ([`is_writable`](Self::is_writable)).
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), Outside> {
        if !self.is_writable() {
            return Err(Outside { offset, len: from.len(), size: 0 });
        }
        self.region.map.write(self.range(offset, from.len())?, from)
    }

    /// Where it lies in this process, for an I/O vector. Valid while the region is.
    #[must_use]
    pub fn pointer(&self) -> *mut u8 {
        self.region.map.pointer(self.offset, self.len).expect("checked when it was made")
    }
}
