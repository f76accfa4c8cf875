//! Looking at the unit behind a path: is it the right one, has it changed, what is its access state.

use std::time::{Duration, Instant};

use iscsi::initiator::Outcome as TaskOutcome;
use iscsi::scsi::alua::AccessState;
use iscsi::scsi::{self, Status};

use super::path::Look;
use super::{IscsiEngine, Phase, own_job};
use crate::portal::PortalError;
use crate::portal::probe::{Access, Next, Probe, ProbeError, Reply};

/// How often the access state of a path is read that is not the best one; a change to a path in use tells itself by a
/// unit attention, but one that gets no commands hears of nothing.
const ACCESS_CHECK: Duration = Duration::from_secs(5);
/// First pause before the state is read again where no path is active, doubled each time.
const ACCESS_CHECK_MIN: Duration = Duration::from_millis(10);
/// Longest such pause.
const ACCESS_CHECK_MAX: Duration = Duration::from_secs(1);

impl IscsiEngine {
    /// The path's own command ended.
    pub(super) fn own_ended(&mut self, index: usize, outcome: TaskOutcome, now: Instant) {
        if self.size_ended(index, &outcome) {
            return;
        }
        let path = &mut self.paths[index];
        let own_slot = path.own_slot;
        let Some(look) = &mut path.look else { return };
        let mut data = Vec::new();
        let (status, sense) = match outcome {
            TaskOutcome::Status { status, sense, transferred_bytes } => {
                if let Some(job) = self.jobs.get(own_slot) {
                    data.resize(transferred_bytes as usize, 0);
                    job.data.copy_to(0, &mut data);
                }
                (status, sense)
            }
            // Tried again; the probe bounds how often.
            _ => (Status::BUSY, None),
        };
        self.jobs.take(own_slot);
        match look.probe.answer(Reply { status, sense, data: &data }) {
            Ok(Next::Send) => look.later = Some(now),
            Ok(Next::Later(pause)) => look.later = Some(now + pause),
            Ok(Next::Done) => {
                let Some(look) = path.look.take() else { return };
                let access = look.probe.access();
                let opened = access.is_some_and(|access| access.state.is_active())
                    && path.access.is_some_and(|access| !access.state.is_active());
                if look.brief && opened {
                    // Before it is used, the unit is looked at through it like through a new path.
                    self.start_look(index, now);
                } else if look.brief {
                    self.access_read(index, access, now);
                } else {
                    self.looked(index, *look.probe, now);
                }
            }
            Err(source) => {
                let error = self.probe_error(index, source);
                self.lost(index, &error, 0, None, now);
            }
        }
    }

    fn probe_error(&self, index: usize, source: ProbeError) -> PortalError {
        let path = &self.paths[index];
        PortalError::Probe {
            portal: path.options.url.portal.to_string(),
            target: path.options.url.target.clone().unwrap_or_default(),
            lun: path.lun.to_string(),
            source: source.into(),
        }
    }

    /// Whether the unit at the end of a path is ours.
    fn check_unit(&self, index: usize, probe: &Probe) -> Result<(), String> {
        let (path, seen) = (&self.paths[index], probe.identity());
        if let Some(wanted) = self.options.unit_id.as_ref().filter(|wanted| !wanted.names(&seen)) {
            return Err(format!("{seen}, not {wanted}"));
        }
        if let Some(before) = &path.identity {
            // At the same address nothing may have changed.
            if before.serial != seen.serial {
                return Err(format!("serial number {:?}, not {:?}", seen.serial, before.serial));
            }
            return seen.check_same(before, true);
        }
        let (ours, theirs) = (&self.options.url, &path.options.url);
        let same_target =
            (&ours.portal, &ours.target, ours.lun) == (&theirs.portal, &theirs.target, theirs.lun);
        seen.check_same(&self.found.identity(), same_target)
    }

    /// The unit was looked at.
    fn looked(&mut self, index: usize, probe: Probe, now: Instant) {
        let (identity, access, names) = (probe.identity(), probe.access(), probe.names().clone());
        let mut checked = self.check_unit(index, &probe);
        let found = match probe.finish() {
            Ok(found) => Some(found),
            // The right unit, but not for reads and writes: it may be one day.
            Err(ProbeError::NoAccess(_)) => None,
            Err(source) => {
                let error = self.probe_error(index, source);
                return self.lost(index, &error, 0, None, now);
            }
        };
        if let Some(found) = &found
            && found.capacity.block_bytes != self.lun.block_bytes
        {
            let (now, before) = (found.capacity.block_bytes, self.lun.block_bytes);
            checked = checked.and(Err(format!("{now} bytes per block, not {before}")));
        }
        if let Err(why) = checked {
            self.paths[index].stats.wrong_units += 1;
            self.stats.wrong_units += 1;
            let path = &self.paths[index];
            let error = PortalError::OtherUnit {
                target: path.options.url.target.clone().unwrap_or_default(),
                lun: path.lun.to_string(),
                portal: path.options.url.portal.to_string(),
                why,
            };
            return self.lost(index, &error, 0, None, now);
        }
        let path = &mut self.paths[index];
        path.identity = Some(identity);
        path.names = names;
        path.phase = Phase::Up;
        path.problem = None;
        if let Some(found) = found {
            let lun = found.lun(self.options.read_only);
            if lun != self.lun {
                tracing::info!(url = %self.options.url, blocks_before = self.lun.blocks, blocks = lun.blocks, "unit changed");
                if lun.blocks < self.lun.blocks {
                    tracing::warn!(url = %self.options.url, "the unit shrank; requests behind its end fail");
                }
                self.lun = lun;
                self.changed = true;
            }
            self.found = found;
        }
        self.access_read(index, access, now);
    }

    /// The access state of a path is known.
    fn access_read(&mut self, index: usize, access: Option<Access>, now: Instant) {
        let others = self.paths.iter().enumerate().any(|(i, p)| i != index && p.class().is_some());
        let path = &mut self.paths[index];
        if path.access.map(|a| a.state) != access.map(|a| a.state)
            && let Some(access) = access
        {
            tracing::info!(path = %path.options.url, state = %access.state, group = ?access.group, "access state");
        }
        path.access = access;
        path.check_at = access.and_then(|access| match access.state {
            AccessState::Optimized => None,
            state if state.is_active() => Some(now + ACCESS_CHECK),
            _ => Some(now + path.closed_pause(others)),
        });
        if access.is_none_or(|access| access.state.is_active()) {
            path.checks = 0;
        }
        self.paths_changed();
    }

    /// A command was turned away because of the path's access state.
    pub(super) fn access_lost(&mut self, index: usize, state: AccessState, now: Instant) {
        let others = self.paths.iter().enumerate().any(|(i, p)| i != index && p.class().is_some());
        let path = &mut self.paths[index];
        let was_active = path.access.is_none_or(|access| access.state.is_active());
        match &mut path.access {
            Some(access) => access.state = state,
            None => path.access = Some(Access { group: None, state, preferred: false }),
        }
        if was_active {
            tracing::warn!(path = %path.options.url, %state, "the unit is not accessible through this path");
            path.stats.failovers += 1;
            self.stats.failovers += 1;
            path.check_at = Some(now + path.closed_pause(others));
            self.paths_changed();
        }
    }

    /// The unit told that access states changed: all of them are read.
    pub(super) fn access_changed(&mut self, now: Instant) {
        for path in &mut self.paths {
            if matches!(path.phase, Phase::Up) && path.access.is_some() {
                path.check_at = Some(now);
            }
        }
    }

    /// Starts looks that are due, and sends their next commands.
    pub(super) fn look_again(&mut self, now: Instant) {
        for index in 0..self.paths.len() {
            let path = &mut self.paths[index];
            if path.may_look() && self.reset.is_none() {
                if path.rescan {
                    self.start_look(index, now);
                } else if path.check_at.is_some_and(|at| at <= now) {
                    path.check_at = None;
                    if path.access.is_some_and(|access| access.group.is_some()) && path.identity.is_some() {
                        let probe = Box::new(Probe::of_access(path.lun, path.names.clone(), path.access));
                        path.look = Some(Look { probe, later: Some(now), brief: true });
                    } else {
                        // The unit tells its states by refusing only.
                        self.start_look(index, now);
                    }
                }
            }
            self.drive_look(index, now);
        }
    }

    /// Sends the look's next command, if it is time.
    fn drive_look(&mut self, index: usize, now: Instant) {
        let path = &mut self.paths[index];
        let (own_slot, Some(look)) = (path.own_slot, &mut path.look) else { return };
        if look.later.is_none_or(|at| at > now) || self.jobs.get(own_slot).is_some() {
            return;
        }
        look.later = None;
        let command = look.probe.next();
        self.jobs.put(own_slot, own_job(command));
        if let Some(wire) = &mut path.wire {
            wire.session.submit(own_slot, command, now);
        }
    }

    /// Looks at the unit; the path takes no commands meanwhile.
    pub(super) fn start_look(&mut self, index: usize, now: Instant) {
        let path = &mut self.paths[index];
        path.rescan = false;
        path.check_at = None;
        path.phase = Phase::Probing;
        path.look = Some(Look { probe: Box::new(Probe::new(path.lun)), later: Some(now), brief: false });
        self.jobs.take(path.own_slot);
        self.paths_changed();
    }

    /// When a look has to go on.
    pub(super) fn look_at(&self) -> Option<Instant> {
        self.paths
            .iter()
            .filter(|path| path.wire.is_some())
            .flat_map(|path| {
                // What cannot be done yet is no reason to wake up: the end of what is in its way is.
                let check = path.check_at.filter(|_| path.may_look() && self.reset.is_none());
                [path.look.as_ref().and_then(|look| look.later), check]
            })
            .flatten()
            .min()
    }
}

impl super::Path {
    /// Whether its own command slot is free for a look.
    fn may_look(&self) -> bool {
        matches!(self.phase, Phase::Up) && self.look.is_none() && !self.sizing
    }

    /// How long to wait before the state of a closed path is read again.
    fn closed_pause(&mut self, others: bool) -> Duration {
        let longest = if others { ACCESS_CHECK } else { ACCESS_CHECK_MAX };
        let pause = longest.min(ACCESS_CHECK_MIN * (1 << self.checks.min(10)));
        self.checks += 1;
        pause
    }
}

/// The address of a unit at another target: as the first one's if the user means the same number.
pub(super) fn address_at(wanted: scsi::Lun, url_lun: scsi::Lun, first: scsi::Lun) -> scsi::Lun {
    if wanted == url_lun { first } else { wanted }
}
