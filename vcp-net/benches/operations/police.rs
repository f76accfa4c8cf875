//! `police`: the usual port, one that may use its own address alone, and one with a rate.

use std::time::Instant;

use criterion::Criterion;
use vcp_net::port::{PortSpec, Rate};
use vcp_net::switch::line::Sender;
use vcp_net::switch::police::Police;
use vcp_net::switch::table::MacTable;

use super::bed;

/// See the module.
pub(super) fn bench(criterion: &mut Criterion) {
    let now = Instant::now();
    let plain = PortSpec::default();
    let own = PortSpec { mac: Some(bed::station(0)), protect: true, ..plain.clone() };
    // More than any processor sends: frames are counted and none is dropped.
    let rate = Rate { bytes: Some(u64::MAX / 2), frames: Some(u64::MAX / 2) };
    let limited = PortSpec { rate, ..plain.clone() };
    for (name, spec) in [("police", plain), ("police, own address", own), ("police, rate", limited)] {
        bed::each(
            criterion,
            name,
            bed::unchanged,
            |burst| {
                let mut table = MacTable::new(42);
                if spec.protect {
                    table.fix(0, bed::station(0), bed::FROM);
                }
                (Police::default(), burst.parsed(), Sender::new(spec.clone(), now), table)
            },
            |(police, work, sender, table), _| police.run(work, bed::FROM, sender, table, now),
        );
    }
}
