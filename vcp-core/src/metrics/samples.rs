//! [`Samples`]: numbers with a name, a meaning, a unit and labels, as they are shown outside.

use serde_json::{Map, Value, json};

use super::Latency;

/// What kind of number a family has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows. Its name outside ends with `_total`.
    Counter,
    /// As it is now.
    Gauge,
    /// How many lie below which bound, and their sum.
    Histogram,
}

/// The unit of a family's numbers; part of the name outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// A plain number.
    None,
    /// Bytes.
    Bytes,
    /// Seconds; kept as nanoseconds inside.
    Seconds,
}

/// Numbers of one meaning, told apart by labels.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    /// Without unit and `_total`: `vcp_` and words in snake case.
    pub name: &'static str,
    /// One sentence for people.
    pub help: &'static str,
    /// The unit.
    pub unit: Unit,
    /// The kind.
    pub kind: Kind,
}

impl Family {
    /// A counter.
    #[must_use]
    pub const fn counter(name: &'static str, unit: Unit, help: &'static str) -> Self {
        Self { name, help, unit, kind: Kind::Counter }
    }

    /// A gauge.
    #[must_use]
    pub const fn gauge(name: &'static str, unit: Unit, help: &'static str) -> Self {
        Self { name, help, unit, kind: Kind::Gauge }
    }

    /// A histogram of durations.
    #[must_use]
    pub const fn latency(name: &'static str, help: &'static str) -> Self {
        Self { name, help, unit: Unit::Seconds, kind: Kind::Histogram }
    }

    /// The name with the unit, and `_total` for a counter.
    #[must_use]
    pub fn full_name(&self) -> String {
        let unit = match self.unit {
            Unit::None => "",
            Unit::Bytes => "_bytes",
            Unit::Seconds => "_seconds",
        };
        let total = if self.kind == Kind::Counter { "_total" } else { "" };
        format!("{}{unit}{total}", self.name)
    }
}

/// A number.
#[derive(Clone, Debug, PartialEq)]
pub enum Amount {
    /// Of a counter or gauge, in the family's unit, or in nanoseconds where that is seconds.
    Number(u64),
    /// Of a histogram.
    Latency(LatencySnapshot),
}

/// A copy of a [`Latency`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LatencySnapshot {
    /// Upper bounds in nanoseconds (the last one is open: `u64::MAX`), and how many lie in each bucket.
    pub buckets: Vec<(u64, u64)>,
    /// Sum of all, in nanoseconds.
    pub sum_ns: u64,
    /// Number of all.
    pub count: u64,
}

/// One number of a family.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The family.
    pub family: &'static Family,
    /// Labels: names in snake case, and values.
    pub labels: Vec<(&'static str, String)>,
    /// The number.
    pub amount: Amount,
}

/// Numbers collected for one look at them. Labels that all of a part share (the device) are set with
/// [`within`](Self::within).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples {
    list: Vec<Sample>,
    common: Vec<(&'static str, String)>,
}

impl Samples {
    /// Those collected by `collect` have the label `name` besides their own.
    pub fn within(&mut self, name: &'static str, value: &str, collect: impl FnOnce(&mut Self)) {
        self.common.push((name, value.to_owned()));
        collect(self);
        self.common.pop();
    }

    /// A counter or gauge; of seconds, in nanoseconds.
    pub fn add(&mut self, family: &'static Family, labels: &[(&'static str, &str)], number: u64) {
        self.push(family, labels, Amount::Number(number));
    }

    /// A histogram.
    pub fn add_latency(
        &mut self,
        family: &'static Family,
        labels: &[(&'static str, &str)],
        latency: &Latency,
    ) {
        self.add_snapshot(family, labels, latency.snapshot());
    }

    /// A histogram that was counted elsewhere.
    pub fn add_snapshot(
        &mut self,
        family: &'static Family,
        labels: &[(&'static str, &str)],
        latency: LatencySnapshot,
    ) {
        self.push(family, labels, Amount::Latency(latency));
    }

    fn push(&mut self, family: &'static Family, labels: &[(&'static str, &str)], amount: Amount) {
        let own = labels.iter().map(|&(name, value)| (name, value.to_owned()));
        let labels = self.common.iter().cloned().chain(own).collect();
        self.list.push(Sample { family, labels, amount });
    }

    /// Takes over all of `other`, with the common labels of here.
    pub fn append(&mut self, other: Self) {
        for mut sample in other.list {
            let own = std::mem::take(&mut sample.labels);
            sample.labels = self.common.iter().cloned().chain(own).collect();
            self.list.push(sample);
        }
    }

    /// All of them.
    #[must_use]
    pub fn list(&self) -> &[Sample] {
        &self.list
    }

    /// As JSON: a list of `{"name":..,"labels":{..},"value":..}`, or of a histogram `count`, `sum_seconds`, and upper
    /// bounds of its quantiles.
    #[must_use]
    pub fn json(&self) -> Value {
        let one = |sample: &Sample| {
            let labels = sample.labels.iter().map(|(name, value)| ((*name).to_owned(), json!(value)));
            let mut object = Map::new();
            object.insert("name".into(), sample.family.full_name().into());
            object.insert("labels".into(), labels.collect::<Map<_, _>>().into());
            match &sample.amount {
                Amount::Number(number) if sample.family.unit == Unit::Seconds => {
                    object.insert("value".into(), json!(seconds(*number)));
                }
                Amount::Number(number) => drop(object.insert("value".into(), json!(number))),
                Amount::Latency(latency) => {
                    object.insert("count".into(), json!(latency.count));
                    object.insert("sum_seconds".into(), json!(seconds(latency.sum_ns)));
                    for (name, quantile) in [("p50_seconds", 0.5), ("p99_seconds", 0.99)] {
                        object.insert(name.into(), json!(seconds(latency.quantile_ns(quantile))));
                    }
                }
            }
            Value::Object(object)
        };
        self.list.iter().map(one).collect()
    }
}

impl LatencySnapshot {
    /// Upper bound in nanoseconds of a quantile (0.0 to 1.0); 0 without any latency.
    #[must_use]
    pub fn quantile_ns(&self, quantile: f64) -> u64 {
        let total: u64 = self.buckets.iter().map(|(_, count)| count).sum();
        let rank = (quantile * total as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for &(bound, count) in &self.buckets {
            seen += count;
            if seen >= rank {
                return bound;
            }
        }
        0
    }
}

/// Nanoseconds as seconds.
#[must_use]
pub fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}
