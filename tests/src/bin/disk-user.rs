//! `disk-user`: a confined process whose disk another VCP serves, over a connection that whoever started both brokers (its
//! standard input is its seat). It writes all blocks of each round, reads them back and compares, and says so. For tests.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use msgq::handshake::LinkError;
use msgq_blk::{Disk, Done, Error, Options};
use vcp_core::msgq::Seat;
use vcp_core::process::confine::{Confinement, Mode};
use vcp_tests::pattern;

/// Blocks of [`BYTES`] that are used, from the start of the disk.
const BLOCKS: u64 = 64;
const BYTES: usize = 4096;
const SECTORS: u64 = BYTES as u64 / 512;
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> std::process::ExitCode {
    let from = std::env::args().nth(1).and_then(|arg| arg.parse().ok());
    let Some(from) = from else {
        eprintln!("Usage: disk-user ROUND (the last one that is whole on the disk; 0: none)");
        return 2.into();
    };
    match run(from) {
        Ok(()) => 0.into(),
        Err(error) => {
            eprintln!("disk-user: {error:#}");
            1.into()
        }
    }
}

struct User {
    seat: Seat,
    disk: Disk,
    options: Options,
}

fn run(from: u64) -> Result<()> {
    let seat = Seat::new(rustix::stdio::stdin().try_clone_to_owned()?)?;
    let report = Confinement {
        read: Vec::new(),
        write: Vec::new(),
        remove: Vec::new(),
        local_sockets: false,
        network: false,
        listens: false,
        max_fds: 64,
        max_private_bytes: 256 << 20,
    }
    .apply(Mode::Auto)?;
    say(&format!("ready: confined={}", report.summary()))?;
    let options = Options { deadline: PATIENCE, ..Options::default() };
    let disk = loop {
        match Disk::on(seat.next(Instant::now() + PATIENCE)?, &options) {
            Ok(disk) => break disk,
            // Its other end was a process that died; another one is coming.
            Err(Error::SetUp(_) | Error::Channel(_)) => {}
            Err(error) => return Err(error.into()),
        }
    };
    let mut user = User { seat, disk, options };
    // What it was told that is written is there, and nothing older; the round after it may have been begun.
    user.all(
        |disk, block| disk.submit_read(block * SECTORS, BYTES, block),
        |disk, done| {
            let mut found = vec![0; BYTES];
            disk.read_back(done, 0, &mut found)?;
            let is = |round: u64| found == pattern::make(round, done.tag, BYTES);
            ensure!(is(from) || is(from + 1) || from == 0, "block {} is not of round {from}", done.tag);
            Ok(())
        },
    )?;
    for round in from + 1.. {
        let data = |block| pattern::make(round, block, BYTES);
        user.all(|disk, block| disk.submit_write(block * SECTORS, &data(block), block), |_, _| Ok(()))?;
        user.all(
            |disk, block| disk.submit_read(block * SECTORS, BYTES, block),
            |disk, done| {
                let mut found = vec![0; BYTES];
                disk.read_back(done, 0, &mut found)?;
                ensure!(found == data(done.tag), "round {round}: block {} has other data", done.tag);
                Ok(())
            },
        )?;
        let epoch = user.disk.channel().map_or(0, |channel| channel.stats().epoch);
        let replays = user.disk.channel().map_or(0, |channel| channel.stats().replays);
        say(&format!("round {round} epoch={epoch} replays={replays}"))?;
    }
    Ok(())
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).context("nobody listens")
}

impl User {
    /// One request for each block, whatever happens to who serves them; `each` sees every end.
    fn all(
        &mut self,
        submit: impl Fn(&mut Disk, u64) -> Result<(), Error>,
        mut each: impl FnMut(&Disk, &Done) -> Result<()>,
    ) -> Result<()> {
        let by = Instant::now() + PATIENCE;
        let mut next = 0;
        loop {
            while next < BLOCKS {
                match submit(&mut self.disk, next) {
                    Ok(()) => next += 1,
                    Err(Error::Full) => break,
                    Err(Error::Channel(msgq::Error::Gone)) => self.attach_again()?,
                    Err(error) => return Err(error.into()),
                }
            }
            match self.disk.poll() {
                Ok(Some(done)) => {
                    done.result?;
                    each(&self.disk, &done)?;
                }
                Ok(None) if next == BLOCKS && self.disk.inflight() == 0 => return Ok(()),
                Ok(None) => match self.disk.wait(Some(by)) {
                    Ok(()) | Err(Error::Channel(msgq::Error::Gone)) => {
                        ensure!(Instant::now() < by, "{} requests do not end", self.disk.inflight());
                    }
                    Err(error) => return Err(error.into()),
                },
                Err(Error::Channel(msgq::Error::Gone)) => self.attach_again()?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn attach_again(&mut self) -> Result<()> {
        let by = Instant::now() + self.options.deadline;
        loop {
            let link = match self.seat.next(by) {
                Ok(link) => link,
                Err(LinkError::Gone) => bail!("the monitor is gone"),
                Err(error) => return Err(error).context("nobody serves the disk any more"),
            };
            match self.disk.reconnect_on(link) {
                Ok(()) => return Ok(()),
                Err(Error::SetUp(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
