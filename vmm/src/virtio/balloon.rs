//! virtio-balloon (virtio 1.2, section 5.5): how the guest gives memory back. What its balloon holds, at the monitor's wish,
//! and what its kernel reports as free, unasked (`REPORTING`), is taken out of the memfd that guest memory is: the host has
//! it, and the guest finds zeros when it comes back to it. Runs in the monitor, on the event loop's thread.
//!
//! Only pages of 4 KiB can be given back one by one, so that guests on huge pages have no balloon.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::fs::FallocateFlags;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, Complaints, F_VERSION_1, Interrupt, VirtioDevice};
use crate::error::{Error, Result};
use crate::kvm::GuestMemory;

const QUEUE_SIZE: u16 = 128;
/// Queue of pages that go into the balloon; 1 is that of pages that come out.
const INFLATE: usize = 0;
/// Without statistics and hints, whose queues would come before it.
const REPORTING: usize = 2;
const QUEUES: usize = 3;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`: the guest takes back what it needs.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`.
const F_REPORTING: u64 = 1 << 5;
/// The balloon counts in pages of this size, whatever the guest's are.
pub const PAGE_BYTES: u64 = 4096;
/// Page numbers that are read from one descriptor at most; Linux gives 256.
const MAX_PAGES: usize = 1024;
/// Configuration space: pages wanted at 0, pages held here.
const ACTUAL: u64 = 4;

/// What works while the driver runs.
struct Active {
    queues: Vec<(usize, Queue, Arc<EventFd>)>,
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
}

#[derive(Default)]
struct Shared {
    target_pages: u32,
    actual_pages: u32,
    active: Option<Active>,
    resting: Option<Active>,
    /// Bytes that the guest has reported as free so far.
    reported_bytes: u64,
    complaints: Complaints,
}

/// The monitor's hand on the balloon.
#[derive(Clone)]
pub struct Handle(Arc<Mutex<Shared>>);

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

impl Handle {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the guest to hold this many bytes in its balloon. False if it has no driver for it.
    pub fn ask_for(&self, bytes: u64) -> bool {
        let mut shared = self.lock();
        shared.target_pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        match &shared.active {
            Some(active) => {
                active.interrupt.config();
                true
            }
            None => false,
        }
    }

    /// Bytes that the balloon holds.
    pub fn held_bytes(&self) -> u64 {
        u64::from(self.lock().actual_pages) * PAGE_BYTES
    }

    /// Bytes that the guest has reported as free, in all.
    pub fn reported_bytes(&self) -> u64 {
        self.lock().reported_bytes
    }

    /// The subscriber that serves the queues when these notify it, in their order.
    pub fn worker(&self, kicks: Vec<Arc<EventFd>>) -> Worker {
        Worker { shared: self.clone(), kicks }
    }
}

/// The device.
#[derive(Debug)]
pub struct Balloon(Handle);

impl Balloon {
    /// A new device, which asks for nothing, and the hand on it.
    pub fn new() -> (Self, Handle) {
        let handle = Handle(Arc::default());
        (Self(handle.clone()), handle)
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &str {
        "balloon"
    }
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }
    fn features(&self) -> u64 {
        F_VERSION_1 | F_DEFLATE_ON_OOM | F_REPORTING
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let shared = self.0.lock();
        let bytes = [shared.target_pages.to_le_bytes(), shared.actual_pages.to_le_bytes()].concat();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(i));
            *byte = at.and_then(|at| bytes.get(at)).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(pages)) = (offset, <[u8; 4]>::try_from(data)) {
            self.0.lock().actual_pages = u32::from_le_bytes(pages);
        }
    }
    fn called_by_fd(&self) -> bool {
        false
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let mut queues = Vec::new();
        for setup in &activation.queues {
            let queue = super::own_queue("balloon", setup, QUEUE_SIZE, &activation.memory)?;
            queues.push((usize::from(setup.index), queue, setup.kick.clone()));
            // What was notified before counts too.
            let _ = setup.kick.write(1);
        }
        let (memory, interrupt) = (activation.memory, activation.interrupt);
        self.0.lock().active = Some(Active { queues, memory, interrupt });
        Ok(())
    }

    fn reset(&mut self) -> Result<()> {
        let mut shared = self.0.lock();
        (shared.active, shared.resting, shared.actual_pages) = (None, None, 0);
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Result<()> {
        if let Some(active) = &mut self.0.lock().active {
            active.queues.retain(|(at, _, _)| *at != usize::from(index));
        }
        Ok(())
    }

    fn quiesce(&mut self) -> Result<()> {
        let mut shared = self.0.lock();
        shared.resting = shared.active.take();
        Ok(())
    }

    fn go_on(&mut self) -> Result<()> {
        let mut shared = self.0.lock();
        if let Some(active) = shared.resting.take() {
            // What was notified meanwhile was not looked at.
            active.queues.iter().for_each(|(_, _, kick)| drop(kick.write(1)));
            shared.active = Some(active);
        }
        Ok(())
    }

    fn save(&self) -> Vec<u8> {
        let shared = self.0.lock();
        let positions: Vec<_> = shared
            .resting
            .iter()
            .flat_map(|active| &active.queues)
            .map(|(at, queue, _)| (*at, queue.next_avail(), queue.next_used()))
            .collect();
        // Numbers are always serialised.
        serde_json::to_vec(&(shared.target_pages, shared.actual_pages, positions)).unwrap_or_default()
    }

    fn restore(&mut self, saved: &[u8], activation: Activation) -> Result<()> {
        let (target, actual, positions): (u32, u32, Vec<(usize, u16, u16)>) =
            serde_json::from_slice(saved)
                .map_err(|e| Error::Snapshot(format!("balloon: its state is not understood: {e}")))?;
        self.activate(activation)?;
        let mut shared = self.0.lock();
        (shared.target_pages, shared.actual_pages) = (target, actual);
        for (at, queue, _) in shared.active.iter_mut().flat_map(|active| &mut active.queues) {
            if let Some((_, avail, used)) = positions.iter().find(|(saved, _, _)| saved == at) {
                queue.set_next_avail(*avail);
                queue.set_next_used(*used);
            }
        }
        Ok(())
    }
}

/// Gives a range of guest memory back to the host; what of it is no memory is left out. Returns the bytes.
fn give_back(memory: &GuestMemory, start: u64, len: u64) -> u64 {
    let mut given = 0;
    for region in memory.iter() {
        let first = start.max(region.start_addr().0).next_multiple_of(PAGE_BYTES);
        let end =
            start.saturating_add(len).min(region.start_addr().0 + region.len()) / PAGE_BYTES * PAGE_BYTES;
        let (Some(file), true) = (region.file_offset(), first < end) else { continue };
        let at = file.start() + (first - region.start_addr().0);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(file.file(), flags, at, end - first) {
            Ok(()) => given += end - first,
            Err(e) => tracing::debug!(error = %e, "memory is not given back"),
        }
    }
    given
}

impl Active {
    /// Serves one queue; an error stops it. Returns the bytes that were reported as free.
    fn serve(&mut self, at: usize) -> std::result::Result<u64, virtio_queue::Error> {
        let Self { queues, memory, interrupt } = self;
        let Some((_, queue, kick)) = queues.iter_mut().find(|(index, _, _)| *index == at) else {
            return Ok(0);
        };
        let (mut used, mut reported) = (false, 0);
        // At most one ring's worth per pass, so that a driver cannot hold the event loop.
        for _ in 0..queue.size() {
            let Some(chain) = queue.iter(&**memory)?.next() else { break };
            let head = chain.head_index();
            for descriptor in chain {
                let (addr, len) = (descriptor.addr(), descriptor.len());
                match at {
                    INFLATE if !descriptor.is_write_only() => inflate(memory, addr, len),
                    REPORTING if descriptor.is_write_only() => {
                        reported += give_back(memory, addr.0, u64::from(len));
                    }
                    // The guest takes pages back by touching them.
                    _ => {}
                }
            }
            queue.add_used(&**memory, head, 0)?;
            used = true;
        }
        if used && queue.needs_notification(&**memory)? {
            interrupt.queue(at as u16);
        }
        let next = queue.avail_idx(&**memory, std::sync::atomic::Ordering::Acquire)?;
        if next.0 != queue.next_avail() {
            let _ = kick.write(1);
        }
        Ok(reported)
    }
}

/// Gives back the pages whose numbers lie in a buffer; those that follow each other at once.
fn inflate(memory: &GuestMemory, addr: GuestAddress, len: u32) {
    let mut bytes = vec![0; (len as usize).min(MAX_PAGES * 4)];
    if memory.read_slice(&mut bytes, addr).is_err() {
        return;
    }
    let give = |run: Option<(u64, u64)>| {
        if let Some((start, count)) = run {
            give_back(memory, start * PAGE_BYTES, count * PAGE_BYTES);
        }
    };
    let mut run: Option<(u64, u64)> = None;
    for number in bytes.chunks_exact(4) {
        let page = u64::from(u32::from_le_bytes([number[0], number[1], number[2], number[3]]));
        run = match run {
            Some((start, count)) if page == start + count => Some((start, count + 1)),
            // Linux counts down.
            Some((start, count)) if page + 1 == start => Some((page, count + 1)),
            _ => {
                give(run);
                Some((page, 1))
            }
        };
    }
    give(run);
}

/// The device's work on the event loop.
#[derive(Debug)]
pub struct Worker {
    shared: Handle,
    kicks: Vec<Arc<EventFd>>,
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for (at, kick) in self.kicks.iter().enumerate() {
            if let Err(e) = ops.add(Events::with_data(&**kick, at as u32, EventSet::IN)) {
                tracing::error!(error = %e, "the balloon cannot be watched");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let at = events.data() as usize;
        if let Some(kick) = self.kicks.get(at) {
            let _ = kick.read();
        }
        let mut shared = self.shared.lock();
        let Some(active) = &mut shared.active else { return };
        match active.serve(at) {
            Ok(reported) => shared.reported_bytes += reported,
            Err(e) => {
                active.queues.retain(|(index, _, _)| *index != at);
                if shared.complaints.add() {
                    tracing::warn!(queue = at, error = %e, "the driver broke a queue of the balloon: it is stopped");
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "balloon_tests.rs"]
mod tests;
