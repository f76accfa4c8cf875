//! What a snapshot keeps of processors and interrupt controllers, in KVM's own structures.
#![allow(unsafe_code)] // KVM_SET_XSAVE may read more than its argument on hosts that were asked for more.

use std::sync::PoisonError;

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data,
    kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::Vm;
use crate::error::{Error, Result};

/// One vCPU.
#[derive(Serialize, Deserialize)]
pub struct SavedVcpu {
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: Option<kvm_xcrs>,
    debug: Option<kvm_debugregs>,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl std::fmt::Debug for SavedVcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SavedVcpu").field("rip", &self.regs.rip).finish_non_exhaustive()
    }
}

/// Interrupt controllers, timer and clock.
#[derive(Clone, Serialize, Deserialize)]
pub struct SavedVm {
    irqchips: Vec<kvm_irqchip>,
    pit: Option<kvm_pit_state2>,
    clock: Option<kvm_clock_data>,
}

impl std::fmt::Debug for SavedVm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SavedVm").finish_non_exhaustive()
    }
}

fn list_error(e: impl std::fmt::Debug) -> Error {
    Error::Os { action: "build a list for KVM", source: std::io::Error::other(format!("{e:?}")) }
}

/// Reads the model-specific registers of these numbers; those that KVM does not read are left out.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let mut values = Vec::new();
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> =
            rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(list_error)?;
        let read = vcpu.get_msrs(&mut msrs).map_err(Error::kvm("read model-specific registers"))?;
        values.extend_from_slice(&msrs.as_slice()[..read.min(rest.len())]);
        // KVM stops at the first that it does not read.
        rest = rest.get(read + 1..).unwrap_or(&[]);
    }
    Ok(values)
}

/// Writes model-specific registers; those that KVM does not take (read-only ones) are passed over.
fn write_msrs(vcpu: &VcpuFd, values: &[kvm_msr_entry]) -> Result<()> {
    let mut rest = values;
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(rest).map_err(list_error)?;
        let written = vcpu.set_msrs(&msrs).map_err(Error::kvm("set model-specific registers"))?;
        if let Some(refused) = rest.get(written) {
            tracing::debug!(msr = format_args!("{:#x}", refused.index), "KVM does not take this MSR");
        }
        rest = rest.get(written + 1..).unwrap_or(&[]);
    }
    Ok(())
}

/// What a vCPU that does not run is like. `msrs`: the numbers of [`Vm::msr_indices`].
pub fn save_vcpu(vcpu: &VcpuFd, msrs: &[u32]) -> Result<SavedVcpu> {
    let fail = |what| Error::kvm(what);
    let cpuid = vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(fail("tell a vCPU's CPUID"))?;
    Ok(SavedVcpu {
        // KVM changes this state when it is read (pending events become registers), so it comes first.
        mp_state: vcpu.get_mp_state().map_err(fail("tell whether a vCPU runs"))?,
        regs: vcpu.get_regs().map_err(fail("tell a vCPU's registers"))?,
        sregs: vcpu.get_sregs().map_err(fail("tell a vCPU's system registers"))?,
        xsave: vcpu.get_xsave().map_err(fail("tell a vCPU's extended state"))?,
        xcrs: vcpu.get_xcrs().ok(),
        debug: vcpu.get_debug_regs().ok(),
        lapic: vcpu.get_lapic().map_err(fail("tell a local APIC's registers"))?,
        msrs: read_msrs(vcpu, msrs)?,
        events: vcpu.get_vcpu_events().map_err(fail("tell a vCPU's pending events"))?,
        cpuid: cpuid.as_slice().to_vec(),
    })
}

/// Makes a new vCPU what the saved one was. The interrupt controllers have been restored.
pub fn restore_vcpu(vcpu: &VcpuFd, saved: &SavedVcpu) -> Result<()> {
    let fail = |what| Error::kvm(what);
    let cpuid = CpuId::from_entries(&saved.cpuid).map_err(list_error)?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(fail("take the snapshot's CPUID: was it made on another kind of host?"))?;
    vcpu.set_mp_state(saved.mp_state).map_err(fail("set whether a vCPU runs"))?;
    vcpu.set_regs(&saved.regs).map_err(fail("set a vCPU's registers"))?;
    vcpu.set_sregs(&saved.sregs).map_err(fail("set a vCPU's system registers"))?;
    // SAFETY: KVM reads more than the 4096 bytes of the structure only for processes that asked for larger state
    // components (ARCH_REQ_XCOMP_GUEST_PERM), which this one never does.
    unsafe { vcpu.set_xsave(&saved.xsave) }.map_err(fail("set a vCPU's extended state"))?;
    if let Some(xcrs) = &saved.xcrs {
        vcpu.set_xcrs(xcrs).map_err(fail("set a vCPU's extended control registers"))?;
    }
    if let Some(debug) = &saved.debug {
        vcpu.set_debug_regs(debug).map_err(fail("set a vCPU's debug registers"))?;
    }
    vcpu.set_lapic(&saved.lapic).map_err(fail("set a local APIC's registers"))?;
    write_msrs(vcpu, &saved.msrs)?;
    vcpu.set_vcpu_events(&saved.events).map_err(fail("set a vCPU's pending events"))
}

impl Vm {
    /// The model-specific registers that make a guest's state.
    pub fn msr_indices(&self) -> Result<Vec<u32>> {
        let list = self.kvm.get_msr_index_list().map_err(Error::kvm("list model-specific registers"))?;
        Ok(list.as_slice().to_vec())
    }

    /// What a machine whose vCPUs do not run is like.
    pub fn save(&self) -> Result<SavedVm> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd.get_irqchip(&mut chip).map_err(Error::kvm("tell an interrupt controller's registers"))?;
            Ok(chip)
        };
        let ids = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
        Ok(SavedVm {
            irqchips: ids.into_iter().map(chip).collect::<Result<_>>()?,
            pit: self.fd.get_pit2().ok(),
            clock: *self.clock.lock().unwrap_or_else(PoisonError::into_inner),
        })
    }

    /// Makes a new machine what the saved one was; its clock goes on at [`Vm::start_clock`].
    pub fn restore(&self, saved: &SavedVm) -> Result<()> {
        for chip in &saved.irqchips {
            self.fd.set_irqchip(chip).map_err(Error::kvm("set an interrupt controller's registers"))?;
        }
        if let Some(pit) = &saved.pit {
            self.fd.set_pit2(pit).map_err(Error::kvm("set the interval timer"))?;
        }
        *self.clock.lock().unwrap_or_else(PoisonError::into_inner) = saved.clock;
        Ok(())
    }
}
