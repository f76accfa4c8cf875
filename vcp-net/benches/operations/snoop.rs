//! `snoop`: frames for stations, which it passes over, and reports of memberships, each of which it reads.

use criterion::Criterion;
use vcp_net::switch::snoop::Snoop;

use super::bed;

/// See the module.
pub(super) fn bench(criterion: &mut Criterion) {
    let report = |at: usize, frame: &mut Vec<u8>| {
        // An IGMPv2 report of one group of 16.
        frame[..6].copy_from_slice(&[0x01, 0x00, 0x5e, 1, 2, at as u8 % 16]);
        frame[23] = 2;
        frame[34..42].copy_from_slice(&[0x16, 0, 0, 0, 239, 1, 2, at as u8 % 16]);
    };
    let change: [(&str, bed::Change<'_>); 2] = [("snoop", &bed::unchanged), ("snoop, reports", &report)];
    for (name, change) in change {
        bed::each(
            criterion,
            name,
            change,
            |burst| (Snoop::default(), burst.parsed()),
            |(snoop, work), burst| snoop.run(work, &burst.frames(), bed::FROM, 1),
        );
    }
}
