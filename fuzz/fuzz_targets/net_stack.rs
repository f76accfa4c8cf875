//! A hostile guest's frames, and commands of the control socket, to the user-mode stack, which has sockets in a network of
//! its own with a peer that sends and answers.
//!
//! Holds: every frame that the stack sends is sound as its receiver sees it, and answers are few; a guest that is gone
//! leaves no flow.
#![no_main]

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use vcp_net::frame::gso::{Finished, finish_frame};
use vcp_net::frame::testing::verify;
use vcp_net::frame::{Mac, Offloads, OutFrame, VnetHeader};
use vcp_net::switch::work::PortId;
use vcp_net::uplink::{Ingress, Room, Sender, Taken, Uplink};
use vcp_net::user::packet::{Arp, ICMP, ICMPV6, Link, TCP, UDP, ether, finished, ip, udp};
use vcp_net::user::tcp::segment::{ACK, HEADER_MAX, SYN, Segment};
use vcp_net::user::{UserConfig, UserStack};

#[path = "../support/input.rs"]
mod input;
#[path = "../support/world.rs"]
mod world;
use input::Input;

const MAC: Mac = Mac(0x5254_0000_0001);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const ECHO: u16 = 7;
/// Frames that one of the guest may be answered with, beside data: a burst of ICMP errors among them.
const ANSWERS: usize = 8 + 32;
const PORT: PortId = PortId(0);

/// The peer on the host's side.
struct Peer {
    tcp: TcpListener,
    udp: UdpSocket,
    streams: VecDeque<TcpStream>,
}

impl Peer {
    fn new() -> Self {
        let tcp = TcpListener::bind(("127.0.0.1", ECHO)).expect("a port of an empty network");
        let udp = UdpSocket::bind(("127.0.0.1", ECHO)).expect("a port of an empty network");
        tcp.set_nonblocking(true).expect("a socket");
        udp.set_nonblocking(true).expect("a socket");
        Self { tcp, udp, streams: VecDeque::new() }
    }

    fn turn(&mut self, how: u8) {
        while let Ok((stream, _)) = self.tcp.accept() {
            let _ = stream.set_nonblocking(true);
            self.streams.push_back(stream);
        }
        let mut buffer = [0; 65_536];
        self.streams.retain_mut(|stream| match stream.read(&mut buffer) {
            Ok(0) => false,
            // More than it was given, or less.
            Ok(len) => stream.write(&buffer[..(len * usize::from(how & 7)).min(60_000)]).is_ok(),
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        });
        if how & 0xf0 == 0xf0 {
            self.streams.pop_front();
        }
        while let Ok((len, from)) = self.udp.recv_from(&mut buffer) {
            let _ = self.udp.send_to(&buffer[..len], from);
        }
    }
}

/// The guest's side of the switch.
struct Guest {
    room: usize,
    offloads: Offloads,
    frames: usize,
    data: usize,
    /// What the last segment to it said: its numbers and port.
    heard: Segment,
}

impl Guest {
    fn hear(&mut self, meta: &VnetHeader, bytes: &[u8]) {
        // The last part of a packet may be a byte.
        assert!(bytes.len() > 34 || bytes.get(12..14) != Some(&[8, 0]), "a short frame");
        let v6 = bytes[12..14] == [0x86, 0xdd];
        let v4 = bytes[12..14] == [8, 0];
        if !v4 && !v6 {
            return;
        }
        let protocol = if v4 { bytes[23] } else { bytes[20] };
        let whole = !v4 || (bytes[20] & 0x3f == 0 && bytes[21] == 0);
        // A part of a packet is data.
        self.data += usize::from(!whole);
        if matches!(protocol, TCP | UDP) && whole {
            let check = verify(meta, bytes).unwrap_or_else(|error| panic!("{error}: {meta:?} {bytes:02x?}"));
            self.data += usize::from(!check.payload.is_empty());
            if protocol == TCP {
                let at = if v4 { 34 } else { 54 };
                self.heard = Segment::parse(&bytes[at..]).expect("a header of the stack");
            }
        }
    }
}

impl Ingress for Guest {
    fn frame(&mut self, frame: &OutFrame<'_>) -> Taken {
        if self.frames >= self.room {
            return Taken::Full;
        }
        self.frames += 1;
        let bytes = frame.to_vec();
        self.hear(&frame.meta, &bytes);
        let ethertype = u16::from_be_bytes([bytes[12], bytes[13]]);
        let done = finish_frame(frame, ethertype, 14, Offloads::NONE, 0, &mut |piece| {
            assert!(piece.meta.is_plain());
            true
        });
        assert_eq!(done, Finished::Done, "{:?} {bytes:02x?}", frame.meta);
        Taken::Done
    }

    fn find(&self, _: u16, mac: Mac) -> Option<PortId> {
        (mac == MAC).then_some(PORT)
    }

    fn offloads(&self, _: PortId) -> Offloads {
        self.offloads
    }

    fn direct(&mut self, _: PortId, _: usize) -> Room<'_> {
        Room::Unfit
    }
}

fn gateway() -> Link {
    Link { mac: UserConfig::default().mac, vid: 0 }
}

/// An address to send to: the gateway mostly.
fn target(input: &mut Input<'_>, v6: bool) -> IpAddr {
    let config = UserConfig::default();
    match (input.byte(), v6) {
        (0..=159, false) => GATEWAY.into(),
        (0..=159, true) => config.gateway6.into(),
        (160..=199, false) => config.dns4().into(),
        (160..=199, true) => config.dns6().into(),
        (200..=209, false) => Ipv4Addr::BROADCAST.into(),
        (200..=209, true) => Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2).into(),
        (_, false) => Ipv4Addr::from(input.long()).into(),
        (_, true) => Ipv6Addr::from(u128::from(input.long()) << 96 | u128::from(input.long())).into(),
    }
}

fn tcp(input: &mut Input<'_>, guest: &Guest, ends: (IpAddr, IpAddr)) -> (VnetHeader, Vec<u8>) {
    let (kind, slot) = (input.byte(), input.byte());
    let heard = &guest.heard;
    let flags = if kind & 0x80 != 0 { SYN } else { ACK | (kind & 0x1f) };
    let segment = Segment {
        from: 4000 + u16::from(slot & 3),
        to: if slot & 0xc0 == 0xc0 { 9 } else { ECHO },
        seq: if flags & SYN != 0 { input.long() } else { heard.ack.wrapping_add(input.near()) },
        ack: heard.seq.wrapping_add(input.near()),
        flags,
        window: input.word(),
        mss: input.word(),
        scale: (kind & 0x20 != 0).then(|| input.byte()),
        sack_ok: kind & 0x40 != 0,
        time: (slot & 8 != 0).then(|| (input.near(), input.near())),
        sack: [(heard.seq.wrapping_add(input.near()), heard.seq.wrapping_add(input.near())), (0, 0), (0, 0)],
        ..Segment::default()
    };
    let mut header = [0; HEADER_MAX];
    let len = segment.emit(&mut header);
    let mut l4 = header[..len].to_vec();
    // Options as they come, in place of those.
    if slot & 0x10 != 0 {
        let options = input.bytes(40);
        l4.truncate(20);
        l4.extend_from_slice(options);
        l4.resize(l4.len().next_multiple_of(4), 0);
        l4[12] = ((l4.len() / 4) as u8) << 4;
    }
    let headers = l4.len();
    l4.resize(headers + usize::from(input.word()) % 20_000, 0x5a);
    if flags & SYN != 0 {
        l4.truncate(headers);
    }
    let frame = finished(MAC, gateway(), ends, TCP, &l4, 16);
    let l4_at = frame.len() - l4.len();
    let meta = match slot & 0x20 {
        0 => VnetHeader::default(),
        _ => VnetHeader::tcp(ends.0.is_ipv6(), l4_at, l4_at + headers, input.word()),
    };
    (meta, frame)
}

/// A frame.
fn frame(input: &mut Input<'_>, guest: &Guest) -> (VnetHeader, Vec<u8>) {
    let plain = VnetHeader::default();
    let kind = input.byte();
    let v6 = kind & 0x80 != 0;
    let config = UserConfig::default();
    let us: IpAddr = if v6 { config.guest6(0).into() } else { GUEST.into() };
    match kind & 0x0f {
        0 => (plain, input.bytes(200).to_vec()),
        1 => {
            let mut out = Vec::new();
            ether(&mut out, MAC, gateway(), [0x0800, 0x86dd, 0x0806, 0x88cc][usize::from(input.byte() & 3)]);
            out.extend_from_slice(input.bytes(250));
            (plain, out)
        }
        2 => {
            let asks = Arp {
                asks: input.byte() & 1 == 0,
                from: (Mac(u64::from(input.long()) & 0xfeff_ffff), Ipv4Addr::from(input.long())),
                to: (Mac(0), GATEWAY),
            };
            (plain, asks.emit(Link { mac: Mac::BROADCAST, vid: 0 }))
        }
        // Any protocol, or ICMP.
        3 | 4 => {
            let protocol = match input.byte() {
                0..=127 if v6 => ICMPV6,
                0..=127 => ICMP,
                byte => byte,
            };
            let to = target(input, v6);
            let mut l4 = input.bytes(255).to_vec();
            l4.resize(l4.len().max(20), 0);
            (plain, finished(MAC, gateway(), (us, to), protocol, &l4, 2))
        }
        // Parts, options and extension headers: an IP header whose fields are wrong.
        5 => {
            let mut out = Vec::new();
            let l4 = input.bytes(255);
            ip(&mut out, MAC, gateway(), (us, target(input, v6)), input.byte(), l4.len());
            let at = 14 + usize::from(input.byte()) % (out.len() - 14);
            out[at] = input.byte();
            out.extend_from_slice(l4);
            (plain, out)
        }
        // DHCP, DHCPv6, DNS.
        6..=8 => {
            let (from, to) = match (kind & 0x0f, v6) {
                (6, false) => (68, 67),
                (6, true) => (546, 547),
                _ => (4053, 53),
            };
            let mut message = Vec::new();
            if (from, kind & 0x10) == (68, 0x10) {
                message.resize(240, 0);
                message[..3].copy_from_slice(&[1, 1, 6]);
                message[28..34].copy_from_slice(&MAC.bytes());
                message[236..].copy_from_slice(&[99, 130, 83, 99]);
            }
            message.extend_from_slice(input.bytes(250));
            let src = if from == 68 { Ipv4Addr::UNSPECIFIED.into() } else { us };
            (plain, udp(MAC, gateway(), (src, from), (target(input, v6), to), &message))
        }
        9 | 10 => {
            let payload = vec![0x33; usize::from(input.word()) % 9000];
            let from = 4000 + u16::from(input.byte() & 3);
            let frame = udp(MAC, gateway(), (us, from), (target(input, v6), ECHO), &payload);
            let meta = match kind & 0x10 {
                0 => plain,
                _ => VnetHeader::udp(frame.len() - payload.len() - 8, input.word() & 0x3ff),
            };
            (meta, frame)
        }
        // Metadata that does not go with the frame.
        11 => {
            let mut header = [0; 10];
            header.fill_with(|| input.byte());
            (
                VnetHeader::parse(&header),
                udp(MAC, gateway(), (us, 4000), (GATEWAY.into(), ECHO), input.bytes(99)),
            )
        }
        _ => {
            let to = target(input, v6);
            tcp(input, guest, (us, to))
        }
    }
}

fn command(stack: &mut UserStack, input: &mut Input<'_>, now: Instant) {
    let name = ["forwards", "flows", "forward-add", "forward-remove"][usize::from(input.byte() & 3)];
    let text = match input.byte() & 3 {
        0 => String::from_utf8_lossy(input.bytes(60)).into_owned(),
        1 => format!("tcp:127.0.0.1:{}-{}", input.word(), input.word()),
        2 => format!("udp:127.0.0.1:{}-10.0.2.{}:{}", input.word(), input.byte(), input.word()),
        _ => format!("udp:[::1]:0-{}", input.word()),
    };
    let Value::Object(args) = json!({ "forward": text }) else { return };
    assert!(stack.command(name, &args, now).is_some(), "a command that is not known");
}

fn run(data: &[u8]) {
    let mut input = Input(data);
    let options = input.byte();
    let config: UserConfig =
        if options & 1 == 0 { "dns=127.0.0.1" } else { "mtu=9000,flows=3,dns=127.0.0.1" }
            .parse()
            .expect("options");
    let mut stack = UserStack::open(config).expect("a stack without forwards");
    let mut peer = PEER.with(|peer| peer.borrow_mut().take()).unwrap_or_else(Peer::new);
    let mut guest = Guest {
        room: usize::MAX,
        offloads: if options & 2 == 0 { Offloads::ALL } else { Offloads::NONE },
        frames: 0,
        data: 0,
        heard: Segment::default(),
    };
    let mut now = Instant::now();
    while !input.is_empty() {
        match input.byte() % 16 {
            0 => now += Duration::from_millis(u64::from(input.word())),
            1 => guest.room = usize::from(input.byte() & 7),
            2 => guest.room = usize::MAX,
            3 => command(&mut stack, &mut input, now),
            4 => stack.attached(PORT, input.byte() & 1 == 0),
            _ => {
                let (meta, bytes) = frame(&mut input, &guest);
                let from = Sender { port: PORT, vid: 0, now };
                stack.send(&OutFrame::of(meta, &bytes), from);
            }
        }
        stack.flush(now);
        peer.turn(options);
        (guest.frames, guest.data) = (0, 0);
        now += Duration::from_micros(10);
        stack.receive(&mut guest, now);
        let bare = guest.frames - guest.data;
        assert!(bare <= ANSWERS, "{bare} frames without data for one");
    }
    // It goes, and nothing of it stays.
    stack.attached(PORT, false);
    now += Duration::from_secs(6);
    guest.room = usize::MAX;
    stack.receive(&mut guest, now);
    stack.receive(&mut guest, now + Duration::from_micros(10));
    let forwards = stack.status()["forwards"].as_array().map_or(0, Vec::len);
    let (tcp, udp) = stack.flows();
    assert!(tcp == 0 && udp <= forwards, "what is left: {tcp} and {udp} with {forwards} forwards");
    stack.close();
    peer.streams.clear();
    PEER.with(|place| *place.borrow_mut() = Some(peer));
}

thread_local! {
    static PEER: std::cell::RefCell<Option<Peer>> = const { std::cell::RefCell::new(None) };
}

fuzz_target!(init: world::leave(), |data: &[u8]| run(data));
