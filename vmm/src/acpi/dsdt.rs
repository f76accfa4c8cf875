//! The DSDT: devices that cannot be discovered, and what to do about events (ACPI 6.5, chapters 5.6.9 generic event device
//! and 6.3 device insertion and removal).
//!
//! One interrupt tells of all events. The generic event device's `_EVT` reads which they are, and notifies: the power
//! button, or by `PCNT` the slots whose functions have come or are to go. A guest that has let go of a function says so
//! through `_EJ0`. The registers behind are [`crate::devices::hotplug`]'s.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, MethodCall, Name,
    Notify, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, ShiftLeft, Store, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, Platform, Window, bytes};
use crate::devices::hotplug::{self, EVENT_PCI, EVENT_POWER_BUTTON};
use crate::devices::power::SLEEP_TYPE_S5;
use crate::layout::{
    COM1_GSI, COM1_PORT, HOTPLUG_GSI, HOTPLUG_PORT, PCI_CONFIG_PORT, PCI_ECAM_LEN, PCI_ECAM_START,
    PCI_MMIO_END, PCI_MMIO_START, PVPANIC_PORT, VIRTIO_MMIO_STRIDE,
};
use crate::pci::bus::SLOTS;

/// What a slot is notified of: look whether something is there; let go of what is there (ACPI 6.5, table 5.109).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
/// What the power button is notified of: it was pressed.
const PRESSED: u8 = 0x80;

/// Builds the table.
pub(super) fn build(platform: &Platform<'_>) -> Vec<u8> {
    const REVISION: u8 = 2;
    let mut dsdt = Sdt::new(*b"DSDT", 36, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let s5: &dyn Aml = &SLEEP_TYPE_S5;
    dsdt.append_slice(&bytes(&Name::new("_S5_".into(), &Package::new(vec![s5]))));
    let mut devices = com1();
    devices.extend(registers());
    devices.extend(power_button());
    devices.extend(panic_notifier());
    for (i, window) in platform.windows.iter().enumerate() {
        devices.extend(mmio(i, window));
    }
    if platform.pci {
        devices.extend(ecam());
        devices.extend(pci());
    }
    devices.extend(events(platform.pci));
    dsdt.append_slice(&Scope::raw("_SB_".into(), devices));
    dsdt.update_checksum();
    dsdt.as_slice().to_vec()
}

fn com1() -> Vec<u8> {
    bytes(&Device::new(
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
    ))
}

fn mmio(i: usize, window: &Window) -> Vec<u8> {
    bytes(&Device::new(
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
    ))
}

/// The registers of events and slots, all of 32 bits.
fn registers() -> Vec<u8> {
    let mut aml =
        bytes(&OpRegion::new("HPRG".into(), OpRegionSpace::SystemIO, &HOTPLUG_PORT, &(hotplug::LEN as u8)));
    let fields = [*b"PCIU", *b"PCID", *b"B0EJ", *b"GEVT"].map(|name| FieldEntry::Named(name, 32));
    aml.extend(bytes(&Field::new(
        "HPRG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields.to_vec(),
    )));
    aml
}

fn power_button() -> Vec<u8> {
    bytes(&Device::new(
        "PWRB".into(),
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C")), &Name::new("_UID".into(), &0u8)],
    ))
}

/// QEMU's panic notifier, whose driver Linux has.
fn panic_notifier() -> Vec<u8> {
    bytes(&Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(PVPANIC_PORT, PVPANIC_PORT, 1, 1)]),
            ),
        ],
    ))
}

/// The generic event device.
fn events(pci: bool) -> Vec<u8> {
    let register = Path::new("GEVT");
    let read = Store::new(&Local(0), &register);
    let (is_pci, is_button) =
        (And::new(&ZERO, &Local(0), &EVENT_PCI), And::new(&ZERO, &Local(0), &EVENT_POWER_BUTTON));
    let scan = MethodCall::new("\\_SB_.PCI0.PCNT".into(), vec![]);
    let (button, pressed) = (Path::new("\\_SB_.PWRB"), PRESSED);
    let notify = Notify::new(&button, &pressed);
    let on_pci = If::new(&is_pci, vec![&scan]);
    let on_button = If::new(&is_button, vec![&notify]);
    let mut body: Vec<&dyn Aml> = vec![&read, &on_button];
    if pci {
        body.push(&on_pci);
    }
    bytes(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, HOTPLUG_GSI)]),
            ),
            &Method::new("_EVT".into(), 1, true, body),
        ],
    ))
}

/// Says that ECAM's range is taken, without which Linux does not use it.
fn ecam() -> Vec<u8> {
    bytes(&Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(
                    true,
                    PCI_ECAM_START as u32,
                    PCI_ECAM_LEN as u32,
                )]),
            ),
        ],
    ))
}

/// AML that was built already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// The host bridge with its slots.
fn pci() -> Vec<u8> {
    let resources = Raw(bytes(&ResourceTemplate::new(vec![
        &AddressSpace::new_bus_number(0u16, 0u16),
        &IO::new(PCI_CONFIG_PORT, PCI_CONFIG_PORT, 1, 8),
        &AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            PCI_MMIO_START as u32,
            (PCI_MMIO_END - 1) as u32,
            None,
        ),
    ])));
    let slots = Raw((1..SLOTS as u8).flat_map(slot).collect());
    let scan = scan();
    bytes(&Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            &Name::new("_CCA".into(), &1u8),
            &Name::new("_CRS".into(), &resources),
            &slots,
            &scan,
        ],
    ))
}

fn slot_name(slot: u8) -> String {
    format!("S{slot:03}")
}

/// A slot whose function can be taken away.
fn slot(slot: u8) -> Vec<u8> {
    let address = u32::from(slot) << 16;
    let bit = bytes(&ShiftLeft::new(&Local(0), &1u8, &Path::new("_SUN")));
    let eject = bytes(&Store::new(&Path::new("\\_SB_.B0EJ"), &Local(0)));
    bytes(&Device::new(
        slot_name(slot).as_str().into(),
        vec![
            &Name::new("_SUN".into(), &slot),
            &Name::new("_ADR".into(), &address),
            &Method::new("_EJ0".into(), 1, true, vec![&Raw(bit), &Raw(eject)]),
        ],
    ))
}

/// Notifies the slots whose bits are set. Reading the registers clears them.
fn scan() -> Raw {
    let mut body = bytes(&Store::new(&Local(0), &Path::new("\\_SB_.PCIU")));
    body.extend(bytes(&Store::new(&Local(1), &Path::new("\\_SB_.PCID"))));
    for slot in 1..SLOTS as u8 {
        let bit = 1u32 << slot;
        for (register, event) in [(Local(0), DEVICE_CHECK), (Local(1), EJECT_REQUEST)] {
            let name = Path::new(&slot_name(slot));
            let notify = Notify::new(&name, &event);
            body.extend(bytes(&If::new(&And::new(&ZERO, &register, &bit), vec![&notify])));
        }
    }
    Raw(bytes(&Method::new("PCNT".into(), 0, true, vec![&Raw(body)])))
}
