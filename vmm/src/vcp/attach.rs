//! Everything of a device that has to wait for its backend: handshake, start of the queues, reading the configuration
//! again. On a thread of its own, one job at a time, so that the keeper never waits for what it watches.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::hidden::HiddenSocket;
use crate::error::{Error, Result};
use crate::virtio::vhost_user::channel::Channel;
use crate::virtio::vhost_user::front::Front;
use crate::virtio::vhost_user::link::Link;
use crate::virtio::vhost_user::session::Session;

/// Where a backend listens.
#[derive(Debug)]
pub(super) enum Target {
    /// Somebody else's socket.
    Path(PathBuf),
    /// A process of ours, by this descriptor.
    Process(HiddenSocket, OwnedFd),
}

/// What is to be done.
#[derive(Debug)]
enum Job {
    Attach(Target),
    Detach,
    Process(OwnedFd),
    Refresh,
}

/// What came of a job.
#[derive(Debug)]
pub(super) enum Report {
    /// The guest is served. The connection, for who waits for its end, and the backend's own channel.
    Attached(UnixStream, Option<Channel>),
    /// It is not, for this reason.
    Failed(String),
    /// And never will be.
    Hopeless(String),
    /// The configuration was read again.
    Refreshed,
}

/// The thread's handle.
#[derive(Debug)]
pub(super) struct Attacher {
    jobs: Sender<Job>,
    reports: Receiver<Report>,
    event: Arc<OwnedFd>,
    /// The connection on which the thread may be waiting.
    held: Arc<Mutex<Held>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Held {
    stream: Option<UnixStream>,
    over: bool,
}

impl Attacher {
    pub(super) fn start(front: Arc<Front>) -> Result<Self> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let event = Arc::new(eventfd(0, flags).map_err(Error::os("create an eventfd"))?);
        let (jobs, orders) = channel();
        let (sender, reports) = channel();
        let held = Arc::<Mutex<Held>>::default();
        let thread = std::thread::Builder::new()
            .name(format!("{}-attach", front.name()))
            .spawn({
                let (event, held) = (event.clone(), held.clone());
                move || {
                    crate::confine::thread(crate::confine::Kind::Attach);
                    for job in orders {
                        if let Some(report) = work(&front, &held, job) {
                            let _ = sender.send(report);
                            // Fails only if the counter is full, and then it is signalled.
                            let _ = rustix::io::write(&*event, &1u64.to_ne_bytes());
                        }
                    }
                }
            })
            .map_err(Error::os("start a thread"))?;
        Ok(Self { jobs, reports, event, held, thread: Some(thread) })
    }

    pub(super) fn attach(&self, target: Target) {
        self.send(Job::Attach(target));
    }

    /// The device has no backend now.
    pub(super) fn detach(&self) {
        self.send(Job::Detach);
    }

    /// Another process serves the same connection.
    pub(super) fn process(&self, pidfd: OwnedFd) {
        self.send(Job::Process(pidfd));
    }

    /// Reads the configuration again.
    pub(super) fn refresh(&self) {
        self.send(Job::Refresh);
    }

    fn send(&self, job: Job) {
        // Fails only if the thread has panicked, which ends the process.
        let _ = self.jobs.send(job);
    }

    /// The next report, once [`Attacher::event`] is readable.
    pub(super) fn report(&self) -> Option<Report> {
        let _ = rustix::io::read(&*self.event, &mut [0; 8]);
        self.reports.try_recv().ok()
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Ends a handshake under way.
    pub(super) fn cancel(&self) {
        if let Some(stream) = &self.held.lock().unwrap_or_else(PoisonError::into_inner).stream {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Ends the thread, whatever it waits for. The device keeps the backend that it has.
    pub(super) fn end(mut self) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).over = true;
        self.cancel();
        self.jobs = channel().0;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn work(front: &Front, held: &Mutex<Held>, job: Job) -> Option<Report> {
    match job {
        Job::Attach(target) => Some(match attach(front, held, &target) {
            Ok((stream, channel)) => Report::Attached(stream, channel),
            Err(Error::Unrecoverable { reason, .. }) => {
                Report::Hopeless(format!("the vhost-user backend {reason}"))
            }
            Err(e) => Report::Failed(crate::chain(&e)),
        }),
        Job::Detach => {
            front.detach();
            None
        }
        Job::Process(pidfd) => {
            front.set_process(Some(pidfd));
            None
        }
        Job::Refresh => {
            if let Err(e) = front.refresh_config() {
                let error = crate::chain(&e);
                tracing::warn!(device = front.name(), error, "the backend's new configuration is not taken");
            }
            Some(Report::Refreshed)
        }
    }
}

fn attach(front: &Front, held: &Mutex<Held>, target: &Target) -> Result<(UnixStream, Option<Channel>)> {
    let device = front.name();
    let queues = front.kind().queue_max_sizes.len() as u16;
    let (path, pidfd) = match target {
        Target::Path(path) => (path.clone(), None),
        Target::Process(socket, pidfd) => (socket.path(), Some(pidfd)),
    };
    let link = Link::connect(device, &path, queues)?;
    let stream = link.stream()?;
    let hold = |stream| {
        let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
        held.stream = stream;
        held.over
    };
    if hold(Some(link.stream()?)) {
        return Err(Error::Interrupted);
    }
    if let Some(pidfd) = pidfd {
        front.set_process(Some(pidfd.try_clone().map_err(Error::os("duplicate a descriptor"))?));
    }
    let attached = Session::start(device, front.kind(), link)
        .and_then(|(session, channel)| front.attach(session).map(|()| channel));
    hold(None);
    attached.map(|channel| (stream, channel))
}
