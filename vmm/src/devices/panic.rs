//! The panic notifier (QEMU's pvpanic): a byte register by which the guest's kernel says that it has panicked. What is said
//! is remembered and logged; the guest then does what its command line says.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::bus::BusDevice;

/// The kernel has panicked.
const PANICKED: u8 = 1;
/// It has panicked and a crash kernel takes over.
const CRASH_LOADED: u8 = 2;

/// The register.
#[derive(Clone, Debug, Default)]
pub struct PanicNotifier(Arc<AtomicBool>);

impl PanicNotifier {
    /// Whether the guest's kernel has panicked.
    pub fn has_panicked(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl PanicNotifier {
    /// A panic before a snapshot counts after it.
    pub fn restore(&self, panicked: bool) {
        self.0.store(panicked, Ordering::Release);
    }
}

impl BusDevice for PanicNotifier {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // The events that are understood.
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let events = data.first().copied().unwrap_or(0);
        if events & (PANICKED | CRASH_LOADED) != 0 && !self.0.swap(true, Ordering::AcqRel) {
            tracing::error!("the guest's kernel has panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_remembered() {
        let notifier = PanicNotifier::default();
        notifier.write(0, &[]);
        notifier.write(0, &[4]);
        assert!(!notifier.has_panicked());
        notifier.write(0, &[1]);
        assert!(notifier.has_panicked());
        let mut events = [0];
        notifier.read(0, &mut events);
        assert_eq!(events, [3]);
    }
}
