//! A file or block device as the medium: positioned reads and writes through the page cache, `fdatasync` to make
//! them durable, hole punching to give space back.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use super::{CHUNK_BYTES, Extent, Pool, Storage, check_range};

/// What file systems allocate by; ranges smaller than this are zeroed by the kernel instead.
const FILE_GRANULARITY_BYTES: u32 = 4096;
const ZEROES: [u8; 4096] = [0; 4096];

/// The file medium.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    len_bytes: u64,
    pool: Pool,
    /// The file system cannot punch holes: zeroes are written instead.
    no_holes: bool,
}

impl FileStorage {
    /// Opens `path`, for reading only if `read_only`. The size of the medium is the file's size now.
    pub fn open(path: &Path, read_only: bool) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(!read_only).open(path)?;
        let kind = file.metadata()?.file_type();
        let len_bytes = if kind.is_block_device() {
            // A block device has no size in its metadata.
            seek(&file, SeekFrom::End(0))?
        } else if kind.is_file() {
            file.metadata()?.len()
        } else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a regular file nor a block device",
            ));
        };
        Ok(Self { file, len_bytes, pool: Pool::new(), no_holes: false })
    }

    fn zero(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        while len > 0 {
            let now = len.min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..now as usize], offset)?;
            offset += now;
            len -= now;
        }
        Ok(())
    }
}

impl Storage for FileStorage {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn read(&mut self, mut offset: u64, mut len: usize, out: &mut Vec<Extent>) -> io::Result<()> {
        check_range(self.len_bytes, offset, len as u64)?;
        while len > 0 {
            let piece = len.min(CHUNK_BYTES);
            let file = &self.file;
            out.push(self.pool.with(piece, |buffer| file.read_exact_at(buffer, offset))?);
            offset += piece as u64;
            len -= piece;
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(self.len_bytes, offset, data.len() as u64)?;
        self.file.write_all_at(data, offset)
    }

    fn unmap(&mut self, offset: u64, len: u64) -> io::Result<()> {
        check_range(self.len_bytes, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        if !self.no_holes {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match fallocate(&self.file, flags, offset, len) {
                Ok(()) => return Ok(()),
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => self.no_holes = true,
                Err(e) => return Err(e.into()),
            }
        }
        self.zero(offset, len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn mapped(&mut self, offset: u64) -> io::Result<(bool, u64)> {
        check_range(self.len_bytes, offset, 1)?;
        let data = match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(at) => at,
            // No data up to the end.
            Err(Errno::NXIO) => return Ok((false, self.len_bytes - offset)),
            // The file system does not tell: then all is mapped.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok((true, self.len_bytes - offset)),
            Err(e) => return Err(e.into()),
        };
        if data > offset {
            return Ok((false, data.min(self.len_bytes) - offset));
        }
        let hole = seek(&self.file, SeekFrom::Hole(offset)).unwrap_or(self.len_bytes);
        Ok((true, hole.clamp(offset + 1, self.len_bytes) - offset))
    }

    fn granularity_bytes(&self) -> u32 {
        FILE_GRANULARITY_BYTES
    }
}
