//! What one session does to the others of its target: task management beyond its own tasks, changed mode parameters.

use iscsi::pdu::{TaskFunction, TaskManagementRequest, TaskResponseCode};

use super::Server;
use super::conn::{ConnError, Phase};
use super::full::{FullFeature, Wider};

impl Server {
    /// The other sessions of a session's target: connection index and state.
    fn peers(&mut self, target: usize) -> impl Iterator<Item = (usize, &mut FullFeature)> {
        self.slots.iter_mut().enumerate().filter_map(move |(index, slot)| {
            match &mut slot.conn.as_mut()?.phase {
                Phase::Full(full) if full.target == Some(target) => Some((index, &mut **full)),
                _ => None,
            }
        })
    }

    /// Carries out what a session asked for that concerns others.
    pub(super) fn wider(&mut self, index: usize, wider: Wider) {
        let Some(target) = self.slots.get(index).and_then(|slot| match &slot.conn.as_ref()?.phase {
            Phase::Full(full) => full.target,
            Phase::Login(_) => None,
        }) else {
            return;
        };
        match wider {
            Wider::ModeChanged(unit) => {
                let slots = &mut self.slots;
                let device = &self.devices[target];
                for (other, slot) in slots.iter_mut().enumerate() {
                    if let Some(Phase::Full(full)) = slot.conn.as_mut().map(|conn| &mut conn.phase)
                        && full.target == Some(target)
                        && other != index
                    {
                        device.note_mode_change(&mut full.attentions, unit);
                    }
                }
            }
            Wider::TaskManagement(request) => self.task_management(index, target, &request),
        }
    }

    /// Functions that end the tasks of all initiators, and resets.
    fn task_management(&mut self, index: usize, target: usize, request: &TaskManagementRequest) {
        let whole_target =
            matches!(request.function, TaskFunction::TargetWarmReset | TaskFunction::TargetColdReset);
        let cold = request.function == TaskFunction::TargetColdReset;
        let lun = (!whole_target).then_some(request.lun);
        let reset = request.function != TaskFunction::ClearTaskSet;
        let device = &mut self.devices[target];
        let units: Vec<_> = match lun {
            Some(lun) => device.find(lun).into_iter().collect(),
            None => device.all_units().collect(),
        };
        if reset {
            units.iter().for_each(|&unit| device.reset(unit));
        }
        tracing::info!(function = ?request.function, lun = ?lun, "task management");
        let mut sessions = Vec::new();
        for (other, full) in self.peers(target) {
            let lost_commands = full.abort(lun);
            if other == index {
                full.session.complete_task_management(request.itt, TaskResponseCode::Complete);
                full.closing |= cold;
            }
            sessions.push((other, lost_commands && other != index));
        }
        for (other, cleared) in sessions {
            if cold && other != index {
                // A cold reset ends all connections (RFC 7143 11.5.1).
                self.close(other, &ConnError::Reset);
                continue;
            }
            let device = &self.devices[target];
            if (reset || cleared)
                && let Some(conn) = &mut self.slots[other].conn
                && let Phase::Full(full) = &mut conn.phase
            {
                for &unit in &units {
                    match reset {
                        // Every initiator is told, the one that asked too (SAM-5 6.3.3).
                        true => device.note_reset(&mut full.attentions, unit),
                        // Its commands will not be answered (SAM-5 5.3.1, TAS of 0).
                        false => device.note_cleared(&mut full.attentions, unit),
                    }
                }
            }
        }
    }
}
