//! Sockets of datagrams that have no room: in a network of their own, whose neighbour does not say who it is until it is
//! wanted. Needs root and `ip`; says so and passes where they are missing.
#![allow(unsafe_code)] // `unshare` is unsafe for flags that are not used here.

use std::net::Ipv4Addr;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::bed::{Bed, GUEST, MAC, Stage};
use crate::frame::{OutFrame, VnetHeader};
use crate::switch::work::PortId;
use crate::uplink::{Sender, Sent, Uplink};
use crate::user::UserConfig;
use crate::user::packet::{Link, udp};

const THERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

fn ip(args: &str) -> bool {
    Command::new("ip").args(args.split(' ')).output().is_ok_and(|done| done.status.success())
}

/// A network for this thread alone.
fn network() -> bool {
    // SAFETY: a thread with another network keeps its memory and descriptors.
    let alone = unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.is_ok();
    alone
        && ip("link add v0 type veth peer name v1")
        && ip("addr add 192.0.2.1/24 dev v0")
        && ip("link set v0 up")
        && ip("link set v1 up")
        // More than a socket may have on its way.
        && std::fs::write("/proc/sys/net/ipv4/neigh/v0/unres_qlen_bytes", "16000000").is_ok()
}

/// Packets that came out at the other end.
fn came_out() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = text.lines().find_map(|line| line.trim().strip_prefix("v1:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn send(bed: &mut Bed, at: u16) -> Sent {
    let us = Link { mac: UserConfig::default().mac, vid: 0 };
    let frame = udp(MAC, us, (GUEST.into(), 4000), (THERE.into(), 9), &[at as u8; 1400]);
    let from = Sender { port: PortId(0), vid: 0, now: Instant::now() };
    bed.stack.send(&OutFrame::of(VnetHeader::default(), &frame), from)
}

#[test]
fn a_datagram_waits_for_room_in_its_socket_but_not_for_ever() {
    let done = std::thread::spawn(|| {
        if !network() {
            eprintln!("skipped: no network namespace, or no `ip`");
            return;
        }
        let mut bed = Bed::new("", Stage::default());
        let mut taken = 0;
        // The kernel keeps what it has no address for, until the socket's part of that is used up.
        while send(&mut bed, taken) == Sent::Done {
            taken += 1;
            assert!(taken < 10_000, "the socket takes everything");
        }
        assert_eq!((bed.counter("/drops/not_sent"), bed.counter("/udp_send_waits")), (0, 1));
        assert_eq!(send(&mut bed, taken), Sent::Full, "it still waits");
        assert_eq!(bed.counter("/frames"), u64::from(taken));
        // Nobody answers: others are not held up for long.
        let begin = Instant::now();
        while send(&mut bed, taken) == Sent::Full {
            assert!(begin.elapsed() < Duration::from_secs(10), "it waits for ever");
            bed.step();
        }
        assert_eq!(bed.counter("/drops/not_sent"), 1);
        // Now the neighbour is known, everything goes, and the socket takes more.
        assert!(ip("neigh replace 192.0.2.7 lladdr 02:00:00:00:00:07 dev v0"));
        let before = came_out();
        bed.until("room", |bed| {
            let dropped = bed.counter("/drops/not_sent");
            send(bed, taken) == Sent::Done && bed.counter("/drops/not_sent") == dropped
        });
        for _ in 0..500 {
            bed.until("sent", |bed| send(bed, taken) == Sent::Done);
        }
        assert!(came_out() >= before + 500 && came_out() >= u64::from(taken), "{} of {taken}", came_out());
    });
    done.join().unwrap();
}
