//! The stack goes on in another process, and frames wait for room.

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::time::Instant;

use smoltcp::socket::tcp::State;
use smoltcp::socket::udp;
use vcp_core::handover::Fds;

use super::bed::{Bed, Stage};
use super::{GATEWAY, bytes, peer};
use crate::uplink::Uplink;
use crate::user::UserStack;

/// As a hand-over does it, the text between processes included.
fn replace(bed: &mut Bed) {
    let mut fds = Fds::default();
    let state = bed.stack.export(&mut fds, Instant::now()).unwrap();
    let state = serde_json::from_str(&state.to_string()).unwrap();
    bed.stack = UserStack::restore(state, &mut fds).unwrap();
    fds.finish().unwrap();
}

#[test]
fn a_transfer_goes_on_in_one_stack_after_another() {
    goes_on(Stage { rows: true, ..Stage::default() }, 1_500_000);
}

#[test]
fn a_hand_over_throws_away_what_came_out_of_order_and_loses_nothing() {
    let delay = std::time::Duration::from_millis(3);
    goes_on(Stage { rows: true, loss: 20, delay, ..Stage::default() }, 400_000);
}

fn goes_on(stage: Stage, len: usize) {
    let mut bed = Bed::new("hostfwd=tcp:127.0.0.1:0-80", stage);
    let (port, there) = peer(move |mut stream| {
        let mut writer = stream.try_clone().unwrap();
        let sender = std::thread::spawn(move || {
            writer.write_all(&bytes(len)).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        sender.join().unwrap();
        got == bytes(len)
    });
    let bound = bed.stack.status()["forwards"].clone();
    let handle = bed.connect((GATEWAY, port), 60_000);
    let (data, mut sent, mut got, mut steps) = (bytes(len), 0, Vec::new(), 0u32);
    bed.until("transfer", |bed| {
        steps += 1;
        if steps.is_multiple_of(40) {
            replace(bed);
        }
        let socket = bed.socket(handle);
        if socket.can_send() && sent < len {
            sent += socket.send_slice(&data[sent..]).unwrap();
            if sent == len {
                socket.close();
            }
        }
        let mut buffer = [0; 65_536];
        if let Ok(more) = socket.recv_slice(&mut buffer) {
            got.extend_from_slice(&buffer[..more]);
        }
        sent == len && got.len() >= len && matches!(socket.state(), State::TimeWait | State::Closed)
    });
    assert!(steps > 80, "it was hardly ever replaced");
    assert!(got == data && there.join().unwrap());
    bed.until("closed", |bed| bed.stack.flows().0 == 0);
    assert_eq!((bed.counter("/tcp_resets/0"), bed.counter("/tcp_resets/1")), (0, 0));
    assert_eq!(bed.stack.status()["forwards"], bound);
    assert!(std::net::TcpStream::connect(bound[0]["bound"].as_str().unwrap()).is_ok());
}

#[test]
fn what_is_no_state_is_refused() {
    let bed = Bed::new("", Stage::default());
    let mut fds = Fds::default();
    let good = bed.stack.export(&mut fds, Instant::now()).unwrap();
    for key in ["config", "ms", "tcp", "listeners"] {
        let mut bad = good.clone();
        bad[key] = serde_json::json!("nonsense");
        assert!(UserStack::restore(bad, &mut Fds::default()).is_err(), "{key}");
    }
    assert!(UserStack::restore(good, &mut fds).is_ok());
}

#[test]
fn datagrams_wait_for_a_guest_without_room_and_a_flow_goes_on() {
    const MANY: u32 = 200;
    let mut bed = Bed::new("", Stage { room: 1, ..Stage::default() });
    let there = UdpSocket::bind("127.0.0.1:0").unwrap();
    there.set_nonblocking(true).unwrap();
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 65_536]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(5000).unwrap();
    let handle = bed.sockets.add(socket);
    let to = (GATEWAY, there.local_addr().unwrap().port());
    bed.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(b"hello", to).unwrap();
    let mut from = None;
    bed.until("arrival", |_| {
        from = there.recv_from(&mut [0; 16]).ok().map(|(_, from)| from);
        from.is_some()
    });
    for number in 0..MANY {
        there.send_to(&number.to_le_bytes(), from.unwrap()).unwrap();
    }
    replace(&mut bed);
    let mut expected = 0u32;
    bed.until("all of them, in their order", |bed| {
        let socket = bed.sockets.get_mut::<udp::Socket<'_>>(handle);
        while let Ok((bytes, _)) = socket.recv() {
            assert_eq!(bytes, expected.to_le_bytes());
            expected += 1;
        }
        expected == MANY
    });
}

/// More than the host's socket has room for: what is missing at the guest is what is counted, to the last one.
#[test]
fn datagrams_that_are_lost_are_lost_in_one_place_and_counted() {
    const MANY: u32 = 8_000;
    let mut bed = Bed::new("", Stage { room: 4, ..Stage::default() });
    let there = UdpSocket::bind("127.0.0.1:0").unwrap();
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 65_536]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(5000).unwrap();
    let handle = bed.sockets.add(socket);
    let to = (GATEWAY, there.local_addr().unwrap().port());
    bed.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(b"hello", to).unwrap();
    bed.step();
    bed.step();
    let (_, from) = there.recv_from(&mut [0; 16]).unwrap();
    let message = |number: u32| [&number.to_le_bytes()[..], &[0; 1200]].concat();
    // The guest has no turn meanwhile.
    for number in 0..MANY {
        there.send_to(&message(number), from).unwrap();
    }
    let (mut got, mut last) = (0u32, None);
    let mut take = |bed: &mut Bed, until: u32| {
        let socket = bed.sockets.get_mut::<udp::Socket<'_>>(handle);
        while let Ok((bytes, _)) = socket.recv() {
            let number = u32::from_le_bytes(bytes[..4].try_into().unwrap());
            assert!(last.is_none_or(|last| last < number), "{number} after {last:?}");
            (got, last) = (got + 1, Some(number));
        }
        (last == Some(until)).then_some(got)
    };
    // What had no room is told with the next one that has.
    let mut number = MANY;
    let mut arrived = None;
    bed.until("the rest, and one that tells what is missing", |bed| {
        if bed.counter("/udp/1") != 0 && bed.stack.udp.is_drained() && number == MANY {
            there.send_to(&message(number), from).unwrap();
            number += 1;
        }
        arrived = take(bed, MANY);
        arrived.is_some()
    });
    let lost = bed.counter("/udp_overflow");
    assert_eq!(u64::from(arrived.unwrap()) + lost, u64::from(MANY) + 1, "{lost} counted");
    assert!(lost != 0 && bed.counter("/udp_waits") != 0, "too few to tell");
}
