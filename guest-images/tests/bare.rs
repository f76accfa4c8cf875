//! The bare-metal guest builds to an ELF file that says what the monitor looks for: a note in a PT_NOTE segment that
//! asks for ring 3, and load segments above low memory.

#[path = "../bare/src/abi.rs"]
#[allow(dead_code, missing_docs, unreachable_pub)]
mod abi;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

#[test]
fn elf_has_the_note_and_loads_above_low_memory() {
    let elf = std::fs::read(guest_images::bare::build().unwrap()).unwrap();
    assert_eq!(&elf[..4], b"\x7fELF");
    let (at, size, count) = (number(&elf[32..40]), number(&elf[54..56]), number(&elf[56..58]));
    let headers: Vec<&[u8]> = (0..count).map(|n| &elf[(at + n * size) as usize..][..size as usize]).collect();
    let of_type = |kind: u32| headers.iter().filter(move |h| number(&h[..4]) == u64::from(kind));

    for load in of_type(PT_LOAD) {
        let address = number(&load[24..32]);
        assert!(address >= 1 << 20, "segment at {address:#x}");
    }
    let notes: Vec<_> = of_type(PT_NOTE).collect();
    assert_eq!(notes.len(), 1);
    let (offset, len) = (number(&notes[0][8..16]) as usize, number(&notes[0][32..40]) as usize);
    let note = &elf[offset..offset + len];
    let words: Vec<u32> = note.chunks_exact(4).map(|w| number(w) as u32).collect();
    assert_eq!(words[..3], [abi::NOTE_NAME.len() as u32 + 1, 8, abi::NOTE_TYPE]);
    assert_eq!(&note[12..12 + abi::NOTE_NAME.len()], abi::NOTE_NAME.as_bytes());
    assert_eq!(words[4..], [abi::ABI_VERSION, abi::FLAG_RING3]);
}
