//! The few legacy devices that a guest needs to talk, to reset itself and to switch itself off.

pub mod console;
pub mod hotplug;
pub mod panic;
pub mod power;
