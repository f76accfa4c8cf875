//! The in-flight log and packed rings over stops, resets and new connections.

use std::fs::File;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::queue::tests::{Driver, area, memory};

const QUEUE: u16 = 1;

struct Bed {
    rings: RingSet,
    driver: Driver,
    epoll: OwnedFd,
    log: Option<Arc<LogArea>>,
    chain: Chain,
}

impl Bed {
    fn new(packed: bool, logged: bool) -> Self {
        let driver = Driver::new(&memory(), packed);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let rings = RingSet::new("test".into(), 2, 8, Arc::default());
        let log = logged.then(|| area(packed));
        let mut bed = Self { rings, driver, epoll, log, chain: Chain::default() };
        bed.connect();
        bed
    }

    /// All messages up to the kick descriptors.
    fn connect(&mut self) {
        let dialect =
            Dialect { packed: self.driver.is_packed(), event_idx: true, indirect: true, in_order: false };
        self.rings.set_features(dialect, true);
        self.rings.set_map(Arc::clone(self.driver.map()));
        if let Some(log) = &self.log {
            self.rings.set_log(Arc::clone(log)).unwrap();
        }
    }

    fn start(&mut self, base: u32) -> Result<(), PortError> {
        let RingAddresses { size, desc, avail, used } = self.driver.addresses();
        let queue = u32::from(QUEUE);
        self.rings.set_size(queue, size.into())?;
        self.rings.set_addresses(queue, desc, avail, used)?;
        self.rings.set_base(queue, base)?;
        self.rings.set_kick(&self.epoll, queue, Some(event()))?;
        self.rings.set_enabled(queue, true)
    }

    /// `GET_VRING_BASE`, whether or not what is in flight comes back.
    fn stop(&mut self) -> u32 {
        let (reply, answer) = sync_channel(1);
        let now = Instant::now();
        self.rings.stop(QUEUE.into(), reply, now);
        self.rings.finish_stops(&self.epoll, now + STOP_TIMEOUT + Duration::from_secs(1));
        match answer.try_recv() {
            Ok(Ok(Answer::Base(base))) => base,
            other => panic!("{other:?}"),
        }
    }

    fn take(&mut self) -> Option<ChainId> {
        self.rings.take(QUEUE, &mut self.chain).then_some(self.chain.id)
    }

    fn end(&mut self, id: ChainId) {
        self.rings.complete(id, 16);
        self.rings.publish_all();
    }

    /// Two requests, of which the second is answered.
    fn one_in_flight(&mut self) -> ChainId {
        self.driver.add(2);
        self.driver.add(3);
        let first = self.take().unwrap();
        let second = self.take().unwrap();
        self.end(second);
        assert_eq!(self.driver.collect(), [2]);
        first
    }
}

fn event() -> File {
    eventfd(0, EventfdFlags::NONBLOCK).unwrap().into()
}

fn first_base(packed: bool) -> u32 {
    if packed { 0x8000_8000 } else { 0 }
}

fn each(test: impl Fn(bool, bool)) {
    for packed in [false, true] {
        for logged in [false, true] {
            test(packed, logged);
        }
    }
}

#[test]
fn a_pause_loses_nothing_and_repeats_nothing() {
    each(|packed, logged| {
        let mut bed = Bed::new(packed, logged);
        bed.start(first_base(packed)).unwrap();
        for number in 1..30 {
            bed.driver.add(3);
            let id = bed.take().unwrap();
            bed.end(id);
            assert_eq!(bed.driver.collect(), [number]);
            let base = bed.stop();
            bed.start(base).unwrap();
            assert!(bed.take().is_none(), "nothing was in flight");
        }
    });
}

#[test]
fn a_late_stop_goes_on_with_what_was_in_flight() {
    each(|packed, logged| {
        let mut bed = Bed::new(packed, logged);
        bed.start(first_base(packed)).unwrap();
        let old = bed.one_in_flight();
        let base = bed.stop();
        bed.start(base).unwrap();
        assert!(bed.take().is_none(), "not before the old one came back");
        bed.end(old);
        assert!(bed.driver.collect().is_empty(), "a completion of the ring's former life");
        let again = bed.take().expect("it is taken again");
        bed.end(again);
        assert_eq!(bed.driver.collect(), [1], "packed {packed}, logged {logged}");
        bed.driver.add(2);
        let next = bed.take().unwrap();
        bed.end(next);
        assert_eq!(bed.driver.collect(), [3]);
    });
}

#[test]
fn a_driver_that_starts_anew_finds_nothing_in_flight() {
    each(|packed, logged| {
        let mut bed = Bed::new(packed, logged);
        bed.start(first_base(packed)).unwrap();
        let old = bed.one_in_flight();
        bed.stop();
        bed.end(old);
        // The guest resets the device: the same memory as an empty ring.
        bed.driver = Driver::new(&Arc::clone(bed.driver.map()), packed);
        bed.start(first_base(packed)).unwrap();
        assert!(bed.take().is_none());
        bed.driver.add(2);
        let id = bed.take().unwrap();
        // And the log is that of the new ring: a crash now leaves just this one.
        if let Some(log) = &bed.log {
            let (_, heads) = bed.driver.start(bed.driver.base(), Some(log)).unwrap();
            assert_eq!(heads, Some(vec![id.head]));
        }
        bed.end(id);
        assert_eq!(bed.driver.collect(), [1]);
    });
}

#[test]
fn a_new_connection_takes_again_what_the_old_one_had_in_flight() {
    for packed in [false, true] {
        let mut bed = Bed::new(packed, true);
        bed.start(first_base(packed)).unwrap();
        let old = bed.one_in_flight();
        bed.rings.reset(&bed.epoll);
        bed.connect();
        let call = event();
        bed.rings.set_call(QUEUE.into(), Some(call.try_clone().unwrap())).unwrap();
        bed.start(bed.driver.base()).unwrap();
        let mut count = [0; 8];
        assert!(rustix::io::read(&call, &mut count).is_ok(), "an interrupt for what may not have been seen");
        assert!(bed.take().is_none(), "not before the old one came back");
        bed.end(old);
        let again = bed.take().unwrap();
        bed.end(again);
        assert_eq!(bed.driver.collect(), [1]);
        assert!(bed.take().is_none());
    }
}

#[test]
fn a_reset_device_has_nothing_in_flight() {
    for packed in [false, true] {
        let mut bed = Bed::new(packed, true);
        bed.start(first_base(packed)).unwrap();
        let old = bed.one_in_flight();
        bed.rings.forget_log();
        bed.rings.reset(&bed.epoll);
        bed.end(old);
        // The front end hands over the same log all the same.
        bed.driver = Driver::new(&Arc::clone(bed.driver.map()), packed);
        bed.connect();
        bed.start(first_base(packed)).unwrap();
        assert!(bed.take().is_none());
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let mut bed = Bed::new(true, true);
    bed.start(first_base(true)).unwrap();
    let log = Arc::clone(bed.log.as_ref().unwrap());
    assert!(matches!(bed.rings.set_log(log), Err(PortError::Running { queue: 1 })));
    // A log that was exchanged for an empty one while requests of the ring go on.
    bed.one_in_flight();
    let base = bed.stop();
    bed.rings.set_log(area(true)).unwrap();
    let refused = bed.start(base).unwrap_err();
    assert!(matches!(refused, PortError::Ring { source: RingError::Base(_), .. }), "{refused:?}");
    // Bases and sizes of the other format.
    let mut split = Bed::new(false, false);
    assert!(matches!(split.start(0x8000_8000), Err(PortError::Base { .. })));
    assert!(matches!(split.rings.set_size(0, 7), Err(PortError::Size { .. })));
    let mut packed = Bed::new(true, false);
    packed.rings.set_size(0, 7).unwrap();
    assert!(matches!(packed.rings.set_size(0, 9), Err(PortError::Size { .. })));
    assert!(matches!(
        packed.rings.set_addresses(0, 0x1000, 0x2002, 0x2004),
        Err(PortError::Alignment { .. })
    ));
}
