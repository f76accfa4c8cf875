//! virtio-rng (virtio 1.2, section 5.4): fills the driver's buffers with bytes from the host kernel's generator. Runs in
//! the monitor, on the event loop's thread.

use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::Bytes;
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, Complaints, F_VERSION_1, Interrupt, VirtioDevice};
use crate::error::{Error, Result};
use crate::kvm::GuestMemory;

const QUEUE_SIZE: u16 = 64;
/// Bytes given for one request; a driver that wants more asks again. Bounds the work of one pass.
const MAX_BYTES_PER_REQUEST: usize = 64 << 10;

/// The part that works while the driver runs.
struct Active {
    queue: Queue,
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    kick: Arc<EventFd>,
}

/// The entropy device.
pub struct Rng {
    active: Arc<Mutex<Option<Active>>>,
    /// The queue while it rests.
    resting: Option<Active>,
}

impl std::fmt::Debug for Rng {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rng").finish_non_exhaustive()
    }
}

/// The device's work on the event loop.
pub struct RngWorker {
    active: Arc<Mutex<Option<Active>>>,
    complaints: Complaints,
    kick: Arc<EventFd>,
}

impl std::fmt::Debug for RngWorker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RngWorker").finish_non_exhaustive()
    }
}

/// The queue that a device and its worker share.
#[derive(Clone)]
pub struct RngQueue {
    active: Arc<Mutex<Option<Active>>>,
}

impl std::fmt::Debug for RngQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RngQueue").finish_non_exhaustive()
    }
}

impl RngQueue {
    /// The subscriber that serves the queue when `kick` notifies it.
    pub fn worker(self, kick: Arc<EventFd>) -> RngWorker {
        RngWorker { active: self.active, complaints: Complaints::default(), kick }
    }
}

impl Rng {
    /// A new device, and its queue for the event loop.
    pub fn new() -> (Self, RngQueue) {
        let active = Arc::new(Mutex::new(None));
        (Self { active: active.clone(), resting: None }, RngQueue { active })
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &str {
        "rng"
    }
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_RNG
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }
    fn features(&self) -> u64 {
        F_VERSION_1
    }
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    fn called_by_fd(&self) -> bool {
        false
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let wrong = |reason: &str| Error::Driver { device: "rng".into(), reason: reason.into() };
        let setup = activation.queues.first().ok_or_else(|| wrong("enabled no queue"))?;
        let queue = super::own_queue("rng", setup, QUEUE_SIZE, &activation.memory)?;
        let kick = setup.kick.clone();
        let active = Active { queue, memory: activation.memory, interrupt: activation.interrupt, kick };
        *self.active.lock().unwrap_or_else(PoisonError::into_inner) = Some(active);
        // What was notified before counts too.
        let _ = setup.kick.write(1);
        Ok(())
    }

    fn reset(&mut self) -> Result<()> {
        self.resting = None;
        *self.active.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }

    fn stop_queue(&mut self, _index: u16) -> Result<()> {
        self.reset()
    }

    fn quiesce(&mut self) -> Result<()> {
        self.resting = self.active.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(())
    }

    fn go_on(&mut self) -> Result<()> {
        if let Some(active) = self.resting.take() {
            let kick = active.kick.clone();
            *self.active.lock().unwrap_or_else(PoisonError::into_inner) = Some(active);
            // What was notified meanwhile was not looked at.
            let _ = kick.write(1);
        }
        Ok(())
    }

    fn save(&self) -> Vec<u8> {
        let position = self.resting.as_ref().map(|a| [a.queue.next_avail(), a.queue.next_used()]);
        position.unwrap_or_default().iter().flat_map(|index| index.to_le_bytes()).collect()
    }

    fn restore(&mut self, saved: &[u8], activation: Activation) -> Result<()> {
        let index = |at: usize| saved.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]));
        self.activate(activation)?;
        if let Some(active) = &mut *self.active.lock().unwrap_or_else(PoisonError::into_inner) {
            active.queue.set_next_avail(index(0));
            active.queue.set_next_used(index(2));
        }
        Ok(())
    }
}

impl Active {
    /// Serves what is available; an error stops the queue.
    fn serve(&mut self) -> std::result::Result<(), virtio_queue::Error> {
        let mut used = false;
        // At most one ring's worth per pass, so that a driver cannot hold the event loop.
        for _ in 0..self.queue.size() {
            let Some(chain) = self.queue.iter(&*self.memory)?.next() else { break };
            let head = chain.head_index();
            let mut written = 0u32;
            for descriptor in chain.writable() {
                let len = (descriptor.len() as usize).min(MAX_BYTES_PER_REQUEST - written as usize);
                let mut bytes = vec![0u8; len];
                let got =
                    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
                if self.memory.write_slice(&bytes[..got], descriptor.addr()).is_err() {
                    break;
                }
                written += got as u32;
                if got < descriptor.len() as usize {
                    break;
                }
            }
            self.queue.add_used(&*self.memory, head, written)?;
            used = true;
        }
        if used && self.queue.needs_notification(&*self.memory)? {
            self.interrupt.queue(0);
        }
        Ok(())
    }

    fn has_more(&self) -> bool {
        self.queue
            .avail_idx(&*self.memory, std::sync::atomic::Ordering::Acquire)
            .is_ok_and(|idx| idx.0 != self.queue.next_avail())
    }
}

impl MutEventSubscriber for RngWorker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(e) = ops.add(Events::new(&*self.kick, EventSet::IN)) {
            tracing::error!(error = %e, "the entropy device cannot be watched");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let _ = self.kick.read();
        let mut slot = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(active) = slot.as_mut() else { return };
        match active.serve() {
            Ok(()) if active.has_more() => {
                let _ = self.kick.write(1);
            }
            Ok(()) => {}
            Err(e) => {
                if self.complaints.add() {
                    tracing::warn!(error = %e, "the driver broke the entropy queue: it is stopped");
                }
                *slot = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::super::ActiveQueue;
    use super::Rng;
    use super::*;

    const DESC: u64 = 0x1000;
    const AVAIL: u64 = 0x2000;
    const USED: u64 = 0x3000;
    const BUFFER: u64 = 0x10_0000;
    const WRITABLE: u16 = 2;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Interrupt for Count {
        fn queue(&self, _index: u16) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
        fn config(&self) {}
        fn call_fd(&self, _index: u16) -> Option<&EventFd> {
            None
        }
    }

    fn started(memory: &Arc<GuestMemory>) -> (Rng, RngQueue, Arc<Count>) {
        let (mut rng, queue) = Rng::new();
        let count = Arc::new(Count::default());
        let kick = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let setup =
            ActiveQueue { index: 0, size: 16, desc_table: DESC, avail_ring: AVAIL, used_ring: USED, kick };
        let activation = Activation {
            features: F_VERSION_1,
            memory: memory.clone(),
            queues: vec![setup],
            interrupt: count.clone(),
        };
        rng.activate(activation).unwrap();
        (rng, queue, count)
    }

    fn put<T: vm_memory::ByteValued>(memory: &GuestMemory, addr: u64, value: T) {
        memory.write_obj(value, GuestAddress(addr)).unwrap();
    }

    #[test]
    fn a_buffer_is_filled_and_returned() {
        let memory = crate::kvm::memory::create(4 << 20, false).unwrap();
        let (_rng, queue, count) = started(&memory);
        put(&memory, DESC, BUFFER);
        put(&memory, DESC + 8, 64u32);
        put(&memory, DESC + 12, WRITABLE);
        put(&memory, AVAIL + 2, 1u16);
        queue.active.lock().unwrap().as_mut().unwrap().serve().unwrap();
        let used: (u16, u32) = (
            memory.read_obj(GuestAddress(USED + 2)).unwrap(),
            memory.read_obj(GuestAddress(USED + 8)).unwrap(),
        );
        assert_eq!(used, (1, 64));
        let bytes: [u8; 32] = memory.read_obj(GuestAddress(BUFFER)).unwrap();
        assert!(bytes.iter().any(|b| *b != 0));
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_queue_outside_of_memory_is_refused() {
        let memory = crate::kvm::memory::create(4 << 20, false).unwrap();
        let (mut rng, _queue) = Rng::new();
        let kick = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let setup =
            ActiveQueue { index: 0, size: 16, desc_table: 1 << 40, avail_ring: AVAIL, used_ring: USED, kick };
        let interrupt = Arc::new(Count::default());
        let activation = Activation { features: F_VERSION_1, memory, queues: vec![setup], interrupt };
        assert!(rng.activate(activation).is_err());
    }

    proptest! {
        /// Whatever lies in the rings, a pass ends without a panic and without returning more than a ring's worth.
        #[test]
        fn hostile_rings(desc in proptest::collection::vec(any::<u8>(), 256), avail in proptest::collection::vec(any::<u8>(), 38)) {
            let memory = crate::kvm::memory::create(4 << 20, false).unwrap();
            let (_rng, queue, _) = started(&memory);
            memory.write_slice(&desc, GuestAddress(DESC)).unwrap();
            memory.write_slice(&avail, GuestAddress(AVAIL)).unwrap();
            let _ = queue.active.lock().unwrap().as_mut().unwrap().serve();
            let used: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
            prop_assert!(used <= 16);
        }
    }
}
