//! The bytes of an input, taken off one by one. When there are no more, all that is taken is zero.
#![allow(dead_code)] // Each target uses its own part.

/// See the module.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    pub fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub fn long(&mut self) -> u32 {
        u32::from(self.word()) | u32::from(self.word()) << 16
    }

    /// A small number on either side of zero, mostly; now and then any.
    pub fn near(&mut self) -> u32 {
        match self.byte() {
            0..=127 => 0,
            byte @ 128..=223 => i32::from(byte as i8).wrapping_add(80) as u32,
            224..=239 => u32::from(self.word()),
            _ => self.long(),
        }
    }

    /// Up to `most` bytes, as many as its first byte says.
    pub fn bytes(&mut self, most: usize) -> &'a [u8] {
        let len = usize::from(self.byte()).min(most).min(self.0.len());
        let (bytes, rest) = self.0.split_at(len);
        self.0 = rest;
        bytes
    }
}
