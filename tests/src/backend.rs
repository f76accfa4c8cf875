//! vhost-user-blk backends: ours and qemu-storage-daemon's.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use crate::Result;
use crate::proc::{Cmd, Proc, Stream};
use crate::target::Target;
use crate::tool;

/// How long a backend may take until it serves.
pub const START: Duration = Duration::from_secs(20);

/// A running backend with one socket.
#[derive(Debug)]
pub struct Backend {
    proc: Proc,
    socket: PathBuf,
    _dir: TempDir,
}

impl Backend {
    /// Starts `vcp-iscsi serve` for a URL, with further arguments.
    pub fn vcp_iscsi(url: &str, args: &[&str]) -> Result<Self> {
        let (dir, socket) = socket()?;
        let proc = serve(&socket)?.env("RUST_LOG", "info").args(args).arg(url).spawn()?;
        proc.wait_line(Stream::Out, "ready:", START)?;
        Ok(Self { proc, socket, _dir: dir })
    }

    /// Starts qemu-storage-daemon with its iSCSI driver for a disk of a target. It writes through, so that what it
    /// acknowledges is comparable (see defect E in the project's notes on write caches).
    pub fn qsd(target: &Target, index: usize, queues: u16) -> Result<Self> {
        let (dir, socket) = socket()?;
        let lun = target.luns()[index].number;
        let pid_file = dir.path().join("qsd.pid");
        let proc = Cmd::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!(
                "driver=iscsi,node-name=disk,transport=tcp,portal={},target={},lun={lun}",
                target.portal(),
                target.iqn()
            ))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={queues},addr.type=unix,\
                 addr.path={}",
                socket.display()
            ))
            .arg("--pidfile")
            .arg(&pid_file)
            .spawn()?;
        // It prints nothing; the pid file is written when everything on its command line is done.
        let end = std::time::Instant::now() + START;
        while !pid_file.exists() {
            if !proc.is_running() || std::time::Instant::now() > end {
                anyhow::bail!("qemu-storage-daemon did not get ready: {}", proc.tail());
            }
            std::thread::yield_now();
        }
        Ok(Self { proc, socket, _dir: dir })
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process.
    pub fn proc(&self) -> &Proc {
        &self.proc
    }
}

/// `vcp-iscsi serve` on a socket, without the URL: for tests that expect it to fail.
pub fn serve(socket: &Path) -> Result<Cmd> {
    Ok(Cmd::new(tool::ours("vcp-iscsi")?).args(["serve", "--exit-with-parent", "--socket-path"]).arg(socket))
}

fn socket() -> Result<(TempDir, PathBuf)> {
    let dir = tempfile::Builder::new().prefix("vcp-backend-").tempdir()?;
    let socket = dir.path().join("blk.sock");
    Ok((dir, socket))
}
