//! The switch as a whole: ports, rings and an uplink, with everything that arrives checked and the books balanced after
//! each pass.

mod bed;
mod offloads;
#[path = "../../../../vcp-core/tests/support/mod.rs"]
mod ring;
mod second;
mod watch;
mod ways;
