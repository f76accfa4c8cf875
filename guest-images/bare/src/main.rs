//! The bare-metal guest: entered by the monitor in ring 3 (see [`abi`]), finds its virtio-blk disks, and identifies,
//! verifies and loads them by polling, all as fast as the host's thread goes, then powers off.
//!
//! It runs where a Linux guest cannot (a KVM that emulates ring 0) and measures the device and its backend without an
//! operating system in between. Words on the kernel command line choose what it does:
//!
//! | word | meaning | default |
//! | --- | --- | --- |
//! | `job=` | `identify`, `verify`, `bench`, `all` (of those), `churn` (reads and writes at random, each checked, until a key is pressed) or `mixed` (computes, alone and beside each load) | `all` |
//! | `rw=` | loads of `bench` and `mixed`, with commas: `randread`, `randwrite`, `read`, `write` | all four |
//! | `qd=` | requests in flight | 32 |
//! | `bs=`, `seqbs=` | bytes per request, random and sequential | 4K, 128K |
//! | `secs=` | length of each load | 2 |
//! | `region=` | bytes at the start of the disk that are used, at most | 64M |
//! | `seed=` | of the pattern and the random addresses | 1 |
//! | `indirect=` | 0: never use indirect descriptors | 1 |
//! | `timeout=` | seconds without a completion after which it gives up | 10 |
//! | `slice=` | of `mixed`: microseconds of computing between two looks at the ring | 50 |
//! | `hold=` | of `mixed`: 1: stays, computing, until a key is pressed | 0 |
//!
//! `verify` and the writing loads destroy what is on the disk. Exit status 0: all that was asked for was done and right.
#![no_std]
#![no_main]

pub mod abi;
mod blk;
mod churn;
mod config;
mod histogram;
mod load;
mod memory;
mod mixed;
mod packed;
mod ring;
mod runtime;
mod verify;

use core::ptr::NonNull;

use virtio_drivers::transport::mmio::{MmioTransport, VirtIOHeader};
use virtio_drivers::transport::{DeviceType, Transport};

use crate::abi::{ABI_VERSION, BOOT_MAGIC, BootInfo, FLAG_RING3, NOTE_TYPE};
use crate::config::{Config, Job};
use crate::runtime::println;

/// The ELF note that asks for entry in ring 3: sizes of name and descriptor, type, name, version, flags.
#[used]
#[unsafe(link_section = ".note.vcp")]
static NOTE: [u32; 6] = [4, 8, NOTE_TYPE, u32::from_le_bytes(*b"VCP\0"), ABI_VERSION, FLAG_RING3];

// No stack is set up at entry; `rdi` holds the address of BootInfo and is passed on.
core::arch::global_asm!(
    ".section .text.start,\"ax\"",
    ".globl _start",
    "_start:",
    "lea rsp, [rip + stack_top]",
    "xor ebp, ebp",
    "call {main}",
    "ud2",
    main = sym main,
);

extern "C" fn main(info: *const BootInfo) -> ! {
    // SAFETY: by the ABI, `rdi` is the address of a BootInfo in identity-mapped memory; magic and version are checked
    // before anything else in it is used.
    let info = unsafe { info.read_unaligned() };
    if info.magic != BOOT_MAGIC || info.version != ABI_VERSION {
        println!("guest: error: not booted by ABI version {ABI_VERSION}");
        runtime::exit(1)
    }
    match run(&info) {
        Ok(()) => {
            println!("guest: done");
            runtime::exit(0)
        }
        Err(error) => {
            println!("guest: error: {error}");
            runtime::exit(1)
        }
    }
}

fn run(info: &BootInfo) -> Result<(), blk::Error> {
    // SAFETY: the monitor says that this range is ours; it is identity-mapped, zeroed and handed over only here.
    unsafe { memory::init(info.free_start, info.mem_bytes) };
    let clock = runtime::Clock::new(info.tsc_khz).ok_or(blk::Error::NoClock)?;
    let config = Config::parse(cmdline(info))?;
    println!(
        "guest: ring {}, {} MiB, tsc {} kHz, {} virtio-mmio windows",
        runtime::ring(),
        info.mem_bytes >> 20,
        info.tsc_khz,
        info.virtio_mmio_count
    );
    let mut disks = 0;
    for n in 0..info.virtio_mmio_count {
        let Some(transport) = open(info, n) else { continue };
        if transport.device_type() != DeviceType::Block {
            continue;
        }
        let mut disk = blk::Disk::open(transport, &config, clock)?;
        disk.identify(disks)?;
        let config = disk.fit(&config)?;
        if matches!(config.job, Job::Verify | Job::All) {
            verify::run(&mut disk, &config)?;
        }
        if matches!(config.job, Job::Bench | Job::All) {
            load::run(&mut disk, &config)?;
        }
        if config.job == Job::Churn {
            churn::run(&mut disk, &config)?;
        }
        if config.job == Job::Mixed {
            mixed::run(&mut disk, &config)?;
        }
        disks += 1;
    }
    if disks == 0 { Err(blk::Error::NoDisk) } else { Ok(()) }
}

fn cmdline(info: &BootInfo) -> &'static [u8] {
    if info.cmdline == 0 || info.cmdline_len == 0 {
        return &[];
    }
    // SAFETY: by the ABI, the command line lies there in identity-mapped memory that nobody writes.
    unsafe { core::slice::from_raw_parts(info.cmdline as *const u8, info.cmdline_len as usize) }
}

fn open(info: &BootInfo, n: u64) -> Option<MmioTransport<'static>> {
    let at = info.virtio_mmio_base + n * info.virtio_mmio_stride;
    let header = NonNull::new(at as *mut VirtIOHeader)?;
    // SAFETY: by the ABI, there is a virtio-mmio window of this size at this identity-mapped address; each window is
    // opened once.
    unsafe { MmioTransport::new(header, info.virtio_mmio_stride as usize) }.ok()
}
