//! What makes one logical unit the same everywhere and for ever: serial number and NAA identifier.

/// Names of a logical unit, derived from where it is so that they are the same after every start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// UNIT SERIAL NUMBER (VPD page 80h): 16 hexadecimal digits.
    pub serial: String,
    /// The NAA designator (VPD page 83h): locally assigned, type 3h in the top four bits.
    pub naa: u64,
}

impl Identity {
    /// The identity of LUN `lun` of `target` on the medium called `medium` (a path, or what kind of memory).
    pub fn derive(target: &str, lun: u64, medium: &str) -> Self {
        // FNV-1a, then a finaliser so that neighbouring LUNs differ in all digits. It names, it does not protect.
        let mut hash = 0xCBF2_9CE4_8422_2325u64;
        let lun = lun.to_be_bytes();
        for &byte in target.as_bytes().iter().chain(&[0]).chain(&lun).chain(medium.as_bytes()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
        }
        hash ^= hash >> 33;
        hash = hash.wrapping_mul(0xFF51_AFD7_ED55_8CCD);
        hash ^= hash >> 33;
        Self::of_naa(0x3 << 60 | hash >> 4)
    }

    /// The identity with this NAA identifier.
    pub fn of_naa(naa: u64) -> Self {
        Self { serial: format!("{naa:016x}"), naa }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stable_and_distinct() {
        let a = Identity::derive("iqn.2026-01.org.vcp:a", 0, "mem");
        assert_eq!(a, Identity::derive("iqn.2026-01.org.vcp:a", 0, "mem"));
        assert_eq!(a.naa >> 60, 3);
        assert_eq!(a.serial.len(), 16);
        for other in [
            Identity::derive("iqn.2026-01.org.vcp:a", 1, "mem"),
            Identity::derive("iqn.2026-01.org.vcp:b", 0, "mem"),
            Identity::derive("iqn.2026-01.org.vcp:a", 0, "/disk"),
        ] {
            assert_ne!(a, other);
        }
    }
}
