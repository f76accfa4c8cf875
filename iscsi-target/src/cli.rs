//! Options, start and end of the program.

use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{ArgAction, ArgMatches, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use iscsi::chap;
use iscsi_target::config::{
    Config, DigestChoice, LunConfig, PollMode, SessionConfig, TargetConfig, parse_size,
};
use iscsi_target::server::Server;
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
}

const SERVE_EXAMPLE: &str = "\
Example:
  iscsi-target serve --listen 127.0.0.1:3260 --target iqn.2026-01.org.example:disks \\
      --lun mem:1G --lun file:disk.img,read-only --chap alice:a-long-secret

LUN specification: mem:SIZE or file:PATH, then any of
  ,read-only  ,block-size=512|4096  ,write-cache=on|off  ,lun=NUMBER
LUNs are numbered from 0 in the order given, unless lun= says otherwise. --lun and the --chap options belong to the
last --target before them.";

#[derive(Debug, Args)]
struct Serve {
    /// Address and port to listen on; port 0 takes a free one.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:3260")]
    listen: SocketAddr,
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
        Ok(Config {
            listen: self.listen,
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
    println!("ready: addr={} target={names} luns={}", server.addr(), server.unit_count());
    std::io::stdout().flush().context("cannot write to standard output")?;
    server.run(&stop)?;
    Ok(())
}

/// The program.
pub(crate) fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let Command::Serve(options) = &cli.command;
    let sub = matches.subcommand_matches("serve").unwrap_or(&matches);
    match serve(options, sub) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("iscsi-target: {error:#}");
            ExitCode::FAILURE
        }
    }
}
