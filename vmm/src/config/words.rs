//! Specifications on the command line: words and `key=value` pairs with commas. A wrong key is answered with the nearest
//! right one, here and for TOML files.

/// One part of a specification: the key, and the value if there is a `=`.
pub(super) type Part<'a> = (&'a str, Option<&'a str>);

/// The parts of a specification.
pub(super) fn parts(text: &str) -> impl Iterator<Item = Part<'_>> {
    text.split(',').map(|part| part.split_once('=').map_or((part, None), |(key, value)| (key, Some(value))))
}

/// Reads a number.
pub(super) fn number<T: std::str::FromStr>(key: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("{key}={value:?} is not a number in range"))
}

/// Reads a yes or a no.
pub(super) fn switch(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" | "yes" | "true" => Ok(true),
        "off" | "no" | "false" => Ok(false),
        _ => Err(format!("{key}={value:?} is neither yes nor no")),
    }
}

/// Says what is wrong with a part that is none of `keys`, or one of them in a wrong way.
pub(super) fn wrong_key(what: &str, (key, value): Part<'_>, keys: &[&str]) -> String {
    if keys.contains(&key) {
        return match value {
            Some(v) if !v.is_empty() => format!("{what} option {key:?} takes no value"),
            _ => format!("{what} option {key:?} needs a value: {key}=..."),
        };
    }
    if key.starts_with("iscsi://") {
        return format!("write {what} url=iscsi://...");
    }
    if key.len() > 16 || !key.chars().all(|c| c.is_ascii_lowercase() || c == '-') {
        // Not repeated: it may be the rest of a URL with a secret in it.
        return format!(
            "{what} has something that is no option after a comma (a comma in a URL is written %2C): options are {}",
            keys.join(", ")
        );
    }
    match nearest(key, keys) {
        Some(near) => format!("unknown {what} option {key:?}: did you mean {near:?}?"),
        None => format!("unknown {what} option {key:?}: there are {}", keys.join(", ")),
    }
}

/// Which of `keys` was probably meant, if one is near enough.
pub(super) fn nearest<'a>(key: &str, keys: &[&'a str]) -> Option<&'a str> {
    let near = keys.iter().min_by_key(|k| distance(key, k))?;
    (distance(key, near) <= 3.min(near.len() / 2 + 1)).then_some(near)
}

/// Optimal string alignment distance (an exchange of neighbours counts once), for suggestions only.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let exchange = usize::from(a[i - 1] != b[j - 1]);
            let mut least = (above[j] + 1).min(row[j - 1] + 1).min(above[j - 1] + exchange);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(before[j - 2] + 1);
            }
            row.push(least);
        }
        before = std::mem::replace(&mut above, row);
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, expected) in [
            ("", "", 0),
            ("abc", "abc", 0),
            ("socket", "sokcet", 1),
            ("cpu", "cpus", 1),
            ("", "abc", 3),
            ("mac", "tap", 2),
        ] {
            assert_eq!(distance(a, b), expected, "{a} {b}");
            assert_eq!(distance(b, a), expected, "{b} {a}");
        }
    }

    #[test]
    fn only_what_is_near_is_suggested() {
        let keys = ["socket", "mac", "cpu"];
        assert_eq!(nearest("sockets", &keys), Some("socket"));
        assert_eq!(nearest("zzz", &keys), None);
        assert_eq!(nearest("x", &[]), None);
    }
}
