//! What a session is opened with, and the command line arguments for it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};

use super::engine::MAX_PATHS;
use super::net::{Network, Tcp};
use super::probe::UnitId;
use crate::recorder::StoreOptions;
use crate::url::{Secret, Url, is_iscsi_name};

/// Initiator name of last resort: the part behind the colon names this program.
const FALLBACK_INITIATOR: &str = "iqn.2026-01.io.vcp:initiator";
/// Where Linux systems keep the host's initiator name.
const SYSTEM_INITIATOR_FILE: &str = "/etc/iscsi/initiatorname.iscsi";

/// A digest as a user asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum, serde::Serialize, serde::Deserialize)]
pub enum DigestChoice {
    /// CRC32C; a target that cannot is refused.
    Crc32c,
    /// No digest if the target agrees, CRC32C if it insists.
    #[default]
    None,
}

/// How commands are spread over paths that are equally good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, ValueEnum, serde::Serialize, serde::Deserialize)]
pub enum PathPolicy {
    /// A few commands to each in turn
    RoundRobin,
    /// Each command to the path with the fewest underway
    #[default]
    LeastQueue,
}

/// A CHAP name and secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// CHAP_N.
    pub user: String,
    /// What the response is computed from.
    pub secret: Secret,
}

/// Time limits and back-off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timeouts {
    /// For the TCP connection, name resolution included.
    pub connect: Duration,
    /// From the connection to full feature phase.
    pub login: Duration,
    /// For a read or write; longer ones by nature get a multiple.
    pub command: Duration,
    /// For a task management function.
    pub task_management: Duration,
    /// A ping is sent after so long without anything received.
    pub nop_interval: Duration,
    /// A ping is answered within this time.
    pub nop_timeout: Duration,
    /// For a logout.
    pub logout: Duration,
    /// First pause between two attempts to get a session back.
    pub backoff_min: Duration,
    /// Longest such pause.
    pub backoff_max: Duration,
    /// How long a unit that answers BUSY, TASK SET FULL or NOT READY is asked again before the request fails.
    pub busy: Duration,
    /// How long requests wait for a target that is away before they fail; `None`: for ever.
    pub give_up: Option<Duration>,
    /// How often the unit's size is read, for targets that do not tell of a change; `None`: never.
    pub size_check: Option<Duration>,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            login: Duration::from_secs(10),
            command: Duration::from_secs(30),
            task_management: Duration::from_secs(5),
            nop_interval: Duration::from_secs(5),
            nop_timeout: Duration::from_secs(5),
            logout: Duration::from_secs(2),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(5),
            busy: Duration::from_secs(60),
            give_up: None,
            size_check: Some(Duration::from_secs(60)),
        }
    }
}

/// What a session is opened with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Portal, target and logical unit.
    pub url: Url,
    /// Our iSCSI name.
    pub initiator: String,
    /// Who we are to the target.
    pub chap: Option<Credentials>,
    /// Who the target must be to us.
    pub mutual_chap: Option<Credentials>,
    /// Digest over headers.
    pub header_digest: DigestChoice,
    /// Digest over data.
    pub data_digest: DigestChoice,
    /// Time limits.
    pub timeouts: Timeouts,
    /// Commands at once.
    pub queue_depth: u16,
    /// Present the unit as read-only.
    pub read_only: bool,
    /// Tells apart several sessions of this initiator with the same unit, such as two devices or a one-off command
    /// beside a running device. It is part of the ISID: a session with the same one *replaces* the other
    /// (RFC 7143 6.3.5), which is what a restarted program wants and nobody else does.
    pub instance: String,
    /// This ISID instead of the derived one ([`isid`](Self::isid)): to log in by another portal in the name of a session.
    pub fixed_isid: Option<[u8; 6]>,
    /// Further ways to the unit, besides `url`.
    pub paths: Vec<Url>,
    /// Sessions with each portal, at least 1.
    pub sessions: u16,
    /// How commands are spread over paths that are equally good.
    pub path_policy: PathPolicy,
    /// The unit that it must be.
    pub unit_id: Option<UnitId>,
    /// Where captures of the last PDUs go, if anywhere.
    pub recorder: Option<StoreOptions>,
    /// What connections are made of.
    pub network: Arc<dyn Network>,
    /// Seeds the jitter of pauses, nothing else: any number that differs between programs will do, and the same one
    /// where runs are to be repeatable.
    pub jitter_seed: u64,
}

impl Options {
    /// Default options for a URL: its credentials, no digests.
    pub fn new(url: Url) -> Self {
        let chap =
            url.user.clone().zip(url.password.clone()).map(|(user, secret)| Credentials { user, secret });
        Self {
            url,
            initiator: system_initiator_name().unwrap_or_else(|| FALLBACK_INITIATOR.to_owned()),
            chap,
            mutual_chap: None,
            header_digest: DigestChoice::None,
            data_digest: DigestChoice::None,
            timeouts: Timeouts::default(),
            queue_depth: 128,
            read_only: false,
            instance: String::new(),
            fixed_isid: None,
            paths: Vec::new(),
            sessions: 1,
            path_policy: PathPolicy::default(),
            unit_id: None,
            recorder: None,
            network: Arc::new(Tcp),
            jitter_seed: u64::from(std::process::id()),
        }
    }

    /// The options of each path: those of this unit with the path's own URL, and credentials if it has any. Several
    /// sessions with the same portal have instance names of their own, so that the ISID of every path differs from the
    /// others', and is the same after every restart, whatever the order. At most [`MAX_PATHS`].
    pub fn each_path(&self) -> Vec<Arc<Self>> {
        let mut paths: Vec<Arc<Self>> = Vec::new();
        for url in std::iter::once(&self.url).chain(&self.paths) {
            for _ in 0..self.sessions.max(1) {
                if paths.len() >= MAX_PATHS {
                    tracing::warn!(url = %self.url, "only the first {MAX_PATHS} paths are used");
                    return paths;
                }
                let same = |other: &&Arc<Self>| other.url.without_secrets() == url.without_secrets();
                let session = paths.iter().filter(same).count();
                let mut path = self.clone();
                path.instance = session_instance(&self.instance, session);
                if let Some((user, password)) = url.user.clone().zip(url.password.clone()) {
                    path.chap = Some(Credentials { user, secret: password });
                }
                path.url = url.clone();
                path.paths.clear();
                path.sessions = 1;
                paths.push(Arc::new(path));
            }
        }
        paths
    }

    /// The initiator session identifier's six bytes: of the random format (RFC 7143 11.12.5), but derived from who
    /// talks to what, so that it is the same after every restart.
    pub fn isid(&self) -> [u8; 6] {
        if let Some(isid) = self.fixed_isid {
            return isid;
        }
        let lun = self.url.lun.unwrap_or_default();
        // FNV-1a: stable for ever, and nobody gains by a collision but the owner of these names.
        let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
        let parts = [
            self.initiator.as_bytes(),
            self.url.target.as_deref().unwrap_or_default().as_bytes(),
            self.url.portal.host.as_bytes(),
            &self.url.portal.port.to_be_bytes(),
            &lun.0,
            self.instance.as_bytes(),
        ];
        for part in parts {
            for &byte in part.iter().chain(&[0xFF]) {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        }
        let h = (hash ^ hash >> 40).to_be_bytes();
        [0x80, h[3], h[4], h[5], h[6], h[7]]
    }
}

/// The name of one session of several with the same portal.
fn session_instance(instance: &str, session: usize) -> String {
    // The first one has the name that it would have alone.
    if session == 0 { instance.to_owned() } else { format!("{instance}#{session}") }
}

/// The `InitiatorName=` of the host, if it has one.
fn system_initiator_name() -> Option<String> {
    let text = fs::read_to_string(SYSTEM_INITIATOR_FILE).ok()?;
    let name = text.lines().find_map(|line| line.trim().strip_prefix("InitiatorName="))?.trim();
    is_iscsi_name(name).then(|| name.to_owned())
}

/// Arguments of all commands that open a session.
#[derive(Args, Clone, Debug, Default)]
pub struct SessionArgs {
    /// CHAP user name (instead of one in the URL)
    #[arg(long, value_name = "USER", requires = "chap_secret_file")]
    pub chap_user: Option<String>,
    /// File with the CHAP secret; a line end behind it does not count
    #[arg(long, value_name = "FILE")]
    pub chap_secret_file: Option<PathBuf>,
    /// Name under which the target must prove itself (mutual CHAP)
    #[arg(long, value_name = "USER", requires = "mutual_chap_secret_file")]
    pub mutual_chap_user: Option<String>,
    /// File with the target's secret
    #[arg(long, value_name = "FILE", requires = "mutual_chap_user")]
    pub mutual_chap_secret_file: Option<PathBuf>,
    /// iSCSI name of this initiator (default: the host's, from /etc/iscsi/initiatorname.iscsi)
    #[arg(long, value_name = "IQN")]
    pub initiator_name: Option<String>,
    /// CRC32C over PDU headers
    #[arg(long, value_name = "DIGEST", value_enum, default_value_t)]
    pub header_digest: DigestChoice,
    /// CRC32C over PDU data
    #[arg(long, value_name = "DIGEST", value_enum, default_value_t)]
    pub data_digest: DigestChoice,
    /// Time limit for connecting [default: 5000]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    pub connect_timeout_ms: Option<u64>,
    /// Time limit for logging in [default: 10000]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    pub login_timeout_ms: Option<u64>,
    /// Time limit for a command before it is aborted and repeated [default: 30000]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    pub command_timeout_ms: Option<u64>,
    /// Pause after which an idle connection is probed with a ping, and time for its answer [default: 5000]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    pub keepalive_ms: Option<u64>,
    /// How often the size is asked for, in case the target does not tell of a change; 0: never [default: 60]
    #[arg(long, value_name = "S")]
    pub size_check_s: Option<u64>,
}

impl SessionArgs {
    /// Options for `url` with these arguments.
    ///
    /// # Errors
    /// A secret file cannot be read or is empty, a name is not an iSCSI name, or credentials contradict each other.
    pub fn options(&self, url: Url) -> anyhow::Result<Options> {
        let mut options = Options::new(url);
        if let Some(name) = &self.initiator_name {
            if !is_iscsi_name(name) {
                bail!("--initiator-name {name:?} is not an iSCSI name (iqn.YYYY-MM.DOMAIN:ID)");
            }
            options.initiator.clone_from(name);
        }
        if let Some(path) = &self.chap_secret_file {
            let user = self.chap_user.clone().or_else(|| options.url.user.clone());
            let Some(user) = user else {
                bail!("--chap-secret-file needs --chap-user (or a user in the URL)");
            };
            options.chap = Some(Credentials { user, secret: read_secret(path)? });
        } else if let Some(user) = &options.url.user
            && options.url.password.is_none()
        {
            bail!("the URL has the user {user:?} but no password; give --chap-secret-file");
        }
        if let (Some(user), Some(path)) = (&self.mutual_chap_user, &self.mutual_chap_secret_file) {
            if options.chap.is_none() {
                bail!(
                    "mutual CHAP needs CHAP in the other direction as well; give --chap-user and --chap-secret-file"
                );
            }
            options.mutual_chap = Some(Credentials { user: user.clone(), secret: read_secret(path)? });
        }
        options.header_digest = self.header_digest;
        options.data_digest = self.data_digest;
        let ms = |given: Option<u64>, default| given.map_or(default, Duration::from_millis);
        let timeouts = &mut options.timeouts;
        timeouts.connect = ms(self.connect_timeout_ms, timeouts.connect);
        timeouts.login = ms(self.login_timeout_ms, timeouts.login);
        timeouts.command = ms(self.command_timeout_ms, timeouts.command);
        timeouts.nop_interval = ms(self.keepalive_ms, timeouts.nop_interval);
        timeouts.nop_timeout = ms(self.keepalive_ms, timeouts.nop_timeout);
        if let Some(seconds) = self.size_check_s {
            timeouts.size_check = (seconds > 0).then(|| Duration::from_secs(seconds));
        }
        Ok(options)
    }
}

/// Reads a secret; warns if others may read it, too.
fn read_secret(path: &Path) -> anyhow::Result<Secret> {
    let failed = || format!("cannot read the secret file {}", path.display());
    let text = fs::read_to_string(path).with_context(failed)?;
    let metadata = fs::metadata(path).with_context(failed)?;
    if metadata.is_file() && metadata.permissions().mode() & 0o077 != 0 {
        tracing::warn!(file = %path.display(), "secret file is accessible for others; chmod 600 it");
    }
    let secret = text.strip_suffix('\n').unwrap_or(&text);
    let secret = secret.strip_suffix('\r').unwrap_or(secret);
    if secret.is_empty() {
        bail!("the secret file {} is empty", path.display());
    }
    Ok(Secret::new(secret.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn options(url: &str) -> Options {
        Options::new(url.parse().unwrap())
    }

    #[test]
    fn isid_is_stable_and_tells_apart() {
        let mut one = options("iscsi://host/iqn.a:b/0");
        one.initiator = "iqn.x:y".into();
        // This very value must never change: a restarted program would not reinstate its old session.
        assert_eq!(one.isid(), one.clone().isid());
        assert_eq!(one.isid()[0], 0x80);
        let variants = [
            options("iscsi://host/iqn.a:b/1"),
            options("iscsi://host:1/iqn.a:b/0"),
            options("iscsi://other/iqn.a:b/0"),
            options("iscsi://host/iqn.a:c/0"),
        ];
        for mut other in variants {
            other.initiator.clone_from(&one.initiator);
            assert_ne!(one.isid(), other.isid(), "{}", other.url);
        }
        let mut other = one.clone();
        other.instance = "second".into();
        assert_ne!(one.isid(), other.isid());
    }

    #[test]
    fn secrets_come_from_files_without_the_line_end() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "twelve bytes and more").unwrap();
        let args = SessionArgs {
            chap_user: Some("alice".into()),
            chap_secret_file: Some(file.path().to_owned()),
            ..SessionArgs::default()
        };
        let options = args.options("iscsi://host/iqn.a:b/0".parse().unwrap()).unwrap();
        let chap = options.chap.unwrap();
        assert_eq!((chap.user.as_str(), chap.secret.reveal()), ("alice", "twelve bytes and more"));
        assert!(!format!("{chap:?}").contains("twelve"));
    }

    #[test]
    fn contradictions_are_refused() {
        let args = SessionArgs::default();
        assert!(args.options("iscsi://alice@host/iqn.a:b/0".parse().unwrap()).is_err());
        let args = SessionArgs { initiator_name: Some("me".into()), ..SessionArgs::default() };
        assert!(args.options("iscsi://host/iqn.a:b/0".parse().unwrap()).is_err());
    }
}
