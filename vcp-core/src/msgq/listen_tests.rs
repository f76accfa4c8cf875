use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;

use msgq::handshake::LinkError;

use super::*;

const LONG: Duration = Duration::from_secs(20);

fn config(deadline: Duration) -> Config {
    Config { deadline, ..Config::default() }
}

struct Bed {
    arrivals: Arc<Mailbox<Channel>>,
    stats: Arc<ListenerStats>,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Bed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("msgq");
        Self { arrivals: Arc::new(Mailbox::new().unwrap()), stats: Arc::default(), path, _dir: dir }
    }

    fn serve(&self, listener: Listener) -> Serving {
        let options = ListenerOptions { config: config(LONG), users: Vec::new() };
        listener.start(options, Arc::clone(&self.arrivals), Arc::clone(&self.stats)).unwrap()
    }

    fn client(&self, within: Duration) -> Result<Channel, HandshakeError> {
        Channel::connect(Link::dial(&self.path).unwrap(), &config(within), &[])
    }

    fn arrived(&self) -> Channel {
        let mut fds = [PollFd::new(&*self.arrivals, PollFlags::IN)];
        let limit = rustix::time::Timespec { tv_sec: 20, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut fds, Some(&limit)), Ok(1), "nobody arrived");
        self.arrivals.clear_wake();
        self.arrivals.take().expect("one that arrived")
    }
}

fn until_quiet(serving: &Serving) {
    let end = Instant::now() + LONG;
    while !serving.is_quiet() {
        assert!(Instant::now() < end, "somebody is still being set up");
        std::thread::yield_now();
    }
}

#[test]
fn a_door_that_is_held_keeps_clients_waiting_and_loses_none() {
    let bed = Bed::new();
    let serving = bed.serve(Listener::bind(&bed.path).unwrap());
    let first = bed.client(LONG).unwrap();
    bed.arrived();
    // It is counted until its thread has seen to the rest.
    until_quiet(&serving);
    serving.hold(true);
    // Nobody answers it: its own deadline ends it.
    let late = bed.client(Duration::from_millis(100)).unwrap_err();
    assert!(matches!(late, HandshakeError::Link(LinkError::Late)), "{late:?}");
    until_quiet(&serving);
    assert!(!bed.arrivals.has_mail());
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| bed.client(LONG).unwrap());
        serving.hold(false);
        bed.arrived();
        waits.join().unwrap();
    });
    drop((first, serving));
    assert!(!bed.path.exists(), "the socket file stays");
}

#[test]
fn a_socket_that_was_given_is_not_removed_and_its_file_says_who_may_connect() {
    let bed = Bed::new();
    let made = Listener::bind_for_owner(&bed.path).unwrap();
    assert_eq!(std::fs::metadata(&bed.path).unwrap().permissions().mode() & 0o777, 0o600);
    let adopted = Listener::adopt(made.as_fd().as_raw_fd()).unwrap();
    assert_eq!(adopted.path(), bed.path);
    let serving = bed.serve(adopted);
    bed.client(LONG).unwrap();
    bed.arrived();
    drop(serving);
    assert!(bed.path.exists(), "the file is its maker's");
    drop(made);
    assert!(!bed.path.exists());
}

#[test]
fn a_socket_goes_on_in_another_process() {
    let bed = Bed::new();
    let mut old = bed.serve(Listener::bind(&bed.path).unwrap());
    let mut fds = Fds::default();
    let state = old.export(&mut fds).unwrap();
    // One that comes to nothing leaves the file.
    let mut copy = Listener::import(state, &mut fds).unwrap();
    let _ = copy.release();
    drop(copy);
    assert!(bed.path.exists());
    let mut fds = Fds::default();
    let mut new = Listener::import(old.export(&mut fds).unwrap(), &mut fds).unwrap();
    let identity = new.release();
    old.release();
    drop(old);
    new.own(identity);
    let new = bed.serve(new);
    bed.client(LONG).unwrap();
    bed.arrived();
    drop(new);
    assert!(!bed.path.exists());
}

/// Who has a seat serves whoever its monitor sends, one after the other, and goes on with those it has when the monitor
/// is gone.
#[test]
fn clients_come_by_a_seat() {
    let bed = Bed::new();
    let mut broker = super::super::Broker::new();
    let seat = broker.seat("disk0", super::super::Role::Server).unwrap();
    let listener = Listener::adopt(seat.as_raw_fd()).unwrap();
    let mut serving = bed.serve(listener);
    for _ in 0..3 {
        let client = Seat::new(broker.seat("disk0", super::super::Role::Client).unwrap()).unwrap();
        let link = client.next(Instant::now() + LONG).unwrap();
        let _channel = Channel::connect(link, &config(LONG), &[]).unwrap();
        bed.arrived();
    }
    // In another process.
    let mut fds = Fds::default();
    let next = Listener::import(serving.export(&mut fds).unwrap(), &mut fds).unwrap();
    serving.release();
    drop(serving);
    let _serving = bed.serve(next);
    let client = Seat::new(broker.seat("disk0", super::super::Role::Client).unwrap()).unwrap();
    let link = client.next(Instant::now() + LONG).unwrap();
    let mut channel = Channel::connect(link, &config(LONG), &[]).unwrap();
    let mut server = bed.arrived();
    drop(broker);
    channel.send(0, 1, b"still here").unwrap();
    channel.commit();
    assert!(server.wait(Some(Instant::now() + LONG)).unwrap());
    assert!(matches!(server.receive(), Ok(Some(msgq::Incoming::OneWay(_)))));
}

#[test]
fn other_descriptors_are_refused() {
    let file = std::fs::File::open("/dev/null").unwrap();
    let (one, _two) = std::os::unix::net::UnixStream::pair().unwrap();
    let bed = Bed::new();
    let stream = std::os::unix::net::UnixListener::bind(&bed.path).unwrap();
    let lonely = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    for fd in [-1, file.as_raw_fd(), one.as_raw_fd(), stream.as_raw_fd(), lonely.as_raw_fd()] {
        let error = Listener::adopt(fd).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{fd}: {error}");
    }
}
