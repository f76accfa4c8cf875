//! ACPI tables (ACPI 6.5): what tells the guest's kernel of processors, interrupt controllers, the serial port, PCI and the
//! virtio-mmio windows, and how to switch off. The platform is hardware-reduced: no PM timer, no SCI, no legacy
//! hardware; soft-off goes through the sleep control register, reset through the reset register.

mod dsdt;

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use crate::boot::put;
use crate::devices::power::{RESET, SLEEP_CONTROL, SLEEP_STATUS};
use crate::error::{Error, Result};
use crate::kvm::GuestMemory;
use crate::layout::{
    ACPI_END, ACPI_PM_PORT, ACPI_RESET_VALUE, ACPI_START, IOAPIC_START, LAPIC_START, PCI_ECAM_START,
};

const OEM_ID: [u8; 6] = *b"VCP   ";
const OEM_TABLE_ID: [u8; 8] = *b"VCPMON  ";
const OEM_REVISION: u32 = 1;

/// One virtio-mmio window, for the DSDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Guest physical address.
    pub base: u64,
    /// Interrupt line.
    pub gsi: u32,
}

/// What is to be described.
#[derive(Clone, Copy, Debug)]
pub struct Platform<'a> {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// virtio-mmio windows.
    pub windows: &'a [Window],
    /// There is a PCI bus.
    pub pci: bool,
}

/// Builds all tables as they lie from `start`; the RSDP comes first.
pub fn build(start: u64, platform: &Platform<'_>) -> Vec<u8> {
    // Room for the RSDP, which is written last because it points forward.
    let mut tables = vec![0; align(Rsdp::len())];
    let mut place = |table: Vec<u8>| {
        let address = start + tables.len() as u64;
        tables.extend(table);
        tables.resize(align(tables.len()), 0);
        address
    };
    let dsdt = place(dsdt::build(platform));
    let fadt = place(bytes(&fadt(dsdt)));
    let madt = place(bytes(&madt(platform.vcpus)));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if platform.pci {
        let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        mcfg.add_ecam(PCI_ECAM_START, 0, 0, 0);
        xsdt.add_entry(place(bytes(&mcfg)));
    }
    let xsdt = place(bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    tables[..rsdp.len()].copy_from_slice(&rsdp);
    tables
}

/// Writes the tables into guest memory; returns the address of the RSDP.
pub fn write(memory: &GuestMemory, platform: &Platform<'_>) -> Result<u64> {
    let tables = build(ACPI_START, platform);
    if tables.len() as u64 > ACPI_END - ACPI_START {
        return Err(Error::GuestFailed("the ACPI tables have no room: use fewer devices".into()));
    }
    put(memory, ACPI_START, &tables)?;
    Ok(ACPI_START)
}

fn align(len: usize) -> usize {
    len.next_multiple_of(64)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes as &mut dyn AmlSink);
    bytes
}

fn port(offset: u64) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(ACPI_PM_PORT) + offset)
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    // What is not there (ACPI 6.5, table 5.11): VGA, and a CMOS clock. No flag for the keyboard controller: there is none.
    const NO_VGA: u16 = 1 << 2;
    const NO_CMOS_RTC: u16 = 1 << 5;
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = port(RESET);
    fadt.reset_value = ACPI_RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL);
    fadt.sleep_status_reg = port(SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"VCP\0\0\0\0\0").into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut madt =
        MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, LocalInterruptController::Address(LAPIC_START));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_START, 0));
    madt
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 0xe_0000;

    fn tables(vcpus: u8) -> Vec<u8> {
        let windows = [Window { base: 0xd000_0000, gsi: 16 }, Window { base: 0xd000_1000, gsi: 17 }];
        build(START, &Platform { vcpus, windows: &windows, pci: true })
    }

    fn u32_at(t: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(t[at..at + 4].try_into().unwrap())
    }
    fn u64_at(t: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(t[at..at + 8].try_into().unwrap())
    }
    fn table(all: &[u8], address: u64) -> &[u8] {
        let at = (address - START) as usize;
        &all[at..][..u32_at(all, at + 4) as usize]
    }
    fn sum(t: &[u8]) -> u8 {
        t.iter().fold(0, |a, b| a.wrapping_add(*b))
    }

    #[test]
    fn every_table_is_found_and_sums_to_zero() {
        let all = tables(3);
        assert_eq!(&all[..8], b"RSD PTR ");
        assert_eq!((sum(&all[..20]), sum(&all[..36])), (0, 0));
        let xsdt = table(&all, u64_at(&all, 24));
        assert_eq!((&xsdt[..4], sum(xsdt), xsdt.len()), (&b"XSDT"[..], 0, 36 + 24));
        let fadt = table(&all, u64_at(xsdt, 36));
        assert_eq!((&fadt[..4], sum(fadt), fadt.len()), (&b"FACP"[..], 0, 276));
        let madt = table(&all, u64_at(xsdt, 44));
        assert_eq!((&madt[..4], sum(madt), madt.len()), (&b"APIC"[..], 0, 44 + 3 * 8 + 12));
        let mcfg = table(&all, u64_at(xsdt, 52));
        assert_eq!((&mcfg[..4], sum(mcfg), u64_at(mcfg, 44)), (&b"MCFG"[..], 0, 0xe000_0000));
        let dsdt = table(&all, u64_at(fadt, 140));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
    }

    #[test]
    fn fadt_says_how_to_switch_off() {
        let all = tables(1);
        let xsdt = table(&all, u64_at(&all, 24));
        let fadt = table(&all, u64_at(xsdt, 36));
        const HW_REDUCED_RESET: u32 = 1 << 20 | 1 << 10;
        assert_eq!(u32_at(fadt, 112) & HW_REDUCED_RESET, HW_REDUCED_RESET);
        assert_eq!((fadt[116], u64_at(fadt, 120), fadt[128]), (1, 0x602, 1));
        assert_eq!((u64_at(fadt, 248), u64_at(fadt, 260)), (0x600, 0x601));
    }

    #[test]
    fn dsdt_names_every_window() {
        let all = tables(1);
        let count = |needle: &[u8]| all.windows(needle.len()).filter(|w| *w == needle).count();
        assert_eq!(count(b"LNRO0005"), 2);
        assert_eq!(count(&0xd000_1000u32.to_le_bytes()), 1);
        assert_eq!(count(b"_S5_"), 1);
    }

    #[test]
    fn the_largest_machine_fits() {
        let windows: Vec<_> =
            crate::layout::VIRTIO_GSIS.iter().map(|gsi| Window { base: 0xd000_0000, gsi: *gsi }).collect();
        let platform = Platform { vcpus: 64, windows: &windows, pci: true };
        assert!((build(START, &platform).len() as u64) < ACPI_END - ACPI_START);
    }
}
