//! `vcp-iscsi info`: what a logical unit is and what the session with it agreed on.

use std::fmt;
use std::io::Write;

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use crate::discover::{human_bytes, one_off};
use crate::engine::Lun;
use crate::portal::login::{Negotiated, Purpose};
use crate::portal::probe::{Access, Found};
use crate::portal::{Client, SessionArgs};
use crate::url::Url;

/// Shows a logical unit: size, block size, provisioning, limits, and what was negotiated.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Example:\n  vcp-iscsi info iscsi://192.0.2.1/iqn.2026-01.org.example:disk/0")]
pub struct InfoArgs {
    /// The unit.
    #[arg(help = "iscsi://[USER[%PASSWORD]@]HOST[:PORT]/TARGET-IQN/LUN")]
    pub url: Url,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Session options
    #[command(flatten)]
    pub session: SessionArgs,
}

/// What is shown.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The URL without credentials.
    pub url: String,
    /// LUN address as sent, in hexadecimal.
    pub lun_address: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Bytes in a physical block.
    pub physical_block_bytes: u64,
    /// `thick`, `thin` or `resource`.
    pub provisioning: &'static str,
    /// Unmapped blocks read as zeroes.
    pub unmapped_reads_zero: bool,
    /// World-wide name (VPD page 83h).
    pub designator: Option<String>,
    /// All names of the unit as `--unit-id` takes them, the best one first.
    pub unit_ids: Vec<String>,
    /// Target port group of this portal and its state (ALUA), if the unit has such.
    pub access: Option<Access>,
    /// Revolutions per minute; 1 for solid state; `None` if not told.
    pub rotation_rate: Option<u16>,
    /// The unit as a guest's disk gets it.
    pub lun: Lun,
    /// The session.
    pub session: Negotiated,
}

/// Runs the command.
///
/// # Errors
/// The unit cannot be reached or used.
pub fn run(args: &InfoArgs) -> anyhow::Result<()> {
    args.url.require_target()?;
    let lun = args.url.require_lun()?;
    let options = one_off(args.session.options(args.url.clone())?);
    let mut client = Client::connect(options, Purpose::Normal)?;
    let (address, found) = client.find_lun(lun)?;
    let report = report(&args.url, address.0, &found, client.negotiated().clone());
    client.logout();
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &report).context("cannot write to standard output")?;
        writeln!(out)?;
    } else {
        table(&mut out, &report).context("cannot write to standard output")?;
    }
    Ok(())
}

fn report(url: &Url, address: [u8; 8], found: &Found, session: Negotiated) -> Report {
    let capacity = &found.capacity;
    let provisioning = match found.provisioning.map(|p| p.kind) {
        Some(2) => "thin",
        Some(1) => "resource",
        _ if capacity.thin => "thin",
        _ => "thick",
    };
    Report {
        url: url.to_string(),
        lun_address: format!("{:016x}", u64::from_be_bytes(address)),
        size_bytes: capacity.bytes(),
        physical_block_bytes: u64::from(capacity.block_bytes) << capacity.physical_exponent,
        provisioning,
        unmapped_reads_zero: capacity.unmapped_reads_zero,
        designator: found.designator.clone(),
        unit_ids: found.names.unit.iter().map(ToString::to_string).collect(),
        access: found.access,
        rotation_rate: found.rotation.filter(|&r| r != 0),
        lun: found.lun(false),
        session,
    }
}

/// An access state in words.
fn describe_access(access: Access) -> String {
    let group = access.group.map_or_else(String::new, |group| format!(", target port group {group}"));
    format!("{}{group}{}", access.state, if access.preferred { ", preferred" } else { "" })
}

/// The parameters of a session in words, as `serve` says them once.
impl fmt::Display for Negotiated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digest = |on: bool| if on { "CRC32C" } else { "none" };
        let size = |bytes: u32| human_bytes(bytes.into());
        write!(f, "portal {}", self.portal)?;
        if let Some(group) = self.portal_group_tag {
            write!(f, " (group {group})")?;
        }
        write!(
            f,
            ", isid {}, tsih {}, authentication {}, HeaderDigest {}, DataDigest {}, InitialR2T {}, ImmediateData {}, \
             MaxOutstandingR2T {}, MaxBurstLength {}, FirstBurstLength {}, MaxRecvDataSegmentLength {} (target's {}), \
             ErrorRecoveryLevel {}, {} commands at once",
            self.isid,
            self.tsih,
            self.chap.as_ref().map_or_else(|| "none".to_owned(), |algorithm| format!("CHAP ({algorithm})")),
            digest(self.header_digest),
            digest(self.data_digest),
            yes(self.initial_r2t),
            yes(self.immediate_data),
            self.max_outstanding_r2t,
            size(self.max_burst_bytes),
            size(self.first_burst_bytes),
            size(self.max_receive_bytes),
            size(self.max_send_bytes),
            self.error_recovery_level,
            self.command_window,
        )
    }
}

fn yes(is: bool) -> &'static str {
    if is { "yes" } else { "no" }
}

/// A number of blocks, and what that is in bytes.
fn blocks(lun: &Lun, n: u32) -> String {
    match n {
        0 => "-".to_owned(),
        u32::MAX => "any".to_owned(),
        n => format!("{n} blocks ({})", human_bytes(u64::from(n) * u64::from(lun.block_bytes))),
    }
}

fn table(out: &mut impl Write, report: &Report) -> std::io::Result<()> {
    writeln!(out, "{}", report.url)?;
    section(out, "unit", &unit_rows(report))?;
    section(out, "limits", &limit_rows(&report.lun))?;
    section(out, "session", &session_rows(&report.session))
}

fn section(out: &mut impl Write, title: &str, rows: &[(&str, String)]) -> std::io::Result<()> {
    writeln!(out, "\n{title}")?;
    rows.iter().try_for_each(|(name, value)| writeln!(out, "  {name:<22} {value}"))
}

fn unit_rows(report: &Report) -> Vec<(&'static str, String)> {
    let lun = &report.lun;
    let ids = if report.unit_ids.is_empty() { "-".to_owned() } else { report.unit_ids.join(", ") };
    let rotation = match report.rotation_rate {
        None => "not told".to_owned(),
        Some(1) => "solid state".to_owned(),
        Some(rpm) => format!("{rpm} rpm"),
    };
    vec![
        ("size", format!("{} ({} bytes)", human_bytes(report.size_bytes), report.size_bytes)),
        ("logical blocks", format!("{} of {} bytes", lun.blocks, lun.block_bytes)),
        ("physical blocks", format!("{} bytes", report.physical_block_bytes)),
        ("device", format!("{} {} {}", lun.vendor, lun.product, lun.revision)),
        ("serial", lun.serial.clone()),
        ("unit id", ids),
        ("LUN address", report.lun_address.clone()),
        ("access", report.access.map_or_else(|| "one way for all".to_owned(), describe_access)),
        ("read-only", yes(lun.read_only).to_owned()),
        ("write cache", if lun.write_cache { "on" } else { "off" }.to_owned()),
        ("force unit access", yes(lun.fua).to_owned()),
        ("provisioning", report.provisioning.to_owned()),
        ("unmapped reads zeroes", yes(report.unmapped_reads_zero).to_owned()),
        ("medium", rotation),
    ]
}

fn limit_rows(lun: &Lun) -> Vec<(&'static str, String)> {
    vec![
        ("transfer", blocks(lun, lun.max_transfer_blocks)),
        ("optimal transfer", blocks(lun, lun.opt_transfer_blocks)),
        ("transfer granularity", blocks(lun, lun.min_transfer_blocks)),
        ("discard", blocks(lun, lun.max_discard_blocks)),
        ("discard granularity", blocks(lun, lun.discard_granularity)),
        ("discard alignment", blocks(lun, lun.discard_alignment)),
        ("write zeroes", blocks(lun, lun.max_write_zeroes_blocks)),
        ("write zeroes unmaps", yes(lun.write_zeroes_may_unmap).to_owned()),
    ]
}

fn session_rows(session: &Negotiated) -> Vec<(&'static str, String)> {
    let digest = |on: bool| if on { "CRC32C" } else { "none" }.to_owned();
    let size = |bytes: u32| human_bytes(bytes.into());
    let dash = || "-".to_owned();
    vec![
        ("portal", session.portal.clone()),
        ("portal group", session.portal_group_tag.map_or_else(dash, |tag| tag.to_string())),
        ("target alias", session.target_alias.clone().unwrap_or_else(dash)),
        ("ISID, TSIH", format!("{}, {}", session.isid, session.tsih)),
        ("authentication", session.chap.clone().map_or_else(|| "none".to_owned(), |a| format!("CHAP, {a}"))),
        ("HeaderDigest", digest(session.header_digest)),
        ("DataDigest", digest(session.data_digest)),
        ("InitialR2T", yes(session.initial_r2t).to_owned()),
        ("ImmediateData", yes(session.immediate_data).to_owned()),
        ("MaxOutstandingR2T", session.max_outstanding_r2t.to_string()),
        ("MaxBurstLength", size(session.max_burst_bytes)),
        ("FirstBurstLength", size(session.first_burst_bytes)),
        ("receive data segment", size(session.max_receive_bytes)),
        ("send data segment", size(session.max_send_bytes)),
        ("ErrorRecoveryLevel", session.error_recovery_level.to_string()),
        ("commands at once", session.command_window.to_string()),
    ]
}
