//! A hostile guest on one port of a switch, on a split or a packed ring: it writes what it likes where it likes in its
//! memory, and its frames, with any metadata, go to two guests that keep to the rules and to the user-mode stack. Commands
//! of the control socket come between.
//!
//! Holds: the books balance; the other guests get whole frames in whole buffers; when the hostile one is through, their
//! traffic passes as if it had never been there.
#![no_main]

use std::sync::Arc;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use vcp_core::fabric::Fabric;
use vcp_core::mem::GuestMap;
use vcp_core::queue::RingAddresses;
use vcp_core::vu::port::Port;
use vcp_net::frame::{Mac, VnetHeader};
use vcp_net::port::{NetPort, PortSpec, features};
use vcp_net::switch::SwitchFabric;
use vcp_net::uplink::Uplink;
use vcp_net::uplink::none::NoUplink;
use vcp_net::user::{UserConfig, UserStack};
use vm_memory::{Bytes, GuestAddress};

#[path = "../support/input.rs"]
mod input;
#[path = "../../vcp-core/tests/support/mod.rs"]
#[allow(clippy::pedantic)]
mod ring;
#[path = "../support/world.rs"]
mod world;
use input::Input;
use ring::DriverRing;

const MEMORY: usize = 1 << 20;
const RX_RING: u64 = 0x1000;
const TX_RING: u64 = 0x3000;
const RX_DATA: u64 = 0x1_0000;
const RX_BYTES: u64 = 0x800;
const TX_DATA: u64 = 0x8_0000;
const SIZE: u16 = 64;
/// Offered by the server for every device.
const PACKED: u64 = 1 << 34;
const HEADER: usize = 12;

fn mac(at: usize) -> Mac {
    Mac(0x0200_0000_0010 + at as u64)
}

struct Guest {
    map: Arc<GuestMap>,
    rx: DriverRing,
    tx: DriverRing,
}

impl Guest {
    fn new() -> Self {
        let map = Arc::new(GuestMap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory"));
        let rx = DriverRing::new(&map, RX_RING, SIZE, true);
        let tx = DriverRing::new(&map, TX_RING, SIZE, true);
        Self { map, rx, tx }
    }

    fn rings(&self) -> [(u32, RingAddresses, u32); 2] {
        [(0, &self.rx), (1, &self.tx)].map(|(queue, ring)| {
            let &DriverRing { size, desc, avail, used, .. } = ring;
            (queue, RingAddresses { size, desc, avail, used }, 0)
        })
    }

    fn offer(&mut self) {
        let at = RX_DATA + RX_BYTES * u64::from(self.rx.avail_idx % SIZE);
        let _ = self.rx.add(&[(at, RX_BYTES as u32, true)]);
    }

    fn send(&mut self, bytes: &[u8]) {
        self.map.write_slice(&VnetHeader::default().emit(), GuestAddress(TX_DATA)).expect("inside");
        self.map.write_slice(bytes, GuestAddress(TX_DATA + HEADER as u64)).expect("inside");
        self.tx.add(&[(TX_DATA, (HEADER + bytes.len()) as u32, false)]).expect("room");
    }

    /// The next frame; its buffers go back.
    fn receive(&mut self) -> Option<Vec<u8>> {
        let mut bytes = self.buffer()?;
        let count = u16::from_le_bytes([bytes[10], bytes[11]]);
        assert!(count != 0, "a frame in no buffer");
        for _ in 1..count {
            bytes.extend(self.buffer().expect("all buffers of a frame at once"));
        }
        assert!(bytes.len() >= HEADER + 14, "a short frame");
        Some(bytes.split_off(HEADER))
    }

    fn buffer(&mut self) -> Option<Vec<u8>> {
        let at = RX_DATA + RX_BYTES * u64::from(self.rx.used_seen % SIZE);
        let (_, len) = self.rx.take_used()?;
        assert!(u64::from(len) <= RX_BYTES, "more than the buffer has room for");
        let mut bytes = vec![0; len as usize];
        self.map.read_slice(&mut bytes, GuestAddress(at)).expect("inside");
        self.offer();
        Some(bytes)
    }
}

struct Bed {
    fabric: SwitchFabric,
    ports: Vec<Port<NetPort>>,
    /// The first is the hostile one.
    guests: Vec<Guest>,
    now: Instant,
}

impl Bed {
    fn pass(&mut self) -> bool {
        self.now += Duration::from_micros(10);
        let moved = self.fabric.poll(&mut self.ports, self.now);
        self.ports.iter_mut().for_each(Port::settle_for_test);
        moved
    }

    fn command(&mut self, name: &str, args: Value) -> Option<Value> {
        let Value::Object(args) = args else { return None };
        let rest = self.fabric.command(&mut self.ports, name, &args, self.now)?.ok()?;
        rest.finish().ok()
    }

    /// The guests that keep to the rules take what they got.
    fn take(&mut self) -> Vec<(usize, Vec<u8>)> {
        let mut all = Vec::new();
        for (at, guest) in self.guests.iter_mut().enumerate().skip(1) {
            while guest.tx.take_used().is_some() {}
            while let Some(frame) = guest.receive() {
                all.push((at, frame));
            }
        }
        all
    }
}

fn ether(src: Mac, dst: Mac, tail: &[u8]) -> Vec<u8> {
    let mut bytes = dst.bytes().to_vec();
    bytes.extend(src.bytes());
    bytes.extend([0x88, 0xb5]);
    bytes.extend_from_slice(tail);
    bytes.resize(bytes.len().max(60), 0);
    bytes
}

/// A descriptor of the hostile guest's, in either format: the same 16 bytes, the last four with another meaning.
fn descriptor(map: &GuestMap, ring: u64, input: &mut Input<'_>) {
    let index = u64::from(input.byte()) % u64::from(SIZE);
    let addr = match input.byte() {
        0..=99 => TX_DATA + u64::from(input.byte()) * 16,
        100..=239 => RX_DATA + u64::from(input.word()),
        _ => u64::from(input.long()) << 8,
    };
    let len = match input.byte() {
        0..=199 => u32::from(input.word()) & 0x7ff,
        200..=249 => u32::from(input.word()),
        _ => input.long(),
    };
    let (a, b) = (input.word(), input.word());
    let at = GuestAddress(ring + 16 * index);
    let tail = u64::from(len) | u64::from(a) << 32 | u64::from(b) << 48;
    map.write_obj(addr, at).expect("inside");
    map.write_obj(tail, GuestAddress(at.0 + 8)).expect("inside");
}

fn set(input: &mut Input<'_>) -> Value {
    let number = input.word();
    let mut value = match input.byte() % 8 {
        0 => json!({ "vlan": { "access": number } }),
        1 => json!({ "vlan": { "trunk": { "native": number, "allowed": [number, 7] } } }),
        2 => json!({ "on_full": "drop" }),
        3 => json!({ "on_full": "wait" }),
        4 => json!({ "rate": { "bytes": number, "frames": input.word() } }),
        5 => json!({ "protect": number & 1 == 0 }),
        6 => json!({ "link": number & 1 == 0 }),
        _ => serde_json::from_slice(input.bytes(80)).unwrap_or(Value::Null),
    };
    if value.is_object() {
        value["port"] = "p0".into();
    }
    value
}

fn run(data: &[u8]) -> Option<()> {
    let mut input = Input(data);
    let (options, acked) = (input.byte(), input.long());
    let now = Instant::now();
    let uplink: Box<dyn Uplink> = if options & 1 == 0 {
        Box::new(NoUplink)
    } else {
        Box::new(UserStack::open("dns=127.0.0.1".parse::<UserConfig>().expect("options")).expect("a stack"))
    };
    let spec = |at: usize| PortSpec {
        name: format!("p{at}"),
        mac: Some(mac(at)),
        protect: options & 2 != 0,
        ..PortSpec::default()
    };
    let specs: Vec<PortSpec> = (0..3).map(spec).collect();
    let fabric = SwitchFabric::new(&specs, vec![uplink], 42, now);
    let mut guests: Vec<Guest> = (0..3).map(|_| Guest::new()).collect();
    let mut ports = Vec::new();
    for (at, (spec, guest)) in specs.iter().zip(&guests).enumerate() {
        let mut port = Port::new(Arc::from(&*spec.name), NetPort::new(spec.clone()));
        let good = features::VERSION_1 | features::MRG_RXBUF | 1 << 29;
        let offered = features::offered(spec);
        let (chosen, base) = match (at, options & 4) {
            (0, 0) => (offered & (u64::from(acked) << 8 | 1 << 32 | u64::from(acked)), 0),
            (0, _) => (offered & (u64::from(acked) << 8 | u64::from(acked)) | 1 << 32 | PACKED, 0x8000_8000),
            _ => (good, 0),
        };
        let rings = guest.rings().map(|(queue, ring, _)| (queue, ring, base));
        port.start_for_test(chosen, Arc::clone(&guest.map), &rings).expect("it starts");
        ports.push(port);
    }
    for guest in &mut guests[1..] {
        (0..SIZE / 2).for_each(|_| guest.offer());
    }
    let mut bed = Bed { fabric, ports, guests, now };
    bed.pass();
    let (mut avail, mut sets) = ([0u16; 2], false);
    while !input.is_empty() {
        let hostile = &bed.guests[0];
        match input.byte() % 12 {
            0..=2 => {
                let ring = if input.byte() & 3 == 0 { RX_RING } else { TX_RING };
                descriptor(&hostile.map, ring, &mut input);
            }
            // Anything anywhere.
            3 => {
                let at = u64::from(input.word()) * 4 % (MEMORY as u64 - 256);
                let bytes = input.bytes(255);
                hostile.map.write_slice(bytes, GuestAddress(at)).expect("inside");
            }
            // A header and a frame where descriptors point to.
            4 | 5 => {
                let at = TX_DATA + u64::from(input.byte()) * 16;
                let mut header = [0; HEADER];
                if input.byte() & 1 == 0 {
                    header[..10].fill_with(|| input.byte());
                }
                let to = [mac(1), mac(2), Mac::BROADCAST, UserConfig::default().mac]
                    [usize::from(input.byte() & 3)];
                let mut frame = ether(mac(usize::from(input.byte() & 1)), to, &[]);
                frame.truncate(12);
                frame.extend([[8, 0], [0x86, 0xdd], [0x81, 0], [8, 6]][usize::from(input.byte() & 3)]);
                frame.extend_from_slice(input.bytes(200));
                hostile.map.write_slice(&header, GuestAddress(at)).expect("inside");
                hostile.map.write_slice(&frame, GuestAddress(at + HEADER as u64)).expect("inside");
            }
            // A head made available; the index as it should be, or not.
            6 | 7 => {
                let which = usize::from(input.byte() & 3 != 0);
                let ring = if which == 0 { &hostile.rx } else { &hostile.tx };
                let (head, jump) = (input.byte(), input.byte());
                let slot = ring.avail + 4 + 2 * u64::from(avail[which] % SIZE);
                hostile.map.write_obj(u16::from(head) % (SIZE + 1), GuestAddress(slot)).expect("inside");
                avail[which] = avail[which].wrapping_add(if jump < 250 { 1 } else { u16::from(jump) });
                ring.set_avail_idx(avail[which]);
            }
            8 => {
                let at = 1 + usize::from(input.byte() & 1);
                if bed.guests[at].tx.used_idx() == bed.guests[at].tx.avail_idx {
                    let to = if input.byte() & 1 == 0 { mac(0) } else { Mac::BROADCAST };
                    let tail = input.bytes(255).to_vec();
                    bed.guests[at].send(&ether(mac(at), to, &tail));
                }
            }
            9 => {
                sets = true;
                let args = set(&mut input);
                let _ = bed.command("set", args);
            }
            10 => {
                let name = ["ports", "macs", "groups", "flush", "flows"][usize::from(input.byte()) % 5];
                let _ = bed.command(name, json!({}));
            }
            _ => bed.now += Duration::from_millis(u64::from(input.byte())),
        }
        bed.pass();
        bed.take();
    }
    // It is through: whatever waits for it is given up after a while, and then the others have the switch to themselves.
    bed.now += Duration::from_secs(2);
    for _ in 0..64 {
        bed.pass();
        bed.take();
    }
    if sets {
        let _ =
            bed.command("set", json!({ "port": "p0", "vlan": { "trunk": { "native": 0, "allowed": [] } } }));
    }
    let wanted = [ether(mac(1), mac(2), b"to the second"), ether(mac(2), mac(1), b"to the first")];
    let mut got = [false; 2];
    for _ in 0..8 {
        for at in [1, 2] {
            let guest = &mut bed.guests[at];
            if guest.tx.used_idx() == guest.tx.avail_idx {
                guest.send(&wanted[at - 1]);
            }
        }
        bed.now += Duration::from_millis(100);
        for _ in 0..16 {
            bed.pass();
            for (at, frame) in bed.take() {
                got[0] |= at == 2 && frame == wanted[0];
                got[1] |= at == 1 && frame == wanted[1];
            }
        }
    }
    assert_eq!(got, [true; 2], "the others' frames did not pass");
    let counters = bed.command("counters", json!({})).expect("counters");
    let text = counters.to_string();
    assert!(text.contains("\"balanced\":true") && !text.contains("\"balanced\":false"), "{text}");
    bed.fabric.close(Duration::ZERO);
    Some(())
}

fuzz_target!(init: world::leave(), |data: &[u8]| {
    run(data);
});
