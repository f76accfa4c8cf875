//! What CPUID tells the guest: what KVM supports, with the topology of this virtual machine (every vCPU is a core of
//! one package, without SMT) in place of the host's.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
/// AMD: the "core multi-processing" legacy flag and the topology extensions.
const EXT_ECX_TOPOEXT: u32 = 1 << 22;

/// CPUID for one vCPU. `supported` is KVM_GET_SUPPORTED_CPUID's answer; `vcpus` is the number of vCPUs; the APIC ID of
/// a vCPU is its number. `tsc_deadline`: KVM emulates the TSC-deadline timer.
pub fn for_vcpu(supported: &CpuId, vcpu: u8, vcpus: u8, tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    let id = u32::from(vcpu);
    let count = u32::from(vcpus);
    let core_bits = count.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                // Initial APIC ID, number of logical processors, CLFLUSH line size as it was.
                entry.ebx = (entry.ebx & 0xffff) | id << 24 | (1 << core_bits).min(255) << 16;
                entry.ecx |= ECX_HYPERVISOR | ECX_X2APIC;
                set(&mut entry.ecx, ECX_TSC_DEADLINE, tsc_deadline);
                set(&mut entry.edx, EDX_HTT, count > 1);
            }
            // Caches: each is a core's own, but the last level is everyone's.
            0x4 | 0x8000_001d => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                let cores =
                    if entry.function == 0x4 && entry.eax & 0x1f != 0 { (1 << core_bits) - 1 } else { 0 };
                if entry.eax & 0x1f != 0 {
                    entry.eax = (entry.eax & 0x3fff) | sharing << 14 | cores << 26;
                }
            }
            0xb | 0x1f => topology(entry, id, count, core_bits),
            0x8000_0001 => entry.ecx &= !EXT_ECX_TOPOEXT,
            // AMD: number of cores and width of the core ID.
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | core_bits << 12 | (count - 1),
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
    cpuid
}

fn topology(entry: &mut kvm_cpuid_entry2, id: u32, count: u32, core_bits: u32) {
    const SMT: u32 = 1;
    const CORE: u32 = 2;
    let (shift, processors, kind) = match entry.index {
        0 => (0, 1, SMT),
        1 => (core_bits, count, CORE),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = processors;
    entry.ecx = entry.index | kind << 8;
    entry.edx = id;
}

fn set(word: &mut u32, bit: u32, on: bool) {
    if on { *word |= bit } else { *word &= !bit }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> CpuId {
        let leaf = |function, index, ebx| kvm_cpuid_entry2 { function, index, ebx, ..Default::default() };
        CpuId::from_entries(&[
            leaf(1, 0, 0xff08_0800),
            leaf(0xb, 0, 0),
            leaf(0xb, 1, 0),
            leaf(0x8000_0008, 0, 0),
        ])
        .unwrap()
    }

    #[test]
    fn apic_ids_and_counts() {
        let cpuid = for_vcpu(&sample(), 2, 3, true);
        let s = cpuid.as_slice();
        assert_eq!(s[0].ebx, 2 << 24 | 4 << 16 | 0x0800);
        assert_ne!(s[0].ecx & ECX_HYPERVISOR, 0);
        assert_ne!(s[0].ecx & ECX_TSC_DEADLINE, 0);
        assert_ne!(s[0].edx & EDX_HTT, 0);
        assert_eq!((s[1].eax, s[1].ebx, s[1].ecx, s[1].edx), (0, 1, 0x100, 2));
        assert_eq!((s[2].eax, s[2].ebx, s[2].ecx, s[2].edx), (2, 3, 0x201, 2));
        assert_eq!(s[3].ecx, 2 << 12 | 2);
    }

    #[test]
    fn one_vcpu_has_no_siblings() {
        let cpuid = for_vcpu(&sample(), 0, 1, false);
        let s = cpuid.as_slice();
        assert_eq!(s[0].edx & EDX_HTT, 0);
        assert_eq!(s[0].ecx & ECX_TSC_DEADLINE, 0);
        assert_eq!((s[2].eax, s[2].ebx), (0, 1));
    }
}
