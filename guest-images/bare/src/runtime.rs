//! What a program needs without an operating system: the serial port, the way out, the clock, panics, and the functions
//! that the compiler calls.

use core::arch::asm;
use core::fmt::{self, Write};

use crate::abi::{EXIT_PORT, SERIAL_PORT};

/// The serial port. Each byte is an exit to the monitor, so nothing is printed while a load is measured.
pub struct Serial;

impl Write for Serial {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        s.bytes().for_each(|b| out(SERIAL_PORT, b));
        Ok(())
    }
}

/// Prints a line on the serial port.
macro_rules! println {
    ($($arg:tt)*) => {{
        // Writing to the port cannot fail.
        let _ = core::fmt::Write::write_fmt(&mut $crate::runtime::Serial, format_args!("{}\n", format_args!($($arg)*)));
    }};
}
pub(crate) use println;

fn out(port: u16, byte: u8) {
    // SAFETY: IOPL is 3; the two ports that are used here have no effect on memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") byte, options(nomem, nostack)) }
}

/// Returns whether somebody has typed something. An exit to the monitor.
pub fn key_pressed() -> bool {
    const LINE_STATUS: u16 = 5;
    const DATA_READY: u8 = 1;
    let status: u8;
    // SAFETY: IOPL is 3; reading the status of the serial port has no effect on memory.
    unsafe {
        asm!("in al, dx", in("dx") SERIAL_PORT + LINE_STATUS, out("al") status, options(nomem, nostack));
    }
    status & DATA_READY != 0
}

/// Ends the guest with this status.
pub fn exit(status: u8) -> ! {
    loop {
        out(EXIT_PORT, status);
    }
}

/// Returns the privilege level that we run in.
pub fn ring() -> u16 {
    let cs: u16;
    // SAFETY: reads a register.
    unsafe { asm!("mov {0:x}, cs", out(reg) cs, options(nomem, nostack)) }
    cs & 3
}

/// The time-stamp counter with its frequency.
#[derive(Clone, Copy)]
pub struct Clock {
    khz: u64,
}

impl Clock {
    /// Returns none where the frequency is not known.
    pub fn new(tsc_khz: u64) -> Option<Self> {
        (tsc_khz != 0).then_some(Self { khz: tsc_khz })
    }

    /// Returns the time in ticks.
    pub fn now(self) -> u64 {
        // SAFETY: reads the counter; CR4.TSD is clear.
        unsafe { core::arch::x86_64::_rdtsc() }
    }

    /// Returns the ticks in a number of seconds.
    pub fn ticks(self, secs: u64) -> u64 {
        secs * 1000 * self.khz
    }

    /// Returns ticks as seconds.
    pub fn secs(self, ticks: u64) -> f64 {
        ticks as f64 / (self.khz as f64 * 1000.0)
    }

    /// Returns ticks as microseconds.
    pub fn micros(self, ticks: u64) -> f64 {
        ticks as f64 * 1000.0 / self.khz as f64
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    println!("guest: panic: {info}");
    exit(1)
}

// The compiler calls these five by name. `rep` instructions and volatile reads keep it from turning a body into a call
// of itself.

/// C's memcpy.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    // SAFETY: the caller gives valid ranges that do not overlap; the direction flag is clear by the calling convention.
    unsafe {
        asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack))
    };
    to
}

/// C's memmove.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= n {
        // SAFETY: the target does not begin inside the source, so copying upwards is right.
        return unsafe { memcpy(to, from, n) };
    }
    // SAFETY: the caller gives valid ranges; `n` is not 0 here; copied downwards, and the flag is cleared again.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") n => _, inout("rdi") to.add(n - 1) => _,
            inout("rsi") from.add(n - 1) => _, options(nostack));
    }
    to
}

/// C's memset.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8 {
    // SAFETY: the caller gives a valid range.
    unsafe {
        asm!("rep stosb", inout("rcx") n => _, inout("rdi") to => _, in("al") byte as u8, options(nostack))
    };
    to
}

/// C's memcmp.
///
/// # Safety
/// As in C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    for i in 0..n {
        // SAFETY: the caller gives valid ranges.
        let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

/// BSD's bcmp.
///
/// # Safety
/// As memcmp.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, n) }
}

// The core library is built for unwinding and names these; nothing unwinds here (panic = "abort").

#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    exit(1)
}
