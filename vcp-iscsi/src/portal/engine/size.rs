//! Asking for the unit's size from time to time: not every target tells of a change by unit attention or asynchronously.

use std::time::Instant;

use iscsi::initiator::{Command, Direction, Outcome};
use iscsi::scsi::capacity::{CAPACITY_16_BYTES, Capacity};
use iscsi::scsi::{Cdb, SenseKey, Status};

use super::{IscsiEngine, Path, Phase, own_job};

impl IscsiEngine {
    /// When the size is to be read again; `None` while there is no path for it, or never.
    pub(super) fn size_due(&self) -> Option<Instant> {
        let at = self.size_read + self.options.timeouts.size_check?;
        self.paths.iter().any(Path::is_quiet).then_some(at)
    }

    /// Sends READ CAPACITY(16), beside the requests, if it is time.
    pub(super) fn read_size(&mut self, now: Instant) {
        if self.size_due().is_none_or(|at| at > now) {
            return;
        }
        let Some(path) = self.paths.iter_mut().find(|path| path.is_quiet()) else { return };
        let Some(wire) = &mut path.wire else { return };
        self.size_read = now;
        path.sizing = true;
        let command = Command {
            lun: path.lun,
            cdb: Cdb::read_capacity_16(CAPACITY_16_BYTES),
            direction: Direction::Read,
            len_bytes: CAPACITY_16_BYTES,
            exact: false,
            timeout: self.options.timeouts.command,
        };
        self.jobs.put(path.own_slot, own_job(command));
        wire.session.submit(path.own_slot, command, now);
    }

    /// Takes the answer; false if it is none of this.
    pub(super) fn size_ended(&mut self, index: usize, outcome: &Outcome) -> bool {
        let path = &mut self.paths[index];
        if !std::mem::take(&mut path.sizing) {
            return false;
        }
        let job = self.jobs.take(path.own_slot);
        let Outcome::Status { status, sense, transferred_bytes } = *outcome else { return true };
        let capacity = job.filter(|_| status == Status::GOOD).and_then(|job| {
            let mut data = vec![0; transferred_bytes as usize];
            job.data.copy_to(0, &mut data);
            Capacity::parse_16(&data).ok()
        });
        let changed =
            capacity.is_some_and(|c| (c.blocks, c.block_bytes) != (self.lun.blocks, self.lun.block_bytes));
        // A unit attention that came to this command will not come again.
        path.rescan |= changed || sense.is_some_and(|sense| sense.key == SenseKey::UnitAttention);
        true
    }
}

impl Path {
    /// In use, and none of its own commands is underway.
    fn is_quiet(&self) -> bool {
        matches!(self.phase, Phase::Up)
            && self.look.is_none()
            && !self.sizing
            && !self.rescan
            && self.class().is_some()
            && self.wire.as_ref().is_some_and(|wire| wire.session.is_free(self.own_slot))
    }
}
