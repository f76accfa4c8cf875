//! Header fields by name, for rules that put something else there. Offsets are those of RFC 7143 chapter 11.

use anyhow::{Context, bail};

use crate::Result;

/// A field of a basic header segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// First byte.
    pub at: usize,
    /// Bytes, 1 to 8.
    pub len: usize,
}

const NAMES: &[(&str, usize, usize)] = &[
    ("opcode", 0, 1),
    ("flags", 1, 1),
    ("response", 2, 1),
    ("reason", 2, 1),
    ("scsi-status", 3, 1),
    ("dsl", 5, 3),
    ("lun", 8, 8),
    ("tsih", 14, 2),
    ("itt", 16, 4),
    ("ttt", 20, 4),
    ("stat-sn", 24, 4),
    ("exp-cmd-sn", 28, 4),
    ("max-cmd-sn", 32, 4),
    ("data-sn", 36, 4),
    ("r2t-sn", 36, 4),
    ("exp-data-sn", 36, 4),
    ("status-class", 36, 1),
    ("status-detail", 37, 1),
    ("time2wait", 40, 2),
    ("offset", 40, 4),
    ("length", 44, 4),
    ("residual", 44, 4),
];

impl Field {
    /// By name.
    ///
    /// # Errors
    /// There is no such field.
    pub fn parse(name: &str) -> Result<Self> {
        let known = NAMES.iter().find(|(known, ..)| *known == name);
        let &(_, at, len) = known.with_context(|| format!("no header field {name:?}"))?;
        Ok(Self { at, len })
    }

    /// Its value.
    pub fn get(self, header: &[u8; 48]) -> u64 {
        header[self.at..self.at + self.len].iter().fold(0, |n, &byte| n << 8 | u64::from(byte))
    }

    /// Puts a value, cut to its length.
    pub fn put(self, header: &mut [u8; 48], value: u64) {
        header[self.at..self.at + self.len].copy_from_slice(&value.to_be_bytes()[8 - self.len..]);
    }
}

/// A number in decimal or hexadecimal, with an optional minus sign (two's complement).
///
/// # Errors
/// It is none.
pub fn number(text: &str) -> Result<u64> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let parsed = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(&hex.replace('_', ""), 16),
        None => digits.parse(),
    };
    let Ok(value) = parsed else { bail!("not a number: {text:?}") };
    Ok(if negative { value.wrapping_neg() } else { value })
}

/// Bytes in hexadecimal.
///
/// # Errors
/// They are not.
pub fn hex(text: &str) -> Result<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        bail!("not hexadecimal: {text:?}");
    }
    let byte =
        |at| u8::from_str_radix(&text[at..at + 2], 16).with_context(|| format!("not hexadecimal: {text:?}"));
    (0..text.len()).step_by(2).map(byte).collect()
}

/// The same in the other direction.
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
