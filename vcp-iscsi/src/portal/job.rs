//! The table of commands underway: one entry for each slot of a session, which outlives the session.

use std::time::Instant;

use iscsi::initiator::Command;
use iscsi::scsi::unmap::{ONE_DESCRIPTOR_BYTES, one_descriptor};
use vcp_core::mem::GuestBuf;

use crate::engine::{Op, Outcome};

/// What WRITE SAME writes: the largest logical block, of zeroes.
static ZERO_BLOCK: [u8; 4096] = [0; 4096];

/// Where a command's data lies.
#[derive(Debug, Default)]
pub(super) enum Payload {
    /// In the request's guest memory (or in memory of ours in the same form).
    #[default]
    Guest,
    /// An UNMAP parameter list.
    Unmap([u8; ONE_DESCRIPTOR_BYTES]),
    /// One block of zeroes.
    Zeroes,
}

/// Data of a command, to be sent from where it lies.
#[derive(Clone, Copy, Debug)]
pub(super) enum Data<'a> {
    /// Guest memory.
    Guest(&'a GuestBuf),
    /// Private memory.
    Private(&'a [u8]),
}

/// One command.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) command: Command,
    /// The device model's name for the request; `None` for commands of our own.
    pub(super) tag: Option<u64>,
    pub(super) op: Op,
    pub(super) data: GuestBuf,
    pub(super) payload: Payload,
    /// Sessions lost by the time the request came.
    pub(super) losses: u64,
    /// The WRITE that was carried out, while the SYNCHRONIZE CACHE behind it is underway.
    pub(super) written: Option<Command>,
    /// Path that its command took last.
    pub(super) path: u8,
    /// PDUs handed to the wire whose data is not sent yet: the memory must stay.
    pub(super) unsent: u32,
    /// How it ended, if only `unsent` keeps it.
    pub(super) ended: Option<Outcome>,
    /// Failures that count against repeating it.
    pub(super) failures: u32,
    /// Times it was turned away (busy, not ready), for the back-off.
    pub(super) refusals: u32,
    /// When it was first turned away.
    pub(super) refused_since: Option<Instant>,
}

/// When a job was given to the engine, and when its command was first sent; for the latency split.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// What was asked for; the job's own may change on the way.
    pub(super) op: Op,
    pub(super) queued: Option<Instant>,
    pub(super) sent: Option<Instant>,
}

impl Times {
    const NONE: Self = Self { op: Op::Read, queued: None, sent: None };
}

/// The table; the index is the slot.
#[derive(Debug)]
pub(super) struct Jobs(Vec<Option<Job>>, Vec<Times>);

impl Jobs {
    pub(super) fn new(slots: u16) -> Self {
        Self((0..slots).map(|_| None).collect(), vec![Times::NONE; slots.into()])
    }

    pub(super) fn get(&self, slot: u16) -> Option<&Job> {
        self.0.get(usize::from(slot))?.as_ref()
    }

    pub(super) fn get_mut(&mut self, slot: u16) -> Option<&mut Job> {
        self.0.get_mut(usize::from(slot))?.as_mut()
    }

    pub(super) fn put(&mut self, slot: u16, job: Job) {
        self.1[usize::from(slot)] = Times { op: job.op, ..Times::NONE };
        self.0[usize::from(slot)] = Some(job);
    }

    /// The pass in which the engine first saw the slot's job is `now`; false if it saw it before.
    pub(super) fn saw(&mut self, slot: u16, now: Instant) -> bool {
        match self.1.get_mut(usize::from(slot)) {
            Some(times) if times.queued.is_none() => {
                times.queued = Some(now);
                true
            }
            _ => false,
        }
    }

    /// The slot's command goes out.
    pub(super) fn sent(&mut self, slot: u16, now: Instant) {
        if let Some(times) = self.1.get_mut(usize::from(slot)) {
            times.sent.get_or_insert(now);
        }
    }

    /// See [`Times`].
    pub(super) fn times(&self, slot: u16) -> Times {
        self.1.get(usize::from(slot)).copied().unwrap_or(Times::NONE)
    }

    pub(super) fn take(&mut self, slot: u16) -> Option<Job> {
        self.0.get_mut(usize::from(slot))?.take()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (u16, &mut Job)> {
        self.0.iter_mut().enumerate().filter_map(|(slot, job)| Some((slot as u16, job.as_mut()?)))
    }

    /// The data of a slot that the session named in something to send.
    pub(super) fn data(&self, slot: u16) -> Data<'_> {
        match self.get(slot) {
            Some(job) => job.data(),
            // Cannot be: a job stays while something of it is unsent. No data is sent for it then.
            None => Data::Private(&[]),
        }
    }
}

impl Job {
    /// One that nothing has happened to yet, without a name of the device model's.
    pub(super) fn new(command: Command, op: Op, data: GuestBuf, payload: Payload) -> Self {
        Self {
            command,
            tag: None,
            op,
            data,
            payload,
            losses: 0,
            written: None,
            path: 0,
            unsent: 0,
            ended: None,
            failures: 0,
            refusals: 0,
            refused_since: None,
        }
    }

    /// Where its data lies.
    pub(super) fn data(&self) -> Data<'_> {
        match &self.payload {
            Payload::Guest => Data::Guest(&self.data),
            Payload::Unmap(list) => Data::Private(list),
            Payload::Zeroes => {
                Data::Private(&ZERO_BLOCK[..ZERO_BLOCK.len().min(self.command.len_bytes as usize)])
            }
        }
    }
}

/// The payload of UNMAP for one range.
pub(super) fn unmap_payload(lba: u64, blocks: u32) -> Payload {
    Payload::Unmap(one_descriptor(lba, blocks))
}
