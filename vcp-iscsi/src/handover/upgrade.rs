//! `vcp-iscsi upgrade`: replaces a running process by one of the program as it is installed now.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

/// How long the whole of it may take: what the old process waits for a quiet moment, and the new one's start.
const LIMIT: Duration = Duration::from_secs(60);
/// How long a question to the control socket may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Arguments of `upgrade`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  \
    vcp-iscsi serve --socket-path /run/disk0 --control /run/disk0.ctl iscsi://192.0.2.7/iqn.2001-04.com.example:disk/0\n  \
    install -m 755 new/vcp-iscsi /usr/bin/vcp-iscsi && vcp-iscsi upgrade --control /run/disk0.ctl")]
pub struct UpgradeArgs {
    /// Control socket of the running process
    #[arg(long, value_name = "SOCKET")]
    pub control: PathBuf,
    /// The program to go on with [default: this one]
    #[arg(long, value_name = "PATH")]
    pub binary: Option<PathBuf>,
    /// The old process ends. Otherwise it stays, with nothing but its number, and stands for the new one to whoever
    /// started it
    #[arg(long)]
    pub new_pid: bool,
}

/// Starts the new process and waits until it has taken over.
///
/// # Errors
/// It has not; the old process goes on.
pub fn run(args: &UpgradeArgs) -> Result<()> {
    let binary = args.binary.clone().map_or_else(own_binary, Ok)?;
    let mut command = Command::new(&binary);
    command.arg("take-over").arg("--control").arg(&args.control);
    if !args.new_pid {
        command.arg("--stand-in");
    }
    // Its log follows the old one's place once it is the owner; until then what it complains about is ours to tell.
    let stderr = if args.new_pid { Stdio::inherit() } else { Stdio::piped() };
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
    // It outlives this process, and a terminal's interrupt is not meant for it.
    command.process_group(0);
    let mut child = command.spawn().with_context(|| format!("cannot start {}", binary.display()))?;
    let ready = wait_ready(&mut child);
    let Ok(ready) = ready else {
        let _ = child.kill();
        let status = child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        let why = complaint(&mut child).unwrap_or_else(|| format!("it ended ({status})"));
        bail!("the old process goes on; {} did not take over: {why}", binary.display());
    };
    let pause = pause(&args.control).unwrap_or_default();
    let _ = writeln!(
        std::io::stdout(),
        "upgraded: pid={}{pause} {}",
        child.id(),
        ready.trim_start_matches("ready: ")
    );
    Ok(())
}

/// The program of this process as it lies on the disk now: the newly installed one, if it was replaced meanwhile.
fn own_binary() -> Result<PathBuf> {
    let path =
        std::env::current_exe().context("cannot tell where this program is; name one with --binary")?;
    // The link's text has this behind it once the file that was started is gone.
    let text = path.as_os_str().to_string_lossy().into_owned();
    Ok(text.strip_suffix(" (deleted)").map_or(path, PathBuf::from))
}

/// The line with which the new process says that it is the owner.
fn wait_ready(child: &mut Child) -> Result<String> {
    let stdout = child.stdout.take().context("no standard output")?;
    let (sender, line) = channel();
    std::thread::spawn(move || {
        let mut lines = BufReader::new(stdout).lines();
        let ready = lines.find_map(|line| line.ok().filter(|line| line.starts_with("ready:")));
        let _ = sender.send(ready);
    });
    match line.recv_timeout(LIMIT) {
        Ok(Some(ready)) => Ok(ready),
        Ok(None) | Err(RecvTimeoutError::Disconnected) => bail!("it ended"),
        Err(RecvTimeoutError::Timeout) => bail!("it took longer than {} s", LIMIT.as_secs()),
    }
}

/// The last line of what a process that ended complained about, without its name.
fn complaint(child: &mut Child) -> Option<String> {
    let mut text = Vec::new();
    child.stderr.take()?.read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().rfind(|line| !line.trim().is_empty())?;
    Some(line.strip_prefix("vcp-iscsi: ").unwrap_or(line).to_owned())
}

/// How long the guest's requests waited, for people.
fn pause(control: &Path) -> Result<String> {
    let mut stream = UnixStream::connect(control)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    stream.write_all(b"{\"cmd\":\"metrics\"}\n")?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    let answer: Value = serde_json::from_str(&line)?;
    let stopped_ns = answer["loop"]["take_over_stopped_ns"].as_u64().context("it does not say")?;
    Ok(format!(" stopped_us={}", stopped_ns / 1000))
}
