//! Time: keepalive, command time limits and the ladder behind them, logout.

use std::time::{Duration, Instant};

use super::session::{Event, SLOT_LOGOUT, SLOT_TMF, Session};
use super::task::State;
use super::{Outcome, SessionError, Violation};
use crate::pdu::{
    Bhs, Itt, LogoutReason, LogoutRequest, LogoutResponse, Opcode, RejectReason, TaskFunction,
    TaskManagementRequest, TaskResponseCode,
};
use crate::scsi::Lun;
use crate::serial::Serial;

/// How long a command whose PDU was rejected may still be answered (11.17.1: it should be, with CHECK CONDITION).
const REJECTED_TASK_GRACE: Duration = Duration::from_secs(1);

/// How long the target's FIN behind a Logout Response is waited for.
const FIN_PATIENCE: Duration = Duration::from_millis(500);

/// A task management function underway; one at a time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tmf {
    function: TaskFunction,
    itt: Itt,
    /// The task that took too long; the reserved tag if the caller wants the function.
    task: Itt,
    lun: Lun,
    ref_cmd_sn: Serial,
    sent: bool,
    deadline: Instant,
}

/// A logout that is wanted or underway.
#[derive(Clone, Copy, Debug)]
pub(super) struct Logout {
    /// Not to be sent while commands are underway, unless this time has come.
    latest: Instant,
    /// That time has come; what keeps the logout from being sent now is a connection that takes nothing.
    due: bool,
    itt: Option<Itt>,
    deadline: Instant,
    /// Time2Wait of the answer: only the target's FIN is waited for, until `deadline`.
    answered: Option<u16>,
}

impl Logout {
    pub(super) fn is_sent(&self) -> bool {
        self.itt.is_some()
    }
}

impl Session {
    /// When [`timers`](Self::timers) must run next, if nothing else happens.
    pub fn deadline(&self) -> Option<Instant> {
        if let Some(logout) = self.logout.filter(Logout::is_sent) {
            // Nothing else is timed any more.
            return (!self.is_over).then_some(logout.deadline);
        }
        let keepalive = match self.ping {
            Some((_, at, _)) => self.last_received.max(at) + self.config.nop_timeout,
            None => self.next_ping(),
        };
        let logout =
            self.logout.map(|l| if l.due { l.latest + self.config.logout_timeout } else { l.latest });
        // One function at a time: what is overdue waits for its end.
        let overdue = self.scan_at.filter(|_| self.tmf.is_none());
        [Some(keepalive), logout, self.tmf.map(|t| t.deadline), overdue].into_iter().flatten().min()
    }

    /// Runs what is due.
    ///
    /// # Errors
    /// The session cannot go on.
    pub fn timers(&mut self, now: Instant) -> Result<(), SessionError> {
        if let Some(logout) = self.logout
            && logout.is_sent()
        {
            match logout.answered {
                _ if now < logout.deadline => {}
                Some(_) if self.is_over => {}
                Some(time2wait_s) => {
                    self.is_over = true;
                    self.events.push_back(Event::LoggedOut { time2wait_s });
                }
                None => return Err(SessionError::LogoutTimeout { timeout: self.config.logout_timeout }),
            }
            return Ok(());
        }
        if let Some(logout) = &mut self.logout {
            logout.due |= now >= logout.latest;
            if now >= logout.latest + self.config.logout_timeout {
                return Err(SessionError::LogoutTimeout { timeout: self.config.logout_timeout });
            }
        }
        match self.ping {
            Some((_, at, _)) => {
                if now >= self.last_received.max(at) + self.config.nop_timeout {
                    return Err(SessionError::Silent { timeout: self.config.nop_timeout });
                }
            }
            None => {
                // Under load as well: the round trip is a figure that people ask for.
                if now >= self.next_ping() {
                    self.ping_now(now);
                }
            }
        }
        if let Some(tmf) = self.tmf
            && now >= tmf.deadline
        {
            self.escalate(&tmf, "no answer", now)?;
        }
        if self.tmf.is_none() && self.scan_at.is_some_and(|at| now >= at) {
            self.scan(now)?;
        }
        Ok(())
    }

    /// Looks for commands whose time is over, and for the next one's.
    fn scan(&mut self, now: Instant) -> Result<(), SessionError> {
        let mut next: Option<Instant> = None;
        let mut overdue: Option<u16> = None;
        for slot in 0..self.config.slots {
            let task = self.task(slot);
            match task.state {
                State::Free => {}
                State::Queued if task.deadline <= now => return Err(SessionError::WindowClosed),
                State::Active if task.deadline <= now => {
                    if overdue.is_none_or(|other| task.cmd_sn.is_before(self.task(other).cmd_sn)) {
                        overdue = Some(slot);
                    }
                }
                State::Queued | State::Active => {
                    next = Some(next.map_or(task.deadline, |at| at.min(task.deadline)));
                }
            }
        }
        self.scan_at = next;
        if let Some(slot) = overdue {
            self.start_tmf(TaskFunction::AbortTask, slot, now);
        }
        Ok(())
    }

    /// Sends LOGICAL UNIT RESET, which ends the unit's tasks of all sessions (SAM-5 7.7): for a caller who cannot know
    /// whether an earlier session of his is at its end. [`Event::UnitReset`] follows, or
    /// [`SessionError::ResetFailed`]. Commands of this session that are underway end as [`Outcome::Aborted`] then.
    pub fn reset_unit(&mut self, lun: Lun, now: Instant) {
        debug_assert!(self.tmf.is_none(), "a function is underway");
        self.tmf = Some(Tmf {
            function: TaskFunction::LogicalUnitReset,
            itt: self.control_tag(SLOT_TMF),
            task: Itt::NONE,
            lun,
            ref_cmd_sn: Serial(0),
            sent: false,
            deadline: now + self.config.task_management_timeout,
        });
    }

    /// Whether [`reset_unit`](Self::reset_unit) can be called: no other function is underway, nor a logout.
    pub fn can_reset_unit(&self) -> bool {
        self.tmf.is_none() && self.logout.is_none()
    }

    fn start_tmf(&mut self, function: TaskFunction, slot: u16, now: Instant) {
        let itt = self.control_tag(SLOT_TMF);
        self.tmf = Some(Tmf {
            function,
            itt,
            task: self.itt(slot),
            lun: self.task(slot).command.lun,
            ref_cmd_sn: self.task(slot).cmd_sn,
            sent: false,
            deadline: now + self.config.task_management_timeout,
        });
        // Other commands' time limits are looked at when this is over.
        self.scan_at = None;
        self.events.push_back(Event::Recovering { step: step(function), slot });
    }

    /// The function failed: the next step of the ladder.
    fn escalate(&mut self, tmf: &Tmf, why: &'static str, now: Instant) -> Result<(), SessionError> {
        if tmf.task.is_none() {
            return Err(SessionError::ResetFailed { why });
        }
        if tmf.function == TaskFunction::AbortTask
            && let Some(slot) = self.find(tmf.task)
        {
            self.start_tmf(TaskFunction::LogicalUnitReset, slot, now);
            return Ok(());
        }
        if tmf.function == TaskFunction::AbortTask {
            // The task was answered in the meantime; the missing answer to the function is the keepalive's to judge.
            self.tmf_over();
            return Ok(());
        }
        Err(SessionError::Stuck { step: step(tmf.function), why })
    }

    fn tmf_over(&mut self) {
        self.tmf = None;
        // Look at all tasks at the next opportunity.
        self.scan_at = (self.outstanding() > 0).then_some(self.last_received);
    }

    /// The request to send, if one waits.
    pub(super) fn tmf_request(&mut self) -> Option<TaskManagementRequest> {
        let (cmd_sn, exp_stat_sn) = (self.cmd_sn, self.exp_stat_sn);
        let tmf = self.tmf.as_mut().filter(|t| !t.sent)?;
        tmf.sent = true;
        let is_abort = tmf.function == TaskFunction::AbortTask;
        Some(TaskManagementRequest {
            immediate: true,
            function: tmf.function,
            lun: tmf.lun,
            itt: tmf.itt,
            // Reserved for functions on sets of tasks (11.5.4).
            referenced_itt: if is_abort { tmf.task } else { Itt::NONE },
            cmd_sn,
            exp_stat_sn,
            ref_cmd_sn: if is_abort { tmf.ref_cmd_sn } else { Serial(0) },
            exp_data_sn: Serial(0),
        })
    }

    pub(super) fn tmf_response(&mut self, itt: Itt, response: TaskResponseCode) -> Result<(), SessionError> {
        let Some(tmf) = self.tmf.filter(|t| t.itt == itt && t.sent) else {
            // A late answer to a function that was given up is no violation.
            if itt.0 as u16 == SLOT_TMF {
                return Ok(());
            }
            return Err(self.violated(Violation::UnexpectedAnswer, None));
        };
        let now = self.last_received;
        let gone = matches!(response, TaskResponseCode::Complete)
            || (tmf.function == TaskFunction::AbortTask && response == TaskResponseCode::NoTask);
        if !gone {
            return self.escalate(&tmf, "refused by the target", now);
        }
        if tmf.function == TaskFunction::AbortTask {
            if let Some(slot) = self.find(tmf.task) {
                self.finish(slot, Outcome::Aborted);
            }
        } else {
            for slot in 0..self.config.slots {
                if self.task(slot).state == State::Active && self.task(slot).command.lun == tmf.lun {
                    self.finish(slot, Outcome::Aborted);
                }
            }
        }
        if tmf.task.is_none() {
            self.events.push_back(Event::UnitReset { lun: tmf.lun });
        }
        self.tmf_over();
        Ok(())
    }

    /// A PDU of ours was rejected (11.17.1).
    pub(super) fn rejected(&mut self, bhs: &Bhs, reason: RejectReason) -> Result<(), SessionError> {
        let now = self.last_received;
        match bhs.opcode() {
            Some(Opcode::ScsiCommand | Opcode::DataOut) => {
                // The target still owes an answer to the command; if it does not come, the task is aborted.
                if let Some(slot) = self.find(bhs.itt()) {
                    let deadline = now + REJECTED_TASK_GRACE;
                    let task = self.task_mut(slot);
                    task.deadline = task.deadline.min(deadline);
                    if self.tmf.is_none() {
                        self.scan_at = Some(self.scan_at.map_or(deadline, |at| at.min(deadline)));
                    }
                }
                Ok(())
            }
            Some(Opcode::TaskManagementRequest) => match self.tmf {
                Some(tmf) if tmf.itt == bhs.itt() => self.escalate(&tmf, "rejected by the target", now),
                _ => Ok(()),
            },
            // It lives, which is all that a ping asks.
            Some(Opcode::NopOut) => {
                if self.ping.is_some_and(|(itt, ..)| itt == bhs.itt()) {
                    self.ping = None;
                }
                Ok(())
            }
            _ => Err(SessionError::Rejected(reason)),
        }
    }

    /// Ends the session in order: no new commands, a Logout when none is underway or `patience` is over, then
    /// [`Event::LoggedOut`].
    pub fn logout(&mut self, now: Instant, patience: Duration) {
        let latest = now + patience;
        match &mut self.logout {
            Some(logout) => logout.latest = logout.latest.min(latest),
            None => {
                self.logout =
                    Some(Logout { latest, due: false, itt: None, deadline: latest, answered: None });
            }
        }
    }

    /// Whether a logout is wanted or underway: no command is sent any more.
    pub fn is_closing(&self) -> bool {
        self.logout.is_some()
    }

    /// The target wants a logout within so many seconds (11.9.1).
    pub(super) fn logout_wanted(&mut self, within_s: u16) {
        // Half of the time for what is underway, the rest for the logout itself.
        self.logout(self.last_received, Duration::from_millis(u64::from(within_s) * 500));
        self.events.push_back(Event::LogoutWanted);
    }

    /// The Logout to send, if its time has come.
    pub(super) fn logout_request(&mut self, now: Instant) -> Option<LogoutRequest> {
        let logout = self.logout.filter(|l| !l.is_sent())?;
        if self.active > 0 && now < logout.latest {
            return None;
        }
        let itt = self.control_tag(SLOT_LOGOUT);
        let deadline = now + self.config.logout_timeout;
        self.logout = Some(Logout { itt: Some(itt), deadline, ..logout });
        Some(LogoutRequest {
            immediate: true,
            reason: LogoutReason::CloseSession,
            itt,
            cid: self.config.cid,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.exp_stat_sn,
        })
    }

    pub(super) fn logout_response(&mut self, pdu: &LogoutResponse) -> Result<(), SessionError> {
        if self.logout.and_then(|l| l.itt) != Some(pdu.itt) {
            return Err(self.violated(Violation::UnexpectedAnswer, None));
        }
        // The target sends FIN behind it, which is to be received if possible (11.14).
        if let Some(logout) = &mut self.logout {
            logout.answered = Some(pdu.time2wait_s);
            logout.deadline = self.last_received + FIN_PATIENCE.min(self.config.logout_timeout);
        }
        Ok(())
    }

    /// The Logout was answered, with this Time2Wait: an end of the connection is the one that was asked for. If none
    /// comes, [`Event::LoggedOut`] does after a short time.
    pub fn logged_out(&self) -> Option<u16> {
        self.logout?.answered
    }

    /// Whether a reset of the unit is to be sent or answered.
    pub(super) fn is_resetting(&self) -> bool {
        self.tmf.is_some_and(|tmf| tmf.function != TaskFunction::AbortTask)
    }
}

fn step(function: TaskFunction) -> &'static str {
    match function {
        TaskFunction::AbortTask => "ABORT TASK",
        TaskFunction::LogicalUnitReset => "LOGICAL UNIT RESET",
        _ => "task management",
    }
}
