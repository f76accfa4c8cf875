//! A guest with smoltcp's TCP/IP, which we did not write, behind a stage that delays and loses frames; the stack has real
//! sockets on the host's loopback.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as Stamp;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};

use super::super::UserStack;
use crate::frame::ether::{ETHER_BYTES, IPV4, IPV6};
use crate::frame::gso::{Finished, finish_frame};
use crate::frame::testing::verify;
use crate::frame::{Mac, Offloads, OutFrame, VnetHeader};
use crate::switch::work::PortId;
use crate::uplink::{Ingress, Room, Sender, Sent, Taken, Uplink};
use crate::user::UserConfig;

pub(super) const MAC: Mac = Mac(0x5254_0000_0001);
pub(super) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const LIMIT: Duration = Duration::from_secs(60);

/// Delay and loss, in both directions.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stage {
    /// Half of the round-trip time that it adds.
    pub(super) delay: Duration,
    /// Frames lost, of 1000.
    pub(super) loss: u32,
    /// Most frames that the guest has room for at once; 0: any number.
    pub(super) room: usize,
    /// The guest takes rows of segments.
    pub(super) rows: bool,
}

/// Frames on their way.
#[derive(Debug, Default)]
struct Wire {
    frames: VecDeque<(Instant, Vec<u8>)>,
}

#[derive(Debug)]
struct Wires {
    stage: Stage,
    random: u64,
    to_guest: Wire,
    to_stack: Wire,
    now: Instant,
    lost: u64,
}

impl Wires {
    fn put(&mut self, to_guest: bool, bytes: Vec<u8>) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        if self.random % 1000 < u64::from(self.stage.loss) {
            self.lost += 1;
            return;
        }
        let wire = if to_guest { &mut self.to_guest } else { &mut self.to_stack };
        wire.frames.push_back((self.now + self.stage.delay, bytes));
    }
}

fn due(wire: &mut Wire, now: Instant) -> Option<Vec<u8>> {
    wire.frames.front().filter(|(at, _)| *at <= now)?;
    wire.frames.pop_front().map(|(_, bytes)| bytes)
}

pub(super) struct Got(Vec<u8>);
pub(super) struct Give<'a>(&'a mut Wires);

impl RxToken for Got {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Give<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut bytes = vec![0; len];
        let result = f(&mut bytes);
        self.0.put(false, bytes);
        result
    }
}

impl Device for Wires {
    type RxToken<'a> = Got;
    type TxToken<'a> = Give<'a>;

    fn receive(&mut self, _: Stamp) -> Option<(Got, Give<'_>)> {
        let bytes = due(&mut self.to_guest, self.now)?;
        Some((Got(bytes), Give(self)))
    }

    fn transmit(&mut self, _: Stamp) -> Option<Give<'_>> {
        Some(Give(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ethernet;
        caps.max_transmission_unit = 1514;
        caps
    }
}

impl Ingress for Wires {
    fn frame(&mut self, frame: &OutFrame<'_>) -> Taken {
        if self.stage.room != 0 && self.to_guest.frames.len() >= self.stage.room {
            return Taken::Full;
        }
        let bytes = frame.to_vec();
        let ethertype = u16::from_be_bytes([bytes[12], bytes[13]]);
        if matches!(ethertype, IPV4 | IPV6) && matches!(bytes.get(23), Some(6 | 17)) && bytes[20] & 0x3f == 0
        {
            verify(&frame.meta, &bytes).expect("a sound frame");
        }
        let mut pieces = Vec::new();
        let done = finish_frame(frame, ethertype, ETHER_BYTES, Offloads::NONE, 0, &mut |piece| {
            pieces.push(piece.to_vec());
            true
        });
        assert_eq!(done, Finished::Done);
        pieces.into_iter().for_each(|piece| self.put(true, piece));
        Taken::Done
    }

    fn find(&self, _: u16, mac: Mac) -> Option<PortId> {
        (mac == MAC).then_some(PortId(0))
    }

    fn offloads(&self, _: PortId) -> Offloads {
        if self.stage.rows { Offloads::ALL } else { Offloads::NONE }
    }

    fn direct(&mut self, _: PortId, _: usize) -> Room<'_> {
        Room::Unfit
    }
}

pub(super) struct Bed {
    pub(super) stack: UserStack,
    wires: Wires,
    iface: Interface,
    pub(super) sockets: SocketSet<'static>,
    base: Instant,
    port: u16,
}

impl Bed {
    pub(super) fn new(options: &str, stage: Stage) -> Self {
        let config: UserConfig = options.parse().unwrap();
        let stack = UserStack::open(config.clone()).unwrap();
        let base = Instant::now();
        let mut wires = Wires {
            stage,
            random: 0x9e37_79b9_7f4a_7c15,
            to_guest: Wire::default(),
            to_stack: Wire::default(),
            now: base,
            lost: 0,
        };
        let mac = HardwareAddress::Ethernet(EthernetAddress(MAC.bytes()));
        let mut iface = Interface::new(Config::new(mac), &mut wires, Stamp::from_micros(0));
        iface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(IpAddress::Ipv4(GUEST), 24)).unwrap();
            addresses.push(IpCidr::new(IpAddress::Ipv6(config.guest6(0)), 64)).unwrap();
        });
        iface.routes_mut().add_default_ipv4_route(config.gateway4).unwrap();
        iface.routes_mut().add_default_ipv6_route(config.gateway6).unwrap();
        Self { stack, wires, iface, sockets: SocketSet::new(Vec::new()), base, port: 40_000 }
    }

    /// One round of everything.
    pub(super) fn step(&mut self) {
        let now = Instant::now();
        self.wires.now = now;
        let stamp = Stamp::from_micros(now.duration_since(self.base).as_micros() as i64);
        self.iface.poll(stamp, &mut self.wires, &mut self.sockets);
        while let Some(bytes) = due(&mut self.wires.to_stack, now) {
            self.give(&bytes);
        }
        self.stack.flush(now);
        self.stack.receive(&mut self.wires, now);
    }

    /// Gives the stack a frame.
    pub(super) fn give(&mut self, bytes: &[u8]) {
        let from = Sender { port: PortId(0), vid: 0, now: Instant::now() };
        let frame = OutFrame::of(VnetHeader::default(), bytes);
        assert_eq!(self.stack.send(&frame, from), Sent::Done);
    }

    /// A frame for the guest, for tests that are the guest themselves.
    pub(super) fn take(&mut self) -> Option<Vec<u8>> {
        let now = Instant::now();
        self.wires.now = now;
        self.stack.receive(&mut self.wires, now);
        due(&mut self.wires.to_guest, now)
    }

    /// Rounds until `what` says so.
    pub(super) fn until(&mut self, name: &str, mut what: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !what(self) {
            let state = self.stack.status();
            assert!(
                Instant::now() < deadline,
                "{name}: it does not happen; {state:#}; {:?}",
                self.stack.tcp.list()
            );
            self.step();
        }
    }

    pub(super) fn tcp(&mut self, window: usize) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; window]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        self.sockets.add(socket)
    }

    pub(super) fn connect(&mut self, to: (IpAddr, u16), window: usize) -> SocketHandle {
        let handle = self.tcp(window);
        self.port = if self.port < 60_000 { self.port + 1 } else { 40_000 };
        let local = self.port;
        self.sockets.get_mut::<tcp::Socket<'_>>(handle).connect(self.iface.context(), to, local).unwrap();
        handle
    }

    pub(super) fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub(super) fn counter(&self, name: &str) -> u64 {
        let status = self.stack.status();
        status["counters"].pointer(name).unwrap().as_u64().unwrap()
    }
}
