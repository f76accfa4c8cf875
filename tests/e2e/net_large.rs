//! A large file through the user-mode stack: fetched by curl in a stock guest, and then fetched and sent back at once; the sums of
//! both ends are compared.
//!
//! `VCP_SOAK_NET_MIB` says how large; `cargo xtask soak net` makes it a gibibyte.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use anyhow::{Context, ensure};
use vcp_tests::guest::QemuGuest;
use vcp_tests::switch::Switch;
use vcp_tests::{Result, tool};

const CURL: &str = "/usr/bin/curl";
const BLOCK: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(900);

const JOB: &str = r#"
lease guest1
value DOWN $(curl -sS http://10.0.2.2:$web/file | sha256sum | cut -d' ' -f1)
curl -sS http://10.0.2.2:$web/file | curl -sS -X PUT -H "Content-Length: $bytes" -H Transfer-Encoding: -H Expect: -T - http://10.0.2.2:$web/file
value SENT $?
"#;

/// Block `n` of the file: no two are alike.
fn block(n: u64, out: &mut [u8]) {
    let mut state = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in out.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}

fn write_file(to: &mut impl Write, mib: u64) -> std::io::Result<()> {
    let mut bytes = vec![0; BLOCK];
    (0..mib).try_for_each(|n| {
        block(n, &mut bytes);
        to.write_all(&bytes)
    })
}

/// The SHA-256 of what `fill` writes, as the host's own program has it.
fn sum(fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<String> {
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().context("no input")?;
    fill(&mut input)?;
    drop(input);
    let output = child.wait_with_output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().next().context("no sum")?.to_owned())
}

/// GET gets the file; PUT is answered when the whole body is there, whose sum is told.
fn serve(stream: &TcpStream, mib: u64, sums: &Sender<String>) -> Result<()> {
    let mut reader = BufReader::with_capacity(BLOCK, stream.try_clone()?);
    let (mut request, mut line, mut length) = (String::new(), String::new(), 0);
    reader.read_line(&mut request)?;
    while reader.read_line(&mut line)? > 2 {
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse()?;
        }
        line.clear();
    }
    let mut writer = stream;
    if request.starts_with("GET") {
        write!(writer, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", mib * BLOCK as u64)?;
        return Ok(write_file(&mut writer, mib)?);
    }
    let mut body = reader.take(length);
    sums.send(sum(|input| std::io::copy(&mut body, input).map(|_| ()))?)?;
    Ok(write!(writer, "HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")?)
}

#[test]
fn a_large_file_is_whole_in_either_direction() -> Result<()> {
    if !tool::have(&["qemu-system-x86_64", "curl", "sha256sum", "busybox"]) {
        return Ok(());
    }
    let mib = std::env::var("VCP_SOAK_NET_MIB").ok().and_then(|mib| mib.parse().ok()).unwrap_or(24);
    let expected = sum(|input| write_file(&mut { input }, mib))?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let (sender, sums) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let sender = sender.clone();
            std::thread::spawn(move || {
                if let Err(error) = serve(&stream, mib, &sender) {
                    eprintln!("the server failed: {error:#}");
                }
            });
        }
    });
    let switch = Switch::start(["", ""], &["--uplink", "user"])?;
    let guest =
        QemuGuest::new().net(&switch.socket(0), "52:54:00:00:00:01", "").program(CURL).deadline(PATIENCE);
    let begin = std::time::Instant::now();
    let done = guest.run(&format!("web={port}; bytes={}\n{JOB}", mib * BLOCK as u64))?;
    ensure!(done.status == 0, "{}\n{}", done.console, switch.proc().tail());
    assert_eq!(done.value("DOWN")?, expected, "what was fetched");
    assert_eq!(done.number("SENT")?, 0, "{}", done.console);
    assert_eq!(sums.recv_timeout(PATIENCE)?, expected, "what came back");
    eprintln!("{mib} MiB down, then down and up, in {:.0} s with the boot", begin.elapsed().as_secs_f64());
    switch.counters()?;
    Ok(())
}
