//! `vcp-net serve` with two ports, as a process, and what its control socket says.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::Result;
use crate::proc::{Cmd, Proc, Stream};
use crate::tool;

const START: Duration = Duration::from_secs(20);
const ANSWER: Duration = Duration::from_secs(20);

/// See the module.
#[derive(Debug)]
pub struct Switch {
    proc: Proc,
    dir: TempDir,
    args: Vec<OsString>,
}

impl Switch {
    /// Starts one with two ports (their sockets are `p0` and `p1` in its directory) with these options, with a comma in
    /// front, and further arguments.
    pub fn start(ports: [&str; 2], args: &[&str]) -> Result<Self> {
        Self::start_with("socket", &ports, args)
    }

    /// As [`start`](Self::start), with front ends that listen.
    pub fn start_dialing(ports: [&str; 2], args: &[&str]) -> Result<Self> {
        Self::start_with("connect", &ports, args)
    }

    /// As [`start`](Self::start), with any number of ports.
    pub fn start_ports(ports: &[&str], args: &[&str]) -> Result<Self> {
        Self::start_with("socket", ports, args)
    }

    fn start_with(key: &str, ports: &[&str], args: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("vcp-net-").tempdir()?;
        let mut all: Vec<OsString> = vec!["serve".into()];
        for (at, options) in ports.iter().enumerate() {
            let path = dir.path().join(format!("p{at}"));
            all.extend(["--port".into(), format!("{key}={},name=p{at}{options}", path.display()).into()]);
        }
        all.extend(["--control".into(), dir.path().join("ctl").into()]);
        all.extend(args.iter().map(OsString::from));
        Ok(Self { proc: spawn(&all)?, dir, args: all })
    }

    /// Kills it, as nothing it could prepare for, and starts another in its place.
    pub fn kill_and_restart(&mut self) -> Result<()> {
        self.proc.kill()?;
        self.proc.wait(START)?;
        self.proc = spawn(&self.args)?;
        Ok(())
    }

    /// The socket of port `at`.
    pub fn socket(&self, at: usize) -> PathBuf {
        self.dir.path().join(format!("p{at}"))
    }

    /// The control socket.
    pub fn control(&self) -> PathBuf {
        self.dir.path().join("ctl")
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its process.
    pub fn proc(&self) -> &Proc {
        &self.proc
    }

    /// Asks its control socket, and demands a good answer.
    pub fn ask(&self, request: &Value) -> Result<Value> {
        ask(&self.control(), request)
    }

    /// The counters of its members by name, the books balanced.
    pub fn counters(&self) -> Result<Vec<Value>> {
        let answer = self.ask(&serde_json::json!({"cmd": "counters"}))?;
        let switch = &answer["switches"][0];
        ensure!(switch["balanced"] == true, "the books do not balance: {switch}");
        Ok(switch["ports"].as_array().context("no ports")?.clone())
    }

    /// Waits until a counter of a member, summed over its queues, is at least so high.
    pub fn wait_for(&self, member: &str, counter: &str, at_least: u64, deadline: Duration) -> Result<u64> {
        let end = Instant::now() + deadline;
        loop {
            let counters = self.counters()?;
            let own = counters.iter().filter(|port| port["port"] == member);
            let value = own.filter_map(|port| port[counter].as_u64()).sum();
            if value >= at_least {
                return Ok(value);
            }
            if Instant::now() > end {
                bail!(
                    "{member} has {counter} {value} in place of {at_least}: {counters:?}\n{}",
                    self.proc.tail()
                );
            }
            // Nothing tells of a counter; what is waited for has no other sign.
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn spawn(args: &[OsString]) -> Result<Proc> {
    let proc = Cmd::new(tool::ours("vcp-net")?).args(args).env("RUST_LOG", "info").spawn()?;
    proc.wait_line(Stream::Out, "ready:", START)?;
    Ok(proc)
}

/// Asks a control socket, and demands a good answer.
pub fn ask(control: &Path, request: &Value) -> Result<Value> {
    let mut stream = UnixStream::connect(control)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.write_all(format!("{request}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    let answer: Value = serde_json::from_str(&line).with_context(|| format!("no answer: {line:?}"))?;
    ensure!(answer["ok"] == true, "{request} was refused: {answer}");
    Ok(answer)
}
