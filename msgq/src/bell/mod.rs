//! Doorbells: how a side that sleeps is woken.
//!
//! The waker makes the bell and keeps the end that rings; the sleeper gets the other one. The default is a pipe, whose two
//! ends have separate open file descriptions: nothing that the sleeper does to its end changes how the waker's end behaves.
//! An eventfd has only one description, whose `O_NONBLOCK` a hostile sleeper can clear, and then fill the counter, so that
//! ringing blocks for ever; it is for peers that are trusted, or confined so that they cannot (`docs/msgq.md`, bells).
//!
//! A bell is level-triggered until it was hushed, so a ring before the sleep is kept. Both ends are plain descriptors that
//! fit `poll`, `epoll`, `io_uring` and `tokio`'s `AsyncFd`.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::pipe::{PipeFlags, pipe_with};

/// Kinds of bell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// A pipe: safe towards anybody.
    #[default]
    Pipe,
    /// An eventfd: cheaper by a quarter, for peers that are trusted.
    Event,
}

/// Why a bell cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BellError {
    /// The system refused something.
    #[error("cannot {what}: {error}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        error: Errno,
    },
    /// The peer sent a descriptor of another kind.
    #[error("the descriptor is no bell of the kind agreed")]
    Kind,
}

fn system(what: &'static str) -> impl Fn(Errno) -> BellError {
    move |error| BellError::System { what, error }
}

/// The waker's end.
#[derive(Debug)]
pub struct Ringer {
    ring: OwnedFd,
    /// Own copy of the sleeper's end: a pipe that has a reader breaks for nobody, so a sleeper that closes its end sends
    /// this process no SIGPIPE.
    _keep: Option<OwnedFd>,
    kind: Kind,
}

impl Ringer {
    /// A new bell, and the end for the sleeper.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new(kind: Kind) -> Result<(Self, OwnedFd), BellError> {
        match kind {
            Kind::Pipe => {
                let (listen, ring) =
                    pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(system("make a pipe"))?;
                // A page is plenty; failing leaves it larger.
                let _ = rustix::pipe::fcntl_setpipe_size(&ring, 4096);
                let keep = listen.try_clone().map_err(|_| system("copy a descriptor")(Errno::MFILE))?;
                Ok((Self { ring, _keep: Some(keep), kind }, listen))
            }
            Kind::Event => {
                let ring = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
                    .map_err(system("make an eventfd"))?;
                let listen = ring.try_clone().map_err(|_| system("copy a descriptor")(Errno::MFILE))?;
                Ok((Self { ring, _keep: None, kind }, listen))
            }
        }
    }

    /// Rings. A bell that is full has been rung already. With a pipe this never blocks, whatever the sleeper does.
    #[inline]
    pub fn ring(&self) {
        let _ = match self.kind {
            Kind::Pipe => rustix::io::write(&self.ring, b"!"),
            Kind::Event => rustix::io::write(&self.ring, &1u64.to_ne_bytes()),
        };
    }
}

/// The sleeper's end.
#[derive(Debug)]
pub struct Ear {
    /// What to wait for: a private description.
    fd: OwnedFd,
    kind: Kind,
    /// The pipe's end could not be opened anew: it is shared with the waker, and read in a way that its flags do not change.
    shared: bool,
    /// The eventfd itself, which is watched and never read.
    _event: Option<OwnedFd>,
}

impl Ear {
    /// Takes the descriptor that the waker sent.
    ///
    /// A read of a shared description could block if the waker changes its flags. So a pipe is opened anew, with flags of
    /// our own, and an eventfd is watched edge-triggered and not read at all.
    ///
    /// # Errors
    /// It is not what was agreed; or `/proc` is not mounted, and the kernel cannot read pipes without waiting either.
    pub fn adopt(fd: OwnedFd, kind: Kind) -> Result<Self, BellError> {
        match kind {
            Kind::Pipe => {
                let stat = rustix::fs::fstat(&fd).map_err(system("look at a bell"))?;
                let mode = rustix::fs::fcntl_getfl(&fd).map_err(system("look at a bell"))?;
                let readable = mode & OFlags::RWMODE == OFlags::RDONLY;
                if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo || !readable {
                    return Err(BellError::Kind);
                }
                let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let Ok(own) = rustix::fs::open(path, flags, Mode::empty()) else { return Self::share(fd) };
                let again = rustix::fs::fstat(&own).map_err(system("look at a bell"))?;
                if (again.st_dev, again.st_ino) != (stat.st_dev, stat.st_ino) {
                    return Err(BellError::Kind);
                }
                Ok(Self { fd: own, kind, shared: false, _event: None })
            }
            Kind::Event => {
                let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                let name = rustix::fs::readlink(path, Vec::new()).map_err(system("look at a bell"))?;
                if name.as_bytes() != b"anon_inode:[eventfd]" {
                    return Err(BellError::Kind);
                }
                let watch =
                    epoll::create(epoll::CreateFlags::CLOEXEC).map_err(system("make an epoll instance"))?;
                let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
                epoll::add(&watch, &fd, epoll::EventData::new_u64(0), flags)
                    .map_err(system("watch a bell"))?;
                Ok(Self { fd: watch, kind, shared: false, _event: Some(fd) })
            }
        }
    }

    /// Takes a pipe's end as it is, where there is no `/proc` (a confined process): possible if the kernel reads pipes with
    /// RWF_NOWAIT, which the flags of a description do not change.
    fn share(fd: OwnedFd) -> Result<Self, BellError> {
        match read_shared(&fd) {
            Ok(_) | Err(Errno::AGAIN) => Ok(Self { fd, kind: Kind::Pipe, shared: true, _event: None }),
            Err(error) => Err(system("open a bell anew, or read it as it is")(error)),
        }
    }

    /// Makes the bell silent until it is rung again. To be done before the last look at the rings. Never blocks.
    pub fn hush(&self) {
        match self.kind {
            // A pipe of a page empties in one read; a larger one rings on, which only its maker pays for.
            Kind::Pipe if self.shared => drop(read_shared(&self.fd)),
            Kind::Pipe => {
                let mut bytes = [0; 4096];
                let _ = rustix::io::read(&self.fd, &mut bytes);
            }
            Kind::Event => {
                let mut events =
                    [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
                let _ = epoll::wait(&self.fd, &mut events[..], Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
            }
        }
    }
}

fn read_shared(fd: &OwnedFd) -> rustix::io::Result<usize> {
    let mut bytes = [0; 4096];
    rustix::io::preadv2(fd, &mut [IoSliceMut::new(&mut bytes)], u64::MAX, ReadWriteFlags::NOWAIT)
}

impl AsFd for Ear {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests;
