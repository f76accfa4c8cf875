//! The whole line between two ports that send to each other, on one hardware thread and on two. The drivers are in the
//! same process and look at no frame, so that the line itself is what is measured. What is told is the time of one frame.

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use vcp_core::fabric::Fabric;
use vcp_core::poll::{check_cpu, pin_to};
use vcp_core::vu::port::Port;
use vcp_net::port::{NetPort, PortSpec, features};
use vcp_net::switch::SwitchFabric;
use vcp_net::uplink::none::NoUplink;

use super::bed;

/// Entries of each queue.
const RING: u16 = 1024;
/// Where the transmit queue lies behind the receive queue.
const TRANSMIT: u64 = 0x100_0000;

struct Bed {
    fabric: SwitchFabric,
    ports: Vec<Port<NetPort>>,
    /// Receive and transmit queue of each port.
    drivers: Vec<[bed::Driver; 2]>,
}

impl Bed {
    fn new(frame_bytes: usize, second_cpu: Option<usize>) -> Self {
        let specs: Vec<PortSpec> =
            ["a", "b"].map(|name| PortSpec { name: name.into(), ..PortSpec::default() }).into();
        let mut fabric = SwitchFabric::new(&specs, vec![Box::new(NoUplink)], 42, Instant::now());
        if second_cpu.is_some() {
            fabric.place_on_second(second_cpu).expect("a thread");
        }
        let mut ports = Vec::new();
        let mut drivers = Vec::new();
        for (at, spec) in specs.iter().enumerate() {
            let map = bed::memory(TRANSMIT + bed::Driver::memory_bytes(RING));
            let mut rx = bed::Driver::at(&map, 0, RING, true);
            let mut tx = bed::Driver::at(&map, TRANSMIT, RING, false);
            let mut frame = bed::udp(frame_bytes);
            frame[..6].copy_from_slice(&bed::station(1 - at as u64).bytes());
            frame[6..12].copy_from_slice(&bed::station(at as u64).bytes());
            (0..RING).for_each(|_| tx.fill(&frame));
            rx.give(RING);
            let mut port = Port::new(Arc::from(&*spec.name), NetPort::new(spec.clone()));
            let rings = [(0, rx.addresses(), 0), (1, tx.addresses(), 0)];
            port.start_for_test(features::VERSION_1 | features::MRG_RXBUF, map, &rings).expect("it starts");
            ports.push(port);
            drivers.push([rx, tx]);
        }
        Self { fabric, ports, drivers }
    }

    /// One pass, and the drivers' part: all that was used is given again. How many frames went from port to port.
    fn pass(&mut self) -> u64 {
        self.fabric.poll(&mut self.ports, Instant::now());
        self.ports.iter_mut().for_each(Port::settle_for_test);
        self.drivers
            .iter_mut()
            .map(|[rx, tx]| {
                tx.give_used();
                u64::from(rx.give_used())
            })
            .sum()
    }
}

/// See the module.
pub(super) fn bench(criterion: &mut Criterion) {
    let two = check_cpu(0).is_ok() && check_cpu(1).is_ok();
    let threads = if two { 1..=2 } else { 1..=1 };
    let cases = [("64", 60), ("1518", 1514)].into_iter();
    let cases = cases.flat_map(|(name, bytes)| threads.clone().map(move |threads| (name, bytes, threads)));
    // All second threads are placed before this one is.
    let bed = |(name, bytes, threads)| (name, threads, Bed::new(bytes, (threads == 2).then_some(0)));
    let beds: Vec<_> = cases.map(bed).collect();
    if two {
        pin_to(1).expect("it may be used");
    }
    let mut group = criterion.benchmark_group("line");
    for (name, threads, mut bed) in beds {
        // Both stations are known then, and the second thread is awake.
        (0..1000).for_each(|_| _ = bed.pass());
        // By its own clock, on which a pass takes as long as a frame.
        group.measurement_time(Duration::from_millis(1));
        group.bench_function(BenchmarkId::new(name, threads), |bencher| {
            bencher.iter_custom(|passes| {
                let begin = Instant::now();
                let frames: u64 = (0..passes).map(|_| bed.pass()).sum();
                begin.elapsed().mul_f64(passes as f64 / frames.max(1) as f64)
            });
        });
    }
    group.finish();
}
