//! One KVM virtual machine: memory slots, interrupt controllers, event descriptors for interrupts and notifications.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_pit_config};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::wires::KvmWires;
use super::{GuestMemory, cpuid, memory, regs};
use crate::error::{Error, Result};
use crate::layout::{IDENTITY_MAP, KVM_TSS};

/// A virtual machine without its vCPU threads.
pub struct Vm {
    // Dropped in this order: KVM lets go of the mapping before the mapping goes.
    pub(super) fd: Arc<VmFd>,
    wires: Arc<KvmWires>,
    pub(super) kvm: Kvm,
    supported_cpuid: CpuId,
    memory: Arc<GuestMemory>,
    /// The guest's clock while it stands still.
    pub(super) clock: Mutex<Option<kvm_clock_data>>,
}

impl Vm {
    /// Creates a virtual machine with this memory and in-kernel interrupt controllers. `pit`: with the legacy timer,
    /// which operating systems may calibrate clocks by.
    pub fn new(kvm: Kvm, memory: Arc<GuestMemory>, pit: bool) -> Result<Self> {
        const NEEDED: [(Cap, &str); 4] = [
            (Cap::Irqchip, "KVM here has no in-kernel interrupt controller: use a newer kernel"),
            (Cap::Irqfd, "KVM here has no irqfd: use a newer kernel"),
            (Cap::Ioeventfd, "KVM here has no ioeventfd: use a newer kernel"),
            (Cap::UserMemory, "KVM here has no user memory: use a newer kernel"),
        ];
        for (cap, text) in NEEDED {
            if !kvm.check_extension(cap) {
                return Err(Error::GuestFailed(text.into()));
            }
        }
        let fd = Arc::new(kvm.create_vm().map_err(Error::kvm("create a virtual machine"))?);
        // Both are for Intel processors only and harmless elsewhere; a host that refuses them does not need them.
        if let Err(e) = fd.set_identity_map_address(IDENTITY_MAP).and_then(|()| fd.set_tss_address(KVM_TSS)) {
            tracing::debug!(error = %e, "KVM does not take the TSS address");
        }
        fd.create_irq_chip().map_err(Error::kvm("create the interrupt controllers"))?;
        if pit {
            let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            fd.create_pit2(config).map_err(Error::kvm("create the interval timer"))?;
        }
        memory::map_into(&fd, &memory)?;
        let supported_cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::kvm("tell its CPUID"))?;
        let wires = Arc::new(KvmWires::new(fd.clone())?);
        Ok(Self { fd, wires, kvm, supported_cpuid, memory, clock: Mutex::new(None) })
    }

    /// What devices connect while the guest runs.
    pub fn wires(&self) -> Arc<KvmWires> {
        self.wires.clone()
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Creates vCPU number `id` of `count`, with its identity and the state that all have in common.
    pub fn create_vcpu(&self, id: u8, count: u8) -> Result<VcpuFd> {
        let max = self.kvm.get_max_vcpus();
        if usize::from(count) > max {
            return Err(Error::Usage(format!(
                "cpus={count} is more than the {max} that this host's KVM allows"
            )));
        }
        let vcpu = self.fd.create_vcpu(u64::from(id)).map_err(Error::kvm("create a vCPU"))?;
        let deadline = self.kvm.check_extension(Cap::TscDeadlineTimer);
        vcpu.set_cpuid2(&cpuid::for_vcpu(&self.supported_cpuid, id, count, deadline))
            .map_err(Error::kvm("set the vCPU's CPUID"))?;
        regs::set_defaults(&vcpu)?;
        Ok(vcpu)
    }

    /// Remembers what the guest's clock (kvmclock) shows; its vCPUs do not run.
    pub fn stop_clock(&self) {
        let clock = self.fd.get_clock();
        if let Err(e) = &clock {
            tracing::debug!(error = %e, "KVM does not tell the guest's clock");
        }
        *self.clock.lock().unwrap_or_else(PoisonError::into_inner) = clock.ok();
    }

    /// Has the guest's clock go on where it stood at [`Vm::stop_clock`]: the guest does not see the pause.
    pub fn start_clock(&self) {
        let Some(mut clock) = self.clock.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        // Flags say what a reading was like; as an argument they would ask for something else.
        clock.flags = 0;
        if let Err(e) = self.fd.set_clock(&clock) {
            tracing::debug!(error = %e, "KVM does not set the guest's clock");
        }
    }

    /// Every write to `event` raises the interrupt line `gsi` as an edge.
    pub fn irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.fd.register_irqfd(event, gsi).map_err(Error::kvm("bind an interrupt to an eventfd"))
    }

    /// A 32-bit write of `value` to the guest address `addr` signals `event` without an exit.
    pub fn ioeventfd(&self, event: &EventFd, addr: u64, value: u32) -> Result<()> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(addr), value)
            .map_err(Error::kvm("bind a notification to an eventfd"))
    }
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm").finish_non_exhaustive()
    }
}
