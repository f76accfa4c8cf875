//! Measures `msgq` beside its peers, two sides on two hardware threads, and prints one JSON object per sample.
//!
//! Every sample is bracketed by a control, the round trip of one cache line: where a host moves virtual processors
//! between near and far places, a figure means something only as a ratio to what the line took in the same moment. Samples
//! whose two controls differ in kind are marked and left out by whoever reads this (`cargo xtask bench msgq`).
//!
//! `msgq-bench ROUNDS [FILTER]`; `MSGQ_BENCH_FIFO=1` for a machine that others use at the same time.

mod iox;
mod ours;
mod pair;
mod peers;

use serde_json::{Value, json};

/// What one run of a measurement gives.
pub struct Sample {
    /// Nanoseconds for a message or a round trip; or the number itself.
    pub value: f64,
    /// More, by name.
    pub more: Value,
}

impl From<f64> for Sample {
    fn from(value: f64) -> Self {
        Self { value, more: Value::Null }
    }
}

type Measurement = (&'static str, fn() -> Sample);

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "iox-child") {
        iox::child(&args[1..]);
        return;
    }
    let rounds: u32 = args.first().and_then(|arg| arg.parse().ok()).unwrap_or(3);
    let filter = args.get(1).cloned().unwrap_or_default();
    let all: Vec<Measurement> = [&ours::ALL[..], &peers::ALL[..], &iox::ALL[..]].concat();
    for _ in 0..rounds {
        for (name, run) in all.iter().filter(|(name, _)| name.contains(&filter)) {
            let before = pair::line_round_trip();
            let sample = run();
            let after = pair::line_round_trip();
            println!(
                "{}",
                json!({
                    "name": name,
                    "value": sample.value,
                    "more": sample.more,
                    "line_ns": [before, after],
                })
            );
        }
    }
}
