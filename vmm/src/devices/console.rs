//! The serial console: a 16550 (by `vm-superio`) between the guest and standard input and output.
//!
//! Input from a pipe or file is read only as far as the guest takes it, so that none is drained into nowhere; and none
//! is given to a guest whose driver has not set up the receiver yet, since drivers empty it when they start. At the end of input the descriptor leaves the event loop for good. On a terminal keys are always read, so that
//! Ctrl-A x ends the run of a guest that does not listen; Ctrl-A Ctrl-A is a Ctrl-A for the guest.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents, SerialState};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::error::{Error, Result};
use crate::exit::{ExitReason, ExitSignal};

/// Keys that are kept for a guest that does not listen; more are dropped.
const MAX_PENDING_BYTES: usize = 4096;
/// Interrupt enable register, and its bit for received data.
const IER: u64 = 1;
const IER_RECEIVED_DATA: u8 = 1;
/// Modem control register, and its bit "request to send": the driver is ready to receive.
const MCR: u64 = 4;
const MCR_RTS: u8 = 1 << 1;
/// Modem control: loop-back, by which drivers test the UART.
const MCR_LOOP: u8 = 1 << 4;

/// Whether a driver has set the UART up for receiving. Interrupts alone do not say so: Linux enables them for a moment
/// when it looks what kind of UART it has.
fn receives(uart: &Uart) -> bool {
    let state = uart.state();
    state.interrupt_enable & IER_RECEIVED_DATA != 0 && state.modem_control & (MCR_RTS | MCR_LOOP) == MCR_RTS
}

/// Number of the UART's registers.
pub const UART_LEN: u64 = 8;

/// The UART's interrupt line: an eventfd bound to an interrupt.
#[derive(Debug)]
pub struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the event loop that the guest has taken all input.
#[derive(Debug)]
pub struct InputTaken(EventFd);

impl SerialEvents for InputTaken {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // Fails only if the counter is full: then the loop is awake anyway.
        let _ = self.0.write(1);
    }
}

/// Standard output without a buffer: console bytes appear as the guest writes them. Output that nobody can take any more
/// is dropped, and the guest goes on.
#[derive(Debug)]
pub struct Stdout;

impl Write for Stdout {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match rustix::io::write(rustix::stdio::stdout(), data) {
            Ok(n) => Ok(n),
            Err(rustix::io::Errno::INTR) => Err(io::ErrorKind::Interrupted.into()),
            Err(rustix::io::Errno::AGAIN) => {
                // A non-blocking output (a pipe shared with someone who made it so): wait for room.
                let out = rustix::stdio::stdout();
                let mut fds = [rustix::event::PollFd::new(&out, rustix::event::PollFlags::OUT)];
                let _ = rustix::event::poll(&mut fds, None);
                Err(io::ErrorKind::Interrupted.into())
            }
            Err(_) => Ok(data.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Uart = Serial<Line, InputTaken, Box<dyn Write + Send>>;

/// The console in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SavedConsole {
    registers: [u8; 9],
    input: Vec<u8>,
}

/// The 16550 on the port bus.
pub struct Console {
    uart: Mutex<Uart>,
    /// Input is held back until the guest listens. Changed under the lock of `uart` only.
    held_back: AtomicBool,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}

fn event() -> Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::os("create an eventfd"))
}

impl Console {
    /// Creates the UART with its output. Returned with it: the eventfd of its interrupt line, and the part that reads
    /// standard input. `terminal`: input is one, with the escape key. `polled`: the guest reads without interrupts.
    pub fn new(
        output: Box<dyn Write + Send>,
        exit: ExitSignal,
        terminal: bool,
        polled: bool,
    ) -> Result<(Arc<Self>, EventFd, ConsoleInput)> {
        let (irq, taken) = (event()?, event()?);
        let clone = |e: &EventFd| e.try_clone().map_err(Error::os("duplicate an eventfd"));
        let uart = Serial::with_events(Line(clone(&irq)?), InputTaken(clone(&taken)?), output);
        let console = Arc::new(Self { uart: Mutex::new(uart), held_back: AtomicBool::new(false) });
        let input = ConsoleInput {
            console: console.clone(),
            taken,
            exit,
            escape: terminal.then_some(Escape::default()),
            polled,
            pending: VecDeque::new(),
            source: Source::Waiting,
        };
        Ok((console, irq, input))
    }

    /// The UART's registers, for a snapshot.
    pub fn save(&self) -> SavedConsole {
        let s = self.uart().state();
        SavedConsole {
            registers: [
                s.baud_divisor_low,
                s.baud_divisor_high,
                s.interrupt_enable,
                s.interrupt_identification,
                s.line_control,
                s.line_status,
                s.modem_control,
                s.modem_status,
                s.scratch,
            ],
            input: s.in_buffer,
        }
    }

    /// Makes the UART what it was; `output` is where its output goes from now on.
    pub fn restore(&self, saved: &SavedConsole, output: Box<dyn Write + Send>) -> Result<()> {
        let [low, high, ier, iir, lcr, lsr, mcr, msr, scratch] = saved.registers;
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: ier,
            interrupt_identification: iir,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch,
            in_buffer: saved.input.clone(),
        };
        let mut uart = self.uart();
        let clone = |event: &EventFd| event.try_clone().map_err(Error::os("duplicate an eventfd"));
        let (line, taken) = (Line(clone(&uart.interrupt_evt().0)?), InputTaken(clone(&uart.events().0)?));
        *uart = Serial::from_state(&state, line, taken, output)
            .map_err(|e| Error::Snapshot(format!("the console's state cannot be: {e:?}")))?;
        if receives(&uart) {
            uart.events().in_buffer_empty();
        }
        Ok(())
    }

    fn uart(&self) -> std::sync::MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Console {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(first) = data.first_mut() {
            *first = self.uart().read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let mut uart = self.uart();
        if let Err(e) = uart.write(offset as u8, value) {
            tracing::debug!(error = %e, "console output failed");
        }
        if matches!(offset, IER | MCR) && self.held_back.load(Ordering::Relaxed) && receives(&uart) {
            self.held_back.store(false, Ordering::Relaxed);
            uart.events().in_buffer_empty();
        }
    }
}

/// The escape key of terminals.
#[derive(Debug, Default)]
struct Escape {
    prefix_seen: bool,
}

impl Escape {
    const PREFIX: u8 = 0x01;

    /// Takes one key; what of it goes to the guest, or `Err` if the user wants to leave.
    fn take(&mut self, key: u8) -> std::result::Result<Option<u8>, ()> {
        match (std::mem::take(&mut self.prefix_seen), key) {
            (true, b'x' | b'X') => Err(()),
            (true, _) | (false, 0x02..) | (false, 0) => Ok(Some(key)),
            (false, Self::PREFIX) => {
                self.prefix_seen = true;
                Ok(None)
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Source {
    /// In the event loop; read when readable.
    Polled,
    /// Not in the event loop until the guest has taken what it has.
    Waiting,
    /// A regular file, which epoll does not take: it is always readable.
    AlwaysReady,
    /// At its end.
    Ended,
}

/// Moves standard input into the UART.
#[derive(Debug)]
pub struct ConsoleInput {
    console: Arc<Console>,
    taken: EventFd,
    exit: ExitSignal,
    escape: Option<Escape>,
    polled: bool,
    /// Read and not yet given to the UART.
    pending: VecDeque<u8>,
    source: Source,
}

impl ConsoleInput {
    fn listen(&mut self, ops: &mut EventOps<'_>) {
        let stdin = Events::new_raw(rustix::stdio::stdin().as_raw_fd(), EventSet::IN);
        match ops.add(stdin) {
            Ok(()) => self.source = Source::Polled,
            Err(event_manager::Error::Epoll(e)) if e.errno() == libc::EPERM => {
                self.source = Source::AlwaysReady;
                self.pump(ops);
            }
            Err(e) => {
                tracing::debug!(error = %e, "no console input");
                self.source = Source::Ended;
            }
        }
    }

    fn unlisten(&mut self, ops: &mut EventOps<'_>, next: Source) {
        if self.source == Source::Polled {
            let stdin = Events::new_raw(rustix::stdio::stdin().as_raw_fd(), EventSet::IN);
            if let Err(e) = ops.remove(stdin) {
                tracing::warn!(error = %e, "cannot stop reading standard input");
            }
        }
        self.source = next;
    }

    /// What the guest would take now, bytes.
    fn room(&self) -> usize {
        let uart = self.console.uart();
        if !self.polled && !receives(&uart) {
            self.console.held_back.store(true, Ordering::Relaxed);
            return 0;
        }
        uart.fifo_capacity()
    }

    /// Gives pending input to the guest, as far as it takes it.
    fn deliver(&mut self) {
        let room = self.room().min(self.pending.len());
        if room == 0 {
            return;
        }
        let bytes: Vec<u8> = self.pending.drain(..room).collect();
        if let Err(e) = self.console.uart().enqueue_raw_bytes(&bytes) {
            tracing::debug!(error = ?e, "console input lost");
        }
    }

    /// Reads input: from a terminal what there is, else what the guest has room for.
    fn pump(&mut self, ops: &mut EventOps<'_>) {
        self.deliver();
        let mut buffer = [0u8; 64];
        let room = match self.escape {
            Some(_) => buffer.len(),
            None if self.pending.is_empty() => self.room().min(buffer.len()),
            None => 0,
        };
        if room == 0 {
            if self.source == Source::Polled {
                self.unlisten(ops, Source::Waiting);
            }
            return;
        }
        let count = match rustix::io::read(rustix::stdio::stdin(), &mut buffer[..room]) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return,
            // A terminal that hung up, or a closed descriptor.
            Err(_) => 0,
        };
        if count == 0 {
            self.unlisten(ops, Source::Ended);
            return;
        }
        for &key in &buffer[..count] {
            match self.escape.as_mut().map_or(Ok(Some(key)), |e| e.take(key)) {
                Ok(Some(key)) if self.pending.len() < MAX_PENDING_BYTES => self.pending.push_back(key),
                Ok(_) => {}
                Err(()) => {
                    self.exit.give(ExitReason::User);
                    return;
                }
            }
        }
        self.deliver();
    }
}

impl MutEventSubscriber for ConsoleInput {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(e) = ops.add(Events::new(&self.taken, EventSet::IN)) {
            tracing::error!(error = %e, "console input cannot be watched");
            return;
        }
        self.listen(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == self.taken.as_raw_fd() {
            let _ = self.taken.read();
            self.deliver();
            match self.source {
                Source::Waiting => self.listen(ops),
                Source::AlwaysReady => self.pump(ops),
                Source::Polled | Source::Ended => {}
            }
        } else {
            self.pump(ops);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn escape_leaves_or_passes() {
        let mut escape = Escape::default();
        assert_eq!(escape.take(b'a'), Ok(Some(b'a')));
        assert_eq!(escape.take(1), Ok(None));
        assert_eq!(escape.take(1), Ok(Some(1)));
        assert_eq!(escape.take(1), Ok(None));
        assert_eq!(escape.take(b'c'), Ok(Some(b'c')));
        assert_eq!(escape.take(1), Ok(None));
        assert_eq!(escape.take(b'x'), Err(()));
    }

    #[test]
    fn input_waits_for_a_driver() {
        let (console, _irq, mut input) =
            Console::new(Box::new(Vec::new()), ExitSignal::new().unwrap(), true, false).unwrap();
        input.pending.extend(*b"abc");
        console.write(IER, &[0x0f]);
        input.deliver();
        assert_eq!(input.pending.len(), 3);
        // The guest's driver is ready: the event loop is told, and input flows.
        console.write(MCR, &[0x0b]);
        assert_eq!(input.taken.read().unwrap(), 1);
        input.deliver();
        let mut byte = [0];
        console.read(0, &mut byte);
        assert_eq!((input.pending.len(), byte[0]), (0, b'a'));
    }

    proptest! {
        #[test]
        fn no_access_panics(accesses in proptest::collection::vec((any::<bool>(), 0u64..16, any::<[u8; 8]>(), 0usize..=8), 0..200)) {
            let (console, _irq, _input) = Console::new(Box::new(Vec::new()), ExitSignal::new().unwrap(), false, false).unwrap();
            for (write, offset, mut data, len) in accesses {
                if write { console.write(offset, &data[..len]) } else { console.read(offset, &mut data[..len]) }
            }
        }
    }
}
