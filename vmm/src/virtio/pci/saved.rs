//! What a snapshot keeps of a device on the bus.

use serde::{Deserialize, Serialize};

use super::VirtioPci;
use crate::error::{Error, Result};
use crate::pci::msix::SavedMsix;
use crate::virtio::state::SavedState;

/// A device on the bus in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedPci {
    config: Vec<u8>,
    msix: SavedMsix,
    state: SavedState,
}

impl VirtioPci {
    /// What the driver has set. Its queues rest.
    pub fn save(&self) -> SavedPci {
        let inner = self.lock();
        SavedPci { config: inner.config.bytes().to_vec(), msix: inner.msix.save(), state: inner.state.save() }
    }

    /// Brings back what [`VirtioPci::save`] kept, and has the device go on.
    pub fn restore(&self, saved: &SavedPci) -> Result<()> {
        let mut inner = self.lock();
        let name = inner.state.device.name().to_owned();
        let wrong = |reason: &str| Error::Snapshot(format!("{name}: {reason}"));
        if saved.config.len() != crate::pci::config::LEN || saved.config[..4] != inner.config.bytes()[..4] {
            return Err(wrong("another device is in its slot"));
        }
        if !inner.msix.restore(&saved.msix) {
            return Err(wrong("it has another number of interrupts"));
        }
        inner.config.restore(&saved.config);
        self.relocate(&mut inner);
        inner.state.restore(&saved.state)
    }
}
