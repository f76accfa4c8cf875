//! A session between two processes: [`Session::export`] takes its numbers out, [`Session::import`] goes on from them.
//!
//! Only a session with nothing under way can be handed over: no command, no answer due to the target, no ping or task
//! management function of ours. What is left is what both sides agreed on and the sequence numbers (RFC 7143 4.2.2),
//! and the generations of the task tags: a tag that was used a moment ago is not used again at once by the other
//! process, so that a late PDU of the old one cannot find a task of the new one.
//!
//! The bytes of the connection that were received and not looked at, and the socket, are the caller's.

use std::time::Instant;

use super::{Config, Counters, Session};
use crate::initiator::task::State;
use crate::serial::Serial;

/// Everything that a session with nothing under way consists of.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionState {
    /// What it was made with. Its numbers are those of the login; the ones in force follow.
    pub config: Config,
    /// CmdSN of the next command.
    pub cmd_sn: Serial,
    /// The target's ExpCmdSN, as last told.
    pub exp_cmd_sn: Serial,
    /// The target's MaxCmdSN, as last told.
    pub max_cmd_sn: Serial,
    /// StatSN expected next.
    pub exp_stat_sn: Serial,
    /// Generation of each slot's last tag.
    pub generations: Vec<u16>,
    /// Generation of the last tag that was not a task's.
    pub control_generation: u16,
    /// What the target did against the RFC: count by description.
    pub violations: Vec<(String, u64)>,
}

/// Why a session cannot be handed over now. All of these pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Underway {
    /// Commands were not answered.
    #[error("{0} commands are under way")]
    Commands(usize),
    /// The caller has not taken all events.
    #[error("events were not taken")]
    Events,
    /// Something is due to the target.
    #[error("an answer to the target is due")]
    Due,
    /// A PDU has come in part.
    #[error("a PDU has come in part")]
    Pdu,
    /// A ping was not answered.
    #[error("a ping is under way")]
    Ping,
    /// A task management function was not answered.
    #[error("a task management function is under way")]
    TaskManagement,
    /// The session is being logged out.
    #[error("the session is being logged out")]
    Logout,
}

/// Why a state is not one of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// A number of slots that no session has.
    #[error("{slots} slots with {generations} generations")]
    Slots {
        /// Slots of the configuration.
        slots: u16,
        /// Generations given.
        generations: usize,
    },
    /// A command window that no target can have told (4.2.2.1).
    #[error("CmdSN {cmd_sn}, ExpCmdSN {exp_cmd_sn} and MaxCmdSN {max_cmd_sn} do not go together")]
    Window {
        /// Of the next command.
        cmd_sn: u32,
        /// The target's.
        exp_cmd_sn: u32,
        /// The target's.
        max_cmd_sn: u32,
    },
    /// A length or count that negotiation cannot have led to.
    #[error("{0} is out of range")]
    Parameter(&'static str),
}

impl Session {
    /// The session's state, if nothing is under way.
    ///
    /// # Errors
    /// What is under way; it passes.
    pub fn export(&self) -> Result<SessionState, Underway> {
        match () {
            () if self.outstanding() != 0 => Err(Underway::Commands(self.outstanding())),
            () if !self.events.is_empty() => Err(Underway::Events),
            () if self.logout.is_some() => Err(Underway::Logout),
            () if self.tmf.is_some() => Err(Underway::TaskManagement),
            () if self.ping.is_some() => Err(Underway::Ping),
            () if self.current.is_some() => Err(Underway::Pdu),
            () if self.unsolicited.is_some()
                || !self.solicited.is_empty()
                || !self.ping_answers.is_empty() =>
            {
                Err(Underway::Due)
            }
            () => Ok(SessionState {
                config: self.config.clone(),
                cmd_sn: self.cmd_sn,
                exp_cmd_sn: self.exp_cmd_sn,
                max_cmd_sn: self.max_cmd_sn,
                exp_stat_sn: self.exp_stat_sn,
                generations: self.tasks.iter().map(|task| task.generation).collect(),
                control_generation: self.control_generation,
                violations: self.counters.seen().map(|(what, n)| (what.to_string(), n)).collect(),
            }),
        }
    }

    /// Goes on where the session of `state` stopped. The target counts as heard of at `now`.
    ///
    /// # Errors
    /// The state is not one that [`export`](Self::export) gives.
    pub fn import(state: SessionState, now: Instant) -> Result<Self, ImportError> {
        check(&state)?;
        let mut session = Self::new(state.config, now);
        (session.cmd_sn, session.exp_cmd_sn) = (state.cmd_sn, state.exp_cmd_sn);
        (session.max_cmd_sn, session.exp_stat_sn) = (state.max_cmd_sn, state.exp_stat_sn);
        session.control_generation = state.control_generation;
        for (task, generation) in session.tasks.iter_mut().zip(state.generations) {
            debug_assert_eq!(task.state, State::Free);
            task.generation = generation;
        }
        session.counters = Counters::of_text(&state.violations);
        Ok(session)
    }
}

fn check(state: &SessionState) -> Result<(), ImportError> {
    let config = &state.config;
    let (slots, generations) = (config.slots, state.generations.len());
    if slots == 0 || slots > Config::MAX_SLOTS || generations != usize::from(slots) {
        return Err(ImportError::Slots { slots, generations });
    }
    // Nothing is under way, so the target has seen every number below CmdSN; a target may be late to say so, but not
    // ahead. MaxCmdSN may be one below ExpCmdSN (a closed window), or up to 2^31 - 1 ahead.
    let (cmd_sn, exp, max) = (state.cmd_sn, state.exp_cmd_sn, state.max_cmd_sn);
    if exp.is_after(cmd_sn) || max.is_before(exp.sub(1)) {
        return Err(ImportError::Window { cmd_sn: cmd_sn.0, exp_cmd_sn: exp.0, max_cmd_sn: max.0 });
    }
    // 13.12 to 13.14: 512 to 2^24 - 1; 13.17: 1 to 65535, of which the session takes what it has room for.
    let lengths = [
        ("FirstBurstLength", config.first_burst_bytes),
        ("MaxBurstLength", config.max_burst_bytes),
        ("the target's MaxRecvDataSegmentLength", config.max_send_bytes),
        ("our MaxRecvDataSegmentLength", config.max_receive_bytes),
    ];
    if let Some((name, _)) = lengths.iter().find(|(_, len_bytes)| !(512..1 << 24).contains(len_bytes)) {
        return Err(ImportError::Parameter(name));
    }
    if !(1..=Config::MAX_OUTSTANDING_R2T).contains(&config.max_outstanding_r2t) {
        return Err(ImportError::Parameter("MaxOutstandingR2T"));
    }
    Ok(())
}
