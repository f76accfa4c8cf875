//! One ring: messages of 32 bytes from one producer to one consumer, through memory that each side's peer can only read.
//!
//! Slots publish themselves by the tag in their last word; there is no producer index. The consumer's head and both
//! sides' wishes to be kicked lie in their owner's memory. Numbers of messages are 64 bits wide and never come round; only
//! the tag, 32 bits of them, does.
//!
//! This module knows neither what a message means nor what a kick is. Its sources are compiled a second time with loom's
//! atomics (`tests/loom.rs`), so nothing here may use anything but `crate::sync`, `crate::layout` and
//! `crate::error`.

mod consumer;
mod fences;
mod producer;

pub use consumer::Consumer;
pub use fences::{Fences, Full, NoConsumer, NoProducer};
pub use producer::Producer;

use crate::sync::AtomicU64;

/// Memory made of 64-bit words that somebody else reads or writes at the same time.
pub trait Words {
    /// All of it.
    fn words(&self) -> &[AtomicU64];
}

impl<W: Words + ?Sized> Words for std::sync::Arc<W> {
    #[inline]
    fn words(&self) -> &[AtomicU64] {
        (**self).words()
    }
}

impl Words for [AtomicU64] {
    #[inline]
    fn words(&self) -> &[AtomicU64] {
        self
    }
}

impl Words for Vec<AtomicU64> {
    #[inline]
    fn words(&self) -> &[AtomicU64] {
        self
    }
}

impl<W: Words + ?Sized> Words for &W {
    #[inline]
    fn words(&self) -> &[AtomicU64] {
        (**self).words()
    }
}

/// What a ring is made of.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Number of the lane.
    pub lane: u8,
    /// Slots of the producer's rings, as a power of two.
    pub producer_log2: u8,
    /// Slots of the consumer's own rings, as a power of two (its other words lie where that says).
    pub consumer_log2: u8,
    /// Fewest slots that the producer may shrink to, as a power of two.
    pub min_log2: u8,
}
