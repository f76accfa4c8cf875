//! The atomics that the ring is built of. The model check compiles the ring's sources with loom's instead
//! (`tests/loom.rs`).

pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};

pub(crate) use crate::shm::prefetch_write;
