//! `parse`: frames of a driver that leaves nothing undone, and of one whose headers have to be read.

mod bed;

use vcp_net::frame::Offloads;
use vcp_net::switch::parse::Parse;
use vcp_net::switch::work::Work;

fn main() {
    let mut criterion = bed::criterion();
    for (name, host) in [("parse", None), ("parse, headers read", Some(Offloads::ALL))] {
        bed::each(
            &mut criterion,
            name,
            bed::unchanged,
            |_| (Parse::default(), Work::default()),
            |(parse, work), burst| parse.run(work, &burst.frames(), host),
        );
    }
    criterion.final_summary();
}
