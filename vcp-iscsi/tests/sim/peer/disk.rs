//! The model's medium: blocks with a volatile cache over stable storage.

use std::collections::BTreeMap;

use crate::content::BLOCK;
use crate::rng::Rng;

#[derive(Debug)]
pub struct Disk {
    stable: Vec<u8>,
    /// Blocks written since they were last made stable.
    cache: BTreeMap<u64, Vec<u8>>,
    pub write_cache: bool,
}

impl Disk {
    pub fn new(blocks: u64, write_cache: bool) -> Self {
        Self { stable: vec![0; blocks as usize * BLOCK], cache: BTreeMap::new(), write_cache }
    }

    fn block(&self, lba: u64) -> &[u8] {
        self.cache.get(&lba).map_or_else(|| &self.stable[lba as usize * BLOCK..][..BLOCK], Vec::as_slice)
    }

    pub fn read(&self, lba: u64, blocks: u64, out: &mut Vec<u8>) {
        for at in lba..lba + blocks {
            out.extend_from_slice(self.block(at));
        }
    }

    pub fn write(&mut self, lba: u64, data: &[u8], fua: bool) {
        for (at, block) in (lba..).zip(data.chunks_exact(BLOCK)) {
            if self.write_cache && !fua {
                self.cache.insert(at, block.to_vec());
            } else {
                self.cache.remove(&at);
                self.stable[at as usize * BLOCK..][..BLOCK].copy_from_slice(block);
            }
        }
    }

    pub fn flush(&mut self) {
        for (at, block) in std::mem::take(&mut self.cache) {
            self.stable[at as usize * BLOCK..][..BLOCK].copy_from_slice(&block);
        }
    }

    /// The cache makes some room, as caches do.
    pub fn destage(&mut self, rng: &mut Rng) {
        let some: Vec<u64> = self.cache.keys().copied().filter(|_| rng.permille(300)).collect();
        for at in some {
            if let Some(block) = self.cache.remove(&at) {
                self.stable[at as usize * BLOCK..][..BLOCK].copy_from_slice(&block);
            }
        }
    }

    /// The power fails: number of blocks that fall back to what they were.
    pub fn power_loss(&mut self) -> usize {
        std::mem::take(&mut self.cache).len()
    }
}
