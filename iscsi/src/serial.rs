//! Serial numbers (RFC 1982 with SERIAL_BITS = 32): CmdSN, StatSN, DataSN, R2TSN and their windows.
//!
//! RFC 7143 4.2.2.1 asks for this arithmetic wherever sequence numbers are compared. The type has no `Ord` on
//! purpose: serial order is not a total order, and a plain `<` on the numbers is the classic bug at the wrap.

use std::fmt;

/// A 32-bit serial number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
pub struct Serial(pub u32);

impl Serial {
    /// The number `n` places later, modulo 2^32. RFC 1982 defines addition for `n` below 2^31.
    #[inline]
    #[must_use]
    pub const fn add(self, n: u32) -> Self {
        Self(self.0.wrapping_add(n))
    }

    /// The number `n` places earlier, modulo 2^32.
    #[inline]
    #[must_use]
    pub const fn sub(self, n: u32) -> Self {
        Self(self.0.wrapping_sub(n))
    }

    /// The number after this one.
    #[inline]
    #[must_use]
    pub const fn next(self) -> Self {
        self.add(1)
    }

    /// Returns this number and moves to the next: for counters that stamp PDUs.
    #[inline]
    pub const fn take(&mut self) -> Self {
        let this = *self;
        *self = self.next();
        this
    }

    /// Whether this number comes before `other`. False for numbers exactly 2^31 apart, which RFC 1982 leaves
    /// undefined.
    #[inline]
    #[must_use]
    pub const fn is_before(self, other: Self) -> bool {
        let ahead = other.0.wrapping_sub(self.0);
        ahead != 0 && ahead < 1 << 31
    }

    /// Whether this number comes after `other`.
    #[inline]
    #[must_use]
    pub const fn is_after(self, other: Self) -> bool {
        other.is_before(self)
    }

    /// Whether this number is `other` or comes before it.
    #[inline]
    #[must_use]
    pub const fn is_at_or_before(self, other: Self) -> bool {
        self.0 == other.0 || self.is_before(other)
    }

    /// Whether this number is `other` or comes after it.
    #[inline]
    #[must_use]
    pub const fn is_at_or_after(self, other: Self) -> bool {
        other.is_at_or_before(self)
    }

    /// How many places this number lies after `earlier` (modulo 2^32; meaningful where it is not before it).
    #[inline]
    #[must_use]
    pub const fn since(self, earlier: Self) -> u32 {
        self.0.wrapping_sub(earlier.0)
    }

    /// Whether this number lies in the window `first..=last`. An empty window has `last` = `first - 1`.
    #[inline]
    #[must_use]
    pub const fn in_window(self, first: Self, last: Self) -> bool {
        self.is_at_or_after(first) && self.is_at_or_before(last)
    }
}

impl From<u32> for Serial {
    fn from(value: u32) -> Self {
        Self(value)
    }
}

impl From<Serial> for u32 {
    fn from(value: Serial) -> Self {
        value.0
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Serial({:#x})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Numbers near the places where plain comparison goes wrong.
    fn near_edges() -> impl Strategy<Value = u32> {
        prop_oneof![any::<u32>(), 0xFFFF_FFF0..=u32::MAX, 0u32..16, 0x7FFF_FFF0u32..0x8000_0010]
    }

    proptest! {
        #[test]
        fn adding_moves_forward(start in near_edges(), n in prop_oneof![1u32..64, 1u32..0x8000_0000]) {
            let (a, b) = (Serial(start), Serial(start).add(n));
            prop_assert!(a.is_before(b) && b.is_after(a));
            prop_assert!(!b.is_before(a) && a != b);
            prop_assert_eq!(b.since(a), n);
            prop_assert_eq!(b.sub(n), a);
        }

        #[test]
        fn order_is_antisymmetric(a in near_edges(), b in near_edges()) {
            let (a, b) = (Serial(a), Serial(b));
            prop_assert!(!(a.is_before(b) && b.is_before(a)));
            let opposite = a.0.wrapping_sub(b.0) == 1 << 31;
            prop_assert_eq!(a == b || a.is_before(b) || a.is_after(b), !opposite);
        }

        #[test]
        fn window_holds_what_it_says(first in near_edges(), size in 0u32..300, probe in -400i64..400) {
            let first = Serial(first);
            let last = first.add(size).sub(1);
            let number = Serial((i64::from(first.0) + probe) as u32);
            prop_assert_eq!(number.in_window(first, last), (0..i64::from(size)).contains(&probe));
        }
    }

    #[test]
    fn wraps() {
        let mut sn = Serial(0xFFFF_FFFF);
        assert_eq!(sn.take(), Serial(0xFFFF_FFFF));
        assert_eq!(sn, Serial(0));
        assert!(Serial(0xFFFF_FFFF).is_before(Serial(0)));
        assert!(!Serial(0).is_before(Serial(0x8000_0000)) && !Serial(0x8000_0000).is_before(Serial(0)));
    }
}
