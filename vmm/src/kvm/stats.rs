//! What KVM itself counts of a vCPU (`KVM_GET_STATS_FD`, Linux 5.14): all exits, also those that the monitor never sees,
//! such as notifications that became ioeventfds, halts and host interrupts. Read from a descriptor, at any time, without
//! stopping the vCPU.
#![allow(unsafe_code)] // An ioctl that kvm-ioctls does not have.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::{
    KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_MASK, KVM_STATS_UNIT_MASK, KVM_STATS_UNIT_NONE,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm_sys_util::ioctl::ioctl;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
/// `struct kvm_stats_header`: six 32-bit words.
const HEADER_BYTES: usize = 24;
/// `struct kvm_stats_desc` without the name behind it.
const DESCRIPTOR_BYTES: usize = 16;
/// Most descriptors and longest name that are believed.
const MAX_DESCRIPTORS: u32 = 1024;
const MAX_NAME_BYTES: u32 = 256;

/// Exits of a vCPU as KVM counts them. What this host's KVM does not count is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(default)]
pub struct KvmExits {
    /// All of them.
    pub exits: u64,
    /// Port I/O.
    pub io_exits: u64,
    /// Device memory.
    pub mmio_exits: u64,
    /// The guest had nothing to do.
    pub halt_exits: u64,
    /// Interrupts of the host.
    pub irq_exits: u64,
    /// The guest became ready for an interrupt that waited.
    pub irq_window_exits: u64,
    /// Signals to the thread.
    pub signal_exits: u64,
    /// Instructions that KVM carried out in software.
    pub insn_emulation: u64,
}

impl KvmExits {
    fn place(&mut self, name: &[u8]) -> Option<&mut u64> {
        Some(match name {
            b"exits" => &mut self.exits,
            b"io_exits" => &mut self.io_exits,
            b"mmio_exits" => &mut self.mmio_exits,
            b"halt_exits" => &mut self.halt_exits,
            b"irq_exits" => &mut self.irq_exits,
            b"irq_window_exits" => &mut self.irq_window_exits,
            b"signal_exits" => &mut self.signal_exits,
            b"insn_emulation" => &mut self.insn_emulation,
            _ => return None,
        })
    }

    /// The counters with their names, as in JSON.
    pub fn by_name(&self) -> [(&'static str, u64); 8] {
        [
            ("exits", self.exits),
            ("io_exits", self.io_exits),
            ("mmio_exits", self.mmio_exits),
            ("halt_exits", self.halt_exits),
            ("irq_exits", self.irq_exits),
            ("irq_window_exits", self.irq_window_exits),
            ("signal_exits", self.signal_exits),
            ("insn_emulation", self.insn_emulation),
        ]
    }
}

/// The counters of one vCPU.
#[derive(Debug)]
pub struct VcpuStats {
    file: File,
    /// Where each counter that is wanted lies.
    places: Vec<(Vec<u8>, u64)>,
}

impl VcpuStats {
    /// Those of `vcpu`, which the result outlives.
    ///
    /// # Errors
    /// This host's KVM has none, or none that this code understands.
    pub fn open(vcpu: &impl AsRawFd) -> io::Result<Self> {
        // SAFETY: the descriptor is a vCPU's for as long as `vcpu` is borrowed; this ioctl takes no argument and touches no
        // memory of ours.
        let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
        let file = unsafe { File::from_raw_fd(fd) };
        let places = places(&file)?;
        Ok(Self { file, places })
    }

    /// The counts now.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn read(&self) -> io::Result<KvmExits> {
        let mut exits = KvmExits::default();
        for (name, offset) in &self.places {
            let mut word = [0; 8];
            self.file.read_exact_at(&mut word, *offset)?;
            if let Some(place) = exits.place(name) {
                *place = u64::from_ne_bytes(word);
            }
        }
        Ok(exits)
    }
}

/// Reads the descriptors: which counters there are, and where.
fn places(file: &impl FileExt) -> io::Result<Vec<(Vec<u8>, u64)>> {
    let odd = || io::Error::new(io::ErrorKind::InvalidData, "KVM describes its statistics in an unknown way");
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    let word = |bytes: &[u8], at: usize| -> Option<u32> {
        bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
    };
    let field = |at: usize| word(&header, at * 4).ok_or_else(odd);
    let (name_bytes, count, descriptors, data) = (field(1)?, field(2)?, field(4)?, field(5)?);
    if count > MAX_DESCRIPTORS || name_bytes > MAX_NAME_BYTES {
        return Err(odd());
    }
    let size = DESCRIPTOR_BYTES + name_bytes as usize;
    let mut all = vec![0; size * count as usize];
    file.read_exact_at(&mut all, descriptors.into())?;
    let mut places = Vec::new();
    for descriptor in all.chunks_exact(size) {
        let (Some(flags), Some(offset)) = (word(descriptor, 0), word(descriptor, 8)) else { continue };
        let name = descriptor[DESCRIPTOR_BYTES..].split(|byte| *byte == 0).next().unwrap_or_default();
        let counts = flags & KVM_STATS_TYPE_MASK == KVM_STATS_TYPE_CUMULATIVE
            && flags & KVM_STATS_UNIT_MASK == KVM_STATS_UNIT_NONE;
        if counts && KvmExits::default().place(name).is_some() {
            places.push((name.to_vec(), u64::from(data) + u64::from(offset)));
        }
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with these counters in the kernel's layout.
    fn file(counters: &[(&str, u32, u64)]) -> File {
        let file = tempfile::tempfile().unwrap();
        let (name_bytes, count) = (48u32, counters.len() as u32);
        let (descriptors, size) = (72u32, 16 + name_bytes);
        let data = descriptors + size * count;
        let header: Vec<u8> = [0, name_bytes, count, 24, descriptors, data]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        file.write_all_at(&header, 0).unwrap();
        for (at, (name, flags, value)) in (0u32..).zip(counters) {
            let mut descriptor: Vec<u8> = flags.to_ne_bytes().to_vec();
            descriptor.extend([0, 0, 1, 0]);
            descriptor.extend((at * 8).to_ne_bytes());
            descriptor.extend([0; 4]);
            descriptor.extend(name.bytes());
            descriptor.resize(size as usize, 0);
            file.write_all_at(&descriptor, (descriptors + at * size).into()).unwrap();
            file.write_all_at(&value.to_ne_bytes(), (data + at * 8).into()).unwrap();
        }
        file
    }

    #[test]
    fn counters_are_found_by_name() {
        let file = file(&[
            ("exits", 0, 7),
            ("halt_wait_ns", 0x20, 9),
            ("blocking", 0x41, 1),
            ("halt_exits", 0, 3),
            ("new", 0, 4),
        ]);
        let places = places(&file).unwrap();
        let exits = VcpuStats { file, places }.read().unwrap();
        assert_eq!(exits, KvmExits { exits: 7, halt_exits: 3, ..KvmExits::default() });
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(places(&tempfile::tempfile().unwrap()).is_err());
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[0xff; 64], 0).unwrap();
        assert!(places(&file).is_err());
        let file = self::file(&[("exits", 0, 1)]);
        file.set_len(80).unwrap();
        assert!(places(&file).is_err());
    }

    #[test]
    fn the_kernel_has_them() {
        // Where there is no KVM there is nothing to test.
        let Ok(kvm) = kvm_ioctls::Kvm::new() else { return };
        let vcpu = kvm.create_vm().unwrap().create_vcpu(0).unwrap();
        match VcpuStats::open(&vcpu) {
            Ok(stats) => assert_eq!(stats.read().unwrap().io_exits, 0),
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENOTTY), "{e}"),
        }
    }
}
