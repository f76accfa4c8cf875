//! A channel between two VCPs, set up by who started them: `vcp-iscsi` serves its disk to another confined process, and neither
//! has a name that the other could be reached by. Either is killed and started again, under load.

use anyhow::{Context, ensure};
use vcp_core::msgq::{Broker, Role};
use vcp_tests::proc::{Cmd, Proc, Stream};
use vcp_tests::target::{Kind, Spec, Target};
use vcp_tests::{Result, pattern, tool};

use crate::support::{COMMAND, vcp_iscsi};

const NAME: &str = "user-disk0";
const KILLS: u64 = 6;
const BLOCKS: u64 = 64;
const BYTES: usize = 4096;

struct Bed {
    target: Target,
    broker: Broker,
}

impl Bed {
    fn serve(&mut self) -> Result<Proc> {
        let seat = self.broker.seat(NAME, Role::Server)?;
        let serve = ["serve", "--exit-with-parent", "--msgq-fd", "0", "--instance", NAME];
        let proc = vcp_iscsi(serve)?.arg(self.target.url(0)).stdin_fd(seat).spawn()?;
        let line = proc.wait_line(Stream::Out, "ready:", COMMAND)?;
        ensure!(line.contains("confined=") && !line.contains("confined=no"), "{line}");
        Ok(proc)
    }

    fn use_it(&mut self, from: u64) -> Result<Proc> {
        let seat = self.broker.seat(NAME, Role::Client)?;
        let proc = Cmd::new(tool::ours("disk-user")?).arg(from.to_string()).stdin_fd(seat).spawn()?;
        let line = proc.wait_line(Stream::Out, "ready:", COMMAND)?;
        ensure!(!line.contains("confined=no"), "{line}");
        Ok(proc)
    }
}

/// The last round that it has said to be whole, and what it said.
fn last(user: &Proc) -> Option<(u64, String)> {
    let said = user.stream(Stream::Out);
    let line = said.lines().rfind(|line| line.starts_with("round "))?;
    Some((line.split(' ').nth(1)?.parse().ok()?, line.to_owned()))
}

fn gets_on(user: &Proc, round: u64) -> Result<()> {
    user.wait_line(Stream::Out, &format!("round {round} "), COMMAND).map(drop)
}

#[test]
fn two_vcps_are_joined_by_who_started_them_and_joined_again_when_either_is_killed() -> Result<()> {
    let target = Target::start(Kind::Ours, &Spec::disk(8 << 20))?;
    let mut bed = Bed { target, broker: Broker::new() };
    // Who uses it is there first, and waits.
    let mut user = bed.use_it(0)?;
    let mut server = bed.serve()?;
    let mut whole = 0;
    for kill in 0..KILLS {
        gets_on(&user, whole + 3)?;
        let (_, line) = last(&user).context("no round")?;
        // Once for each server that this process had.
        let epoch = if kill % 2 == 0 { "epoch=1" } else { "epoch=2" };
        ensure!(line.contains(epoch), "{line}, not {epoch}");
        if kill % 2 == 0 {
            server.kill()?;
            server = bed.serve()?;
            // The same process goes on, with what it had in flight.
            whole = last(&user).context("no round")?.0;
            ensure!(user.is_running(), "the user ended: {}", user.tail());
        } else {
            user.kill()?;
            whole = last(&user).context("no round")?.0;
            // The server has more to do than this client; it lives.
            user = bed.use_it(whole)?;
        }
    }
    gets_on(&user, whole + 3)?;
    ensure!(bed.broker.times(NAME) == 1 + KILLS, "joined {} times", bed.broker.times(NAME));
    ensure!(server.is_running(), "the server ended: {}", server.tail());
    user.kill()?;
    let whole = last(&user).context("no round")?.0;
    let image = std::fs::read(&bed.target.luns()[0].image)?;
    for block in 0..BLOCKS {
        let at = block as usize * BYTES;
        let found = &image[at..at + BYTES];
        let is = |round| found == pattern::make(round, block, BYTES);
        ensure!(is(whole) || is(whole + 1), "block {block} is not of round {whole}");
    }
    // The monitor's end of the matter.
    bed.broker.end(NAME);
    ensure!(server.is_running(), "a VCP ends because nobody is to use its disk any more");
    Ok(())
}
