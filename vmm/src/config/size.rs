//! Sizes and CPU lists as people write them.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::placement::topology::{parse_list, ranges};

/// A size in bytes. In TOML and JSON it is a text with a unit, or a number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse(text).map(Self)
    }
}

impl fmt::Display for Size {
    /// With the largest unit of which it is a multiple.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
        match units.into_iter().find(|(shift, _)| self.0 != 0 && self.0.is_multiple_of(1 << shift)) {
            Some((shift, unit)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl de::Visitor<'_> for Either {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"512M\", or a number of bytes")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
                let wrong = || E::invalid_value(de::Unexpected::Signed(bytes), &self);
                u64::try_from(bytes).map(Size).map_err(|_| wrong())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// Host CPUs: sorted, no doubles, not empty. In TOML and JSON it is a text such as `0,2-3`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuList(pub Vec<usize>);

impl std::str::FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse_cpus(text).map(Self)
    }
}

impl TryFrom<String> for CpuList {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<CpuList> for String {
    fn from(list: CpuList) -> Self {
        list.to_string()
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&ranges(&self.0))
    }
}

/// Reads a size: a number with an optional K, M, G or T (powers of 1024). Without a letter it is bytes.
///
/// ```
/// assert_eq!(vmm::config::size::parse("512M"), Ok(512 << 20));
/// assert!(vmm::config::size::parse("12Q").is_err());
/// ```
pub fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let wrong = || format!("{text:?} is not a size: write a number with K, M, G or T, e.g. 512M");
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let shift = match unit.trim_end_matches("iB").trim_end_matches('B') {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

/// Reads a list of CPUs: numbers and ranges with commas, e.g. `0,2-3`. The result is sorted and has no doubles.
pub fn parse_cpus(text: &str) -> Result<Vec<usize>, String> {
    let cpus = parse_list(text).filter(|cpus| cpus.last().is_some_and(|last| *last < MAX_CPU));
    let cpus =
        cpus.ok_or_else(|| format!("{text:?} is not a list of CPUs: write numbers and ranges, e.g. 0,2-3"))?;
    Ok(cpus.into_iter().collect())
}

/// CPU numbers are below this: what a `cpu_set_t` can name.
pub const MAX_CPU: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_take_units() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("2G"), Ok(2 << 30));
        assert_eq!(parse("1MiB"), Ok(1 << 20));
    }

    #[test]
    fn sizes_refuse_nonsense() {
        for bad in ["", "M", "-1", "1.5G", "99999999999T", "5 apples"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_printed_is_read_again() {
        for text in ["0", "1K", "512M", "3G", "1T", "1025"] {
            let size: Size = text.parse().unwrap();
            assert_eq!(size.to_string(), text);
        }
        for text in ["0", "0-1", "0,2-3,7", "1023"] {
            assert_eq!(text.parse::<CpuList>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpus("0,2-3,2"), Ok(vec![0, 2, 3]));
        for bad in ["", "a", "3-1", "1-", "0-99999999"] {
            assert!(parse_cpus(bad).is_err(), "{bad}");
        }
    }
}
