//! A sparse medium in memory: chunks exist where something was written, and go when they are unmapped.

use std::io;
use std::sync::Arc;

use super::pool::zeroed;
use super::{CHUNK_BYTES, Extent, Storage, check_range};

/// Chunks in one table of the directory: a table covers 64 MiB, so that even an empty 16 TiB medium costs 2 MiB.
const TABLE_CHUNKS: usize = 1024;
const CHUNK: u64 = CHUNK_BYTES as u64;

type Table = Box<[Option<Arc<[u8]>>]>;

/// The memory medium. Reading shares a chunk; writing to a shared chunk copies it first.
#[derive(Debug)]
pub struct MemoryStorage {
    len_bytes: u64,
    directory: Vec<Option<Table>>,
    /// What holes read as.
    zeroes: Arc<[u8]>,
    chunks_allocated: u64,
}

impl MemoryStorage {
    /// A medium of `len_bytes` that reads as zeroes.
    pub fn new(len_bytes: u64) -> Self {
        let tables = len_bytes.div_ceil(CHUNK * TABLE_CHUNKS as u64);
        Self {
            len_bytes,
            directory: std::iter::repeat_with(|| None).take(tables as usize).collect(),
            zeroes: zeroed(CHUNK_BYTES),
            chunks_allocated: 0,
        }
    }

    /// Memory that the written chunks take.
    pub fn allocated_bytes(&self) -> u64 {
        self.chunks_allocated * CHUNK
    }

    fn chunk(&self, index: u64) -> Option<&Arc<[u8]>> {
        let (table, slot) = split(index);
        self.directory.get(table)?.as_ref()?.get(slot)?.as_ref()
    }

    /// The chunk for writing: allocated if it was not there, copied if somebody still holds an extent of it.
    fn chunk_mut(&mut self, index: u64) -> io::Result<&mut [u8]> {
        let (table, slot) = split(index);
        let slot = self
            .directory
            .get_mut(table)
            .map(|t| t.get_or_insert_with(|| (0..TABLE_CHUNKS).map(|_| None).collect()))
            .and_then(|t| t.get_mut(slot))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        let allocated = &mut self.chunks_allocated;
        let chunk = slot.get_or_insert_with(|| {
            *allocated += 1;
            zeroed(CHUNK_BYTES)
        });
        Ok(Arc::make_mut(chunk))
    }

    fn free_chunk(&mut self, index: u64) {
        let (table, slot) = split(index);
        if let Some(Some(table)) = self.directory.get_mut(table)
            && table.get_mut(slot).is_some_and(|slot| slot.take().is_some())
        {
            self.chunks_allocated -= 1;
        }
    }
}

fn split(index: u64) -> (usize, usize) {
    ((index / TABLE_CHUNKS as u64) as usize, (index % TABLE_CHUNKS as u64) as usize)
}

/// The pieces of a range, chunk by chunk: (chunk index, start in the chunk, length).
fn pieces(mut offset: u64, mut len: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    std::iter::from_fn(move || {
        if len == 0 {
            return None;
        }
        let start = offset % CHUNK;
        let piece = len.min(CHUNK - start);
        let item = (offset / CHUNK, start as usize, piece as usize);
        offset += piece;
        len -= piece;
        Some(item)
    })
}

impl Storage for MemoryStorage {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read(&mut self, offset: u64, len: usize, out: &mut Vec<Extent>) -> io::Result<()> {
        check_range(self.len_bytes, offset, len as u64)?;
        for (index, start, piece) in pieces(offset, len as u64) {
            let chunk = self.chunk(index).unwrap_or(&self.zeroes);
            out.push(Extent::new(Arc::clone(chunk), start, piece));
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, mut data: &[u8]) -> io::Result<()> {
        check_range(self.len_bytes, offset, data.len() as u64)?;
        for (index, start, piece) in pieces(offset, data.len() as u64) {
            let (now, rest) = data.split_at(piece);
            self.chunk_mut(index)?[start..start + piece].copy_from_slice(now);
            data = rest;
        }
        Ok(())
    }

    fn unmap(&mut self, offset: u64, len: u64) -> io::Result<()> {
        check_range(self.len_bytes, offset, len)?;
        let table_bytes = CHUNK * TABLE_CHUNKS as u64;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            // Skip whole tables that are not there, so that unmapping an empty terabyte costs nothing.
            let table_end = (at / table_bytes + 1) * table_bytes;
            if !matches!(self.directory.get((at / table_bytes) as usize), Some(Some(_))) {
                at = table_end;
                continue;
            }
            let stop = end.min(table_end);
            for (index, start, piece) in pieces(at, stop - at) {
                // The last chunk of the medium may be cut short: to its end counts as whole.
                if start == 0 && (piece == CHUNK_BYTES || index * CHUNK + piece as u64 == self.len_bytes) {
                    self.free_chunk(index);
                } else if self.chunk(index).is_some() {
                    self.chunk_mut(index)?[start..start + piece].fill(0);
                }
            }
            at = stop;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn mapped(&mut self, offset: u64) -> io::Result<(bool, u64)> {
        check_range(self.len_bytes, offset, 1)?;
        let mapped = self.chunk(offset / CHUNK).is_some();
        let mut end = (offset / CHUNK + 1) * CHUNK;
        // A bound on the walk: the caller asks again for what follows.
        for _ in 0..TABLE_CHUNKS {
            if end >= self.len_bytes || self.chunk(end / CHUNK).is_some() != mapped {
                break;
            }
            end += CHUNK;
        }
        Ok((mapped, end.min(self.len_bytes) - offset))
    }

    fn granularity_bytes(&self) -> u32 {
        CHUNK_BYTES as u32
    }
}
