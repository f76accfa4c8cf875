//! [`Session`]: slots, counters and events; the parts that neither send nor receive.

use std::collections::VecDeque;
use std::time::Instant;

use super::flow::{Flow, FlowStats};
use super::task::{State, Task};
use super::timers::{Logout, Tmf};
use super::transmit::{Solicited, Unsolicited};
use super::{Command, Config, Counters, Direction, Outcome, SessionError, Violation};
use crate::pdu::{Itt, TargetPdu, Ttt};
use crate::scsi::{Lun, Sense};
use crate::serial::Serial;

/// Answers to the target's pings that may wait to be sent.
pub(super) const MAX_PING_ANSWERS: usize = 64;

/// Slot bits of the tag of a ping; task slots are below [`Config::MAX_SLOTS`].
pub(super) const SLOT_PING: u16 = 0xFFF0;
/// Slot bits of the tag of a task management request.
pub(super) const SLOT_TMF: u16 = 0xFFF1;
/// Slot bits of the tag of a logout.
pub(super) const SLOT_LOGOUT: u16 = 0xFFF2;

/// Something that the caller acts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A command ended and its slot is free. PDUs with its data that [`Session::next_pdu`] gave out before are still
    /// to be sent in full, so the memory must stay until they are.
    Done {
        /// The slot.
        slot: u16,
        /// How it ended.
        outcome: Outcome,
    },
    /// The target reports an event of a logical unit without a command (Async event 0).
    UnitEvent {
        /// The logical unit.
        lun: Lun,
        /// What happened, if sense data came with it.
        sense: Option<Sense>,
    },
    /// A PDU was rejected (11.17); counted, and what it was for times out if no answer comes.
    Rejected {
        /// Why.
        reason: crate::pdu::RejectReason,
    },
    /// A task management function was started because a command took too long.
    Recovering {
        /// Its name.
        step: &'static str,
        /// The slot of the command.
        slot: u16,
    },
    /// [`Session::reset_unit`] was carried out: no earlier command of the unit, of whatever session, acts any more.
    UnitReset {
        /// The unit.
        lun: Lun,
    },
    /// The target asks for a logout (Async events 1 and 4); it follows as soon as no command is underway.
    LogoutWanted,
    /// The logout was answered, and the target had time for its FIN: nothing more may be sent; unanswered commands may be repeated on a new session after
    /// so many seconds.
    LoggedOut {
        /// Time2Wait of the answer.
        time2wait_s: u16,
    },
}

/// A smoothed round-trip time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rtt(Option<std::time::Duration>);

impl Rtt {
    pub(super) fn sample(&mut self, new: std::time::Duration) {
        self.0 = Some(self.0.map_or(new, |old| old - old / 8 + new / 8));
    }
}

/// An initiator's session in full feature phase. See the [module](super).
#[derive(Debug)]
pub struct Session {
    pub(super) config: Config,
    pub(super) tasks: Vec<Task>,
    pub(super) queue: VecDeque<u16>,
    pub(super) active: usize,
    pub(super) events: VecDeque<Event>,
    pub(super) counters: Counters,
    pub(super) flow: Flow,

    pub(super) cmd_sn: Serial,
    pub(super) exp_cmd_sn: Serial,
    pub(super) max_cmd_sn: Serial,
    pub(super) exp_stat_sn: Serial,

    pub(super) ping_answers: VecDeque<(Lun, Ttt)>,
    pub(super) solicited: VecDeque<Solicited>,
    pub(super) unsolicited: Option<Unsolicited>,
    /// The header whose data is on its way.
    pub(super) current: Option<TargetPdu>,

    pub(super) last_received: Instant,
    /// The ping underway: its tag, when it was queued or sent, whether it was sent.
    pub(super) ping: Option<(Itt, Instant, bool)>,
    /// When the last ping was queued, or the session began.
    pub(super) last_ping: Instant,
    pub(super) rtt: Rtt,
    /// See [`Session::watch_closely`].
    pub(super) busy_interval: Option<std::time::Duration>,
    /// Since when commands are underway without a break.
    pub(super) busy_since: Instant,
    pub(super) tmf: Option<Tmf>,
    pub(super) logout: Option<Logout>,
    /// [`Event::LoggedOut`] was told.
    pub(super) is_over: bool,
    /// No task's time ends before; `None`: no task has a time limit or a function is underway.
    pub(super) scan_at: Option<Instant>,
    /// Generation of the tags that are not tasks'.
    pub(super) control_generation: u16,
}

impl Session {
    /// A session that just logged in.
    pub fn new(mut config: Config, now: Instant) -> Self {
        config.slots = config.slots.clamp(1, Config::MAX_SLOTS);
        config.max_outstanding_r2t = config.max_outstanding_r2t.clamp(1, Config::MAX_OUTSTANDING_R2T);
        let slots = usize::from(config.slots);
        let r2ts = slots * usize::from(config.max_outstanding_r2t);
        Self {
            tasks: vec![Task::free(now); slots],
            queue: VecDeque::with_capacity(slots),
            active: 0,
            // Each slot once, and what a receive can add besides; more than that grows, once.
            events: VecDeque::with_capacity(slots + 64),
            counters: Counters::default(),
            flow: Flow::new(slots),
            cmd_sn: config.cmd_sn,
            exp_cmd_sn: config.cmd_sn,
            max_cmd_sn: config.max_cmd_sn,
            exp_stat_sn: config.exp_stat_sn,
            ping_answers: VecDeque::with_capacity(MAX_PING_ANSWERS),
            solicited: VecDeque::with_capacity(r2ts),
            unsolicited: None,
            current: None,
            last_received: now,
            ping: None,
            last_ping: now,
            rtt: Rtt::default(),
            busy_interval: None,
            busy_since: now,
            tmf: None,
            logout: None,
            is_over: false,
            scan_at: None,
            control_generation: 0,
            config,
        }
    }

    /// What the session was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What the target did against the RFC so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What it waited for so far.
    pub fn flow(&self) -> FlowStats {
        self.flow.stats
    }

    /// Round trip of pings, smoothed as in RFC 6298 (1/8 of each new one); `None` before the first answer. The target's
    /// time to answer is in it.
    pub fn round_trip(&self) -> Option<std::time::Duration> {
        self.rtt.0
    }

    /// Commands submitted and not ended.
    pub fn outstanding(&self) -> usize {
        self.active + self.queue.len()
    }

    /// Commands that wait for the command window or the caller's [`next_pdu`](Self::next_pdu).
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Whether a command may be submitted in this slot.
    pub fn is_free(&self, slot: u16) -> bool {
        self.tasks.get(usize::from(slot)).is_some_and(|t| t.state == State::Free)
    }

    /// Queues a command. It is sent by [`next_pdu`](Self::next_pdu) when the command window allows; commands are sent
    /// in the order of submission.
    ///
    /// # Panics
    /// If the slot is not [free](Self::is_free): slots are the caller's.
    pub fn submit(&mut self, slot: u16, command: Command, now: Instant) {
        let deadline = now + command.timeout;
        if self.active == 0 && self.queue.is_empty() {
            self.busy_since = now;
        }
        let task = &mut self.tasks[usize::from(slot)];
        assert_eq!(task.state, State::Free, "slot {slot} is in use");
        *task = Task {
            state: State::Queued,
            generation: task.generation.wrapping_add(1),
            command,
            deadline,
            ..Task::free(now)
        };
        self.queue.push_back(slot);
        if self.tmf.is_none() {
            self.scan_at = Some(self.scan_at.map_or(deadline, |at| at.min(deadline)));
        }
    }

    /// What happened since; call until `None` after every [`end`](Self::end) and [`timers`](Self::timers).
    pub fn next_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Appends the slots of all commands that were not answered: those sent in CmdSN order, then those never sent in
    /// the order of submission. For the time after the connection is gone.
    pub fn unanswered(&self, out: &mut Vec<u16>) {
        let start = out.len();
        out.extend((0..self.config.slots).filter(|&s| self.task(s).state == State::Active));
        // All live commands lie in less than half of the number space behind the next CmdSN.
        out[start..].sort_unstable_by_key(|&s| std::cmp::Reverse(self.cmd_sn.since(self.task(s).cmd_sn)));
        out.extend(&self.queue);
    }

    pub(super) fn task(&self, slot: u16) -> &Task {
        &self.tasks[usize::from(slot)]
    }

    pub(super) fn task_mut(&mut self, slot: u16) -> &mut Task {
        &mut self.tasks[usize::from(slot)]
    }

    /// The tag of the task in a slot.
    pub(super) fn itt(&self, slot: u16) -> Itt {
        tag(slot, self.task(slot).generation)
    }

    /// The slot of a task that was sent and not answered.
    pub(super) fn find(&self, itt: Itt) -> Option<u16> {
        let (slot, generation) = (itt.0 as u16, (itt.0 >> 16) as u16);
        let task = self.tasks.get(usize::from(slot))?;
        (task.state == State::Active && task.generation == generation).then_some(slot)
    }

    /// As [`find`](Self::find), an error if there is none.
    pub(super) fn require(&mut self, itt: Itt) -> Result<u16, SessionError> {
        self.find(itt).ok_or_else(|| self.violated(Violation::UnknownTask, None))
    }

    /// A tag for something that is not a task.
    pub(super) fn control_tag(&mut self, slot: u16) -> Itt {
        self.control_generation = self.control_generation.wrapping_add(1);
        tag(slot, self.control_generation)
    }

    /// Ends a task and tells the caller.
    pub(super) fn finish(&mut self, slot: u16, outcome: Outcome) {
        let task = self.task_mut(slot);
        debug_assert_eq!(task.state, State::Active);
        task.state = State::Free;
        self.active -= 1;
        // What is left of its output is not sent: the target answered or aborted it, so it waits for none (11.4.2).
        if self.unsolicited.as_ref().is_some_and(|u| u.slot == slot) {
            self.unsolicited = None;
        }
        self.events.push_back(Event::Done { slot, outcome });
    }

    /// Counts a violation and makes the error of it.
    pub(super) fn violated(&mut self, violation: Violation, slot: Option<u16>) -> SessionError {
        self.counters.count(violation);
        SessionError::Violation { violation, slot }
    }

    /// Counts a violation that spoils one task's data, and remembers the first.
    pub(super) fn damage(&mut self, slot: u16, violation: Violation) {
        self.counters.count(violation);
        let task = self.task_mut(slot);
        task.damage = task.damage.or(Some(violation));
    }

    /// Whether the output of a task is without a gap in what was sent; used where the target says that it is done.
    pub(super) fn is_write(&self, slot: u16) -> bool {
        self.task(slot).command.direction == Direction::Write
    }
}

/// A tag of slot and generation. No slot is 0xFFFF, so it is never the reserved tag.
pub(super) fn tag(slot: u16, generation: u16) -> Itt {
    Itt(u32::from(generation) << 16 | u32::from(slot))
}
