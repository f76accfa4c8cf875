//! A crash before every single store of the log and the rings, and then another one in the recovery: from the driver's
//! point of view nothing is lost and nothing is answered twice.

use std::sync::Arc;

use super::{Driver, SIZE, area, memory, mix};
use crate::queue::log::LogArea;
use crate::queue::{Chain, Ring, VirtQueue, crash};

/// One life of the device.
struct Process {
    ring: Ring,
    /// Taken and not completed: head and number.
    open: Vec<(u16, u64)>,
    again: Vec<u16>,
}

/// What outlives it, and what the test knows.
struct World {
    driver: Driver,
    log: Arc<LogArea>,
    /// Numbers that were handed to the engine and that the driver has not seen answered, in the order in which they were
    /// taken first.
    submitted: Vec<u64>,
    /// In the middle of being taken.
    taking: bool,
    answered: Vec<u64>,
    seed: u64,
}

fn number(chain: &Chain) -> u64 {
    let mut bytes = [0; 8];
    chain.readable.copy_to(0, &mut bytes);
    u64::from_le_bytes(bytes)
}

impl World {
    fn new(is_packed: bool, seed: u64) -> Self {
        let driver = Driver::new(&memory(), is_packed);
        Self { driver, log: area(is_packed), submitted: vec![], taking: false, answered: vec![], seed }
    }

    fn random(&mut self, below: u64) -> usize {
        self.seed = mix(self.seed);
        (self.seed % below) as usize
    }

    fn start(&self, base: u32) -> Process {
        let (ring, again) = self.driver.start(base, Some(&self.log)).unwrap();
        Process { ring, open: Vec::new(), again: again.unwrap_or_default() }
    }

    fn collect(&mut self) {
        for number in self.driver.collect() {
            self.submitted.retain(|other| *other != number);
            self.answered.push(number);
        }
    }

    /// Takes up to `most` chains, those of the last life first.
    fn take(&mut self, process: &mut Process, most: usize) {
        let map = Arc::clone(self.driver.map());
        let mut chain = Chain::default();
        for _ in 0..most {
            self.taking = true;
            if let Some(head) = process.again.pop() {
                process.ring.take_again(&map, head, &mut chain).unwrap();
            } else if !process.ring.take(&map, &mut chain).unwrap() {
                self.taking = false;
                return;
            }
            self.taking = false;
            let number = number(&chain);
            process.open.push((chain.id.head, number));
            if !self.submitted.contains(&number) {
                self.submitted.push(number);
            }
        }
    }

    /// Adds, takes, completes and publishes `rounds` times.
    fn run(&mut self, process: &mut Process, rounds: u32) {
        let map = Arc::clone(self.driver.map());
        for _ in 0..rounds {
            for _ in 0..self.random(4) {
                let descs = [0, 2, 3][self.random(3)];
                self.driver.add(descs);
            }
            let most = self.random(5);
            self.take(process, most);
            for _ in 0..self.random(5) {
                if !process.open.is_empty() {
                    let at = self.random(process.open.len() as u64);
                    let (head, _) = process.open.remove(at);
                    process.ring.put_used(&map, head, 16).unwrap();
                }
            }
            // Sometimes more is taken before what was completed is published.
            if self.random(3) != 0 {
                process.ring.publish(&map).unwrap();
            }
            if self.random(2) == 0 {
                self.collect();
            }
        }
    }

    /// After a crash: what `process` found in flight is what the driver waits for and the engine was given, in order.
    fn check_recovery(&mut self, process: &Process) {
        let map = Arc::clone(self.driver.map());
        let mut ring_again = process.again.clone();
        let mut found = Vec::new();
        let mut chain = Chain::default();
        // Looks only; the ring itself is used by the caller.
        let mut probe = self.start(self.driver.base());
        while let Some(head) = ring_again.pop() {
            probe.ring.take_again(&map, head, &mut chain).unwrap();
            found.push(number(&chain));
        }
        let mut expected = self.submitted.clone();
        if self.taking && found.len() == expected.len() + 1 {
            // The crash came between the log and the engine.
            expected.push(*found.last().unwrap());
            self.submitted = expected.clone();
        }
        self.taking = false;
        assert_eq!(found, expected, "taken again after a crash");
    }

    /// Until all is answered.
    fn finish(&mut self, process: &mut Process) {
        let map = Arc::clone(self.driver.map());
        for _ in 0..4 * u32::from(SIZE) {
            self.take(process, usize::from(SIZE));
            while let Some((head, _)) = process.open.pop() {
                process.ring.put_used(&map, head, 16).unwrap();
            }
            process.ring.publish(&map).unwrap();
            self.collect();
        }
        assert!(self.driver.outstanding.is_empty(), "never answered: {:?}", self.driver.outstanding);
        let mut all = self.answered.clone();
        all.sort_unstable();
        assert_eq!(all, (1..self.driver.next).collect::<Vec<_>>(), "each answered once");
    }
}

/// Runs with a crash before store `first`, and one before store `second` of the recovery (if that has so many); false if
/// the run has fewer stores than `first`.
fn crash_twice(is_packed: bool, seed: u64, first: u32, second: Option<u32>) -> bool {
    let mut world = World::new(is_packed, seed);
    let base = world.driver.base();
    let crashed = crash::at(first, || {
        let mut process = world.start(base);
        world.run(&mut process, 20);
    });
    if crashed.is_ok() {
        return false;
    }
    world.collect();
    if let Some(second) = second {
        let base = world.driver.base();
        let _ = crash::at(second, || drop(world.start(base)));
        let before = world.answered.len();
        world.collect();
        assert_eq!(world.answered.len(), before, "the recovery answered something");
    }
    let mut process = world.start(world.driver.base());
    world.collect();
    world.check_recovery(&process);
    world.run(&mut process, 6);
    world.finish(&mut process);
    true
}

fn every_store(is_packed: bool) {
    for seed in 0..6 {
        let mut stores = 0;
        while crash_twice(is_packed, seed, stores, None) {
            stores += 1;
        }
        assert!(stores > 90, "only {stores} stores");
    }
}

#[test]
fn a_crash_at_any_store_of_a_split_ring_loses_nothing() {
    every_store(false);
}

#[test]
fn a_crash_at_any_store_of_a_packed_ring_loses_nothing() {
    every_store(true);
}

/// A crash at every store of the recovery from a crash at every (third) store.
fn recoveries_crash(is_packed: bool) {
    for seed in [1, 7] {
        for second in 0..30 {
            let mut stores = second % 3;
            while crash_twice(is_packed, seed, stores, Some(second)) {
                stores += 3;
            }
        }
    }
}

#[test]
fn a_crash_in_the_recovery_of_a_split_ring_loses_nothing() {
    recoveries_crash(false);
}

#[test]
fn a_crash_in_the_recovery_of_a_packed_ring_loses_nothing() {
    recoveries_crash(true);
}

/// One life after another, each ends at a random store.
#[test]
fn many_lives_lose_nothing() {
    for is_packed in [false, true] {
        for seed in 100..110 {
            let mut world = World::new(is_packed, seed);
            for _ in 0..60 {
                let stores = world.random(90) as u32;
                let base = world.driver.base();
                let _ = crash::at(stores, || {
                    let mut process = world.start(base);
                    world.run(&mut process, 8);
                });
                world.collect();
            }
            let mut process = world.start(world.driver.base());
            world.check_recovery(&process);
            world.finish(&mut process);
        }
    }
}
