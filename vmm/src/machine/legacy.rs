//! The machine's ports, and what wakes its event loop besides devices.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::ring3::abi::EXIT_PORT;
use crate::bus::{Bus, BusDevice};
use crate::devices::console::{Console, UART_LEN};
use crate::devices::power::{ACPI_PM_LEN, AcpiPm, ExitPort, I8042, I8042_LEN};
use crate::exit::{ExitReason, ExitSignal};
use crate::layout::{ACPI_PM_PORT, COM1_PORT, I8042_PORT};
use crate::signal;

/// The ports of a machine.
pub(super) fn ports(console: Arc<Console>, exit: &ExitSignal, ring3: bool) -> Bus {
    let pio = Bus::default();
    let mut devices: Vec<(u16, u64, Arc<dyn BusDevice>)> = vec![(COM1_PORT, UART_LEN, console)];
    if ring3 {
        devices.push((EXIT_PORT, 1, Arc::new(ExitPort(exit.clone()))));
    } else {
        devices.push((ACPI_PM_PORT, ACPI_PM_LEN, Arc::new(AcpiPm(exit.clone()))));
        devices.push((I8042_PORT, I8042_LEN, Arc::new(I8042(exit.clone()))));
    }
    for (port, len, device) in devices {
        pio.insert(u64::from(port), len, device);
    }
    pio
}

/// Wakes the event loop for the end of the run, for signals and for commands.
pub(super) struct Wake {
    pub(super) signals: OwnedFd,
    pub(super) exit: ExitSignal,
    pub(super) commands: Arc<EventFd>,
}

impl MutEventSubscriber for Wake {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for event in [self.signals.as_raw_fd(), self.exit.event().as_raw_fd(), self.commands.as_raw_fd()] {
            if let Err(e) = ops.add(Events::new_raw(event, EventSet::IN)) {
                self.exit.give(ExitReason::Internal(format!("signals cannot be watched: {e}")));
            }
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let _ = self.exit.event().read();
        let _ = self.commands.read();
        let _ = rustix::io::read(&self.signals, &mut [0u8; 8]);
        if let Some(signal) = signal::received() {
            self.exit.give(ExitReason::Signal(signal));
        }
    }
}
