//! When something has to be done about a connection that nobody does anything for.

use serde::{Deserialize, Serialize};

/// Milliseconds since some moment.
pub type Ms = u64;

/// How long the host may take to agree.
pub(super) const CONNECT_MS: Ms = 130_000;
/// How long the last acknowledgement may be missed.
pub(super) const TIME_WAIT_MS: Ms = 2_000;
/// How long nothing is said before the guest is asked whether it is still there.
const IDLE_MS: Ms = 7_200_000;
/// Bounds of the time after which something is repeated (RFC 6298, with Linux's minimum).
const RTO_MIN_MS: u32 = 200;
const RTO_MAX_MS: u32 = 60_000;
const RTO_FIRST_MS: u32 = 1_000;
/// The least time after which the end of what was sent is repeated to have an answer (RFC 8985, 7.2, whose 2 round trips
/// are of real networks; a guest may be busy for a while).
const TAIL_MIN_MS: u32 = 20;
/// How often something is repeated before the connection is given up.
const TRIES: u8 = 10;
/// The same while it is being opened.
const OPEN_TRIES: u8 = 6;

/// What a deadline that has passed means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Late {
    /// It is not over yet.
    No,
    /// Something is repeated: [`Conn::next`](super::Conn::next) has it.
    Repeat,
    /// The last bytes are sent again, to hear which of those before them are missing.
    Probe,
    /// Nobody answers any more.
    GiveUp,
    /// The connection is over, as it should be.
    Over,
}

/// The timer of a connection: one deadline, and how long to wait for an answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Timer {
    deadline: Ms,
    /// Smoothed round-trip time and its variation, times 8 and 4; 0: not measured.
    srtt8: u32,
    var4: u32,
    /// Times that the wait was doubled.
    backoff: u8,
    /// Repetitions since the guest was heard.
    tries: u8,
}

impl Timer {
    pub(super) fn new(now: Ms) -> Self {
        Self { deadline: now + IDLE_MS, srtt8: 0, var4: 0, backoff: 0, tries: 0 }
    }

    pub(super) fn at(&mut self, deadline: Ms) {
        self.deadline = deadline;
    }

    pub(super) fn deadline(&self) -> Ms {
        self.deadline
    }

    pub(super) fn is_due(&self, now: Ms) -> bool {
        now >= self.deadline
    }

    /// Nothing is waited for.
    pub(super) fn reset(&mut self, now: Ms) {
        (self.backoff, self.tries) = (0, 0);
        self.deadline = now + IDLE_MS;
    }

    /// The guest is there.
    pub(super) fn heard(&mut self) {
        self.tries = 0;
    }

    /// It acknowledged something new; `rtt`: so long after it was sent.
    pub(super) fn progress(&mut self, rtt: Option<u32>, now: Ms) {
        if let Some(rtt) = rtt {
            let rtt = rtt.min(RTO_MAX_MS);
            if self.srtt8 == 0 {
                (self.srtt8, self.var4) = ((rtt * 8).max(1), rtt * 2);
            } else {
                let error = (self.srtt8 / 8).abs_diff(rtt);
                self.var4 = self.var4 - self.var4 / 4 + error;
                self.srtt8 = (self.srtt8 - self.srtt8 / 8 + rtt).max(1);
            }
        }
        self.reset(now);
    }

    /// How long the end of what was sent may go without an answer, if that is less than what is waited anyway.
    pub(super) fn tail(&self) -> Option<Ms> {
        let after = (self.srtt8 / 4).max(TAIL_MIN_MS);
        // The answer, and what it shows to be missing, take another round trip: not if a time-out is as fast.
        let answered = after + self.srtt8 / 8;
        (self.srtt8 != 0 && self.backoff == 0 && answered < self.rto()).then_some(after.into())
    }

    /// Repetitions since the guest was heard.
    pub(super) fn tries(&self) -> u8 {
        self.tries
    }

    fn rto(&self) -> u32 {
        // As Linux has it, the minimum is that of what is added: a long way is not an even one.
        let base = if self.srtt8 == 0 { RTO_FIRST_MS } else { self.srtt8 / 8 + self.var4.max(RTO_MIN_MS) };
        base.clamp(RTO_MIN_MS, RTO_MAX_MS).saturating_mul(1 << self.backoff.min(10)).min(RTO_MAX_MS)
    }

    /// An answer is waited for from now on.
    pub(super) fn wait(&mut self, now: Ms) {
        self.deadline = now + Ms::from(self.rto());
    }

    /// The deadline has passed without an answer; `opening`: to the first question.
    pub(super) fn late(&mut self, opening: bool) -> Late {
        self.backoff = self.backoff.saturating_add(1).min(20);
        self.tries = self.tries.saturating_add(1);
        if self.tries > if opening { OPEN_TRIES } else { TRIES } { Late::GiveUp } else { Late::Repeat }
    }
}
