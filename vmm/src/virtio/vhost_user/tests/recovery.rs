//! What a device does when its backend is lost and another one comes.

use std::process::Command;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::error::Error;
use crate::virtio::F_RING_PACKED;

struct Bed {
    memory: Arc<GuestMemory>,
    line: Arc<Line>,
    device: VhostUserDevice,
    log: Log,
}

/// A block device of two queues whose first backend is of this kind; not started yet.
fn bed(script: &Script) -> Bed {
    bed_of(blk::kind(2, false), script)
}

fn bed_of(kind: Kind, script: &Script) -> Bed {
    let (link, log) = script.link();
    let device = VhostUserDevice::new("disk0", kind, link, true).unwrap();
    Bed { memory: crate::kvm::memory::create(4 << 20, false).unwrap(), line: Line::new(), device, log }
}

impl Bed {
    fn start(&mut self) {
        self.device.activate(activation_on(&self.memory, self.line.clone())).unwrap();
    }

    /// The backend is lost, and one of this kind comes.
    fn next(&self, script: &Script) -> Result<Log> {
        self.device.front.detach();
        self.attach(script)
    }

    fn attach(&self, script: &Script) -> Result<Log> {
        let (link, log) = script.link();
        let (session, _channel) = Session::start("disk0", self.device.front.kind(), link)?;
        self.device.front.attach(session)?;
        Ok(log)
    }

    /// Writes the index of a queue's available (0x2000) or used (0x3000) ring.
    fn set_index(&self, queue: u16, part: u64, index: u16) {
        self.memory.write_obj(index, GuestAddress(ring(queue, part) + 2)).unwrap();
    }
}

fn inode(fd: impl std::os::fd::AsFd) -> u64 {
    rustix::fs::fstat(fd).unwrap().st_ino
}

#[test]
fn the_next_backend_goes_on_where_the_last_one_stopped() {
    let mut bed = bed(&Script::default());
    bed.start();
    assert_eq!(bed.log.pairs(SET_VRING_BASE), [(0, 0), (1, 0)]);
    bed.set_index(0, 0x3000, 7);
    bed.set_index(1, 0x3000, 65535);
    let kicks = bed.log.with(|told| {
        let kicks = told.fds.iter().filter(|fd| fd.0 == SET_VRING_KICK);
        kicks.map(|fd| fd.1.try_clone().unwrap()).collect::<Vec<_>>()
    });
    let read = |fd: &std::os::fd::OwnedFd| rustix::io::read(fd, &mut [0u8; 8]).is_ok();
    assert!(!kicks.iter().any(read) && bed.line.call.read().is_err());

    let next = bed.next(&Script::default()).unwrap();
    assert_eq!(next.pairs(SET_VRING_BASE), [(0, 7), (1, 65535)]);
    // The log of the first backend, and no new one.
    assert_eq!((bed.log.times(GET_INFLIGHT_FD), next.times(GET_INFLIGHT_FD)), (1, 0));
    assert_eq!(inode(bed.log.fd(SET_INFLIGHT_FD)), inode(next.fd(SET_INFLIGHT_FD)));
    assert_eq!(bed.log.payloads(SET_INFLIGHT_FD), next.payloads(SET_INFLIGHT_FD));
    // A kick or a call that got lost with the first one is made up for.
    assert!(kicks.iter().all(read));
    assert_eq!(bed.line.call.read().unwrap(), 2);
    assert_eq!(bed.line.changes.load(Ordering::SeqCst), 0);
    assert_eq!(bed.log.payloads(2), next.payloads(2), "features");

    // What the driver resets begins anew.
    bed.device.reset().unwrap();
    assert_eq!(next.times(GET_VRING_BASE), 2);
    bed.start();
    assert_eq!(next.pairs(SET_VRING_BASE)[2..], [(0, 0), (1, 0)]);
    assert_eq!((next.times(GET_INFLIGHT_FD), next.times(SET_INFLIGHT_FD)), (1, 2));
}

#[test]
fn what_the_driver_does_while_there_is_no_backend_is_made_up_for() {
    let mut bed = bed(&Script::default());
    bed.device.front.detach();
    // Nothing has run: the backend that comes begins at the start, with a log of its own.
    bed.start();
    bed.set_index(0, 0x3000, 7);
    bed.device.write_config(32, &[1]);
    let next = bed.attach(&Script::default()).unwrap();
    assert_eq!(next.pairs(SET_VRING_BASE), [(0, 0), (1, 0)]);
    assert_eq!(next.times(GET_INFLIGHT_FD), 1);
    // The write cache is as the driver wants it before the first request.
    let order = next.with(|told| told.messages.iter().map(|m| m.0).collect::<Vec<_>>());
    let at = |request| order.iter().position(|r| *r == request).unwrap();
    assert!(at(2) < at(SET_CONFIG) && at(SET_CONFIG) < at(SET_VRING_KICK), "{order:?}");
    assert_eq!(next.payloads(SET_CONFIG)[0][12..], [1]);

    // A queue that was stopped while nobody was there stays so, and a reset device is left alone.
    bed.device.front.detach();
    bed.device.stop_queue(0).unwrap();
    let next = bed.attach(&Script::default()).unwrap();
    assert_eq!(next.pairs(SET_VRING_BASE), [(1, 0)]);
    bed.device.front.detach();
    bed.device.reset().unwrap();
    let next = bed.attach(&Script::default()).unwrap();
    assert_eq!((next.times(SET_VRING_KICK), next.times(SET_INFLIGHT_FD)), (0, 0));
}

#[test]
fn configuration_that_changed_is_told_to_the_driver() {
    let mut bed = bed(&Script::default());
    bed.start();
    bed.device.write_config(32, &[1]);
    let mut larger = Script::default();
    larger.config[0] = 9;
    bed.next(&larger).unwrap();
    let read = |offset| {
        let mut byte = [0xff];
        bed.device.read_config(offset, &mut byte);
        byte[0]
    };
    // The size is the backend's, the write cache the driver's, the number of queues ours.
    assert_eq!([read(0), read(32), read(34)], [9, 1, 2]);
    assert_eq!(bed.line.changes.load(Ordering::SeqCst), 1);
    assert_eq!(bed.device.config_generation(), 1);
    bed.next(&larger).unwrap();
    assert_eq!(bed.line.changes.load(Ordering::SeqCst), 1, "nothing new, nothing said");
}

#[test]
fn configuration_that_changes_while_the_backend_lives_is_told_too() {
    let size = Arc::new(AtomicU32::new(1));
    let answer = {
        let size = size.clone();
        move |request: u32, payload: &[u8], _: &[u32]| {
            let config = [&size.load(Ordering::SeqCst).to_le_bytes()[..], &[0; 56]].concat();
            (request == GET_CONFIG).then(|| reply(request, &[&payload[..12], &config].concat()))
        }
    };
    let mut bed = bed(&Script::answering(answer));
    bed.start();
    size.store(5, Ordering::SeqCst);
    bed.device.front.refresh_config().unwrap();
    bed.device.front.refresh_config().unwrap();
    let mut data = [0; 4];
    bed.device.read_config(0, &mut data);
    assert_eq!((u32::from_le_bytes(data), bed.line.changes.load(Ordering::SeqCst)), (5, 1));
}

#[test]
fn a_backend_that_does_not_fit_is_refused_with_its_reason() {
    let mut bed = bed(&Script { features: F_VERSION_1 | F_PROTOCOL | 1 << 9, ..Script::default() });
    let mut activation = activation_on(&bed.memory, bed.line.clone());
    activation.features |= 1 << 9;
    bed.device.activate(activation).unwrap();
    let features = F_VERSION_1 | F_PROTOCOL | 1 << 9;
    let of_size = |bytes: u32| {
        let mut script = Script { features, ..Script::default() };
        script.config[20..24].copy_from_slice(&bytes.to_le_bytes());
        script
    };
    let limited = |limit: u32| {
        let mut script = Script { features, ..Script::default() };
        script.config[36..40].copy_from_slice(&limit.to_le_bytes());
        script
    };
    bed.next(&limited(100)).unwrap();
    for (script, reason) in [
        (Script::default(), "does not offer the features 0x200, which the guest uses"),
        (Script { queues: 1, features, ..Script::default() }, "has 1 queues, fewer than the 2"),
        (Script { protocol: P_ACK, features, ..Script::default() }, "lacks the protocol features"),
        (Script { protocol: P_ACK | P_CONFIG | P_MQ, features, ..limited(100) }, "keeps no in-flight log"),
        (limited(99), "has a discard limit of 99, less than the 100"),
        (of_size(4096), "has a block size of 4096, the guest knows 0"),
        (Script { dies_at: Some(SET_VRING_KICK), ..limited(100) }, "failed at SET_VRING_KICK"),
    ] {
        let error = crate::chain(&bed.next(&script).map(drop).unwrap_err());
        assert!(error.contains(reason), "{error}");
    }
    // None of them has harmed the device.
    bed.set_index(1, 0x3000, 3);
    assert_eq!(bed.next(&limited(100)).unwrap().pairs(SET_VRING_BASE), [(0, 0), (1, 3)]);
}

#[test]
fn without_a_log_only_an_idle_disk_goes_on() {
    let plain = Script { protocol: P_ACK | P_CONFIG | P_MQ, ..Script::default() };
    let mut bed = bed(&plain);
    bed.start();
    for part in [0x2000, 0x3000] {
        bed.set_index(0, part, 12);
    }
    assert_eq!(bed.next(&plain).unwrap().pairs(SET_VRING_BASE), [(0, 12), (1, 0)]);
    bed.set_index(1, 0x2000, 1);
    let error = bed.next(&plain).map(drop).unwrap_err();
    assert!(matches!(error, Error::Unrecoverable { .. }), "{error}");
    assert!(error.to_string().contains("requests in flight"), "{error}");

    // A network may lose packets.
    let script = Script { protocol: P_ACK, ..Script::default() };
    let mut bed = bed_of(net::kind([2, 0, 0, 0, 0, 1], 1, false), &script);
    bed.start();
    bed.set_index(0, 0x2000, 9);
    bed.set_index(0, 0x3000, 5);
    assert_eq!(bed.next(&script).unwrap().pairs(SET_VRING_BASE), [(0, 5), (1, 0)]);
}

#[test]
fn a_log_that_cannot_be_is_refused() {
    const LEN: u64 = 2 * 256 * 16;
    for (inflight, reason) in [
        ((0, 0, None, LEN), "of 0 bytes, which cannot be"),
        ((LEN - 1, 0, None, LEN), "which cannot be"),
        ((u64::MAX, 0, None, LEN), "which cannot be"),
        ((LEN, 1, None, LEN), "at 1 in a file of 8192"),
        ((LEN, u64::MAX, None, LEN), "in a file of 8192"),
        ((LEN, 0, Some((1, 256)), LEN), "for 1 queues of 256 entries, asked for 2 of 256"),
        ((LEN, 0, Some((2, 128)), LEN), "asked for 2 of 256"),
        ((LEN, 0, Some((0, 0)), LEN), "failed at GET_INFLIGHT_FD"),
    ] {
        let mut bed = bed(&Script { inflight, ..Script::default() });
        let activation = activation_on(&bed.memory, bed.line.clone());
        // The connection of the last one is broken, which somebody else makes good.
        let result = bed
            .device
            .activate(activation)
            .and_then(|()| bed.next(&Script { inflight, ..Script::default() }));
        let error = crate::chain(&result.map(drop).unwrap_err());
        assert!(error.contains(reason), "{error}");
    }
    // A pipe is no memory, and no descriptor is no log.
    let pipe = Script { log_is_a_pipe: true, inflight: (LEN, 0, None, LEN), ..Script::default() };
    let payload = [&LEN.to_ne_bytes()[..], &[0; 8], &[2, 0, 0, 1], &[0; 4]].concat();
    let bare = Script::answering(move |request, _, _| {
        (request == GET_INFLIGHT_FD).then(|| reply(request, &payload))
    });
    for (script, reason) in [(pipe, "is no memory"), (bare, "failed at GET_INFLIGHT_FD")] {
        let mut bed = bed(&script);
        let activation = activation_on(&bed.memory, bed.line.clone());
        let result = bed.device.activate(activation).and_then(|()| bed.next(&script));
        let error = crate::chain(&result.map(drop).unwrap_err());
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn packed_rings_begin_with_both_wrap_counters_set() {
    let script = Script { features: F_VERSION_1 | F_PROTOCOL | F_RING_PACKED, ..Script::default() };
    let mut bed = bed_of(blk::kind(2, true), &script);
    assert_eq!(bed.device.features() & F_RING_PACKED, F_RING_PACKED);
    let mut activation = activation_on(&bed.memory, bed.line.clone());
    activation.features |= F_RING_PACKED;
    // Event suppression is four bytes: these are the last ones of memory.
    activation.queues[0].used_ring = (4 << 20) - 4;
    activation.queues[0].avail_ring = (4 << 20) - 8;
    bed.device.activate(activation).unwrap();
    assert_eq!(bed.log.pairs(SET_VRING_BASE), [(0, 0x8000_8000), (1, 0x8000_8000)]);
    // Where it goes on is in the log.
    assert_eq!(bed.next(&script).unwrap().pairs(SET_VRING_BASE), [(0, 0x8000_8000), (1, 0x8000_8000)]);
    let (link, _) = Script::default().link();
    let error = VhostUserDevice::new("disk0", blk::kind(2, true), link, true).unwrap_err();
    assert!(error.to_string().contains("leave out packed=on"), "{error}");
    // Without being asked for they are not offered.
    let (link, _) = script.link();
    let device = VhostUserDevice::new("disk0", blk::kind(2, false), link, true).unwrap();
    assert_eq!(device.features() & F_RING_PACKED, 0);
}

#[test]
fn packed_rings_that_rest_go_on_where_their_backend_stopped_them() {
    const STOPPED: u32 = 0x8003_8003;
    let features = F_VERSION_1 | F_PROTOCOL | F_RING_PACKED;
    let stops_at = |base: u32| {
        let answer = move |request: u32, payload: &[u8], _: &[u32]| {
            (request == GET_VRING_BASE)
                .then(|| reply(request, &[&payload[..4], &base.to_le_bytes()].concat()))
        };
        Script { features, ..Script::answering(answer) }
    };
    let start = |bed: &mut Bed| {
        let mut activation = activation_on(&bed.memory, bed.line.clone());
        activation.features |= F_RING_PACKED;
        bed.device.activate(activation).unwrap();
    };
    let mut bed = bed_of(blk::kind(2, true), &stops_at(STOPPED));
    start(&mut bed);
    bed.device.quiesce().unwrap();
    let saved = bed.device.save();
    bed.device.go_on().unwrap();
    assert_eq!(bed.log.pairs(SET_VRING_BASE)[2..], [(0, STOPPED), (1, STOPPED)]);
    // A process that comes after one that died goes by the log again.
    let next = bed.next(&stops_at(STOPPED)).unwrap();
    assert_eq!(next.pairs(SET_VRING_BASE), [(0, 0x8000_8000), (1, 0x8000_8000)]);

    // Under another monitor, with a backend that has never seen them.
    let mut other = bed_of(blk::kind(2, true), &stops_at(0));
    let mut activation = activation_on(&other.memory, other.line.clone());
    activation.features |= F_RING_PACKED;
    other.device.restore(&saved, activation).unwrap();
    assert_eq!(other.log.pairs(SET_VRING_BASE), [(0, STOPPED), (1, STOPPED)]);

    // One that does not wait for what is in flight.
    let mut hasty = bed_of(blk::kind(2, true), &stops_at(0x8003_8005));
    start(&mut hasty);
    let error = hasty.device.quiesce().unwrap_err().to_string();
    assert!(error.contains("stopped a ring with requests in flight"), "{error}");

    // What is beyond the ring is no position.
    for lie in [0x8010_8010, 0x8010] {
        let mut bed = bed_of(blk::kind(2, true), &stops_at(lie));
        start(&mut bed);
        bed.device.quiesce().unwrap();
        let error = bed.device.go_on().unwrap_err().to_string();
        assert!(error.contains(&format!("packed ring 0 cannot go on at {lie:#x}")), "{error}");
    }
}

#[test]
fn a_start_that_the_backend_does_not_live_through_is_made_good_by_the_next() {
    for dies_at in [2, GET_INFLIGHT_FD, SET_INFLIGHT_FD, SET_MEM_TABLE, SET_VRING_BASE, SET_VRING_KICK] {
        let mut bed = bed(&Script { dies_at: Some(dies_at), ..Script::default() });
        bed.start();
        let next = bed.next(&Script::default()).unwrap();
        assert_eq!((next.times(SET_VRING_KICK), next.times(SET_INFLIGHT_FD)), (2, 1), "{dies_at}");
    }
    // One queue has run already: what is done with it is not done again.
    const SET_VRING_ENABLE: u32 = 18;
    let mut bed = bed(&Script { dies_at: Some(SET_VRING_ENABLE), ..Script::default() });
    bed.start();
    bed.set_index(0, 0x3000, 5);
    let next = bed.next(&Script::default()).unwrap();
    assert_eq!(next.pairs(SET_VRING_BASE), [(0, 5), (1, 0)]);
    assert_eq!((bed.log.times(GET_INFLIGHT_FD), next.times(GET_INFLIGHT_FD)), (1, 0));
    // Where nobody would make it good, the driver is told.
    let (link, _) = Script { dies_at: Some(SET_VRING_KICK), ..Script::default() }.link();
    let mut device = VhostUserDevice::new("disk0", blk::kind(2, false), link, false).unwrap();
    let memory = crate::kvm::memory::create(4 << 20, false).unwrap();
    assert!(device.activate(activation(&memory)).is_err());
}

#[test]
fn after_a_reset_nobody_can_touch_the_queues() {
    // A process that would go on: its connection is lost, and it does not know.
    let mut process = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = Pid::from_raw(i32::try_from(process.id()).unwrap()).unwrap();
    let mut bed = bed(&Script { dies_at: Some(GET_VRING_BASE), ..Script::default() });
    bed.device.front.set_process(Some(pidfd_open(pid, PidfdFlags::empty()).unwrap()));
    bed.start();
    bed.device.reset().unwrap();
    let status = process.try_wait().unwrap();
    assert!(status.is_some(), "it lives on");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever one answer of a backend that comes later is: it is taken or refused, and the device goes on with the
    /// one after it.
    #[test]
    fn one_wild_answer_of_the_next(
        wild in 0usize..24,
        header in (prop_oneof![Just(None), any::<u32>().prop_map(Some)], prop_oneof![Just(REPLY), any::<u32>()]),
        payload in proptest::collection::vec(any::<u8>(), 0..100),
    ) {
        let mut bed = bed(&Script::default());
        bed.start();
        bed.device.front.detach();
        let script = Script::answering(move |request, _, before| (before.len() == wild).then(|| {
            let words = [header.0.unwrap_or(request), header.1, payload.len() as u32];
            let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes.extend(&payload);
            bytes
        }));
        let (link, _) = script.link();
        let link = link.with_message_timeout(Duration::from_millis(200));
        if let Ok((session, _channel)) = Session::start("disk0", bed.device.front.kind(), link) {
            let _ = bed.device.front.attach(session);
        }
        prop_assert!(bed.next(&Script::default()).is_ok());
    }
}
