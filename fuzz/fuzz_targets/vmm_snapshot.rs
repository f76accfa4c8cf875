//! Files that say they are snapshots: any bytes, and a whole snapshot with bytes changed and the checksums made right.
//!
//! Holds: no panic, no more memory than the file has, an error or the memory that the file describes.
#![no_main]

use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use vmm::snapshot::Snapshot;

const MEMORY_LEN: u64 = 64 << 10;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    let content = if kind & 1 == 0 { data.to_vec() } else { around(data) };
    let fd = rustix::fs::memfd_create("snapshot", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    let mut file = std::fs::File::from(fd);
    file.write_all(&content).expect("room");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let Ok(snapshot) = Snapshot::<serde_json::Value>::open(&path) else { return };
    if snapshot.memory_len() > MEMORY_LEN {
        return;
    }
    let fd = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&fd, snapshot.memory_len()).expect("room");
    let _ = snapshot.load_memory(&fd.into());
});

/// A file whose header is right and whose description is `data`.
fn around(data: &[u8]) -> Vec<u8> {
    let sum = |bytes: &[u8]| crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes);
    let mut file = b"VCP-SNAP".to_vec();
    file.extend(vmm::snapshot::VERSION.to_le_bytes());
    file.extend([0; 4]);
    for number in [4096 + MEMORY_LEN, data.len() as u64, sum(data), MEMORY_LEN] {
        file.extend(number.to_le_bytes());
    }
    let header = sum(&file);
    file.extend(header.to_le_bytes());
    file.resize((4096 + MEMORY_LEN) as usize, 0x5a);
    file.extend(data);
    file
}
