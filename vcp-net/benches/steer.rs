//! `steer`: the queues that a driver's flows use are noted, and looked up for frames of the other direction.

mod bed;

use std::hint::black_box;

use vcp_net::switch::steer::Steer;

fn main() {
    let mut criterion = bed::criterion();
    let state = |burst: &bed::Burst| (Steer::default(), burst.parsed());
    bed::each(&mut criterion, "steer, sent", bed::unchanged, state, |(steer, work), burst| {
        steer.sent(work, &burst.frames(), 1);
    });
    bed::each(&mut criterion, "steer, pair", bed::unchanged, state, |(steer, work), burst| {
        let frames = burst.frames();
        for (at, item) in work.items().iter().enumerate() {
            let frame = frames.get(at, item.meta);
            black_box(steer.pair(&frame, item.ether.ethertype, item.ether.len_bytes.into(), 4));
        }
    });
    criterion.final_summary();
}
