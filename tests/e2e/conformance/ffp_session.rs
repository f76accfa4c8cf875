//! Cases of the UNH-IOL suite by their numbers there: pings of ours, text requests.

use anyhow::{Context, ensure};
use vcp_tests::Result;
use vcp_tests::bad_target::{BadTarget, Entry, IQN};

use super::bed::bed;
use crate::support::output;

/// FFP 15.2: a ping of ours: a task tag, no transfer tag, LUN clear, and its number is not used up if immediate (RFC
/// 7143 11.18).
#[test]
fn ffp_15_2_ping_request() -> Result<()> {
    let bed = bed("", &["--keepalive-ms", "300"])?;
    bed.target.wait("in", "nop-out", 3)?;
    let pings = bed.sent("nop-out")?;
    for pair in pings.windows(2) {
        ensure!(pair[0].field("itt")? != pair[1].field("itt")?, "a tag came again");
        ensure!(pair[0].number(24, 4) == pair[1].number(24, 4), "an immediate ping used a CmdSN");
    }
    for ping in &pings {
        let header = ping.header.context("no header")?;
        ensure!(header[0] == 0x40 && header[1] == 0x80, "{:02x?}", &header[..2]);
        ensure!(
            ping.field("itt")? != 0xffff_ffff && ping.field("ttt")? == 0xffff_ffff && ping.field("lun")? == 0
        );
    }
    bed.finish()
}

/// FFP 15.3: what was received is acknowledged though nothing is asked: by the next ping (RFC 7143 11.18, 4.2.2.2).
#[test]
fn ffp_15_3_exp_stat_sn_is_confirmed_while_idle() -> Result<()> {
    let mut bed = bed("option apart yes", &["--keepalive-ms", "300"])?;
    bed.writes(1, 0, 4096)?;
    let last = bed.target.seen("out", "ScsiResponse")?.pop().context("no response")?;
    let seen = bed.target.count("in", "nop-out")?;
    bed.target.wait("in", "nop-out", seen + 2)?;
    let ping = bed.sent("nop-out")?.into_iter().find(|ping| ping.at > last.at).context("no ping")?;
    let behind = (ping.number(28, 4) as u32).wrapping_sub(last.field("stat-sn")? as u32);
    ensure!((1..10).contains(&behind), "ExpStatSN is {behind} behind the last status");
    bed.finish()
}

fn texts(target: &BadTarget) -> Result<Vec<Entry>> {
    target.seen("in", "text")
}

/// FFP 18.1, 18.2, 18.3.1, 18.4: SendTargets: F, a task tag, no transfer tag, numbers, `key=value` (RFC 7143 11.10).
/// The key itself is checked by the target.
#[test]
fn ffp_18_1_18_2_18_3_1_18_4_text_request() -> Result<()> {
    let target = BadTarget::start("")?;
    let text = output(&["discover", "--no-luns", &format!("iscsi://{}", target.portal())])?;
    ensure!(text.contains(IQN), "{text}");
    let requests = texts(&target)?;
    ensure!(requests.len() == 1);
    let header = requests[0].header.context("no header")?;
    ensure!(header[0] & 0x3f == 0x04 && header[1] == 0x80, "{:02x?}", &header[..2]);
    ensure!(requests[0].field("ttt")? == 0xffff_ffff && requests[0].field("itt")? != 0xffff_ffff);
    ensure!(requests[0].field("lun")? == 0);
    target.judge()
}

/// FFP 18.3.2: a text that comes in pieces is asked for with the target's tag, under one task tag, by empty requests
/// (RFC 7143 11.10.4, 6.2).
#[test]
fn ffp_18_3_2_text_in_pieces() -> Result<()> {
    let target = BadTarget::start("text* pieces 100")?;
    let text = output(&["discover", "--no-luns", &format!("iscsi://{}", target.portal())])?;
    for n in 0..8 {
        ensure!(text.contains(&format!("{IQN}.{n}")), "{text}");
    }
    let requests = texts(&target)?;
    ensure!(requests.len() > 5, "{} requests", requests.len());
    ensure!(
        requests.iter().all(|r| r.field("itt").ok() == requests[0].field("itt").ok()),
        "several task tags"
    );
    ensure!(requests[1..].iter().all(|r| r.field("ttt").is_ok_and(|ttt| ttt != 0xffff_ffff)));
    target.judge()
}
