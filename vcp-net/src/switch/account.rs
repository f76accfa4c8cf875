//! What came in, what went out, what was dropped and why; exactly.
//!
//! For every port and the uplink, by pair of queues: a frame that is taken from a sender counts there as `in`, and ends
//! either as delivered or in one of the sender's drops. A delivered frame has one target or several; each target counts
//! it as `out` or in one of its own drops. So over a switch `in + copies = out + drops`, where `copies` is how many more
//! targets than frames there were. [`Account::balance`] says whether that holds; tests ask it all the time.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Why a frame was dropped. Its operation is [`stage`](Self::stage).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reason {
    /// Shorter than an Ethernet header, or than the header in front of it.
    TooShort,
    /// Longer than any frame.
    TooLong,
    /// A header (VIRTIO 1.2, 5.1.6) that does not go with the frame or with what was negotiated.
    BadHeader,
    /// A source address that no station can have.
    BadSource,
    /// In a VLAN that its port is not in.
    Vlan,
    /// From an address that is not the port's to use.
    Spoofed,
    /// More than the port may send.
    RateLimit,
    /// From a port whose link is down.
    LinkDown,
    /// For bridges alone (802.1Q, 8.6.3).
    Reserved,
    /// For a station on the port that it came from.
    SamePort,
    /// For nobody: there is no other port in its VLAN.
    Nobody,
    /// The target is in another VLAN.
    TargetVlan,
    /// Nobody is connected to the target, or its driver is not there.
    Down,
    /// The target's driver does not want frames for this address.
    Filtered,
    /// The target has no room.
    Full,
    /// Longer than the target takes.
    Mtu,
    /// It could not be finished for the target: its metadata does not go with its bytes.
    Unfinishable,
    /// The target's ring broke a rule.
    Broken,
    /// The uplink refused it.
    Refused,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Self::TooShort,
        Self::TooLong,
        Self::BadHeader,
        Self::BadSource,
        Self::Vlan,
        Self::Spoofed,
        Self::RateLimit,
        Self::LinkDown,
        Self::Reserved,
        Self::SamePort,
        Self::Nobody,
        Self::TargetVlan,
        Self::Down,
        Self::Filtered,
        Self::Full,
        Self::Mtu,
        Self::Unfinishable,
        Self::Broken,
        Self::Refused,
    ];

    /// Which operation drops for this reason.
    #[must_use]
    pub fn stage(self) -> &'static str {
        match self {
            Self::TooShort | Self::TooLong | Self::BadHeader => "parse",
            Self::BadSource | Self::Vlan | Self::Spoofed | Self::RateLimit | Self::LinkDown => "police",
            Self::Reserved | Self::SamePort | Self::Nobody => "lookup",
            _ => "enqueue",
        }
    }

    /// Its name in counters.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::TooShort => "too_short",
            Self::TooLong => "too_long",
            Self::BadHeader => "bad_header",
            Self::BadSource => "bad_source",
            Self::Vlan => "vlan",
            Self::Spoofed => "spoofed",
            Self::RateLimit => "rate_limit",
            Self::LinkDown => "link_down",
            Self::Reserved => "reserved",
            Self::SamePort => "same_port",
            Self::Nobody => "nobody",
            Self::TargetVlan => "target_vlan",
            Self::Down => "down",
            Self::Filtered => "filtered",
            Self::Full => "full",
            Self::Mtu => "mtu",
            Self::Unfinishable => "unfinishable",
            Self::Broken => "broken",
            Self::Refused => "refused",
        }
    }
}

/// Counters of one pair of queues, or of an uplink.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Frames taken from it.
    pub in_frames: u64,
    /// Their bytes.
    pub in_bytes: u64,
    /// Of these, frames that had a target.
    pub delivered: u64,
    /// Targets that they had.
    pub targets: u64,
    /// Frames given to it.
    pub out_frames: u64,
    /// Their bytes.
    pub out_bytes: u64,
    /// Frames that were finished in software for it.
    pub finished: u64,
    /// Pieces that they made.
    pub pieces: u64,
    /// Drops of frames that came from it.
    from: [u64; Reason::ALL.len()],
    /// Drops of frames that were for it.
    to: [u64; Reason::ALL.len()],
}

impl Tally {
    /// A frame that came from it was dropped.
    #[inline]
    pub fn drop_from(&mut self, reason: Reason) {
        self.from[reason as usize] += 1;
    }

    /// A frame that was for it was dropped.
    #[inline]
    pub fn drop_to(&mut self, reason: Reason) {
        self.to[reason as usize] += 1;
    }

    /// Drops of frames that came from it.
    #[must_use]
    pub fn drops_from(&self) -> u64 {
        self.from.iter().sum()
    }

    /// Drops of frames that were for it.
    #[must_use]
    pub fn drops_to(&self) -> u64 {
        self.to.iter().sum()
    }

    /// Drops for one reason, on either side.
    #[must_use]
    pub fn drops(&self, reason: Reason) -> u64 {
        self.from[reason as usize] + self.to[reason as usize]
    }

    /// Each kind of drop: whether the frame was for it (not from it), why, how many.
    pub fn each_drop(&self) -> impl Iterator<Item = (bool, Reason, u64)> + use<> {
        let side = |to: bool, counts: &[u64; Reason::ALL.len()]| {
            let counts = *counts;
            Reason::ALL.into_iter().map(move |reason| (to, reason, counts[reason as usize]))
        };
        side(false, &self.from).chain(side(true, &self.to))
    }

    /// For the control socket; drops that did not happen are left out.
    #[must_use]
    pub fn json(&self) -> Value {
        let mut drops = Map::new();
        for (to, reason, count) in self.each_drop().filter(|(.., count)| *count != 0) {
            let side = if to { "to" } else { "from" };
            drops.insert(format!("{side}.{}.{}", reason.stage(), reason.name()), count.into());
        }
        json!({
            "in_frames": self.in_frames, "in_bytes": self.in_bytes, "delivered": self.delivered,
            "targets": self.targets, "out_frames": self.out_frames, "out_bytes": self.out_bytes,
            "finished": self.finished, "pieces": self.pieces, "drops": drops,
        })
    }
}

/// Counters of all members of a switch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    tallies: Vec<Tally>,
    /// First tally of each port; the uplink's is the last of all.
    first: Vec<usize>,
}

impl Account {
    /// For ports with so many pairs of queues each, and an uplink.
    #[must_use]
    pub fn new(pairs: impl IntoIterator<Item = u16>) -> Self {
        let mut this = Self::default();
        for pairs in pairs {
            this.first.push(this.tallies.len());
            this.tallies.resize(this.tallies.len() + usize::from(pairs), Tally::default());
        }
        this.tallies.push(Tally::default());
        this
    }

    /// Whether it is one of the same ports with the same queues as `other`.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        (&self.first, self.tallies.len()) == (&other.first, other.tallies.len())
    }

    fn index(&self, port: super::work::PortId, pair: u16) -> usize {
        let first = self.first.get(port.index());
        let last = self.tallies.len() - 1;
        first.map_or(last, |first| (first + usize::from(pair)).min(last))
    }

    /// The counters of a pair of queues of a port, or of the uplink.
    #[inline]
    pub fn of(&mut self, port: super::work::PortId, pair: u16) -> &mut Tally {
        let at = self.index(port, pair);
        &mut self.tallies[at]
    }

    /// As [`of`](Self::of), to read.
    #[must_use]
    pub fn get(&self, port: super::work::PortId, pair: u16) -> &Tally {
        &self.tallies[self.index(port, pair)]
    }

    /// The sum of all.
    #[must_use]
    pub fn total(&self) -> Tally {
        self.tallies.iter().fold(Tally::default(), |mut sum, tally| {
            sum.in_frames += tally.in_frames;
            sum.in_bytes += tally.in_bytes;
            sum.delivered += tally.delivered;
            sum.targets += tally.targets;
            sum.out_frames += tally.out_frames;
            sum.out_bytes += tally.out_bytes;
            sum.finished += tally.finished;
            sum.pieces += tally.pieces;
            for (sum, count) in sum.from.iter_mut().zip(tally.from) {
                *sum += count;
            }
            for (sum, count) in sum.to.iter_mut().zip(tally.to) {
                *sum += count;
            }
            sum
        })
    }

    /// Whether nothing was lost or made up.
    ///
    /// # Errors
    /// What does not add up.
    pub fn balance(&self) -> Result<(), String> {
        for (at, tally) in self.tallies.iter().enumerate() {
            if tally.in_frames != tally.delivered + tally.drops_from() {
                return Err(format!("tally {at}: {tally:?}"));
            }
        }
        let total = self.total();
        if total.targets != total.out_frames + total.drops_to() {
            return Err(format!("targets and what they got: {total:?}"));
        }
        let copies = total.targets - total.delivered;
        if total.in_frames + copies != total.out_frames + total.drops_from() + total.drops_to() {
            return Err(format!("in and out: {total:?}"));
        }
        Ok(())
    }
}
