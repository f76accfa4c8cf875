//! A switch with guests: real ports on real rings in memory of their own, and an uplink that keeps what it gets.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use vcp_core::fabric::Fabric;
use vcp_core::handover::Fds;
use vcp_core::handover::state::NotNow;
use vcp_core::mem::GuestMap;
use vcp_core::queue::RingAddresses;
use vcp_core::vu::port::Port;
use vm_memory::{Bytes, GuestAddress};

use super::ring::DriverRing;
use crate::frame::vnet::SHORT_HEADER_BYTES;
use crate::frame::{Mac, Offloads, OutFrame, VnetHeader};
use crate::port::{NetPort, PortSpec, features};
use crate::switch::SwitchFabric;
use crate::switch::work::PortId;
use crate::uplink::none::NoUplink;
use crate::uplink::{Ingress, Sender, Sent, Taken, Uplink};

pub(super) const RING_SIZE: u16 = 128;
const RX_RING: u64 = 0x1000;
const TX_RING: u64 = 0x3000;
const RX_DATA: u64 = 0x1_0000;
/// Room of a receive buffer.
pub(super) const RX_BYTES: u64 = 0x1000;
const TX_DATA: u64 = 0x10_0000;
const TX_BYTES: u64 = 0x1_2000;
const MEMORY: usize = 0x80_0000;

/// The address of guest `at`.
pub(super) fn mac(at: usize) -> Mac {
    Mac(0x0200_0000_0010 + at as u64)
}

/// A driver, with its rings.
pub(super) struct Guest {
    pub(super) map: Arc<GuestMap>,
    pub(super) rx: DriverRing,
    pub(super) tx: DriverRing,
    features: u64,
    next: u64,
}

impl Guest {
    fn new(features: u64) -> Self {
        let map = Arc::new(GuestMap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let rx = DriverRing::new(&map, RX_RING, RING_SIZE, true);
        let tx = DriverRing::new(&map, TX_RING, RING_SIZE, true);
        Self { map, rx, tx, features, next: 0 }
    }

    fn rings(&self) -> [(u32, RingAddresses, u32); 2] {
        [(0, &self.rx), (1, &self.tx)].map(|(queue, ring)| {
            let &DriverRing { size, desc, avail, used, .. } = ring;
            (queue, RingAddresses { size, desc, avail, used }, 0)
        })
    }

    /// Gives room for `count` frames more.
    pub(super) fn offer(&mut self, count: usize) {
        for _ in 0..count {
            let at = RX_DATA + RX_BYTES * u64::from(self.rx.avail_idx % RING_SIZE);
            self.rx.add(&[(at, RX_BYTES as u32, true)]).expect("room in the ring");
        }
    }

    /// Sends a frame.
    pub(super) fn send(&mut self, meta: VnetHeader, bytes: &[u8]) {
        let at = TX_DATA + TX_BYTES * (self.next % u64::from(RING_SIZE / 2));
        self.next += 1;
        let header = self.header_bytes();
        self.map.write_slice(&meta.emit()[..header], GuestAddress(at)).unwrap();
        self.map.write_slice(bytes, GuestAddress(at + header as u64)).unwrap();
        let len = header + bytes.len();
        // In two pieces, cut somewhere.
        let cut = (header + 7 + self.next as usize * 13 % 60).min(len - 1) as u32;
        let pieces = [(at, cut, false), (at + u64::from(cut), len as u32 - cut, false)];
        self.tx.add(&pieces).expect("room in the ring");
    }

    /// Sends frame `number` in one piece.
    pub(super) fn send_whole(&mut self, number: u16, bytes: &[u8]) {
        let at = TX_DATA + 0x1000 * u64::from(number);
        let header = self.header_bytes();
        self.map.write_slice(&[0; 12][..header], GuestAddress(at)).unwrap();
        self.map.write_slice(bytes, GuestAddress(at + header as u64)).unwrap();
        self.tx.add(&[(at, (header + bytes.len()) as u32, false)]).expect("room in the ring");
    }

    fn header_bytes(&self) -> usize {
        if self.features & (features::VERSION_1 | features::MRG_RXBUF) == 0 { SHORT_HEADER_BYTES } else { 12 }
    }

    /// Frames that came back from the transmit ring.
    pub(super) fn sent(&mut self) -> usize {
        std::iter::from_fn(|| self.tx.take_used()).count()
    }

    /// The next frame.
    pub(super) fn receive(&mut self) -> Option<(VnetHeader, Vec<u8>)> {
        let header = self.header_bytes();
        let mut bytes = self.buffer()?;
        let count = if self.features & features::MRG_RXBUF != 0 {
            u16::from_le_bytes([bytes[10], bytes[11]])
        } else {
            1
        };
        for _ in 1..count {
            bytes.extend(self.buffer().expect("all buffers of a frame at once"));
        }
        let mut short = [0; SHORT_HEADER_BYTES];
        short.copy_from_slice(&bytes[..SHORT_HEADER_BYTES]);
        Some((VnetHeader::parse(&short), bytes.split_off(header)))
    }

    fn buffer(&mut self) -> Option<Vec<u8>> {
        // Buffers are used in the order in which they were offered.
        let at = RX_DATA + RX_BYTES * u64::from(self.rx.used_seen % RING_SIZE);
        let (_, len) = self.rx.take_used()?;
        let mut bytes = vec![0; len as usize];
        self.map.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        Some(bytes)
    }
}

/// What an uplink got, and what it is to bring.
#[derive(Debug, Default)]
pub(super) struct Wire {
    pub(super) got: Vec<(PortId, VnetHeader, Vec<u8>)>,
    pub(super) bring: VecDeque<(VnetHeader, Vec<u8>)>,
    pub(super) full: bool,
}

struct TestUplink {
    wire: Arc<Mutex<Wire>>,
    offloads: Offloads,
}

impl Uplink for TestUplink {
    fn kind(&self) -> &'static str {
        "test"
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn waits_when_full(&self) -> bool {
        true
    }

    fn send(&mut self, frame: &OutFrame<'_>, from: Sender) -> Sent {
        let mut wire = self.wire.lock().unwrap();
        if wire.full {
            return Sent::Full;
        }
        wire.got.push((from.port, frame.meta, frame.to_vec()));
        Sent::Done
    }

    fn receive(&mut self, into: &mut dyn Ingress, _now: Instant) -> bool {
        let mut wire = self.wire.lock().unwrap();
        let mut moved = false;
        while let Some((meta, bytes)) = wire.bring.front() {
            if into.frame(&OutFrame::of(*meta, bytes)) == Taken::Full {
                break;
            }
            wire.bring.pop_front();
            moved = true;
        }
        moved
    }

    fn export(&self, _fds: &mut Fds, _now: Instant) -> Result<Value, NotNow> {
        Ok(Value::Null)
    }
}

/// See the module.
pub(super) struct Bed {
    pub(super) fabric: SwitchFabric,
    pub(super) ports: Vec<Port<NetPort>>,
    pub(super) guests: Vec<Guest>,
    pub(super) wire: Arc<Mutex<Wire>>,
    pub(super) now: Instant,
}

/// Everything that a port offers, but the parts that need more queues.
pub(super) const ALL_FEATURES: u64 = features::VERSION_1 | features::MRG_RXBUF;

impl Bed {
    /// Guests on ports with these specifications and features; with an uplink that takes `uplink` unfinished, if given.
    pub(super) fn new(ports: &[(PortSpec, u64)], uplink: Option<Offloads>) -> Self {
        let now = Instant::now();
        let wire = Arc::new(Mutex::new(Wire::default()));
        let up: Box<dyn Uplink> = match uplink {
            Some(offloads) => Box::new(TestUplink { wire: Arc::clone(&wire), offloads }),
            None => Box::new(NoUplink),
        };
        let mut specs: Vec<PortSpec> = ports.iter().map(|(spec, _)| spec.clone()).collect();
        specs.iter_mut().enumerate().for_each(|(at, spec)| spec.name = format!("p{at}"));
        let mut fabric = SwitchFabric::new(&specs, vec![up], 42, now);
        if super::second::is_wanted() {
            fabric.place_on_second(None).unwrap();
            fabric.busy_from = 0;
        }
        let guests: Vec<Guest> = ports.iter().map(|(_, features)| Guest::new(*features)).collect();
        let port = |(spec, (guest, (_, features))): (&PortSpec, (&Guest, &(PortSpec, u64)))| {
            let mut port = Port::new(Arc::from(&*spec.name), NetPort::new(spec.clone()));
            port.start_for_test(*features, Arc::clone(&guest.map), &guest.rings()).unwrap();
            port
        };
        let ports = specs.iter().zip(guests.iter().zip(ports)).map(port).collect();
        let mut this = Self { fabric, ports, guests, wire, now };
        this.pass();
        this
    }

    /// Plain ports.
    pub(super) fn plain(count: usize) -> Self {
        let mut bed = Self::new(&vec![(PortSpec::default(), ALL_FEATURES); count], None);
        bed.guests.iter_mut().for_each(|guest| guest.offer(32));
        bed
    }

    /// One pass of the data thread; whether anything moved. The books must balance after each.
    pub(super) fn pass(&mut self) -> bool {
        self.now += Duration::from_micros(10);
        if let Some(second) = &mut self.fabric.second {
            second.wait_for();
        }
        let moved = self.fabric.poll(&mut self.ports, self.now);
        self.ports.iter_mut().for_each(Port::settle_for_test);
        for switch in &self.fabric.switches {
            switch.account.balance().unwrap();
        }
        moved
    }

    /// Passes until nothing moves.
    pub(super) fn run(&mut self) {
        for _ in 0..1000 {
            if !self.pass() {
                return;
            }
        }
        panic!("it never comes to rest");
    }

    /// Has guest `at` say something, so that it is known where it is.
    pub(super) fn introduce(&mut self, at: usize) {
        let frame = ether(mac(at), Mac(0x0180_c200_0001), &[]);
        self.guests[at].send(VnetHeader::default(), &frame);
        self.run();
    }

    pub(super) fn drops(&self, port: PortId, reason: crate::switch::account::Reason) -> u64 {
        self.fabric.switches[0].account.get(port, 0).drops(reason)
    }
}

/// A frame of an experimental type.
pub(super) fn ether(src: Mac, dst: Mac, payload: &[u8]) -> Vec<u8> {
    let mut bytes = dst.bytes().to_vec();
    bytes.extend(src.bytes());
    bytes.extend([0x88, 0xb5]);
    bytes.extend(payload);
    bytes.resize(bytes.len().max(60), 0);
    bytes
}

/// The same with a tag.
pub(super) fn tagged(src: Mac, dst: Mac, tci: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = ether(src, dst, payload);
    let [a, b] = tci.to_be_bytes();
    bytes.splice(12..12, [0x81, 0, a, b]);
    bytes
}
