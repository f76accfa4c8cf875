//! `vcp-iscsi info`: what a logical unit is and what the session with it agreed on.

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

fn table(out: &mut impl Write, report: &Report) -> std::io::Result<()> {
    let (lun, session) = (&report.lun, &report.session);
    let yes = |b: bool| if b { "yes" } else { "no" };
    let blocks = |n: u32| if n == 0 { "-".to_owned() } else { format!("{n} blocks") };
    let rows = [
        ("url", report.url.clone()),
        ("size", format!("{} ({} bytes)", human_bytes(report.size_bytes), report.size_bytes)),
        (
            "blocks",
            format!(
                "{} of {} bytes, physical {} bytes",
                lun.blocks, lun.block_bytes, report.physical_block_bytes
            ),
        ),
        ("device", format!("{} {} {}", lun.vendor, lun.product, lun.revision)),
        ("serial", lun.serial.clone()),
        ("unit id", if report.unit_ids.is_empty() { "-".to_owned() } else { report.unit_ids.join(", ") }),
        ("access", report.access.map_or_else(|| "one way for all".to_owned(), describe_access)),
        ("read-only", yes(lun.read_only).to_owned()),
        ("write cache", format!("{}, FUA {}", if lun.write_cache { "on" } else { "off" }, yes(lun.fua))),
        (
            "provisioning",
            format!("{}, unmapped reads as zeroes: {}", report.provisioning, yes(report.unmapped_reads_zero)),
        ),
        (
            "transfer",
            format!(
                "max {}, optimal {}, granularity {}",
                blocks(lun.max_transfer_blocks),
                blocks(lun.opt_transfer_blocks),
                blocks(lun.min_transfer_blocks)
            ),
        ),
        (
            "discard",
            format!(
                "max {}, granularity {}, alignment {}",
                blocks(lun.max_discard_blocks),
                blocks(lun.discard_granularity),
                lun.discard_alignment
            ),
        ),
        (
            "write zeroes",
            format!(
                "max {}, may unmap: {}",
                blocks(lun.max_write_zeroes_blocks),
                yes(lun.write_zeroes_may_unmap)
            ),
        ),
        ("portal", session.portal.clone()),
        (
            "session",
            format!(
                "isid {} tsih {} portal group {}, {} commands at once",
                session.isid,
                session.tsih,
                session.portal_group_tag.map_or_else(|| "-".to_owned(), |t| t.to_string()),
                session.command_window
            ),
        ),
        ("authentication", session.chap.clone().map_or_else(|| "none".to_owned(), |a| format!("CHAP, {a}"))),
        ("digests", format!("header {}, data {}", yes(session.header_digest), yes(session.data_digest))),
        (
            "data",
            format!(
                "receive {}, send {}, burst {}, first burst {}",
                human_bytes(session.max_receive_bytes.into()),
                human_bytes(session.max_send_bytes.into()),
                human_bytes(session.max_burst_bytes.into()),
                human_bytes(session.first_burst_bytes.into())
            ),
        ),
        (
            "writes",
            format!(
                "InitialR2T {}, ImmediateData {}, {} R2Ts at once",
                yes(session.initial_r2t),
                yes(session.immediate_data),
                session.max_outstanding_r2t
            ),
        ),
    ];
    for (name, value) in rows {
        writeln!(out, "{name:<15} {value}")?;
    }
    Ok(())
}
