//! [`Path`]: one way to the unit, which is one session with one portal; and what is in doubt when it is lost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use iscsi::initiator::{Counters, FlowStats};
use iscsi::scsi;
use iscsi::scsi::alua::AccessState;
use iscsi::scsi::vpd::Designators;

use crate::portal::Options;
use crate::portal::client::Negotiated;
use crate::portal::link::Dial;
use crate::portal::probe::{Access, Found, Identity, Probe};
use crate::portal::wire::{Wire, WireStats};

/// Most paths of a unit; a command slot of its own is set aside in every session for each.
pub const MAX_PATHS: usize = 16;

/// After a connection was given up, so long nothing is reset: what the target's side of it had received already becomes a
/// task (which the reset ends) or is answered by then.
pub(super) const DRAIN: Duration = Duration::from_millis(200);

/// So long a lost path has to come back by itself before a login in its name is tried by another one.
pub(super) const OWN_WAY: Duration = Duration::from_millis(30);

#[derive(Debug)]
pub(super) enum Phase {
    /// The session is up and the unit is known to be the right one.
    Up,
    /// The session is up, but the unit is being looked at before commands go out.
    Probing,
    /// No session; the next attempt comes then.
    Waiting { until: Instant },
    /// An attempt is underway.
    Dialing(Box<Dial>),
    /// Logged out; nothing comes any more.
    Closed,
}

/// What a login with the same ISID must come to so that it ends the earlier session (RFC 7143 6.3.5): the portal group,
/// or of a target that does not name it, the portal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Group(u16),
    Portal(String),
}

impl From<&Negotiated> for Place {
    fn from(session: &Negotiated) -> Self {
        session.portal_group_tag.map_or_else(|| Self::Portal(session.portal.clone()), Self::Group)
    }
}

/// A session that ended without our knowing what the target still does for it. See `doubt.rs`.
#[derive(Debug)]
pub(super) struct Doubt {
    /// Where the session was; `None`: it was a former process's, if there was one.
    pub(super) place: Option<Place>,
    /// Writes of it, in the order to repeat them.
    pub(super) held: Vec<u16>,
    /// Some of its writes are not held back any more (their requests were ended, or were a former process's): what is
    /// written now could be overwritten by them.
    pub(super) orphans: bool,
    /// Not before this is the unit reset for it.
    pub(super) reset_at: Instant,
    /// Not before this is a login tried in its name by way of another path: the path itself may be back at once.
    pub(super) login_at: Instant,
    /// That login.
    pub(super) dial: Option<Box<Dial>>,
    /// Such a login did not help.
    pub(super) no_login: bool,
}

impl Doubt {
    /// There may have been a session in this path's name before this process.
    pub(super) fn of_a_former_process(reset_at: Instant) -> Self {
        Self {
            place: None,
            held: Vec::new(),
            orphans: true,
            reset_at,
            login_at: reset_at,
            dial: None,
            no_login: true,
        }
    }
}

/// What happened on a path, for people.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct PathStats {
    /// Sessions lost.
    pub sessions_lost: u64,
    /// Sessions gained.
    pub sessions_gained: u64,
    /// Times that commands had to take another path because this one died or was closed.
    pub failovers: u64,
    /// Times that it was found silent while another path was not.
    pub silences: u64,
    /// Times that another unit than ours, or one that could not be told from others, was found at its end.
    pub wrong_units: u64,
    /// Commands sent to it.
    pub commands: u64,
}

/// A look at the unit that is underway.
#[derive(Debug)]
pub(super) struct Look {
    pub(super) probe: Box<Probe>,
    /// When to send its next command; `None`: it was sent.
    pub(super) later: Option<Instant>,
    /// Only the access state is asked for, and the path stays in use meanwhile.
    pub(super) brief: bool,
}

/// One way to the unit.
#[derive(Debug)]
pub(super) struct Path {
    pub(super) options: Arc<Options>,
    /// The unit's address at this path's target.
    pub(super) lun: scsi::Lun,
    /// Slot of the path's own commands.
    pub(super) own_slot: u16,
    pub(super) negotiated: Negotiated,
    pub(super) wire: Option<Wire>,
    pub(super) phase: Phase,
    pub(super) look: Option<Look>,
    /// What was found at its end once it was accepted.
    pub(super) identity: Option<Identity>,
    /// VPD page 83h of this path: with the port and its group.
    pub(super) names: Designators,
    /// ALUA; `None`: the unit has none, or tells nothing of this port.
    pub(super) access: Option<Access>,
    /// When the access state is to be read again.
    pub(super) check_at: Option<Instant>,
    /// Reads of the access state since it last was active, for the pause.
    pub(super) checks: u32,
    /// The unit is to be looked at again.
    pub(super) rescan: bool,
    /// Its size is being read, by the path's own slot.
    pub(super) sizing: bool,
    /// Commands at once, as the target's TASK SET FULL taught; grows again with successes.
    pub(super) window: usize,
    pub(super) window_credit: usize,
    pub(super) doubt: Option<Doubt>,
    pub(super) attempts: u32,
    pub(super) up_since: Instant,
    /// The user timeout that its socket has.
    pub(super) user_timeout: Option<Duration>,
    /// Why there is no session, or why it is not used.
    pub(super) problem: Option<String>,
    pub(super) counters: Counters,
    pub(super) wire_stats: WireStats,
    pub(super) flow: FlowStats,
    pub(super) stats: PathStats,
}

impl Path {
    pub(super) fn new(options: Arc<Options>, lun: scsi::Lun, own_slot: u16, now: Instant) -> Self {
        Self {
            lun,
            own_slot,
            negotiated: Negotiated::default(),
            wire: None,
            phase: Phase::Waiting { until: now },
            look: None,
            identity: None,
            names: Designators::default(),
            access: None,
            check_at: None,
            checks: 0,
            rescan: false,
            sizing: false,
            window: usize::from(options.queue_depth),
            window_credit: 0,
            doubt: None,
            attempts: 0,
            up_since: now,
            user_timeout: None,
            problem: None,
            counters: Counters::default(),
            wire_stats: WireStats::default(),
            flow: FlowStats::default(),
            stats: PathStats::default(),
            options,
        }
    }

    /// A path whose session stands and whose unit is known.
    pub(super) fn with_session(mut self, wire: Wire, negotiated: Negotiated, found: &Found) -> Self {
        self.wire = Some(wire);
        self.negotiated = negotiated;
        self.identity = Some(found.identity());
        self.names = found.names.clone();
        self.access = found.access;
        // Read soon, which also sets the time of the next reading.
        self.check_at = found.access.map(|_| self.up_since);
        self.phase = Phase::Up;
        self.stats.sessions_gained = 1;
        self
    }

    /// Whether commands may be sent, and how gladly: 0 is best.
    pub(super) fn class(&self) -> Option<u8> {
        if !matches!(self.phase, Phase::Up) || self.doubt.is_some() {
            return None;
        }
        let Some(access) = self.access else { return Some(0) };
        match access.state {
            AccessState::Optimized => Some(0),
            AccessState::NonOptimized | AccessState::LbaDependent => {
                Some(if access.preferred { 1 } else { 2 })
            }
            _ => None,
        }
    }

    /// Commands with the target.
    pub(super) fn outstanding(&self) -> usize {
        self.wire.as_ref().map_or(0, |wire| wire.session.outstanding())
    }

    pub(super) fn state(&self) -> &'static str {
        match self.phase {
            Phase::Up if self.doubt.is_some() => "up, resetting the unit before it is used",
            Phase::Up => "up",
            Phase::Probing => "looking at the unit",
            Phase::Waiting { .. } => "lost, pause before the next attempt",
            Phase::Dialing(_) => "lost, logging in",
            Phase::Closed => "closed",
        }
    }

    /// Counts what a wire counted, when it ends.
    pub(super) fn retire(&mut self, wire: &Wire) {
        self.counters.add(wire.session.counters());
        self.wire_stats.add(wire.stats);
        self.flow.add(wire.session.flow());
    }
}
