//! The stack between a guest that is not ours and sockets of the host.

mod bed;
mod keep;
mod room;
mod services;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread::JoinHandle;
use std::time::Duration;

use smoltcp::socket::tcp::State;
use smoltcp::socket::udp;

use self::bed::{Bed, GUEST, Stage};
use crate::uplink::Uplink;

const GATEWAY: std::net::IpAddr = std::net::IpAddr::V4(Ipv4Addr::new(10, 0, 2, 2));

fn pattern(at: usize) -> u8 {
    ((at ^ at >> 8 ^ at >> 16).wrapping_mul(31)) as u8
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(pattern).collect()
}

/// A peer on the host that does `job` with the first connection.
fn peer<T: Send + 'static>(job: impl FnOnce(TcpStream) -> T + Send + 'static) -> (u16, JoinHandle<T>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (port, std::thread::spawn(move || job(listener.accept().unwrap().0)))
}

/// The guest sends `len` bytes and gets `len` bytes, over a stage.
fn both_ways(stage: Stage, len: usize, window: usize) {
    both_ways_in(Bed::new("", stage), len, window);
}

fn both_ways_in(mut bed: Bed, len: usize, window: usize) -> Bed {
    let (port, peer) = peer(move |mut stream| {
        let mut writer = stream.try_clone().unwrap();
        let sender = std::thread::spawn(move || {
            writer.write_all(&bytes(len)).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        sender.join().unwrap();
        got
    });
    let handle = bed.connect((GATEWAY, port), window);
    let (data, mut sent, mut got) = (bytes(len), 0, Vec::new());
    bed.until("transfer", |bed| {
        let socket = bed.socket(handle);
        if socket.can_send() && sent < data.len() {
            sent += socket.send_slice(&data[sent..]).unwrap();
            if sent == data.len() {
                socket.close();
            }
        }
        let mut buffer = [0; 65_536];
        if let Ok(len) = socket.recv_slice(&mut buffer) {
            got.extend_from_slice(&buffer[..len]);
        }
        sent == data.len()
            && got.len() >= data.len()
            && matches!(socket.state(), State::TimeWait | State::Closed)
    });
    assert!(got == data, "what the guest got");
    assert!(peer.join().unwrap() == data, "what the peer got");
    bed.until("closed", |bed| bed.stack.flows().0 == 0);
    assert_eq!(bed.counter("/drops/malformed") + bed.counter("/drops/checksum"), 0);
    assert_eq!((bed.counter("/tcp_resets/0"), bed.counter("/tcp_resets/1")), (0, 0));
    assert_eq!(bed.stack.status()["ahead_bytes"], 0, "memory for what is out of order");
    bed
}

#[test]
fn bytes_go_both_ways_and_both_ends_close() {
    both_ways(Stage::default(), 300_000, 65_535);
}

#[test]
fn bytes_go_both_ways_where_nothing_can_be_peeked_at_an_offset() {
    let mut bed = Bed::new("", Stage { rows: true, ..Stage::default() });
    bed.stack.shared.peeks = false;
    both_ways_in(bed, 300_000, 200_000);
}

#[test]
fn rows_of_segments_reach_a_guest_that_takes_them() {
    both_ways(Stage { rows: true, ..Stage::default() }, 2_000_000, 200_000);
}

#[test]
fn a_small_window_and_a_small_ring_do_not_stall_it() {
    both_ways(Stage { room: 2, ..Stage::default() }, 60_000, 3_000);
}

#[test]
fn delay_and_loss_do_not_stall_it() {
    for (delay_ms, loss) in [(1, 10), (10, 1), (25, 10)] {
        let delay = Duration::from_millis(delay_ms);
        both_ways(Stage { delay, loss, rows: true, ..Stage::default() }, 150_000, 200_000);
    }
}

#[test]
fn what_comes_behind_a_gap_is_kept_and_told() {
    let stage = Stage { delay: Duration::from_millis(5), loss: 30, rows: true, ..Stage::default() };
    let bed = both_ways_in(Bed::new("", stage), 400_000, 200_000);
    let (kept, filled) = (bed.counter("/tcp_kept_bytes"), bed.counter("/tcp_filled_bytes"));
    assert!(kept >= filled && filled > 0, "{kept} kept, {filled} filled");
    assert!(bed.counter("/tcp_sacks") > 0);
    assert_eq!(bed.counter("/tcp_not_kept_bytes"), 0);
    // With no memory for it, it still gets through.
    // With no memory for it, it still gets through; this guest then takes its time, so that little is asked of it.
    let bed = both_ways_in(Bed::new("ahead=0", Stage { loss: 10, ..stage }), 60_000, 20_000);
    assert_eq!(bed.counter("/tcp_kept_bytes"), 0);
}

#[test]
fn a_connection_that_nobody_takes_is_refused() {
    let mut bed = Bed::new("", Stage::default());
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let handle = bed.connect((GATEWAY, free), 4096);
    bed.until("refusal", |bed| bed.socket(handle).state() == State::Closed);
    assert_eq!((bed.counter("/tcp_refused"), bed.stack.flows().0), (1, 0));
    // Nobody is asked for what is no address of a host.
    let handle = bed.connect((Ipv4Addr::new(127, 0, 0, 1).into(), free), 4096);
    bed.until("drop", |bed| bed.counter("/drops/bad_target") != 0);
    bed.socket(handle).abort();
}

#[test]
fn the_host_is_out_of_reach_if_that_is_wanted() {
    let mut bed = Bed::new("host=off", Stage::default());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let handle = bed.connect((GATEWAY, listener.local_addr().unwrap().port()), 4096);
    bed.until("refusal", |bed| bed.socket(handle).state() == State::Closed);
}

#[test]
fn a_reset_passes_either_way() {
    let mut bed = Bed::new("", Stage::default());
    let (port, there) = peer(|mut stream| stream.read(&mut [0; 10]).map_err(|error| error.kind()));
    let handle = bed.connect((GATEWAY, port), 4096);
    bed.until("open", |bed| bed.socket(handle).state() == State::Established);
    bed.socket(handle).abort();
    bed.until("reset", |bed| bed.stack.flows().0 == 0);
    assert_eq!(there.join().unwrap(), Err(std::io::ErrorKind::ConnectionReset));

    let (port, there) =
        peer(|stream| socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap());
    let handle = bed.connect((GATEWAY, port), 4096);
    bed.until("open", |bed| bed.socket(handle).state() != State::SynSent);
    there.join().unwrap();
    bed.until("reset", |bed| bed.socket(handle).state() == State::Closed && bed.stack.flows().0 == 0);
}

#[test]
fn half_a_connection_goes_on() {
    half_a_connection(&mut Bed::new("", Stage::default()));
}

/// Before Linux 6.9 a TCP socket cannot be peeked at an offset. Then what the guest has not acknowledged yet hides the end
/// behind it, of which the kernel tells once.
#[test]
fn half_a_connection_goes_on_where_nothing_can_be_peeked_at_an_offset() {
    for _ in 0..3 {
        let mut bed = Bed::new("", Stage::default());
        bed.stack.shared.peeks = false;
        half_a_connection(&mut bed);
    }
}

fn half_a_connection(bed: &mut Bed) {
    // The peer answers when the guest's end has come.
    let (port, there) = peer(|mut stream| {
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        got.reverse();
        stream.write_all(&got).unwrap();
    });
    let handle = bed.connect((GATEWAY, port), 4096);
    bed.until("open", |bed| bed.socket(handle).can_send());
    bed.socket(handle).send_slice(b"abc").unwrap();
    bed.socket(handle).close();
    let mut got = Vec::new();
    bed.until("answer", |bed| {
        let mut buffer = [0; 64];
        if let Ok(len) = bed.socket(handle).recv_slice(&mut buffer) {
            got.extend_from_slice(&buffer[..len]);
        }
        got == b"cba"
    });
    there.join().unwrap();
    bed.until("closed", |bed| bed.stack.flows().0 == 0);
}

#[test]
fn a_window_that_was_closed_opens_again() {
    let mut bed = Bed::new("", Stage { rows: true, ..Stage::default() });
    let (go, wait) = std::sync::mpsc::channel();
    const LEN: usize = 8 << 20;
    // The peer does not read before it is told, and then all of it.
    let (port, there) = peer(move |mut stream| {
        wait.recv().unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        got == bytes(LEN)
    });
    let handle = bed.connect((GATEWAY, port), 1 << 20);
    let (data, mut sent, mut told) = (bytes(LEN), 0, false);
    bed.until("all is sent", |bed| {
        let room = bed.stack.tcp.list().first().map_or(u64::MAX, |flow| flow["window"].as_u64().unwrap());
        if !told && sent != 0 && room < 2000 {
            told = true;
            go.send(()).unwrap();
        }
        let socket = bed.socket(handle);
        if socket.can_send() && sent < LEN {
            sent += socket.send_slice(&data[sent..]).unwrap();
        }
        sent == LEN && socket.send_queue() == 0
    });
    assert!(told, "the window was never closed");
    bed.socket(handle).close();
    assert!(bed.counter("/tcp_repeats") <= 2, "{:#}", bed.stack.counters());
    bed.until("end", |_| there.is_finished());
    assert!(there.join().unwrap());
}

#[test]
fn connections_in_all_orders_leave_nothing() {
    let mut bed = Bed::new("", Stage::default());
    let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut before = 0;
    // Who ends first, and how: each side closes, resets, or does half of it.
    for round in 0..3 {
        for order in 0..12 {
            let handle = bed.connect((GATEWAY, port), 4096);
            bed.until("open", |bed| bed.socket(handle).state() == State::Established);
            let mut stream = None;
            bed.until("accepted", |_| {
                stream = listener.accept().ok().map(|(stream, _)| stream);
                stream.is_some()
            });
            let mut stream = stream;
            let guest = |bed: &mut Bed| {
                if order % 2 == 0 { bed.socket(handle).close() } else { bed.socket(handle).abort() }
            };
            let host = |stream: &mut Option<TcpStream>| {
                let Some(it) = stream.take() else { return };
                match order / 2 % 3 {
                    0 => drop(it),
                    1 => {
                        socket2::SockRef::from(&it).set_linger(Some(Duration::ZERO)).unwrap();
                        drop(it);
                    }
                    _ => {
                        let _ = it.shutdown(std::net::Shutdown::Write);
                        drop(it);
                    }
                }
            };
            if order < 6 {
                guest(&mut bed);
                bed.step();
                host(&mut stream);
            } else {
                host(&mut stream);
                bed.step();
                guest(&mut bed);
            }
            bed.until("over", |bed| {
                !bed.socket(handle).is_open() || bed.socket(handle).state() == State::TimeWait
            });
            bed.sockets.remove(handle);
        }
        bed.until("nothing left", |bed| bed.stack.flows() == (0, 0));
        if round == 0 {
            before = fds();
        }
    }
    // Other tests run beside this one in the same process, unless each has its own.
    assert!(fds() <= before + 64, "{before} descriptors became {}", fds());
}

#[test]
fn a_forward_reaches_the_guest_and_is_gone_when_it_is_removed() {
    let mut bed = Bed::new("hostfwd=tcp:127.0.0.1:0-80", Stage::default());
    let bound: SocketAddr = bed.stack.status()["forwards"][0]["bound"].as_str().unwrap().parse().unwrap();
    let handle = bed.tcp(4096);
    bed.socket(handle).listen(80).unwrap();
    let client = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(bound).unwrap();
        stream.write_all(b"ping").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        got
    });
    bed.until("question", |bed| {
        let mut buffer = [0; 8];
        let got = bed.socket(handle).recv_slice(&mut buffer).unwrap_or(0);
        &buffer[..got] == b"ping"
    });
    let remote = bed.socket(handle).remote_endpoint().unwrap();
    assert_eq!(std::net::IpAddr::from(remote.addr), GATEWAY);
    bed.socket(handle).send_slice(b"pong").unwrap();
    bed.socket(handle).close();
    bed.until("answer", |_| client.is_finished());
    assert_eq!(client.join().unwrap(), b"pong");
    // Nobody listens in the guest: the client is told.
    let client =
        std::thread::spawn(move || TcpStream::connect(bound).and_then(|mut it| it.read(&mut [0; 1])));
    bed.until("refusal", |_| client.is_finished());
    assert_eq!(client.join().unwrap().unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    let args = serde_json::json!({ "forward": "tcp:127.0.0.1:0-80" });
    let args = args.as_object().unwrap();
    bed.stack.command("forward-remove", args, std::time::Instant::now()).unwrap().unwrap();
    assert_eq!(TcpStream::connect(bound).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(bed.stack.command("forward-remove", args, std::time::Instant::now()).unwrap().is_err());
}

#[test]
fn datagrams_go_both_ways_and_nobody_is_told() {
    let mut bed = Bed::new("", Stage::default());
    let there = UdpSocket::bind("127.0.0.1:0").unwrap();
    there.set_nonblocking(true).unwrap();
    let to = (GATEWAY, there.local_addr().unwrap().port());
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 16], vec![0; 65_536]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(5000).unwrap();
    let handle = bed.sockets.add(socket);
    bed.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(b"hello", to).unwrap();
    let mut peer = None;
    bed.until("arrival", |_| {
        let mut buffer = [0; 16];
        peer = there.recv_from(&mut buffer).ok().map(|(len, from)| (buffer[..len].to_vec(), from));
        peer.is_some()
    });
    let (got, from) = peer.unwrap();
    assert_eq!(got, b"hello");
    there.send_to(b"hello yourself", from).unwrap();
    bed.until("answer", |bed| {
        let socket = bed.sockets.get_mut::<udp::Socket<'_>>(handle);
        socket.recv().is_ok_and(|(bytes, meta)| {
            assert_eq!((bytes, meta.endpoint.port), (&b"hello yourself"[..], to.1));
            true
        })
    });
    // Whom the guest did not speak to does not get in: another address of the loopback network.
    let stranger = UdpSocket::bind("127.0.0.2:0").unwrap();
    stranger.send_to(b"let me in", (Ipv4Addr::LOCALHOST, from.port())).unwrap();
    bed.until("stranger", |bed| bed.counter("/drops/bad_source") == 1);
    // A port that nobody has.
    drop(there);
    bed.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(b"anyone?", to).unwrap();
    bed.until("error", |bed| bed.counter("/unreachable") != 0);
    assert_eq!((GUEST, bed.stack.flows()), (Ipv4Addr::new(10, 0, 2, 15), (0, 1)));
}
