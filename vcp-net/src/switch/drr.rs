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

    /// Frames that it spent credit on were not sent after all.
    pub fn put_back(&mut self, frames: u64, bytes: u64) {
        self.0 = (self.0 + bytes + frames * FRAME_COST).min(2 * QUANTUM);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Two that always have something to send get the same in the long run, whatever the lengths of their frames; one
    /// that has been silent gets no more than that afterwards.
    #[test]
    fn senders_get_the_same_whatever_they_send() {
        let lens = [60u64, 1514, 65_550];
        let mut credits = [Credit::default(); 3];
        let mut spent = [0u64; 3];
        for _ in 0..1000 {
            for ((credit, spent), len) in credits.iter_mut().zip(&mut spent).zip(lens) {
                credit.begin();
                while credit.has_any() {
                    let frames = credit.afford([len; 64]) as u64;
                    *spent += frames * (len + FRAME_COST);
                    credit.spend(frames, frames * len);
                }
            }
        }
        let (least, most) = (spent.iter().min().unwrap(), spent.iter().max().unwrap());
        assert!(*most <= *least * 2, "{spent:?}");
        let mut silent = Credit::default();
        for _ in 0..1000 {
            silent.begin();
            silent.end();
        }
        silent.begin();
        assert!(silent.afford([1000; 1000]) as u64 <= QUANTUM / 1000 + 1);
    }
}
