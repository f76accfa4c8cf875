//! [`Slab`]: things with numbers that stay, and tokens that notice when a number has come to mean something else.

/// See the module.
#[derive(Debug)]
pub(super) struct Slab<T> {
    slots: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    /// Puts something in; its number.
    pub(super) fn insert(&mut self, value: T) -> u32 {
        match self.free.pop() {
            Some(at) => {
                self.slots[at as usize].1 = Some(value);
                at
            }
            None => {
                self.slots.push((0, Some(value)));
                (self.slots.len() - 1) as u32
            }
        }
    }

    /// Takes something out.
    pub(super) fn remove(&mut self, at: u32) -> Option<T> {
        let slot = self.slots.get_mut(at as usize)?;
        let value = slot.1.take()?;
        slot.0 = slot.0.wrapping_add(1) & 0xff_ffff;
        self.free.push(at);
        Some(value)
    }

    /// Number `at`.
    #[inline]
    #[must_use]
    pub(super) fn get(&self, at: u32) -> Option<&T> {
        self.slots.get(at as usize)?.1.as_ref()
    }

    /// Number `at`.
    #[inline]
    pub(super) fn get_mut(&mut self, at: u32) -> Option<&mut T> {
        self.slots.get_mut(at as usize)?.1.as_mut()
    }

    /// A word that stands for what is at `at` now, and for nothing that comes to be there later; `kind` is 0 to 255.
    #[must_use]
    pub(super) fn token(&self, kind: u8, at: u32) -> u64 {
        let generation = self.slots.get(at as usize).map_or(0, |slot| slot.0);
        u64::from(kind) << 56 | u64::from(generation) << 32 | u64::from(at)
    }

    /// What a token stands for, if it is still there.
    #[must_use]
    pub(super) fn find(&self, token: u64) -> Option<u32> {
        let at = token as u32;
        let slot = self.slots.get(at as usize)?;
        (slot.1.is_some() && slot.0 == (token >> 32) as u32 & 0xff_ffff).then_some(at)
    }

    /// How many there are.
    #[must_use]
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether there are none.
    #[must_use]
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of them, with their numbers.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.slots.iter().enumerate().filter_map(|(at, slot)| Some((at as u32, slot.1.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_does_not_outlive_what_it_stands_for() {
        let mut slab = Slab::default();
        let (a, b) = (slab.insert("a"), slab.insert("b"));
        let token = slab.token(7, a);
        assert_eq!((token >> 56, slab.find(token), slab.len()), (7, Some(a), 2));
        assert_eq!(slab.remove(a), Some("a"));
        assert_eq!((slab.find(token), slab.insert("c"), slab.find(token)), (None, a, None));
        assert_eq!((slab.remove(9), slab.get(b), slab.iter().count()), (None, Some(&"b"), 2));
    }
}
