//! Options, start and end of the program.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{ArgAction, ArgMatches, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use iscsi::chap;
use iscsi::scsi::alua::AccessState;
use iscsi_target::config::{
    Config, DigestChoice, LunConfig, PollMode, PortalConfig, SessionConfig, TargetConfig, parse_size,
};
use iscsi_target::server::{Server, parse_state, state_name};
use signal_hook::consts::{SIGINT, SIGTERM};

/// The embedded iSCSI target: memory and file LUNs for demos, tests and benchmarks.
#[derive(Debug, Parser)]
#[command(name = "iscsi-target", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves targets until SIGTERM or SIGINT.
    #[command(after_help = SERVE_EXAMPLE)]
    Serve(Box<Serve>),
    /// Shows or sets the access state of target portal groups.
    #[command(after_help = GROUP_EXAMPLE)]
    Group(Group),
}

const GROUP_EXAMPLE: &str = "\
Example:
  iscsi-target group --control /run/target.sock
  iscsi-target group --control /run/target.sock 2 standby

States: optimized, non-optimized, standby, unavailable, offline, transitioning.";

#[derive(Debug, Args)]
struct Group {
    /// Control socket of the server.
    #[arg(long, value_name = "SOCKET")]
    control: PathBuf,
    /// Group to set.
    #[arg(value_name = "N", requires = "state")]
    number: Option<u16>,
    /// State to set it to.
    #[arg(value_name = "STATE", value_parser = parse_state)]
    state: Option<AccessState>,
}

const SERVE_EXAMPLE: &str = "\
Example:
  iscsi-target serve --listen 127.0.0.1:3260 --target iqn.2026-01.org.example:disks \\
      --lun mem:1G --lun file:disk.img,read-only --chap alice:a-long-secret

LUN specification: mem:SIZE or file:PATH, then any of
  ,read-only  ,block-size=512|4096  ,write-cache=on|off  ,lun=NUMBER  ,naa=HEX
LUNs are numbered from 0 in the order given, unless lun= says otherwise. --lun and the --chap options belong to the
last --target before them.

Portals of one group are one target port. With several groups the LUNs have asymmetric access (ALUA):
  --listen 127.0.0.1:3260,group=1 --listen 127.0.0.2:3260,group=2 --group 2=standby --control /run/target.sock
naa= gives the same name to the same medium behind several targets or servers.";

#[derive(Debug, Args)]
struct Serve {
    /// Address and port to listen on, and the target portal group; port 0 takes a free one; may be repeated.
    #[arg(long, value_name = "ADDR:PORT[,group=N]", default_value = "127.0.0.1:3260", action = ArgAction::Append)]
    listen: Vec<PortalConfig>,
    /// Asymmetric access state of a portal group at start; may be repeated.
    #[arg(long, value_name = "N=STATE", action = ArgAction::Append, value_parser = group_state)]
    group: Vec<(u16, AccessState)>,
    /// Unix socket over which access states are changed (see `iscsi-target group`).
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// iSCSI name of a target; may be repeated.
    #[arg(long, value_name = "IQN", required = true, action = ArgAction::Append, value_parser = iqn)]
    target: Vec<String>,
    /// A logical unit of the last target; may be repeated.
    #[arg(long, value_name = "SPEC", required = true, action = ArgAction::Append)]
    lun: Vec<LunConfig>,
    /// Name and secret with which initiators must log in to the last target.
    #[arg(long, value_name = "USER:SECRET", action = ArgAction::Append, value_parser = user_and_secret, conflicts_with = "chap_user")]
    chap: Vec<chap::Account>,
    /// Name with which initiators must log in; the secret is in --chap-secret-file.
    #[arg(long, value_name = "USER", action = ArgAction::Append, requires = "chap_secret_file")]
    chap_user: Vec<String>,
    /// File whose first line is the secret for --chap-user.
    #[arg(long, value_name = "FILE", action = ArgAction::Append, requires = "chap_user")]
    chap_secret_file: Vec<PathBuf>,
    /// Name and secret by which the last target proves itself to initiators that ask.
    #[arg(long, value_name = "USER:SECRET", action = ArgAction::Append, value_parser = user_and_secret, conflicts_with = "mutual_chap_user")]
    mutual_chap: Vec<chap::Account>,
    /// Name by which the last target proves itself; the secret is in --mutual-chap-secret-file.
    #[arg(long, value_name = "USER", action = ArgAction::Append, requires = "mutual_chap_secret_file")]
    mutual_chap_user: Vec<String>,
    /// File whose first line is the secret for --mutual-chap-user.
    #[arg(long, value_name = "FILE", action = ArgAction::Append, requires = "mutual_chap_user")]
    mutual_chap_secret_file: Vec<PathBuf>,

    /// Hardware thread of the data path.
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,
    /// How long an idle data thread looks before it sleeps: microseconds (0: never looks), `always` (never sleeps) or
    /// `auto` (learns).
    #[arg(long, value_name = "N", default_value = "auto")]
    poll_us: PollMode,
    /// Log level: error, warn, info, debug, trace, or directives as RUST_LOG takes them.
    #[arg(long, value_name = "LEVEL")]
    log: Option<String>,

    /// Commands that one session may have under way.
    #[arg(long, value_name = "N", default_value_t = SessionConfig::default().queue_depth, value_parser = clap::value_parser!(u16).range(1..=4096), help_heading = "Session")]
    queue_depth: u16,
    /// R2Ts that one command may have outstanding.
    #[arg(long, value_name = "N", default_value_t = SessionConfig::default().max_outstanding_r2t, value_parser = clap::value_parser!(u8).range(1..), help_heading = "Session")]
    max_outstanding_r2t: u8,
    /// Whether initiators must wait for an R2T before they send data that is not immediate.
    #[arg(long, value_name = "yes|no", default_value = "no", action = ArgAction::Set, value_parser = yes_no, help_heading = "Session")]
    initial_r2t: bool,
    /// Whether data may come with the command.
    #[arg(long, value_name = "yes|no", default_value = "yes", action = ArgAction::Set, value_parser = yes_no, help_heading = "Session")]
    immediate_data: bool,
    /// MaxBurstLength in bytes.
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = segment_size, help_heading = "Session")]
    max_burst: u32,
    /// FirstBurstLength in bytes; at most the maximum burst.
    #[arg(long, value_name = "SIZE", default_value = "256K", value_parser = segment_size, help_heading = "Session")]
    first_burst: u32,
    /// MaxRecvDataSegmentLength in bytes.
    #[arg(long, value_name = "SIZE", default_value = "256K", value_parser = segment_size, help_heading = "Session")]
    max_recv_data_segment: u32,
    /// Header digest: what the initiator likes best (any), none, or crc32c if the initiator can.
    #[arg(long, value_name = "any|none|crc32c", default_value = "any", help_heading = "Session")]
    header_digest: DigestChoice,
    /// Data digest.
    #[arg(long, value_name = "any|none|crc32c", default_value = "any", help_heading = "Session")]
    data_digest: DigestChoice,
    /// Connections at a time.
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Session")]
    max_connections: usize,
    /// Seconds in which a login must be over.
    #[arg(long, value_name = "SECONDS", default_value_t = 15, help_heading = "Session")]
    login_timeout_s: u64,
    /// Seconds of silence after which an initiator is pinged, and as many again after which it is given up; 0: never.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, help_heading = "Session")]
    keepalive_s: u64,
}

fn group_state(text: &str) -> Result<(u16, AccessState), String> {
    let (group, state) = text.split_once('=').ok_or("expected N=STATE")?;
    let group = group.parse().map_err(|_| format!("`{group}` is no group number"))?;
    Ok((group, parse_state(state)?))
}

fn yes_no(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err("expected yes or no".into()),
    }
}

fn segment_size(text: &str) -> Result<u32, String> {
    match parse_size(text)? {
        size @ 512..=0xFF_FFFF => Ok(size as u32),
        _ => Err("expected 512 to 16777215 bytes".into()),
    }
}

fn iqn(text: &str) -> Result<String, String> {
    match iscsi::text::is_iscsi_name(text) {
        true => Ok(text.into()),
        false => Err("expected an iSCSI name such as iqn.2026-01.org.example:disk".into()),
    }
}

fn user_and_secret(text: &str) -> Result<chap::Account, String> {
    let (user, secret) = text.split_once(':').ok_or("expected USER:SECRET")?;
    account(user, secret.as_bytes()).map_err(|error| format!("{error:#}"))
}

fn account(user: &str, secret: &[u8]) -> anyhow::Result<chap::Account> {
    Ok(chap::Account::new(user, chap::Secret::new(secret)?)?)
}

/// An account whose secret is the first line of a file.
fn account_from_file(user: &str, path: &Path) -> anyhow::Result<chap::Account> {
    let text =
        std::fs::read(path).with_context(|| format!("cannot read the secret file {}", path.display()))?;
    let line = text.split(|&byte| byte == b'\n').next().unwrap_or_default();
    account(user, line.strip_suffix(b"\r").unwrap_or(line))
        .with_context(|| format!("the secret in {} cannot be used", path.display()))
}

impl Serve {
    /// Puts options that belong to a target to the last target before them.
    fn targets(&self, matches: &ArgMatches) -> anyhow::Result<Vec<TargetConfig>> {
        let mut targets: Vec<TargetConfig> = self
            .target
            .iter()
            .map(|name| TargetConfig { name: name.clone(), luns: Vec::new(), chap: None, mutual_chap: None })
            .collect();
        let starts: Vec<usize> = matches.indices_of("target").map(Iterator::collect).unwrap_or_default();
        // With one target its options may stand before it too.
        let owner = |index: usize| match starts.iter().rposition(|&start| start < index) {
            Some(at) => Ok(at),
            None if starts.len() == 1 => Ok(0),
            None => {
                Err(anyhow::anyhow!("--lun and --chap options belong behind the --target that they are for"))
            }
        };
        let positions =
            |id: &str| matches.indices_of(id).map(Iterator::collect::<Vec<_>>).unwrap_or_default();
        for (lun, at) in self.lun.iter().zip(positions("lun")) {
            targets[owner(at)?].luns.push(lun.clone());
        }
        let one_way = accounts(&self.chap, &self.chap_user, &self.chap_secret_file)?;
        let at = [positions("chap"), positions("chap_user")].concat();
        for (account, at) in one_way.into_iter().zip(at) {
            targets[owner(at)?].chap = Some(account);
        }
        let mutual = accounts(&self.mutual_chap, &self.mutual_chap_user, &self.mutual_chap_secret_file)?;
        let at = [positions("mutual_chap"), positions("mutual_chap_user")].concat();
        for (account, at) in mutual.into_iter().zip(at) {
            targets[owner(at)?].mutual_chap = Some(account);
        }
        for target in &targets {
            anyhow::ensure!(!target.luns.is_empty(), "target {} has no --lun", target.name);
            anyhow::ensure!(
                target.mutual_chap.is_none() || target.chap.is_some(),
                "target {}: --mutual-chap needs --chap, since mutual authentication begins with the initiator's",
                target.name
            );
        }
        Ok(targets)
    }

    fn config(&self, matches: &ArgMatches) -> anyhow::Result<Config> {
        anyhow::ensure!(
            self.first_burst <= self.max_burst,
            "--first-burst {} exceeds --max-burst {}",
            self.first_burst,
            self.max_burst
        );
        for (group, _) in &self.group {
            anyhow::ensure!(
                self.listen.iter().any(|portal| portal.group == *group),
                "--group {group}: no --listen has this group"
            );
        }
        Ok(Config {
            listen: self.listen.clone(),
            groups: self.group.clone(),
            control: self.control.clone(),
            targets: self.targets(matches)?,
            session: SessionConfig {
                queue_depth: self.queue_depth,
                max_outstanding_r2t: self.max_outstanding_r2t,
                initial_r2t: self.initial_r2t,
                immediate_data: self.immediate_data,
                max_burst_bytes: self.max_burst,
                first_burst_bytes: self.first_burst,
                max_recv_segment_bytes: self.max_recv_data_segment,
                header_digest: self.header_digest,
                data_digest: self.data_digest,
            },
            max_connections: self.max_connections,
            login_timeout: Duration::from_secs(self.login_timeout_s),
            keepalive: Duration::from_secs(self.keepalive_s),
            cpu: self.cpu,
            poll: self.poll_us,
        })
    }
}

/// Accounts given in the open, then those with their secrets in files.
fn accounts(
    open: &[chap::Account],
    users: &[String],
    files: &[PathBuf],
) -> anyhow::Result<Vec<chap::Account>> {
    anyhow::ensure!(users.len() == files.len(), "as many secret files as names are needed");
    let from_files = users.iter().zip(files).map(|(user, file)| account_from_file(user, file));
    open.iter().cloned().map(Ok).chain(from_files).collect()
}

fn serve(options: &Serve, matches: &ArgMatches) -> anyhow::Result<()> {
    let filter =
        options.log.clone().or_else(|| std::env::var("RUST_LOG").ok()).unwrap_or_else(|| "info".into());
    let filter = tracing_subscriber::EnvFilter::try_new(&filter)
        .with_context(|| format!("`{filter}` is no log level; try error, warn, info, debug or trace"))?;
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(std::io::stderr).init();

    let (stop, on_signal) = UnixStream::pair().context("cannot make a socket pair for signals")?;
    for signal in [SIGTERM, SIGINT] {
        let sender = on_signal.try_clone().context("cannot copy a socket")?;
        signal_hook::low_level::pipe::register(signal, sender).context("cannot handle signals")?;
    }

    let mut server = Server::new(options.config(matches)?)?;
    server.pin()?;
    tracing::info!(memory_bound_bytes = server.memory_bound_bytes(), "media open");
    let names = options.target.join(",");
    let portals = server.portals();
    let first = portals.first().map(|(addr, _)| addr.to_string()).unwrap_or_default();
    print!("ready: addr={first} target={names} luns={}", server.unit_count());
    if portals.len() > 1 {
        let all: Vec<_> = portals.iter().map(|(addr, group)| format!("{addr},{group}")).collect();
        print!(" portals={}", all.join(" portals="));
    }
    println!();
    std::io::stdout().flush().context("cannot write to standard output")?;
    server.run(&stop)?;
    Ok(())
}

/// Asks a running server, and prints its answer.
fn group(options: &Group) -> anyhow::Result<()> {
    let socket = UnixStream::connect(&options.control).with_context(|| {
        format!(
            "cannot reach the control socket {} (was the server started with --control?)",
            options.control.display()
        )
    })?;
    let request = match (options.number, options.state) {
        (Some(number), Some(state)) => format!("group {number} {}", state_name(state)),
        _ => "groups".to_owned(),
    };
    writeln!(&socket, "{request}").context("cannot ask the server")?;
    let mut answer = String::new();
    BufReader::new(&socket).read_line(&mut answer).context("no answer from the server")?;
    match answer.trim().strip_prefix("error: ") {
        Some(why) => anyhow::bail!("{why}"),
        None if answer.is_empty() => anyhow::bail!("no answer from the server"),
        None => println!("{}", answer.trim()),
    }
    Ok(())
}

/// The program.
pub(crate) fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let done = match &cli.command {
        Command::Serve(options) => serve(options, matches.subcommand_matches("serve").unwrap_or(&matches)),
        Command::Group(options) => group(options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("iscsi-target: {error:#}");
            ExitCode::FAILURE
        }
    }
}
