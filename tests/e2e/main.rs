//! End-to-end tests: the programs as they are, against peers that we did not write. One binary, so that it links once.
//!
//! Every test starts what it needs on free ports, waits for events with deadlines, and can run beside the others.

mod beds;
