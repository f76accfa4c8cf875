//! The processes behind the guest's devices: started, watched, replaced when they die or stand still, ended with the
//! guest.
//!
//! | module | is |
//! | --- | --- |
//! | [`life`] | what an event means: a state machine without clock or descriptor; [`backoff`] and [`watchdog`] are parts of it |
//! | [`keeper`] | the thread per device that hears events and carries actions out; `attach` waits for backends in its place |
//! | [`process`], [`spec`] | one `vcp-iscsi` or `vcp-net` with its descriptors, and what it is started with |
//! | [`dialer`] | the process that connects for a disk's VCPs |
//! | [`cgroup`] | control groups |
//! | [`spawn`] | how a process comes into being: namespaces, user, control group |
//! | [`hidden`], [`runtime_dir`] | sockets without a name |
//! | `report` | what others may know |

mod attach;
pub mod backoff;
pub mod cgroup;
pub mod dialer;
pub mod hidden;
pub mod keeper;
pub mod life;
pub mod process;
mod report;
pub mod runtime_dir;
pub mod spawn;
pub mod spec;
pub mod threads;
pub mod watchdog;

pub use keeper::{Keeper, Source};
pub use process::{First, VcpProcess};
pub use spec::{NetPort, Programs, VcpPaths, VcpSpec, find_program};
