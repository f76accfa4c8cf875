//! The hypervisor side of the monitor: the virtual machine, its memory, its processors. Knows nothing of devices
//! beyond the two buses that exits are given to.

pub mod cpuid;
pub mod exits;
pub mod memory;
pub mod regs;
pub mod saved;
pub mod stats;
pub mod vcpu;
pub mod vm;
pub mod wires;

pub use memory::GuestMemory;
pub use vm::Vm;

use crate::error::Error;

/// Opens `/dev/kvm`, with advice where that fails.
pub fn open() -> crate::error::Result<kvm_ioctls::Kvm> {
    kvm_ioctls::Kvm::new().map_err(|e| {
        let source = std::io::Error::from_raw_os_error(e.errno());
        let hint = match e.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => "load the module kvm_intel or kvm_amd, or enable virtualisation in the firmware; `vcp check` tells more",
            libc::EACCES | libc::EPERM => "join the group kvm or run with the right to open it; `vcp check` tells more",
            _ => "`vcp check` tells more",
        };
        Error::KvmOpen { hint, source }
    })
}
