//! One PCI bus (PCI Local Bus 3.0, PCI Express 5.0 for the enhanced configuration mechanism): configuration space,
//! MSI-X, and how the guest reaches both. What a function does behind its registers is its own business
//! ([`crate::virtio::pci`]); that one comes or goes while the guest runs is told to it by ACPI
//! ([`crate::devices::hotplug`]).

pub mod bus;
pub mod config;
pub mod msix;

/// A function on the bus. Calls come from vCPU threads, several at a time: it locks for itself.
pub trait Function: Send + Sync {
    /// Reads 1, 2 or 4 bytes of configuration space, inside of one aligned word of 4.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes such bytes.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// Where its registers lie now: the guest address, and the length in bytes; `None` if they do not answer.
    fn registers(&self) -> Option<(u64, u64)>;
    /// Reads 1 to 8 bytes of its registers.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes 1 to 8 bytes of them.
    fn write(&self, offset: u64, data: &[u8]);
    /// It is off the bus: nothing of it answers any more.
    fn unplugged(&self) {}
}
