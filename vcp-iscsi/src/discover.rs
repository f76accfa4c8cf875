//! `vcp-iscsi discover`: which targets a portal has (SendTargets), and which logical units they have (REPORT LUNS).

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;
use iscsi::discovery::{FoundTarget, Query, QueryPdu, QueryProgress, Wanted};
use iscsi::pdu::framing::{Receiver, Step, append_pdu};
use iscsi::pdu::{
    Bhs, Itt, LogoutReason, LogoutRequest, NopIn, NopOut, Opcode, Pdu, TextRequest, TextResponse, Ttt,
};
use iscsi::serial::Serial;
use serde::Serialize;

use crate::portal::client::dial;
use crate::portal::login::{LoggedIn, Purpose};
use crate::portal::probe::Found;
use crate::portal::socket::wait_until;
use crate::portal::{Client, Options, PortalError, SessionArgs, Stream};
use crate::url::{Portal, Url};

/// Shows the targets of a portal and their logical units.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Example:\n  vcp-iscsi discover iscsi://192.0.2.1")]
pub struct DiscoverArgs {
    /// The portal.
    #[arg(help = "iscsi://[USER[%PASSWORD]@]HOST[:PORT]")]
    pub url: Url,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Only list targets, do not log in to them
    #[arg(long)]
    pub no_luns: bool,
    /// Session options
    #[command(flatten)]
    pub session: SessionArgs,
}

/// A logical unit, in short.
#[derive(Clone, Debug, Serialize)]
pub struct UnitReport {
    /// Its number.
    pub lun: String,
    /// Size in bytes, if it is a disk.
    pub size_bytes: Option<u64>,
    /// Bytes in a logical block.
    pub block_bytes: Option<u32>,
    /// INQUIRY vendor and product.
    pub product: Option<String>,
    /// Why it cannot be used, if so.
    pub error: Option<String>,
}

/// A target.
#[derive(Clone, Debug, Serialize)]
pub struct TargetReport {
    /// Its iSCSI name.
    pub name: String,
    /// Where it can be reached.
    pub portals: Vec<String>,
    /// Its logical units; `None` if they were not asked for or could not be had.
    pub luns: Option<Vec<UnitReport>>,
    /// Why they could not be had.
    pub error: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// The portal cannot be asked. A target that cannot be logged in to is part of the report.
pub fn run(args: &DiscoverArgs) -> anyhow::Result<()> {
    let options = one_off(args.session.options(args.url.clone())?);
    let found = targets(&options)?;
    let mut reports = Vec::new();
    for target in found {
        if args.url.target.as_ref().is_none_or(|wanted| *wanted == target.name) {
            reports.push(report(&options, &target, args.no_luns));
        }
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &reports).context("cannot write to standard output")?;
        writeln!(out)?;
    } else {
        table(&mut out, &reports).context("cannot write to standard output")?;
    }
    Ok(())
}

/// Options for a command that looks and goes: an ISID of its own, so that it does not replace the session of a device
/// that is running.
pub(crate) fn one_off(mut options: Options) -> Options {
    options.instance = format!("one-off {}", std::process::id());
    options.queue_depth = 1;
    options
}

fn report(options: &Options, target: &FoundTarget, no_luns: bool) -> TargetReport {
    let portals = match target.addresses.as_slice() {
        // No address: where it was asked (RFC 7143 appendix C).
        [] => vec![options.url.portal.to_string()],
        addresses => addresses.iter().map(ToString::to_string).collect(),
    };
    let mut report = TargetReport { name: target.name.clone(), portals, luns: None, error: None };
    if !no_luns {
        match units(options, target) {
            Ok(luns) => report.luns = Some(luns),
            Err(error) => report.error = Some(format!("{error:#}")),
        }
    }
    report
}

/// The units of a target, asked where the target says that it is; the portal at hand first if it is among those.
fn units(options: &Options, target: &FoundTarget) -> anyhow::Result<Vec<UnitReport>> {
    let mut options = options.clone();
    options.url.target = Some(target.name.clone());
    options.url.lun = None;
    let portals = target.addresses.iter().map(|a| Portal { host: a.host.clone(), port: a.port });
    let portals: Vec<_> = portals.collect();
    if !portals.is_empty() && !portals.contains(&options.url.portal) {
        // A wildcard address is no place to connect to.
        let usable = |p: &&Portal| p.host.parse::<std::net::IpAddr>().map_or(true, |ip| !ip.is_unspecified());
        if let Some(portal) = portals.iter().find(usable) {
            options.url.portal = portal.clone();
        }
    }
    let mut client = Client::connect(options, Purpose::Normal)?;
    let luns = match client.report_luns()? {
        Ok(luns) => luns,
        Err(why) => bail!("REPORT LUNS failed: {why}"),
    };
    let mut units = Vec::new();
    for lun in luns {
        units.push(match client.probe(lun)? {
            Ok(found) => unit(lun.to_string(), &found),
            Err(error) => UnitReport {
                lun: lun.to_string(),
                size_bytes: None,
                block_bytes: None,
                product: None,
                error: Some(error.to_string()),
            },
        });
    }
    client.logout();
    Ok(units)
}

fn unit(lun: String, found: &Found) -> UnitReport {
    UnitReport {
        lun,
        size_bytes: Some(found.capacity.bytes()),
        block_bytes: Some(found.capacity.block_bytes),
        product: Some(format!("{} {}", found.inquiry.vendor, found.inquiry.product)),
        error: None,
    }
}

fn table(out: &mut impl Write, reports: &[TargetReport]) -> std::io::Result<()> {
    if reports.is_empty() {
        return writeln!(out, "no targets that this initiator may see");
    }
    for (at, target) in reports.iter().enumerate() {
        if at > 0 {
            writeln!(out)?;
        }
        writeln!(out, "{}", target.name)?;
        for portal in &target.portals {
            writeln!(out, "  portal {portal}")?;
        }
        if target.luns.as_ref().is_some_and(|luns| !luns.is_empty()) {
            writeln!(out, "  {:<8} {:>10} {:>12}  DEVICE", "LUN", "SIZE", "BLOCK BYTES")?;
        }
        for unit in target.luns.iter().flatten() {
            match (&unit.error, unit.size_bytes) {
                (None, Some(bytes)) => writeln!(
                    out,
                    "  LUN {:<4} {:>10} {:>12}  {}",
                    unit.lun,
                    human_bytes(bytes),
                    unit.block_bytes.unwrap_or_default(),
                    unit.product.as_deref().unwrap_or_default()
                )?,
                (why, _) => writeln!(out, "  LUN {:<4} {}", unit.lun, why.as_deref().unwrap_or("unknown"))?,
            }
        }
        if let Some(error) = &target.error {
            writeln!(out, "  LUNs unknown: {error}")?;
        } else if target.luns.as_ref().is_some_and(Vec::is_empty) {
            writeln!(out, "  no LUN that this initiator may see")?;
        }
    }
    Ok(())
}

/// A size for people: at most four digits and a binary unit.
pub(crate) fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.fract() < 0.05 || value >= 100.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// The targets of a portal, by a discovery session.
///
/// # Errors
/// The portal cannot be reached, refuses us, or answers nonsense.
pub fn targets(options: &Options) -> anyhow::Result<Vec<FoundTarget>> {
    let mut options = Arc::new(options.clone());
    let logged_in = match dial(&options, Purpose::Discovery) {
        // Many targets want CHAP for themselves but not for discovery, which only tells names; whoever asked for
        // mutual CHAP does not take names from just anybody.
        Err(PortalError::Login { wants_no_chap: true, .. })
            if options.chap.is_some() && options.mutual_chap.is_none() =>
        {
            tracing::debug!("discovery without CHAP");
            Arc::make_mut(&mut options).chap = None;
            dial(&options, Purpose::Discovery)?
        }
        other => other?,
    };
    let portal = logged_in.portal.to_string();
    let deadline = Instant::now() + options.timeouts.login;
    Conversation::new(logged_in, deadline).run().with_context(|| format!("discovery at {portal} failed"))
}

/// A discovery session: text requests one after the other, pings answered.
struct Conversation {
    stream: Stream,
    receiver: Receiver,
    input: Vec<u8>,
    cmd_sn: Serial,
    exp_stat_sn: Serial,
    digests: iscsi::pdu::framing::Digests,
    deadline: Instant,
}

impl Conversation {
    const ITT: Itt = Itt(1);

    fn new(logged_in: LoggedIn, deadline: Instant) -> Self {
        let negotiated = &logged_in.agreed.negotiated;
        let mut receiver = Receiver::new(negotiated.limits(0));
        receiver.configure(negotiated.limits(0), negotiated.digests);
        Self {
            digests: negotiated.digests,
            receiver,
            cmd_sn: logged_in.agreed.nexus.cmd_sn,
            exp_stat_sn: logged_in.agreed.nexus.stat_sn,
            input: logged_in.early,
            stream: logged_in.stream,
            deadline,
        }
    }

    fn run(mut self) -> anyhow::Result<Vec<FoundTarget>> {
        let (mut query, mut pdu) = Query::start(Wanted::All);
        let targets = loop {
            self.send_text(&pdu)?;
            let (response, data) = self.text_response()?;
            match query.receive(&response, &data)? {
                QueryProgress::Send(next) => pdu = next,
                QueryProgress::Done(targets) => break targets,
            }
        };
        // In order; but what was asked for is there, so that nothing that happens to the logout matters.
        let logout = LogoutRequest {
            immediate: true,
            reason: LogoutReason::CloseSession,
            itt: Itt(2),
            cid: 0,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.exp_stat_sn,
        };
        if self.send(&logout.encode(), &[]).is_ok() {
            let _ = self.receive();
        }
        Ok(targets)
    }

    fn send_text(&mut self, pdu: &QueryPdu) -> anyhow::Result<()> {
        let request = TextRequest {
            immediate: false,
            final_bit: pdu.final_bit && !pdu.continues,
            continues: pdu.continues,
            data_len_bytes: pdu.data.len() as u32,
            lun: pdu.lun,
            itt: Self::ITT,
            ttt: pdu.ttt,
            cmd_sn: self.cmd_sn.take(),
            exp_stat_sn: self.exp_stat_sn,
        };
        self.send(&request.encode(), &pdu.data)
    }

    fn text_response(&mut self) -> anyhow::Result<(TextResponse, Vec<u8>)> {
        loop {
            let (header, data) = self.receive()?;
            match header.opcode() {
                Some(Opcode::TextResponse) => {
                    let response = TextResponse::decode(&header)?;
                    self.exp_stat_sn = response.sn.stat_sn.next();
                    return Ok((response, data));
                }
                Some(Opcode::NopIn) => {
                    let ping = NopIn::decode(&header)?;
                    if !ping.ttt.is_none() {
                        self.pong(ping.ttt, ping.lun)?;
                    }
                }
                Some(Opcode::Reject) => bail!("the target rejected SendTargets"),
                _ => bail!("the target sent something else than an answer to SendTargets"),
            }
        }
    }

    fn pong(&mut self, ttt: Ttt, lun: iscsi::scsi::Lun) -> anyhow::Result<()> {
        let pdu = NopOut {
            immediate: true,
            data_len_bytes: 0,
            lun,
            itt: Itt::NONE,
            ttt,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.exp_stat_sn,
        };
        self.send(&pdu.encode(), &[])
    }

    fn wait(&self, writable: bool) -> anyhow::Result<()> {
        if !wait_until(&self.stream, writable, self.deadline)? {
            bail!("the target did not answer in time (--login-timeout-ms)");
        }
        Ok(())
    }

    fn send(&mut self, header: &Bhs, data: &[u8]) -> anyhow::Result<()> {
        let mut out = Vec::new();
        append_pdu(&mut out, header, data, self.digests);
        let mut rest = &out[..];
        while !rest.is_empty() {
            match self.stream.write(rest) {
                Ok(sent) => rest = &rest[sent..],
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => self.wait(true)?,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The next PDU.
    fn receive(&mut self) -> anyhow::Result<(Bhs, Vec<u8>)> {
        let mut data = Vec::new();
        loop {
            match self.receiver.step() {
                Step::Header => self.receiver.accept(),
                Step::Done { data_digest_ok } => {
                    let header = *self.receiver.header();
                    self.receiver.next_pdu();
                    if !data_digest_ok {
                        bail!("the data digest of an answer is wrong");
                    }
                    return Ok((header, data));
                }
                _ if self.input.is_empty() => self.read()?,
                Step::Framing { .. } => {
                    let taken = self.receiver.feed(&self.input)?;
                    self.input.drain(..taken);
                }
                Step::Data { len_bytes, .. } => {
                    let part: Vec<u8> =
                        self.input.drain(..self.input.len().min(len_bytes as usize)).collect();
                    self.receiver.data(&part);
                    data.extend_from_slice(&part);
                }
            }
        }
    }

    fn read(&mut self) -> anyhow::Result<()> {
        let mut buffer = [0; 16384];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("the target closed the connection"),
                Ok(got) => {
                    self.input.extend_from_slice(&buffer[..got]);
                    return Ok(());
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => self.wait(false)?,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_for_people() {
        for (bytes, text) in [
            (512, "512 B"),
            (1 << 30, "1 GiB"),
            (3 << 29, "1.5 GiB"),
            (5 << 40, "5 TiB"),
            (123 << 20, "123 MiB"),
        ] {
            assert_eq!(super::human_bytes(bytes), text);
        }
    }
}
