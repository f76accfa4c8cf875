//! iceoryx2: publish-subscribe between two processes, as its own benchmarks set it up: no history, no overflow, one of each.

use std::hint::{black_box, spin_loop};
use std::process::{Child, Command};
use std::time::Instant;

use iceoryx2::port::publisher::Publisher;
use iceoryx2::port::subscriber::Subscriber;
use iceoryx2::prelude::*;
use iceoryx2::service::port_factory::PortFactory as _;
use iceoryx2::service::port_factory::publish_subscribe::PortFactory;

use crate::pair::{self, quantiles};
use crate::{Measurement, Sample};

pub const ALL: [Measurement; 2] =
    [("iceoryx2 pub-sub 32 B", stream), ("iceoryx2 round trip, busy", round_trip)];

type Message = [u64; 4];
type Service = ipc::Service;

const STREAM: u64 = 300_000;
const TRIPS: u64 = 100_000;

fn node() -> Node<Service> {
    set_log_level(LogLevel::Error);
    NodeBuilder::new().create::<Service>().expect("node")
}

fn service(node: &Node<Service>, name: &str) -> PortFactory<Service, Message, ()> {
    node.service_builder(&name.try_into().expect("name"))
        .publish_subscribe::<Message>()
        .enable_safe_overflow(false)
        .history_size(0)
        .max_publishers(1)
        .max_subscribers(1)
        .subscriber_max_buffer_size(1024)
        .subscriber_max_borrowed_samples(4)
        .open_or_create()
        .expect("service")
}

struct Side {
    _node: Node<Service>,
    to: Publisher<Service, Message, ()>,
    from: Subscriber<Service, Message, ()>,
    services: [PortFactory<Service, Message, ()>; 2],
}

impl Side {
    fn new(to: &str, from: &str) -> Self {
        let node = node();
        let services = [service(&node, to), service(&node, from)];
        let publisher = services[0].publisher_builder();
        let to = publisher.backpressure_strategy(BackpressureStrategy::RetryUntilDelivered).create();
        let from = services[1].subscriber_builder().create();
        Self { _node: node, to: to.expect("publisher"), from: from.expect("subscriber"), services }
    }

    fn wait_for_peer(&self) {
        let there = || {
            self.services[0].dynamic_config().number_of_subscribers() != 0
                && self.services[1].dynamic_config().number_of_publishers() != 0
        };
        while !there() {
            std::thread::yield_now();
        }
        // It has seen this side as well, which it says by a message.
        self.receive();
        self.send([0; 4]);
    }

    fn greet(&self) {
        while self.services[0].dynamic_config().number_of_subscribers() == 0 {
            std::thread::yield_now();
        }
        self.send([0; 4]);
        self.receive();
    }

    fn send(&self, message: Message) {
        self.to.loan_uninit().expect("loan").write_payload(message).send().expect("send");
    }

    fn receive(&self) -> Message {
        loop {
            if let Some(sample) = self.from.receive().expect("receive") {
                return *sample;
            }
            spin_loop();
        }
    }
}

fn start(mode: &str) -> (Side, Child) {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("msgq-bench/{}/{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let (first, second) = pair::cpus();
    pair::pin(first);
    let program = std::env::current_exe().expect("own path");
    let child =
        Command::new(program).args(["iox-child", mode, &name, &second.to_string()]).spawn().expect("child");
    let side = Side::new(&format!("{name}/to"), &format!("{name}/from"));
    side.wait_for_peer();
    (side, child)
}

fn stream() -> Sample {
    let (side, mut child) = start("stream");
    let started = Instant::now();
    for n in 0..STREAM {
        side.send([n, n, n, n]);
    }
    side.receive();
    let ns = started.elapsed().as_nanos() as f64 / STREAM as f64;
    side.send([0; 4]);
    assert!(child.wait().expect("child").success());
    ns.into()
}

fn round_trip() -> Sample {
    let (side, mut child) = start("trips");
    let times = (0..TRIPS).map(|n| {
        let started = Instant::now();
        side.send([n, n, n, n]);
        black_box(side.receive());
        started.elapsed().as_nanos() as u32
    });
    let sample = quantiles(times.collect());
    assert!(child.wait().expect("child").success());
    sample
}

/// The other process.
pub fn child(args: &[String]) {
    // SAFETY: ends this process with its parent.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // It was started by a pinned process, and cannot know by itself where the second hardware thread is.
    pair::pin(args[2].parse().expect("a number"));
    let name = &args[1];
    let side = Side::new(&format!("{name}/from"), &format!("{name}/to"));
    side.greet();
    match args[0].as_str() {
        "stream" => {
            for _ in 0..STREAM {
                black_box(side.receive());
            }
            side.send([1; 4]);
            side.receive();
        }
        _ => {
            for _ in 0..TRIPS {
                let message = side.receive();
                side.send(message);
            }
            // What was sent lies in memory that goes with this process.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}
