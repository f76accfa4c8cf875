//! From a run that broke a rule to a smaller one that does: fewer requests, then fewer faults.

use std::collections::BTreeSet;

use crate::scenario::Scenario;
use crate::world::{Failure, run};

/// What is left, and how it fails.
pub struct Shrunk {
    pub scenario: Scenario,
    pub skip: BTreeSet<usize>,
    pub failure: Box<Failure>,
}

fn fails(scenario: &Scenario, skip: &BTreeSet<usize>) -> Option<Box<Failure>> {
    run(scenario, skip, false).err()
}

/// Shrinks a failing run, within so many runs.
pub fn shrink(scenario: Scenario, skip: BTreeSet<usize>, failure: Box<Failure>, mut runs: u32) -> Shrunk {
    let mut best = Shrunk { scenario, skip, failure };
    let mut step = best.scenario.ops / 2;
    while step > 0 && runs > 0 {
        let fewer = Scenario { ops: best.scenario.ops.saturating_sub(step).max(1), ..best.scenario.clone() };
        runs -= 1;
        match fails(&fewer, &best.skip) {
            Some(failure) if fewer.ops < best.scenario.ops => {
                best = Shrunk { scenario: fewer, failure, ..best };
            }
            _ => step /= 2,
        }
    }
    let mut again = true;
    while again && runs > 0 {
        again = false;
        // The last ones first: without them, those before stay what they are.
        let numbers: Vec<_> = best.failure.happened.iter().map(|h| h.number).rev().collect();
        for number in numbers {
            if runs == 0 {
                break;
            }
            runs -= 1;
            let mut skip = best.skip.clone();
            skip.insert(number);
            if let Some(failure) = fails(&best.scenario, &skip) {
                best = Shrunk { skip, failure, ..best };
                again = true;
            }
        }
    }
    best
}
