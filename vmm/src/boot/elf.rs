//! What the monitor must know of an ELF kernel before `linux-loader` loads it: where it lies, and its notes.

use std::io::{Read, Seek, SeekFrom};

/// An ELF file's facts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ElfInfo {
    /// Entry address.
    pub entry: u64,
    /// Lowest physical address of a segment.
    pub start: u64,
    /// First physical address after all segments, with what is zeroed at run time.
    pub end: u64,
    /// Notes.
    pub notes: Vec<Note>,
}

/// One ELF note.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Owner, without the terminating NUL.
    pub name: Vec<u8>,
    /// Type, as the owner defines it.
    pub kind: u32,
    /// Content.
    pub desc: Vec<u8>,
}

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// More program headers than any kernel has.
const MAX_HEADERS: u16 = 256;
/// Longer than any kernel's note segment.
const MAX_NOTES_BYTES: u64 = 1 << 16;

/// Reads the headers of a 64-bit little-endian x86 ELF file. The error says what is wrong with it.
pub fn read(file: &mut (impl Read + Seek)) -> Result<ElfInfo, String> {
    let mut header = [0u8; 64];
    read_at(file, 0, &mut header)?;
    if header[..4] != *b"\x7fELF" {
        return Err("it does not begin with the ELF magic".into());
    }
    const CLASS64_LITTLE: [u8; 2] = [2, 1];
    const MACHINE_X86_64: u16 = 62;
    if header[4..6] != CLASS64_LITTLE || u16_at(&header, 18) != MACHINE_X86_64 {
        return Err("it is an ELF file for another processor".into());
    }
    let (phoff, phentsize, phnum) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if phentsize != 56 || phnum == 0 || phnum > MAX_HEADERS {
        return Err("its ELF program headers are not usable".into());
    }
    let mut info = ElfInfo { entry: u64_at(&header, 24), start: u64::MAX, ..Default::default() };
    for i in 0..u64::from(phnum) {
        let at = i
            .checked_mul(56)
            .and_then(|o| phoff.checked_add(o))
            .ok_or("its ELF program headers are not usable")?;
        let mut ph = [0u8; 56];
        read_at(file, at, &mut ph)?;
        let (offset, paddr, filesz, memsz) =
            (u64_at(&ph, 8), u64_at(&ph, 24), u64_at(&ph, 32), u64_at(&ph, 40));
        match u32_at(&ph, 0) {
            PT_LOAD if memsz > 0 => {
                let end = paddr
                    .checked_add(memsz)
                    .filter(|_| filesz <= memsz)
                    .ok_or("an ELF segment has impossible bounds")?;
                info.start = info.start.min(paddr);
                info.end = info.end.max(end);
            }
            PT_NOTE if filesz <= MAX_NOTES_BYTES => {
                let mut bytes = vec![0u8; filesz as usize];
                read_at(file, offset, &mut bytes)?;
                info.notes.extend(notes(&bytes));
            }
            _ => {}
        }
    }
    if info.end == 0 {
        return Err("it has no ELF segment to load".into());
    }
    Ok(info)
}

/// The notes of a segment; what does not parse ends the list.
fn notes(mut bytes: &[u8]) -> Vec<Note> {
    let mut notes = Vec::new();
    let padded = |len: u32| (len as usize).checked_next_multiple_of(4);
    while bytes.len() >= 12 {
        let (namesz, descsz, kind) = (u32_at(bytes, 0), u32_at(bytes, 4), u32_at(bytes, 8));
        let (Some(name_len), Some(desc_len)) = (padded(namesz), padded(descsz)) else { break };
        let rest = &bytes[12..];
        if rest.len() < name_len || rest.len() - name_len < desc_len {
            break;
        }
        let name = rest[..namesz as usize].strip_suffix(&[0]).unwrap_or(&rest[..namesz as usize]);
        let desc = &rest[name_len..][..descsz as usize];
        notes.push(Note { name: name.to_vec(), kind, desc: desc.to_vec() });
        bytes = &rest[name_len + desc_len..];
    }
    notes
}

fn read_at(file: &mut (impl Read + Seek), offset: u64, buffer: &mut [u8]) -> Result<(), String> {
    file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(buffer)).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => "the file is cut short".into(),
        _ => e.to_string(),
    })
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn note_without_padding_problems() {
        let mut bytes = vec![4, 0, 0, 0, 8, 0, 0, 0, 1, 0x50, 0x43, 0x56];
        bytes.extend(*b"VCP\0\x01\0\0\0\x01\0\0\0");
        let all = notes(&bytes);
        assert_eq!(
            all,
            vec![Note { name: b"VCP".to_vec(), kind: 0x5643_5001, desc: vec![1, 0, 0, 0, 1, 0, 0, 0] }]
        );
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            notes(&bytes);
            let _ = read(&mut Cursor::new(&bytes));
        }

        #[test]
        fn damaged_headers_never_panic(changes in proptest::collection::vec((0usize..120, any::<u8>()), 1..8)) {
            let mut file = vec![0u8; 256];
            file[..6].copy_from_slice(b"\x7fELF\x02\x01");
            file[18] = 62;
            file[32] = 64;
            file[54] = 56;
            file[56] = 1;
            file[64] = 1;
            file[64 + 40] = 16;
            prop_assert!(read(&mut Cursor::new(&file)).is_ok());
            for (at, value) in changes { file[at] = value; }
            let _ = read(&mut Cursor::new(&file));
        }
    }
}
