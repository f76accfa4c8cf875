//! Connections that are opened and ended in every order, by the guest, by the host, by both and by nobody: none of them
//! leaves a descriptor or a slot. The sockets are real, the guest is a handful of numbers, the clock is turned by hand.
//!
//! The only test of this program, so that its descriptors are its own. `VCP_SOAK_NET_CONNECTIONS` says how many
//! connections; `cargo xtask soak net --connections N` sets it.
#![allow(missing_docs)]

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use vcp_net::frame::{Mac, Offloads, OutFrame, VnetHeader};
use vcp_net::switch::work::PortId;
use vcp_net::uplink::{Ingress, Room, Sender, Sent, Taken, Uplink};
use vcp_net::user::packet::{Link, TCP, finished};
use vcp_net::user::tcp::segment::{ACK, FIN, HEADER_MAX, PSH, RST, SYN, Segment};
use vcp_net::user::{UserConfig, UserStack};

const MAC: Mac = Mac(0x5254_0000_0001);
const GUEST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 15));
const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 2));
/// The guest's port that the host's side is led to.
const SERVED: u16 = 80;
const ISN: u32 = 0xffff_fff0;
/// How long the host's kernel may take for what it does at once, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Every so many connections there is one whose guest goes away without a word: it takes minutes of the clock to end.
const SILENT: usize = 64;
/// Orders besides that one.
const ORDERS: usize = 14;

/// What comes to the guest.
#[derive(Default)]
struct Frames(Vec<Vec<u8>>);

impl Ingress for Frames {
    fn frame(&mut self, frame: &OutFrame<'_>) -> Taken {
        self.0.push(frame.to_vec());
        Taken::Done
    }

    fn find(&self, _: u16, mac: Mac) -> Option<PortId> {
        (mac == MAC).then_some(PortId(0))
    }

    fn offloads(&self, _: PortId) -> Offloads {
        Offloads::ALL
    }

    fn direct(&mut self, _: PortId, _: usize) -> Room<'_> {
        Room::Unfit
    }
}

/// The guest's end of a connection.
#[derive(Clone, Copy, Debug)]
struct End {
    ours: u16,
    theirs: u16,
    seq: u32,
    ack: u32,
}

struct Bed {
    stack: UserStack,
    now: Instant,
    frames: Frames,
    listeners: Vec<TcpListener>,
    /// Nothing listens there.
    closed: u16,
    forwarded: u16,
    port: u16,
    /// Ports of the guest that it left without a word: their connections are there for minutes yet.
    left: HashSet<u16>,
    /// Ports of peers that the guest never answered: they ask again, until they are told off or give up with a reset.
    ignored: HashSet<u16>,
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Bed {
    fn new() -> Self {
        let forwarded = free_port();
        let config = format!("flows=65536,hostfwd=tcp:127.0.0.1:{forwarded}-{SERVED}");
        let config: UserConfig = config.parse().unwrap();
        let stack = UserStack::open(config).unwrap();
        let listeners = (0..4).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let (now, frames) = (Instant::now(), Frames::default());
        Self {
            stack,
            now,
            frames,
            listeners,
            closed: free_port(),
            forwarded,
            port: 1024,
            left: HashSet::new(),
            ignored: HashSet::new(),
        }
    }

    fn send(&mut self, end: &mut End, flags: u8, payload: &[u8]) {
        let seg = Segment {
            from: end.ours,
            to: end.theirs,
            seq: end.seq,
            ack: if flags & ACK == 0 { 0 } else { end.ack },
            flags,
            window: u16::MAX,
            ..Segment::default()
        };
        let mut bytes = [0; HEADER_MAX];
        let len = seg.emit(&mut bytes);
        let l4 = [&bytes[..len], payload].concat();
        let gateway = Link { mac: UserConfig::default().mac, vid: 0 };
        let frame = finished(MAC, gateway, (GUEST, GATEWAY), TCP, &l4, 16);
        let from = Sender { port: PortId(0), vid: 0, now: self.now };
        assert_eq!(self.stack.send(&OutFrame::of(VnetHeader::default(), &frame), from), Sent::Done);
        end.seq = end.seq.wrapping_add(payload.len() as u32 + u32::from(flags & (SYN | FIN) != 0));
    }

    fn turn(&mut self) {
        self.stack.flush(self.now);
        self.stack.receive(&mut self.frames, self.now);
    }

    /// Waits for a segment of this connection that has all of `flags`, and takes what is said before it.
    fn hear(&mut self, end: &mut End, flags: u8) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.turn();
            let mut heard = false;
            for frame in std::mem::take(&mut self.frames.0) {
                let Some(seg) = of_tcp(&frame) else { continue };
                if seg.to == SERVED && self.ignored.contains(&seg.from) {
                    if seg.has(RST) {
                        self.ignored.remove(&seg.from);
                    }
                    continue;
                }
                // Somebody new asks; what others still have to say is not for this one.
                if end.theirs == 0 && !seg.has(SYN) {
                    continue;
                }
                if seg.to != end.ours || (end.theirs != 0 && seg.from != end.theirs) {
                    continue;
                }
                let payload = (frame.len() - 34 - usize::from(seg.header_bytes)) as u32;
                end.ack = seg.seq.wrapping_add(payload + u32::from(seg.flags & (SYN | FIN) != 0));
                end.theirs = seg.from;
                heard |= seg.has(flags);
            }
            if heard {
                return;
            }
            // The stack asks the kernel no more often than so.
            self.now += Duration::from_micros(4);
            assert!(Instant::now() < deadline, "{end:?} hears nothing: {:#}", self.stack.status());
        }
    }

    fn asks(&mut self, theirs: u16) -> End {
        self.port = if self.port == u16::MAX { 1024 } else { self.port + 1 };
        while self.left.contains(&self.port) {
            self.port = if self.port == u16::MAX { 1024 } else { self.port + 1 };
        }
        let mut end = End { ours: self.port, theirs, seq: ISN, ack: 0 };
        self.send(&mut end, SYN, &[]);
        end
    }

    fn listens(&self, n: usize) -> u16 {
        self.listeners[n % self.listeners.len()].local_addr().unwrap().port()
    }

    fn accept(&self, n: usize) -> TcpStream {
        let (stream, _) = self.listeners[n % self.listeners.len()].accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A connection that the guest opens.
    fn open(&mut self, n: usize) -> (End, TcpStream) {
        let mut end = self.asks(self.listens(n));
        self.hear(&mut end, SYN | ACK);
        self.send(&mut end, ACK, &[]);
        (end, self.accept(n))
    }

    /// One that the host opens: the guest was asked.
    fn asked(&mut self) -> (End, TcpStream) {
        let stream = TcpStream::connect(("127.0.0.1", self.forwarded)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut end = End { ours: SERVED, theirs: 0, seq: ISN, ack: 0 };
        self.hear(&mut end, SYN);
        (end, stream)
    }

    /// The guest's end arrives at the host.
    fn over(&mut self, stream: &mut TcpStream) {
        self.turn();
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "the guest's end");
    }

    /// The guest's reset does.
    fn cut(&mut self, stream: &mut TcpStream) {
        self.turn();
        assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }

    /// One connection, from its beginning to its end in the `order`-th way.
    fn one(&mut self, n: usize, order: usize) {
        match order {
            0..=8 | 11 => self.opened(n, order),
            9 => {
                // The guest changes its mind when it hears that it may.
                let mut end = self.asks(self.listens(n));
                self.hear(&mut end, SYN | ACK);
                self.send(&mut end, RST, &[]);
                let mut stream = self.accept(n);
                self.cut(&mut stream);
            }
            10 => {
                let mut end = self.asks(self.closed);
                self.hear(&mut end, RST);
            }
            12 => {
                let (mut end, mut stream) = self.asked();
                self.send(&mut end, RST | ACK, &[]);
                self.cut(&mut stream);
            }
            13 => {
                let (mut end, mut stream) = self.asked();
                self.send(&mut end, SYN | ACK, &[]);
                self.hear(&mut end, ACK);
                stream.write_all(b"hello").unwrap();
                drop(stream);
                self.hear(&mut end, FIN);
                self.send(&mut end, FIN | ACK, &[]);
                self.hear(&mut end, ACK);
            }
            // The guest goes away without a word, at one moment or another.
            _ => match n / SILENT % 3 {
                0 => {
                    let end = self.asks(self.listens(n));
                    self.left.insert(end.ours);
                    drop(self.accept(n));
                    self.turn();
                }
                1 => {
                    let (end, _) = self.asked();
                    self.ignored.insert(end.theirs);
                    self.turn();
                }
                _ => {
                    let (mut end, stream) = self.open(n);
                    stream.shutdown(Shutdown::Write).unwrap();
                    self.hear(&mut end, FIN);
                    self.left.insert(end.ours);
                }
            },
        }
    }

    /// Ends of a connection that the guest opened.
    fn opened(&mut self, n: usize, order: usize) {
        let (mut end, mut stream) = self.open(n);
        // Who begins: the guest, the host, both.
        match order {
            0 | 5 | 6 => {
                self.send(&mut end, FIN | ACK, &[]);
                self.over(&mut stream);
            }
            1 | 7 | 8 => {
                stream.shutdown(Shutdown::Write).unwrap();
                self.hear(&mut end, FIN);
            }
            2 => {
                stream.shutdown(Shutdown::Write).unwrap();
                self.send(&mut end, FIN | ACK, &[]);
                self.over(&mut stream);
            }
            _ => {}
        }
        match order {
            0 | 2 => {
                drop(stream);
                self.hear(&mut end, FIN);
                self.send(&mut end, ACK, &[]);
            }
            1 => {
                self.send(&mut end, FIN | ACK, &[]);
                self.over(&mut stream);
                self.hear(&mut end, ACK);
            }
            3 | 7 => {
                self.send(&mut end, RST, &[]);
                self.cut(&mut stream);
            }
            5 => {
                self.send(&mut end, RST, &[]);
                self.turn();
            }
            4 | 6 | 8 => {
                self.send(&mut end, ACK, &[]);
                reset(stream);
                self.hear(&mut end, RST);
            }
            // The host goes without having read what it was sent.
            _ => {
                self.send(&mut end, ACK | PSH, b"nobody reads this");
                self.turn();
                stream.write_all(b"nor this").unwrap();
                stream.peek(&mut [0; 1]).unwrap();
                drop(stream);
                self.hear(&mut end, RST);
            }
        }
    }
}

fn reset(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// The TCP header in a frame of IPv4.
fn of_tcp(frame: &[u8]) -> Option<Segment> {
    let is_it = frame.get(12..14) == Some(&[8, 0]) && frame.get(23) == Some(&TCP);
    Segment::parse(frame.get(34..).filter(|_| is_it)?)
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn connections_in_every_order_leave_nothing() {
    let count = std::env::var("VCP_SOAK_NET_CONNECTIONS").ok().and_then(|count| count.parse().ok());
    let count: usize = count.unwrap_or(3_000);
    let mut bed = Bed::new();
    bed.turn();
    let before = descriptors();
    let (begin, mut most) = (Instant::now(), 0);
    for n in 0..count {
        let order = if n % SILENT == SILENT - 1 { ORDERS } else { n % ORDERS };
        bed.one(n, order);
        bed.now += Duration::from_millis(1);
        most = most.max(bed.stack.flows().0);
    }
    let took = begin.elapsed();
    // What waits for repetitions, and for what may still be on its way, ends by the clock alone.
    for _ in 0..1_000 {
        if bed.stack.flows().0 == 0 {
            break;
        }
        bed.now += Duration::from_secs(1);
        bed.turn();
    }
    let status = bed.stack.status();
    assert_eq!(bed.stack.flows(), (0, 0), "{status:#}");
    assert_eq!(descriptors(), before, "{status:#}");
    let each = took.as_micros() / count.max(1) as u128;
    eprintln!("{count} connections, {most} at most at a time, {each} us each");
}
