//! Front ends against backends that misbehave: each is a thread on a socket pair that answers as a test tells it to.

mod recovery;
pub(crate) mod script;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use self::script::*;
use super::session::host_address;
use super::*;
use crate::kvm::GuestMemory;
use crate::virtio::{ActiveQueue, F_VERSION_1, Interrupt};

/// A device whose one backend answers as told.
fn backend(answer: impl Fn(u32, &[u8], &[u32]) -> Option<Vec<u8>> + Send + Sync + 'static) -> (Link, Log) {
    Script { protocol: P_ACK | P_CONFIG, ..Script::answering(answer) }.link()
}

fn net(link: Link) -> VhostUserDevice {
    VhostUserDevice::new("net0", net::kind([2, 0, 0, 0, 0, 1], 1, false), link, false).unwrap()
}

/// The driver's side: one call descriptor for all queues, and how often the configuration was said to have changed.
pub(crate) struct Line {
    pub(crate) call: EventFd,
    pub(crate) changes: AtomicU32,
}

impl Line {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { call: EventFd::new(libc::EFD_NONBLOCK).unwrap(), changes: AtomicU32::new(0) })
    }
}

impl Interrupt for Line {
    fn queue(&self, _index: u16) {}
    fn config(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }
    fn call_fd(&self, _index: u16) -> Option<&EventFd> {
        Some(&self.call)
    }
}

const QUEUE_SIZE: u16 = 16;

/// Guest address of a part of a queue: descriptors 0x1000, driver area 0x2000, device area 0x3000.
fn ring(index: u16, part: u64) -> u64 {
    0x1_0000 * u64::from(index) + part
}

fn activation(memory: &Arc<GuestMemory>) -> Activation {
    activation_on(memory, Line::new())
}

pub(crate) fn activation_on(memory: &Arc<GuestMemory>, interrupt: Arc<dyn Interrupt>) -> Activation {
    let queue = |index: u16| ActiveQueue {
        index,
        size: QUEUE_SIZE,
        desc_table: ring(index, 0x1000),
        avail_ring: ring(index, 0x2000),
        used_ring: ring(index, 0x3000),
        kick: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
    };
    Activation { features: F_VERSION_1, memory: memory.clone(), queues: vec![queue(0), queue(1)], interrupt }
}

#[test]
fn memory_that_was_refused_is_sent_again() {
    let memory = crate::kvm::memory::create(4 << 20, false).unwrap();
    let refuse_first = |request: u32, _: &[u8], before: &[u32]| {
        (request == SET_MEM_TABLE && !before.contains(&SET_MEM_TABLE))
            .then(|| reply(request, &1u64.to_le_bytes()))
    };
    let (link, log) = backend(refuse_first);
    let mut device = net(link);
    assert!(device.activate(activation(&memory)).is_err());
    device.activate(activation(&memory)).unwrap();
    device.reset().unwrap();
    device.activate(activation(&memory)).unwrap();
    assert_eq!(log.times(SET_MEM_TABLE), 2, "refused once, taken once");
}

#[test]
fn each_queue_is_stopped_once() {
    let memory = crate::kvm::memory::create(4 << 20, false).unwrap();
    let (link, log) = backend(|_, _, _| None);
    let mut device = net(link);
    device.activate(activation(&memory)).unwrap();
    device.stop_queue(1).unwrap();
    device.stop_queue(1).unwrap();
    device.stop_queue(9).unwrap();
    assert_eq!(log.times(GET_VRING_BASE), 1);
    device.reset().unwrap();
    assert_eq!(log.times(GET_VRING_BASE), 2);
}

#[test]
fn refused_configuration_changes_nothing_and_the_device_goes_on() {
    let (link, log) =
        backend(|request, _, _| (request == SET_CONFIG).then(|| reply(request, &1u64.to_le_bytes())));
    let mut device = VhostUserDevice::new("disk0", blk::kind(1, false), link, false).unwrap();
    let byte = |device: &VhostUserDevice| {
        let mut byte = [0xff];
        device.read_config(32, &mut byte);
        byte[0]
    };
    let before = byte(&device);
    device.write_config(32, &[!before]);
    assert_eq!((byte(&device), log.times(SET_CONFIG)), (before, 1));
    // Where nothing may be written, nobody is asked.
    for (offset, len) in [(0, 8), (31, 1), (33, 4), (60, 1), (59, 2), (u64::MAX, 1), (1 << 32, 4)] {
        device.write_config(offset, &[0; 8][..len]);
    }
    assert_eq!(log.times(SET_CONFIG), 1);
    let memory = crate::kvm::memory::create(4 << 20, false).unwrap();
    let mut activation = activation(&memory);
    activation.queues.truncate(1);
    device.activate(activation).unwrap();
}

#[test]
fn host_addresses_stay_in_memory() {
    let memory = crate::kvm::memory::create(4 << 20, false).unwrap();
    assert!(host_address(&memory, 0, 4 << 20).is_some());
    for (addr, len) in [(4 << 20, 1), (0, (4 << 20) + 1), (u64::MAX, 16), (1, u64::MAX)] {
        assert_eq!(host_address(&memory, addr, len), None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever one answer is: the device is there or an error, and nothing hangs.
    #[test]
    fn one_wild_answer(
        wild in 0usize..8,
        header in (prop_oneof![Just(None), any::<u32>().prop_map(Some)], prop_oneof![Just(REPLY), any::<u32>()]),
        size in prop_oneof![Just(72u32), 0u32..80, any::<u32>()],
        payload in proptest::collection::vec(any::<u8>(), 0..6000),
        close in any::<bool>(),
    ) {
        let (link, _) = backend(move |request, _, before| (before.len() == wild).then(|| {
            let words = [header.0.unwrap_or(request), header.1, size];
            let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes.extend(&payload);
            if close {
                bytes.clear();
            }
            bytes
        }));
        // A backend that says too little is waited for; that has its own test.
        let link = link.with_message_timeout(Duration::from_millis(200));
        let _ = VhostUserDevice::new("disk0", blk::kind(1, false), link, false);
    }
}
