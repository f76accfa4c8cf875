//! The line: the operations in their order, and what they know of the members of a switch.

use std::time::Instant;

use super::cost::{Costs, Stage};
use super::drr::Credit;
use super::enqueue::{Enqueue, Targets};
use super::learn::Learn;
use super::lookup::Lookup;
use super::parse::Parse;
use super::police::{Limiter, Police};
use super::snoop::Snoop;
use super::steer::Steer;
use super::table::MacTable;
use super::work::{Fate, Frames, PortId, PortSet, Work};
use crate::frame::Offloads;
use crate::port::PortSpec;

/// What the line knows of a port.
#[derive(Debug)]
pub struct Member {
    /// As the user described it.
    pub spec: PortSpec,
    /// What it may send.
    pub limiter: Limiter,
    /// When it began to have no room.
    pub full_since: Option<Instant>,
    /// Its turn.
    pub credit: Credit,
    /// Pieces of the first frame of each of its transmit queues that its target has got already.
    pub partial: Vec<u32>,
    /// Which of its queues a flow uses.
    pub steer: Steer,
    /// A front end was there at the last pass.
    pub attached: bool,
    /// It may send what it likes, without a tag at least.
    pub(super) plain: bool,
}

impl Member {
    /// A port as `spec` describes it.
    #[must_use]
    pub fn new(spec: PortSpec, now: Instant) -> Self {
        Self {
            limiter: Limiter::new(spec.rate, now),
            plain: spec.vlan == crate::port::Vlan::default() && !spec.protect,
            partial: vec![0; spec.pairs.into()],
            spec,
            full_since: None,
            credit: Credit::default(),
            steer: Steer::default(),
            attached: false,
        }
    }

    /// Whether it may send what it likes, without a tag at least.
    #[inline]
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.plain
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

/// Where a burst comes from.
#[derive(Clone, Copy, Debug)]
pub struct From {
    /// The port, or the uplink.
    pub port: PortId,
    /// The pair of queues.
    pub pair: u16,
    /// What it may leave to others; `None`: nothing.
    pub host: Option<Offloads>,
}

/// One switch's operations and tables.
#[derive(Debug)]
pub struct Line {
    work: Work,
    /// Its members, the uplink included.
    pub members: PortSet,
    /// The operations.
    pub parse: Parse,
    /// See [`parse`](Self::parse).
    pub police: Police,
    /// See [`parse`](Self::parse).
    pub learn: Learn,
    /// See [`parse`](Self::parse).
    pub snoop: Snoop,
    /// See [`parse`](Self::parse).
    pub lookup: Lookup,
    /// See [`parse`](Self::parse).
    pub enqueue: Enqueue,
    /// Stations.
    pub table: MacTable,
    /// What the operations take.
    pub costs: Costs,
    start: Instant,
}

impl Line {
    /// A switch of these members, whose table is keyed by `secret`.
    #[must_use]
    pub fn new(members: PortSet, secret: u64, now: Instant) -> Self {
        Self {
            work: Work::default(),
            members,
            parse: Parse::default(),
            police: Police::default(),
            learn: Learn::default(),
            snoop: Snoop::default(),
            lookup: Lookup::default(),
            enqueue: Enqueue::default(),
            table: MacTable::new(secret),
            costs: Costs::default(),
            start: now,
        }
    }

    /// Seconds on this line's clock.
    #[must_use]
    pub fn seconds(&self, now: Instant) -> u32 {
        // It starts where an aged entry of time 0 is aged already.
        super::table::AGE_S + now.saturating_duration_since(self.start).as_secs() as u32
    }

    /// Takes a burst along the line; returns how many of its frames are done with. The rest stays with its sender, because
    /// the first of them waits for room.
    pub fn run(&mut self, from: From, frames: &Frames<'_>, targets: &mut Targets<'_>) -> usize {
        let now = targets.now;
        let now_s = self.seconds(now);
        let (work, costs) = (&mut self.work, &mut self.costs);
        let mut lap = costs.begin(frames.len());
        self.parse.run(work, frames, from.host);
        costs.lap(&mut lap, Stage::Parse);
        if let Some(member) = targets.members.get_mut(from.port.index()) {
            self.police.run(work, from.port, member, &self.table, now);
            if member.spec.pairs > 1 {
                member.steer.sent(work, frames, from.pair);
            }
        } else {
            self.police.run_uplink(work, from.port, &self.table);
        }
        costs.lap(&mut lap, Stage::Police);
        self.learn.run(work, from.port, &mut self.table, now_s);
        costs.lap(&mut lap, Stage::Learn);
        self.snoop.run(work, frames, from.port, now_s);
        costs.lap(&mut lap, Stage::Snoop);
        self.lookup.run(work, from.port, self.members, &self.table, &self.snoop, now_s);
        costs.lap(&mut lap, Stage::Lookup);
        let done = self.enqueue.run(work, frames, from, targets);
        costs.lap(&mut lap, Stage::Enqueue);
        if done < work.items().len()
            && let Some(member) = targets.members.get_mut(from.port.index())
        {
            self.police.undo(work, done, member);
        }
        if let Some(capture) = &mut targets.capture {
            capture.decided(from.port, &work.items()[..done], frames, targets.ports.len(), now);
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

    /// A port's front end came or went: what was learned behind it may be elsewhere.
    pub fn flush(&mut self, port: PortId) {
        self.table.flush(Some(port));
        self.snoop.flush(port);
    }
}
