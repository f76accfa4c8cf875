//! Capabilities, privileges, and what others may do to the process.

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

use super::Report;

/// More than any kernel has; the first number that a kernel does not know ends the loop.
const MAX_CAPABILITIES: u32 = 64;

pub(super) fn apply(report: &mut Report) {
    let may = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    report.note("no new privileges", set_no_new_privs(true));
    report.note("no capabilities", drop_capabilities(may));
    // Others of the same user cannot trace it or read its memory, which holds secrets and maps the guest's.
    report.note("not traceable", set_dumpable_behavior(DumpableBehavior::NotDumpable));
}

fn drop_capabilities(may: CapabilitySet) -> rustix::io::Result<()> {
    if may.contains(CapabilitySet::SETPCAP) {
        for number in 0..MAX_CAPABILITIES {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            match capability_is_in_bounding_set(capability) {
                Ok(true) => remove_capability_from_bounding_set(capability)?,
                Ok(false) => {}
                Err(_) => break,
            }
        }
    }
    clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
}
