//! Hand-over step by step, with a new process that is played by the test: whatever it does wrong and whenever it
//! dies, the old process goes on; and there is never a second owner.
#![allow(unreachable_pub, dead_code)] // The support modules are shared.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use vcp_core::handover::giver::Giving;
use vcp_core::handover::state::ServerState;
use vcp_core::handover::taker::Taker;
use vcp_core::handover::{Channel, ChannelError, FORMAT, Fds, Message};
use vcp_core::poll::PollMode;
use vcp_core::process::Signals;
use vcp_core::vu::{End, ServeError, ServeOptions};
use vcp_iscsi::blk::BlkDevice;
use vcp_iscsi::engine;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

#[path = "../../vcp-core/tests/support/mod.rs"]
mod driver;
#[path = "support/front.rs"]
mod front;
#[path = "support/mem_engine.rs"]
mod mem_engine;

use front::{DEADLINE, Front, Guest, Io, Kind, Server};
use mem_engine::{MemEngine, lun};

const ADAPTIVE: Kind = Kind::Poll(PollMode::Adaptive);
const BLOCKS: u64 = 400;

/// The connection of a process that was told that it may try.
fn admitted(server: &Server) -> UnixStream {
    let by = Instant::now() + DEADLINE;
    loop {
        let (stream, answer) = ask(server);
        if answer == "{\"ok\":true}\n" {
            return stream;
        }
        // The end of the one before may not have been noticed yet.
        assert!(answer.contains("under way") && Instant::now() < by, "{answer}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn ask(server: &Server) -> (UnixStream, String) {
    let mut stream = UnixStream::connect(server.dir.path().join("ctl")).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(b"{\"cmd\":\"take-over\"}\n").unwrap();
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).unwrap();
    (stream, line)
}

fn hello(format: u32) -> Message {
    Message::Hello { format, program: "impostor".into(), pid: 1 }
}

/// A new process played by hand.
struct Impostor(Channel);

impl Impostor {
    fn say(&self, message: &Message) -> Result<(), ChannelError> {
        self.0.send(message, &Fds::default(), DEADLINE)
    }

    fn hear(&self) -> Message {
        self.0.receive(DEADLINE).unwrap().0
    }

    /// Up to `Prepared`.
    fn prepared(server: &Server) -> Self {
        let this = Self(Channel::new(admitted(server)).unwrap());
        this.say(&hello(FORMAT)).unwrap();
        let offer = this.hear();
        assert!(
            matches!(&offer, Message::Offer { format: FORMAT, app, .. } if app["offered"] == 1),
            "{offer:?}"
        );
        this.say(&Message::Prepared {}).unwrap();
        this
    }

    /// Up to the state.
    fn with_state(server: &Server) -> (Self, Box<ServerState>, Fds) {
        let this = Self::prepared(server);
        let (message, fds) = this.0.receive(DEADLINE).unwrap();
        let Message::State(state) = message else { panic!("{message:?}") };
        (this, state, fds)
    }
}

struct Bench {
    server: Server,
    front: Front,
    _guest: Guest,
    sector: u64,
}

impl Bench {
    fn new() -> Self {
        let server = Server::start(ADAPTIVE, lun(512, BLOCKS), 8, 2);
        let guest = Guest::new();
        let front = Front::start(&server.socket(), &guest, vec![guest.ring(0, 64), guest.ring(1, 64)]);
        let mut bench = Self { server, front, _guest: guest, sector: 0 };
        bench.works("at the start");
        bench
    }

    /// Requests are carried out, and messages answered.
    fn works(&mut self, when: &str) {
        for queue in 0..2 {
            self.sector += 2;
            let data: Vec<u8> = (0..1024).map(|at| (at as u64 * 7 + self.sector) as u8).collect();
            let queue = &mut self.front.queues[queue];
            assert_eq!(queue.write(self.sector, &data).status, 0, "{when}");
            assert_eq!(queue.read(self.sector, 1024).data, data, "{when}");
        }
        let flags = VhostUserConfigFlags::empty();
        let (_, config) = self.front.frontend.get_config(0, 8, flags, &[0; 8]).unwrap();
        assert_eq!(config, BLOCKS.to_le_bytes(), "{when}");
    }
}

#[test]
fn whatever_the_new_process_does_the_old_one_goes_on() {
    let mut bench = Bench::new();

    let mut stream = admitted(&bench.server);
    stream.write_all(b"nonsense and more of it").unwrap();
    let _ = stream.read_to_end(&mut Vec::new());
    bench.works("after nonsense");

    drop(admitted(&bench.server));
    bench.works("after an end before anything was said");

    let early = Impostor(Channel::new(admitted(&bench.server)).unwrap());
    early.say(&Message::Owned {}).unwrap();
    assert!(matches!(early.hear(), Message::Refused { .. }));
    bench.works("after `owned` out of turn");

    for other in [FORMAT + 1, 0] {
        let impostor = Impostor(Channel::new(admitted(&bench.server)).unwrap());
        impostor.say(&hello(other)).unwrap();
        let Message::Refused { why } = impostor.hear() else { panic!("format {other} was taken") };
        assert!(why.contains(&format!("format {other}")) && why.contains("restart"), "{why}");
        bench.works("after another format");
    }

    let impostor = Impostor(Channel::new(admitted(&bench.server)).unwrap());
    impostor.say(&hello(FORMAT)).unwrap();
    impostor.hear();
    drop(impostor);
    bench.works("after an end at the offer");

    drop(Impostor::prepared(&bench.server));
    bench.works("after an end when prepared");

    drop(Impostor::with_state(&bench.server));
    bench.works("after an end with the state");

    let (impostor, _, _) = Impostor::with_state(&bench.server);
    impostor.say(&Message::Refused { why: "do not like it".into() }).unwrap();
    drop(impostor);
    bench.works("after a refusal");

    let (impostor, _, _) = Impostor::with_state(&bench.server);
    impostor.say(&Message::Prepared {}).unwrap();
    bench.works("after something else than `owned`");
    assert!(matches!(impostor.say(&Message::Owned {}), Err(ChannelError::Closed)));
    assert!(bench.server.end() < Duration::from_secs(2));
}

/// It stops where it has everything and wakes up when the old process has lost patience: too late.
#[test]
fn one_that_hangs_can_never_become_the_owner() {
    let mut bench = Bench::new();
    let (impostor, _, _) = Impostor::with_state(&bench.server);
    // Answered once the old process has gone on.
    bench.works("after it hung");
    assert!(matches!(impostor.say(&Message::Owned {}), Err(ChannelError::Closed)));
    bench.works("after it woke up");
}

#[test]
fn nothing_is_given_while_requests_are_in_flight() {
    let mut bench = Bench::new();
    bench.server.hold(true);
    let io = Io { kind: 1, sector: 9, out: vec![3; 512], in_bytes: 0 };
    bench.front.queues[0].submit(0, &io);
    while bench.server.control.lock().unwrap().log.last().is_none_or(|&(_, lba, _)| lba != 9) {
        std::thread::yield_now();
    }
    let impostor = Impostor::prepared(&bench.server);
    let early = impostor.0.receive(Duration::from_millis(700));
    assert!(matches!(early, Err(ChannelError::Late(_))), "{early:?}");
    // The other queue is served between the tries: all of it ends once the engine ends anything.
    bench.server.hold(false);
    bench.front.queues[0].wait();
    let (message, _fds) = impostor.0.receive(DEADLINE).unwrap();
    let Message::State(state) = message else { panic!("{message:?}") };
    assert!(state.devices[0].port.vrings[0].running && state.completed_ns >= state.stopped_ns);
    drop(impostor);
    bench.works("after that");
}

#[test]
fn only_one_at_a_time_and_only_where_it_is_offered() {
    let mut bench = Bench::new();
    let first = Impostor::prepared(&bench.server);
    let (message, _fds) = first.0.receive(DEADLINE).unwrap();
    assert!(matches!(message, Message::State(_)));
    drop(first);
    bench.works("after the first");
    let held = Impostor(Channel::new(admitted(&bench.server)).unwrap());
    let (_, answer) = ask(&bench.server);
    assert!(answer.contains("another hand-over is under way"), "{answer}");
    drop(held);
    bench.works("after the second");

    let epoll = Server::start(Kind::Epoll, lun(512, BLOCKS), 8, 1);
    let answer = epoll.ask("{\"cmd\":\"take-over\"}");
    assert_eq!(answer["ok"], false, "{answer}");
}

/// Takes over in this process.
fn take_over(
    server: &Server,
    queues: u16,
    stop: mpsc::Sender<UnixStream>,
    ready: mpsc::Sender<()>,
) -> std::thread::JoinHandle<Result<End, ServeError>> {
    let control = Arc::clone(&server.control);
    let stream = admitted(server);
    std::thread::spawn(move || {
        let (taker, offer) = Taker::begin(stream, "test 2".into())?;
        let (signals, end) = Signals::embedded().unwrap();
        stop.send(end).unwrap();
        let device = BlkDevice::new(MemEngine::sharing(lun(512, BLOCKS), 8, &control), queues);
        let options = ServeOptions {
            giving: Some(Giving { program: "test 2".into(), offer }),
            ..ServeOptions::default()
        };
        let extra = Box::new(serde_json::Map::new);
        let ready = move || ready.send(()).unwrap();
        vcp_core::vu::take_over(taker, vec![("disk0".into(), device)], &options, &signals, extra, ready)
    })
}

#[test]
fn everything_goes_on_in_the_new_process() {
    let mut bench = Bench::new();
    let before = bench.server.ask("{\"cmd\":\"metrics\"}");
    let mut stops = Vec::new();
    let mut threads = Vec::new();
    // Also from one that took over itself.
    for n in 1..=3u64 {
        let (stop, end) = mpsc::channel();
        let (ready, is_ready) = mpsc::channel();
        threads.push(take_over(&bench.server, 2, stop, ready));
        is_ready.recv_timeout(DEADLINE).unwrap();
        stops.push(end.recv_timeout(DEADLINE).unwrap());
        bench.works("in the new process");
        let after = bench.server.ask("{\"cmd\":\"metrics\"}");
        assert_eq!(after["loop"]["take_overs"], n);
        assert!(after["loop"]["take_over_gap_ns"].as_u64().unwrap() > 0);
        let reads = |of: &serde_json::Value| of["devices"][0]["read"]["ok"].as_u64().unwrap();
        assert_eq!(reads(&after), reads(&before) + 2 * n, "counters go on");
    }
    // The first one ended without touching anything.
    bench.server.result().unwrap();
    assert!(bench.server.socket().exists());
    // Messages go on: a queue stops and starts, memory is set again.
    let base = bench.front.frontend.get_vring_base(0).unwrap();
    let queue = bench.front.queues.remove(0);
    assert_eq!(base, u32::from(queue.ring.used_idx()));
    bench.front.frontend.set_mem_table(&[bench._guest.region()]).unwrap();
    bench.front.start_ring(0, queue.ring, base as u16);
    bench.works("after a queue was stopped and started");
    // And a front end may come again.
    drop(bench.front);
    let by = Instant::now() + DEADLINE;
    let rings = (0..2).map(|queue| bench._guest.ring(queue, 64)).collect();
    bench.front = Front::start(&bench.server.socket(), &bench._guest, rings);
    bench.works("with a new connection");
    assert!(Instant::now() < by);
    drop(stops);
    for (n, thread) in threads.into_iter().enumerate() {
        let end = thread.join().unwrap().unwrap();
        assert_eq!(matches!(end, End::Signal), n == 2, "{end:?}");
    }
    assert!(!bench.server.socket().exists(), "the last owner cleans up");
}

/// A program that understands the format but makes something else of it.
#[test]
fn a_state_that_does_not_fit_is_refused() {
    let mut bench = Bench::new();
    let (stop, _end) = mpsc::channel();
    let (ready, _is_ready) = mpsc::channel();
    let error = take_over(&bench.server, 3, stop, ready).join().unwrap().unwrap_err();
    assert!(vcp_core::process::chain(&error).contains("queues"), "{error}");
    bench.works("after that");
}
