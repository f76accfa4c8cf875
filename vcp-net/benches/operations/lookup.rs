//! `lookup`: bursts for one station, and bursts in which each frame is for another one. Setting the fates of the burst back
//! is a part of what is measured.

use criterion::Criterion;
use vcp_net::switch::lookup::Lookup;
use vcp_net::switch::snoop::Snoop;
use vcp_net::switch::table::{AGE_S, MacTable};
use vcp_net::switch::work::Fate;

use super::bed;

/// See the module.
pub(super) fn bench(criterion: &mut Criterion) {
    let many = |at: usize, frame: &mut Vec<u8>| {
        frame[..6].copy_from_slice(&bed::station(1 + at as u64).bytes());
    };
    let change: [(&str, bed::Change<'_>); 2] =
        [("lookup", &bed::unchanged), ("lookup, many stations", &many)];
    let all = [bed::FROM, bed::TO].into_iter().collect();
    for (name, change) in change {
        bed::each(
            criterion,
            name,
            change,
            |burst| {
                let mut table = MacTable::new(42);
                for at in 1..=64 {
                    table.learn(0, bed::station(at), bed::TO, AGE_S);
                }
                (Lookup::default(), burst.parsed(), table, Snoop::default())
            },
            |(lookup, work, table, snoop), _| {
                work.items_mut().iter_mut().for_each(|item| item.fate = Fate::Open);
                lookup.run(work, bed::FROM, all, table, snoop, AGE_S);
            },
        );
    }
}
