//! Front ends against backends that misbehave: each is a thread on a socket pair that answers as a test tells it to.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::virtio::F_VERSION_1;

const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_CONFIG: u32 = 25;
const GET_CONFIG: u32 = 24;
/// `VHOST_USER_F_PROTOCOL_FEATURES`; `REPLY_ACK` and `CONFIG` among the protocol features.
const F_PROTOCOL: u64 = 1 << 30;
const ACK_AND_CONFIG: u64 = 1 << 3 | 1 << 9;
const NEED_REPLY: u32 = 1 << 3;
/// Version 1, reply.
const REPLY: u32 = 1 | 1 << 2;

type Log = Arc<Mutex<Vec<u32>>>;

/// A whole message.
fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
    let header = [request, REPLY, payload.len() as u32];
    header.iter().flat_map(|word| word.to_le_bytes()).chain(payload.iter().copied()).collect()
}

/// Starts a backend. `answer` says what goes back for a request and its payload; where it says `None`, what a good
/// backend would say.
fn backend(answer: impl Fn(u32, &[u8], &[u32]) -> Option<Vec<u8>> + Send + 'static) -> (Link, Log) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let log = Log::default();
    std::thread::spawn({
        let log = log.clone();
        move || {
            let mut header = [0u8; 12];
            while theirs.read_exact(&mut header).is_ok() {
                let word = |i: usize| u32::from_le_bytes(header[i..i + 4].try_into().unwrap());
                let (request, flags) = (word(0), word(4));
                let mut payload = vec![0; word(8) as usize];
                theirs.read_exact(&mut payload).unwrap();
                let before = log.lock().unwrap().clone();
                log.lock().unwrap().push(request);
                let good = match request {
                    GET_FEATURES => Some(reply(request, &(F_VERSION_1 | F_PROTOCOL).to_le_bytes())),
                    GET_PROTOCOL_FEATURES => Some(reply(request, &ACK_AND_CONFIG.to_le_bytes())),
                    GET_VRING_BASE | GET_CONFIG => Some(reply(request, &payload)),
                    _ if flags & NEED_REPLY != 0 => Some(reply(request, &[0; 8])),
                    _ => None,
                };
                if let Some(bytes) = answer(request, &payload, &before).or(good)
                    && theirs.write_all(&bytes).is_err()
                {
                    return;
                }
            }
        }
    });
    (Link::from_stream("disk0", ours, 2).unwrap(), log)
}

fn times(log: &Log, request: u32) -> usize {
    log.lock().unwrap().iter().filter(|r| **r == request).count()
}

struct Line(EventFd);

impl Interrupt for Line {
    fn queue(&self, _index: u16) {}
    fn config(&self) {}
    fn call_fd(&self, _index: u16) -> Option<&EventFd> {
        Some(&self.0)
    }
}

fn activation(memory: &Arc<GuestMemory>) -> Activation {
    let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let queue = |index: u16| ActiveQueue {
        index,
        size: 16,
        desc_table: 0x1000,
        avail_ring: 0x2000,
        used_ring: 0x3000,
        kick: Arc::new(event()),
    };
    Activation {
        features: F_VERSION_1,
        memory: memory.clone(),
        queues: vec![queue(0), queue(1)],
        interrupt: Arc::new(Line(event())),
    }
}

#[test]
fn memory_that_was_refused_is_sent_again() {
    let memory = crate::kvm::memory::create(4 << 20, false).unwrap();
    let refuse_first = |request: u32, _: &[u8], before: &[u32]| {
        (request == SET_MEM_TABLE && !before.contains(&SET_MEM_TABLE))
            .then(|| reply(request, &1u64.to_le_bytes()))
    };
    let (link, log) = backend(refuse_first);
    let mut device = net::new("net0", link, [2, 0, 0, 0, 0, 1]).unwrap();
    assert!(device.activate(activation(&memory)).is_err());
    device.activate(activation(&memory)).unwrap();
    device.reset().unwrap();
    device.activate(activation(&memory)).unwrap();
    assert_eq!(times(&log, SET_MEM_TABLE), 2, "refused once, taken once");
}

#[test]
fn each_queue_is_stopped_once() {
    let memory = crate::kvm::memory::create(4 << 20, false).unwrap();
    let (link, log) = backend(|_, _, _| None);
    let mut device = net::new("net0", link, [2, 0, 0, 0, 0, 1]).unwrap();
    device.activate(activation(&memory)).unwrap();
    device.stop_queue(1).unwrap();
    device.stop_queue(1).unwrap();
    device.stop_queue(9).unwrap();
    assert_eq!(times(&log, GET_VRING_BASE), 1);
    device.reset().unwrap();
    assert_eq!(times(&log, GET_VRING_BASE), 2);
}

#[test]
fn refused_configuration_changes_nothing_and_the_device_goes_on() {
    let (link, log) =
        backend(|request, _, _| (request == SET_CONFIG).then(|| reply(request, &1u64.to_le_bytes())));
    let mut device = blk::new("disk0", link, 1).unwrap();
    let byte = |device: &VhostUserDevice| {
        let mut byte = [0xff];
        device.read_config(32, &mut byte);
        byte[0]
    };
    let before = byte(&device);
    device.write_config(32, &[!before]);
    assert_eq!((byte(&device), times(&log, SET_CONFIG)), (before, 1));
    // Beyond the end, nobody is asked.
    for (offset, len) in [(60, 1), (59, 2), (u64::MAX, 1), (1 << 32, 4)] {
        device.write_config(offset, &[0; 8][..len]);
    }
    assert_eq!(times(&log, SET_CONFIG), 1);
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
        let _ = blk::new("disk0", link, 1);
    }
}
