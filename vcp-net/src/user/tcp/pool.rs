//! [`Pool`]: the memory of all connections of a network for what came out of order, in blocks, with a bound for all, one for
//! each guest and one for each connection. What has no block is not kept; its sender repeats it.

/// Bytes of a block. A power of two, so that blocks fit the circle of sequence numbers.
pub const BLOCK_BYTES: usize = 4096;
/// Blocks that are allocated at once.
const SLAB_BLOCKS: u32 = 16;
/// Guests that are told apart.
const OWNERS: usize = 256;

/// See the module.
#[derive(Debug)]
pub struct Pool {
    slabs: Vec<Box<[u8]>>,
    free: Vec<u32>,
    /// Blocks in use, of all and of each guest.
    used: u32,
    used_by: Box<[u32; OWNERS]>,
    most: u32,
    most_by: u32,
    most_each: u32,
}

impl Pool {
    /// A pool of so many bytes, of which a guest has a quarter at most, and a connection an eighth. Nothing is allocated yet.
    #[must_use]
    pub fn new(bytes: u32) -> Self {
        let most = bytes / BLOCK_BYTES as u32;
        Self {
            slabs: Vec::new(),
            free: Vec::new(),
            used: 0,
            used_by: Box::new([0; OWNERS]),
            most,
            most_by: most.div_ceil(4),
            most_each: most.div_ceil(8),
        }
    }

    /// Bytes in use.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        u64::from(self.used) * BLOCK_BYTES as u64
    }

    /// A block for a guest, one of whose connections has `own` of them.
    pub(super) fn take(&mut self, owner: u8, own: usize) -> Option<u32> {
        let by = self.used_by[usize::from(owner)];
        if own >= self.most_each as usize || by >= self.most_by || self.used >= self.most {
            return None;
        }
        if self.free.is_empty() {
            let first = self.slabs.len() as u32 * SLAB_BLOCKS;
            self.slabs.push(vec![0; SLAB_BLOCKS as usize * BLOCK_BYTES].into());
            self.free.extend((first..first + SLAB_BLOCKS).rev());
        }
        let block = self.free.pop()?;
        self.used_by[usize::from(owner)] += 1;
        self.used += 1;
        Some(block)
    }

    /// A block is not needed any more.
    pub(super) fn give(&mut self, owner: u8, block: u32) {
        self.free.push(block);
        self.used_by[usize::from(owner)] -= 1;
        self.used -= 1;
        if self.used == 0 {
            // After a bad time the memory goes back, but for what the next loss takes.
            self.slabs.truncate(1);
            self.free.clear();
            self.free.extend((0..SLAB_BLOCKS).rev());
        }
    }

    fn place(block: u32) -> (usize, usize) {
        ((block / SLAB_BLOCKS) as usize, (block % SLAB_BLOCKS) as usize * BLOCK_BYTES)
    }

    pub(super) fn block(&self, block: u32) -> &[u8] {
        let (slab, at) = Self::place(block);
        &self.slabs[slab][at..at + BLOCK_BYTES]
    }

    pub(super) fn block_mut(&mut self, block: u32) -> &mut [u8] {
        let (slab, at) = Self::place(block);
        &mut self.slabs[slab][at..at + BLOCK_BYTES]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_and_a_connection_have_their_share_and_memory_goes_back() {
        let mut pool = Pool::new(64 * BLOCK_BYTES as u32);
        let each: Vec<u32> = (0..).map_while(|own| pool.take(1, own)).collect();
        assert_eq!(each.len(), 8, "one connection");
        let by: Vec<u32> = (0..20).map_while(|_| pool.take(1, 0)).collect();
        assert_eq!(by.len(), 8, "the rest of the guest's");
        let others: Vec<(u8, u32)> = (2..9)
            .flat_map(|who| std::iter::repeat_n(who, 20))
            .filter_map(|who| Some((who, pool.take(who, 0)?)))
            .collect();
        assert_eq!((others.len(), pool.used_bytes()), (48, 64 * BLOCK_BYTES as u64), "all of it");
        let mut all: Vec<u32> = each.iter().chain(&by).copied().chain(others.iter().map(|it| it.1)).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 64, "a block was given twice");
        each.into_iter().chain(by).for_each(|block| pool.give(1, block));
        others.into_iter().for_each(|(who, block)| pool.give(who, block));
        assert_eq!((pool.used_bytes(), pool.slabs.len()), (0, 1));
        assert!(pool.take(1, 0).is_some());
    }
}
