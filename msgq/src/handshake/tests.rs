use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::*;
use crate::layout::control_bytes;
use crate::region::Access;
use crate::shm::file::{FileError, create};

fn config() -> Config {
    Config { log2_slots: 4, deadline: Duration::from_secs(20), ..Config::default() }
}

fn hello() -> Hello {
    Hello { epoch: 1, ..config().hello() }
}

/// An accepting side that has said WELCOME and all of its own.
fn welcomed() -> Setup {
    let mut setup = Setup::accepting(config(), Vec::new(), None);
    setup.incoming(Message::Hello(hello()), None).unwrap();
    setup
}

#[test]
fn both_sides_agree_on_the_smaller_of_everything() {
    let (one, two) = Link::pair().unwrap();
    let ours = Config {
        lanes: 3,
        window: 100,
        chain_max: 100,
        segment_max: 5000,
        features: 1 << 40 | 1,
        ..config()
    };
    let theirs = Config { log2_slots: 6, lanes: 2, window: 3, features: 1 << 40 | 1 << 41, ..config() };
    let pool = Pool::new(2, 9, 64, 4, Access::Both).unwrap();
    let (a, b) = std::thread::scope(|scope| {
        let a = scope.spawn(|| connect(one, &ours, &[pool], None).unwrap());
        let hello = read_hello(&two, Instant::now() + Duration::from_secs(20)).unwrap();
        let b = accept(two, hello, &theirs, &[], None).unwrap();
        (a.join().unwrap(), b)
    });
    let (a, b) = (a.agreed, b.agreed);
    assert_eq!((a.lanes, a.chain_max, a.segment_max, a.features), (2, 4, 5000, 1 << 40));
    assert_eq!((a.window_mine, a.window_theirs, a.epoch), (8, 3, 1));
    assert_ne!(a.channel, 0);
    let turned = Agreed {
        log2_mine: a.log2_theirs,
        log2_theirs: a.log2_mine,
        window_mine: a.window_theirs,
        window_theirs: a.window_mine,
        ..a
    };
    assert_eq!(b, turned);
}

#[test]
fn hellos_that_make_no_sense_are_refused() {
    let bad = [
        Hello { version_min: 2, version_max: 3, ..hello() },
        Hello { version_min: 0, version_max: 0, ..hello() },
        Hello { log2_slots: 1, ..hello() },
        Hello { log2_slots: 16, ..hello() },
        Hello { log2_slots: 255, ..hello() },
        Hello { lanes: 0, ..hello() },
        Hello { lanes: 5, ..hello() },
        Hello { window: 0, ..hello() },
        Hello { chain_max: 0, ..hello() },
        Hello { segment_max: 0, ..hello() },
        Hello { epoch: u64::MAX, ..hello() },
    ];
    for hello in bad {
        let mut setup = Setup::accepting(config(), Vec::new(), None);
        assert!(setup.incoming(Message::Hello(hello), None).is_err(), "{hello:?}");
        let mut setup = Setup::connecting(config(), Vec::new(), None);
        let welcome = Hello { channel: 1, ..hello };
        assert!(setup.incoming(Message::Welcome(welcome), None).is_err(), "{welcome:?}");
    }
    let needs = Config { required: 1 << 50, features: 1 << 50, ..config() };
    let mut setup = Setup::accepting(needs, Vec::new(), None);
    let error = setup.incoming(Message::Hello(hello()), None).unwrap_err();
    assert!(matches!(error, HandshakeError::Features(bits) if bits == 1 << 50));
    // A welcome that grants what was not offered.
    let mut setup = Setup::connecting(config(), Vec::new(), None);
    assert!(setup.incoming(Message::Welcome(Hello { channel: 1, features: 1, ..hello() }), None).is_err());
    let mut setup = Setup::connecting(config(), Vec::new(), None);
    assert!(setup.incoming(Message::Welcome(Hello { channel: 1, lanes: 2, ..hello() }), None).is_err());
    // Somebody else's channel.
    let prior = Some(Prior { channel: 5, epoch: 3 });
    let mut setup = Setup::accepting(config(), Vec::new(), prior);
    let error = setup.incoming(Message::Hello(Hello { channel: 6, ..hello() }), None).unwrap_err();
    assert!(matches!(error, HandshakeError::Channel));
}

#[test]
fn messages_out_of_order_are_refused() {
    for message in
        [Message::Start, Message::RegionAck { number: 0 }, Message::Drain, Message::RegionGone { number: 0 }]
    {
        assert!(welcomed().incoming(message, None).is_err(), "{message:?}");
        assert!(Setup::accepting(config(), Vec::new(), None).incoming(message, None).is_err(), "{message:?}");
    }
    assert!(welcomed().incoming(Message::Hello(hello()), None).is_err(), "twice");
    assert!(welcomed().incoming(Message::Welcome(hello()), None).is_err());
}

#[test]
fn files_that_are_not_right_are_refused() {
    let bytes = control_bytes(1, 4);
    let (right, _map) = create("t", bytes, Access::Owner).unwrap();
    let (writable, _map2) = create("t", bytes, Access::Both).unwrap();
    let (long, _map3) = create("t", bytes + 4096, Access::Owner).unwrap();
    let control = |bytes, fd: &std::os::fd::OwnedFd| {
        welcomed().incoming(Message::Control { bytes }, Some(fd.try_clone().unwrap()))
    };
    let bytes = bytes as u64;
    let error = control(bytes, &writable).unwrap_err();
    assert!(matches!(error, HandshakeError::File { source: FileError::Seals { .. }, .. }), "{error:?}");
    assert!(control(bytes, &long).is_err());
    assert!(control(bytes + 4096, &long).is_err());
    assert!(control(0, &right).is_err());
    let error = control(bytes, &right).unwrap_err();
    assert!(matches!(error, HandshakeError::Limit { what: "control memory header", .. }), "{error:?}");
    let region = |number, bytes, both_write, fd: &std::os::fd::OwnedFd| {
        let message = Message::Region { number, generation: 1, both_write, bytes };
        welcomed().incoming(message, Some(fd.try_clone().unwrap()))
    };
    region(0, bytes, true, &writable).unwrap();
    region(63, bytes, false, &right).unwrap();
    assert!(region(0, bytes, false, &writable).is_err(), "it could be written behind our back");
    assert!(region(64, bytes, true, &writable).is_err(), "number");
    assert!(region(0, bytes * 2, true, &writable).is_err(), "size");
    assert!(region(0, u64::MAX, true, &writable).is_err(), "quota");
    let mut setup = welcomed();
    let mut again = |fd: &std::os::fd::OwnedFd| {
        let message = Message::Region { number: 1, generation: 1, both_write: true, bytes };
        setup.incoming(message, Some(fd.try_clone().unwrap()))
    };
    again(&writable).unwrap();
    assert!(again(&writable).is_err(), "one number twice");
    let null = std::os::fd::OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    assert!(welcomed().incoming(Message::Bell { event: false }, Some(null)).is_err());
}

#[test]
fn a_flood_of_descriptors_is_cut_and_closed() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let (one, two) = Link::pair().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    let before = open();
    for count in [1usize, 2, 4, 5, 100, 253] {
        let fds = vec![file.as_fd(); count];
        let mut space = vec![std::mem::MaybeUninit::uninit(); 2048];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = Message::Start.encode();
        sendmsg(&one, &[std::io::IoSlice::new(&bytes)], &mut control, SendFlags::empty()).unwrap();
        let error = two.receive().unwrap_err();
        assert!(
            matches!(error, LinkError::Descriptors { .. } | LinkError::Truncated),
            "{count} descriptors: {error:?}"
        );
    }
    // Other tests open some meanwhile; 360 that leak would show.
    assert!(open() < before + 100, "descriptors leak");
}

/// A peer that dies with unread messages leaves an error on the socket that comes before what it had sent.
#[test]
fn the_last_words_of_a_peer_are_heard() {
    let (one, two) = Link::pair().unwrap();
    assert!(one.send(&Message::Start, None).unwrap(), "never read");
    assert!(two.send(&Message::Drain, None).unwrap());
    assert!(two.send(&Message::Bye { reason: 5 }, None).unwrap());
    drop(two);
    assert_eq!(one.receive().unwrap().unwrap().0, Message::Drain);
    assert_eq!(one.receive().unwrap().unwrap().0, Message::Bye { reason: 5 });
    assert!(matches!(one.receive(), Err(LinkError::Gone)));
}

#[test]
fn a_silent_peer_is_given_up_in_time() {
    let (one, _two) = Link::pair().unwrap();
    let config = Config { deadline: Duration::from_millis(50), ..config() };
    let started = Instant::now();
    assert!(matches!(connect(one, &config, &[], None), Err(HandshakeError::Link(LinkError::Late))));
    assert!(started.elapsed() >= Duration::from_millis(50));
    let (one, two) = Link::pair().unwrap();
    drop(two);
    assert!(matches!(connect(one, &config, &[], None), Err(HandshakeError::Link(LinkError::Gone))));
}

/// A peer that trickles valid messages for ever does not get past the deadline either.
#[test]
fn a_trickle_does_not_stretch_the_deadline() {
    let (one, two) = Link::pair().unwrap();
    let config = Config { deadline: Duration::from_millis(100), ..config() };
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let hello = read_hello(&two, Instant::now() + Duration::from_secs(20)).unwrap();
            let welcome = Message::Welcome(Hello { channel: 9, ..hello });
            two.send(&welcome, None).unwrap();
            for number in 0..64 {
                let (file, _map) = create("t", 4096, Access::Both).unwrap();
                let region = Message::Region { number, generation: 1, both_write: true, bytes: 4096 };
                if two.send(&region, Some(file.as_fd())).is_err() {
                    return;
                }
                while let Ok(Some(_)) = two.receive() {}
            }
            // And then nothing, until the other side gives up.
            while two.expect(Instant::now() + Duration::from_secs(20)).is_ok() {}
        });
        let error = connect(one, &config, &[], None).unwrap_err();
        assert!(matches!(error, HandshakeError::Link(LinkError::Late)), "{error:?}");
    });
}

#[test]
fn only_packet_sockets_are_taken() {
    let (one, _two) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(Link::new(one.into()).is_err());
}
