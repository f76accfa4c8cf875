//! `vcp`: a KVM monitor whose devices are virtual channel processors.
//!
//! One process per virtual machine. It boots a guest, gives it virtio devices whose queues are served by other processes
//! (VCPs) in shared memory, starts and ends those, and is the guest's serial console. It never looks at a request of a
//! device that has a VCP.
//!
//! | module | is |
//! | --- | --- |
//! | [`config`], [`cli`] | what the user asks for |
//! | [`machine`] | a virtual machine put together, run, commanded and taken apart |
//! | [`kvm`] | memory, processors, interrupts |
//! | [`boot`], [`acpi`], [`layout`] | what the guest finds in memory |
//! | [`bus`], [`devices`] | legacy devices |
//! | [`pci`] | the PCI bus: configuration space, MSI-X |
//! | [`virtio`] | virtio transport, entropy device, vhost-user front ends |
//! | [`snapshot`] | the file of a snapshot |
//! | [`vcp`] | VCP processes |
//! | [`api`], [`ctl`], [`top`] | what users do with a running machine |
//! | [`check`] | what this host can do |
//! | [`mod@bench`] | load generator for vhost-user-blk backends |

pub mod acpi;
pub mod affinity;
pub mod api;
pub mod bench;
pub mod boot;
pub mod bus;
pub mod check;
pub mod cli;
pub mod config;
pub mod confine;
pub mod ctl;
pub mod devices;
pub mod error;
pub mod exit;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod pci;
pub mod placement;
pub mod signal;
pub mod snapshot;
pub mod terminal;
pub mod text;
pub mod top;
pub mod vcp;
pub mod virtio;

pub use error::{Error, Result};

/// An error with its causes, on one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some libraries repeat their cause in their own message.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text.replace('\n', " ")
}
