//! The life of one device's backend as a state machine: what happens, what it means, what is to be done. Pure: times are
//! passed in, and actions are carried out by the [keeper](super::keeper).
//!
//! ```text
//!        time            ready           attached
//!  Away ------> Starting ------> Attaching ------> Serving <------> Upgrading
//!   ^              |                |                |  upgrade/upgraded |
//!   |              | failed         | failed         | lost, stalled     | lost
//!   |              v                v                v                   v
//!   +----------- Dying (killed if it lives; its end is waited for) <----+
//! ```
//!
//! A backend of somebody else's (`socket=`) has no process: it is never `Starting` or `Dying`. What cannot be recovered
//! leads to `Over` from anywhere. The *connection* counts, and not the process: a process that ends and has left its
//! connection to another one is no death. No successor is started before its predecessor is known to be gone, so that
//! nobody writes into the guest that is not supposed to.

use std::time::{Duration, Instant};

use super::backoff::Backoff;

/// How long a process may take to end by itself once its connection is gone: it tells how it ended.
pub const LAST_WORDS: Duration = Duration::from_millis(20);
/// How long a hand-over may take in all.
pub const UPGRADE_LIMIT: Duration = Duration::from_secs(60);

/// Where a backend stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// There is none, and the next attempt is at this time.
    Away(Instant),
    /// A process was started and is not ready yet.
    Starting,
    /// A backend is there; handshake and start of the queues are under way.
    Attaching,
    /// It serves the guest.
    Serving,
    /// It serves the guest, and its successor prepares to take over; until this time.
    Upgrading(Instant),
    /// It is not wanted any more and has not ended; it is killed at this time, if it was not yet.
    Dying(Option<Instant>),
    /// Nothing is done any more.
    Over,
}

impl State {
    /// One word for it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Away(_) => "away",
            Self::Starting => "starting",
            Self::Attaching => "attaching",
            Self::Serving => "serving",
            Self::Upgrading(_) => "upgrading",
            Self::Dying(_) => "dying",
            Self::Over => "over",
        }
    }
}

/// What happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time has passed.
    Time,
    /// The process says that it is ready.
    Ready,
    /// Handshake done, queues started.
    Attached,
    /// An attempt has failed: no process, no handshake, or not fit for the guest.
    Failed(String),
    /// No backend can go on with this guest.
    Hopeless(String),
    /// The connection is gone.
    Lost(String),
    /// The process has ended (the one that serves, not a successor).
    Ended(String),
    /// Its data loop has stood still for so long, with work to do.
    Stalled(Duration),
    /// The user wants a new process.
    Restart,
    /// The user wants a new process that takes over from this one.
    Upgrade,
    /// The successor is the owner.
    Upgraded,
    /// The successor has not become the owner, and will not.
    NotUpgraded(String),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start a process, or let the one that stands by go on.
    Start,
    /// Connect, shake hands, start the queues.
    Attach,
    /// Kill the process. Its end is an event.
    Kill,
    /// The device has no backend now.
    Detach,
    /// Start a successor that takes over.
    StartSuccessor,
    /// The successor is the process that serves now.
    Adopt,
    /// Kill the successor and forget it.
    DropSuccessor,
    /// End the run, for this reason.
    GiveUp(String),
}

/// One backend.
#[derive(Debug)]
pub struct Life {
    state: State,
    /// It is a process of ours.
    ours: bool,
    /// A lost backend is replaced.
    recovers: bool,
    /// There is a process that has not ended.
    alive: bool,
    /// Why the present one is on its way out, or how its process ended.
    why: Option<String>,
    /// The user wants it replaced: no pause.
    wanted: bool,
    backoff: Backoff,
    /// When the guest was left without a backend.
    lost: Option<Instant>,
    /// When the last one was known to be gone, and when its successor was ready.
    gone: Option<Instant>,
    ready: Option<Instant>,
    /// Counts and last words, for status.
    pub facts: LifeFacts,
}

/// What is known of a backend's past.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LifeFacts {
    /// How often another one has taken its place.
    pub restarts: u64,
    /// How often one was killed because it stood still.
    pub stalls: u64,
    /// How often one has handed over to another.
    pub upgrades: u64,
    /// How the last one went.
    pub last_death: Option<String>,
    /// How long the guest was without a backend the last time.
    pub last_away: Option<Duration>,
    /// What that time went into.
    pub last_parts: AwayParts,
}

/// What the time without a backend went into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AwayParts {
    /// From the loss until the last process was gone, with all attempts that failed and the pauses between them.
    pub death: Duration,
    /// From then until the next one was ready: its start, or its waking up, and its login.
    pub start: Duration,
    /// From then until its queues ran.
    pub attach: Duration,
}

impl Life {
    /// A backend that serves since `now`. `ours`: others will be processes of ours; `alive`: this one is.
    pub fn serving(ours: bool, alive: bool, recovers: bool, now: Instant) -> Self {
        let mut backoff = Backoff::default();
        backoff.up(now);
        let facts = LifeFacts::default();
        Self {
            state: State::Serving,
            ours,
            recovers,
            alive,
            why: None,
            wanted: false,
            backoff,
            lost: None,
            gone: None,
            ready: None,
            facts,
        }
    }

    /// Where it stands.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// When [`Event::Time`] is due.
    pub fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Away(at) | State::Upgrading(at) | State::Dying(Some(at)) => Some(at),
            _ => None,
        }
    }

    /// The guest is served.
    pub fn serves(&self) -> bool {
        matches!(self.state, State::Serving | State::Upgrading(_))
    }

    /// Nothing is done from here on.
    pub fn stop(&mut self) {
        self.state = State::Over;
    }

    /// Takes an event; what is to be done, in order.
    pub fn on(&mut self, event: Event, now: Instant) -> Vec<Action> {
        use State::{Attaching, Away, Dying, Over, Serving, Starting, Upgrading};
        match (&self.state, event) {
            (Over, _) => vec![],
            (Away(at), Event::Time) if *at <= now => self.begin(),
            (Starting, Event::Ready) => {
                self.state = Attaching;
                self.ready = Some(now);
                vec![Action::Attach]
            }
            (Attaching, Event::Attached) => {
                self.state = Serving;
                self.backoff.up(now);
                self.facts.restarts += 1;
                if let Some(lost) = self.lost.take() {
                    let gone = self.gone.unwrap_or(lost);
                    let ready = self.ready.unwrap_or(gone);
                    self.facts.last_away = Some(now.saturating_duration_since(lost));
                    self.facts.last_parts = AwayParts {
                        death: gone.saturating_duration_since(lost),
                        start: ready.saturating_duration_since(gone),
                        attach: now.saturating_duration_since(ready),
                    };
                }
                vec![]
            }
            (Attaching, Event::Hopeless(why)) => self.give_up(why),
            // It may have come while the process ended, whose end says more.
            (Starting | Attaching, Event::Failed(why) | Event::Lost(why)) => {
                let why = self.why.take().unwrap_or(why);
                self.end(why, now, Some(now))
            }
            (Starting, Event::Ended(why)) => {
                self.alive = false;
                self.fallen(why, now)
            }
            (Serving | Upgrading(_), Event::Lost(why)) => {
                let drop = matches!(self.state, Upgrading(_)).then_some(Action::DropSuccessor);
                self.lost = Some(now);
                let why = self.why.take().unwrap_or(why);
                drop.into_iter().chain(self.end(why, now, Some(now + LAST_WORDS))).collect()
            }
            (Serving | Upgrading(_), Event::Stalled(time)) => {
                self.facts.stalls += 1;
                self.replace(
                    format!("its data thread has stood still for {} ms with work to do", time.as_millis()),
                    now,
                )
            }
            (Serving, Event::Restart) if self.alive => {
                self.wanted = true;
                self.replace("it was to be restarted".into(), now)
            }
            (Serving, Event::Upgrade) if self.alive => {
                self.state = Upgrading(now + UPGRADE_LIMIT);
                vec![Action::StartSuccessor]
            }
            (Upgrading(_), Event::Upgraded) => {
                self.state = Serving;
                self.facts.upgrades += 1;
                // Whatever became of the old process: the new one is meant from here on.
                self.alive = true;
                self.why = None;
                vec![Action::Adopt]
            }
            (Upgrading(_), Event::NotUpgraded(_)) => {
                self.state = Serving;
                vec![Action::DropSuccessor]
            }
            (Upgrading(at), Event::Time) if *at <= now => {
                self.state = Serving;
                vec![Action::DropSuccessor]
            }
            // The connection counts. If it is gone, too, that is another event.
            (Attaching | Serving | Upgrading(_), Event::Ended(why)) => {
                self.alive = false;
                self.why = Some(why);
                vec![]
            }
            (Dying(Some(at)), Event::Time) if *at <= now => {
                self.state = Dying(None);
                vec![Action::Kill]
            }
            (Dying(_), Event::Ended(own)) => {
                self.alive = false;
                // Killed by us, it is the cause that counts; else its own end.
                let killed = matches!(self.state, Dying(None));
                let why = self.why.take().filter(|_| killed).unwrap_or(own);
                self.fallen(why, now)
            }
            _ => vec![],
        }
    }

    /// Ends what serves now, at once.
    fn replace(&mut self, why: String, now: Instant) -> Vec<Action> {
        let drop = matches!(self.state, State::Upgrading(_)).then_some(Action::DropSuccessor);
        self.lost = Some(now);
        drop.into_iter().chain(self.end(why, now, None)).collect()
    }

    /// The present one is not wanted any more. A process that lives is killed at `kill`, or now.
    fn end(&mut self, why: String, now: Instant, kill: Option<Instant>) -> Vec<Action> {
        if !self.alive {
            return self.fallen(why, now);
        }
        self.why = Some(why);
        match kill.filter(|at| *at > now) {
            Some(at) => {
                self.state = State::Dying(Some(at));
                vec![]
            }
            None => {
                self.state = State::Dying(None);
                vec![Action::Kill]
            }
        }
    }

    /// There is nobody any more.
    fn fallen(&mut self, why: String, now: Instant) -> Vec<Action> {
        self.why = None;
        (self.gone, self.ready) = (Some(now), None);
        self.facts.last_death = Some(why.clone());
        if !self.recovers {
            return self.give_up(why);
        }
        let pause = self.backoff.next(now);
        let pause = if std::mem::take(&mut self.wanted) { Duration::ZERO } else { pause };
        let mut actions = vec![Action::Detach];
        if pause.is_zero() {
            actions.extend(self.begin());
        } else {
            self.state = State::Away(now + pause);
        }
        actions
    }

    fn begin(&mut self) -> Vec<Action> {
        self.alive = self.ours;
        let (state, action) = match self.ours {
            true => (State::Starting, Action::Start),
            false => (State::Attaching, Action::Attach),
        };
        self.state = state;
        vec![action]
    }

    fn give_up(&mut self, why: String) -> Vec<Action> {
        self.state = State::Over;
        self.facts.last_death = Some(why.clone());
        vec![Action::GiveUp(why)]
    }
}

#[cfg(test)]
#[path = "life_tests.rs"]
mod tests;
