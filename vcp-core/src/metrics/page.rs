//! The page that Prometheus reads: OpenMetrics text, written by `prometheus-client` from [`Samples`].

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit as PageUnit};

use super::samples::{Amount, Kind, LatencySnapshot, Sample, Samples, Unit, seconds};

/// Content type of the page.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Bounds of the histograms on the page are powers of two of nanoseconds between these exponents (8 us and 17 s); the
/// finer and wider ones inside are summed up.
const PAGE_EXPONENTS: std::ops::RangeInclusive<u32> = 13..=34;
/// From here on only every second power is shown (134 ms).
const COARSE_FROM: u32 = 27;

/// The page for these numbers.
#[must_use]
pub fn page(samples: Samples) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Page(samples)));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
    text
}

#[derive(Debug)]
struct Page(Samples);

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        // The numbers of a family stand together, whatever order they were collected in.
        let mut families: BTreeMap<&str, Vec<&Sample>> = BTreeMap::new();
        for sample in self.0.list() {
            families.entry(sample.family.name).or_default().push(sample);
        }
        for samples in families.values() {
            let family = samples[0].family;
            let unit = match family.unit {
                Unit::None => None,
                Unit::Bytes => Some(PageUnit::Bytes),
                Unit::Seconds => Some(PageUnit::Seconds),
            };
            let kind = match family.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
                Kind::Histogram => MetricType::Histogram,
            };
            let mut metric = encoder.encode_descriptor(family.name, family.help, unit.as_ref(), kind)?;
            for sample in samples {
                if sample.labels.is_empty() {
                    number(sample, &mut metric)?;
                } else {
                    let labels: Vec<(&str, &str)> =
                        sample.labels.iter().map(|(name, value)| (*name, value.as_str())).collect();
                    number(sample, &mut metric.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}

fn number(sample: &Sample, metric: &mut MetricEncoder<'_>) -> fmt::Result {
    let is_seconds = sample.family.unit == Unit::Seconds;
    match (&sample.amount, sample.family.kind) {
        (Amount::Latency(latency), _) => {
            let buckets = buckets(latency);
            metric.encode_histogram::<NoLabelSet>(seconds(latency.sum_ns), latency.count, &buckets, None)
        }
        (Amount::Number(ns), Kind::Counter) if is_seconds => {
            metric.encode_counter::<NoLabelSet, f64, f64>(&seconds(*ns), None)
        }
        (Amount::Number(number), Kind::Counter) => {
            metric.encode_counter::<NoLabelSet, u64, f64>(number, None)
        }
        (Amount::Number(ns), _) if is_seconds => metric.encode_gauge(&seconds(*ns)),
        (Amount::Number(number), _) => metric.encode_gauge(&i64::try_from(*number).unwrap_or(i64::MAX)),
    }
}

/// The buckets of the page, not yet summed up: the encoder does that.
fn buckets(latency: &LatencySnapshot) -> Vec<(f64, u64)> {
    let shown = |exponent: &u32| *exponent <= COARSE_FROM || exponent.is_multiple_of(2);
    let mut out: Vec<(f64, u64)> =
        PAGE_EXPONENTS.filter(shown).map(|exponent| (seconds(1 << exponent), 0)).collect();
    out.push((f64::INFINITY, 0));
    for &(bound, count) in &latency.buckets {
        let bound = if bound == u64::MAX { f64::INFINITY } else { seconds(bound) };
        let place = out.iter_mut().find(|(upper, _)| bound <= *upper);
        if let Some((_, sum)) = place {
            *sum += count;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::{Family, Latency};
    use super::*;

    static READS: Family = Family::counter("vcp_reads", Unit::None, "Reads");
    static TRAFFIC: Family = Family::counter("vcp_read", Unit::Bytes, "Bytes read");
    static BUDGET: Family = Family::gauge("vcp_budget", Unit::Seconds, "Time");
    static TIME: Family = Family::latency("vcp_duration", "Durations");

    #[test]
    fn families_stand_together_with_unit_and_type() {
        let latency = Latency::default();
        for ns in [100, 9000, 1_000_000, 1 << 38] {
            latency.record_ns(ns);
        }
        let mut samples = Samples::default();
        for device in ["disk0", "a \"b\"\\\n"] {
            samples.within("device", device, |samples| {
                samples.add(&READS, &[("op", "read")], 3);
                samples.add(&TRAFFIC, &[], 4096);
                samples.add_latency(&TIME, &[], &latency);
            });
        }
        samples.add(&BUDGET, &[], 1_500_000_000);
        let page = page(samples);
        for line in [
            "# TYPE vcp_reads counter",
            "vcp_reads_total{device=\"disk0\",op=\"read\"} 3",
            "# UNIT vcp_read_bytes bytes",
            "vcp_read_bytes_total{device=\"disk0\"} 4096",
            "vcp_budget_seconds 1.5",
            "vcp_duration_seconds_count{device=\"disk0\"} 4",
            "vcp_duration_seconds_bucket{le=\"+Inf\",device=\"disk0\"} 4",
            "vcp_duration_seconds_bucket{le=\"0.000008192\",device=\"disk0\"} 1",
            "vcp_duration_seconds_bucket{le=\"0.001048576\",device=\"disk0\"} 3",
            "vcp_reads_total{device=\"a \\\"b\\\"\\\\\\n\",op=\"read\"} 3",
            "# EOF",
        ] {
            assert!(page.lines().any(|found| found == line), "no line {line:?} in:\n{page}");
        }
        assert_eq!(page.matches("# TYPE vcp_reads counter").count(), 1);
    }
}
