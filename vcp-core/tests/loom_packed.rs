//! Model check of the sleep protocol on a packed ring (VIRTIO 1.2, 2.8.10): the driver makes descriptors available by
//! their flags and kicks if the device's event suppression structure asks for it; the device writes that structure, looks
//! at the flags again and sleeps. The chains lie across the end of the ring, so that the wrap counters turn.
//!
//! As in `loom_notify.rs` the device runs the very function of the data path, and each fence is shown to be needed.

use std::convert::Infallible;
use std::panic;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering, fence};
use loom::thread;
use vcp_core::queue::notify::{ArmSteps, arm_then_look};

const SIZE: u16 = 2;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const EVENTS_ON: u32 = 0;
const EVENTS_OFF: u32 = 1 << 16;
const EVENTS_DESC: u32 = 2 << 16;

/// Index and wrap counter.
type Place = (u16, bool);

fn after((index, wrap): Place) -> Place {
    if index + 1 == SIZE { (0, !wrap) } else { (index + 1, wrap) }
}

fn available(wrap: bool) -> u16 {
    if wrap { AVAIL } else { USED }
}

fn bits((index, wrap): Place) -> u16 {
    index | u16::from(wrap) << 15
}

/// Where the first chain lies: the second one is in the next lap.
const FIRST: Place = (SIZE - 1, true);

/// What driver and device share.
struct Shared {
    flags: [AtomicU16; SIZE as usize],
    /// The device's event suppression structure, one word.
    event: AtomicU32,
    kicked: AtomicBool,
}

struct Device<'a> {
    shared: &'a Shared,
    next: Place,
    event_idx: bool,
    fenced: bool,
}

impl Device<'_> {
    fn sees_next(&self) -> bool {
        let flags = self.shared.flags[usize::from(self.next.0)].load(Ordering::Acquire);
        flags == available(self.next.1)
    }
}

impl ArmSteps for Device<'_> {
    type Error = Infallible;

    fn announce(&mut self) -> Result<(), Infallible> {
        let word = if self.event_idx { EVENTS_DESC | u32::from(bits(self.next)) } else { EVENTS_ON };
        self.shared.event.store(word, Ordering::Relaxed);
        Ok(())
    }

    fn fence(&mut self) {
        if self.fenced {
            fence(Ordering::SeqCst);
        }
    }

    fn look(&mut self) -> Result<bool, Infallible> {
        Ok(self.sees_next())
    }
}

/// Whether the driver kicks for the one descriptor at `old`, as Linux computes it.
fn wants_kick(event: u32, old: Place) -> bool {
    match event & 0xffff_0000 {
        EVENTS_OFF => false,
        EVENTS_DESC => {
            let (new, place) = (after(old), event as u16);
            let behind = if (place >> 15 != 0) == new.1 { 0 } else { SIZE };
            let event = (place & 0x7fff).wrapping_sub(behind);
            let before = new.0.wrapping_sub(1);
            new.0.wrapping_sub(event).wrapping_sub(1) < new.0.wrapping_sub(before)
        }
        _ => true,
    }
}

/// The driver adds `chains` one by one; the device takes until it sleeps. True if it never sleeps for good on a chain.
fn holds(chains: usize, event_idx: bool, driver_fence: bool, device_fence: bool) -> bool {
    let model = move || {
        loom::model(move || {
            // The slot of the second lap was used in the first one.
            let flags = [AtomicU16::new(AVAIL | USED), AtomicU16::new(0)];
            let event = AtomicU32::new(EVENTS_OFF);
            let shared = Arc::new(Shared { flags, event, kicked: AtomicBool::new(false) });
            let driver = {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    let mut place = FIRST;
                    for _ in 0..chains {
                        shared.flags[usize::from(place.0)].store(available(place.1), Ordering::Release);
                        if driver_fence {
                            fence(Ordering::SeqCst);
                        }
                        if wants_kick(shared.event.load(Ordering::Relaxed), place) {
                            shared.kicked.store(true, Ordering::Release);
                        }
                        place = after(place);
                    }
                })
            };
            let mut device = Device { shared: &shared, next: FIRST, event_idx, fenced: device_fence };
            let (mut taken, mut sleeps) = (0, false);
            while taken < chains && !sleeps {
                if device.sees_next() {
                    device.next = after(device.next);
                    taken += 1;
                } else {
                    let Ok(more) = arm_then_look(&mut device);
                    sleeps = !more;
                }
            }
            driver.join().unwrap();
            if sleeps {
                assert!(shared.kicked.load(Ordering::Acquire), "lost wake-up: asleep after {taken}");
            }
        });
    };
    panic::catch_unwind(model).is_ok()
}

#[test]
fn no_wake_up_is_lost() {
    for event_idx in [true, false] {
        assert!(holds(1, event_idx, true, true));
        assert!(holds(2, event_idx, true, true));
    }
}

#[test]
fn each_fence_is_needed() {
    for event_idx in [true, false] {
        assert!(
            !holds(1, event_idx, true, false),
            "the model must find the lost wake-up without the device's fence"
        );
        assert!(
            !holds(1, event_idx, false, true),
            "the model must find the lost wake-up without the driver's fence"
        );
    }
}
