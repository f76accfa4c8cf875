//! A split virtqueue (virtio 1.2, 2.7) for a driver that polls: each request slot owns its descriptors for good, so
//! that submitting writes one header and one ring entry.
//!
//! Why not the `VirtQueue` of `virtio-drivers`: with EVENT_IDX it asks for a call after every request and compares the
//! event index without regard to its wrap (a batch across 65535 may stay without a kick); and it walks descriptors
//! twice per request. A benchmark is to measure the backend.

use core::ptr::{read_volatile, write_volatile};
use core::sync::atomic::{Ordering, fence};

use virtio_drivers::transport::Transport;

use crate::blk::Error;
use crate::memory;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;
/// Largest queue that we set up.
pub const MAX_SIZE: u32 = 1024;

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A queue of slots. A slot's request is a header, data and a status byte.
pub struct Ring {
    size: u16,
    indirect: bool,
    event_idx: bool,
    descriptors: *mut Descriptor,
    tables: *mut Descriptor,
    avail: *mut u16,
    used: *mut u16,
    avail_idx: u16,
    /// `avail_idx` as of the last look at whether to kick.
    kicked_idx: u16,
    used_idx: u16,
    /// How often the device was kicked.
    pub kicks: u64,
}

/// Where a request's three parts lie.
#[derive(Clone, Copy)]
pub struct Parts {
    /// Header: 16 bytes, read by the device.
    pub header: u64,
    /// Data; length 0 for none.
    pub data: u64,
    /// Length of the data in bytes.
    pub data_len: u32,
    /// Whether the device writes the data.
    pub device_writes: bool,
    /// Status byte.
    pub status: u64,
}

impl Ring {
    /// Sets up queue 0 of a device with as many slots as it allows.
    pub fn new(transport: &mut impl Transport, indirect: bool, event_idx: bool) -> Result<Self, Error> {
        let max = transport.max_queue_size(0).min(MAX_SIZE);
        if max < 4 {
            return Err(Error::Device("its queue has less than 4 entries"));
        }
        let size = 1usize << max.ilog2();
        let descriptors = memory::take(16 * size).ok_or(Error::Memory)?.as_mut_ptr();
        let tables = memory::take(16 * 3 * size).ok_or(Error::Memory)?.as_mut_ptr();
        let avail = memory::take(6 + 2 * size).ok_or(Error::Memory)?.as_mut_ptr();
        let used = memory::take(6 + 8 * size).ok_or(Error::Memory)?.as_mut_ptr();
        transport.queue_set(0, size as u32, descriptors as u64, avail as u64, used as u64);
        let ring = Self {
            size: size as u16,
            indirect,
            event_idx,
            descriptors: descriptors.cast(),
            tables: tables.cast(),
            avail: avail.cast(),
            used: used.cast(),
            avail_idx: 0,
            kicked_idx: 0,
            used_idx: 0,
            kicks: 0,
        };
        ring.want_no_calls();
        Ok(ring)
    }

    /// Returns the number of slots: requests that can be in flight.
    pub fn slots(&self) -> u16 {
        if self.indirect { self.size } else { self.size / 3 }
    }

    /// Writes the descriptors of a slot; they stay until they are written again.
    pub fn prepare(&mut self, slot: u16, parts: Parts) {
        assert!(slot < self.slots());
        let (table, first) = match self.indirect {
            true => (self.tables.wrapping_add(3 * slot as usize), 0),
            false => (self.descriptors.wrapping_add(3 * slot as usize), 3 * slot),
        };
        let device_writes = if parts.device_writes { F_WRITE } else { 0 };
        let header = Descriptor { address: parts.header, len: 16, flags: F_NEXT, next: first + 1 };
        let data = Descriptor {
            address: parts.data,
            len: parts.data_len,
            flags: F_NEXT | device_writes,
            next: first + 2,
        };
        let status = Descriptor { address: parts.status, len: 1, flags: F_WRITE, next: 0 };
        let entries: u32 = if parts.data_len == 0 { 2 } else { 3 };
        // SAFETY: the three entries of this slot, inside the table by the check above; the slot is not in flight, so
        // the device does not look at them.
        unsafe {
            write_volatile(table, header);
            if entries == 3 {
                write_volatile(table.add(1), data);
                write_volatile(table.add(2), status);
            } else {
                write_volatile(table.add(1), status);
            }
            if self.indirect {
                let whole =
                    Descriptor { address: table as u64, len: 16 * entries, flags: F_INDIRECT, next: 0 };
                write_volatile(self.descriptors.add(slot as usize), whole);
            }
        }
    }

    /// Makes a prepared slot available to the device. [`Ring::kick`] tells it.
    pub fn submit(&mut self, slot: u16) {
        let head = if self.indirect { slot } else { 3 * slot };
        let at = 2 + (self.avail_idx & (self.size - 1)) as usize;
        // SAFETY: an entry of the available ring; the index is stored after it (x86 keeps the order of stores, the
        // fence keeps the compiler's).
        unsafe {
            write_volatile(self.avail.add(at), head);
            fence(Ordering::Release);
            self.avail_idx = self.avail_idx.wrapping_add(1);
            write_volatile(self.avail.add(1), self.avail_idx);
        }
    }

    /// Kicks the device if it asked for a kick for what was submitted since the last look.
    pub fn kick(&mut self, transport: &mut impl Transport) {
        let (old, new) = (self.kicked_idx, self.avail_idx);
        if old == new {
            return;
        }
        self.kicked_idx = new;
        // The index must be visible before the device's wish is read: the device does the two the other way round.
        fence(Ordering::SeqCst);
        // SAFETY: fields of the used ring.
        let wanted = unsafe {
            if self.event_idx {
                let event = read_volatile(self.used.add(2 + 4 * self.size as usize));
                new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
            } else {
                read_volatile(self.used) & USED_F_NO_NOTIFY == 0
            }
        };
        if wanted {
            self.kicks += 1;
            transport.notify(0);
        }
    }

    /// Takes the next completed slot, if there is one.
    pub fn complete(&mut self) -> Result<Option<u16>, Error> {
        // SAFETY: the index of the used ring, then the entry that it covers.
        let id = unsafe {
            if read_volatile(self.used.add(1)) == self.used_idx {
                return Ok(None);
            }
            fence(Ordering::Acquire);
            let at = 2 + 4 * (self.used_idx & (self.size - 1)) as usize;
            read_volatile(self.used.add(at).cast::<u32>())
        };
        self.used_idx = self.used_idx.wrapping_add(1);
        if self.used_idx & 0x0fff == 0 {
            self.want_no_calls();
        }
        let slot = if self.indirect { id } else { id / 3 };
        let valid = slot < u32::from(self.slots()) && (self.indirect || id % 3 == 0);
        if valid {
            Ok(Some(slot as u16))
        } else {
            Err(Error::Device("it completed a request that we never made"))
        }
    }

    /// Asks the device not to call: we poll. With EVENT_IDX that is an event index far ahead, moved on in time.
    fn want_no_calls(&self) {
        // SAFETY: fields of the available ring.
        unsafe {
            if self.event_idx {
                let far = self.used_idx.wrapping_add(0x8000);
                write_volatile(self.avail.add(2 + self.size as usize), far);
            } else {
                write_volatile(self.avail, AVAIL_F_NO_INTERRUPT);
            }
        }
    }
}
