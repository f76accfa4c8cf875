//! [`Line`]: the operations that decide where a frame goes, in their order, with their tables; and what they know of those
//! that send.

use std::time::Instant;

use super::cost::{Costs, Stage};
use super::drr::Credit;
use super::learn::Learn;
use super::lookup::Lookup;
use super::parse::Parse;
use super::police::{Limiter, Police};
use super::snoop::Snoop;
use super::table::MacTable;
use super::work::{Frames, PortId, PortSet, Work};
use crate::frame::Offloads;
use crate::port::{PortSpec, Vlan};

/// What the line knows of a port that sends.
#[derive(Debug)]
pub struct Sender {
    /// As the user described it.
    pub spec: PortSpec,
    /// What it may send.
    pub limiter: Limiter,
    /// Its turn.
    pub credit: Credit,
    /// It may send what it likes, without a tag at least.
    plain: bool,
}

impl Sender {
    /// A port as `spec` describes it.
    #[must_use]
    pub fn new(spec: PortSpec, now: Instant) -> Self {
        Self {
            limiter: Limiter::new(spec.rate, now),
            plain: spec.vlan == Vlan::default() && !spec.protect,
            spec,
            credit: Credit::default(),
        }
    }

    /// Whether it may send what it likes, without a tag at least.
    #[inline]
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.plain
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

/// See the module. There is one for each switch.
#[derive(Debug)]
pub struct Line {
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
            members,
            parse: Parse::default(),
            police: Police::default(),
            learn: Learn::default(),
            snoop: Snoop::default(),
            lookup: Lookup::default(),
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

    /// Decides about a burst, from a port (`sender`) or from the uplink; what was decided is in `work`. Returns whether it
    /// is one of those that are timed.
    pub fn decide(
        &mut self,
        work: &mut Work,
        frames: &Frames<'_>,
        from: From,
        sender: Option<&mut Sender>,
        now: Instant,
    ) -> bool {
        let now_s = self.seconds(now);
        let costs = &mut self.costs;
        let mut lap = costs.begin(frames.len());
        self.parse.run(work, frames, from.host);
        costs.lap(&mut lap, Stage::Parse);
        match sender {
            Some(sender) => self.police.run(work, from.port, sender, &self.table, now),
            None => self.police.run_uplink(work, from.port, &self.table),
        }
        costs.lap(&mut lap, Stage::Police);
        self.learn.run(work, from.port, &mut self.table, now_s);
        costs.lap(&mut lap, Stage::Learn);
        self.snoop.run(work, frames, from.port, now_s);
        costs.lap(&mut lap, Stage::Snoop);
        self.lookup.run(work, from.port, self.members, &self.table, &self.snoop, now_s);
        costs.lap(&mut lap, Stage::Lookup);
        lap.is_timed()
    }

    /// A port's front end came or went: what was learned behind it may be elsewhere.
    pub fn flush(&mut self, port: PortId) {
        self.table.flush(Some(port));
        self.snoop.flush(port);
    }
}
