//! The engine as the device model knows it: requests in, answers out, one pass over everything.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use vcp_core::ask::Rest;
use vcp_core::handover::Fds;
use vcp_core::handover::state::{BadState, NotNow};
use vcp_core::metrics::Samples;
use vcp_core::uring::Ring;

use super::IscsiEngine;
use super::path::Phase;
use crate::engine::{Completion, Engine, Lun, Outcome, Request, Wait};
use crate::portal::job::Job;
use crate::portal::wire::Wire;

impl Engine for IscsiEngine {
    fn lun(&self) -> &Lun {
        &self.lun
    }

    fn room(&self) -> usize {
        self.free.len()
    }

    fn submit(&mut self, request: Request) {
        let (slot, (command, payload)) = match (self.build(&request), self.free.pop()) {
            (Ok(built), Some(slot)) => (slot, built),
            // No room is against the contract; an error is better than a lost request.
            (built, slot) => {
                self.free.extend(slot);
                let outcome = built.err().unwrap_or(Outcome::IoError);
                match outcome {
                    Outcome::Ok => self.stats.completed += 1,
                    _ => self.stats.failed += 1,
                }
                self.ready.push(Completion { tag: request.tag, outcome, data: request.data });
                return;
            }
        };
        // Somebody waits again; what is still underway from before ends in its own time.
        self.abandoned = false;
        let job = Job {
            tag: Some(request.tag),
            losses: self.stats.sessions_lost,
            ..Job::new(command, request.op, request.data, payload)
        };
        self.jobs.put(slot, job);
        self.waiting.push_back(slot);
    }

    fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) -> bool {
        let mut moved = false;
        self.observe_pass(now);
        let mut at = 0;
        while let Some(&(due, slot)) = self.backoff.get(at) {
            if due <= now {
                self.backoff.swap_remove(at);
                self.waiting.push_back(slot);
            } else {
                at += 1;
            }
        }
        moved |= self.reconnect(now);
        if self.in_doubt || self.reset.is_some() {
            moved |= self.settle(now);
        }
        if !self.ranked {
            self.rank(now);
        }
        self.give_up(now);
        self.look_again(now);
        self.read_size(now);
        self.feed(now);
        moved |= self.exchange_all(now);
        self.release_pinned();
        if self.paths.len() > 1 {
            self.watch(now);
        }
        // What the answers led to (R2Ts, repetitions, the look's next command) goes out now, not with the next wake-up.
        self.look_again(now);
        self.feed(now);
        moved |= self.send_all(now);
        self.release_pinned();
        self.update_waits();
        moved |= !self.ready.is_empty();
        done.append(&mut self.ready);
        moved
    }

    fn submit_to(&mut self, ring: &mut Ring) -> bool {
        let mut again = false;
        for wire in self.paths.iter_mut().filter_map(|path| path.wire.as_mut()) {
            again |= wire.submit_to(&self.jobs, ring);
        }
        again
    }

    fn reap_from(&mut self, ring: &mut Ring) {
        for wire in self.paths.iter_mut().filter_map(|path| path.wire.as_mut()) {
            wire.reap_from(&mut self.jobs, ring);
        }
    }

    fn leave_ring(&mut self) {
        self.paths.iter_mut().filter_map(|path| path.wire.as_mut()).for_each(Wire::leave_ring);
        self.update_waits();
    }

    fn readiness(&mut self, ready: bool) {
        let set = match &self.waits {
            Some(waits) if ready && !waits.is_empty() => waits.ready(),
            _ => 0,
        };
        let many = self.waits.is_some();
        for (index, path) in self.paths.iter_mut().enumerate() {
            if let Some(wire) = &mut path.wire {
                wire.readiness(if many { set >> index & 1 != 0 } else { ready });
            }
        }
    }

    fn moves_long(&self) -> bool {
        self.paths.iter().any(|path| path.wire.as_ref().is_some_and(Wire::receives_long))
    }

    fn wait(&self) -> Wait<'_> {
        let mut deadline = self.backoff.iter().map(|&(at, _)| at).min();
        let mut sooner = |at: Option<Instant>| deadline = [deadline, at].into_iter().flatten().min();
        for path in &self.paths {
            sooner(match &path.phase {
                Phase::Waiting { until } => Some(*until),
                Phase::Dialing(dial) => Some(dial.deadline()),
                Phase::Up | Phase::Probing | Phase::Closed => None,
            });
            sooner(path.wire.as_ref().and_then(|wire| wire.session.deadline()));
        }
        sooner(self.look_at());
        sooner(self.size_due());
        sooner(self.watch_at());
        if self.in_doubt || self.reset.is_some() {
            sooner(self.settle_at());
        }
        sooner(self.give_up_at().filter(|_| self.someone_waits()));
        let (fd, writable) = match (&self.waits, &self.paths[..]) {
            (Some(waits), _) => (Some(waits.fd()).filter(|_| !waits.is_empty()), false),
            (None, [path, ..]) => match (&path.wire, &path.phase) {
                (Some(wire), _) if wire.is_in_ring() => (None, false),
                (Some(wire), _) => (Some(wire.stream().as_fd()), wire.wants_write()),
                (None, Phase::Dialing(dial)) => (dial.fd(), dial.wants_write()),
                _ => (None, false),
            },
            (None, []) => (None, false),
        };
        Wait { fd, writable, deadline }
    }

    fn abandon(&mut self) {
        self.abandoned = true;
        if self.active.is_empty() {
            self.drop_waiting();
        } else {
            for slot in self.take_held() {
                self.finish(slot, Outcome::IoError);
            }
        }
    }

    fn close(&mut self, limit: Duration) {
        self.shut_down(limit);
    }

    fn export(&self, fds: &mut Fds, _now: Instant) -> Result<serde_json::Value, NotNow> {
        self.make_state(fds)
    }

    fn import(&mut self, state: serde_json::Value, fds: &mut Fds, now: Instant) -> Result<(), BadState> {
        self.take_state(state, fds, now)
    }

    fn losses(&self) -> u64 {
        self.stats.sessions_lost
    }

    fn status(&self) -> serde_json::Value {
        self.describe()
    }

    fn collect(&self, samples: &mut Samples) {
        self.collect_samples(samples);
    }

    fn command(
        &mut self,
        name: &str,
        args: &serde_json::Map<String, serde_json::Value>,
        now: Instant,
    ) -> Option<Result<Rest, String>> {
        self.run_command(name, args, now)
    }

    fn take_change(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }
}
