//! Whether to use io_uring: what the user wants and what this kernel has.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::{IoUring, Probe, opcode};

use super::{ENTRIES, Ring};

/// `--io`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum IoMode {
    /// io_uring where this kernel has all that is needed of it and allows it, plain calls elsewhere
    #[default]
    Auto,
    /// Plain system calls
    Plain,
    /// io_uring, or do not start
    Uring,
}

/// io_uring was asked for and cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("io_uring cannot be used here: {what} (`--io auto` does without)")]
pub struct Unavailable {
    what: &'static str,
    /// Why.
    #[source]
    source: io::Error,
}

/// The operations that a ring of ours does.
const OPERATIONS: [u8; 5] = [
    opcode::SendMsg::CODE,
    opcode::Recv::CODE,
    opcode::PollAdd::CODE,
    opcode::Write::CODE,
    opcode::AsyncCancel::CODE,
];

/// A ring if one is wanted and can be had. To be called before the process is confined; the ring starts with
/// [`Ring::enable`].
///
/// # Errors
/// [`IoMode::Uring`] on a kernel without.
pub fn choose(mode: IoMode) -> Result<Option<Ring>, Unavailable> {
    match mode {
        IoMode::Plain => Ok(None),
        IoMode::Uring => make().map(Some),
        IoMode::Auto => match make() {
            Ok(ring) => Ok(Some(ring)),
            Err(error) => {
                tracing::debug!(error = crate::process::chain(&error), "plain system calls");
                Ok(None)
            }
        },
    }
}

/// On a thread of its own: when a ring goes, the kernel interrupts the system calls of all threads that had to do with it.
fn make() -> Result<Ring, Unavailable> {
    let thread = std::thread::Builder::new().name("ring".into()).spawn(make_here);
    let thread = thread.map_err(|source| Unavailable { what: "no thread can be started", source })?;
    thread.join().unwrap_or_else(|_| {
        Err(Unavailable { what: "a trial of it failed", source: io::Error::other("it panicked") })
    })
}

fn make_here() -> Result<Ring, Unavailable> {
    // On this very kernel, under whatever rules hold here: a ring that is made may still refuse what it is for.
    try_out().map_err(|source| Unavailable { what: "a trial of it failed", source })?;
    build().map(Ring::of).map_err(|source| Unavailable { what: "no ring can be made", source })
}

fn build() -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    // Completions are made by the thread itself, when it asks for them (Linux 6.1); it sees in shared memory that there
    // are some to be made. The memory of the ring is no business of a child process.
    builder.setup_r_disabled().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
    builder.setup_cqsize(4 * ENTRIES).dontfork();
    let ring = builder.build(ENTRIES)?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    if !OPERATIONS.iter().all(|&code| probe.is_supported(code)) || !ring.params().is_feature_ext_arg() {
        return Err(io::Error::from(io::ErrorKind::Unsupported));
    }
    let mut allowed: Vec<Restriction> = OPERATIONS.map(Restriction::sqe_op).into();
    allowed.push(Restriction::sqe_flags_allowed(Flags::SKIP_SUCCESS.bits()));
    ring.submitter().register_restrictions(&mut allowed)?;
    Ok(ring)
}

/// Signals an event descriptor that is watched.
fn try_out() -> io::Result<()> {
    let mut ring = Ring::of(build()?);
    ring.enable()?;
    let flags = rustix::event::EventfdFlags::NONBLOCK | rustix::event::EventfdFlags::CLOEXEC;
    let event: Arc<OwnedFd> = Arc::new(rustix::event::eventfd(0, flags)?);
    ring.watch(&event);
    ring.signal(&event);
    ring.wait(Some(Duration::from_millis(100)))?;
    let mut count = [0; 8];
    rustix::io::read(&event, &mut count)?;
    if ring.counts().failed_signals != 0 || u64::from_ne_bytes(count) != 1 {
        return Err(io::Error::from(io::ErrorKind::Unsupported));
    }
    Ok(())
}
