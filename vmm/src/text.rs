//! Numbers and tables as people read them.

use std::fmt;

/// Bytes with a unit (powers of 1024) and three digits.
pub fn bytes(bytes: u64) -> String {
    scaled(bytes as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

/// A count, shortened from 100 000 on (powers of 1000).
pub fn count(count: u64) -> String {
    if count < 100_000 {
        count.to_string()
    } else {
        scaled(count as f64, 1000.0, &["", "k", "M", "G", "T", "P"])
    }
}

/// A rate per second.
pub fn rate(per_s: f64) -> String {
    if !per_s.is_finite() || per_s < 0.0 {
        return "-".into();
    }
    if per_s < 99_999.5 { format!("{per_s:.0}") } else { scaled(per_s, 1000.0, &["", "k", "M", "G"]) }
}

/// A duration of nanoseconds.
pub fn duration(ns: u64) -> String {
    let s = ns / 1_000_000_000;
    match s {
        0 => match ns {
            0..1_000 => format!("{ns} ns"),
            1_000..1_000_000 => scaled(ns as f64 / 1e3, 1000.0, &["us"]),
            _ => scaled(ns as f64 / 1e6, 1000.0, &["ms"]),
        },
        1..100 => format!("{:.1} s", ns as f64 / 1e9),
        100..6_000 => format!("{} min", s / 60),
        6_000..345_600 => format!("{} h", s / 3600),
        _ => format!("{} d", s / 86_400),
    }
}

/// A part of a whole.
pub fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".into() } else { format!("{:.1}%", part as f64 * 100.0 / whole as f64) }
}

fn scaled(mut value: f64, step: f64, units: &[&str]) -> String {
    let mut at = 0;
    while value >= step * 0.9995 && at + 1 < units.len() {
        value /= step;
        at += 1;
    }
    let unit = units[at];
    let space = if unit.len() > 1 || unit == "B" { " " } else { "" };
    let digits = match value {
        _ if value.fract() == 0.0 => 0,
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$}{space}{unit}")
}

/// A sentence in lines of at most 80 columns, from the second on indented, each with its end.
pub fn sentence(text: &str) -> String {
    let options = textwrap::Options::new(80).subsequent_indent("    ");
    let mut lines = textwrap::wrap(text, options).join("\n");
    lines.push('\n');
    lines
}

/// Columns as wide as what is in them, two spaces between; the first one is left-aligned, the others right.
#[derive(Clone, Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
    left: Vec<usize>,
}

impl Table {
    /// A table with these headers.
    pub fn new(headers: &[&str]) -> Self {
        Self { rows: vec![headers.iter().map(ToString::to_string).collect()], left: vec![0] }
    }

    /// These columns are left-aligned, too.
    #[must_use]
    pub fn left(mut self, columns: &[usize]) -> Self {
        self.left.extend(columns);
        self
    }

    /// One more row. The last cell of a row that has fewer than the headers may be wider than its column.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.first().map_or(0, Vec::len);
        let mut widths = vec![0; columns];
        for row in self.rows.iter().filter(|row| row.len() == columns) {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        for row in &self.rows {
            let mut line = String::new();
            for (at, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let pad = " ".repeat(width.saturating_sub(cell.chars().count()));
                let gap = if at == 0 { "" } else { "  " };
                let cell = if self.left.contains(&at) {
                    format!("{gap}{cell}{pad}")
                } else {
                    format!("{gap}{pad}{cell}")
                };
                line.push_str(&cell);
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_keep_to_80_columns() {
        let path = "/a".repeat(60);
        let text = format!("disk0, not confined: {} {path}", "why that is so, in words; ".repeat(8));
        let lines = sentence(&text);
        assert!(lines.ends_with('\n') && lines.lines().all(|line| line.chars().count() <= 80), "{lines}");
        assert_eq!(lines.split_whitespace().collect::<String>(), text.replace(' ', ""));
        assert_eq!(sentence("short"), "short\n");
    }

    #[test]
    fn numbers_have_three_digits_and_a_unit() {
        for (number, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (4096, "4 KiB"),
            (1 << 20, "1 MiB"),
            (12_500_000, "11.9 MiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(bytes(number), expected);
        }
        assert_eq!((count(99_999), count(1_234_567)), ("99999".into(), "1.23M".into()));
        assert_eq!((rate(0.4), rate(123_456.0), rate(f64::NAN)), ("0".into(), "123k".into(), "-".into()));
        for (ns, expected) in [
            (999, "999 ns"),
            (1_500, "1.50 us"),
            (16_384, "16.4 us"),
            (2_000_000, "2 ms"),
            (1_500_000_000, "1.5 s"),
            (7_200_000_000_000, "2 h"),
        ] {
            assert_eq!(duration(ns), expected);
        }
        assert_eq!((percent(1, 3), percent(1, 0)), ("33.3%".into(), "-".into()));
    }

    #[test]
    fn tables_are_aligned() {
        let mut table = Table::new(&["name", "n", "where"]).left(&[2]);
        table.row(["a".into(), "10".into(), "x".into()]);
        table.row(["long".into(), "something else".into()]);
        assert_eq!(table.to_string(), "name   n  where\na     10  x\nlong  something else\n");
    }
}
