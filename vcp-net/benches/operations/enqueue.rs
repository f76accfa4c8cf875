//! `enqueue`: frames for one port, the usual way and the one with all its checks, and for three ports. The publication of
//! the used ring is a part of it; the driver gives its buffers back at once, without looking at them.

use std::sync::Arc;
use std::time::Instant;

use criterion::Criterion;
use vcp_core::vu::port::Port;
use vcp_net::port::{NetPort, PortSpec, features};
use vcp_net::switch::account::Account;
use vcp_net::switch::back::Member;
use vcp_net::switch::enqueue::{Enqueue, Targets};
use vcp_net::switch::line::From;
use vcp_net::switch::work::{Fate, PortId, PortSet, Work};
use vcp_net::uplink::none::NoUplink;

use super::bed;

/// Entries of a receive queue.
const RING: u16 = 256;

struct Bed {
    enqueue: Enqueue,
    work: Work,
    members: Vec<Member>,
    ports: Vec<Port<NetPort>>,
    drivers: Vec<bed::Driver>,
    account: Account,
    now: Instant,
}

impl Bed {
    /// A burst for ports 1 to `targets`.
    fn new(burst: &bed::Burst, targets: u8, mtu: Option<u16>) -> Self {
        let now = Instant::now();
        let spec = PortSpec { mtu, ..PortSpec::default() };
        let mut work = burst.parsed();
        let all: PortSet = (1..=targets).map(PortId).collect();
        let fate = if targets == 1 { Fate::To(bed::TO) } else { Fate::Many(all) };
        work.items_mut().iter_mut().for_each(|item| item.fate = fate);
        let drivers: Vec<bed::Driver> = (0..=targets).map(|_| bed::Driver::new(RING, true)).collect();
        let port = |driver: &bed::Driver| {
            let mut port = Port::new(Arc::from("bench"), NetPort::new(spec.clone()));
            let rings = [(0, driver.addresses(), 0)];
            port.start_for_test(features::VERSION_1 | features::MRG_RXBUF, Arc::clone(&driver.map), &rings)
                .expect("it starts");
            port
        };
        Self {
            enqueue: Enqueue::default(),
            work,
            members: drivers.iter().map(|_| Member::new(spec.clone())).collect(),
            ports: drivers.iter().map(port).collect(),
            account: Account::new(drivers.iter().map(|_| 1)),
            drivers,
            now,
        }
    }

    fn run(&mut self, burst: &bed::Burst) {
        let count = self.work.items().len();
        self.drivers.iter_mut().skip(1).for_each(|driver| driver.give(count as u16));
        let from = From { port: bed::FROM, pair: 0, host: None };
        let mut targets = Targets {
            members: &mut self.members,
            ports: &mut self.ports,
            uplink: &mut NoUplink,
            account: &mut self.account,
            capture: None,
            from: bed::FROM,
            now: self.now,
        };
        let done = self.enqueue.run(&self.work, &burst.frames(), from, &mut targets);
        assert_eq!(done, count);
        self.ports.iter_mut().skip(1).for_each(Port::settle_for_test);
    }
}

/// See the module.
pub(super) fn bench(criterion: &mut Criterion) {
    for (name, targets, mtu) in
        [("enqueue", 1, None), ("enqueue, with an MTU", 1, Some(1500)), ("enqueue, three targets", 3, None)]
    {
        bed::each(criterion, name, bed::unchanged, |burst| Bed::new(burst, targets, mtu), Bed::run);
    }
}
