//! Where a logical unit's blocks are kept: the trait that the device server works on, and the two kinds of it.
//!
//! Storage knows bytes, not blocks, commands or sessions. Reads hand out reference-counted [`Extent`]s instead of
//! copying, so that a Data-In goes from the medium to the socket without passing a buffer; the extents are a
//! snapshot: a later write does not change bytes that were handed out before (data digests rely on it).

mod file;
mod memory;
mod pool;

use std::fmt;
use std::io;
use std::sync::Arc;

pub use file::FileStorage;
pub use memory::MemoryStorage;
pub use pool::Pool;

/// Size of the pieces in which storage is handed out and memory is allocated.
pub const CHUNK_BYTES: usize = 64 << 10;

/// A run of bytes that shares its memory with the medium or with a buffer of a [`Pool`].
#[derive(Clone)]
pub struct Extent {
    data: Arc<[u8]>,
    start: u32,
    len: u32,
}

impl Extent {
    /// The bytes `start..start + len` of `data`, cut at its end.
    pub fn new(data: Arc<[u8]>, start: usize, len: usize) -> Self {
        let start = start.min(data.len());
        let len = len.min(data.len() - start);
        // Buffers are at most a chunk, far below 4 GiB.
        Self { data, start: start as u32, len: len as u32 }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.data[self.start as usize..self.start as usize + self.len as usize]
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part `start..start + len` of this run, cut at its end.
    pub fn slice(&self, start: usize, len: usize) -> Self {
        let start = start.min(self.len());
        let len = len.min(self.len() - start);
        Self { data: Arc::clone(&self.data), start: self.start + start as u32, len: len as u32 }
    }
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Extent({} bytes)", self.len)
    }
}

/// A medium. Callers keep `offset + len` within [`len_bytes`](Self::len_bytes); an implementation answers what does
/// not with [`io::ErrorKind::UnexpectedEof`].
pub trait Storage: Send {
    /// Size of the medium.
    fn len_bytes(&self) -> u64;

    /// Appends `len` bytes from `offset` on to `out`.
    fn read(&mut self, offset: u64, len: usize, out: &mut Vec<Extent>) -> io::Result<()>;

    /// Stores `data` at `offset`. It need not be durable before [`flush`](Self::flush).
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Gives back the space of a range as far as the medium can; the range reads as zeroes afterwards.
    fn unmap(&mut self, offset: u64, len: u64) -> io::Result<()>;

    /// Everything written before is durable when this returns.
    fn flush(&mut self) -> io::Result<()>;

    /// Whether `offset` has space allocated, and for how many bytes from there on that holds (at least 1).
    fn mapped(&mut self, offset: u64) -> io::Result<(bool, u64)>;

    /// The unit in which space is given back.
    fn granularity_bytes(&self) -> u32;
}

/// Fails if a range leaves the medium.
fn check_range(len_bytes: u64, offset: u64, len: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= len_bytes => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "range leaves the medium")),
    }
}
