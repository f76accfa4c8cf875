//! [`Listener`]: the socket where programs on this host connect.
//!
//! A thread accepts; each set-up runs on a thread of its own against its deadline, so that one who connects and says
//! nothing keeps nobody waiting. Only those with the right user (by the kernel's word, `SO_PEERCRED`) get an answer. A
//! finished channel goes to the data thread through a mailbox.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use msgq::Channel;
use msgq::handshake::{Config, HandshakeError, Link, read_hello};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
};

use crate::mailbox::Mailbox;

/// Set-ups at a time; more wait in the socket's backlog.
const SETUPS: u32 = 8;
/// Connections that wait.
const BACKLOG: i32 = 32;

/// Who may connect, and what they get.
#[derive(Clone, Debug)]
pub struct ListenerOptions {
    /// Limits and features.
    pub config: Config,
    /// Users besides this process's own that may connect.
    pub users: Vec<u32>,
}

/// Counters of a listener.
#[derive(Debug, Default)]
pub struct ListenerStats {
    /// Channels that came about.
    pub accepted: AtomicU64,
    /// Connections of users that may not.
    pub refused: AtomicU64,
    /// Set-ups that failed: peers that were slow, or wrong.
    pub failed: AtomicU64,
}

/// A socket file that listens. Removed when this is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
}

impl Listener {
    /// Listens on `path`. A socket file that nobody listens on is replaced.
    ///
    /// # Errors
    /// The file cannot be made, or somebody listens there.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let address = SocketAddrUnix::new(path)?;
        let new = || socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let socket = new()?;
        if let Err(error) = bind(&socket, &address) {
            let in_use = error == Errno::ADDRINUSE;
            if !in_use || connect(new()?, &address) != Err(Errno::CONNREFUSED) {
                return Err(error.into());
            }
            std::fs::remove_file(path)?;
            bind(&socket, &address)?;
        }
        listen(&socket, BACKLOG)?;
        Ok(Self { socket, path: path.into() })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Accepts from here on, until the process ends. Channels arrive in the mailbox.
    ///
    /// # Errors
    /// No thread can be had.
    pub fn start(
        self,
        options: ListenerOptions,
        mailbox: Arc<Mailbox<Channel>>,
        stats: Arc<ListenerStats>,
    ) -> io::Result<Serving> {
        let path = self.path.clone();
        std::thread::Builder::new().name("msgq-accept".into()).spawn(move || {
            let running = Arc::new(AtomicU32::new(0));
            loop {
                let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
                match rustix::event::poll(&mut fds, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => {
                        tracing::error!(%error, "cannot wait for msgq clients any more");
                        return;
                    }
                }
                while running.load(Ordering::Acquire) >= SETUPS {
                    // Each of them ends at its deadline.
                    std::thread::park_timeout(Duration::from_millis(10));
                }
                let socket = match accept_with(&self.socket, SocketFlags::CLOEXEC) {
                    Ok(socket) => socket,
                    Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => continue,
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a msgq client");
                        std::thread::park_timeout(Duration::from_millis(10));
                        continue;
                    }
                };
                if !may_connect(&socket, &options.users) {
                    stats.refused.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                let (mailbox, counters) = (Arc::clone(&mailbox), Arc::clone(&stats));
                let (config, count) = (options.config.clone(), Arc::clone(&running));
                count.fetch_add(1, Ordering::AcqRel);
                let one = std::thread::Builder::new().name("msgq-setup".into()).spawn(move || {
                    match set_up(socket, &config) {
                        Ok(channel) => {
                            counters.accepted.fetch_add(1, Ordering::Relaxed);
                            mailbox.send(channel);
                        }
                        Err(error) => {
                            counters.failed.fetch_add(1, Ordering::Relaxed);
                            tracing::warn!(
                                error = crate::process::chain(&error),
                                "a msgq client was not set up"
                            );
                        }
                    }
                    count.fetch_sub(1, Ordering::AcqRel);
                });
                if one.is_err() {
                    running.fetch_sub(1, Ordering::AcqRel);
                    stats.failed.fetch_add(1, Ordering::Relaxed);
                }
            }
        })?;
        Ok(Serving { path })
    }
}

/// A listener that accepts. Dropping it removes the socket file.
#[derive(Debug)]
pub struct Serving {
    path: PathBuf,
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn set_up(socket: OwnedFd, config: &Config) -> Result<Channel, HandshakeError> {
    let link = Link::new(socket)?;
    let hello = read_hello(&link, Instant::now() + config.deadline)?;
    Channel::accept(link, hello, config, &[])
}

/// This process's own user, root, and those that were named.
fn may_connect(socket: impl AsFd, users: &[u32]) -> bool {
    let Ok(peer) = rustix::net::sockopt::socket_peercred(socket) else { return false };
    let user = peer.uid.as_raw();
    user == 0 || peer.uid == rustix::process::geteuid() || users.contains(&user)
}
