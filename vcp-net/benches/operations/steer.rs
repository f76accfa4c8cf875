//! `steer`: the queues that a driver's flows use are noted, and looked up for frames of the other direction.

use std::hint::black_box;

use criterion::Criterion;
use vcp_net::switch::steer::Steer;

use super::bed;

/// See the module.
pub(super) fn bench(criterion: &mut Criterion) {
    let state = |burst: &bed::Burst| (Steer::default(), burst.parsed());
    bed::each(criterion, "steer, sent", bed::unchanged, state, |(steer, work), burst| {
        steer.sent(work, &burst.frames(), 1);
    });
    bed::each(criterion, "steer, pair", bed::unchanged, state, |(steer, work), burst| {
        let frames = burst.frames();
        for (at, item) in work.items().iter().enumerate() {
            let frame = frames.get(at, item.meta);
            black_box(steer.pair(&frame, item.ether.ethertype, item.ether.len_bytes.into(), 4));
        }
    });
}
