//! The command line of `vcp-iscsi`.

use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::NonEmptyStringValueParser;
use clap::error::{ContextKind, ContextValue};
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use vcp_core::handover::upgrade::UpgradeArgs;
use vcp_core::http::Endpoint;
use vcp_core::poll::{PollMode, Share};
use vcp_core::process::confine::Mode as ConfineMode;
use vcp_core::uring::IoMode;

use crate::capabilities;
use crate::dial::server::DialArgs;
use crate::discover::DiscoverArgs;
use crate::handover::take_over::TakeOverArgs;
use crate::info::InfoArgs;
use crate::limit::{Limits, Rate, parse_size};
use crate::paths::{PathArgs, PathSpec};
use crate::portal::SessionArgs;
use crate::url::Url;

/// Most queues of a device: more than a guest with a single disk process can make use of.
const MAX_QUEUES: u16 = 64;

/// iSCSI disks as vhost-user-blk devices.
#[derive(Debug, Parser)]
#[command(version, about, long_about = None, max_term_width = 110)]
pub struct Cli {
    /// What to log on standard error: error, warn, info, debug, trace, or a filter [default: $RUST_LOG, else warn]
    #[arg(long, global = true, value_name = "LEVEL", value_parser = NonEmptyStringValueParser::new())]
    pub log: Option<String>,
    /// Print what this program can as a vhost-user backend, in JSON, and end; everything else is ignored
    #[arg(long)]
    pub print_capabilities: bool,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)] // There is one of it in a process.
pub enum Command {
    /// Serve logical units as vhost-user-blk devices
    Serve(ServeArgs),
    /// List the targets of a portal and their logical units
    Discover(DiscoverArgs),
    /// Tell what a logical unit is and what was negotiated with its target
    Info(InfoArgs),
    /// Replace a running `serve` by a newer program, under load
    #[command(after_help = "Example:\n  \
        vcp-iscsi serve --socket-path /run/disk0 --control /run/disk0.ctl iscsi://192.0.2.7/iqn.2001-04.com.example:disk/0\n  \
        install -m 755 new/vcp-iscsi /usr/bin/vcp-iscsi && vcp-iscsi upgrade --control /run/disk0.ctl")]
    Upgrade(UpgradeArgs),
    /// Take over from a running `serve`: what `upgrade` starts, and a monitor may start itself
    TakeOver(TakeOverArgs),
    /// Connect for a `serve` that has no network: what a monitor starts beside it
    Dial(DialArgs),
}

impl Cli {
    /// Whether a password stands in an argument, where every user of the host can read it as long as the process lives.
    #[must_use]
    pub fn shows_a_password(&self) -> bool {
        let shows = |url: &Url| url.password.is_some();
        match &self.command {
            Command::Serve(args) => args.disks().unwrap_or_default().iter().any(|disk| shows(&disk.url)),
            Command::Discover(args) => shows(&args.url),
            Command::Info(args) => shows(&args.url),
            #[allow(unreachable_patterns)] // Other commands name no unit.
            _ => false,
        }
    }
}

/// Reads the command line; ends the process on wrong usage, `--help`, `--version` and `--print-capabilities`.
#[must_use]
pub fn parse() -> Cli {
    let args: Vec<_> = std::env::args_os().collect();
    // Before anything is checked: the conventions want whatever else is given to be ignored.
    if args.iter().skip(1).any(|arg| arg == "--print-capabilities") {
        println!("{}", capabilities::text());
        std::process::exit(0);
    }
    let args = capabilities::with_command(args);
    Cli::try_parse_from(args).unwrap_or_else(|error| without_secret(error).exit())
}

/// `clap` repeats a value that it refuses; one that is a URL may hold a password.
fn without_secret(mut error: clap::Error) -> clap::Error {
    let of_url = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(arg)) => arg.contains("URL"),
        _ => false,
    };
    if of_url && error.get(ContextKind::InvalidValue).is_some() {
        error.insert(ContextKind::InvalidValue, ContextValue::String("...".into()));
    }
    error
}

/// Which server runs the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ServerKind {
    /// One polling thread for all devices
    #[default]
    Poll,
    /// Event-driven threads of the vhost-user-backend crate
    Epoll,
}

/// Arguments of `serve`.
#[derive(Args, Debug)]
#[command(
    override_usage = "vcp-iscsi serve --socket-path SOCKET URL [OPTIONS]\n       \
                      vcp-iscsi serve --disk socket=SOCKET,url=URL... [OPTIONS]",
    group = ArgGroup::new("front").multiple(true),
    after_help = "Example:\n  \
        vcp-iscsi serve --socket-path /run/disk0 iscsi://192.0.2.7/iqn.2001-04.com.example:disk/0\n  \
        qemu-system-x86_64 -M q35,memory-backend=m -object memory-backend-memfd,id=m,size=2G \\\n    \
        -chardev socket,id=c,path=/run/disk0,reconnect=1 -device vhost-user-blk-pci,chardev=c ..."
)]
pub struct ServeArgs {
    /// The unit: `iscsi://[USER[%PASSWORD]@]HOST[:PORT]/TARGET-IQN/LUN`
    #[arg(value_name = "URL", conflicts_with_all = ["url_file", "disk"], requires = "front")]
    pub url: Option<Private>,
    /// Read the URL from this file (or /dev/fd/N), so that a secret in it stays out of the process list; further lines are
    /// further ways to the unit, as --path
    #[arg(long, value_name = "FILE", conflicts_with = "disk", requires = "front")]
    pub url_file: Option<PathBuf>,
    /// Unix socket to listen on for the monitor
    #[arg(long, value_name = "SOCKET", group = "front", conflicts_with = "disk")]
    pub socket_path: Option<PathBuf>,
    /// The descriptor that this process was started with is the socket: one that listens, or one that the monitor is
    /// connected to (the process then ends with that connection)
    #[arg(long, value_name = "FDNUM", group = "front", conflicts_with_all = ["disk", "socket_path"])]
    pub fd: Option<i32>,
    /// Unix socket where programs of this host reach the unit without a virtual machine, by the msgq-blk crate; it has a
    /// session of its own
    #[arg(long, value_name = "SOCKET", group = "front", conflicts_with = "disk")]
    pub msgq_path: Option<PathBuf>,
    /// The same on a descriptor that this process was started with: a SOCK_SEQPACKET Unix socket that listens (whoever
    /// started it keeps the file, and clients wait there while it is started again), or a seat, on which a monitor sends the
    /// sockets of clients
    #[arg(long, value_name = "FDNUM", group = "front", conflicts_with_all = ["disk", "msgq_path"])]
    pub msgq_fd: Option<i32>,
    /// One of several devices: `socket=SOCKET,url=URL[,read-only][,queues=N]`, and its own limits:
    /// `[,limit-iops=N[,limit-iops-burst=N]][,limit-bps=SIZE[,limit-bps-burst=SIZE]]`, and its own paths:
    /// `[,path=URL]...[,paths=all][,sessions=N][,unit-id=ID]`
    #[arg(long, value_name = "SPEC", required_unless_present_any = ["url", "url_file"])]
    pub disk: Vec<Private>,
    /// Refuse all writes
    #[arg(long)]
    pub read_only: bool,
    /// Virtqueues of each device
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=MAX_QUEUES as i64))]
    pub queues: u16,
    /// Hardware thread for the data path
    #[arg(long, value_name = "N")]
    pub cpu: Option<usize>,
    /// Microseconds that an idle data thread looks before it sleeps; 0: sleeps at once, `always`: never sleeps
    #[arg(long, value_name = "N|always", default_value = "adaptive")]
    pub poll_us: PollMode,
    /// How the data thread sends, receives, signals and waits
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub io: IoMode,
    /// Percent of its time that an idle data thread may look at most; the rest goes back to the host
    #[arg(long, value_name = "PERCENT", default_value_t)]
    pub poll_share: Share,
    /// What runs the devices
    #[arg(long, value_enum, default_value_t)]
    pub server: ServerKind,
    /// Unix socket for commands, one JSON object per line: {"cmd":"status"}, {"cmd":"metrics"}, {"cmd":"limit",...}, ...
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
    /// The same on a socket that listens already, which this process was started with as descriptor FDNUM
    #[arg(long, value_name = "FDNUM", conflicts_with = "control")]
    pub control_fd: Option<i32>,
    /// For a supervisor: the page into which the data thread counts what it does (a sealed memfd)
    #[arg(long, value_name = "FDNUM")]
    pub pulse_fd: Option<i32>,
    /// For a supervisor: do everything up to the login, say `standby:`, and wait for a byte on this descriptor; its end is
    /// the end
    #[arg(long, value_name = "FDNUM")]
    pub standby_fd: Option<i32>,
    /// For a supervisor: this process has no network, and whoever has the other end of this channel (a `vcp-iscsi dial`)
    /// connects for it
    #[arg(long, value_name = "FDNUM")]
    pub dial_fd: Option<i32>,
    /// Serve a page of metrics for Prometheus there: http://ADDRESS:PORT/metrics, or over a Unix socket
    #[arg(long, value_name = "ADDRESS:PORT|unix:PATH")]
    pub metrics: Option<Endpoint>,
    /// Most requests per second for each device, and how many may come at once [default burst: a tenth of it]
    #[arg(long, value_name = "N[,burst=N]")]
    pub limit_iops: Option<Rate>,
    /// Most bytes per second for each device (K, M, G), and how many may come at once [default burst: a tenth of it]
    #[arg(long, value_name = "SIZE[,burst=SIZE]")]
    pub limit_bps: Option<Rate>,
    /// Write the last PDUs of a session to files in this directory (pcapng, for tshark; made if it is missing) when a target
    /// breaks a rule, a command takes too long or a session is lost, and when asked to: {"cmd":"dump"}
    #[arg(long, value_name = "DIR")]
    pub recorder_dir: Option<PathBuf>,
    /// Leave the beginnings of the data, which are the guest's, out of these files
    #[arg(long, requires = "recorder_dir")]
    pub recorder_headers_only: bool,
    /// Fail requests when the target was away for so many seconds, until it is back [default: they wait]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub give_up_s: Option<u64>,
    /// Give up rights that are not needed: files, ports, processes, system calls, memory
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub confine: ConfineMode,
    /// End when the process that started this one ends
    #[arg(long)]
    pub exit_with_parent: bool,
    /// What the disk is to its target: a process started with the same text takes over the session of the one before
    /// [default: the socket's path]
    #[arg(long, value_name = "TEXT", conflicts_with = "disk", value_parser = NonEmptyStringValueParser::new())]
    pub instance: Option<String>,
    /// Several ways to a unit.
    #[command(flatten)]
    pub paths: PathArgs,
    /// How to log in.
    #[command(flatten)]
    pub session: SessionArgs,
}

/// An argument that may hold a secret: parsed later, because `clap` would repeat it in its message.
#[derive(Clone)]
pub struct Private(String);

impl FromStr for Private {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for Private {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("...")
    }
}

impl Private {
    /// As an iSCSI URL.
    ///
    /// # Errors
    /// What is wrong with it, without repeating it.
    pub fn url(&self) -> Result<Url, String> {
        self.0.parse().map_err(|error| vcp_core::process::chain(&error))
    }
}

impl ServeArgs {
    /// Where the front end of the only device comes from: a path, or what stands for one, and a descriptor.
    #[must_use]
    pub fn front(&self) -> Option<(PathBuf, Option<i32>)> {
        match (&self.socket_path, self.fd) {
            (Some(path), _) => Some((path.clone(), None)),
            (None, Some(fd)) => Some((format!("fd:{fd}").into(), Some(fd))),
            (None, None) => None,
        }
    }

    /// The devices named on the command line itself (not by `--url-file`).
    ///
    /// # Errors
    /// Wrong usage, in words for the user.
    pub fn disks(&self) -> Result<Vec<DiskSpec>, String> {
        match (&self.url, self.front()) {
            (Some(url), Some((socket, fd))) => {
                let paths = self.paths.spec()?;
                Ok(vec![DiskSpec { fd, paths, ..DiskSpec::new(socket, url.url()?) }])
            }
            (Some(url), None) => {
                // For msgq clients only; what is wrong with the URL is wrong usage all the same.
                self.paths.spec()?;
                url.url().map(|_| Vec::new())
            }
            _ => {
                // With --url-file, they are taken later.
                self.paths.spec()?;
                let spec = |text: &Private| text.0.parse().map_err(|error| format!("--disk: {error}"));
                self.disk.iter().map(spec).collect()
            }
        }
    }
}

/// `--disk`: one device of several.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// Socket to listen on.
    pub socket: PathBuf,
    /// The descriptor that is the socket, in place of a path.
    pub fd: Option<i32>,
    /// The unit.
    pub url: Url,
    /// Refuse all writes.
    pub read_only: bool,
    /// Virtqueues, if other than `--queues`.
    pub queues: Option<u16>,
    /// Limits, each if other than `--limit-iops` and `--limit-bps`.
    pub limits: Limits,
    /// Ways to the unit besides the URL.
    pub paths: PathSpec,
}

impl DiskSpec {
    /// A device with what the other options say.
    #[must_use]
    pub fn new(socket: PathBuf, url: Url) -> Self {
        Self {
            socket,
            fd: None,
            url,
            read_only: false,
            queues: None,
            limits: Limits::default(),
            paths: PathSpec::default(),
        }
    }
}

/// A limit and its burst as they are read from a specification.
#[derive(Default)]
struct LimitSpec {
    rate: Option<u64>,
    burst: Option<u64>,
}

impl LimitSpec {
    fn build(self, key: &str) -> Result<Option<Rate>, String> {
        match self {
            Self { rate: Some(rate), burst } => {
                Rate::new(rate, burst).map(Some).map_err(|error| format!("{key}: {error}"))
            }
            Self { rate: None, burst: Some(_) } => Err(format!("{key}-burst needs {key}")),
            _ => Ok(None),
        }
    }
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut socket, mut url, mut read_only, mut queues) = (None, None, false, None);
        let (mut iops, mut bps) = (LimitSpec::default(), LimitSpec::default());
        let mut paths = PathSpec::default();
        for part in text.split(',') {
            let (key, value) = part.split_once('=').map_or((part, None), |(key, value)| (key, Some(value)));
            let twice = || format!("`{key}` is given twice");
            match (key, value) {
                ("socket", Some(path)) if !path.is_empty() => {
                    if socket.replace(PathBuf::from(path)).is_some() {
                        return Err(twice());
                    }
                }
                ("url", Some(value)) => {
                    let parsed = Private(value.to_owned()).url()?;
                    if url.replace(parsed).is_some() {
                        return Err(twice());
                    }
                }
                ("read-only", None) => read_only = true,
                ("queues", Some(count)) => {
                    let count = count.parse().ok().filter(|count| (1..=MAX_QUEUES).contains(count));
                    queues = Some(count.ok_or(format!("queues must be 1 to {MAX_QUEUES}"))?);
                }
                ("limit-iops" | "limit-iops-burst" | "limit-bps" | "limit-bps-burst", Some(size)) => {
                    let limit = if key.starts_with("limit-iops") { &mut iops } else { &mut bps };
                    let number = if key.ends_with("-burst") { &mut limit.burst } else { &mut limit.rate };
                    let size =
                        parse_size(size).map_err(|_| format!("{key} must be a number or a size, as 100M"))?;
                    if number.replace(size).is_some() {
                        return Err(twice());
                    }
                }
                (key, value) if paths.take(key, value)? => {}
                // The part may hold a piece of a secret (a comma in a password), so only its key is shown.
                _ => {
                    return Err(
                        "expected socket=SOCKET,url=URL[,read-only][,queues=N][,limit-iops=N][,limit-bps=SIZE][,path=URL]... \
                         [,paths=all][,sessions=N][,unit-id=ID] \
                         (write a comma inside the URL as %2C)"
                            .into(),
                    );
                }
            }
        }
        let limits = Limits { iops: iops.build("limit-iops")?, bps: bps.build("limit-bps")? };
        match (socket, url) {
            (Some(socket), Some(url)) => Ok(Self { fd: None, socket, url, read_only, queues, limits, paths }),
            (None, _) => Err("socket=SOCKET is missing".into()),
            (_, None) => Err("url=URL is missing".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    const URL: &str = "iscsi://127.0.0.1/iqn.2001-04.com.example:disk/0";

    fn serve(args: &[&str]) -> Result<ServeArgs, clap::Error> {
        let args = ["vcp-iscsi", "serve"].iter().chain(args);
        let Command::Serve(args) = Cli::try_parse_from(args)?.command else { panic!("not serve") };
        Ok(args)
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_stand_before_or_after_and_with_or_without_equals() {
        let one = serve(&["--socket-path", "/s", URL, "--poll-us=always", "--queues=2"]).unwrap();
        let two = serve(&[URL, "--queues", "2", "--poll-us", "always", "--socket-path=/s"]).unwrap();
        for args in [one, two] {
            assert_eq!((args.queues, args.poll_us), (2, PollMode::Always));
            assert_eq!(args.socket_path.as_deref(), Some("/s".as_ref()));
            assert!(args.url.is_some());
        }
        assert!(
            Cli::try_parse_from(["vcp-iscsi", "serve", "--log", "debug", "--socket-path", "/s", URL]).is_ok()
        );
    }

    #[test]
    fn several_devices_are_specified_one_by_one() {
        let first = format!("socket=/a,url={URL}");
        let second = format!("url={URL},read-only,socket=/b,queues=3");
        let disks = serve(&["--disk", &first, "--disk", &second]).unwrap().disks().unwrap();
        let [a, b] = &disks[..] else { panic!("two disks") };
        assert_eq!((a.socket.to_str(), a.read_only, a.queues), (Some("/a"), false, None));
        assert_eq!((b.socket.to_str(), b.read_only, b.queues), (Some("/b"), true, Some(3)));
    }

    #[test]
    fn a_descriptor_takes_the_place_of_the_path() {
        let disks = serve(&["--fd=3", URL]).unwrap().disks().unwrap();
        assert_eq!((disks[0].fd, disks[0].socket.to_str()), (Some(3), Some("fd:3")));
        assert!(serve(&["--fd", "3", "--url-file", "/f"]).is_ok());
    }

    #[test]
    fn limits_are_for_all_devices_or_for_one() {
        let args =
            serve(&["--socket-path", "/s", URL, "--limit-iops", "1000", "--limit-bps=10M,burst=1G"]).unwrap();
        assert_eq!(args.limit_iops, Rate::new(1000, None).ok());
        assert_eq!(args.limit_bps, Rate::new(10 << 20, Some(1 << 30)).ok());
        let spec = format!("limit-iops=50,socket=/a,url={URL},limit-bps=1M,limit-iops-burst=7");
        let disk: DiskSpec = spec.parse().unwrap();
        assert_eq!(disk.limits.iops, Rate::new(50, Some(7)).ok());
        assert_eq!(disk.limits.bps, Rate::new(1 << 20, None).ok());
    }

    #[test]
    fn wrong_usage_is_refused() {
        let disk = format!("socket=/a,url={URL}");
        for wrong in [
            &[][..],
            &[URL],
            &["--socket-path", "/s"],
            &["--socket-path", "/s", URL, "--disk", &disk],
            &["--socket-path", "/s", URL, "--url-file", "/f"],
            &["--socket-path", "/s", "http://nonsense"],
            &["--socket-path", "/s", URL, "--queues", "0"],
            &["--socket-path", "/s", URL, "--poll-us", "soon"],
            &["--disk", "socket=/a"],
            &["--disk", &disk.replace("/a", "")],
            &["--disk", &format!("{disk},wrong")],
            &["--disk", &format!("{disk},socket=/b")],
            &["--disk", &format!("{disk},queues=65")],
            &["--disk", &format!("{disk},path=nonsense")],
            &["--disk", &disk, "--path", URL],
            &["--socket-path", "/s", URL, "--path", "nonsense"],
            &["--socket-path", "/s", URL, "--sessions", "17"],
            &["--socket-path", "/s", URL, "--unit-id", "nonsense"],
            &["--disk", &format!("{disk},limit-iops=0")],
            &["--disk", &format!("{disk},limit-iops=1,limit-iops=2")],
            &["--disk", &format!("{disk},limit-bps-burst=1M")],
            &["--disk", &format!("{disk},limit-bps=fast")],
            &["--socket-path", "/s", "--fd", "3", URL],
            &["--fd", "three", URL],
            &["--fd", "3"],
            &["--fd", "3", "--disk", &disk],
            &["--socket-path", "/s", URL, "--limit-iops", "0"],
            &["--socket-path", "/s", URL, "--limit-bps", "1M,burst"],
            &["--socket-path", "/s", URL, "--metrics", "9100"],
        ] {
            let refused = serve(wrong).map_err(|error| error.to_string()).and_then(|args| args.disks());
            assert!(refused.is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_secret_is_not_repeated() {
        for command in ["discover", "info"] {
            let args = ["vcp-iscsi", command, "http://me%hush@host"];
            let error = without_secret(Cli::try_parse_from(args).unwrap_err()).render().to_string();
            assert!(error.contains("URL") && !error.contains("hush"), "{error}");
        }
        for wrong in [
            &["--disk", "socket=/a,url=iscsi://me%hush,hush@host/iqn.a:b/0"][..],
            &["--disk", "socket=/a,url=http://me%hush@host/iqn.a:b/0"],
            &["--disk", "socket=/a,url=iscsi://host/iqn.a:b/0,path=http://me%hush@host/iqn.a:b/0"],
            &["--socket-path", "/s", URL, "--path", "http://me%hush@host/iqn.a:b/0"],
            &["--socket-path", "/s", "http://me%hush@host/iqn.a:b/0"],
            &["--socket-path", "/s", "iscsi://me%hush@host/iqn.a:b/x"],
        ] {
            let args = serve(wrong).unwrap();
            assert!(!format!("{args:?}").contains("hush"));
            assert!(!args.disks().unwrap_err().contains("hush"), "{wrong:?}");
        }
    }
}
