//! `kill -9` of either side at random points, against a ledger of requests.
//!
//! A broker (this test) starts two processes (this program again) and joins them. One sends requests with data, the other
//! carries them out and answers. One of them is killed at a random moment, started again and joined anew, over and over. The
//! ledger, a shared file that survives everybody, counts for every request: sent, carried out, carried out as a repetition,
//! answered. At the end nothing may be missing, and nothing may have been carried out twice without the mark.
//!
//! `MSGQ_KILLS` says how often; `cargo xtask soak msgq` says 10,000.

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use msgq::handshake::{Config, Hello, Link, LinkError, Message, read_hello};
use msgq::region::{Access, Pool};
use msgq::ring::Words;
use msgq::shm::Mapping;
use msgq::shm::file;
use msgq::{Channel, Dormant, Error, Head, Incoming, SendError, Status};

const KILLS: u64 = 200;
const ROLE: &str = "MSGQ_KILL_ROLE";
const DEADLINE: Duration = Duration::from_secs(60);

/// Ledger: word 0 is the next number, word 1 says stop; then a word for each request.
const NEXT: usize = 0;
const STOP: usize = 1;
const FIRST: usize = 8;
/// Fields of a request's word.
const SENT: u64 = 1;
const DONE: u64 = 1 << 8;
const DONE_AGAIN: u64 = 1 << 16;
const ANSWERED: u64 = 1 << 32;

fn config() -> Config {
    Config { log2_slots: 7, window: 32, chain_max: 4, deadline: DEADLINE, ..Config::default() }
}

fn end() -> Instant {
    Instant::now() + DEADLINE
}

/// What the broker keeps of the requester.
#[derive(Default)]
struct Kept {
    hello: Hello,
    flight: Option<OwnedFd>,
    regions: Vec<(u16, u16, OwnedFd)>,
}

impl Kept {
    /// Sends it; whoever receives it has all of it or nothing.
    fn send(&self, link: &Link) -> Result<(), LinkError> {
        let must = |message: Message, fd: Option<&OwnedFd>| -> Result<(), LinkError> {
            while !link.send(&message, fd.map(AsFd::as_fd))? {
                link.wait(true, end())?;
            }
            Ok(())
        };
        must(Message::Hello(self.hello), None)?;
        if let Some(flight) = &self.flight {
            must(Message::Control { bytes: 0 }, Some(flight))?;
        }
        for (number, generation, file) in &self.regions {
            let region =
                Message::Region { number: *number, generation: *generation, both_write: false, bytes: 0 };
            must(region, Some(file))?;
        }
        must(Message::Start, None)
    }

    /// Takes one message; true when it is whole.
    fn take(&mut self, message: Message, fd: Option<OwnedFd>) -> bool {
        match (message, fd) {
            (Message::Hello(hello), _) => *self = Self { hello, ..Self::default() },
            (Message::Control { .. }, Some(fd)) => self.flight = Some(fd),
            (Message::Region { number, generation, .. }, Some(fd)) => {
                self.regions.push((number, generation, fd));
            }
            (Message::Start, _) => return true,
            (other, _) => panic!("{other:?}"),
        }
        false
    }
}

/// The next socket to the peer, from the broker.
fn next_link(broker: &Link) -> Option<Link> {
    match broker.expect(end()) {
        Ok((Message::Bell { .. }, Some(fd))) => Some(Link::new(fd).unwrap()),
        Err(LinkError::Gone) => None,
        other => panic!("{other:?}"),
    }
}

/// The program that is started: does nothing when it is run as a test.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let broker = Link::new(rustix::stdio::stdin().try_clone_to_owned().unwrap()).unwrap();
    let Ok((Message::Control { bytes }, Some(ledger))) = broker.expect(end()) else { panic!("no ledger") };
    let ledger = Mapping::read_write(&ledger, bytes as usize).unwrap();
    match role.as_str() {
        "requester" => requester(&broker, &ledger),
        _ => responder(&broker, &ledger),
    }
}

fn requester(broker: &Link, ledger: &Mapping) {
    let words = ledger.words();
    let mut kept = Kept::default();
    loop {
        let (message, fd) = broker.expect(end()).unwrap();
        if kept.take(message, fd) {
            break;
        }
    }
    // Numbers of regions go round; those in use stay.
    let life = kept.hello.window as u16;
    let mut dormant = kept.flight.take().map(|flight| {
        let mut dormant = Dormant::restore(flight, kept.hello.channel, kept.hello.epoch, Vec::new()).unwrap();
        let used = dormant.regions_in_use();
        kept.regions.retain(|(number, ..)| used.contains(number));
        for (number, generation, file) in &kept.regions {
            let file = file.try_clone().unwrap();
            dormant.add_pool(Pool::restore(*number, *generation, file, Access::Owner).unwrap());
        }
        dormant
    });
    let free =
        (0..60).map(|step| (life + step) % 60).find(|n| kept.regions.iter().all(|(used, ..)| used != n));
    let pool = Pool::new(free.expect("a number"), life, 256, 32, Access::Owner).unwrap();
    kept.regions.push((pool.region(), pool.generation(), pool.file().try_clone_to_owned().unwrap()));
    if let Some(dormant) = &mut dormant {
        dormant.add_pool(pool.clone());
    }
    loop {
        let Some(link) = next_link(broker) else { return };
        let mut channel = match dormant.take() {
            None => match Channel::connect(link, &config(), std::slice::from_ref(&pool)) {
                Ok(channel) => channel,
                Err(_) => continue,
            },
            Some(asleep) => match asleep.connect(link, &config()) {
                Ok(channel) => channel,
                Err((_, asleep)) => {
                    dormant = Some(*asleep);
                    continue;
                }
            },
        };
        // The keeper has everything before the first request that needs it.
        let keepsake = channel.keepsake();
        kept.flight = Some(keepsake.flight.try_clone_to_owned().unwrap());
        kept.hello = Hello {
            channel: keepsake.channel,
            epoch: keepsake.epoch,
            window: u32::from(life) + 1,
            ..Hello::default()
        };
        kept.send(broker).unwrap();
        match ask(&mut channel, &pool, words) {
            Ok(()) => {
                channel.close(0);
                return;
            }
            Err(Error::Gone) => dormant = Some(channel.into_dormant()),
            Err(error) => panic!("{error}"),
        }
    }
}

/// Sends requests and counts answers until the peer is gone, or all is done.
fn ask(channel: &mut Channel, pool: &Pool, words: &[msgq_words::AtomicU64]) -> Result<(), Error> {
    let last = (words.len() - FIRST) as u64;
    // Taken before the request is sent: a number is never used twice.
    let mut taken: Option<u64> = None;
    loop {
        let stop = words[STOP].load(Ordering::Acquire) != 0;
        while !stop && words[NEXT].load(Ordering::Relaxed) < last {
            let Some(mut loan) = pool.loan().unwrap() else { break };
            let number = *taken.get_or_insert_with(|| words[NEXT].fetch_add(1, Ordering::AcqRel));
            loan[..8].copy_from_slice(&number.to_le_bytes());
            let head = Head { value: Some(number), ..Head::default() };
            match channel.request_one(head, loan.freeze(0..8)) {
                Ok(_) => {
                    words[FIRST + number as usize].fetch_add(SENT, Ordering::Relaxed);
                    taken = None;
                }
                Err((SendError::Full | SendError::Window, _)) => break,
                Err((SendError::Channel(error), _)) => return Err(error),
                Err((error, _)) => panic!("{error}"),
            }
        }
        channel.commit();
        let mut moved = false;
        while let Some(message) = channel.receive()? {
            let Incoming::Completion(done) = message else { panic!("{message:?}") };
            words[FIRST + done.value as usize].fetch_add(ANSWERED, Ordering::Release);
            moved = true;
        }
        if stop && channel.in_flight() == 0 {
            return Ok(());
        }
        if !moved {
            channel.wait(Some(Instant::now() + Duration::from_millis(100)))?;
        }
    }
}

fn responder(broker: &Link, ledger: &Mapping) {
    let words = ledger.words();
    let mut dormant: Option<Dormant> = None;
    loop {
        let Some(link) = next_link(broker) else { return };
        let Ok(hello) = read_hello(&link, end()) else { continue };
        // A requester that died before anything was kept of it begins anew.
        if hello.channel == 0 {
            dormant = None;
        }
        let mut channel = match dormant.take() {
            None => match Channel::accept(link, hello, &config(), &[]) {
                Ok(channel) => channel,
                Err(_) => continue,
            },
            Some(asleep) => match asleep.accept(link, hello, &config()) {
                Ok(channel) => channel,
                Err((_, asleep)) => {
                    dormant = Some(*asleep);
                    continue;
                }
            },
        };
        match answer(&mut channel, words) {
            Error::Gone => dormant = Some(channel.into_dormant()),
            error => panic!("{error:?}"),
        }
    }
}

fn answer(channel: &mut Channel, words: &[msgq_words::AtomicU64]) -> Error {
    loop {
        match channel.receive() {
            Ok(Some(Incoming::Request(request))) => {
                let number = request.value;
                let mut bytes = [0; 8];
                let [segment] = channel.segments(&request) else { panic!("one segment") };
                channel.slice(*segment).expect("its region").read(0, &mut bytes).unwrap();
                assert_eq!(u64::from_le_bytes(bytes), number, "the data of another request");
                let how = if request.replay { DONE_AGAIN } else { DONE };
                words[FIRST + number as usize].fetch_add(how, Ordering::Relaxed);
                match channel.complete(request, Status { value: number, ..Status::default() }) {
                    Ok(()) => {}
                    Err(SendError::Channel(error)) => return error,
                    Err(error) => panic!("{error}"),
                }
            }
            Ok(Some(other)) => panic!("{other:?}"),
            Ok(None) => {
                if let Err(error) = channel.wait(None) {
                    return error;
                }
            }
            Err(error) => return error,
        }
    }
}

struct Side {
    role: &'static str,
    child: Child,
    link: Link,
}

impl Side {
    fn start(role: &'static str, ledger: &OwnedFd, bytes: usize, kept: Option<&Kept>) -> Self {
        let (link, other) = Link::pair().unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .stdin(Stdio::from(other.into_socket()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        assert!(link.send(&Message::Control { bytes: bytes as u64 }, Some(ledger.as_fd())).unwrap());
        if let Some(kept) = kept {
            kept.send(&link).unwrap();
        }
        Self { role, child, link }
    }

    /// Gives it one end of a new connection; a side that is being started has it waiting.
    fn join(&self, end: Link) {
        let socket = end.into_socket();
        let _ = self.link.send(&Message::Bell { event: false }, Some(socket.as_fd()));
    }
}

fn join(requester: &Side, responder: &Side) {
    let (one, two) = Link::pair().unwrap();
    requester.join(one);
    responder.join(two);
}

/// Takes what the requester wants kept; a part of it, cut by a death, is dropped.
fn keep(link: &Link, kept: &mut Kept, partial: &mut Kept) {
    while let Ok(Some((message, fd))) = link.receive() {
        if partial.take(message, fd) {
            *kept = std::mem::take(partial);
        }
    }
}

#[test]
fn nothing_is_lost_whoever_is_killed() {
    let kills: u64 = std::env::var("MSGQ_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(KILLS);
    let seed: u64 = std::env::var("MSGQ_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let requests = (kills as usize * 2000).clamp(100_000, 8_000_000);
    let bytes = ((FIRST + requests) * 8).next_multiple_of(4096);
    let (file, ledger) = file::create("msgq-ledger", bytes, Access::Both).unwrap();
    let mut kept = Kept::default();
    kept.hello.window = 1;
    let mut requester = Side::start("requester", &file, bytes, Some(&kept));
    let mut responder = Side::start("responder", &file, bytes, None);
    join(&requester, &responder);
    let mut state = seed;
    let mut random = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut partial = Kept::default();
    let words = ledger.words();
    for kill in 0..kills {
        // Mostly in the middle of things: some requests after the last death. Now and then at once, in the set-up.
        if random(8) != 0 {
            let until = words[NEXT].load(Ordering::Relaxed) + random(400);
            let end = end();
            while words[NEXT].load(Ordering::Acquire) < until.min(requests as u64 - 1) {
                keep(&requester.link, &mut kept, &mut partial);
                assert!(Instant::now() < end, "no progress after {kill} kills");
                for side in [&mut requester, &mut responder] {
                    if let Some(status) = side.child.try_wait().unwrap() {
                        panic!("the {} ended by itself with {status} after {kill} kills", side.role);
                    }
                }
                std::thread::yield_now();
            }
        }
        for _ in 0..random(20_000) {
            std::hint::spin_loop();
        }
        let victim = if random(2) == 0 { &mut requester } else { &mut responder };
        victim.child.kill().unwrap();
        victim.child.wait().unwrap();
        if victim.role == "requester" {
            keep(&victim.link, &mut kept, &mut partial);
            partial = Kept::default();
            kept.hello.window += 1;
            *victim = Side::start("requester", &file, bytes, Some(&kept));
        } else {
            *victim = Side::start("responder", &file, bytes, None);
        }
        join(&requester, &responder);
    }
    words[STOP].store(1, Ordering::Release);
    let end = end();
    let status = loop {
        keep(&requester.link, &mut kept, &mut partial);
        if let Some(status) = requester.child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < end, "the requester does not come to an end");
        std::thread::yield_now();
    };
    assert!(status.success(), "the requester ended with {status}");
    drop(responder.link);
    assert!(responder.child.wait().unwrap().success(), "the responder failed");

    let sent = words[NEXT].load(Ordering::Acquire) as usize;
    let mut again = 0u64;
    for (number, word) in words[FIRST..FIRST + sent].iter().enumerate() {
        let word = word.load(Ordering::Acquire);
        let (done, repeated) = (word >> 8 & 0xff, word >> 16 & 0xffff);
        let answered = word >> 32;
        if word & SENT != 0 {
            assert!(done + repeated >= 1, "request {number} was never carried out: {word:#x}");
            assert!(answered >= 1, "request {number} was never answered: {word:#x}");
        }
        assert!(done <= 1, "request {number} was carried out {done} times without a mark");
        again += repeated;
    }
    println!("{kills} kills, {sent} requests, {again} repetitions");
}

/// The atomics of the ledger, which are those of shared memory.
mod msgq_words {
    pub(crate) use std::sync::atomic::AtomicU64;
}
