//! Rate limits of a disk: requests and bytes per second, each with a burst.
//!
//! [`Bucket`] is a token bucket without a clock: time is passed in as nanoseconds since any fixed moment, and all
//! arithmetic is exact, so that nothing is lost or won by being called often. A request may begin while there are
//! tokens; what it costs is known only once its descriptors were read, so it may leave a debt, which is paid before the
//! next one begins. In any span of time `t`, what begins is therefore at most `burst + rate * t` and one request more.
//!
//! [`Limiter`] is the two buckets of a disk. It decides whether a request may be *taken* from its ring. One that may
//! not stays there: the ring is the queue, and nothing is buffered twice.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

/// Nanoseconds in a second: a token is kept as so many parts, so that the refill of a nanosecond is a whole number.
const PARTS: i128 = 1_000_000_000;
/// Without a burst of its own a limit lets through as much at once as in this part of a second.
const DEFAULT_BURST_DIVISOR: u64 = 10;
/// A limited device sleeps at least so long, where the burst is large enough to lose nothing by it: one wake-up then
/// takes a batch.
const REST: Duration = Duration::from_millis(1);
/// Largest rate and burst, per second: 2^60, so that sums of them stay far from the end of the number space.
pub const MAX_RATE: u64 = 1 << 60;

/// A rate and how much may come at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Tokens per second, at least 1.
    pub per_second: u64,
    /// Most tokens that collect while nothing is used, at least 1.
    pub burst: u64,
}

impl Rate {
    /// A rate; without a burst, a tenth of a second's worth.
    ///
    /// # Errors
    /// A number is 0 or more than [`MAX_RATE`].
    pub fn new(per_second: u64, burst: Option<u64>) -> Result<Self, String> {
        let burst = burst.unwrap_or((per_second / DEFAULT_BURST_DIVISOR).max(1));
        for (number, name) in [(per_second, "rate"), (burst, "burst")] {
            if !(1..=MAX_RATE).contains(&number) {
                return Err(format!("the {name} must be 1 to {MAX_RATE}"));
            }
        }
        Ok(Self { per_second, burst })
    }
}

/// A token bucket; see the [module](self).
#[derive(Clone, Debug)]
pub struct Bucket {
    rate: Rate,
    /// In [`PARTS`] of a token; negative: debt.
    level: i128,
    /// When `level` was right, in nanoseconds.
    at_ns: u64,
}

impl Bucket {
    /// A full bucket.
    #[must_use]
    pub fn new(rate: Rate, now_ns: u64) -> Self {
        Self { rate, level: i128::from(rate.burst) * PARTS, at_ns: now_ns }
    }

    /// The rate.
    #[must_use]
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Adds what came since the last call. Time that goes backwards adds nothing.
    pub fn refill(&mut self, now_ns: u64) {
        let passed = now_ns.saturating_sub(self.at_ns);
        self.at_ns = self.at_ns.max(now_ns);
        // At most 2^64 * 2^60 more: no overflow.
        self.level += i128::from(passed) * i128::from(self.rate.per_second);
        self.level = self.level.min(i128::from(self.rate.burst) * PARTS);
    }

    /// Whether a request may begin, as of the last refill.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.level >= PARTS
    }

    /// A request of this cost begins.
    pub fn spend(&mut self, cost: u64) {
        // A request is bounded by what a chain can carry; this bounds a debt that no driver can make.
        self.level = (self.level - i128::from(cost) * PARTS).max(i128::MIN / 4);
    }

    /// When it is open again, in nanoseconds of the same clock; not before the last refill.
    #[must_use]
    pub fn open_at_ns(&self) -> u64 {
        let missing = PARTS - self.level;
        if missing <= 0 {
            return self.at_ns;
        }
        let per_second = i128::from(self.rate.per_second);
        let wait = (missing + per_second - 1) / per_second;
        self.at_ns.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX))
    }

    /// How long it may be left alone when it opens without a token being lost.
    fn slack_ns(&self) -> u64 {
        let spare = i128::from(self.rate.burst - 1) * PARTS / i128::from(self.rate.per_second);
        u64::try_from(spare).unwrap_or(u64::MAX)
    }

    /// Another rate from now on. What is saved is cut to the new burst; a debt, which was made at the old rate, is
    /// forgiven: at a much lower one it could take hours to pay.
    pub fn change(&mut self, rate: Rate, now_ns: u64) {
        self.refill(now_ns);
        self.rate = rate;
        self.level = self.level.clamp(0, i128::from(rate.burst) * PARTS);
    }
}

/// The limits of a disk, as a user gives them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Limits {
    /// Requests per second; each request counts once, whatever it is.
    pub iops: Option<Rate>,
    /// Payload bytes of reads and writes per second.
    pub bps: Option<Rate>,
}

/// A change of [`Limits`], from the control socket: what is not named stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// `Some(None)`: no limit.
    pub iops: Option<Option<Rate>>,
    /// As `iops`.
    pub bps: Option<Option<Rate>>,
}

impl Change {
    /// Reads `iops`, `iops_burst`, `bps`, `bps_burst`: numbers, sizes as text (`"100M"`), or `null` or 0 for no limit.
    ///
    /// # Errors
    /// What is wrong, for the user.
    pub fn parse(args: &Map<String, Value>) -> Result<Self, String> {
        if let Some(name) =
            args.keys().find(|name| !["iops", "iops_burst", "bps", "bps_burst"].contains(&name.as_str()))
        {
            return Err(format!("`{name}` is none of iops, iops_burst, bps, bps_burst"));
        }
        let number = |name: &str| match args.get(name) {
            None => Ok(None),
            Some(Value::Null) => Ok(Some(0)),
            Some(Value::Number(number)) => {
                number.as_u64().map(Some).ok_or_else(|| format!("{name}: {number} is no whole number from 0"))
            }
            Some(Value::String(text)) => parse_size(text).map(Some).map_err(|e| format!("{name}: {e}")),
            Some(_) => Err(format!("{name} must be a number or a size")),
        };
        let rate = |name: &str, burst: &str| match (number(name)?, number(burst)?) {
            (None, None) => Ok(None),
            (None, Some(_)) => Err(format!("{burst} needs {name}")),
            (Some(0), None) => Ok(Some(None)),
            (Some(0), Some(_)) => Err(format!("{burst} has no meaning without a limit")),
            (Some(per_second), burst) => {
                Rate::new(per_second, burst).map(|rate| Some(Some(rate))).map_err(|e| format!("{name}: {e}"))
            }
        };
        Ok(Self { iops: rate("iops", "iops_burst")?, bps: rate("bps", "bps_burst")? })
    }
}

/// The buckets of a disk, on the clock of the data thread.
#[derive(Debug)]
pub struct Limiter {
    epoch: Instant,
    iops: Option<Bucket>,
    bps: Option<Bucket>,
    /// Until then nothing is taken; as of the last [`refill`](Self::refill) or [`spend`](Self::spend).
    closed_until: Option<Instant>,
    /// When it closed last.
    closed_at: Instant,
    stats: LimitStats,
}

/// A limit and what is left of it, for another process.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BucketState {
    rate: Rate,
    /// Whole tokens; negative: debt.
    level: i64,
}

/// A [`Limiter`] for another process.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimiterState {
    iops: Option<BucketState>,
    bps: Option<BucketState>,
    stats: LimitStats,
}

/// What limits did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LimitStats {
    /// Times a disk stopped taking requests because a limit was reached.
    pub closed: u64,
    /// Time it did not take any for that reason, in nanoseconds.
    pub closed_ns: u64,
}

impl Limiter {
    /// Full buckets.
    #[must_use]
    pub fn new(limits: Limits, now: Instant) -> Self {
        let bucket = |rate| Bucket::new(rate, 0);
        Self {
            epoch: now,
            iops: limits.iops.map(bucket),
            bps: limits.bps.map(bucket),
            closed_until: None,
            closed_at: now,
            stats: LimitStats::default(),
        }
    }

    /// As it is now, for another process: no burst is granted anew.
    #[must_use]
    pub fn export(&self, now: Instant) -> LimiterState {
        let bucket = |bucket: &Option<Bucket>| {
            let mut bucket = bucket.clone()?;
            bucket.refill(self.ns(now));
            let level = i64::try_from(bucket.level.div_euclid(PARTS)).unwrap_or(i64::MIN);
            Some(BucketState { rate: bucket.rate, level })
        };
        LimiterState { iops: bucket(&self.iops), bps: bucket(&self.bps), stats: self.stats }
    }

    /// Goes on from there.
    ///
    /// # Errors
    /// A rate that there cannot be.
    pub fn import(state: LimiterState, now: Instant) -> Result<Self, String> {
        let bucket = |state: Option<BucketState>| {
            state.map(|BucketState { rate, level }| {
                let rate = Rate::new(rate.per_second, Some(rate.burst))?;
                let level = (i128::from(level) * PARTS).min(i128::from(rate.burst) * PARTS);
                Ok::<_, String>(Bucket { rate, level, at_ns: 0 })
            })
        };
        let (iops, bps) = (bucket(state.iops).transpose()?, bucket(state.bps).transpose()?);
        let mut limiter = Self { iops, bps, stats: state.stats, ..Self::new(Limits::default(), now) };
        limiter.look(now);
        Ok(limiter)
    }

    /// The limits now.
    #[must_use]
    pub fn limits(&self) -> Limits {
        let rate = |bucket: &Option<Bucket>| bucket.as_ref().map(Bucket::rate);
        Limits { iops: rate(&self.iops), bps: rate(&self.bps) }
    }

    /// What they did.
    #[must_use]
    pub fn stats(&self) -> LimitStats {
        self.stats
    }

    /// Whether there is any limit.
    #[inline]
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.iops.is_some() || self.bps.is_some()
    }

    /// Looks at the clock: once per pass.
    #[inline]
    pub fn refill(&mut self, now: Instant) {
        if !self.is_on() {
            return;
        }
        if let Some(until) = self.closed_until {
            if now < until {
                return;
            }
            let closed = now.saturating_duration_since(self.closed_at);
            self.stats.closed_ns += u64::try_from(closed.as_nanos()).unwrap_or(u64::MAX);
            self.closed_until = None;
        }
        let now_ns = self.ns(now);
        for bucket in [&mut self.iops, &mut self.bps].into_iter().flatten() {
            bucket.refill(now_ns);
        }
        self.look(now);
    }

    /// Whether a request may be taken, as of the last call of another function.
    #[inline]
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.closed_until.is_none()
    }

    /// When requests may be taken again; `None`: now.
    #[inline]
    #[must_use]
    pub fn closed_until(&self) -> Option<Instant> {
        self.closed_until
    }

    /// A request with so much payload was taken.
    #[inline]
    pub fn spend(&mut self, bytes: u64, now: Instant) {
        if !self.is_on() {
            return;
        }
        if let Some(bucket) = &mut self.iops {
            bucket.spend(1);
        }
        if let Some(bucket) = &mut self.bps {
            bucket.spend(bytes);
        }
        self.look(now);
    }

    /// Other limits from now on.
    pub fn change(&mut self, change: Change, now: Instant) {
        let now_ns = self.ns(now);
        for (bucket, wanted) in [(&mut self.iops, change.iops), (&mut self.bps, change.bps)] {
            match (wanted, bucket.as_mut()) {
                (None, _) => {}
                (Some(None), _) => *bucket = None,
                (Some(Some(rate)), Some(bucket)) => bucket.change(rate, now_ns),
                (Some(Some(rate)), None) => *bucket = Some(Bucket::new(rate, now_ns)),
            }
        }
        // As if the time were over: what holds now is worked out anew.
        if self.closed_until.take().is_some() {
            let closed = now.saturating_duration_since(self.closed_at);
            self.stats.closed_ns += u64::try_from(closed.as_nanos()).unwrap_or(u64::MAX);
        }
        self.refill(now);
    }

    /// Closes if a bucket is empty.
    fn look(&mut self, now: Instant) {
        let now_ns = self.ns(now);
        let closed = [&self.iops, &self.bps].into_iter().flatten().filter(|bucket| !bucket.is_open());
        let until = closed.map(|bucket| {
            let rest = bucket.slack_ns().min(REST.as_nanos() as u64);
            bucket.open_at_ns().max(now_ns.saturating_add(rest))
        });
        if let Some(until) = until.max() {
            if self.closed_until.is_none() {
                self.stats.closed += 1;
                self.closed_at = now;
            }
            // A year is for ever; the sum stays in the clock's range.
            let until = Duration::from_nanos(until).min(now - self.epoch + Duration::from_secs(365 * 86400));
            self.closed_until = Some(self.epoch + until);
        }
    }

    fn ns(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.epoch).as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Reads a size: a number with an optional K, M, G or T (powers of 1024).
///
/// # Errors
/// It is none, in words for the user.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size: write a number with K, M, G or T, as in 100M");
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let shift = match unit {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` is too large"))
}

/// A rate on the command line: `N[,burst=N]`, sizes allowed.
impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (rate, burst) = match text.split_once(',') {
            None => (text, None),
            Some((rate, rest)) => {
                let burst = rest.strip_prefix("burst=").ok_or("expected N[,burst=N]")?;
                (rate, Some(parse_size(burst)?))
            }
        };
        Self::new(parse_size(rate)?, burst)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s, burst {}", self.per_second, self.burst)
    }
}

#[cfg(test)]
#[path = "limit_test.rs"]
mod tests;
