//! Line S: what a channel shows of itself in its own control memory, for whoever holds a descriptor of that
//! ([`Keepsake::control`](super::Keepsake)): the monitor, that asks nobody for it, and reads it after a death as well.
//!
//! The channel writes it before it sleeps and when it looks at its control socket, never for a message. The peer can
//! read it, too; there is nothing in it that the peer does not know or could not guess.

use std::os::fd::{AsFd, BorrowedFd};

use super::{COUNTERS, Channel, Durations, LATENCY_STEPS, PeerState};
use crate::error::Violation;
use crate::layout::{STATE, observed};
use crate::ring::Words;
use crate::shm::Mapping;
use crate::shm::file::{self, Access, FileError};
use crate::sync::Ordering;

/// Where a channel is in its life, as it last said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It has said nothing yet.
    New,
    /// Messages flow.
    Running,
    /// The peer sends no new requests.
    Draining,
    /// The peer is gone.
    PeerGone,
    /// The peer broke a rule.
    Failed,
}

/// A copy of a channel's line S. Each number is one that the channel had; they are not of one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Where it is in its life.
    pub phase: Phase,
    /// How often it has written the line: one that stands still sleeps, hangs or is dead.
    pub beat: u64,
    /// Requests of this side without completion.
    pub in_flight: u32,
    /// Requests of the peer that were not completed.
    pub held: u32,
    /// The counters named in [`COUNTERS`].
    pub counters: [u64; COUNTERS.len()],
    /// Violations by rule, from rule 1.
    pub violations: [u64; Violation::RULES],
    /// As [`Stats::latency`](super::Stats::latency).
    pub latency: Durations,
    /// As [`Stats::service`](super::Stats::service).
    pub service: Durations,
}

impl Observed {
    /// Reads the line S of a control memory.
    ///
    /// # Errors
    /// The file is no control memory.
    pub fn read(control: BorrowedFd<'_>) -> Result<Self, FileError> {
        let size = file::size(control)?;
        file::check(control.as_fd(), size, Access::Owner)?;
        let len = usize::try_from(size).map_err(|_| FileError::Kind(0))?;
        let map = Mapping::read_only(control, len)
            .map_err(|error| FileError::System { what: "map a control memory", error })?;
        let words = &map.words()[STATE..STATE + observed::WORDS];
        let load = |word: usize| words[word].load(Ordering::Relaxed);
        let durations = |first: usize| Durations {
            sum_ns: load(first),
            steps: std::array::from_fn(|step| load(first + 1 + step)),
        };
        Ok(Self {
            phase: match load(observed::PHASE) {
                1 => Phase::Running,
                2 => Phase::Draining,
                3 => Phase::PeerGone,
                4 => Phase::Failed,
                _ => Phase::New,
            },
            beat: load(observed::BEAT),
            in_flight: load(observed::IN_FLIGHT) as u32,
            held: load(observed::HELD) as u32,
            counters: std::array::from_fn(|n| load(observed::COUNTERS + n)),
            violations: std::array::from_fn(|n| load(observed::VIOLATIONS + n)),
            latency: durations(observed::LATENCY),
            service: durations(observed::SERVICE),
        })
    }
}

impl Channel {
    /// Writes line S.
    pub(super) fn show(&mut self) {
        self.beat += 1;
        let phase = match (self.failed, self.peer) {
            (Some(_), _) => 4,
            (None, PeerState::Running) => 1,
            (None, PeerState::Draining) => 2,
            (None, PeerState::Gone) => 3,
        };
        let words = &self.control.words()[STATE..STATE + observed::WORDS];
        let store = |word: usize, value: u64| words[word].store(value, Ordering::Relaxed);
        store(observed::PHASE, phase);
        store(observed::BEAT, self.beat);
        store(observed::IN_FLIGHT, self.in_flight().into());
        store(observed::HELD, self.held().into());
        let counters = self.stats.plain();
        counters.into_iter().enumerate().for_each(|(n, value)| store(observed::COUNTERS + n, value));
        let violations = self.stats.violations.iter().enumerate();
        violations.for_each(|(n, count)| store(observed::VIOLATIONS + n, *count));
        if self.clock.is_some() {
            for (first, durations) in
                [(observed::LATENCY, &self.stats.latency), (observed::SERVICE, &self.stats.service)]
            {
                store(first, durations.sum_ns);
                let steps = durations.steps.iter().enumerate();
                steps.for_each(|(step, count)| store(first + 1 + step, *count));
            }
        }
    }
}

const _: () = assert!(observed::VIOLATIONS == observed::COUNTERS + COUNTERS.len());
const _: () = assert!(observed::LATENCY == observed::VIOLATIONS + Violation::RULES);
const _: () = assert!(observed::SERVICE == observed::LATENCY + 1 + LATENCY_STEPS);
const _: () = assert!(observed::WORDS == observed::SERVICE + 1 + LATENCY_STEPS);

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::tests::{pair, small, soon};
    use super::*;
    use crate::{Incoming, Status};

    #[test]
    fn whoever_holds_the_control_memory_sees_what_the_channel_does() {
        let (mut one, mut two) = pair(&small(), &[], &[]);
        let control = one.keepsake().control.try_clone_to_owned().unwrap();
        assert_eq!(Observed::read(control.as_fd()).unwrap().phase, Phase::New);
        one.ask(0, 1, 7).unwrap();
        one.commit();
        assert!(matches!(two.receive(), Ok(Some(Incoming::Request(_)))));
        assert!(!one.arm().unwrap());
        one.disarm();
        let seen = Observed::read(control.as_fd()).unwrap();
        assert_eq!((seen.phase, seen.beat, seen.in_flight, seen.held), (Phase::Running, 1, 1, 0));
        assert_eq!(seen.counters, one.stats().plain());
        drop(two);
        assert!(one.wait(soon()).unwrap());
        drop(one);
        // After the death of the process that wrote it.
        let seen = Observed::read(control.as_fd()).unwrap();
        assert_eq!((seen.phase, seen.in_flight), (Phase::PeerGone, 1));
        assert!(seen.beat > 1 && seen.violations == [0; Violation::RULES]);
    }

    #[test]
    fn a_broken_rule_shows() {
        let (mut one, mut two) = pair(&small(), &[], &[]);
        let control = one.keepsake().control.try_clone_to_owned().unwrap();
        two.lanes[0].tx.push(crate::layout::Desc { flags: 0xff00, ..Default::default() });
        one.receive().unwrap_err();
        let seen = Observed::read(control.as_fd()).unwrap();
        assert_eq!((seen.phase, seen.violations[0]), (Phase::Failed, 1));
    }

    #[test]
    fn how_long_requests_take_shows_on_both_sides() {
        let (mut one, mut two) = pair(&small(), &[], &[]);
        let control = |channel: &Channel| channel.keepsake().control.try_clone_to_owned().unwrap();
        let controls = [control(&one), control(&two)];
        one.measure_latency();
        two.measure_latency();
        let start = Instant::now();
        let at = |us: u64| start + Duration::from_micros(us);
        one.set_now(at(0));
        one.ask(0, 1, 7).unwrap();
        two.set_now(at(3));
        let Ok(Some(Incoming::Request(request))) = two.receive() else { panic!("no request") };
        two.set_now(at(13));
        two.complete(request, Status::default()).unwrap();
        one.set_now(at(20));
        assert!(matches!(one.receive(), Ok(Some(Incoming::Completion(_)))));
        for channel in [&mut one, &mut two] {
            assert!(!channel.arm().unwrap());
            channel.disarm();
        }
        let [asks, answers] = controls.map(|file| Observed::read(file.as_fd()).unwrap());
        // 20 us lie below 2^15 ns and not below 2^14; 10 us a step below.
        assert_eq!((asks.latency.steps[15], asks.latency.sum_ns), (1, 20_000));
        assert_eq!((answers.service.steps[14], answers.service.sum_ns), (1, 10_000));
        assert_eq!((asks.latency.count(), asks.service.count()), (1, 0));
        assert_eq!((answers.latency.count(), answers.service.count()), (0, 1));
        assert_eq!(asks.latency, one.stats().latency);
    }

    #[test]
    fn other_files_are_refused() {
        let (file, _map) = file::create("other", 4096, Access::Both).unwrap();
        assert!(matches!(Observed::read(file.as_fd()), Err(FileError::Seals { .. })));
    }
}
