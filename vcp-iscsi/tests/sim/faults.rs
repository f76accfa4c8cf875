//! What goes wrong: which kinds in this run and how often, all from the seed; and the log of what did.
//!
//! Each run draws a few kinds (swarm testing: a run with everything at once reaches less than many runs with some). Every
//! fault that happens has a number in its run; those in `skip` do not happen, which is how the shrinker takes them away.

use std::collections::BTreeSet;

use super::rng::Rng;

macro_rules! kinds {
    ($($(#[$meta:meta])* $name:ident: $per_mille:literal, $group:ident;)*) => {
        /// A kind of fault.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Kind { $($(#[$meta])* $name,)* }

        impl Kind {
            pub const ALL: &'static [Kind] = &[$(Kind::$name,)*];

            /// How many of 1000 occasions, where the run has this kind.
            const fn per_mille(self) -> u64 {
                match self { $(Kind::$name => $per_mille,)* }
            }

            pub const fn group(self) -> Group {
                match self { $(Kind::$name => Group::$group,)* }
            }
        }
    };
}

/// What a fault does to a request at worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// The engine cures it, however often it comes; no request fails.
    Curable,
    /// Repeated without end, it makes a request fail.
    Counted,
}

kinds! {
    // Of the network; for each tick of the fault clock.
    /// The connection breaks after some more bytes of one direction; both ends learn it, each in its time.
    Cut: 300, Curable;
    /// The connection carries nothing any more, without a word; what was on its way comes much later, or never.
    HalfOpen: 120, Counted;
    /// Nothing moves for a while.
    Pause: 150, Counted;
    /// The next connections are refused, or hang.
    Refuse: 150, Curable;
    /// The receiver of what the engine sends stops reading for a while: the socket fills up.
    StopReading: 150, Counted;
    /// A bit of what the target sends is wrong; only with digests on headers and data.
    BitFlip: 120, Counted;
    // Of the target as a whole; for each tick of the fault clock.
    /// Off and on again: silence, then connections are reset; the volatile cache is gone.
    PowerLoss: 150, Curable;
    /// The program ends and is started again: connections are reset, what was answered stays.
    Crash: 150, Curable;
    /// The target drops the connection in order.
    DropConnection: 120, Curable;
    /// Async message: please log out.
    AskLogout: 100, Curable;
    /// Async message: connection or session dropped.
    TellDropped: 80, Curable;
    /// Async message of another kind.
    Chatter: 100, Curable;
    /// The target pings.
    Ping: 200, Curable;
    /// The command window stays closed for a while.
    CloseWindow: 100, Counted;
    /// No command is executed for a while; connections live.
    Stall: 100, Counted;
    /// A unit attention for the unit.
    Attention: 200, Curable;
    /// A portal is not reached for a while, and what runs through it breaks or falls silent.
    PathDeath: 150, Counted;
    /// An access state changes, and back after a while.
    AccessChange: 120, Counted;
    // Of a login.
    /// Status class 3.
    RefuseLogin: 200, Curable;
    /// Status class 1, to the other portal.
    Redirect: 250, Curable;
    // Of a command.
    /// BUSY, TASK SET FULL.
    Busy: 60, Curable;
    /// TASK ABORTED, ACA ACTIVE aside.
    TaskAborted: 20, Curable;
    /// NOT READY, becoming ready.
    NotReady: 30, Curable;
    /// ABORTED COMMAND with any code.
    AbortedCommand: 20, Counted;
    /// Executed after long.
    Slow: 30, Counted;
    /// Never answered, executed or not.
    Hang: 15, Counted;
    /// Response code 1; executed or not.
    TargetFailure: 30, Counted;
    /// Half of the data, an honest residual, GOOD.
    ShortHonest: 30, Counted;
    /// A Data-In PDU is missing.
    DropDataIn: 30, Counted;
    /// A Data-In PDU comes twice.
    DoubleDataIn: 30, Counted;
    /// Two Data-In PDUs are swapped.
    SwapDataIn: 30, Counted;
    /// A wrong DataSN.
    WrongDataSn: 25, Counted;
    /// Data at another offset, inside the buffer or outside.
    WrongOffset: 25, Counted;
    /// A residual that does not fit.
    WrongResidual: 30, Counted;
    /// An ExpDataSN that counts more than there was.
    WrongExpDataSn: 20, Counted;
    /// A StatSN that skips one or repeats.
    WrongStatSn: 15, Counted;
    /// The response comes twice.
    DoubleResponse: 15, Counted;
    /// Of the next command's tag, or of none.
    WrongTag: 15, Counted;
    /// R2T out of bounds, too long, twice, with another number or LUN.
    WrongR2t: 40, Counted;
    /// GOOD before all of the data was fetched; nothing is stored.
    EarlyGood: 40, Counted;
    /// A Reject for the command instead of an answer.
    Reject: 15, Counted;
    /// Nonsense in place of a header.
    Nonsense: 10, Counted;
    /// MaxCmdSN far below ExpCmdSN: to be ignored.
    WrongWindow: 40, Curable;
    // Of a task management function.
    /// Refused.
    RefuseTaskManagement: 200, Counted;
    /// Not answered.
    IgnoreTaskManagement: 150, Counted;
}

/// One fault that happened.
#[derive(Clone, Copy, Debug)]
pub struct Happened {
    pub number: usize,
    pub kind: Kind,
    pub at_ns: u64,
}

#[derive(Debug)]
pub struct Faults {
    rng: Rng,
    /// By kind.
    per_mille: Vec<u64>,
    skip: BTreeSet<usize>,
    pub active: bool,
    pub log: Vec<Happened>,
    count: usize,
    /// Faults in this run at most.
    most: usize,
}

impl Faults {
    pub fn new(seed: u64, skip: &BTreeSet<usize>) -> Self {
        let mut rng = Rng::new(seed, 1);
        let share = rng.pick(&[30, 100, 200, 400]);
        // How the run as a whole is.
        let scale = rng.pick(&[300, 1000, 1000, 2500]);
        let most = rng.spread(2, 80) as usize;
        let per_mille = Kind::ALL
            .iter()
            .map(|kind| if rng.permille(share) { kind.per_mille() * scale / 1000 } else { 0 })
            .collect();
        Self { rng, per_mille, skip: skip.clone(), active: true, log: Vec::new(), count: 0, most }
    }

    /// Only these kinds, as often as they come at most.
    pub fn only(seed: u64, kinds: &[Kind], skip: &BTreeSet<usize>) -> Self {
        let mut faults = Self::new(seed, skip);
        faults.per_mille =
            Kind::ALL.iter().map(|kind| if kinds.contains(kind) { kind.per_mille() } else { 0 }).collect();
        faults
    }

    pub fn has(&self, kind: Kind) -> bool {
        self.per_mille[kind as usize] > 0
    }

    /// The kinds of this run.
    pub fn kinds(&self) -> Vec<Kind> {
        Kind::ALL.iter().copied().filter(|&kind| self.has(kind)).collect()
    }

    /// Whether requests may fail in this run.
    pub fn may_fail(&self) -> bool {
        self.kinds().iter().any(|kind| kind.group() == Group::Counted)
    }

    /// Whether a fault of this kind happens now.
    pub fn roll(&mut self, kind: Kind, now_ns: u64) -> bool {
        let per_mille = self.per_mille[kind as usize];
        if per_mille == 0 || !self.active || self.count >= self.most || !self.rng.permille(per_mille) {
            return false;
        }
        let number = self.count;
        self.count += 1;
        if self.skip.contains(&number) {
            return false;
        }
        self.log.push(Happened { number, kind, at_ns: now_ns });
        true
    }

    /// For the details of a fault.
    pub fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }
}
