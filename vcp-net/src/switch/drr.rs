//! Deficit round robin: each sender may spend the same in a round; what it could not spend it keeps, while it has
//! something to send.

/// What a sender gets per round: enough for the longest frame.
pub const QUANTUM: u64 = 96 << 10;
/// What a frame costs besides its bytes: about what its handling costs in bytes copied.
pub const FRAME_COST: u64 = 256;

/// One sender's credit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Credit(u64);

impl Credit {
    /// Its turn begins.
    pub fn begin(&mut self) {
        self.0 = (self.0 + QUANTUM).min(2 * QUANTUM);
    }

    /// How many of these frames it may send, by their lengths: at least one, if it has any credit at all.
    pub fn afford(&self, lens: impl IntoIterator<Item = u64>) -> usize {
        let mut left = self.0;
        let mut count = 0;
        for len in lens {
            if left == 0 {
                break;
            }
            left = left.saturating_sub(len + FRAME_COST);
            count += 1;
        }
        count
    }

    /// It sent frames with so many bytes in all; whether it may send more.
    #[inline]
    pub fn spend(&mut self, frames: u64, bytes: u64) -> bool {
        self.0 = self.0.saturating_sub(bytes + frames * FRAME_COST);
        self.0 != 0
    }

    /// It had nothing more to send: credit is not saved up.
    pub fn end(&mut self) {
        self.0 = 0;
    }

    /// Whether it may send.
    #[inline]
    #[must_use]
    pub fn has_any(&self) -> bool {
        self.0 != 0
    }
}
