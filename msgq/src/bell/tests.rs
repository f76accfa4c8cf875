use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::*;

fn rings(ear: &Ear) -> bool {
    let mut fds = [PollFd::new(ear, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
}

#[test]
fn a_ring_is_kept_until_hushed() {
    for kind in [Kind::Pipe, Kind::Event] {
        let (ringer, end) = Ringer::new(kind).unwrap();
        let ear = Ear::adopt(end, kind).unwrap();
        assert!(!rings(&ear), "{kind:?}");
        for _ in 0..3 {
            ringer.ring();
            ringer.ring();
            assert!(rings(&ear) && rings(&ear), "{kind:?}");
            ear.hush();
            assert!(!rings(&ear), "{kind:?}");
        }
    }
}

/// What a hostile sleeper can do to its end of a pipe: clear its flags, let it fill up, close it.
#[test]
fn a_hostile_sleeper_never_blocks_the_waker() {
    let (ringer, end) = Ringer::new(Kind::Pipe).unwrap();
    let flags = rustix::fs::fcntl_getfl(&end).unwrap();
    rustix::fs::fcntl_setfl(&end, flags - OFlags::NONBLOCK).unwrap();
    rustix::io::ioctl_fionbio(&end, false).unwrap();
    assert!(
        !rustix::fs::fcntl_getfl(&end).unwrap().contains(OFlags::NONBLOCK),
        "the attack works on its own end"
    );
    let started = Instant::now();
    for _ in 0..100_000 {
        ringer.ring();
    }
    // Full, and the waker got away each time; were it blocked, this would not be reached at all.
    assert!(started.elapsed() < Duration::from_secs(60));
    assert_eq!(rustix::io::write(&ringer.ring, b"!"), Err(Errno::AGAIN));
    drop(end);
    // No reader but our own copy: no broken pipe, so no SIGPIPE in a program that does not ignore it.
    assert_eq!(rustix::io::write(&ringer.ring, b"!"), Err(Errno::AGAIN));
}

/// The reason why an eventfd is not the default: the same attack makes the waker's write block for ever.
#[test]
fn an_eventfd_can_be_turned_against_its_waker() {
    let (ringer, end) = Ringer::new(Kind::Event).unwrap();
    rustix::io::ioctl_fionbio(&end, false).unwrap();
    rustix::io::write(&end, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    assert!(!rustix::fs::fcntl_getfl(&ringer.ring).unwrap().contains(OFlags::NONBLOCK), "one description");
    let mut fds = [PollFd::new(&ringer.ring, PollFlags::OUT)];
    let ready = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
    assert_eq!(ready, 0, "a write would block");
}

/// What a hostile waker can do to the sleeper: clear the flags of the end that it shares, take the bytes away.
#[test]
fn a_hostile_waker_never_blocks_the_sleeper() {
    let (ringer, end) = Ringer::new(Kind::Pipe).unwrap();
    let shared = end.try_clone().unwrap();
    let ear = Ear::adopt(end, Kind::Pipe).unwrap();
    rustix::io::ioctl_fionbio(&shared, false).unwrap();
    ear.hush();
    ringer.ring();
    assert!(rings(&ear));
    let mut bytes = [0; 8];
    assert_eq!(rustix::io::read(&shared, &mut bytes), Ok(1));
    ear.hush();
    assert!(!rings(&ear));
    let (ringer, end) = Ringer::new(Kind::Event).unwrap();
    let shared = end.try_clone().unwrap();
    let ear = Ear::adopt(end, Kind::Event).unwrap();
    rustix::io::ioctl_fionbio(&shared, false).unwrap();
    ear.hush();
    ringer.ring();
    assert!(rings(&ear));
    assert_eq!(rustix::io::read(&shared, &mut bytes), Ok(8));
    ear.hush();
    assert!(!rings(&ear));
}

/// The same where an end cannot be opened anew.
#[test]
fn a_shared_end_never_blocks_the_sleeper() {
    let (ringer, end) = Ringer::new(Kind::Pipe).unwrap();
    let shared = end.try_clone().unwrap();
    let ear = match Ear::share(end) {
        Ok(ear) => ear,
        Err(error) => return eprintln!("SKIPPED: {error}"),
    };
    rustix::io::ioctl_fionbio(&shared, false).unwrap();
    ear.hush();
    for _ in 0..3 {
        ringer.ring();
        assert!(rings(&ear));
        ear.hush();
        assert!(!rings(&ear));
        ear.hush();
    }
}

#[test]
fn descriptors_of_another_kind_are_refused() {
    let (_, end) = Ringer::new(Kind::Event).unwrap();
    assert!(matches!(Ear::adopt(end, Kind::Pipe), Err(BellError::Kind)));
    let (ringer, end) = Ringer::new(Kind::Pipe).unwrap();
    assert!(matches!(Ear::adopt(end, Kind::Event), Err(BellError::Kind)));
    let writer = ringer.ring.as_fd().try_clone_to_owned().unwrap();
    assert!(matches!(Ear::adopt(writer, Kind::Pipe), Err(BellError::Kind)), "the writing end");
    let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    assert!(matches!(Ear::adopt(file, Kind::Pipe), Err(BellError::Kind)));
}
