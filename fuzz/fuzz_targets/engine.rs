//! The whole engine under the block device model, against the model target of the simulation: every choice that a seed
//! makes there - unit, load, timing, faults, lies - is made by the input here, so coverage leads the search.
//!
//! Holds: what the simulation's oracle checks (the disk as the guest knows it is the disk; every request is answered once,
//! in bounded time; no lie passes for success; nothing is written to guest memory after the answer).
#![no_main]
#![allow(dead_code, unreachable_pub)] // The simulation's modules, as they are.

use std::collections::BTreeSet;

use libfuzzer_sys::fuzz_target;

#[path = "../../vcp-iscsi/tests/sim/content.rs"]
mod content;
#[path = "../../vcp-iscsi/tests/sim/draw.rs"]
mod draw;
#[path = "../../vcp-iscsi/tests/sim/faults.rs"]
mod faults;
#[path = "../../vcp-iscsi/tests/sim/guest.rs"]
mod guest;
#[path = "../../vcp-iscsi/tests/sim/net.rs"]
mod net;
#[path = "../../vcp-iscsi/tests/sim/oracle.rs"]
mod oracle;
#[path = "../../vcp-iscsi/tests/sim/peer/mod.rs"]
mod peer;
#[path = "../../vcp-iscsi/tests/sim/scenario.rs"]
mod scenario;
#[path = "../../vcp-iscsi/tests/sim/trace.rs"]
mod trace;
#[path = "../../vcp-iscsi/tests/sim/world/mod.rs"]
mod world;

/// In place of the simulation's generator: numbers from the input.
mod rng {
    use std::cell::RefCell;

    pub use crate::draw::mix;

    thread_local! {
        /// The input, and how much of it was used.
        static INPUT: RefCell<(Vec<u8>, usize)> = const { RefCell::new((Vec::new(), 0)) };
    }

    pub fn input(bytes: &[u8]) {
        INPUT.set((bytes.to_vec(), 0));
    }

    /// Takes from the input while there is some, then goes on by itself.
    #[derive(Clone, Debug)]
    pub struct Rng(u64);

    impl Rng {
        pub fn new(seed: u64, stream: u64) -> Self {
            Self(mix(seed ^ mix(stream + 1)))
        }

        pub fn next(&mut self) -> u64 {
            let given = INPUT.with_borrow_mut(|(bytes, at)| {
                let pair = bytes.get(*at..*at + 2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
                *at += 2;
                pair
            });
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            // The upper bits decide ranges and chances.
            given.map_or_else(|| mix(self.0), |pair| u64::from(pair) << 48 | mix(self.0) >> 16)
        }
    }
}

fuzz_target!(|data: &[u8]| {
    rng::input(data);
    // Some with a ring (io_uring), which takes longer to make than a run takes without.
    let ring = data.len() % 4 == 3;
    let scenario = scenario::Scenario { ring, ..scenario::Scenario::of(0) };
    if let Err(failure) = world::run(&scenario, &BTreeSet::new(), false) {
        panic!("at {:.6} ms: {}", failure.at_ns as f64 / 1e6, failure.what);
    }
});
