//! The ways a guest ends itself: ACPI sleep and reset registers, the keyboard controller's reset line, and the exit port
//! of bare-metal guests. All are byte registers.

use crate::bus::BusDevice;
use crate::exit::{ExitReason, ExitSignal};
use crate::layout::ACPI_RESET_VALUE;

/// Number of byte registers of [`AcpiPm`].
pub const ACPI_PM_LEN: u64 = 3;
/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register.
pub const RESET: u64 = 2;
/// The sleep type that `\_S5_` in the DSDT names for soft-off.
pub const SLEEP_TYPE_S5: u8 = 5;

/// ACPI's registers of hardware-reduced platforms (ACPI 6.5, 4.8.3.7 sleep control, 4.8.3.6 reset).
#[derive(Debug)]
pub struct AcpiPm(pub ExitSignal);

impl BusDevice for AcpiPm {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        const SLP_EN: u8 = 1 << 5;
        let Some(&value) = data.first() else { return };
        match offset {
            SLEEP_CONTROL if value & SLP_EN != 0 && value >> 2 & 7 == SLEEP_TYPE_S5 => {
                self.0.give(ExitReason::PowerOff);
            }
            RESET if value == ACPI_RESET_VALUE => self.0.give(ExitReason::Reset),
            _ => {}
        }
    }
}

/// The keyboard controller, as far as operating systems use it to reset: command 0xfe to port 0x64. There is no keyboard;
/// the status says that both buffers are empty.
#[derive(Debug)]
pub struct I8042(pub ExitSignal);

/// Length of [`I8042`]'s range of ports: data at 0, status and command at 4.
pub const I8042_LEN: u64 = 5;

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        const STATUS: u64 = 4;
        const SYSTEM_FLAG: u8 = 1 << 2;
        if matches!(offset, 0 | STATUS) {
            data.fill(if offset == STATUS { SYSTEM_FLAG } else { 0 });
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        const COMMAND: u64 = 4;
        const PULSE_RESET: u8 = 0xfe;
        if offset == COMMAND && data.first() == Some(&PULSE_RESET) {
            self.0.give(ExitReason::Reset);
        }
    }
}

/// The exit port of bare-metal guests (guest-images' `abi::EXIT_PORT`).
#[derive(Debug)]
pub struct ExitPort(pub ExitSignal);

impl BusDevice for ExitPort {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _offset: u64, data: &[u8]) {
        if let Some(&code) = data.first() {
            self.0.give(ExitReason::GuestCode(code));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_s5_with_the_enable_bit_switches_off() {
        let exit = ExitSignal::new().unwrap();
        let pm = AcpiPm(exit.clone());
        for value in 0..=255u8 {
            if value & 0x3c != 0x34 {
                pm.write(SLEEP_CONTROL, &[value]);
            }
        }
        pm.write(SLEEP_STATUS, &[0x34]);
        pm.write(SLEEP_CONTROL, &[]);
        assert_eq!(exit.reason(), None);
        pm.write(SLEEP_CONTROL, &[0x34]);
        assert_eq!(exit.reason(), Some(ExitReason::PowerOff));
    }

    #[test]
    fn keyboard_controller_resets() {
        let exit = ExitSignal::new().unwrap();
        let kbd = I8042(exit.clone());
        kbd.write(0, &[0xfe]);
        kbd.write(4, &[0xd1]);
        assert_eq!(exit.reason(), None);
        let mut status = [0xff];
        kbd.read(4, &mut status);
        assert_eq!(status[0] & 0b11, 0);
        kbd.write(4, &[0xfe]);
        assert_eq!(exit.reason(), Some(ExitReason::Reset));
    }
}
