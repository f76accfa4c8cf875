//! Shared memory for request buffers, and the two calls of `virtio-driver` that take addresses.
//!
//! `virtio-driver` wants buffers in memory that it has shared with the device. Its safe calls take slices, but a slice
//! over memory that the device writes at the same time is no sound reference; so buffers are volatile memory here,
//! and the raw calls, which are `unsafe`, get their addresses.
#![allow(unsafe_code)] // `readv` and `writev` of virtio-driver; see above.

use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::{Context, anyhow};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::{VirtioBlkQueue, VirtioBlkTransport, iovec};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::Result;

/// A memfd in slots of equal size, one for each request.
#[derive(Debug)]
pub(super) struct Arena {
    region: MmapRegion<()>,
    slot_bytes: usize,
}

impl Arena {
    /// Makes it and shares it with the device.
    pub(super) fn new(transport: &mut VirtioBlkTransport, slots: usize, slot_bytes: usize) -> Result<Self> {
        let file: File = memfd_create("vcp-front-buffers", MemfdFlags::CLOEXEC)?.into();
        let len = slots.checked_mul(slot_bytes).context("too many buffers")?;
        file.set_len(len as u64)?;
        let fd = file.as_raw_fd();
        let region = MmapRegion::from_file(FileOffset::new(file, 0), len).context("map the buffers")?;
        transport.map_mem_region(region.as_ptr() as usize, len, fd, 0).context("share the buffers")?;
        Ok(Self { region, slot_bytes })
    }

    /// Bytes in a slot.
    pub(super) fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Copies into a slot.
    pub(super) fn put(&self, slot: usize, data: &[u8]) -> Result<()> {
        self.slice(slot, data.len())?.write_slice(data, 0)?;
        Ok(())
    }

    /// Copies out of a slot.
    pub(super) fn get(&self, slot: usize, data: &mut [u8]) -> Result<()> {
        self.slice(slot, data.len())?.read_slice(data, 0)?;
        Ok(())
    }

    fn slice(&self, slot: usize, len: usize) -> Result<vm_memory::VolatileSlice<'_>> {
        if len > self.slot_bytes {
            return Err(anyhow!("{len} bytes do not fit a buffer of {}", self.slot_bytes));
        }
        Ok(self.region.get_slice(slot * self.slot_bytes, len)?)
    }

    /// Cuts a slot into `pieces` iovecs of equal length in sectors, the last one takes the rest.
    fn iovecs(&self, slot: usize, len: usize, pieces: usize) -> Result<Vec<iovec>> {
        let slice = self.slice(slot, len)?;
        let base = slice.ptr_guard_mut().as_ptr();
        let piece = (len / pieces.max(1) / 512 * 512).max(512);
        let mut iov = Vec::new();
        let mut at = 0;
        while at < len {
            let rest = len - at;
            let n = if iov.len() + 1 >= pieces.max(1) { rest } else { piece.min(rest) };
            iov.push(iovec { iov_base: base.wrapping_add(at).cast(), iov_len: n });
            at += n;
        }
        Ok(iov)
    }

    /// Queues a read into a slot, as `pieces` descriptors.
    pub(super) fn read(
        &self,
        queue: &mut VirtioBlkQueue<'static, usize>,
        offset: u64,
        slot: usize,
        len: usize,
        pieces: usize,
    ) -> Result<()> {
        let iov = self.iovecs(slot, len, pieces)?;
        // SAFETY: the iovecs lie within `region` (get_slice checked it), which is mapped as long as `self` lives, and
        // `Driver` keeps `self` longer than the queue. Nothing holds a reference into the region.
        unsafe { queue.readv(offset, iov.as_ptr(), iov.len(), slot) }?;
        Ok(())
    }

    /// Queues a write from a slot, as `pieces` descriptors.
    pub(super) fn write(
        &self,
        queue: &mut VirtioBlkQueue<'static, usize>,
        offset: u64,
        slot: usize,
        len: usize,
        pieces: usize,
    ) -> Result<()> {
        let iov = self.iovecs(slot, len, pieces)?;
        // SAFETY: as for `read`.
        unsafe { queue.writev(offset, iov.as_ptr(), iov.len(), slot) }?;
        Ok(())
    }
}
