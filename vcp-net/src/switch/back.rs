//! [`Back`]: the second half of the way of a frame: what was decided is carried out, and the books are kept.

use std::time::Instant;

use super::cost::{Costs, Stage};
use super::enqueue::{Enqueue, Targets};
use super::line::From;
use super::steer::Steer;
use super::work::{Fate, Frames, Work};
use crate::port::PortSpec;

/// What is known of a port that frames go to, and of what it got in part.
#[derive(Debug)]
pub struct Member {
    /// As the user described it.
    pub spec: PortSpec,
    /// When it began to have no room.
    pub full_since: Option<Instant>,
    /// Pieces of the first frame of each of its transmit queues that its target has got already.
    pub partial: Vec<u32>,
    /// Which of its queues a flow uses.
    pub steer: Steer,
    /// A front end was there at the last pass.
    pub attached: bool,
}

impl Member {
    /// A port as `spec` describes it.
    #[must_use]
    pub fn new(spec: PortSpec) -> Self {
        Self {
            partial: vec![0; spec.pairs.into()],
            spec,
            full_since: None,
            steer: Steer::default(),
            attached: false,
        }
    }

    /// Whether it has been without room for so long that it holds nobody up any more.
    #[must_use]
    pub fn is_stuck(&self, now: Instant) -> bool {
        self.full_since.is_some_and(|since| now.saturating_duration_since(since) >= super::PATIENCE)
    }

    /// When it will be, if it has no room.
    #[must_use]
    pub fn stuck_at(&self, now: Instant) -> Option<Instant> {
        self.full_since.map(|since| since + super::PATIENCE).filter(|at| *at > now)
    }
}

/// See the module. There is one for each switch.
#[derive(Debug, Default)]
pub struct Back {
    /// The last operation.
    pub enqueue: Enqueue,
    /// What it takes.
    pub costs: Costs,
}

impl Back {
    /// Gives a burst to its targets; returns how many of its frames are done with. The rest stays with its sender, because
    /// the first of them waits for room.
    pub fn deliver(
        &mut self,
        work: &Work,
        frames: &Frames<'_>,
        from: From,
        timed: bool,
        targets: &mut Targets<'_>,
    ) -> usize {
        let mut lap = self.costs.go_on(timed);
        if let Some(member) = targets.members.get_mut(from.port.index())
            && member.spec.pairs > 1
        {
            member.steer.sent(work, frames, from.pair);
        }
        let done = self.enqueue.run(work, frames, from, targets);
        self.costs.lap(&mut lap, Stage::Enqueue);
        if let Some(capture) = &mut targets.capture {
            capture.decided(from.port, &work.items()[..done], frames, targets.ports.len(), targets.now);
        }
        let tally = targets.account.of(from.port, from.pair);
        for item in &work.items()[..done] {
            tally.in_frames += 1;
            tally.in_bytes += u64::from(item.len_bytes);
            match item.fate {
                Fate::Drop(reason) => tally.drop_from(reason),
                Fate::Many(targets) => {
                    tally.delivered += 1;
                    tally.targets += u64::from(targets.len());
                }
                // `Open` does not come out of `lookup`.
                Fate::To(_) | Fate::Open => {
                    tally.delivered += 1;
                    tally.targets += 1;
                }
            }
        }
        done
    }
}
