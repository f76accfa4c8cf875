//! The file of a snapshot: a header, guest memory, and a description of everything else, each with a checksum.
//!
//! | offset | holds |
//! | --- | --- |
//! | 0 | magic `VCP-SNAP`, version (u32), 0 (u32) |
//! | 16 | offset, length and CRC-64/NVME of the description (u64 each) |
//! | 40 | length of guest memory (u64) |
//! | 48 | CRC-64/NVME of bytes 0 to 47 (u64) |
//! | 4096 | guest memory, as it lies in its memfd; what is zero is a hole |
//! | after | the description: JSON, with the extents of memory that are not holes and their checksums |
//!
//! Numbers are little-endian. A file is written under another name and renamed when it is whole, so that a name that exists
//! is a whole snapshot. Nothing in a file is believed before it was checked; the checksums guard against damage, not
//! against who can write the file: that one owns the guest.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crc_fast::{CrcAlgorithm, checksum};
use rustix::fs::{SeekFrom, seek};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"VCP-SNAP";
/// Of the file and of the description in it. A monitor reads its own version only.
pub const VERSION: u32 = 2;
const HEADER_LEN: usize = 56;
const MEMORY_AT: u64 = 4096;
/// Longer than any description.
const MAX_DESCRIPTION_BYTES: u64 = 64 << 20;
/// Memory is read, summed and written in pieces of this size, and zeros are looked for in them.
const PIECE_BYTES: usize = 256 << 10;

fn sum(data: &[u8]) -> u64 {
    checksum(CrcAlgorithm::Crc64Nvme, data)
}

/// A piece of memory that is not zero.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Extent {
    offset: u64,
    len: u32,
    sum: u64,
}

#[derive(Serialize)]
struct Written<'a, T> {
    extents: &'a [Extent],
    machine: &'a T,
}

#[derive(Deserialize)]
struct Description<T> {
    extents: Vec<Extent>,
    machine: T,
}

fn fail(path: &Path) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::File { action: "write the snapshot", path: path.to_owned(), source }
}

/// Writes a snapshot: `machine`, and `len` bytes of `memory`, which nobody changes meanwhile.
pub fn write<T: Serialize>(path: &Path, machine: &T, memory: &File, len: u64) -> Result<()> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(format!(".{}.part", std::process::id()));
    let unfinished = PathBuf::from(unfinished);
    // Whoever can read it can read the guest's memory.
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&unfinished);
    let written = file
        .map_err(fail(path))
        .and_then(|file| fill(&file, path, machine, memory, len))
        .and_then(|()| std::fs::rename(&unfinished, path).map_err(fail(path)));
    if written.is_err() {
        let _ = std::fs::remove_file(&unfinished);
    }
    written
}

fn fill<T: Serialize>(file: &File, path: &Path, machine: &T, memory: &File, len: u64) -> Result<()> {
    let extents =
        copy_memory(memory, len, |at, data| file.write_all_at(data, MEMORY_AT + at)).map_err(fail(path))?;
    let description = serde_json::to_vec(&Written { extents: &extents, machine })
        .map_err(|e| fail(path)(std::io::Error::other(e)))?;
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend(0u32.to_le_bytes());
    let at = MEMORY_AT + len;
    for number in [at, description.len() as u64, sum(&description), len] {
        header.extend(number.to_le_bytes());
    }
    header.extend(sum(&header).to_le_bytes());
    file.write_all_at(&description, at)
        .and_then(|()| file.write_all_at(&header, 0))
        .and_then(|()| file.sync_all())
        .map_err(fail(path))
}

/// Reads what of the first `len` bytes of `memory` is not zero, and has `put` write it.
fn copy_memory(
    memory: &File,
    len: u64,
    put: impl Fn(u64, &[u8]) -> std::io::Result<()>,
) -> std::io::Result<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut buffer = vec![0; PIECE_BYTES];
    let mut at = 0;
    while at < len {
        // Pages that nobody has touched are holes.
        at = match seek(memory, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = seek(memory, SeekFrom::Hole(at))?.min(len);
        while at < end {
            let piece = &mut buffer[..(end - at).min(PIECE_BYTES as u64) as usize];
            memory.read_exact_at(piece, at)?;
            if piece.iter().any(|byte| *byte != 0) {
                put(at, piece)?;
                extents.push(Extent { offset: at, len: piece.len() as u32, sum: sum(piece) });
            }
            at += piece.len() as u64;
        }
    }
    Ok(extents)
}

/// A snapshot whose header and description are in order.
#[derive(Debug)]
pub struct Snapshot<T> {
    /// What it is a snapshot of.
    pub machine: T,
    file: File,
    path: PathBuf,
    memory_len: u64,
    extents: Vec<Extent>,
}

impl<T: DeserializeOwned> Snapshot<T> {
    /// Opens a file and checks all but the memory in it.
    pub fn open(path: &Path) -> Result<Self> {
        let read = |source| Error::File { action: "read the snapshot", path: path.to_owned(), source };
        let wrong = |reason: String| Error::Snapshot(format!("{}: {reason}", path.display()));
        let mut file = crate::boot::open_regular(path).map_err(read)?;
        let mut header = [0; HEADER_LEN];
        match file.read_exact(&mut header) {
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => {
                return Err(wrong("it is too short for a snapshot".into()));
            }
            other => other.map_err(read)?,
        }
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&header[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        if header[..8] != *MAGIC {
            return Err(wrong("it is not a snapshot".into()));
        }
        let version = number(8) as u32;
        if version != VERSION {
            return Err(wrong(format!("it has version {version}, this monitor reads {VERSION}")));
        }
        if sum(&header[..48]) != number(48) {
            return Err(wrong("its header is damaged (checksum)".into()));
        }
        let (at, len, expected, memory_len) = (number(16), number(24), number(32), number(40));
        let size = file.metadata().map_err(read)?.len();
        if at.checked_add(len) != Some(size) || Some(at) != MEMORY_AT.checked_add(memory_len) {
            return Err(wrong(format!(
                "it has {size} bytes, which does not fit its header: it was cut short"
            )));
        }
        if len > MAX_DESCRIPTION_BYTES {
            return Err(wrong(format!("its description has {len} bytes, more than there can be")));
        }
        let mut description = vec![0; len as usize];
        file.read_exact_at(&mut description, at).map_err(read)?;
        if sum(&description) != expected {
            return Err(wrong("its description is damaged (checksum)".into()));
        }
        let Description { extents, machine } = serde_json::from_slice(&description)
            .map_err(|e| wrong(format!("its description is not understood: {e}")))?;
        let mut free = 0;
        for extent in &extents {
            let end = extent.offset.checked_add(extent.len.into()).filter(|end| *end <= memory_len);
            let Some(end) = end.filter(|_| extent.offset >= free && extent.len as usize <= PIECE_BYTES)
            else {
                return Err(wrong("its list of memory is in disorder".into()));
            };
            free = end;
        }
        Ok(Self { machine, file, path: path.to_owned(), memory_len, extents })
    }

    /// Bytes of guest memory.
    pub fn memory_len(&self) -> u64 {
        self.memory_len
    }

    /// Copies guest memory into `memory`, which is zero, and checks it.
    pub fn load_memory(&self, memory: &File) -> Result<()> {
        let mut buffer = vec![0; PIECE_BYTES];
        for extent in &self.extents {
            let piece = &mut buffer[..extent.len as usize];
            self.file.read_exact_at(piece, MEMORY_AT + extent.offset).map_err(|source| Error::File {
                action: "read the snapshot",
                path: self.path.clone(),
                source,
            })?;
            if sum(piece) != extent.sum {
                return Err(Error::Snapshot(format!(
                    "{}: guest memory at {:#x} is damaged (checksum)",
                    self.path.display(),
                    extent.offset
                )));
            }
            memory.write_all_at(piece, extent.offset).map_err(Error::os("write guest memory"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEN: u64 = 4 << 20;

    fn memory() -> File {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, LEN).unwrap();
        File::from(fd)
    }

    fn written(dir: &tempfile::TempDir) -> (PathBuf, File) {
        let memory = memory();
        for (at, byte) in [(0x1000, 1), (0x10_0000, 2), (LEN - 1, 3)] {
            memory.write_all_at(&[byte], at).unwrap();
        }
        // Touched, and zero all the same.
        memory.write_all_at(&[0; 4096], 0x20_0000).unwrap();
        let path = dir.path().join("snap");
        write(&path, &"a machine".to_string(), &memory, LEN).unwrap();
        (path, memory)
    }

    fn content(file: &File) -> Vec<u8> {
        let mut data = vec![0; LEN as usize];
        file.read_exact_at(&mut data, 0).unwrap();
        data
    }

    #[test]
    fn what_was_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = written(&dir);
        let snapshot = Snapshot::<String>::open(&path).unwrap();
        assert_eq!(
            (snapshot.machine.as_str(), snapshot.memory_len(), snapshot.extents.len()),
            ("a machine", LEN, 3)
        );
        let new = memory();
        snapshot.load_memory(&new).unwrap();
        assert!(content(&old) == content(&new));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn every_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (path, _) = written(&dir);
        let whole = std::fs::read(&path).unwrap();
        let open = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let opened = Snapshot::<String>::open(&path);
            crate::chain(&opened.and_then(|snapshot| snapshot.load_memory(&memory())).unwrap_err())
        };
        let with = |at: usize, byte: u8| {
            let mut bytes = whole.clone();
            bytes[at] = byte;
            bytes
        };
        for (bytes, expected) in [
            (vec![], "too short"),
            (whole[..40].to_vec(), "too short"),
            (with(0, b'X'), "not a snapshot"),
            (with(8, 9), "version 9, this monitor reads 2"),
            (with(40, 1), "header is damaged"),
            (whole[..whole.len() - 1].to_vec(), "cut short"),
            (with(whole.len() - 3, b'X'), "description is damaged"),
            (with(4096 + 0x1000, 9), "guest memory at 0x1000 is damaged"),
        ] {
            let error = open(&bytes);
            assert!(error.contains(expected), "{error:?} does not say {expected:?}");
        }
    }

    #[test]
    fn a_description_of_something_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (path, _) = written(&dir);
        let error = crate::chain(&Snapshot::<Vec<u32>>::open(&path).unwrap_err());
        assert!(error.contains("is not understood"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// Any byte changed anywhere: an error, and no other memory than what was saved.
        #[test]
        fn one_wrong_byte_is_found(at in any::<prop::sample::Index>(), change in 1u8..) {
            let dir = tempfile::tempdir().unwrap();
            let (path, old) = written(&dir);
            let mut bytes = std::fs::read(&path).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= change;
            std::fs::write(&path, &bytes).unwrap();
            let new = memory();
            let loaded = Snapshot::<String>::open(&path).and_then(|snapshot| snapshot.load_memory(&new));
            // Holes and the unused bytes of the header's page are not read.
            prop_assert!(loaded.is_err() || content(&old) == content(&new));
        }
    }
}
