//! The vhost-user servers with the virtio-blk device model, driven by the `vhost` crate's front end and a driver of
//! our own over real sockets and shared memory. Only the disk is in memory.
#![allow(unreachable_pub, dead_code)] // The support modules are shared.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vcp_core::poll::PollMode;
use vcp_iscsi::engine;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vm_memory::{Bytes, GuestAddress};

#[path = "../../vcp-core/tests/support/mod.rs"]
mod driver;
#[path = "support/front.rs"]
mod front;
#[path = "support/mem_engine.rs"]
mod mem_engine;

use driver::DriverRing;
use front::{DEADLINE, Done, Front, Guest, Io, Kind, Server, wait_readable};
use mem_engine::lun;

const ADAPTIVE: Kind = Kind::Poll(PollMode::Adaptive);
const KINDS: [Kind; 6] = [
    ADAPTIVE,
    Kind::Poll(PollMode::Fixed(Duration::ZERO)),
    Kind::Poll(PollMode::Always),
    Kind::Ring(PollMode::Fixed(Duration::ZERO)),
    Kind::Ring(PollMode::Adaptive),
    Kind::Epoll,
];

/// Waits until `check` holds.
fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !check() {
        assert!(Instant::now() < deadline, "{what} did not happen in time");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A small generator, so that both servers get the same requests.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn random_io(random: &mut Random) -> Io {
    // Places beyond the end and odd sizes belong to the trace: their statuses must agree as well.
    let sector = random.below(420);
    let len = random.below(20) * 512 + if random.below(20) == 0 { 100 } else { 0 };
    let data = |random: &mut Random| (0..len).map(|_| random.below(256) as u8).collect();
    let range = |random: &mut Random| {
        [&sector.to_le_bytes()[..], &(random.below(12) as u32).to_le_bytes(), &[0; 4]].concat()
    };
    let (kind, out, in_bytes) = match random.below(10) {
        0..=3 => (0, Vec::new(), len as u32),
        4..=6 => (1, data(random), 0),
        7 => (4, Vec::new(), 0),
        8 => (if random.below(2) == 0 { 11 } else { 13 }, range(random), 0),
        _ => (8, Vec::new(), 20),
    };
    Io { kind, sector, out, in_bytes }
}

/// Runs the same 600 requests, 1 to 6 at a time, on disjoint parts of the disk where they are concurrent.
fn trace(kind: Kind) -> (Vec<Done>, Vec<u8>) {
    let server = Server::start(kind, lun(512, 400), 5, 2);
    let guest = Guest::new();
    let mut front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 64), guest.ring(1, 64)]);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut results = Vec::new();
    for batch in 0..200 {
        let queue = &mut front.queues[batch % 2];
        let mut ios: Vec<Io> = (0..3).map(|_| random_io(&mut random)).collect();
        for (part, io) in
            ios.iter_mut().enumerate().filter(|(_, io)| io.sector < 400 && matches!(io.kind, 0 | 1))
        {
            io.sector = part as u64 * 130 + io.sector % 100;
        }
        for io in ios.iter_mut().filter(|io| matches!(io.kind, 11 | 13)) {
            io.out[..8].copy_from_slice(&395u64.to_le_bytes());
        }
        let heads: Vec<u16> =
            ios.iter().enumerate().map(|(place, io)| queue.submit(place as u64, io)).collect();
        let mut ended: Vec<(u16, u32)> = heads.iter().map(|_| queue.wait()).collect();
        for (place, (head, io)) in heads.iter().zip(&ios).enumerate() {
            let at = ended.iter().position(|(used, _)| used == head).expect("each head comes back once");
            let (_, len) = ended.swap_remove(at);
            results.push(queue.result(place as u64, io, len));
        }
    }
    let disk = server.control.lock().unwrap().disk.clone();
    drop(front);
    server.end();
    (results, disk)
}

#[test]
fn both_servers_give_the_same_answers_to_the_same_requests() {
    let (poll, poll_disk) = trace(ADAPTIVE);
    let (epoll, epoll_disk) = trace(Kind::Epoll);
    for status in [0, 1] {
        assert!(poll.iter().any(|done| done.status == status), "the trace has no status {status}");
    }
    for (index, (a, b)) in poll.iter().zip(&epoll).enumerate() {
        // What a failed read leaves in its buffer is not defined.
        let same = (a.status, a.used_len) == (b.status, b.used_len) && (a.status != 0 || a.data == b.data);
        assert!(
            same,
            "request {index}: poll {:?}, epoll {:?}",
            (a.status, a.used_len),
            (b.status, b.used_len)
        );
    }
    assert!(poll_disk == epoll_disk, "the disks differ");
}

#[test]
fn data_written_is_read_back() {
    for kind in KINDS {
        let server = Server::start(kind, lun(4096, 64), 4, 1);
        let guest = Guest::new();
        let mut front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 128)]);
        let data: Vec<u8> = (0..30 * 4096u32).map(|byte| (byte % 253) as u8).collect();
        let queue = &mut front.queues[0];
        assert_eq!(queue.write(8, &data), Done { status: 0, used_len: 1, data: vec![] }, "{kind:?}");
        let read = queue.read(8, data.len() as u32);
        assert_eq!((read.status, read.used_len as usize), (0, data.len() + 1));
        assert!(read.data == data, "{kind:?}: data differs");
        assert_eq!(queue.one(&Io { kind: 4, sector: 0, out: vec![], in_bytes: 0 }).status, 0);
        drop(front);
        assert!(server.end() < Duration::from_secs(2));
    }
}

#[test]
fn configuration_is_read_and_the_cache_mode_written() {
    for kind in [ADAPTIVE, Kind::Epoll] {
        let server = Server::start(kind, lun(4096, 64), 4, 2);
        let mut front = Front::connect(&server.socket(), 2);
        let flags = VhostUserConfigFlags::WRITABLE;
        let (_, space) = front.frontend.get_config(0, 60, flags, &[0; 60]).unwrap();
        assert_eq!(u64::from_le_bytes(space[..8].try_into().unwrap()), 64 * 8);
        assert_eq!((space[32], space[34]), (1, 2));
        front.frontend.set_config(32, flags, &[0]).unwrap();
        let (_, mode) = front.frontend.get_config(32, 1, flags, &[0]).unwrap();
        assert_eq!(mode, [0]);
    }
}

#[test]
fn a_reconnected_front_end_repeats_what_was_in_flight_and_gets_each_answer_once() {
    for kind in KINDS {
        let server = Server::start(kind, lun(512, 400), 8, 1);
        let guest = Guest::new();
        let mut front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 64)]);
        assert_eq!(front.queues[0].write(0, &[1; 512]).status, 0);
        server.hold(true);
        let ios: Vec<Io> = (0..4u8)
            .map(|n| Io { kind: 1, sector: 10 + u64::from(n), out: vec![n + 1; 512], in_bytes: 0 })
            .collect();
        let heads: Vec<u16> = (0..4).map(|n| front.queues[0].submit(n as u64, &ios[n])).collect();
        eventually("four writes reach the engine", || server.control.lock().unwrap().log.len() == 5);
        // The front end goes without a word; the ring stays in guest memory, as with a monitor that reconnects.
        let ring = front.queues.remove(0).ring;
        drop(front);
        // The epoll server takes connections one after the other, when the old requests are through; so the new front
        // end has to connect from a thread.
        let (socket, memory) = (server.socket(), guest);
        let connecting = std::thread::spawn(move || {
            let front = Front::start(&socket, &memory, vec![ring]);
            (front, memory)
        });
        if kind != Kind::Epoll {
            eventually("the new front end is connected", || connecting.is_finished());
        }
        assert_eq!(
            server.control.lock().unwrap().log.len(),
            5,
            "{kind:?}: repeated while the first is under way"
        );
        server.hold(false);
        let (mut front, _guest) = connecting.join().unwrap();
        let mut used: Vec<u16> = (0..4).map(|_| front.queues[0].wait().0).collect();
        used.sort_unstable();
        let mut expected = heads;
        expected.sort_unstable();
        assert_eq!(used, expected, "{kind:?}");
        assert_eq!(front.queues[0].read(11, 512).data, vec![2; 512]);
        assert_eq!(front.queues[0].ring.used_idx(), 6, "{kind:?}: nothing was answered twice");
        let metrics = server.ask(r#"{"cmd":"metrics"}"#);
        assert_eq!(metrics["devices"][0]["stale_completions"], 4, "{kind:?}: {metrics}");
    }
}

#[test]
fn a_second_front_end_is_refused_until_the_first_one_leaves() {
    let server = Server::start(ADAPTIVE, lun(512, 400), 8, 1);
    let guest = Guest::new();
    let mut front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 64)]);
    let mut second = UnixStream::connect(server.socket()).unwrap();
    second.set_read_timeout(Some(DEADLINE)).unwrap();
    assert_eq!(second.read(&mut [0]).unwrap(), 0, "the second one is closed");
    assert_eq!(front.queues[0].write(0, &[1; 512]).status, 0, "the first one does not notice");
    for _ in 0..20 {
        // Leaving and coming back at once must not be mistaken for a second front end.
        let ring = front.queues.remove(0).ring;
        drop(front);
        front = Front::start(&server.socket(), &guest, vec![ring]);
        assert_eq!(front.queues[0].write(0, &[1; 512]).status, 0);
    }
    let metrics = server.ask(r#"{"cmd":"metrics"}"#);
    assert_eq!(
        (&metrics["devices"][0]["refused_connections"], &metrics["devices"][0]["connections"]),
        (&1.into(), &21.into())
    );
}

#[test]
fn get_vring_base_waits_for_what_is_in_flight() {
    for kind in [ADAPTIVE, Kind::Epoll] {
        let server = Server::start(kind, lun(512, 400), 8, 1);
        let guest = Guest::new();
        let mut front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 64)]);
        server.hold(true);
        let io = Io { kind: 1, sector: 0, out: vec![5; 512], in_bytes: 0 };
        for place in 0..4 {
            front.queues[0].submit(place, &io);
        }
        eventually("four writes reach the engine", || server.control.lock().unwrap().log.len() == 4);
        let control = std::sync::Arc::clone(&server.control);
        let release = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            control.lock().unwrap().held = false;
        });
        assert_eq!(front.frontend.get_vring_base(0).unwrap(), 4, "{kind:?}");
        assert_eq!(front.queues[0].ring.used_idx(), 4, "{kind:?}: all of them are in the used ring");
        release.join().unwrap();
        // A stopped ring is not read.
        let mut queue = front.queues.remove(0);
        queue.submit(0, &io);
        queue.kick.write(1).unwrap();
        front.start_ring(0, queue.ring, 4);
        for _ in 0..5 {
            front.queues[0].wait();
        }
        assert_eq!(server.control.lock().unwrap().log.len(), 5);
    }
}

#[test]
fn a_stop_that_takes_too_long_is_answered_and_a_resumed_ring_gets_the_rest() {
    [ADAPTIVE, Kind::Epoll].into_iter().for_each(stop_late_and_start_again);
}

fn stop_late_and_start_again(kind: Kind) {
    let server = Server::start(kind, lun(512, 400), 8, 1);
    let guest = Guest::new();
    let mut front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 64)]);
    let io = Io { kind: 1, sector: 0, out: vec![5; 512], in_bytes: 0 };
    // Once resumed exactly where it stopped, once reset meanwhile.
    for resumes in [true, false] {
        server.hold(true);
        let before = server.control.lock().unwrap().log.len();
        for place in 0..3 {
            front.queues[0].submit(place, &io);
        }
        eventually("three writes reach the engine", || {
            server.control.lock().unwrap().log.len() == before + 3
        });
        let start = Instant::now();
        let base = front.frontend.get_vring_base(0).unwrap();
        assert!((2..6).contains(&start.elapsed().as_secs()), "the wait is bounded: {:?}", start.elapsed());
        // Behind the answer.
        eventually("the engine is told", || server.control.lock().unwrap().abandoned);
        let queue = front.queues.remove(0);
        if resumes {
            assert_eq!((base, queue.ring.used_idx()), (3, 0));
            front.start_ring(0, queue.ring, 3);
            server.hold(false);
            for _ in 0..3 {
                front.queues[0].wait();
            }
        } else {
            // A driver that was reset starts with an empty ring; the old writes must not show up in it.
            front.start_ring(0, guest.ring(0, 64), 0);
            server.hold(false);
            assert_eq!(front.queues[0].read(0, 512).data, vec![5; 512]);
            assert_eq!(front.queues[0].ring.used_idx(), 1);
        }
        // The paused guest's writes were abandoned and made again; the reset one only read.
        assert_eq!(server.control.lock().unwrap().log.len(), before + 3 + if resumes { 3 } else { 1 });
    }
}

#[test]
fn a_stop_that_takes_too_long_fails_nothing_on_the_queues_that_still_run() {
    for kind in [ADAPTIVE, Kind::Epoll] {
        let server = Server::start(kind, lun(512, 400), 8, 2);
        server.control.lock().unwrap().drops_abandoned = true;
        let guest = Guest::new();
        let mut front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 64), guest.ring(1, 64)]);
        let io = Io { kind: 1, sector: 0, out: vec![5; 512], in_bytes: 0 };
        server.hold(true);
        front.queues[0].submit(0, &io);
        front.queues[1].submit(1, &io);
        eventually("both writes reach the engine", || server.control.lock().unwrap().log.len() == 2);
        front.frontend.get_vring_base(0).unwrap();
        assert!(!server.control.lock().unwrap().abandoned, "{kind:?}: somebody waits for queue 1");
        // One long wait is enough to know: the next queue stops at once.
        let start = Instant::now();
        front.frontend.get_vring_base(1).unwrap();
        assert!(start.elapsed() < Duration::from_secs(2), "{kind:?}: {:?}", start.elapsed());
        eventually("the engine is told", || server.control.lock().unwrap().abandoned);
        // It was a pause: both writes are made again and succeed.
        server.hold(false);
        for index in 0..2 {
            let queue = front.queues.remove(index);
            assert_eq!(queue.ring.used_idx(), 0, "{kind:?}: answered while stopped");
            front.start_ring(index, queue.ring, 1);
        }
        for index in 0..2 {
            let (_, len) = front.queues[index].wait();
            assert_eq!(front.queues[index].result(index as u64, &io, len).status, 0, "{kind:?}");
        }
    }
}

#[test]
fn the_last_of_many_queues_works_as_the_first() {
    for kind in [ADAPTIVE, Kind::Epoll] {
        let server = Server::start(kind, lun(512, 400), 8, 64);
        let guest = Guest::new();
        let rings = (0..64).map(|queue| guest.ring(queue, 4)).collect();
        let mut front = Front::start(&server.socket(), &guest, rings);
        // Place 40 lies behind all the rings.
        let io = Io { kind: 1, sector: 0, out: vec![1; 512], in_bytes: 0 };
        let queue = &mut front.queues[63];
        queue.submit(40, &io);
        let (_, len) = queue.wait();
        assert_eq!(queue.result(40, &io, len).status, 0, "{kind:?}");
    }
}

#[test]
fn a_reset_is_answered_when_nothing_writes_to_guest_memory_any_more() {
    let server = Server::start(ADAPTIVE, lun(512, 400), 8, 1);
    let guest = Guest::new();
    let mut front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 64)]);
    server.hold(true);
    front.queues[0].submit(0, &Io { kind: 0, sector: 0, out: vec![], in_bytes: 512 });
    eventually("the read reaches the engine", || server.control.lock().unwrap().log.len() == 1);
    let control = std::sync::Arc::clone(&server.control);
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        control.lock().unwrap().held = false;
    });
    front.frontend.reset_device().unwrap();
    let metrics = server.ask(r#"{"cmd":"metrics"}"#);
    assert_eq!(metrics["devices"][0]["stale_completions"], 1, "the read came back before the answer");
    release.join().unwrap();
}

#[test]
fn a_polling_device_does_without_kicks_from_the_start() {
    let server = Server::start(Kind::Poll(PollMode::Always), lun(512, 400), 8, 1);
    let guest = Guest::new();
    let mut front = Front::connect(&server.socket(), 1);
    front.frontend.set_features(front.features & !(1 << 29)).unwrap();
    front.frontend.set_mem_table(&[guest.region()]).unwrap();
    let ring = DriverRing::new(&guest.map, 0x1_0000, 64, false);
    let used = GuestAddress(ring.used);
    front.start_ring(0, ring, 0);
    let flags: u16 = guest.map.read_obj(used).unwrap();
    assert_eq!(flags, 1, "VIRTQ_USED_F_NO_NOTIFY");
    assert_eq!(front.queues[0].write(0, &[1; 512]).status, 0);
}

#[test]
fn a_broken_ring_stops_its_queue_and_no_other() {
    let server = Server::start(ADAPTIVE, lun(512, 400), 8, 2);
    let guest = Guest::new();
    let mut front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 64), guest.ring(1, 64)]);
    let ring = &mut front.queues[0].ring;
    ring.write_desc(ring.desc, 0, driver::Desc { addr: u64::MAX, len: 16, flags: 0, next: 0 });
    ring.offer(0);
    front.queues[0].kick.write(1).unwrap();
    assert!(wait_readable(&front.queues[0].err, DEADLINE), "the error descriptor fires");
    assert_eq!(front.queues[1].write(0, &[1; 512]).status, 0, "the other queue works");
    // A request without a header is a breach as well.
    let map = &guest.map;
    map.write_obj(0u8, GuestAddress(0x9000)).unwrap();
    front.queues[1].ring.add(&[(0x9000, 1, true)]).unwrap();
    front.queues[1].kick.write(1).unwrap();
    assert!(wait_readable(&front.queues[1].err, DEADLINE));
    // Started anew, the queue works again.
    front.frontend.get_vring_base(0).unwrap();
    front.queues.remove(0);
    front.start_ring(0, guest.ring(0, 64), 0);
    assert_eq!(front.queues[0].write(0, &[1; 512]).status, 0);
    assert_eq!(server.ask(r#"{"cmd":"metrics"}"#)["devices"][0]["broken_queues"], 2);
}

#[test]
fn a_unit_that_grew_reaches_the_front_end() {
    let server = Server::start(ADAPTIVE, lun(512, 400), 8, 1);
    let guest = Guest::new();
    let mut front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 64)]);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(DEADLINE)).unwrap();
    front.frontend.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    server.control.lock().unwrap().changed = Some(lun(512, 800));
    front.queues[0].read(0, 512);
    let mut message = [0; 12];
    ours.read_exact(&mut message).unwrap();
    let word = |at: usize| u32::from_ne_bytes(message[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(4), word(8)), (2, 1, 0), "CONFIG_CHANGE_MSG, version 1, no payload");
    let (_, space) = front.frontend.get_config(0, 8, VhostUserConfigFlags::WRITABLE, &[0; 8]).unwrap();
    assert_eq!(u64::from_le_bytes(space.try_into().unwrap()), 800);
}

#[test]
fn a_refused_message_does_not_end_the_connection() {
    let server = Server::start(ADAPTIVE, lun(512, 400), 8, 1);
    let guest = Guest::new();
    let mut front = Front::connect(&server.socket(), 1);
    let mut region = guest.region();
    region.memory_size *= 2;
    front.frontend.set_mem_table(&[region]).unwrap_err();
    front.frontend.set_vring_num(0, 3).unwrap_err();
    front.frontend.set_vring_num(7, 64).unwrap_err();
    front.frontend.set_vring_base(1, 0).unwrap_err();
    front.frontend.set_mem_table(&[]).err();
    front.frontend.set_mem_table(&[guest.region()]).unwrap();
    front.start_ring(0, guest.ring(0, 64), 0);
    front.frontend.set_vring_base(0, 5).unwrap_err();
    assert_eq!(front.queues[0].write(0, &[1; 512]).status, 0);
}

#[test]
fn memory_is_added_and_removed_while_a_ring_runs() {
    let server = Server::start(ADAPTIVE, lun(512, 400), 8, 1);
    let guest = Guest::new();
    let mut front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 64)]);
    assert_eq!(front.frontend.get_max_mem_slots().unwrap(), 32);
    let more = Guest::new();
    let mut region = more.region();
    region.guest_phys_addr = 1 << 32;
    region.userspace_addr += 1 << 32;
    front.frontend.add_mem_region(&region).unwrap();
    front.frontend.add_mem_region(&region).unwrap_err();
    // A read into the new region, header and status in the old one.
    let queue = &mut front.queues[0];
    assert_eq!(queue.write(4, &[9; 512]).status, 0);
    guest
        .map
        .write_slice(&[&0u64.to_le_bytes()[..], &4u64.to_le_bytes()].concat(), GuestAddress(0x9000))
        .unwrap();
    let chain = [(0x9000, 16, false), (1 << 32, 512, true), (0x9100, 1, true)];
    queue.ring.add(&chain).unwrap();
    queue.kick.write(1).unwrap();
    assert_eq!(queue.wait().1, 513);
    let mut data = [0; 512];
    more.map.read_slice(&mut data, GuestAddress(0)).unwrap();
    assert_eq!(data, [9; 512]);
    front.frontend.remove_mem_region(&region).unwrap();
    let queue = &mut front.queues[0];
    queue.ring.add(&chain).unwrap();
    queue.kick.write(1).unwrap();
    assert!(wait_readable(&queue.err, DEADLINE), "the memory is gone");
}

#[test]
fn memory_and_enabling_change_while_requests_are_in_flight() {
    for kind in [ADAPTIVE, Kind::Epoll] {
        let server = Server::start(kind, lun(512, 400), 8, 1);
        let guest = Guest::new();
        let mut front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 64)]);
        assert_eq!(front.queues[0].write(3, &[9; 512]).status, 0);
        let io = Io { kind: 0, sector: 3, out: vec![], in_bytes: 512 };
        server.hold(true);
        front.queues[0].submit(1, &io);
        eventually("the read reaches the engine", || server.control.lock().unwrap().log.len() == 2);
        front.frontend.set_mem_table(&[guest.region()]).unwrap();
        front.frontend.set_vring_enable(0, false).unwrap();
        server.hold(false);
        let (_, len) = front.queues[0].wait();
        let done = front.queues[0].result(1, &io, len);
        assert_eq!((done.status, done.data), (0, vec![9; 512]), "{kind:?}");
        // Disabled: what is offered now stays in the ring. Each message is carried out after a pass.
        front.queues[0].submit(1, &io);
        front.queues[0].kick.write(1).unwrap();
        for _ in 0..20 {
            front.frontend.set_mem_table(&[guest.region()]).unwrap();
        }
        assert_eq!(server.control.lock().unwrap().log.len(), 2, "{kind:?}");
        front.frontend.set_vring_enable(0, true).unwrap();
        front.queues[0].wait();
    }
}

#[test]
fn garbage_on_the_socket_ends_that_connection_only() {
    use std::io::Write;
    let server = Server::start(ADAPTIVE, lun(512, 400), 8, 1);
    for garbage in [&[0xff; 64][..], &[0; 64], &[1, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f], &[1, 0, 0]]
    {
        let mut stream = UnixStream::connect(server.socket()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(garbage).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    }
    let guest = Guest::new();
    let mut front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 64)]);
    assert_eq!(front.queues[0].write(0, &[1; 512]).status, 0);
}

#[test]
fn an_idle_server_sleeps_and_one_that_is_stuck_ends_in_time() {
    let server = Server::start(ADAPTIVE, lun(512, 400), 4, 1);
    let guest = Guest::new();
    let mut front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 64)]);
    assert_eq!(front.queues[0].write(0, &[1; 512]).status, 0);
    let on_loop = |what: &str| server.ask(r#"{"cmd":"metrics"}"#)["loop"][what].clone();
    let passes = || on_loop("passes").as_u64().unwrap();
    eventually("it sleeps", || on_loop("sleeping") == true);
    // It looks on for a moment after whatever wakes it, such as a kick for a request that it had seen without. The
    // questions themselves are a few passes each, since the devices are asked for their samples: about ten in all.
    eventually("an idle server makes no passes of its own", || {
        let before = passes();
        std::thread::sleep(Duration::from_secs(1));
        passes() - before < 20
    });
    // More requests than the engine takes, and an engine that answers none of them: no spinning, and a prompt end.
    server.hold(true);
    let io = Io { kind: 0, sector: 0, out: vec![], in_bytes: 512 };
    for place in 0..20 {
        front.queues[0].submit(place, &io);
    }
    eventually("the engine is full", || server.control.lock().unwrap().log.len() == 5);
    let before = passes();
    std::thread::sleep(Duration::from_millis(200));
    let made = passes() - before;
    assert!(made < 1000, "{made} passes while nothing can move");
    assert!(server.end() < Duration::from_secs(2));
}

/// The attack on a call descriptor that the threat model names: it stops the data path, and no more than that.
#[test]
fn a_call_descriptor_that_blocks_does_not_keep_the_process_from_ending() {
    let mut server = Server::start(ADAPTIVE, lun(512, 400), 4, 1);
    let guest = Guest::new();
    let mut front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 64)]);
    let queue = &mut front.queues[0];
    assert_eq!(queue.write(0, &[1; 512]).status, 0);
    // No call is still to come.
    eventually("it sleeps", || server.ask(r#"{"cmd":"metrics"}"#)["loop"]["sleeping"] == true);
    let _ = queue.call.read();
    queue.call.write(u64::MAX - 1).unwrap();
    assert!(!queue.ring.arm(), "nothing is used, and the next element shall be told");
    // The flag is that of the description which both sides share.
    let pid = rustix::process::getpid();
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    let flags = rustix::process::PidfdGetfdFlags::empty();
    let call = rustix::process::pidfd_getfd(pidfd, queue.call.as_raw_fd(), flags).unwrap();
    rustix::fs::fcntl_setfl(&call, rustix::fs::OFlags::empty()).unwrap();
    queue.submit(0, &Io { kind: 0, sector: 0, out: vec![], in_bytes: 512 });
    eventually("the read is answered", || queue.ring.used_idx() == 2);
    let start = Instant::now();
    let error = server.result().unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    assert!(error.to_string().contains("stuck"), "{error}");
    // Lets the thread go, which this process keeps.
    queue.call.read().unwrap();
}

#[test]
fn no_kick_and_no_call_is_lost_under_load() {
    for kind in KINDS {
        let server = Server::start(kind, lun(512, 400), 16, 1);
        let guest = Guest::new();
        let mut front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 64)]);
        let queue = &mut front.queues[0];
        let mut random = Random(77);
        let mut total = 0u32;
        while total < 20_000 {
            // Bursts of any size, waited for by the call descriptor alone: a lost kick or call ends in a timeout.
            let burst = 1 + random.below(8);
            for place in 0..burst {
                queue.submit(place, &Io { kind: 0, sector: place, out: vec![], in_bytes: 512 });
            }
            for _ in 0..burst {
                queue.wait();
            }
            total += burst as u32;
            if random.below(64) == 0 {
                // Long enough for the thread to fall asleep.
                std::thread::sleep(Duration::from_micros(random.below(200)));
            }
        }
        assert_eq!(u32::from(queue.ring.used_idx()), total % 65536, "{kind:?}");
    }
}
