//! How long an idle data thread keeps looking before it sleeps.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// `--poll-us`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PollMode {
    /// Learn from how long sleeps last (the default).
    #[default]
    Adaptive,
    /// Look this long; zero: sleep at once.
    Fixed(Duration),
    /// Never sleep.
    Always,
}

impl fmt::Display for PollMode {
    /// As it is given.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Adaptive => f.write_str("adaptive"),
            Self::Always => f.write_str("always"),
            Self::Fixed(budget) => write!(f, "{}", budget.as_micros()),
        }
    }
}

impl FromStr for PollMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "always" => Ok(Self::Always),
            "adaptive" => Ok(Self::Adaptive),
            number => number.parse().map(|us| Self::Fixed(Duration::from_micros(us))).map_err(|_| {
                format!("`{number}` is neither a number of microseconds nor `always` or `adaptive`")
            }),
        }
    }
}

/// `--poll-share`: how much of its time a data thread may spend looking for work that is not there, in percent. What is
/// beyond it is the host's: the thread sleeps at once until it has earned more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share(u8);

impl Default for Share {
    fn default() -> Self {
        Self(100)
    }
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let percent = text.strip_suffix('%').unwrap_or(text).parse().ok().filter(|share| *share <= 100);
        percent.map(Self).ok_or_else(|| format!("`{text}` is not a share of 0 to 100 percent"))
    }
}

impl std::fmt::Display for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// How much looking a thread may save up for, as time of its own: a burst of it is looked through, a steady load is not.
const SAVINGS: Duration = Duration::from_millis(10);

/// Longest learned budget. What looking saves is the sleep, the wake-up, and the signals of everybody who would have to
/// wake this thread: 10 us of CPU time each where a virtual machine sends an interrupt to a thread that halted, and the
/// time until it runs. Measured with `cargo xtask bench blk`, see `docs/decisions/when-to-look.md`.
const MAX: Duration = Duration::from_micros(100);
/// An event as late as this was not delayed by somebody else: there is nothing to do. Looking ends at once.
const RARE: Duration = Duration::from_millis(1);
/// First budget after it had been given up.
const FIRST: Duration = Duration::from_micros(4);
/// With this many requests in flight of which the device moves long transfers, the adaptive rule does not look but
/// sleeps. What arrives meanwhile is then taken by one call; looking takes each piece by itself, gets in the way of
/// whoever brings it, and there is enough to do to keep everybody awake.
const LONG_FROM: u32 = 2;

/// What is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests in flight.
    pub inflight: u32,
    /// Long transfers are among them.
    pub moves_long: bool,
}

/// Decides between looking on and sleeping.
///
/// The adaptive rule is the one QEMU's event loop uses: if the next event came soon after the thread stopped looking,
/// looking a little longer would have caught it, so the budget doubles; if it came much later, looking was wasted, so
/// the budget is halved, and given up after a long sleep. Long transfers with several in flight are better served by sleeping.
#[derive(Debug)]
pub struct Spin {
    mode: PollMode,
    budget: Duration,
    share: Share,
    /// Looking that may still be done under `share`, in hundredths of nanoseconds; negative: owed.
    credit: i64,
}

impl Spin {
    /// In the given mode, with nothing learned.
    #[must_use]
    pub fn new(mode: PollMode) -> Self {
        let budget = match mode {
            PollMode::Adaptive => Duration::ZERO,
            PollMode::Fixed(budget) => budget,
            PollMode::Always => Duration::MAX,
        };
        Self { mode, budget, share: Share::default(), credit: 0 }
    }

    /// Keeps to a share of the time.
    pub fn limit(&mut self, share: Share) {
        self.share = share;
    }

    /// Takes account of some time, spent `looking` for work or otherwise.
    #[inline]
    pub fn spent(&mut self, took: Duration, looking: bool) {
        if self.share.0 == 100 {
            return;
        }
        // An hour at a time at most, so that nothing overflows.
        let took = took.as_nanos().min(3_600_000_000_000) as i64;
        self.credit += took * i64::from(self.share.0);
        if looking {
            self.credit -= took * 100;
        }
        self.credit = self.credit.clamp(-100 * SAVINGS.as_nanos() as i64, 100 * SAVINGS.as_nanos() as i64);
    }

    /// Whether to keep looking after being idle for `idle` under `load`.
    #[inline]
    #[must_use]
    pub fn keeps_looking(&self, idle: Duration, load: Load) -> bool {
        idle < self.budget && !self.batches(load) && (self.share.0 == 100 || self.credit > 0)
    }

    /// Learns from a sleep that began under `load`: `idle` from the last thing that moved to the wake-up.
    pub fn slept(&mut self, idle: Duration, load: Load) {
        if self.mode != PollMode::Adaptive || self.batches(load) {
            return;
        }
        if idle > RARE {
            self.budget = Duration::ZERO;
        } else if idle > MAX {
            // A single late event among many, because somebody else had the hardware thread, is not the end of it.
            self.budget = if self.budget > FIRST { self.budget / 2 } else { Duration::ZERO };
        } else if idle > self.budget {
            self.budget = (self.budget * 2).clamp(FIRST, MAX);
        }
    }

    fn batches(&self, load: Load) -> bool {
        self.mode == PollMode::Adaptive && load.moves_long && load.inflight >= LONG_FROM
    }

    /// The budget now.
    #[must_use]
    pub fn budget(&self) -> Duration {
        self.budget
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    const ONE: Load = Load { inflight: 1, moves_long: false };
    const MANY: Load = Load { inflight: 32, moves_long: false };
    const LONG: Load = Load { inflight: 2, moves_long: true };

    #[test]
    fn frequent_events_grow_the_budget_and_rare_ones_end_it() {
        let mut spin = Spin::new(PollMode::Adaptive);
        assert!(!spin.keeps_looking(Duration::ZERO, ONE));
        for _ in 0..6 {
            spin.slept(90 * US, MANY);
        }
        assert!(spin.keeps_looking(91 * US, ONE) && spin.keeps_looking(91 * US, MANY));
        spin.slept(1000 * US, ONE);
        assert!(spin.keeps_looking(49 * US, ONE) && !spin.keeps_looking(50 * US, ONE));
        for _ in 0..5 {
            spin.slept(1000 * US, ONE);
        }
        assert!(!spin.keeps_looking(Duration::ZERO, ONE));
        spin.slept(90 * US, ONE);
        spin.slept(1001 * US, ONE);
        assert!(!spin.keeps_looking(Duration::ZERO, ONE));
    }

    #[test]
    fn several_long_transfers_sleep_and_teach_nothing() {
        let mut spin = Spin::new(PollMode::Adaptive);
        spin.slept(30 * US, ONE);
        assert!(spin.keeps_looking(US, ONE) && !spin.keeps_looking(US, LONG));
        assert!(spin.keeps_looking(US, Load { inflight: 1, ..LONG }));
        spin.slept(1000 * US, LONG);
        assert!(spin.keeps_looking(US, Load::default()));
        assert!(Spin::new(PollMode::Fixed(20 * US)).keeps_looking(US, LONG));
    }

    #[test]
    fn fixed_budgets_do_not_learn() {
        let mut spin = Spin::new(PollMode::Fixed(20 * US));
        spin.slept(1000 * US, ONE);
        assert!(spin.keeps_looking(19 * US, ONE) && !spin.keeps_looking(20 * US, ONE));
        assert!(!Spin::new(PollMode::Fixed(Duration::ZERO)).keeps_looking(Duration::ZERO, ONE));
        assert!(Spin::new(PollMode::Always).keeps_looking(Duration::from_secs(1 << 40), ONE));
    }

    #[test]
    fn looking_keeps_to_its_share() {
        let mut spin = Spin::new(PollMode::Always);
        spin.limit("25%".parse().unwrap());
        // Passes of 1 us, looked through where allowed, else slept.
        let mut looked = 0;
        for _ in 0..1_000_000 {
            let looks = spin.keeps_looking(Duration::ZERO, ONE);
            looked += u32::from(looks);
            spin.spent(US, looks);
        }
        assert!((240_000..=260_000).contains(&looked), "{looked}");
        // What was saved in an hour's sleep is a burst and no more.
        spin.spent(Duration::from_secs(3600), false);
        let mut burst = 0;
        while spin.keeps_looking(Duration::ZERO, ONE) {
            spin.spent(US, true);
            burst += 1;
        }
        assert!((10_000..=14_000).contains(&burst), "{burst}");
        for wrong in ["101", "-1", "x", ""] {
            assert!(wrong.parse::<Share>().is_err());
        }
    }

    #[test]
    fn modes_are_read_as_written() {
        assert_eq!("always".parse(), Ok(PollMode::Always));
        assert_eq!("0".parse(), Ok(PollMode::Fixed(Duration::ZERO)));
        assert_eq!("50".parse(), Ok(PollMode::Fixed(50 * US)));
        assert!("soon".parse::<PollMode>().is_err());
    }
}
