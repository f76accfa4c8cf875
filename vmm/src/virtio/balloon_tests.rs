//! The balloon's queues, driven by hand.

use proptest::prelude::*;

use super::*;
use crate::virtio::ActiveQueue;

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const NUMBERS: u64 = 0x4000;
const WRITABLE: u16 = 2;

struct Silent;

impl Interrupt for Silent {
    fn queue(&self, _index: u16) {}
    fn config(&self) {}
    fn call_fd(&self, _index: u16) -> Option<&EventFd> {
        None
    }
}

fn started(queue: usize) -> (Balloon, Handle, Arc<GuestMemory>) {
    let memory = crate::kvm::memory::create(4 << 20, false).unwrap();
    let (mut balloon, handle) = Balloon::new();
    let setup = ActiveQueue {
        index: queue as u16,
        size: 16,
        desc_table: DESC,
        avail_ring: AVAIL,
        used_ring: USED,
        kick: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
    };
    let activation = Activation {
        features: F_VERSION_1 | F_REPORTING,
        memory: memory.clone(),
        queues: vec![setup],
        interrupt: Arc::new(Silent),
    };
    balloon.activate(activation).unwrap();
    (balloon, handle, memory)
}

fn put<T: vm_memory::ByteValued>(memory: &GuestMemory, addr: u64, value: T) {
    memory.write_obj(value, GuestAddress(addr)).unwrap();
}

/// Makes one descriptor available and has the queue served.
fn give(memory: &GuestMemory, handle: &Handle, queue: usize, buffer: (u64, u32), flags: u16) -> u64 {
    put(memory, DESC, buffer.0);
    put(memory, DESC + 8, buffer.1);
    put(memory, DESC + 12, flags);
    put(memory, AVAIL + 2, 1u16);
    let reported = handle.lock().active.as_mut().unwrap().serve(queue).unwrap();
    assert_eq!(memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 1);
    reported
}

fn byte(memory: &GuestMemory, addr: u64) -> u8 {
    memory.read_obj(GuestAddress(addr)).unwrap()
}

#[test]
fn pages_in_the_balloon_are_the_hosts() {
    let (_balloon, handle, memory) = started(INFLATE);
    let touched = [0x10_0000, 0x10_1000, 0x10_2000, 0x20_0000];
    touched.iter().for_each(|at| put(&memory, *at, 7u8));
    // Counting down, one alone, one outside of memory.
    for (i, page) in [0x101u32, 0x100, 0x200, 0xffff_ffff].iter().enumerate() {
        put(&memory, NUMBERS + 4 * i as u64, *page);
    }
    give(&memory, &handle, INFLATE, (NUMBERS, 16), 0);
    assert_eq!(touched.map(|at| byte(&memory, at)), [0, 0, 7, 0]);
}

#[test]
fn free_pages_that_are_reported_are_the_hosts() {
    let (_balloon, handle, memory) = started(REPORTING);
    put(&memory, 0x20_0000, 7u8);
    put(&memory, 0x21_0000, 7u8);
    let reported = give(&memory, &handle, REPORTING, (0x20_0000, 0x1_0000), WRITABLE);
    assert_eq!((reported, byte(&memory, 0x20_0000), byte(&memory, 0x21_0000)), (0x1_0000, 0, 7));
}

#[test]
fn a_wish_is_told_and_what_is_held_is_heard() {
    let (mut balloon, handle, _memory) = started(INFLATE);
    assert!(handle.ask_for(3 << 20));
    let mut config = [0xff; 12];
    balloon.read_config(0, &mut config);
    assert_eq!(config, [0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    balloon.write_config(0, &[9; 4]);
    balloon.write_config(4, &256u32.to_le_bytes());
    assert_eq!(handle.held_bytes(), 1 << 20);
    balloon.reset().unwrap();
    assert!(!handle.ask_for(0), "there is no driver");
}

#[test]
fn a_balloon_is_saved_and_goes_on() {
    let (mut old, handle, memory) = started(INFLATE);
    handle.ask_for(1 << 20);
    give(&memory, &handle, INFLATE, (NUMBERS, 4), 0);
    old.quiesce().unwrap();
    let saved = old.save();
    let (mut new, new_handle, _memory) = started(INFLATE);
    let setup = ActiveQueue {
        index: 0,
        size: 16,
        desc_table: DESC,
        avail_ring: AVAIL,
        used_ring: USED,
        kick: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
    };
    let interrupt = Arc::new(Silent);
    let activation = Activation { features: F_VERSION_1, memory, queues: vec![setup], interrupt };
    new.restore(&saved, activation).unwrap();
    let next = new_handle.lock().active.as_ref().unwrap().queues[0].1.next_avail();
    assert_eq!((next, new_handle.lock().target_pages), (1, 256));
}

proptest! {
    /// Whatever lies in rings and buffers: no panic, and memory that was not named stays.
    #[test]
    fn hostile_rings(which in 0usize..3, desc in proptest::collection::vec(any::<u8>(), 256), avail in proptest::collection::vec(any::<u8>(), 38)) {
        let (_balloon, handle, memory) = started(which);
        memory.write_slice(&desc, GuestAddress(DESC)).unwrap();
        memory.write_slice(&avail, GuestAddress(AVAIL)).unwrap();
        let _ = handle.lock().active.as_mut().unwrap().serve(which);
    }
}
