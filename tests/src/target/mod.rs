//! iSCSI targets: tgtd, istgt and our own, started from one description.

mod istgt;
mod ours;
mod tgtd;

use std::fmt;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use tempfile::TempDir;

use crate::proc::Proc;
use crate::{Result, port, tool};

/// How long a target may take to start or to end.
pub const START: Duration = Duration::from_secs(20);
/// How often another port is tried when a target cannot take its own.
const PORT_TRIES: usize = 3;

/// Which program is the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Linux SCSI target framework, single-threaded, in user space.
    Tgtd,
    /// The BSD target by Daisuke Aoyama; many threads, no UNMAP.
    Istgt,
    /// `iscsi-target` of this workspace.
    Ours,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tgtd, Self::Istgt, Self::Ours];

    /// System programs that it needs.
    pub fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Tgtd => &["tgtd", "tgtadm"],
            Self::Istgt => &["istgt"],
            Self::Ours => &[],
        }
    }

    /// Number of the first LUN: tgtd keeps LUN 0 for its controller.
    pub fn first_lun(self) -> u64 {
        u64::from(self == Self::Tgtd)
    }

    /// Whether its disks take UNMAP.
    pub fn unmaps(self) -> bool {
        self != Self::Istgt
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tgtd => "tgtd",
            Self::Istgt => "istgt",
            Self::Ours => "iscsi-target",
        })
    }
}

/// A disk of a target, on a sparse file.
#[derive(Clone, Debug)]
pub struct LunSpec {
    /// Its number; `None`: the next one. istgt takes no gaps.
    pub number: Option<u64>,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Size of a logical block in bytes: 512 or 4096.
    pub block_bytes: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether it has a write cache; only our target can do without.
    pub write_cache: bool,
    /// An existing image in place of a new sparse file.
    pub image: Option<PathBuf>,
}

impl LunSpec {
    /// A writable disk with 512-byte blocks.
    pub fn new(size_bytes: u64) -> Self {
        Self { number: None, size_bytes, block_bytes: 512, read_only: false, write_cache: true, image: None }
    }
}

/// Who may log in: one-way CHAP, or mutual with the second pair.
#[derive(Clone, Debug)]
pub struct Chap {
    /// The initiator's name.
    pub user: String,
    /// The initiator's secret, 12 to 16 characters.
    pub secret: String,
    /// The target's name and secret.
    pub mutual: Option<(String, String)>,
}

impl Chap {
    /// One-way CHAP with a fixed, recognisable secret.
    pub fn one_way() -> Self {
        Self { user: "guestuser".into(), secret: "OneWaySecret42".into(), mutual: None }
    }

    /// Mutual CHAP with fixed, recognisable secrets.
    pub fn mutual() -> Self {
        Self { mutual: Some(("targetuser".into(), "MutualSecret43".into())), ..Self::one_way() }
    }
}

/// What a target has.
#[derive(Clone, Debug, Default)]
pub struct Spec {
    /// Its disks.
    pub luns: Vec<LunSpec>,
    /// Its login.
    pub chap: Option<Chap>,
    /// Whether it is told to take CRC32C digests. tgtd takes none otherwise, and always where it may; the others agree
    /// with what the initiator prefers.
    pub digests: bool,
}

impl Spec {
    /// One disk of this size, no CHAP.
    pub fn disk(size_bytes: u64) -> Self {
        Self::luns([LunSpec::new(size_bytes)])
    }

    /// These disks, no CHAP.
    pub fn luns(luns: impl IntoIterator<Item = LunSpec>) -> Self {
        Self { luns: luns.into_iter().collect(), ..Self::default() }
    }

    /// The same with CHAP.
    #[must_use]
    pub fn chap(mut self, chap: Chap) -> Self {
        self.chap = Some(chap);
        self
    }

    /// The same with digests or without.
    #[must_use]
    pub fn digests(mut self, digests: bool) -> Self {
        self.digests = digests;
        self
    }
}

/// A disk of a running target.
#[derive(Clone, Debug)]
pub struct Lun {
    /// Its number.
    pub number: u64,
    /// What was asked for.
    pub spec: LunSpec,
    /// The file that it is on.
    pub image: PathBuf,
}

/// A running target.
#[derive(Debug)]
pub struct Target {
    kind: Kind,
    iqn: String,
    portal: SocketAddr,
    spec: Spec,
    luns: Vec<Lun>,
    dir: TempDir,
    proc: Proc,
}

impl Target {
    /// Starts a target.
    pub fn start(kind: Kind, spec: &Spec) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("vcp-target-").tempdir()?;
        let mut luns = Vec::new();
        for lun in &spec.luns {
            let next = luns.last().map_or(kind.first_lun(), |l: &Lun| l.number + 1);
            let number = lun.number.unwrap_or(next);
            let image = match &lun.image {
                Some(image) => image.clone(),
                None => sparse(&dir.path().join(format!("lun{number}.img")), lun.size_bytes)?,
            };
            luns.push(Lun { number, spec: lun.clone(), image });
        }
        let iqn = "iqn.2026-01.test.vcp:disk".to_owned();
        let mut last = None;
        for _ in 0..PORT_TRIES {
            let portal = SocketAddr::from((Ipv4Addr::LOCALHOST, port::free()?));
            let config = Config { iqn: &iqn, portal, spec, luns: &luns, dir: dir.path() };
            match config.start(kind) {
                Ok(proc) => return Ok(Self { kind, iqn, portal, spec: spec.clone(), luns, dir, proc }),
                Err(e) => last = Some(e),
            }
        }
        Err(last.context("no port tried")?).with_context(|| format!("start the target {kind}"))
    }

    /// Kills it and starts it again on the same port and files.
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.start_again()
    }

    /// Kills it; its port is then closed.
    pub fn kill(&self) -> Result<()> {
        self.proc.kill()
    }

    /// Starts it on the same port and files after [`Target::kill`].
    pub fn start_again(&mut self) -> Result<()> {
        let config = Config {
            iqn: &self.iqn,
            portal: self.portal,
            luns: &self.luns,
            spec: &self.spec,
            dir: self.dir.path(),
        };
        self.proc = config.start(self.kind)?;
        Ok(())
    }

    /// Its program.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its process.
    pub fn proc(&self) -> &Proc {
        &self.proc
    }

    /// Its name.
    pub fn iqn(&self) -> &str {
        &self.iqn
    }

    /// Where it listens.
    pub fn portal(&self) -> SocketAddr {
        self.portal
    }

    /// Its disks.
    pub fn luns(&self) -> &[Lun] {
        &self.luns
    }

    /// URL of a disk, by its index, without CHAP.
    pub fn url(&self, index: usize) -> String {
        self.url_at(self.portal, index)
    }

    /// URL of a disk by way of another address (a proxy's).
    pub fn url_at(&self, portal: SocketAddr, index: usize) -> String {
        format!("iscsi://{portal}/{}/{}", self.iqn, self.luns[index].number)
    }

    /// Asks tgtd for the I_T nexuses and parameters of the target; empty for the others.
    pub fn show(&self) -> Result<String> {
        match self.kind {
            Kind::Tgtd => tgtd::show(self.dir.path()),
            _ => Ok(String::new()),
        }
    }
}

/// What a kind of target is started from.
struct Config<'a> {
    iqn: &'a str,
    portal: SocketAddr,
    spec: &'a Spec,
    luns: &'a [Lun],
    dir: &'a Path,
}

impl Config<'_> {
    fn start(&self, kind: Kind) -> Result<Proc> {
        match kind {
            Kind::Tgtd => tgtd::start(self),
            Kind::Istgt => istgt::start(self),
            Kind::Ours => ours::start(self),
        }
    }
}

/// Whether the programs of this kind are there; says so if not.
pub fn have(kind: Kind) -> bool {
    tool::have(kind.programs())
}

/// Makes a sparse file.
pub fn sparse(path: &Path, size_bytes: u64) -> Result<PathBuf> {
    let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    file.set_len(size_bytes).with_context(|| format!("set the size of {}", path.display()))?;
    Ok(path.to_owned())
}
