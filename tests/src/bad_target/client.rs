//! The tests' handle on the process.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use super::IQN;
use super::fields::{Field, hex};
use crate::proc::{Cmd, Proc, Stream};
use crate::{Result, tool};

/// How long anything may take.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Something that the target wrote down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Number of the connection, from 0.
    pub conn: usize,
    /// When.
    pub at: Duration,
    /// `in`, `out` or `event`.
    pub way: String,
    /// Of a command its name (`read`), of another PDU from the initiator `nop-out`, `tmf`, `data-out`, `login` or
    /// `logout`, of one from the target its opcode (`DataIn`), else the event: `connect`, `full-feature`, `fin`, ...
    pub label: String,
    /// Header of a PDU.
    pub header: Option<[u8; 48]>,
}

impl Entry {
    fn parse(line: &str) -> Result<Self> {
        let words: Vec<&str> = line.split(' ').collect();
        let [conn, at, way, label, header] = words[..] else { bail!("not a note: {line:?}") };
        let header = match header {
            "-" => None,
            text => Some(hex(text)?.try_into().ok().context("not a header")?),
        };
        Ok(Self {
            conn: conn.parse()?,
            at: Duration::from_micros(at.parse()?),
            way: way.into(),
            label: label.into(),
            header,
        })
    }

    /// A field of the header, by its name in [`super::fields`]; `None` for what is no PDU.
    pub fn field(&self, name: &str) -> Result<u64> {
        let header = self.header.as_ref().with_context(|| format!("{} has no header", self.label))?;
        Ok(Field::parse(name)?.get(header))
    }

    /// Bytes of the header from `at` on, as a number.
    pub fn number(&self, at: usize, len: usize) -> u64 {
        self.header.as_ref().map_or(0, |header| Field { at, len }.get(header))
    }
}

/// A running `bad-target`.
#[derive(Debug)]
pub struct BadTarget {
    proc: Proc,
    portal: SocketAddr,
    control: Mutex<BufReader<TcpStream>>,
}

impl BadTarget {
    /// Starts one with a script.
    pub fn start(script: &str) -> Result<Self> {
        let proc = Cmd::new(tool::ours("bad-target")?).arg("--script").arg(script).spawn()?;
        let line = proc.wait_line(Stream::Out, "ready:", DEADLINE)?;
        let address = |key: &str| -> Result<SocketAddr> {
            let word = line.split(' ').find_map(|word| word.strip_prefix(key)).context("no address")?;
            Ok(word.parse()?)
        };
        let stream = TcpStream::connect(address("control=")?)?;
        stream.set_read_timeout(Some(DEADLINE * 2))?;
        stream.set_nodelay(true)?;
        Ok(Self { portal: address("portal=")?, control: Mutex::new(BufReader::new(stream)), proc })
    }

    /// Where it listens.
    pub fn portal(&self) -> SocketAddr {
        self.portal
    }

    /// The URL of its unit.
    pub fn url(&self) -> String {
        self.url_of(0)
    }

    /// The URL of a unit.
    pub fn url_of(&self, lun: u64) -> String {
        format!("iscsi://{}/{IQN}/{lun}", self.portal)
    }

    /// The process.
    pub fn proc(&self) -> &Proc {
        &self.proc
    }

    fn ask(&self, line: &str, many: bool) -> Result<Vec<String>> {
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        control.get_mut().write_all(format!("{line}\n").as_bytes())?;
        let mut lines = Vec::new();
        loop {
            let mut text = String::new();
            ensure!(control.read_line(&mut text)? > 0, "bad-target is gone: {}", self.proc.tail());
            let text = text.trim_end().to_owned();
            if text.starts_with("error:") {
                bail!("bad-target: {line:?}: {text}");
            }
            if many && text == "end" {
                return Ok(lines);
            }
            lines.push(text);
            if !many {
                return Ok(lines);
            }
        }
    }

    /// Gives it lines of a script.
    pub fn script(&self, lines: &str) -> Result<()> {
        lines
            .lines()
            .filter(|line| !line.trim().is_empty())
            .try_for_each(|line| self.ask(line, false).map(|_| ()))
    }

    /// Has it do something at once, see [`super::control`].
    pub fn now(&self, action: &str) -> Result<()> {
        self.ask(&format!("now {action}"), false).map(|_| ())
    }

    /// Waits until it has written down so many of these.
    pub fn wait(&self, way: &str, label: &str, count: usize) -> Result<()> {
        let answer = self.ask(&format!("wait {way} {label} {count} {}", DEADLINE.as_millis()), false)?;
        ensure!(answer == ["ok"], "bad-target did not see {count} x {way} {label}:\n{}", self.story()?);
        Ok(())
    }

    /// What it wrote down.
    pub fn log(&self) -> Result<Vec<Entry>> {
        self.ask("log", true)?.iter().map(|line| Entry::parse(line)).collect()
    }

    /// The notes of one kind.
    pub fn seen(&self, way: &str, label: &str) -> Result<Vec<Entry>> {
        Ok(self.log()?.into_iter().filter(|e| e.way == way && e.label == label).collect())
    }

    /// How many of them.
    pub fn count(&self, way: &str, label: &str) -> Result<usize> {
        Ok(self.seen(way, label)?.len())
    }

    /// Drops the PDUs that it wrote down so far.
    pub fn forget(&self) -> Result<()> {
        self.ask("forget", false).map(|_| ())
    }

    /// The end of what happened, in short.
    pub fn story(&self) -> Result<String> {
        let log = self.log()?;
        let line = |e: &Entry| format!("  {} {:>9} us {} {}\n", e.conn, e.at.as_micros(), e.way, e.label);
        Ok(log[log.len().saturating_sub(40)..].iter().map(line).collect())
    }

    /// Fails if the initiator broke a rule.
    pub fn judge(&self) -> Result<()> {
        let breaches = self.ask("breaches", true)?;
        ensure!(
            breaches.is_empty(),
            "the initiator broke rules:\n{}\n{}",
            breaches.join("\n"),
            self.story()?
        );
        Ok(())
    }
}
