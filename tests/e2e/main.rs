//! End-to-end tests: the programs as they are, against peers that we did not write. One binary, so that it links once.
//!
//! Every test starts what it needs on free ports, waits for events with deadlines, and can run beside the others. A
//! test whose system programs are missing says so and passes, unless `VCP_REQUIRE_TOOLS=1`.

mod beds;
mod bench;
mod chap;
mod confined;
mod conformance;
mod cut;
mod devices;
mod discovery;
mod disk;
mod either_io;
mod errors;
mod faults;
mod guest;
mod info;
mod inject;
mod isolation;
mod kill;
mod lifecycle;
mod memory;
mod monitor;
mod monitor_kill;
mod msgq;
mod msgq_seats;
mod msgq_upgrade;
mod multipath;
mod net;
mod net_ends;
mod net_front;
mod net_guest;
mod net_ipxe;
mod net_kill;
mod net_large;
mod net_loss;
mod net_native;
mod net_reset;
mod operate;
mod ops;
mod recovery;
mod servers;
mod supervised;
mod support;
mod switch;
mod upgrade;
mod wire;
