//! The register machine of the virtio-mmio transport, step by step and under random accesses.

use proptest::prelude::*;

use super::*;
use crate::error::Error;
use crate::virtio::{Activation, F_RING_PACKED, F_VERSION_1};

const FEATURE: u64 = 1 << 5;

#[derive(Default)]
struct Log {
    activations: Vec<(u64, Vec<(u16, u16)>)>,
    resets: usize,
    stopped: Vec<u16>,
    fail: bool,
    interrupt: Option<Arc<dyn Interrupt>>,
}

struct Fake {
    log: Arc<Mutex<Log>>,
    by_fd: bool,
}

impl VirtioDevice for Fake {
    fn name(&self) -> &str {
        "fake"
    }
    fn device_type(&self) -> u32 {
        2
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn features(&self) -> u64 {
        F_VERSION_1 | FEATURE | F_RING_PACKED
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    fn called_by_fd(&self) -> bool {
        self.by_fd
    }
    fn activate(&mut self, a: Activation) -> Result<()> {
        let mut log = self.log.lock().unwrap();
        if log.fail {
            return Err(Error::Driver { device: "fake".into(), reason: "asked for it".into() });
        }
        for queue in &a.queues {
            assert!(
                (queue.size.is_power_of_two() || a.features & F_RING_PACKED != 0 && queue.size > 0)
                    && queue.size <= self.queue_max_sizes()[usize::from(queue.index)]
            );
        }
        assert_eq!(a.features & !self.features(), 0);
        log.activations.push((a.features, a.queues.iter().map(|q| (q.index, q.size)).collect()));
        log.interrupt = Some(a.interrupt);
        Ok(())
    }
    fn quiesce(&mut self) -> Result<()> {
        Ok(())
    }
    fn go_on(&mut self) -> Result<()> {
        Ok(())
    }
    fn reset(&mut self) -> Result<()> {
        self.log.lock().unwrap().resets += 1;
        Ok(())
    }
    fn stop_queue(&mut self, index: u16) -> Result<()> {
        self.log.lock().unwrap().stopped.push(index);
        Ok(())
    }
}

fn transport(by_fd: bool) -> (MmioTransport, Arc<Mutex<Log>>) {
    let log = Arc::new(Mutex::new(Log::default()));
    let memory = crate::kvm::memory::create(4 << 20, false).unwrap();
    (MmioTransport::new(Box::new(Fake { log: log.clone(), by_fd }), memory).unwrap(), log)
}

fn read(t: &MmioTransport, offset: u64) -> u32 {
    let mut data = [0u8; 4];
    t.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(t: &MmioTransport, offset: u64, value: u32) {
    t.write(offset, &value.to_le_bytes());
}

/// What a driver does up to `DRIVER_OK`, with one queue of 128.
fn start(t: &MmioTransport) {
    write(t, reg::STATUS, 0);
    write(t, reg::STATUS, status::ACKNOWLEDGE | status::DRIVER);
    write(t, reg::DRIVER_FEATURES_SEL, 1);
    write(t, reg::DRIVER_FEATURES, (F_VERSION_1 >> 32) as u32);
    write(t, reg::STATUS, status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
    write(t, reg::QUEUE_SEL, 0);
    write(t, reg::QUEUE_NUM, 128);
    write(t, reg::QUEUE_DESC_LOW, 0x1000);
    write(t, reg::QUEUE_DRIVER_LOW, 0x2000);
    write(t, reg::QUEUE_DEVICE_LOW, 0x3000);
    write(t, reg::QUEUE_READY, 1);
    write(t, reg::STATUS, status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK);
}

#[test]
fn identity() {
    let (t, _) = transport(false);
    assert_eq!([reg::MAGIC_VALUE, reg::VERSION, reg::DEVICE_ID].map(|r| read(&t, r)), [0x7472_6976, 2, 2]);
    write(&t, reg::QUEUE_SEL, 1);
    assert_eq!(read(&t, reg::QUEUE_NUM_MAX), 64);
    write(&t, reg::QUEUE_SEL, 2);
    assert_eq!(read(&t, reg::QUEUE_NUM_MAX), 0);
    assert_eq!(read(&t, reg::SHM_LEN_LOW), u32::MAX);
}

#[test]
fn driver_starts_resets_and_starts_again() {
    let (t, log) = transport(false);
    start(&t);
    assert_eq!(log.lock().unwrap().activations, vec![(F_VERSION_1, vec![(0, 128)])]);
    // Layout of a running queue does not change.
    write(&t, reg::QUEUE_NUM, 64);
    write(&t, reg::QUEUE_READY, 1);
    assert_eq!((read(&t, reg::QUEUE_READY), log.lock().unwrap().stopped.len()), (1, 0));
    write(&t, reg::STATUS, 0);
    assert_eq!((read(&t, reg::STATUS), read(&t, reg::QUEUE_READY)), (0, 0));
    start(&t);
    let log = log.lock().unwrap();
    assert_eq!((log.activations.len(), log.resets), (2, 1));
}

#[test]
fn driver_stops_one_queue() {
    let (t, log) = transport(false);
    start(&t);
    for _ in 0..2 {
        write(&t, reg::QUEUE_READY, 0);
        assert_eq!(read(&t, reg::QUEUE_READY), 0);
    }
    // One that never ran has nothing to stop, one that is stopped stays so, and a number beyond the last is nobody's.
    for (queue, ready) in [(1, 0), (0, 1), (2, 0), (u32::MAX, 0)] {
        write(&t, reg::QUEUE_SEL, queue);
        write(&t, reg::QUEUE_READY, ready);
        assert_eq!(read(&t, reg::QUEUE_READY), 0);
    }
    assert_eq!(log.lock().unwrap().stopped, vec![0]);
    start(&t);
    assert_eq!(log.lock().unwrap().activations.len(), 2);
}

#[test]
fn impossible_queue_size_fails_the_start() {
    for size in [0, 3, 512, 0x1_0080, u32::MAX] {
        let (t, log) = transport(false);
        write(&t, reg::QUEUE_SEL, 1);
        write(&t, reg::QUEUE_NUM, size);
        write(&t, reg::QUEUE_READY, 1);
        write(&t, reg::DRIVER_FEATURES_SEL, 1);
        write(&t, reg::DRIVER_FEATURES, (F_VERSION_1 >> 32) as u32);
        write(&t, reg::STATUS, 0xb);
        write(&t, reg::STATUS, 0xf);
        assert_ne!(read(&t, reg::STATUS) & status::DEVICE_NEEDS_RESET, 0, "{size}");
        assert!(log.lock().unwrap().activations.is_empty());
    }
}

#[test]
fn packed_rings_have_rules_of_their_own() {
    // Size, address of the driver area, and whether that can be, with split rings and with packed ones.
    for (size, driver, split, packed) in [
        (128, 0x2000, true, true),
        (100, 0x2000, false, true),
        (128, 0x2002, true, false),
        (0, 0x2000, false, false),
    ] {
        for (features, good) in [(F_VERSION_1, split), (F_VERSION_1 | F_RING_PACKED, packed)] {
            let (t, log) = transport(true);
            write(&t, reg::DRIVER_FEATURES_SEL, 1);
            write(&t, reg::DRIVER_FEATURES, (features >> 32) as u32);
            write(&t, reg::STATUS, 0xb);
            write(&t, reg::QUEUE_NUM, size);
            write(&t, reg::QUEUE_DRIVER_LOW, driver);
            write(&t, reg::QUEUE_READY, 1);
            write(&t, reg::STATUS, 0xf);
            assert_eq!(log.lock().unwrap().activations.len() == 1, good, "{size} {driver:#x} {features:#x}");
        }
    }
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let (t, log) = transport(false);
    write(&t, reg::STATUS, status::ACKNOWLEDGE | status::DRIVER);
    write(&t, reg::DRIVER_FEATURES_SEL, 1);
    write(&t, reg::DRIVER_FEATURES, (F_VERSION_1 >> 32) as u32 | 1 << 9);
    write(&t, reg::STATUS, status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
    assert_eq!(read(&t, reg::STATUS) & status::FEATURES_OK, 0);
    write(&t, reg::STATUS, 0xf);
    assert_eq!(log.lock().unwrap().activations.len(), 0);
}

#[test]
fn device_that_cannot_start_says_so() {
    let (t, log) = transport(false);
    log.lock().unwrap().fail = true;
    start(&t);
    assert_ne!(read(&t, reg::STATUS) & status::DEVICE_NEEDS_RESET, 0);
    assert_ne!(read(&t, reg::INTERRUPT_STATUS) & INT_CONFIG, 0);
    assert_eq!(t.interrupt.line.read().unwrap(), 1);
}

#[test]
fn interrupt_status_of_a_device_in_the_monitor() {
    let (t, log) = transport(false);
    start(&t);
    let interrupt = log.lock().unwrap().interrupt.clone().unwrap();
    assert_eq!(read(&t, reg::INTERRUPT_STATUS), 0);
    interrupt.queue(0);
    assert_eq!(read(&t, reg::INTERRUPT_STATUS), INT_VRING);
    let generation = read(&t, reg::CONFIG_GENERATION);
    interrupt.config();
    assert_eq!(read(&t, reg::INTERRUPT_STATUS), INT_VRING | INT_CONFIG);
    assert_ne!(read(&t, reg::CONFIG_GENERATION), generation);
    write(&t, reg::INTERRUPT_ACK, INT_VRING);
    assert_eq!(read(&t, reg::INTERRUPT_STATUS), INT_CONFIG);
}

#[test]
fn interrupt_status_of_a_device_in_another_process() {
    let (t, log) = transport(true);
    assert_eq!(read(&t, reg::INTERRUPT_STATUS), 0);
    start(&t);
    // The backend signals the line; the transport hears nothing of it and must claim it, before and after an
    // acknowledgement, without hiding a change of configuration.
    assert_eq!(read(&t, reg::INTERRUPT_STATUS), INT_VRING);
    write(&t, reg::INTERRUPT_ACK, INT_VRING);
    assert_eq!(read(&t, reg::INTERRUPT_STATUS), INT_VRING);
    log.lock().unwrap().interrupt.clone().unwrap().config();
    assert_eq!(read(&t, reg::INTERRUPT_STATUS), INT_VRING | INT_CONFIG);
    write(&t, reg::INTERRUPT_ACK, INT_VRING | INT_CONFIG);
    assert_eq!(read(&t, reg::INTERRUPT_STATUS), INT_VRING);
    write(&t, reg::STATUS, 0);
    assert_eq!(read(&t, reg::INTERRUPT_STATUS), 0);
}

#[test]
fn notification_without_ioeventfd_reaches_the_queue() {
    let (t, _) = transport(false);
    write(&t, reg::QUEUE_NOTIFY, 1);
    write(&t, reg::QUEUE_NOTIFY, 2);
    assert_eq!(t.kick(1).unwrap().read().unwrap(), 1);
    assert!(t.kick(0).unwrap().read().is_err());
}

proptest! {
    /// Any accesses of any size: no panic, and the device only ever sees set-ups that keep its rules (checked in
    /// `Fake::activate`).
    #[test]
    fn random_accesses(accesses in proptest::collection::vec(
        (any::<bool>(), prop_oneof![Just(reg::STATUS), Just(reg::QUEUE_NUM), Just(reg::QUEUE_READY), Just(reg::QUEUE_SEL),
            Just(reg::DRIVER_FEATURES), 0u64..0x200, any::<u64>()], prop_oneof![0u64..16, any::<u64>()], 0usize..=8), 0..300)) {
        let (t, _) = transport(true);
        for (is_write, offset, value, len) in accesses {
            let mut data = value.to_le_bytes();
            if is_write { t.write(offset, &data[..len]) } else { t.read(offset, &mut data[..len]) }
        }
        start(&t);
        prop_assert_eq!(read(&t, reg::STATUS), 0xf);
    }
}
