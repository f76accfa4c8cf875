//! The machine's ports, and what wakes its event loop besides devices.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::command::{Control, Message};
use crate::boot::ring3::abi::EXIT_PORT;
use crate::bus::{Bus, BusDevice};
use crate::devices::console::{Console, UART_LEN};
use crate::devices::hotplug::{self, Hotplug};
use crate::devices::panic::PanicNotifier;
use crate::devices::power::{ACPI_PM_LEN, AcpiPm, ExitPort, I8042, I8042_LEN};
use crate::error::Result;
use crate::exit::{ExitReason, ExitSignal};
use crate::kvm::Vm;
use crate::layout::{
    ACPI_PM_PORT, COM1_PORT, HOTPLUG_GSI, HOTPLUG_PORT, I8042_PORT, PCI_CONFIG_PORT, PVPANIC_PORT,
};
use crate::pci::bus::{ConfigPorts, PciBus};
use crate::signal;

type Ports = Vec<(u16, u64, Arc<dyn BusDevice>)>;

/// The ports of a bare-metal guest's machine.
pub(super) fn bare_ports(console: Arc<Console>, exit: &ExitSignal) -> Bus {
    ports_of(vec![(COM1_PORT, UART_LEN, console), (EXIT_PORT, 1, Arc::new(ExitPort(exit.clone())))])
}

/// The ports of any other machine.
pub(super) fn ports(
    console: Arc<Console>,
    exit: &ExitSignal,
    hotplug: Arc<Hotplug>,
    panic: &PanicNotifier,
    pci: Option<Arc<ConfigPorts>>,
) -> Bus {
    let mut devices: Ports = vec![
        (COM1_PORT, UART_LEN, console),
        (ACPI_PM_PORT, ACPI_PM_LEN, Arc::new(AcpiPm(exit.clone()))),
        (I8042_PORT, I8042_LEN, Arc::new(I8042(exit.clone()))),
        (HOTPLUG_PORT, hotplug::LEN, hotplug),
        (PVPANIC_PORT, 1, Arc::new(panic.clone())),
    ];
    if let Some(pci) = pci {
        devices.push((PCI_CONFIG_PORT, ConfigPorts::LEN, pci));
    }
    ports_of(devices)
}

/// The registers by which the guest hears of events. What it lets go of is off the bus at once, and the machine is told.
pub(super) fn hotplug(vm: &Vm, bus: Option<Arc<PciBus>>, control: &Control) -> Result<Arc<Hotplug>> {
    let control = control.clone();
    let hotplug = Hotplug::new(Box::new(move |slot| {
        // Slot 0 is the host bridge, which stays.
        if slot != 0 && bus.as_ref().is_some_and(|bus| bus.remove(slot).is_some()) {
            control.post(Message::Work(Box::new(move |machine| machine.devices.ejected(slot))));
        }
    }))?;
    vm.irqfd(hotplug.irq(), HOTPLUG_GSI)?;
    Ok(hotplug)
}

fn ports_of(devices: Ports) -> Bus {
    let pio = Bus::default();
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
