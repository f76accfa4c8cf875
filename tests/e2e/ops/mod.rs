//! What users run a VCP with: limits, metrics, captures, commands, conventions; and what nobody must see.

mod conventions;
mod limits;
mod metrics;
mod recorder;
mod secrets;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use vcp_tests::Result;
use vcp_tests::backend::{START, serve};
use vcp_tests::front::Driver;
use vcp_tests::proc::{Proc, Stream};

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(20);

/// A `vcp-iscsi serve` with everything that people look at.
struct Server {
    proc: Proc,
    dir: tempfile::TempDir,
}

impl Server {
    fn start(url: &str, args: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("vcp-ops-").tempdir()?;
        let proc = serve(&dir.path().join("blk.sock"))?
            .env("NO_COLOR", "1")
            .arg("--control")
            .arg(dir.path().join("ctl.sock"))
            .arg(format!("--metrics=unix:{}", dir.path().join("metrics.sock").display()))
            .arg("--recorder-dir")
            .arg(dir.path().join("captures"))
            .args(args)
            .arg(url)
            .spawn()?;
        proc.wait_line(Stream::Out, "ready:", START)?;
        Ok(Self { proc, dir })
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("blk.sock")
    }

    fn driver(&self) -> Result<Driver> {
        Driver::connect(&self.socket(), 1)
    }

    /// Sends a command and demands that it is answered with `ok`.
    fn ask(&self, request: &Value) -> Result<Value> {
        let answer = self.try_ask(request)?;
        ensure!(answer["ok"] == true, "{request}: {answer}");
        Ok(answer)
    }

    fn try_ask(&self, request: &Value) -> Result<Value> {
        let mut stream = UnixStream::connect(self.dir.path().join("ctl.sock"))?;
        stream.set_read_timeout(Some(ANSWER))?;
        writeln!(stream, "{request}")?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("{request}: {line:?}"))
    }

    /// Status of the only device.
    fn status(&self) -> Result<Value> {
        Ok(self.ask(&json!({"cmd": "status"}))?["devices"][0]["status"].clone())
    }

    fn page(&self) -> Result<Page> {
        Page::parse(&get(&self.dir.path().join("metrics.sock"), "/metrics")?)
    }

    /// Waits until the page says something; returns it.
    fn page_that(&self, what: &str, holds: impl Fn(&Page) -> bool) -> Result<Page> {
        let end = Instant::now() + ANSWER;
        loop {
            let page = self.page()?;
            if holds(&page) {
                return Ok(page);
            }
            ensure!(Instant::now() < end, "{what} does not become true: {}", self.proc.tail());
            std::thread::yield_now();
        }
    }

    /// The captures that are there, oldest first.
    fn captures(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(self.dir.path().join("captures"))? {
            let path = entry?.path();
            files.extend((path.extension().is_some_and(|it| it == "pcapng")).then_some(path));
        }
        files.sort();
        Ok(files)
    }

    /// Waits for a capture whose name has this word.
    fn capture_of(&self, word: &str) -> Result<PathBuf> {
        let end = Instant::now() + ANSWER;
        loop {
            let files = self.captures()?;
            if let Some(file) = files.iter().find(|file| file.to_string_lossy().contains(word)) {
                return Ok(file.clone());
            }
            ensure!(Instant::now() < end, "no capture of {word:?} among {files:?}: {}", self.proc.tail());
            std::thread::yield_now();
        }
    }
}

/// A page over HTTP and a Unix socket; its body.
fn get(socket: &Path, path: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no end of the head")?;
    ensure!(head.starts_with("HTTP/1.1 200 "), "{head}");
    ensure!(head.contains("Content-Type: application/openmetrics-text; version=1.0.0"), "{head}");
    ensure!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    Ok(body.to_owned())
}

/// A page of metrics, taken apart as strictly as Prometheus does it, and checked against its naming rules.
struct Page {
    /// `name{label="value",...}`, labels sorted, and the number.
    series: BTreeMap<String, f64>,
    /// Name and type of each family.
    families: BTreeMap<String, String>,
}

impl Page {
    fn parse(text: &str) -> Result<Self> {
        let mut page = Self { series: BTreeMap::new(), families: BTreeMap::new() };
        let (mut family, mut helped, mut over) = (String::new(), None, false);
        ensure!(text.ends_with('\n'), "the last line has no end");
        for line in text.lines() {
            ensure!(!over, "{line:?} behind the end");
            if line == "# EOF" {
                over = true;
            } else if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').context("HELP without text")?;
                ensure!(!help.is_empty(), "{line}");
                helped = Some(name.to_owned());
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').context("TYPE without a type")?;
                ensure!(helped.as_deref() == Some(name), "no HELP for {name}");
                ensure!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                // OpenMetrics: the suffixes are the samples', not the family's.
                ensure!(!name.ends_with("_total") && !name.ends_with("_count"), "{line}");
                let twice = page.families.insert(name.to_owned(), kind.to_owned());
                ensure!(twice.is_none(), "family {name} stands in two places");
                family = name.to_owned();
            } else if let Some(rest) = line.strip_prefix("# UNIT ") {
                let (name, unit) = rest.split_once(' ').context("UNIT without a unit")?;
                ensure!(name == family && name.ends_with(&format!("_{unit}")), "{line}");
                ensure!(["seconds", "bytes"].contains(&unit), "{line}: no base unit");
            } else {
                let (name, number) = sample(line).with_context(|| line.to_owned())?;
                let base = name.split('{').next().unwrap_or_default();
                let suffix = base.strip_prefix(&family).with_context(|| format!("{name} in {family}"))?;
                let allowed: &[&str] = match page.families[&family].as_str() {
                    "counter" => &["_total"],
                    "histogram" => &["_bucket", "_sum", "_count"],
                    _ => &[""],
                };
                ensure!(allowed.contains(&suffix), "{name} in a {}", page.families[&family]);
                ensure!(page.series.insert(name.clone(), number).is_none(), "{name} twice");
            }
        }
        ensure!(over, "no end");
        page.check_histograms()?;
        for name in page.families.keys() {
            let plain = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
            ensure!(plain && (name.starts_with("vcp_") || name.starts_with("process_")), "{name}");
            for other in ["_ns", "_ms", "_us", "_kb", "_kib", "_mib"] {
                ensure!(!name.ends_with(other), "{name} is not in a base unit");
            }
        }
        Ok(page)
    }

    /// Buckets grow, and the last one counts all.
    fn check_histograms(&self) -> Result<()> {
        let mut last: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
        for (name, number) in self.series.iter().filter(|(name, _)| name.contains("_bucket{")) {
            let (le, rest) = take_label(name, "le")?;
            let bound = if le == "+Inf" { f64::INFINITY } else { le.parse()? };
            last.entry(rest).or_default().push((bound, *number));
        }
        for (name, mut buckets) in last {
            buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
            ensure!(buckets.windows(2).all(|two| two[0].1 <= two[1].1), "{name}: {buckets:?}");
            let count = self.number(&name.replacen("_bucket", "_count", 1))?;
            ensure!(buckets.last() == Some(&(f64::INFINITY, count)), "{name}: {buckets:?}, {count} in all");
        }
        Ok(())
    }

    fn number(&self, series: &str) -> Result<f64> {
        self.series.get(series).copied().with_context(|| format!("no {series} on the page"))
    }

    /// The only device's number, with further labels.
    fn disk(&self, name: &str, labels: &str) -> Result<f64> {
        let mut all: Vec<&str> = labels.split(',').filter(|label| !label.is_empty()).collect();
        all.push("device=\"disk0\"");
        all.sort_unstable();
        self.number(&format!("{name}{{{}}}", all.join(",")))
    }
}

/// One line: the name with sorted labels, and the number.
fn sample(line: &str) -> Result<(String, f64)> {
    let (series, number) = line.rsplit_once(' ').context("no number")?;
    let number = number.parse().context("no number")?;
    let Some((name, labels)) = series.split_once('{') else { return Ok((series.to_owned(), number)) };
    let mut rest = labels.strip_suffix('}').context("no end of the labels")?;
    let mut pairs = Vec::new();
    while !rest.is_empty() {
        let (label, quoted) = rest.split_once("=\"").context("no value of a label")?;
        ensure!(label.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "label {label:?}");
        let mut escaped = false;
        let end = quoted.char_indices().find(|&(_, c)| {
            let end = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            end
        });
        let (end, _) = end.context("no end of a label")?;
        pairs.push(format!("{label}=\"{}\"", &quoted[..end]));
        rest = &quoted[end + 1..];
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
    pairs.sort_unstable();
    Ok((format!("{name}{{{}}}", pairs.join(",")), number))
}

/// A label's value, and the series without it.
fn take_label(series: &str, label: &str) -> Result<(String, String)> {
    let (name, labels) = series.split_once('{').context("no labels")?;
    let labels = labels.trim_end_matches('}');
    let prefix = format!("{label}=\"");
    let mut value = None;
    let rest: Vec<&str> = labels
        .split(',')
        .filter(|pair| match pair.strip_prefix(&prefix) {
            Some(found) => {
                value = Some(found.trim_end_matches('"').to_owned());
                false
            }
            None => true,
        })
        .collect();
    let Some(value) = value else { bail!("no {label} in {series}") };
    Ok((value, format!("{name}{{{}}}", rest.join(","))))
}
