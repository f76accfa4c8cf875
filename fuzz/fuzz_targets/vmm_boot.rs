//! Kernel files as nobody would build them: recognised, and loaded into the memory of a small machine.
//!
//! Holds: no panic, and an end in time; what is loaded has an entry point inside of memory.
#![no_main]

use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use vmm::boot::Kernel;
use vmm::config::VmFile;

/// The parts of a file that lie far apart, so that inputs stay small: what follows is put at the setup header of a bzImage.
const HEADER_AT: usize = 0x1f1;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    let content = if kind & 1 == 0 {
        [b"\x7fELF\x02\x01".as_slice(), data].concat()
    } else {
        let mut image = vec![0; HEADER_AT];
        image.extend(data);
        if image.len() >= 0x206 {
            image[0x202..0x206].copy_from_slice(b"HdrS");
        }
        image
    };
    let fd = rustix::fs::memfd_create("kernel", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    let mut file = std::fs::File::from(fd);
    file.write_all(&content).expect("room");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let Ok(kernel) = Kernel::open(&path) else { return };
    let vm = VmFile { kernel: Some(path), memory: "8M".parse().ok(), ..Default::default() };
    let config = vm.finish().expect("a machine");
    let memory = vmm::kvm::memory::create(config.memory_bytes, false).expect("memory");
    let _ = kernel.load(&memory, &config, 1_000_000, 0xe_0000, 1);
});
