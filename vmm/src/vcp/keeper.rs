//! Keeps one vhost-user device supplied with a backend: watches it, starts or seeks another one when it is lost or stands
//! still, has the device go on with it, and replaces it when the user wants that. The guest runs all the while.
//!
//! What means what is [`super::life`]'s to say; here is the thread that hears (`work`) and acts (`act`): it waits for
//! descriptors and for time, and for nothing else. What has to wait for a backend is done by `super::attach`; what a backend says to itself
//! is read from its [pulse](vcp_core::pulse). A process that stands by, ready but for its login, makes the start of another
//! one short.

mod act;
mod work;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

use self::work::{STANDBY_AFTER, Work};
use super::attach::Attacher;
use super::backoff::Backoff;
use super::life::Life;
use super::process::VcpProcess;
use super::report::Board;
use super::spec::VcpSpec;
use super::watchdog::{LOOK_EVERY, Watchdog};
use crate::error::{Error, Result};
use crate::exit::ExitSignal;
use crate::machine::command::RateLimits;
use crate::machine::status::BackendStatus;
use crate::virtio::vhost_user::channel::Channel;
use crate::virtio::vhost_user::front::Front;

/// Where backends of a device come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Somebody else's process listens there.
    Socket(PathBuf),
    /// The monitor starts a `vcp-iscsi`: the program and what it is started with.
    Process(PathBuf, Box<VcpSpec>),
}

/// How something that was asked for ended.
pub type Reply = Box<dyn FnOnce(std::result::Result<(), String>) + Send>;

/// What is asked of a keeper.
enum Order {
    Pin(Vec<usize>, Reply),
    Limit(RateLimits, Reply),
    Restart(Reply),
    Upgrade(Reply),
    Stop,
}

/// The thread that keeps one device.
pub struct Keeper {
    orders: Sender<Order>,
    event: Arc<OwnedFd>,
    board: Arc<Board>,
    thread: Option<std::thread::JoinHandle<Option<VcpProcess>>>,
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper").finish_non_exhaustive()
    }
}

impl Keeper {
    /// Keeps the device `front`, which has a backend now: `process`, if it is one of ours.
    pub fn start(
        front: Arc<Front>,
        channel: Option<Channel>,
        source: Source,
        process: Option<VcpProcess>,
        exit: ExitSignal,
    ) -> Result<Self> {
        if matches!(source, Source::Process(..)) {
            // By a thread that is not confined yet.
            super::spawn::prepare();
        }
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let event = Arc::new(eventfd(0, flags).map_err(Error::os("create an eventfd"))?);
        if let Some(process) = &process {
            front.set_process(Some(process.try_clone_pidfd()?));
        }
        let stream = front.stream()?;
        let (orders, received) = self::channel();
        let (ours, patience) = match &source {
            Source::Socket(_) => (false, super::watchdog::PATIENCE),
            Source::Process(_, vcp) => (true, vcp.patience),
        };
        let now = Instant::now();
        let life = Life::serving(ours, process.is_some(), front.recovers(), now);
        let board = Arc::new(Board::new(front.clone()));
        board.put(&life, process.as_ref(), &source);
        let mut work = Work {
            name: front.name().to_owned(),
            attacher: Attacher::start(front.clone())?,
            front,
            life,
            source,
            process,
            successor: None,
            standby: None,
            leaving: None,
            stream,
            channel,
            quiet_until: None,
            refreshing: false,
            dog: Watchdog::new(patience),
            look_at: now + LOOK_EVERY,
            dialer_at: now + LOOK_EVERY,
            standby_at: now + STANDBY_AFTER,
            standby_pauses: Backoff::default(),
            pin: None,
            waiting: Vec::new(),
            board: board.clone(),
            orders: received,
            event: event.clone(),
            exit,
            said: None,
        };
        let thread = std::thread::Builder::new()
            .name(format!("{}-keeper", work.name))
            .spawn(move || {
                crate::confine::thread(crate::confine::Kind::Keeper);
                work.keep();
                work.finish()
            })
            .map_err(Error::os("start a thread"))?;
        Ok(Self { orders, event, board, thread: Some(thread) })
    }

    /// What is known of the backend now.
    pub fn status(&self) -> BackendStatus {
        self.board.status()
    }

    /// Has the VCP's data thread run on these CPUs, from now on and after restarts.
    pub fn pin(&self, cpus: Vec<usize>, reply: Reply) {
        self.order(Order::Pin(cpus, reply));
    }

    /// Has processes that are started from now on keep to these limits. The one that serves is told by who asks.
    pub fn limit(&self, limits: RateLimits, reply: Reply) {
        self.order(Order::Limit(limits, reply));
    }

    /// Kills the VCP; another one repeats what was in flight. Answered when the guest is served again.
    pub fn restart(&self, reply: Reply) {
        self.order(Order::Restart(reply));
    }

    /// Starts the program as it lies on the disk now, which takes over from the VCP between two batches. Answered when it
    /// has, or has not.
    pub fn upgrade(&self, reply: Reply) {
        self.order(Order::Upgrade(reply));
    }

    fn order(&self, order: Order) {
        // Fails only if the keeper has ended, and then dropping the order tells who waits.
        if self.orders.send(order).is_ok() {
            let _ = rustix::io::write(&*self.event, &1u64.to_ne_bytes());
        }
    }

    /// Ends the keeping; the device has the backend that it has. The process is given back, for its end in order.
    pub fn stop(mut self) -> Option<VcpProcess> {
        self.end()
    }

    fn end(&mut self) -> Option<VcpProcess> {
        self.order(Order::Stop);
        self.thread.take().and_then(|thread| thread.join().ok()).flatten()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
#[path = "keeper_tests.rs"]
mod tests;
