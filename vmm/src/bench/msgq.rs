//! The same load through `msgq`: a program without a guest, as [`msgq_blk`] makes it, in place of a virtqueue.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use msgq::spin::Spin;
use msgq_blk::{Disk, Options};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO};

use super::args::{BlkArgs, Rw, WaitMode};
use super::disk::{Done, LoadQueue, Op};
use super::front::Device;

/// A connection with as many slots as requests in flight.
#[derive(Debug)]
pub(super) struct MsgqQueue {
    disk: Disk,
    timeout: Duration,
    started: Vec<Instant>,
    /// Data to write, and what was read if anybody looks at it.
    data: Vec<Vec<u8>>,
    keep: bool,
    depth: u16,
}

impl MsgqQueue {
    /// Connects, as often as there are queues.
    pub(super) fn connect(args: &BlkArgs) -> Result<(Device, Vec<Self>)> {
        let timeout = Duration::from_secs_f64(args.timeout);
        let spin = match args.wait {
            WaitMode::Event => Spin::Fixed(Duration::ZERO),
            WaitMode::Poll => Spin::Always,
        };
        let io_bytes = u32::try_from(args.bs).context("--bs is too large")?;
        let options = Options {
            depth: args.qd,
            io_bytes,
            deadline: timeout,
            spin,
            reattach: Duration::ZERO,
            latency: false,
        };
        let one = || -> Result<Self> {
            let disk = Disk::open(&args.socket, &options)?;
            if disk.depth() < u32::from(args.qd) {
                bail!("the server takes {} requests in flight, not --qd {}", disk.depth(), args.qd);
            }
            let slots = usize::from(args.qd);
            Ok(Self {
                disk,
                timeout,
                started: vec![Instant::now(); slots],
                data: vec![Vec::new(); slots],
                keep: args.rw == Rw::Verify,
                depth: args.qd,
            })
        };
        let queues = (0..args.queues).map(|_| one()).collect::<Result<Vec<_>>>()?;
        let info = queues.first().context("no queues")?.disk.info();
        let features =
            u64::from(info.read_only) << VIRTIO_BLK_F_RO | u64::from(info.write_cache) << VIRTIO_BLK_F_FLUSH;
        let device =
            Device { len_bytes: info.bytes(), block_bytes: info.block_bytes, size_max: None, features };
        Ok((device, queues))
    }
}

impl LoadQueue for MsgqQueue {
    fn depth(&self) -> u16 {
        self.depth
    }

    fn inflight(&self) -> usize {
        self.disk.inflight() as usize
    }

    fn write_data(&mut self, slot: u16, bytes: &[u8]) {
        self.data[usize::from(slot)].clear();
        self.data[usize::from(slot)].extend_from_slice(bytes);
    }

    fn read_data(&mut self, slot: u16, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.data[usize::from(slot)]);
    }

    fn submit(&mut self, slot: u16, op: Op, sector: u64, len: usize) -> Result<()> {
        let at = usize::from(slot);
        self.started[at] = Instant::now();
        let tag = u64::from(slot);
        match op {
            Op::Read => self.disk.submit_read(sector, len, tag)?,
            Op::Write => {
                let data = &self.data[at];
                self.disk.submit_write_with(sector, len, tag, |out| out.copy_from_slice(data))?;
            }
            Op::Flush => self.disk.submit_flush(tag)?,
        }
        Ok(())
    }

    fn notify(&mut self) -> Result<()> {
        // What `poll` and `wait` do first.
        Ok(())
    }

    fn poll(&mut self) -> Result<Option<Done>> {
        let Some(done) = self.disk.poll()? else { return Ok(None) };
        let at = usize::try_from(done.tag)?;
        let latency = self.started[at].elapsed();
        done.result.with_context(|| format!("request in slot {at}"))?;
        if self.keep {
            let data = &mut self.data[at];
            // A write leaves nothing to read back.
            if !data.is_empty() {
                self.disk.read_back(&done, 0, data)?;
            }
        }
        Ok(Some(Done { slot: at as u16, latency }))
    }

    fn wait(&mut self) -> Result<Done> {
        let end = Instant::now() + self.timeout;
        loop {
            if let Some(done) = self.poll()? {
                return Ok(done);
            }
            if Instant::now() >= end {
                bail!(
                    "no completion for {} s with {} requests in flight",
                    self.timeout.as_secs_f32(),
                    self.inflight()
                );
            }
            self.disk.wait(Some(end))?;
        }
    }

    fn flush(&mut self) -> Result<()> {
        self.disk.flush()?;
        Ok(())
    }

    fn signals(&self) -> (u64, u64) {
        let stats = self.disk.channel().map(msgq::Channel::stats);
        stats.map_or((0, 0), |stats| (stats.kicks, stats.sleeps))
    }
}
