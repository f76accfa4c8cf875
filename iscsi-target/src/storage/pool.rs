//! Recycled buffers for data that must be copied before it is sent: file reads and parameter data.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::{CHUNK_BYTES, Extent};

/// Small buffers hold a page: what most random reads and all parameter data need.
const SMALL_BYTES: usize = 4096;
/// Buffers kept for reuse, of each size; more are allocated under load and dropped afterwards.
const KEEP: usize = 256;

/// Two rings of buffers. A buffer is free again when its last [`Extent`] is dropped; taking one is O(1) and
/// allocates only while the number in use grows.
#[derive(Debug, Default)]
pub struct Pool {
    small: VecDeque<Arc<[u8]>>,
    large: VecDeque<Arc<[u8]>>,
}

impl Pool {
    /// An empty pool.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a buffer of at least `len` bytes (at most [`CHUNK_BYTES`]), lets `fill` fill its first `len` bytes and
    /// returns those.
    pub fn with(&mut self, len: usize, fill: impl FnOnce(&mut [u8]) -> io::Result<()>) -> io::Result<Extent> {
        let (ring, size) = match len {
            0..=SMALL_BYTES => (&mut self.small, SMALL_BYTES),
            _ => (&mut self.large, CHUNK_BYTES),
        };
        let len = len.min(size);
        // The oldest buffer is the likeliest to be free. One in use stays in the ring and is looked at again later.
        let reused = match ring.pop_front() {
            Some(buffer) if Arc::strong_count(&buffer) == 1 => Some(buffer),
            Some(busy) => {
                if ring.len() < KEEP {
                    ring.push_back(busy);
                }
                None
            }
            None => None,
        };
        let mut buffer = reused.unwrap_or_else(|| zeroed(size));
        // Always unique here; if it were not, a private copy is still right.
        fill(&mut Arc::make_mut(&mut buffer)[..len])?;
        if ring.len() < KEEP {
            ring.push_back(Arc::clone(&buffer));
        }
        Ok(Extent::new(buffer, 0, len))
    }

    /// Appends a copy of `data` to `out`.
    pub fn copy(&mut self, data: &[u8], out: &mut Vec<Extent>) {
        for piece in data.chunks(CHUNK_BYTES) {
            let filled = self.with(piece.len(), |buffer| {
                buffer.copy_from_slice(piece);
                Ok(())
            });
            // The closure cannot fail.
            out.extend(filled);
        }
    }
}

static ZEROES: [u8; CHUNK_BYTES] = [0; CHUNK_BYTES];

/// A zero-filled shared buffer of at most a chunk.
pub(super) fn zeroed(len: usize) -> Arc<[u8]> {
    Arc::from(&ZEROES[..len.min(CHUNK_BYTES)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(pool: &mut Pool, byte: u8) -> Extent {
        let fill = |buffer: &mut [u8]| {
            buffer.fill(byte);
            Ok(())
        };
        pool.with(10, fill).unwrap()
    }

    #[test]
    fn buffers_in_use_are_left_alone() {
        let mut pool = Pool::new();
        let mut held = Vec::new();
        for i in 0..100u8 {
            held.push(filled(&mut pool, i));
        }
        for (i, extent) in held.iter().enumerate() {
            assert_eq!(extent.as_slice(), [i as u8; 10]);
        }
    }

    #[test]
    fn free_buffers_are_taken_again() {
        let mut pool = Pool::new();
        let first = pool.with(4096, |_| Ok(())).unwrap().data.as_ptr();
        for _ in 0..10 {
            assert_eq!(pool.with(100, |_| Ok(())).unwrap().data.as_ptr(), first);
        }
        assert_eq!(pool.small.len(), 1);
    }

    #[test]
    fn long_data_is_cut_into_chunks() {
        let data: Vec<u8> = (0..CHUNK_BYTES + 5).map(|i| i as u8).collect();
        let mut out = Vec::new();
        Pool::new().copy(&data, &mut out);
        assert_eq!(out.iter().map(Extent::len).collect::<Vec<_>>(), [CHUNK_BYTES, 5]);
        assert_eq!(out.iter().flat_map(|e| e.as_slice().to_vec()).collect::<Vec<_>>(), data);
    }
}
