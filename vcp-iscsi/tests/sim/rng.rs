//! Random numbers from a seed: the same on every machine and in every version of every library. What is made of them is in
//! `draw.rs`, so that a fuzzer can put its input in place of this file.

pub use crate::draw::mix;

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The stream `stream` of a seed; streams do not influence each other.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self(mix(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ mix(stream + 1)))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
}
