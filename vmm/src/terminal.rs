//! Raw mode for the terminal on standard input, undone on every way out: when the guard is dropped, on a panic (by
//! [`install_panic_hook`]) and on SIGTERM, SIGINT and SIGHUP (which end the event loop and so drop the guard).

use std::sync::{Mutex, Once, PoisonError};

use rustix::stdio::stdin;
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, isatty, tcgetattr, tcsetattr,
};

/// The terminal's state before it was changed.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal is in raw mode while this lives.
#[derive(Debug)]
#[must_use]
pub struct RawMode(());

impl RawMode {
    /// Puts the terminal on standard input into raw mode, so that every key goes to the guest. Output processing stays
    /// as it is, so that log lines keep their line ends. `None` if standard input is not a terminal.
    pub fn enter() -> Option<Self> {
        if !isatty(stdin()) {
            return None;
        }
        let saved = tcgetattr(stdin()).ok()?;
        let mut raw = saved.clone();
        raw.local_modes.remove(
            LocalModes::ECHO
                | LocalModes::ECHONL
                | LocalModes::ICANON
                | LocalModes::ISIG
                | LocalModes::IEXTEN,
        );
        raw.input_modes.remove(
            InputModes::BRKINT
                | InputModes::ICRNL
                | InputModes::IGNCR
                | InputModes::INLCR
                | InputModes::ISTRIP
                | InputModes::IXON
                | InputModes::PARMRK,
        );
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        if tcsetattr(stdin(), OptionalActions::Now, &raw).is_err() {
            restore();
            return None;
        }
        Some(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was, if it was changed.
pub fn restore() {
    if let Some(saved) = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // Nothing can be done about a terminal that is gone.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &saved);
    }
}

/// Makes a panic in any thread restore the terminal and remove the runtime directory before it is reported. Needed
/// because a release build aborts on panic, without running destructors.
pub fn install_panic_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            crate::vcp::runtime_dir::remove_all();
            report(info);
        }));
    });
}
