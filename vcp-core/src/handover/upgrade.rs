//! `upgrade`, a command of every VCP: replaces a running process by one of the program as it is installed now. And the
//! question with which the new process begins.

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
/// How long the old process may take to answer that it can be taken over.
const ASK_LIMIT: Duration = Duration::from_secs(10);

/// Arguments of `upgrade`.
#[derive(Args, Debug)]
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

/// Starts the new process and waits until it has taken over. `program` is the name that its complaints begin with.
///
/// # Errors
/// It has not; the old process goes on.
pub fn run(args: &UpgradeArgs, program: &str) -> Result<()> {
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
        let why = complaint(&mut child, program).unwrap_or_else(|| format!("it ended ({status})"));
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
fn complaint(child: &mut Child, program: &str) -> Option<String> {
    let mut text = Vec::new();
    child.stderr.take()?.read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().rfind(|line| !line.trim().is_empty())?;
    let told = line.strip_prefix(program).and_then(|line| line.strip_prefix(": "));
    Some(told.unwrap_or(line).to_owned())
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

/// Asks the process behind a control socket to be taken over; what follows on the connection is the hand-over. With
/// `stand_in` that process stays and stands for the new one.
///
/// # Errors
/// It cannot be asked, or says no.
pub fn ask(control: &Path, stand_in: bool) -> Result<UnixStream> {
    let failed = || format!("cannot ask the process behind {}", control.display());
    let mut stream = UnixStream::connect(control).with_context(failed)?;
    stream.set_read_timeout(Some(ASK_LIMIT)).with_context(failed)?;
    let request = serde_json::json!({"cmd": "take-over", "keep_pid": stand_in});
    stream.write_all(format!("{request}\n").as_bytes()).with_context(failed)?;
    let mut line = String::new();
    // The answer is all that it says before it is spoken to again.
    BufReader::new(&stream).read_line(&mut line).with_context(failed)?;
    let answer: serde_json::Value = serde_json::from_str(&line).with_context(failed)?;
    if answer["ok"] != true {
        let why = answer["error"].as_str().unwrap_or("it does not say why");
        bail!("the process behind {} refused: {why}", control.display());
    }
    Ok(stream)
}
