//! `learn`: bursts of one station, and bursts in which each frame is of another one; all of them known.

use criterion::Criterion;
use vcp_net::switch::learn::Learn;
use vcp_net::switch::table::{AGE_S, MacTable};

use super::bed;

/// See the module.
pub(super) fn bench(criterion: &mut Criterion) {
    let many = |at: usize, frame: &mut Vec<u8>| {
        frame[6..12].copy_from_slice(&bed::station(100 + at as u64).bytes());
    };
    let change: [(&str, bed::Change<'_>); 2] = [("learn", &bed::unchanged), ("learn, many stations", &many)];
    for (name, change) in change {
        bed::each(
            criterion,
            name,
            change,
            |burst| (Learn::default(), burst.parsed(), MacTable::new(42)),
            |(learn, work, table), _| learn.run(work, bed::FROM, table, AGE_S),
        );
    }
}
