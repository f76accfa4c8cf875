//! The processes behind the guest's devices: started, watched, replaced when they die, ended with the guest.

pub mod backoff;
pub mod keeper;
pub mod process;
pub mod runtime_dir;

pub use keeper::{Keeper, Source};
pub use process::{IscsiVcp, VcpPaths, VcpProcess, find_program};
