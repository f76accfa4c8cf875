//! MSI-X against wires that only remember what is connected.

use std::os::fd::AsRawFd;

use proptest::prelude::*;

use super::*;
use crate::kvm::wires::probe::Probe;
use crate::virtio::state_event as event;

const ADDRESS: u32 = 0xfee0_1000;
const ENABLE: u16 = CONTROL_ENABLE;

fn msix(vectors: usize) -> (Msix, Arc<Probe>, Arc<Vec<EventFd>>) {
    let events: Arc<Vec<EventFd>> = Arc::new((0..vectors).map(|_| event().unwrap()).collect());
    let wires = Arc::new(Probe::default());
    (Msix::new("test", events.clone(), wires.clone()), wires, events)
}

fn write32(msix: &mut Msix, offset: u64, value: u32) {
    msix.write_table(offset, &value.to_le_bytes());
}

fn read32(msix: &Msix, offset: u64) -> u32 {
    let mut data = [0xff; 4];
    msix.read_table(offset, &mut data);
    u32::from_le_bytes(data)
}

fn pending(msix: &Msix) -> u64 {
    let mut data = [0; 8];
    msix.read_pending(0, &mut data);
    u64::from_le_bytes(data)
}

/// Programs a vector as Linux does: message first, then the mask goes.
fn program(msix: &mut Msix, vector: u64, data: u32) {
    write32(msix, vector * ENTRY_LEN, ADDRESS);
    write32(msix, vector * ENTRY_LEN + 4, 0);
    write32(msix, vector * ENTRY_LEN + 8, data);
    write32(msix, vector * ENTRY_LEN + 12, 0);
}

#[test]
fn everything_is_masked_at_first() {
    let (msix, wires, _) = msix(3);
    assert_eq!((0..3).map(|v| read32(&msix, v * 16 + 12)).collect::<Vec<_>>(), [1; 3]);
    assert_eq!(msix.vector(0), NO_VECTOR);
    assert!(wires.now().irqs.is_empty());
}

#[test]
fn a_vector_is_connected_when_all_three_agree() {
    let (mut msix, wires, events) = msix(2);
    program(&mut msix, 1, 0x41);
    msix.set_vector(0, 1);
    assert!(wires.now().irqs.is_empty(), "MSI-X is off");
    msix.set_control(ENABLE);
    let gsi = wires.now().irqs[&events[0].as_raw_fd()];
    assert_eq!(wires.now().routes[&gsi], Msi { address: ADDRESS.into(), data: 0x41 });
    msix.set_control(ENABLE | CONTROL_MASK_ALL);
    assert!(wires.now().irqs.is_empty(), "the function is masked");
    msix.set_control(ENABLE);
    assert_eq!(wires.now().irqs.len(), 1);
    msix.set_vector(0, NO_VECTOR);
    assert!(wires.now().irqs.is_empty(), "the source has no vector");
}

#[test]
fn what_comes_while_masked_is_pending_and_stays_in_the_descriptor() {
    let (mut msix, wires, events) = msix(2);
    msix.set_control(ENABLE);
    msix.set_vector(1, 1);
    program(&mut msix, 1, 7);
    write32(&mut msix, 16 + 12, 1);
    assert_eq!(pending(&msix), 0);
    events[1].write(1).unwrap();
    assert_eq!((pending(&msix), pending(&msix)), (2, 2), "looking does not take it");
    // Connected again with the signal still in it: KVM delivers it then.
    write32(&mut msix, 16 + 12, 0);
    assert_eq!(wires.now().irqs.len(), 1);
    assert_eq!(events[1].read().unwrap(), 1);
}

#[test]
fn a_message_that_moves_is_routed_anew() {
    let (mut msix, wires, events) = msix(1);
    msix.set_control(ENABLE);
    msix.set_vector(0, 0);
    program(&mut msix, 0, 1);
    let gsi = wires.now().irqs[&events[0].as_raw_fd()];
    // Another CPU: masked, changed, unmasked, all in words of 8 bytes.
    write32(&mut msix, 12, 1);
    msix.write_table(0, &0xfee0_2000u64.to_le_bytes());
    msix.write_table(8, &2u64.to_le_bytes());
    assert_eq!(wires.now().routes[&gsi], Msi { address: 0xfee0_2000, data: 2 });
    assert_eq!(wires.now().irqs[&events[0].as_raw_fd()], gsi);
}

#[test]
fn two_sources_share_a_vector() {
    let (mut msix, wires, events) = msix(3);
    msix.set_control(ENABLE);
    program(&mut msix, 2, 9);
    msix.set_vector(0, 2);
    msix.set_vector(1, 2);
    let irqs = wires.now().irqs.clone();
    assert_eq!(irqs[&events[0].as_raw_fd()], irqs[&events[1].as_raw_fd()]);
}

#[test]
fn a_reset_takes_vectors_and_what_was_pending() {
    let (mut msix, wires, events) = msix(1);
    msix.set_vector(0, 0);
    events[0].write(1).unwrap();
    assert_eq!(pending(&msix), 1);
    msix.reset();
    msix.set_vector(0, 0);
    assert_eq!(pending(&msix), 0);
    drop(msix);
    assert!(wires.now().gsis.is_empty(), "all interrupts are given back");
}

#[test]
fn wrong_accesses_do_nothing() {
    let (mut msix, _, _) = msix(2);
    for (offset, len) in [(1, 4), (2, 2), (0, 1), (4, 8), (32, 4), (u64::MAX - 7, 8)] {
        msix.write_table(offset, &vec![0x5a; len]);
    }
    assert_eq!((0..8).map(|i| read32(&msix, i * 4)).collect::<Vec<_>>(), [0, 0, 0, 1, 0, 0, 0, 1]);
    msix.set_vector(7, 0);
    msix.set_vector(0, 2);
    assert_eq!(msix.vector(0), NO_VECTOR);
}

#[test]
fn a_saved_state_comes_back() {
    let (mut old, _, events) = msix(2);
    old.set_vector(0, 1);
    program(&mut old, 1, 5);
    events[0].write(1).unwrap();
    old.set_control(ENABLE | CONTROL_MASK_ALL);
    let saved = old.save();
    let (mut new, wires, _events) = msix(2);
    assert!(new.restore(&saved));
    assert_eq!(new.save(), saved);
    assert_eq!(pending(&new), 2);
    new.set_control(ENABLE);
    assert_eq!(wires.now().irqs.len(), 1);
    let (mut other, _, _) = msix(3);
    assert!(!other.restore(&saved));
}

proptest! {
    /// Whatever the driver does, a source is connected if and only if it may be delivered, to the interrupt whose route is
    /// its vector's message; and when the function goes, nothing of it is left.
    #[test]
    fn wires_follow_the_registers(steps in proptest::collection::vec((0u8..5, 0u64..5, any::<u32>()), 1..80)) {
        let (mut msix, wires, events) = msix(4);
        for (what, at, value) in steps {
            match what {
                0 => msix.set_control(value as u16),
                1 => msix.set_vector(at as usize, (value % 6) as u16),
                2 => write32(&mut msix, at * 16 + u64::from(value % 4) * 4, value),
                3 => { let _ = events[at as usize % 4].write(1); }
                _ => write32(&mut msix, at * 16 + 12, value & 1),
            }
            for (source, event) in events.iter().enumerate() {
                let vector = msix.vector(source);
                let expected = msix.delivers(vector);
                let now = wires.now();
                let gsi = now.irqs.get(&event.as_raw_fd());
                prop_assert_eq!(gsi.is_some(), expected);
                if let Some(gsi) = gsi {
                    prop_assert_eq!(now.routes[gsi], msix.entries[usize::from(vector)].msi);
                }
            }
        }
        drop(msix);
        prop_assert_eq!(wires.counts(), (0, 0, 0));
    }
}
