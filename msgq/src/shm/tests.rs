use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;

use super::file::{Access, FileError, check, create};
use super::{Mapping, Outside};
use crate::ring::Words;
use crate::sync::Ordering;

const LEN: usize = 0x3000;

#[test]
fn copies_of_every_length_and_alignment_are_exact() {
    let (_file, map) = create("t", LEN, Access::Both).unwrap();
    let data: Vec<u8> = (0..LEN).map(|at| (at * 7 + at / 256) as u8).collect();
    for offset in 0..9 {
        for len in (0..40).chain([511, 512, 513, 1500, 4096]) {
            map.write(offset, &data[offset..offset + len]).unwrap();
            let mut back = vec![0xee; len + 2];
            map.read(offset, &mut back[1..=len]).unwrap();
            assert_eq!(back[1..=len], data[offset..offset + len], "{offset}+{len}");
            assert_eq!((back[0], back[len + 1]), (0xee, 0xee), "{offset}+{len}");
            // What lies around it in the shared memory stayed.
            let mut after = [0];
            map.read(offset + len, &mut after).unwrap();
            map.write(offset + len, &[after[0] ^ 1]).unwrap();
            map.write(offset, &data[offset..offset + len]).unwrap();
            let mut again = [0];
            map.read(offset + len, &mut again).unwrap();
            assert_eq!(again[0], after[0] ^ 1, "{offset}+{len}");
        }
    }
}

#[test]
fn ranges_outside_are_refused() {
    let (_file, map) = create("t", LEN, Access::Both).unwrap();
    for (offset, len) in [(LEN, 1), (LEN - 1, 2), (usize::MAX, 2), (usize::MAX, 1), (1, LEN)] {
        assert_eq!(map.pointer(offset, len), Err(Outside { offset, len, size: LEN }));
    }
    assert!(map.pointer(LEN, 0).is_ok());
    assert_eq!(map.words().len(), LEN / 8);
}

/// Everything that a peer may try with the descriptor of a memory that it shall only read.
#[test]
fn no_way_leads_around_the_seals() {
    let (file, map) = create("t", LEN, Access::Owner).unwrap();
    let fd = file.as_fd();
    assert_eq!(Mapping::read_write(fd, LEN).unwrap_err(), Errno::PERM);
    assert_eq!(rustix::io::pwrite(fd, b"x", 0), Err(Errno::PERM));
    assert_eq!(rustix::fs::ftruncate(fd, 4096), Err(Errno::PERM));
    assert_eq!(rustix::fs::ftruncate(fd, LEN as u64 * 2), Err(Errno::PERM));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    assert_eq!(rustix::fs::fallocate(fd, punch, 0, 4096), Err(Errno::PERM));
    assert_eq!(rustix::fs::fcntl_add_seals(fd, SealFlags::WRITE), Err(Errno::PERM));
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    let again = rustix::fs::open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
    assert_eq!(Mapping::read_write(&again, LEN).unwrap_err(), Errno::PERM);
    assert_eq!(rustix::io::pwrite(&again, b"x", 0), Err(Errno::PERM));
    let peer = Mapping::read_only(&again, LEN).unwrap();
    // SAFETY: a mapping of this test is made writable, or rather is not.
    let protect = unsafe {
        rustix::mm::mprotect(peer.pointer(0, LEN).unwrap().cast(), LEN, rustix::mm::MprotectFlags::WRITE)
    };
    assert_eq!(protect, Err(Errno::ACCESS));
    // The owner still writes, and the peer sees it.
    map.words()[3].store(77, Ordering::Release);
    assert_eq!(peer.words()[3].load(Ordering::Acquire), 77);
}

#[test]
fn files_that_could_fault_or_lie_are_refused() {
    let (file, _map) = create("t", LEN, Access::Both).unwrap();
    assert_eq!(check(&file, LEN as u64, Access::Both), Ok(()));
    assert!(matches!(check(&file, LEN as u64, Access::Owner), Err(FileError::Seals { .. })));
    assert!(matches!(check(&file, LEN as u64 + 4096, Access::Both), Err(FileError::Size { .. })));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 0, 4096).unwrap();
    assert!(matches!(check(&file, LEN as u64, Access::Both), Err(FileError::Holes { .. })));
    // Neither an ordinary file, nor a device, nor a pipe.
    let null = std::fs::File::open("/dev/zero").unwrap();
    assert!(check(&null, 4096, Access::Both).is_err());
    let (read, _write) = rustix::pipe::pipe().unwrap();
    assert!(check(&read, 4096, Access::Both).is_err());
    // A memory file that can shrink.
    let flags = rustix::fs::MemfdFlags::ALLOW_SEALING;
    let open = rustix::fs::memfd_create("t", flags).unwrap();
    rustix::fs::fallocate(&open, FallocateFlags::empty(), 0, 4096).unwrap();
    assert!(matches!(check(&open, 4096, Access::Both), Err(FileError::Seals { .. })));
}

#[test]
#[should_panic(expected = "read-only")]
fn a_read_only_mapping_is_not_written() {
    let (file, _map) = create("t", LEN, Access::Owner).unwrap();
    let _ = Mapping::read_only(&file, LEN).unwrap().write(0, b"x");
}
