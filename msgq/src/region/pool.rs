//! [`Pool`]: buffers of an own region, and who has each of them.
//!
//! ```text
//!            loan                 send                  completion, or the ring's head for a one-way message
//!   FREE ───────────► LOANED ───────────► SENT ───────────────────────────────────────────────► FREE
//!     ▲                 │ drop              │ take back with the completion
//!     └─────────────────┘                   └──────────► LOANED
//! ```
//!
//! Only the owner of the region moves a buffer; nothing that the peer writes does. Sending takes the [`Loan`], so using
//! it afterwards does not compile; [`Pool::from_raw`], for those who keep numbers instead of loans, refuses it at run time.
#![allow(unsafe_code)] // Loans of memory that only this process writes are slices: the argument is in `Loan`.

use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use crate::shm::file::{Access, FileError, create};
use crate::shm::{Mapping, Outside};

/// Two low bits of a buffer's state word; the rest counts how often it was given out.
const FREE: u32 = 0;
const LOANED: u32 = 1;
const SENT: u32 = 2;
const STATE: u32 = 3;

/// A buffer is not in the hands of who says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OwnershipError {
    /// No such buffer.
    #[error("buffer {0} does not exist")]
    Number(u32),
    /// It is with the peer.
    #[error("buffer {0} is sent")]
    Sent(u32),
    /// It was given back, and perhaps out again, since.
    #[error("buffer {0} is not this loan any more")]
    Stale(u32),
    /// It is of the other kind of pool.
    #[error("the pool is for the other direction")]
    Access,
}

/// A loan as plain numbers, to be kept where a borrow cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawBuf {
    /// Number in its pool.
    pub index: u32,
    /// How often it was given out.
    pub generation: u32,
}

pub(crate) struct Inner {
    pub(crate) region: u16,
    pub(crate) generation: u16,
    access: Access,
    file: OwnedFd,
    map: Mapping,
    buf_bytes: usize,
    /// A bit for each free buffer.
    free: Box<[AtomicU64]>,
    /// Word in which to look first.
    hint: AtomicUsize,
    states: Box<[AtomicU32]>,
}

/// Buffers of equal size in one shared region. Clones are the same pool.
#[derive(Clone)]
pub struct Pool {
    pub(crate) inner: Arc<Inner>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("region", &self.region())
            .field("access", &self.access())
            .field("buf_bytes", &self.buf_bytes())
            .field("buffers", &self.buffers())
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// `buffers` buffers of `buf_bytes` bytes (rounded up to a multiple of 64), as region `region` (unique on each channel
    /// that it is announced on). `generation` tells regions apart that had the same number one after the other.
    ///
    /// # Errors
    /// The memory cannot be had.
    ///
    /// # Panics
    /// If the pool is empty or larger than the address space.
    pub fn new(
        region: u16,
        generation: u16,
        buf_bytes: usize,
        buffers: usize,
        access: Access,
    ) -> Result<Self, FileError> {
        assert!(buf_bytes != 0 && buffers != 0, "an empty pool");
        let buf_bytes = buf_bytes.next_multiple_of(64);
        let len = buf_bytes.checked_mul(buffers).expect("pool size").next_multiple_of(4096);
        let (file, map) = create("msgq-region", len, access)?;
        let words = buffers.div_ceil(64);
        let free = (0..words).map(|word| {
            let left = buffers - word * 64;
            AtomicU64::new(if left >= 64 { u64::MAX } else { (1 << left) - 1 })
        });
        let inner = Inner {
            region,
            generation,
            access,
            file,
            map,
            buf_bytes,
            free: free.collect(),
            hint: AtomicUsize::new(0),
            states: (0..buffers).map(|_| AtomicU32::new(FREE)).collect(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The region of a dead incarnation of this side, from its keeper: announced again so that what is sent again finds its
    /// data. No buffer of it is ever free; it goes when its last message was answered.
    ///
    /// # Errors
    /// The file is not what it should be.
    pub fn restore(region: u16, generation: u16, file: OwnedFd, access: Access) -> Result<Self, FileError> {
        let size = crate::shm::file::size(&file)?;
        crate::shm::file::check(&file, size, access)?;
        let len = usize::try_from(size).map_err(|_| FileError::Kind(0))?;
        let map = match access {
            Access::Owner => Mapping::read_only(&file, len),
            Access::Both => Mapping::read_write(&file, len),
        };
        let map = map.map_err(|error| FileError::System { what: "map a region", error })?;
        let inner = Inner {
            region,
            generation,
            access,
            file,
            map,
            buf_bytes: len,
            free: Box::new([]),
            hint: AtomicUsize::new(0),
            states: Box::new([]),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Copies bytes out of the region, wherever they lie: for a restored region, whose buffers nobody lends.
    ///
    /// # Errors
    /// The range is not inside.
    pub fn read_region(&self, offset: usize, to: &mut [u8]) -> Result<(), Outside> {
        self.inner.map.read(offset, to)
    }

    /// Number of the region.
    #[must_use]
    pub fn region(&self) -> u16 {
        self.inner.region
    }

    /// Generation of the region.
    #[must_use]
    pub fn generation(&self) -> u16 {
        self.inner.generation
    }

    /// Who may write it.
    #[must_use]
    pub fn access(&self) -> Access {
        self.inner.access
    }

    /// Bytes of a buffer.
    #[must_use]
    pub fn buf_bytes(&self) -> usize {
        self.inner.buf_bytes
    }

    /// Number of buffers.
    #[must_use]
    pub fn buffers(&self) -> usize {
        self.inner.states.len()
    }

    /// Free buffers, as of some moment during the call.
    #[must_use]
    pub fn available(&self) -> usize {
        self.inner.free.iter().map(|word| word.load(Ordering::Relaxed).count_ones() as usize).sum()
    }

    /// Bytes of the whole region.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.inner.map.len()
    }

    /// The file, for whoever keeps it across this process's death.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.inner.file.as_fd()
    }

    /// Borrows a free buffer to write data that is sent later; `None` if none is free.
    ///
    /// # Errors
    /// [`OwnershipError::Access`] if the peer may write this pool.
    pub fn loan(&self) -> Result<Option<Loan<'_>>, OwnershipError> {
        if self.inner.access != Access::Owner {
            return Err(OwnershipError::Access);
        }
        Ok(self.inner.take().map(|index| Loan { buf: Held { pool: self, index } }))
    }

    /// Borrows a free buffer to be filled by the peer; `None` if none is free.
    ///
    /// # Errors
    /// [`OwnershipError::Access`] if the peer may not write this pool.
    pub fn blank(&self) -> Result<Option<Blank<'_>>, OwnershipError> {
        if self.inner.access != Access::Both {
            return Err(OwnershipError::Access);
        }
        Ok(self.inner.take().map(|index| Blank { buf: Held { pool: self, index } }))
    }

    fn held(&self, raw: RawBuf) -> Result<Held<'_>, OwnershipError> {
        let state = self.inner.states.get(raw.index as usize).ok_or(OwnershipError::Number(raw.index))?;
        let now = state.load(Ordering::Acquire);
        match now & STATE {
            _ if now >> 2 != raw.generation => Err(OwnershipError::Stale(raw.index)),
            SENT => Err(OwnershipError::Sent(raw.index)),
            LOANED => {
                // A new generation: the number was good for one use.
                let next = (raw.generation.wrapping_add(1) << 2) | LOANED;
                match state.compare_exchange(now, next, Ordering::AcqRel, Ordering::Relaxed) {
                    Ok(_) => Ok(Held { pool: self, index: raw.index }),
                    Err(_) => Err(OwnershipError::Stale(raw.index)),
                }
            }
            _ => Err(OwnershipError::Stale(raw.index)),
        }
    }

    /// The loan with these numbers, if it is one: not after it was sent, and once only.
    ///
    /// # Errors
    /// [`OwnershipError`].
    pub fn from_raw(&self, raw: RawBuf) -> Result<Loan<'_>, OwnershipError> {
        match self.inner.access {
            Access::Owner => Ok(Loan { buf: self.held(raw)? }),
            Access::Both => Err(OwnershipError::Access),
        }
    }

    /// As [`from_raw`](Self::from_raw), for a buffer to be filled.
    ///
    /// # Errors
    /// [`OwnershipError`].
    pub fn blank_from_raw(&self, raw: RawBuf) -> Result<Blank<'_>, OwnershipError> {
        match self.inner.access {
            Access::Both => Ok(Blank { buf: self.held(raw)? }),
            Access::Owner => Err(OwnershipError::Access),
        }
    }
}

impl Inner {
    fn take(&self) -> Option<u32> {
        let words = self.free.len();
        let first = self.hint.load(Ordering::Relaxed);
        for step in 0..words {
            let at = (first + step) % words;
            let word = &self.free[at];
            let mut bits = word.load(Ordering::Relaxed);
            while bits != 0 {
                let bit = bits.trailing_zeros();
                // Acquire: what the one before wrote to the buffer happened before.
                let before = word.fetch_and(!(1 << bit), Ordering::Acquire);
                if before & 1 << bit != 0 {
                    if step != 0 {
                        self.hint.store(at, Ordering::Relaxed);
                    }
                    let index = at * 64 + bit as usize;
                    self.set(index as u32, LOANED);
                    return Some(index as u32);
                }
                bits = before & !(1 << bit);
            }
        }
        None
    }

    /// Only whoever has the buffer calls this.
    fn set(&self, index: u32, to: u32) {
        let state = &self.states[index as usize];
        let now = state.load(Ordering::Relaxed) >> 2;
        state.store((now.wrapping_add(1) << 2) | to, Ordering::Release);
    }

    /// The peer is done with it.
    pub(crate) fn release(&self, index: u32) {
        self.set(index, FREE);
        self.free[index as usize / 64].fetch_or(1 << (index % 64), Ordering::Release);
    }

    /// The peer is done with it, and its owner goes on using it.
    pub(crate) fn take_back(&self, index: u32) -> RawBuf {
        self.set(index, LOANED);
        RawBuf { index, generation: self.states[index as usize].load(Ordering::Relaxed) >> 2 }
    }

    /// Copies bytes out of a buffer.
    pub(crate) fn read(&self, index: u32, offset: usize, to: &mut [u8]) -> Result<(), Outside> {
        match offset.checked_add(to.len()) {
            Some(end) if end <= self.buf_bytes => self.map.read(index as usize * self.buf_bytes + offset, to),
            _ => Err(Outside { offset, len: to.len(), size: self.buf_bytes }),
        }
    }
}

/// A buffer in this process's hands. Dropping it gives it back.
struct Held<'p> {
    pool: &'p Pool,
    index: u32,
}

impl Held<'_> {
    fn start(&self) -> usize {
        self.index as usize * self.pool.inner.buf_bytes
    }

    fn raw(self) -> RawBuf {
        let generation = self.pool.inner.states[self.index as usize].load(Ordering::Relaxed) >> 2;
        let raw = RawBuf { index: self.index, generation };
        std::mem::forget(self);
        raw
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.pool.inner.release(self.index);
    }
}

/// A buffer to write data to that is sent later.
///
/// ```compile_fail
/// # use msgq::region::{Access, Pool};
/// let pool = Pool::new(0, 1, 4096, 4, Access::Owner).unwrap();
/// let mut loan = pool.loan().unwrap().unwrap();
/// let parcel = loan.freeze(0..5);
/// loan[0] = 1; // it is on its way: this does not compile
/// ```
pub struct Loan<'p> {
    buf: Held<'p>,
}

impl<'p> Loan<'p> {
    /// Makes bytes `range` of it ready to be sent.
    ///
    /// # Panics
    /// If the range is empty or not inside the buffer.
    #[must_use]
    pub fn freeze(self, range: Range<usize>) -> Parcel<'p> {
        Parcel::new(self.buf, range)
    }

    /// Keeps it by number.
    #[must_use]
    pub fn into_raw(self) -> RawBuf {
        self.buf.raw()
    }
}

impl Deref for Loan<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: as in `deref_mut`, which cannot be used while this borrow lives.
        unsafe { self.buf.pool.inner.map.owned_ref(self.buf.start(), self.buf.pool.inner.buf_bytes) }
    }
}

impl DerefMut for Loan<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: loans are only made of `Access::Owner` pools, whose file is sealed against all further writable
        // mappings and writes, and whose one mapping is private to `Inner`. The buffer's state says LOANED exactly while
        // one `Held` exists (`take` and `held` hand each out once), and this borrow is exclusive to it.
        unsafe { self.buf.pool.inner.map.owned(self.buf.start(), self.buf.pool.inner.buf_bytes) }
    }
}

/// A buffer to be filled by the peer, or that was. The peer may write it at any time.
pub struct Blank<'p> {
    buf: Held<'p>,
}

impl<'p> Blank<'p> {
    /// Bytes of it.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.buf.pool.inner.buf_bytes
    }

    fn range(&self, offset: usize, len: usize) -> Result<usize, Outside> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len_bytes() => Ok(self.buf.start() + offset),
            _ => Err(Outside { offset, len, size: self.len_bytes() }),
        }
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// The range is not inside the buffer.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), Outside> {
        self.buf.pool.inner.map.read(self.range(offset, to.len())?, to)
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// The range is not inside the buffer.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), Outside> {
        self.buf.pool.inner.map.write(self.range(offset, from.len())?, from)
    }

    /// Makes bytes `range` of it ready to be sent.
    ///
    /// # Panics
    /// If the range is empty or not inside the buffer.
    #[must_use]
    pub fn freeze(self, range: Range<usize>) -> Parcel<'p> {
        Parcel::new(self.buf, range)
    }

    /// Keeps it by number.
    #[must_use]
    pub fn into_raw(self) -> RawBuf {
        self.buf.raw()
    }
}

/// Part of a buffer, ready to be sent.
pub struct Parcel<'p> {
    buf: Held<'p>,
    offset: usize,
    len: u32,
}

impl<'p> Parcel<'p> {
    fn new(buf: Held<'p>, range: Range<usize>) -> Self {
        assert!(
            range.start < range.end && range.end <= buf.pool.inner.buf_bytes,
            "range {range:?} of a buffer"
        );
        let len = u32::try_from(range.end - range.start).expect("buffers are less than 4 GiB");
        let offset = buf.start() + range.start;
        Self { buf, offset, len }
    }

    pub(crate) fn pool(&self) -> &'p Pool {
        self.buf.pool
    }

    /// Offset in the region.
    pub(crate) fn offset(&self) -> u64 {
        self.offset as u64
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// It is sent: from here on only a completion (or the ring's head) frees it.
    pub(crate) fn sent(self) -> u32 {
        let index = self.buf.index;
        self.buf.pool.inner.set(index, SENT);
        std::mem::forget(self.buf);
        index
    }
}

macro_rules! debug {
    ($($name:ident),*) => {$(
        impl fmt::Debug for $name<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let Held { pool, index } = &self.buf;
                write!(f, concat!(stringify!($name), "(region {}, buffer {})"), pool.region(), index)
            }
        }
    )*};
}

debug!(Loan, Blank, Parcel);
