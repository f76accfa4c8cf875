//! `parse`: frames of a driver that leaves nothing undone, and of one whose headers have to be read.

use criterion::Criterion;
use vcp_net::frame::Offloads;
use vcp_net::switch::parse::Parse;
use vcp_net::switch::work::Work;

use super::bed;

/// See the module.
pub(super) fn bench(criterion: &mut Criterion) {
    for (name, host) in [("parse", None), ("parse, headers read", Some(Offloads::ALL))] {
        bed::each(
            criterion,
            name,
            bed::unchanged,
            |_| (Parse::default(), Work::default()),
            |(parse, work), burst| parse.run(work, &burst.frames(), host),
        );
    }
}
