//! The login: numbers, status classes, redirection, text.

use anyhow::ensure;
use vcp_tests::Result;
use vcp_tests::bad_target::{BadTarget, IQN};

use super::bed::bed;
use crate::support::{COMMAND, one_error, vcp_iscsi};

/// Line 10, RFC 7143 11.13.5: the numbers of a Login Response that refuses mean nothing.
#[test]
fn line_10_numbers_of_a_refusal_are_ignored() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, 4096, "login#1-3 refuse 3 1")?;
    bed.target.now("reset")?;
    bed.reads(1, 0, 4096)?;
    ensure!(bed.target.count("event", "refused")? == 3);
    bed.had_sessions(2)?;
    bed.finish()
}

/// Line 10, RFC 7143 11.13.5: in one that accepts they count, StatSN from the first response on.
#[test]
fn line_10_stat_sn_counts_within_the_login() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, 4096, "login#2 add status stat-sn 3")?;
    bed.target.now("reset")?;
    bed.reads(1, 0, 4096)?;
    // The spoiled attempt was given up, the next one went through.
    bed.had_sessions(3)?;
    bed.finish()
}

/// Line 42, RFC 7143 11.13.5: class 1 is followed, to the address without a tag, and the old connection is closed.
#[test]
fn line_42_redirection_is_followed() -> Result<()> {
    let second = BadTarget::start("option group 1")?;
    let mut bed = bed("", &[])?;
    bed.target.script(&format!("login* redirect {}", second.portal()))?;
    bed.target.now("reset")?;
    second.wait("event", "full-feature", 1)?;
    bed.target.wait("event", "refused", 1)?;
    // Our side closes it (11.13.5).
    bed.target.wait("event", "fin", 1)?;
    bed.driver.write(0, &vcp_tests::pattern::make(3, 0, 4096))?;
    ensure!(second.count("in", "write")? == 1, "the write went elsewhere");
    second.judge()?;
    bed.target.judge()
}

/// Line 42, RFC 7143 11.13.5: a redirection without end is given up.
#[test]
fn line_42_redirection_in_circles_is_given_up() -> Result<()> {
    let target = BadTarget::start("")?;
    target.script(&format!("login* redirect {}", target.portal()))?;
    let out = vcp_iscsi(["info", &target.url()])?.run(COMMAND)?;
    one_error(&out, 1, &["redirects"])?;
    ensure!(target.count("event", "connect")? <= 6);
    Ok(())
}

/// Line 42, RFC 7143 11.13.5: class 2 is told and not tried again; class 3 is told as what it is. The connection is
/// closed in both cases, by us.
#[test]
fn line_42_refusals_are_told_and_the_connection_closed() -> Result<()> {
    for (class, detail, words) in [
        (2, 0, "initiator error"),
        (2, 1, "authentication failed"),
        (2, 2, "not allowed"),
        (2, 3, "no target"),
        (2, 4, "removed"),
        (3, 0, "target"),
        (3, 1, "not operational"),
        (3, 2, "resources"),
    ] {
        let target = BadTarget::start(&format!("login* refuse {class} {detail}"))?;
        let out = vcp_iscsi(["info", &target.url()])?.run(COMMAND)?;
        one_error(&out, 1, &[words, IQN])?;
        target.wait("event", "fin", 1)?;
        ensure!(target.count("event", "connect")? == 1, "tried again after {class}/{detail}");
        target.judge()?;
    }
    Ok(())
}

/// Line 42: for a device that runs, even a refusal of class 2 is not the end, as targets give it while they start; but
/// it is not asked in a hurry.
#[test]
fn line_42_running_device_outlives_refusals_of_class_2() -> Result<()> {
    let mut bed = bed("", &[])?;
    bed.prepare(1, 4096, "login#1-4 refuse 2 3")?;
    bed.target.now("reset")?;
    bed.reads(1, 0, 4096)?;
    let refused = bed.target.seen("event", "refused")?;
    ensure!(refused.len() == 4);
    bed.had_sessions(2)?;
    bed.finish()
}

/// Line 38, RFC 7143 6.2: a key that we do not know is answered NotUnderstood, and the login goes on.
#[test]
fn line_38_unknown_key_does_not_end_the_login() -> Result<()> {
    // In the last response of the security stage it can only be ignored; with the operational keys it is answered.
    let mut bed = bed("login#1-2 text X-com.example.key=7", &[])?;
    bed.writes(1, 0, 4096)?;
    bed.had_sessions(1)?;
    bed.finish()
}

/// Line 38, RFC 7143 6.2 and 6.3: a key said twice, a value that cannot be, an answer to nothing: no session on such
/// ground.
#[test]
fn line_38_broken_text_ends_the_login() -> Result<()> {
    for text in
        ["MaxBurstLength=512", "MaxRecvDataSegmentLength=0", "HeaderDigest=MD5", "InitiatorName=iqn.a:b"]
    {
        let target = BadTarget::start(&format!("login#2- text {text}"))?;
        let out = vcp_iscsi(["info", &target.url()])?.run(COMMAND)?;
        ensure!(out.status.code() == Some(1), "{text}: {}{}", out.stdout, out.stderr);
        one_error(&out, 1, &[IQN])?;
        ensure!(target.count("event", "full-feature")? <= 1, "{text}: more than one login");
    }
    Ok(())
}

/// Line 24, RFC 7143 7.7: a Login Response with fields that cannot be is a format error: no session.
#[test]
fn line_24_malformed_login_responses_end_the_login() -> Result<()> {
    for rule in [
        "login set status itt 0x01020304",
        "login or status flags 0x40",
        "login set status dsl 0x700000",
        "login set status opcode 0x25",
        "login#2 set status tsih 0",
    ] {
        let target = BadTarget::start(rule)?;
        let out = vcp_iscsi(["info", &target.url(), "--login-timeout-ms", "1000"])?.run(COMMAND)?;
        ensure!(out.status.code() == Some(1), "{rule}: {}{}", out.stdout, out.stderr);
        one_error(&out, 1, &[])?;
    }
    Ok(())
}

/// Lines 34 and 35, RFC 7143 6.3.5 and 10.1.1: a lost session is reinstated under its ISID with TSIH 0, and so is that of
/// a process that was started anew on the same socket.
#[test]
fn line_34_line_35_sessions_are_reinstated_under_a_stable_isid() -> Result<()> {
    let mut bed = bed("", &["--instance", "disk-of-a-guest"])?;
    for n in 0..3 {
        bed.target.now(["close", "reset", "close"][n])?;
        bed.writes(n as u64, 0, 4096)?;
    }
    bed.backend.proc().kill()?;
    let again =
        vcp_tests::backend::Backend::vcp_iscsi(&bed.target.url(), &["--instance", "disk-of-a-guest"])?;
    bed.target.wait("event", "full-feature", 5)?;
    let logins = bed.sent("login")?;
    let names: std::collections::HashSet<_> = logins
        .iter()
        .map(|e| (e.number(8, 6), e.field("tsih")))
        .map(|(isid, tsih)| (isid, tsih.unwrap_or(9)))
        .collect();
    ensure!(names.len() == 1 && names.iter().all(|(_, tsih)| *tsih == 0), "{names:x?}");
    // The target ended what was left of the earlier ones.
    ensure!(bed.target.count("event", "reinstated")? >= 4);
    drop(again);
    bed.target.judge()
}

/// Line 39, RFC 7143 13.12: what a target does not declare has its default: no segment to it is above 8192 bytes.
#[test]
fn line_39_undeclared_segment_length_is_8192() -> Result<()> {
    let mut bed = bed("option segment 65536\nlogin#2 strip MaxRecvDataSegmentLength", &[])?;
    bed.writes(1, 0, 65536)?;
    let pdus = [bed.sent("data-out")?, bed.sent("write")?].concat();
    let longest = pdus.iter().map(|pdu| pdu.number(5, 3)).max();
    ensure!(longest == Some(8192), "{longest:?} bytes in a PDU");
    bed.had_sessions(1)?;
    bed.finish()
}

/// Line 39, RFC 7143 6.2: an offer without an answer is no agreement; it is not taken for a yes.
#[test]
fn line_39_offer_without_an_answer_is_no_agreement() -> Result<()> {
    // Answered with the least there is, or not at all.
    let mut least =
        bed("option max-burst 512\noption first-burst 512\noption segment 512\noption max-r2t 1", &[])?;
    least.writes(1, 0, 8192)?;
    least.finish()?;
    for key in ["MaxBurstLength", "FirstBurstLength", "InitialR2T", "ImmediateData", "MaxOutstandingR2T"] {
        let target = BadTarget::start(&format!("login#2 strip {key}"))?;
        let out = vcp_iscsi(["info", &target.url(), "--json"])?.run(COMMAND)?;
        ensure!(out.status.code() == Some(1), "{key}: {}", out.stdout);
        one_error(&out, 1, &[key])?;
    }
    Ok(())
}
