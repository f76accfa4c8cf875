//! Text: `key=value` pairs, each ended by a zero byte, in Login and Text PDUs (RFC 7143 6.1, 6.2).
//!
//! Pairs may span PDUs: all data segments up to one without the C bit form one text ([`Assembler`]), and a long text
//! goes out in several ([`Outgoing`]). What the keys mean is in [`crate::params`], [`crate::login`] and
//! [`crate::discovery`].

use std::fmt::Write as _;
use std::ops::RangeInclusive;

use base64::Engine as _;
use thiserror::Error;

/// Answer to a proposal that is refused: the key keeps its value.
pub const REJECT: &str = "Reject";
/// Answer to a proposal that other choices have made pointless.
pub const IRRELEVANT: &str = "Irrelevant";
/// Answer to an unknown key.
pub const NOT_UNDERSTOOD: &str = "NotUnderstood";
/// "No function" in lists.
pub const NONE: &str = "None";

/// Longest key-name (6.1, standard-label).
pub const MAX_KEY_BYTES: usize = 63;
/// Most bytes of one text that this side collects. The RFC asks for 8192, and more for authentication methods that
/// this crate does not have.
pub const MAX_TEXT_BYTES: usize = 16 * 1024;
/// Most pairs in one text. A login has about 30.
pub const MAX_PAIRS: usize = 256;
/// Longest name of an initiator or target (4.2.7.1).
pub const MAX_NAME_BYTES: usize = 223;

/// Why a text cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TextError {
    /// More than this side collects.
    #[error("text of more than {limit_bytes} bytes")]
    TooLong {
        /// The limit.
        limit_bytes: usize,
    },
    /// More pairs than any negotiation has.
    #[error("text of more than {max_pairs} key=value pairs")]
    TooManyPairs {
        /// The limit.
        max_pairs: usize,
    },
    /// The last pair has no zero byte at its end.
    #[error("text does not end with a zero byte")]
    Unterminated,
    /// Not UTF-8.
    #[error("text is not UTF-8")]
    NotUtf8,
    /// No `=` between two zero bytes.
    #[error("`{}` is not a key=value pair", .0.escape_debug())]
    NotAPair(String),
    /// A key with characters, or of a length, that a key must not have.
    #[error("`{}` is not a key name", .0.escape_debug())]
    BadKey(String),
}

/// Reads a whole text. Empty pairs are skipped: some senders pad with zero bytes inside the data segment.
///
/// # Errors
/// The text breaks the format of 6.1.
pub fn parse(text: &[u8]) -> Result<Vec<(&str, &str)>, TextError> {
    parse_up_to(text, MAX_PAIRS)
}

/// Like [`parse`], with another limit on the number of pairs.
///
/// # Errors
/// The text breaks the format of 6.1.
pub fn parse_up_to(text: &[u8], max_pairs: usize) -> Result<Vec<(&str, &str)>, TextError> {
    let text = std::str::from_utf8(text).map_err(|_| TextError::NotUtf8)?;
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let text = text.strip_suffix('\0').ok_or(TextError::Unterminated)?;
    let mut pairs = Vec::new();
    for pair in text.split('\0').filter(|pair| !pair.is_empty()) {
        let shorten = |text: &str| text.chars().take(MAX_KEY_BYTES).collect();
        let (key, value) = pair.split_once('=').ok_or_else(|| TextError::NotAPair(shorten(pair)))?;
        if !is_key(key) {
            return Err(TextError::BadKey(shorten(key)));
        }
        if pairs.len() == max_pairs {
            return Err(TextError::TooManyPairs { max_pairs });
        }
        pairs.push((key, value));
    }
    Ok(pairs)
}

/// Whether this is a key-name: a standard-label, but for `X#` and the lower-case start of `iSCSIProtocolLevel`, which
/// other documents have allowed since.
#[must_use]
pub fn is_key(key: &str) -> bool {
    key.starts_with(|c: char| c.is_ascii_alphabetic())
        && key.len() <= MAX_KEY_BYTES
        && key.bytes().all(|b| b.is_ascii_alphanumeric() || b".-+@_#".contains(&b))
}

/// Collects the data segments of one text.
#[derive(Clone, Debug)]
pub struct Assembler {
    text: Vec<u8>,
    limit_bytes: usize,
    complete: bool,
}

impl Assembler {
    /// Collects up to `limit_bytes`.
    #[must_use]
    pub const fn new(limit_bytes: usize) -> Self {
        Self { text: Vec::new(), limit_bytes, complete: false }
    }

    /// Takes the next data segment; `continues` is the PDU's C bit. Returns the whole text with the last one; the
    /// segment after that starts a new text.
    ///
    /// # Errors
    /// The text exceeds the limit.
    pub fn push(&mut self, segment: &[u8], continues: bool) -> Result<Option<&[u8]>, TextError> {
        if std::mem::take(&mut self.complete) {
            self.text.clear();
        }
        if self.text.len() + segment.len() > self.limit_bytes {
            return Err(TextError::TooLong { limit_bytes: self.limit_bytes });
        }
        self.text.extend_from_slice(segment);
        self.complete = !continues;
        Ok(self.complete.then_some(&*self.text))
    }

    /// Whether a text is under way: the last segment had the C bit.
    #[must_use]
    pub const fn is_partial(&self) -> bool {
        !self.text.is_empty() && !self.complete
    }
}

impl Default for Assembler {
    fn default() -> Self {
        Self::new(MAX_TEXT_BYTES)
    }
}

/// A text to be sent, in as many data segments as it takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outgoing {
    text: Vec<u8>,
    sent: usize,
}

impl Outgoing {
    /// Nothing to send.
    #[must_use]
    pub const fn new() -> Self {
        Self { text: Vec::new(), sent: 0 }
    }

    /// Adds a pair. Neither part has a zero byte, and the key has no `=`; pairs that do are left out.
    pub fn push(&mut self, key: &str, value: &str) {
        debug_assert!(is_key(key) && !value.contains('\0'));
        if is_key(key) && !value.contains('\0') {
            self.text.extend_from_slice(key.as_bytes());
            self.text.push(b'=');
            self.text.extend_from_slice(value.as_bytes());
            self.text.push(0);
        }
    }

    /// Adds a pair whose value is a number.
    pub fn push_number(&mut self, key: &str, value: u64) {
        self.push(key, &value.to_string());
    }

    /// Adds a pair whose value is a boolean.
    pub fn push_bool(&mut self, key: &str, value: bool) {
        self.push(key, if value { "Yes" } else { "No" });
    }

    /// Whether everything was taken by [`next_segment`](Self::next_segment).
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.sent == self.text.len()
    }

    /// Bytes still to be sent.
    #[must_use]
    pub const fn len_bytes(&self) -> usize {
        self.text.len() - self.sent
    }

    /// The next data segment, of up to `limit_bytes` (at least 1), and whether more follow (the C bit).
    pub fn next_segment(&mut self, limit_bytes: usize) -> (Vec<u8>, bool) {
        let end = self.text.len().min(self.sent + limit_bytes.max(1));
        let segment = self.text[self.sent..end].to_vec();
        self.sent = end;
        if self.is_empty() {
            *self = Self::new();
            return (segment, false);
        }
        (segment, true)
    }
}

/// Reads a boolean-value.
#[must_use]
pub fn parse_bool(value: &str) -> Option<bool> {
    match value {
        "Yes" => Some(true),
        "No" => Some(false),
        _ => None,
    }
}

/// Reads a numerical-value: decimal without leading zeroes, or hexadecimal after `0x`.
#[must_use]
pub fn parse_number(value: &str) -> Option<u64> {
    if let Some(hex) = strip_radix(value, 'x') {
        // `from_str_radix` would take a sign.
        return hex.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u64::from_str_radix(hex, 16).ok())?;
    }
    let plain = value.bytes().all(|b| b.is_ascii_digit()) && (value == "0" || !value.starts_with('0'));
    plain.then(|| value.parse().ok())?
}

/// Reads a numerical-value in a range.
#[must_use]
pub fn parse_number_in(value: &str, range: &RangeInclusive<u64>) -> Option<u64> {
    parse_number(value).filter(|number| range.contains(number))
}

/// Why a binary-value cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BinaryError {
    /// Neither hexadecimal after `0x` nor base64 after `0b`.
    #[error("not a hexadecimal or base64 constant")]
    Encoding,
    /// More bytes than allowed.
    #[error("binary value of more than {limit_bytes} bytes")]
    TooLong {
        /// The limit.
        limit_bytes: usize,
    },
}

/// Reads a binary-value whose length is what its encoding implies: hexadecimal (an odd number of digits has an
/// implied zero in front) or base64.
///
/// # Errors
/// The encoding is neither, or there are more than `limit_bytes`.
pub fn parse_binary(value: &str, limit_bytes: usize) -> Result<Vec<u8>, BinaryError> {
    let too_long = BinaryError::TooLong { limit_bytes };
    let bytes = if let Some(hex) = strip_radix(value, 'x') {
        if hex.len().div_ceil(2) > limit_bytes {
            return Err(too_long);
        }
        let digits = hex.bytes().map(|b| char::from(b).to_digit(16).map(|digit| digit as u8));
        let padded = std::iter::repeat_n(Some(0), hex.len() % 2).chain(digits);
        let digits: Vec<u8> = padded.collect::<Option<_>>().ok_or(BinaryError::Encoding)?;
        digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    } else if let Some(base64) = strip_radix(value, 'b') {
        if base64.len() / 4 * 3 > limit_bytes + 2 {
            return Err(too_long);
        }
        base64::engine::general_purpose::STANDARD.decode(base64).map_err(|_| BinaryError::Encoding)?
    } else {
        return Err(BinaryError::Encoding);
    };
    match bytes.len() {
        0 => Err(BinaryError::Encoding),
        len if len > limit_bytes => Err(too_long),
        _ => Ok(bytes),
    }
}

/// Writes a binary-value in hexadecimal, which every implementation reads.
#[must_use]
pub fn binary_hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::from("0x"), |mut out, byte| {
        // Writing to a String does not fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// Writes a binary-value in base64.
#[must_use]
pub fn binary_base64(bytes: &[u8]) -> String {
    let mut out = String::from("0b");
    base64::engine::general_purpose::STANDARD.encode_string(bytes, &mut out);
    out
}

fn strip_radix(value: &str, radix: char) -> Option<&str> {
    let rest = value.strip_prefix('0')?;
    let rest = rest.strip_prefix(radix).or_else(|| rest.strip_prefix(radix.to_ascii_uppercase()))?;
    (!rest.is_empty()).then_some(rest)
}

/// Whether this can be the name of an initiator or target (4.2.7): `iqn.`, `eui.` or `naa.`, and of the characters
/// that string preparation (RFC 3722) lets through for ASCII; others are taken as they come.
#[must_use]
pub fn is_iscsi_name(name: &str) -> bool {
    let plain = |c: char| !c.is_ascii() || c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | ':' | '_');
    let hex = |digits: &str, lengths: &[usize]| {
        lengths.contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit())
    };
    name.len() <= MAX_NAME_BYTES
        && match name.split_once('.') {
            Some(("iqn", rest)) => !rest.is_empty() && rest.chars().all(|c| plain(c) && !c.is_control()),
            Some(("eui", rest)) => hex(rest, &[16]),
            Some(("naa", rest)) => hex(rest, &[16, 32]),
            _ => false,
        }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pairs_survive_any_segmentation(pairs in vec(("[A-Za-z][A-Za-z0-9.#_@+-]{0,62}", "[^\0]{0,40}"), 0..20), limit in 1usize..300) {
            let mut out = Outgoing::new();
            for (key, value) in &pairs {
                out.push(key, value);
            }
            let mut assembler = Assembler::default();
            let text = loop {
                let (segment, continues) = out.next_segment(limit);
                prop_assert!(segment.len() <= limit);
                let text = assembler.push(&segment, continues).unwrap();
                prop_assert_eq!(text.is_some(), !continues);
                if let Some(text) = text {
                    break text.to_vec();
                }
                prop_assert!(assembler.is_partial());
            };
            prop_assert!(out.is_empty());
            let expected: Vec<(&str, &str)> = pairs.iter().map(|(key, value)| (&**key, &**value)).collect();
            prop_assert_eq!(parse(&text).unwrap(), expected);
        }

        #[test]
        fn arbitrary_text_never_panics(text in vec(prop_oneof![Just(0u8), Just(b'='), any::<u8>(), b'A'..=b'Z'], 0..600)) {
            if let Ok(pairs) = parse(&text) {
                prop_assert!(pairs.iter().all(|(key, value)| is_key(key) && !value.contains('\0')));
            }
        }

        #[test]
        fn binary_values_round_trip(bytes in vec(any::<u8>(), 1..1025)) {
            prop_assert_eq!(parse_binary(&binary_hex(&bytes), 1024), Ok(bytes.clone()));
            prop_assert_eq!(parse_binary(&binary_base64(&bytes), 1024), Ok(bytes.clone()));
            let limit_bytes = bytes.len() - 1;
            prop_assert_eq!(parse_binary(&binary_hex(&bytes), limit_bytes), Err(BinaryError::TooLong { limit_bytes }));
            prop_assert_eq!(parse_binary(&binary_base64(&bytes), limit_bytes), Err(BinaryError::TooLong { limit_bytes }));
        }

        #[test]
        fn arbitrary_values_never_panic(value in "(0[xXbB])?.{0,80}") {
            let _ = parse_number(&value);
            let _ = parse_binary(&value, 16);
            let _ = is_iscsi_name(&value);
        }

        #[test]
        fn numbers_round_trip(number in any::<u64>()) {
            prop_assert_eq!(parse_number(&number.to_string()), Some(number));
            prop_assert_eq!(parse_number(&format!("{number:#x}")), Some(number));
            prop_assert_eq!(parse_number(&format!("0X{number:X}")), Some(number));
        }
    }

    #[test]
    fn number_forms() {
        for bad in ["", "0x", "-1", "+1", "0x-1", "0x+1", "01", "1 ", "0b1", "18446744073709551616", "0x1g"] {
            assert_eq!(parse_number(bad), None, "{bad:?}");
        }
        assert_eq!(parse_number_in("512", &(512..=1024)), Some(512));
        assert_eq!(parse_number_in("511", &(512..=1024)), None);
    }

    #[test]
    fn binary_forms() {
        assert_eq!(parse_binary("0x123", 8).unwrap(), [0x01, 0x23]);
        assert_eq!(parse_binary("0bAQID", 8).unwrap(), [1, 2, 3]);
        for bad in ["", "0x", "0b", "12", "0xzz", "0b!", "0bAQI", "0x1é"] {
            assert_eq!(parse_binary(bad, 8), Err(BinaryError::Encoding), "{bad:?}");
        }
    }

    #[test]
    fn malformed_texts() {
        assert_eq!(parse(b"A=1\0\0\0").unwrap(), [("A", "1")]);
        assert_eq!(parse(b"A=b=c\0").unwrap(), [("A", "b=c")]);
        assert_eq!(parse(b"A=1"), Err(TextError::Unterminated));
        assert_eq!(parse(b"A\0"), Err(TextError::NotAPair("A".into())));
        assert_eq!(parse(b"=1\0"), Err(TextError::BadKey(String::new())));
        assert_eq!(parse(b"A \n=1\0"), Err(TextError::BadKey("A \n".into())));
        assert_eq!(parse(b"A=\xff\0"), Err(TextError::NotUtf8));
        assert_eq!(
            parse(&b"A=\0".repeat(MAX_PAIRS + 1)),
            Err(TextError::TooManyPairs { max_pairs: MAX_PAIRS })
        );
        let mut assembler = Assembler::new(4);
        assert_eq!(assembler.push(b"A=1", true), Ok(None));
        assert_eq!(assembler.push(b"\0B", true), Err(TextError::TooLong { limit_bytes: 4 }));
    }

    #[test]
    fn names() {
        assert!(is_iscsi_name("iqn.2026-11.example.vcp:disk-1"));
        assert!(is_iscsi_name("eui.020000023B040506"));
        assert!(is_iscsi_name("naa.62004567BA64678D0123456789ABCDEF"));
        for bad in ["", "iqn.", "disk", "eui.02", "iqn.a b", "naa.6200", "iqn.a\n"] {
            assert!(!is_iscsi_name(bad), "{bad:?}");
        }
    }
}
