//! `rewrite`: frames that stay as they are, from an access port to a trunk (a tag is put in), and the other way.

use std::hint::black_box;

use criterion::Criterion;
use vcp_net::frame::layers::HEADERS_BYTES;
use vcp_net::port::Vlan;
use vcp_net::switch::rewrite::{Head, Rewrite};

use super::bed;

/// See the module.
pub(super) fn bench(criterion: &mut Criterion) {
    let trunk = Vlan::Trunk { native: None, allowed: Vec::new() };
    let cases = [
        ("rewrite", Vlan::default(), 0, false),
        ("rewrite, tag in", trunk, 5, false),
        ("rewrite, tag out", Vlan::Access(5), 5, true),
    ];
    for (name, vlan, vid, tagged) in cases {
        bed::each(
            criterion,
            name,
            |_, frame| {
                if tagged {
                    bed::tag(frame, vid);
                }
            },
            |burst| {
                let mut work = burst.parsed();
                work.items_mut().iter_mut().for_each(|item| item.vid = vid);
                let head: Box<Head> = Box::new([0; HEADERS_BYTES + 4]);
                (Rewrite::default(), work, head)
            },
            |(rewrite, work, head), burst| {
                let frames = burst.frames();
                for (at, item) in work.items().iter().enumerate() {
                    let out = rewrite.run(item, frames.get(at, item.meta), &vlan, head);
                    let _ = black_box(out.map(|(out, l3_at)| (out.total_bytes(), l3_at)));
                }
            },
        );
    }
}
