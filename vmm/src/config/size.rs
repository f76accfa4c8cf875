//! Sizes and CPU lists as people write them.

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
    let wrong = || format!("{text:?} is not a list of CPUs: write numbers and ranges, e.g. 0,2-3");
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.trim().parse().map_err(|_| wrong())?;
        let last: usize = last.trim().parse().map_err(|_| wrong())?;
        if first > last || last >= MAX_CPU {
            return Err(wrong());
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    cpus.dedup();
    Ok(cpus)
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
    fn cpu_lists() {
        assert_eq!(parse_cpus("0,2-3,2"), Ok(vec![0, 2, 3]));
        for bad in ["", "a", "3-1", "1-", "0-99999999"] {
            assert!(parse_cpus(bad).is_err(), "{bad}");
        }
    }
}
