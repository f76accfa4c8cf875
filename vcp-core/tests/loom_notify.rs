//! Model check of the sleep protocol: every interleaving, and every reordering that the memory model allows, of a
//! driver that adds a chain and kicks if asked to, and a device that arms, looks again and sleeps.
//!
//! The device runs the very code of the data path ([`vcp_core::queue::notify::arm_then_look`]); only the memory below
//! it is modelled. Each fence is shown to be needed: without either, the model finds the lost wake-up.

use std::convert::Infallible;
use std::panic;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU16, Ordering, fence};
use loom::thread;
use vcp_core::queue::notify::{ArmSteps, arm_then_look};

/// What driver and device share.
struct Shared {
    avail_idx: AtomicU16,
    avail_event: AtomicU16,
    kicked: AtomicBool,
}

struct Device<'a> {
    shared: &'a Shared,
    taken: u16,
    fenced: bool,
}

impl ArmSteps for Device<'_> {
    type Error = Infallible;

    fn announce(&mut self) -> Result<(), Infallible> {
        self.shared.avail_event.store(self.taken, Ordering::Relaxed);
        Ok(())
    }

    fn fence(&mut self) {
        if self.fenced {
            fence(Ordering::SeqCst);
        }
    }

    fn look(&mut self) -> Result<bool, Infallible> {
        Ok(self.shared.avail_idx.load(Ordering::Acquire) != self.taken)
    }
}

/// The driver adds `chains` one by one; the device takes until it sleeps. True if it never sleeps for good on a chain.
fn holds(chains: u16, driver_fence: bool, device_fence: bool) -> bool {
    let model = move || {
        loom::model(move || {
            // `avail_event` far away: not armed.
            let shared = Arc::new(Shared {
                avail_idx: AtomicU16::new(0),
                avail_event: AtomicU16::new(0x8000),
                kicked: AtomicBool::new(false),
            });
            let driver = {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    for old in 0..chains {
                        shared.avail_idx.store(old + 1, Ordering::Release);
                        if driver_fence {
                            fence(Ordering::SeqCst);
                        }
                        if shared.avail_event.load(Ordering::Relaxed) == old {
                            shared.kicked.store(true, Ordering::Release);
                        }
                    }
                })
            };
            let mut device = Device { shared: &shared, taken: 0, fenced: device_fence };
            let mut sleeps = false;
            while device.taken < chains && !sleeps {
                let avail = shared.avail_idx.load(Ordering::Acquire);
                if avail != device.taken {
                    device.taken = avail;
                } else {
                    let Ok(more) = arm_then_look(&mut device);
                    sleeps = !more;
                }
            }
            driver.join().unwrap();
            if sleeps {
                assert!(shared.kicked.load(Ordering::Acquire), "lost wake-up: asleep at {}", device.taken);
            }
        });
    };
    panic::catch_unwind(model).is_ok()
}

#[test]
fn no_wake_up_is_lost() {
    assert!(holds(1, true, true));
    assert!(holds(2, true, true));
}

#[test]
fn each_fence_is_needed() {
    assert!(!holds(1, true, false), "the model must find the lost wake-up without the device's fence");
    assert!(!holds(1, false, true), "the model must find the lost wake-up without the driver's fence");
}
