//! A hostile guest at the ports: serial console, ACPI's sleep and reset registers, keyboard controller, hot-plug registers
//! and panic notifier, by accesses of any width.
//!
//! Holds: no panic; the host bridge is never ejected.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vmm::bus::Bus;
use vmm::devices::console::{Console, UART_LEN};
use vmm::devices::hotplug::{self, Hotplug};
use vmm::devices::panic::PanicNotifier;
use vmm::devices::power::{ACPI_PM_LEN, AcpiPm, I8042, I8042_LEN};
use vmm::exit::ExitSignal;

fuzz_target!(|data: &[u8]| {
    let exit = ExitSignal::new().expect("an eventfd");
    let (console, _irq, _input) =
        Console::new(Box::new(std::io::sink()), exit.clone(), false, false).expect("a console");
    let hotplug = Hotplug::new(Box::new(|slot| assert!(slot < 32))).expect("an eventfd");
    let bus = Bus::default();
    bus.insert(0, UART_LEN, console.clone());
    bus.insert(8, ACPI_PM_LEN, Arc::new(AcpiPm(exit.clone())));
    bus.insert(16, I8042_LEN, Arc::new(I8042(exit.clone())));
    bus.insert(32, hotplug::LEN, hotplug.clone());
    bus.insert(48, 1, Arc::new(PanicNotifier::default()));
    for step in data.chunks_exact(10) {
        let [what, width, value @ ..] = step else { return };
        let (what, width) = (*what, *width);
        let (port, len) = (u64::from(what % 64), usize::from(width % 9).min(value.len()));
        match width >> 4 {
            0 => hotplug.announce(what % 32),
            1 => hotplug.ask_back(what % 32),
            2 => hotplug.press(),
            3..8 => {
                let mut read = [0; 8];
                bus.read_ports(port, &mut read[..len]);
            }
            _ => {
                bus.write_ports(port, &value[..len]);
            }
        }
    }
    let saved = console.save();
    console.restore(&saved, Box::new(std::io::sink())).expect("what was saved can be restored");
    assert_eq!(console.save(), saved);
});
