//! ACPI tables (ACPI 6.5): what tells the guest's kernel of processors, interrupt controllers, the serial port and the
//! virtio-mmio windows, and how to switch off. The platform is hardware-reduced: no PM timer, no SCI, no legacy
//! hardware; soft-off goes through the sleep control register, reset through the reset register.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use crate::boot::put;
use crate::devices::power::{RESET, SLEEP_CONTROL, SLEEP_STATUS, SLEEP_TYPE_S5};
use crate::error::{Error, Result};
use crate::kvm::GuestMemory;
use crate::layout::{
    ACPI_END, ACPI_PM_PORT, ACPI_RESET_VALUE, ACPI_START, COM1_GSI, COM1_PORT, IOAPIC_START, LAPIC_START,
    VIRTIO_MMIO_STRIDE,
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

/// Builds all tables as they lie from `start`; the RSDP comes first.
pub fn build(start: u64, vcpus: u8, windows: &[Window]) -> Vec<u8> {
    // Room for the RSDP, which is written last because it points forward.
    let mut tables = vec![0; align(Rsdp::len())];
    let mut place = |table: Vec<u8>| {
        let address = start + tables.len() as u64;
        tables.extend(table);
        tables.resize(align(tables.len()), 0);
        address
    };
    let dsdt = place(dsdt(windows));
    let fadt = place(bytes(&fadt(dsdt)));
    let madt = place(bytes(&madt(vcpus)));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    tables[..rsdp.len()].copy_from_slice(&rsdp);
    tables
}

/// Writes the tables into guest memory; returns the address of the RSDP.
pub fn write(memory: &GuestMemory, vcpus: u8, windows: &[Window]) -> Result<u64> {
    let tables = build(ACPI_START, vcpus, windows);
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

fn dsdt(windows: &[Window]) -> Vec<u8> {
    const REVISION: u8 = 2;
    let mut dsdt = Sdt::new(*b"DSDT", 36, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let s5: &dyn Aml = &SLEEP_TYPE_S5;
    dsdt.append_slice(&bytes(&Name::new("_S5_".into(), &Package::new(vec![s5]))));
    let com1 = Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(COM1_PORT, COM1_PORT, 0, 8),
                    // Consumer, edge, active high, exclusive.
                    &Interrupt::new(true, true, false, false, COM1_GSI),
                ]),
            ),
        ],
    )
    .to_bytes();
    let windows = windows.iter().enumerate().map(|(i, window)| {
        Device::new(
            format!("VR{i:02X}").as_str().into(),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &(i as u8)),
                &Name::new("_CCA".into(), &1u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, window.base as u32, VIRTIO_MMIO_STRIDE as u32),
                        &Interrupt::new(true, true, false, false, window.gsi),
                    ]),
                ),
            ],
        )
        .to_bytes()
    });
    let devices = std::iter::once(com1).chain(windows).flatten().collect();
    dsdt.append_slice(&Scope::raw("_SB_".into(), devices));
    dsdt.update_checksum();
    dsdt.as_slice().to_vec()
}

/// The AML of a device that borrows its parts.
trait ToBytes {
    fn to_bytes(&self) -> Vec<u8>;
}

impl ToBytes for Device<'_> {
    fn to_bytes(&self) -> Vec<u8> {
        bytes(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 0xe_0000;

    fn tables(vcpus: u8) -> Vec<u8> {
        let windows = [Window { base: 0xd000_0000, gsi: 16 }, Window { base: 0xd000_1000, gsi: 17 }];
        build(START, vcpus, &windows)
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
        assert_eq!((&xsdt[..4], sum(xsdt), xsdt.len()), (&b"XSDT"[..], 0, 36 + 16));
        let fadt = table(&all, u64_at(xsdt, 36));
        assert_eq!((&fadt[..4], sum(fadt), fadt.len()), (&b"FACP"[..], 0, 276));
        let madt = table(&all, u64_at(xsdt, 44));
        assert_eq!((&madt[..4], sum(madt), madt.len()), (&b"APIC"[..], 0, 44 + 3 * 8 + 12));
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
        assert!((build(START, 64, &windows).len() as u64) < ACPI_END - ACPI_START);
    }
}
