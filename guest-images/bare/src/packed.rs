//! A packed virtqueue (virtio 1.2, 2.8) for a driver that polls. Each request is one descriptor in the ring, which refers
//! to the slot's own table of three (indirect descriptors); the buffer id is the slot.

use core::ptr::{read_volatile, write_volatile};
use core::sync::atomic::{Ordering, fence};

use virtio_drivers::transport::Transport;

use crate::blk::Error;
use crate::memory;
use crate::ring::{MAX_SIZE, Parts};

const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const F_AVAIL: u16 = 1 << 7;
const F_USED: u16 = 1 << 15;
/// Event suppression: no notifications, or at a position only (2.8.10).
const EVENT_DISABLE: u16 = 1;
const EVENT_AT: u16 = 2;

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    id: u16,
    flags: u16,
}

/// A queue of slots; see [`crate::ring::Ring`], whose counterpart it is.
pub struct PackedRing {
    size: u16,
    descriptors: *mut Descriptor,
    tables: *mut Descriptor,
    lens: *mut u32,
    device_event: *mut u32,
    avail: u16,
    avail_wrap: bool,
    used: u16,
    used_wrap: bool,
    /// Made available since the last look at whether to kick.
    added: u16,
    /// How often the device was kicked.
    pub kicks: u64,
}

impl PackedRing {
    /// Sets up queue 0 of a device with as many slots as it allows.
    pub fn new(transport: &mut impl Transport) -> Result<Self, Error> {
        let max = transport.max_queue_size(0).min(MAX_SIZE);
        if max < 4 {
            return Err(Error::Device("its queue has less than 4 entries"));
        }
        let size = 1usize << max.ilog2();
        let take = |bytes| memory::take(bytes).ok_or(Error::Memory).map(<[u8]>::as_mut_ptr);
        let (descriptors, tables, lens) = (take(16 * size)?, take(16 * 3 * size)?, take(4 * size)?);
        let (driver_event, device_event) = (take(4)?, take(4)?);
        // SAFETY: the flags of the driver's event suppression, ours to write: we poll.
        unsafe { write_volatile(driver_event.add(2).cast::<u16>(), EVENT_DISABLE) };
        transport.queue_set(0, size as u32, descriptors as u64, driver_event as u64, device_event as u64);
        Ok(Self {
            size: size as u16,
            descriptors: descriptors.cast(),
            tables: tables.cast(),
            lens: lens.cast(),
            device_event: device_event.cast(),
            avail: 0,
            avail_wrap: true,
            used: 0,
            used_wrap: true,
            added: 0,
            kicks: 0,
        })
    }

    /// Returns the number of slots.
    pub fn slots(&self) -> u16 {
        self.size
    }

    /// Writes the table of a slot that is not in flight.
    pub fn prepare(&mut self, slot: u16, parts: Parts) {
        assert!(slot < self.size);
        let table = self.tables.wrapping_add(3 * slot as usize);
        let part = |address, len, flags| Descriptor { address, len, id: 0, flags };
        let header = part(parts.header, 16, 0);
        let data = part(parts.data, parts.data_len, if parts.device_writes { F_WRITE } else { 0 });
        let status = part(parts.status, 1, F_WRITE);
        let entries = if parts.data_len == 0 { 2 } else { 3 };
        // SAFETY: the three entries of this slot and its length, inside their arrays by the check above.
        unsafe {
            write_volatile(table, header);
            if entries == 3 {
                write_volatile(table.add(1), data);
            }
            write_volatile(table.add(entries - 1), status);
            write_volatile(self.lens.add(slot as usize), 16 * entries as u32);
        }
    }

    /// Makes a prepared slot available to the device. [`PackedRing::kick`] tells it.
    pub fn submit(&mut self, slot: u16) {
        let flags = if self.avail_wrap { F_AVAIL } else { F_USED };
        // SAFETY: an entry of the ring. It is free: there are as many entries as slots, and this slot is not in flight.
        // The flags are written last (x86 keeps the order of stores, the fence keeps the compiler's).
        unsafe {
            let entry = self.descriptors.add(self.avail as usize);
            write_volatile(&raw mut (*entry).address, self.tables.add(3 * slot as usize) as u64);
            write_volatile(&raw mut (*entry).len, read_volatile(self.lens.add(slot as usize)));
            write_volatile(&raw mut (*entry).id, slot);
            fence(Ordering::Release);
            write_volatile(&raw mut (*entry).flags, F_INDIRECT | flags);
        }
        self.added += 1;
        self.avail += 1;
        if self.avail == self.size {
            (self.avail, self.avail_wrap) = (0, !self.avail_wrap);
        }
    }

    /// Kicks the device if it asked for a kick for what was submitted since the last look.
    pub fn kick(&mut self, transport: &mut impl Transport) {
        let added = core::mem::take(&mut self.added);
        if added == 0 {
            return;
        }
        // What is available must be visible before the device's wish is read: the device does the two the other way round.
        fence(Ordering::SeqCst);
        // SAFETY: the device's event suppression, read in one piece.
        let event = unsafe { read_volatile(self.device_event) };
        let (at, flags) = (event as u16, (event >> 16) as u16 & 3);
        let wanted = if flags == EVENT_AT {
            let mut index = at & 0x7fff;
            if (at >> 15 == 1) != self.avail_wrap {
                index = index.wrapping_sub(self.size);
            }
            let (new, old) = (self.avail, self.avail.wrapping_sub(added));
            new.wrapping_sub(index).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            flags != EVENT_DISABLE
        };
        if wanted {
            self.kicks += 1;
            transport.notify(0);
        }
    }

    /// Takes the next completed slot, if there is one.
    pub fn complete(&mut self) -> Result<Option<u16>, Error> {
        // SAFETY: an entry of the ring; its id is read after its flags.
        let id = unsafe {
            let entry = self.descriptors.add(self.used as usize);
            let flags = read_volatile(&raw const (*entry).flags);
            let is = |bit| (flags & bit != 0) == self.used_wrap;
            if !is(F_AVAIL) || !is(F_USED) {
                return Ok(None);
            }
            fence(Ordering::Acquire);
            read_volatile(&raw const (*entry).id)
        };
        self.used += 1;
        if self.used == self.size {
            (self.used, self.used_wrap) = (0, !self.used_wrap);
        }
        if id < self.size {
            Ok(Some(id))
        } else {
            Err(Error::Device("it completed a request that we never made"))
        }
    }
}
