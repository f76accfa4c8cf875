//! The process that connects for a disk's VCPs, which have no network: `vcp-iscsi dial`, in the host's network and
//! confined to what it is for. What it may connect to is what the disk's declaration names. It serves each process of the disk
//! over a channel of its own, so that none can spoil another's.
//!
//! If it ends, its VCPs could not connect again; the keeper then has another VCP take their place, and that one gets another
//! dialer. One that lives and does nothing (stopped, stuck in a look-up that holds all) would not be noticed before the next
//! connection is lost, and then never let anybody connect: it is asked now and then whether it is there, and killed if it does
//! not answer.

use std::ffi::OsString;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::io::IoSlice;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    recv, send, sendmsg, socketpair,
};
use rustix::process::{Signal, pidfd_send_signal};

use super::cgroup::Group;
use super::spawn::{self, Plan, Spaces, Spawned};
use super::watchdog::Watchdog;
use crate::error::{Error, Result};

/// What the dialer is told with each channel (`vcp-iscsi/src/dial/server.rs`).
const HELLO: &[u8] = b"\"channel\"";
/// What it is asked, and the answer, whose text does not matter.
const PING: &[u8] = b"\"ping\"";
const PONG_BYTES: usize = 16;
/// Looks between an answer and the next question.
const LOOKS_BETWEEN: u32 = 4;

/// What a disk's VCPs may connect to.
#[derive(Clone, Debug)]
pub struct Reach {
    /// Portals, `HOST[:PORT]`.
    pub portals: Vec<String>,
    /// Everything, besides.
    pub any: bool,
}

/// Makes the dialer of a disk as it is needed.
#[derive(Debug)]
pub struct Dialer {
    program: PathBuf,
    device: String,
    reach: Reach,
    /// Its user outside, if the monitor is root.
    user: u32,
    /// How long it may say nothing after it was asked.
    patience: Duration,
    running: Mutex<Option<Running>>,
    /// The disk's control group, removed after the last of its processes.
    cgroup: Option<Arc<Group>>,
}

/// A process that connects; dropped, it ends.
#[derive(Debug)]
struct Running {
    spawned: Spawned,
    /// For who waits for its end.
    watch: Arc<OwnedFd>,
    control: OwnedFd,
    dog: Watchdog,
    /// Answers so far.
    answers: u64,
    /// Looks since the last answer; `None` while a question is open.
    quiet: Option<u32>,
}

impl Dialer {
    /// For the disk `device`; no process is started yet.
    pub fn new(
        program: &Path,
        device: &str,
        reach: Reach,
        user: u32,
        patience: Duration,
        cgroup: Option<Arc<Group>>,
    ) -> Self {
        let (program, device) = (program.to_owned(), device.to_owned());
        Self { program, device, reach, user, patience, running: Mutex::new(None), cgroup }
    }

    /// What it may connect to.
    pub fn reach(&self) -> &Reach {
        &self.reach
    }

    /// A channel for another process of the disk; starts the dialer if there is none.
    ///
    /// # Errors
    /// It cannot be started, or has ended and was not [forgotten](Self::forget) yet.
    pub fn channel(&self) -> Result<OwnedFd> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let (ours, theirs) = pair()?;
        let dialer = match &mut *running {
            Some(dialer) => dialer,
            none => none.insert(self.start()?),
        };
        // One that has ended is not replaced here: those that it served must be, too.
        dialer.take(&theirs).map_err(|e| Error::Vcp {
            device: self.device.clone(),
            reason: format!("the process that connects for it does not answer: {e}"),
        })?;
        Ok(ours)
    }

    /// Readable when the process has ended; `None` if none was started.
    pub fn watch(&self) -> Option<Arc<OwnedFd>> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.as_ref().map(|dialer| dialer.watch.clone())
    }

    /// Asks the process now and then whether it is there; kills it when it has not answered for too long, and says for how
    /// long. Its end is then told by [`Dialer::watch`]. To be called every
    /// [`LOOK_EVERY`](super::watchdog::LOOK_EVERY).
    pub fn look(&self) -> Option<Duration> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let dialer = running.as_mut()?;
        let silent = dialer.ask()?;
        let _ = pidfd_send_signal(&dialer.spawned.pidfd, Signal::KILL);
        Some(silent)
    }

    /// Forgets a process that has ended; how, in words.
    pub fn forget(&self) -> String {
        let dialer = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        match dialer.as_ref().map(|dialer| dialer.spawned.status(false)) {
            Some(Ok(Some(how))) => how.to_string(),
            Some(Err(error)) => error.to_string(),
            Some(Ok(None)) | None => "unknown".into(),
        }
    }

    fn start(&self) -> Result<Running> {
        let list = rustix::fs::memfd_create("portals", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(Error::os("create a memfd"))?;
        let mut list = std::fs::File::from(list);
        for portal in &self.reach.portals {
            use std::io::Write;
            writeln!(list, "{portal}").map_err(Error::os("write a memfd"))?;
        }
        let (control, theirs) = pair()?;
        let stderr = || super::process::dup(std::io::stderr());
        let mut args: Vec<OsString> =
            ["dial", "--channel-fd", "3", "--portals", "/proc/self/fd/0"].map(Into::into).into();
        if self.reach.any {
            args.push("--any".into());
        }
        let plan = Plan {
            program: self.program.clone(),
            args,
            env: super::process::environment(),
            fds: vec![list.into(), stderr()?, stderr()?, theirs],
            spaces: Spaces::LOCAL,
            needs_net: false,
            outer_id: self.user,
            node: None,
            cgroup: self.cgroup.as_deref().and_then(Group::open),
            nice: 0,
        };
        let fail = |reason: String| Error::Vcp { device: self.device.clone(), reason };
        let spawned = spawn::spawn(plan).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => fail(format!(
                "cannot find {}: install it beside vcp, put it on the PATH, or give --vcp-iscsi FILE",
                self.program.display()
            )),
            _ => fail(format!("cannot start {}: {e}", self.program.display())),
        })?;
        tracing::debug!(device = self.device, pid = spawned.pid, "a process that connects was started");
        let watch = Arc::new(super::process::dup(&spawned.pidfd)?);
        let dog = Watchdog::new(self.patience);
        Ok(Running { spawned, watch, control, dog, answers: 0, quiet: Some(0) })
    }
}

impl Running {
    /// One look: `Some` when it has been silent for too long.
    fn ask(&mut self) -> Option<Duration> {
        let mut answer = [0; PONG_BYTES];
        while matches!(recv(&self.control, &mut answer, RecvFlags::DONTWAIT), Ok((1.., _))) {
            self.answers += 1;
            self.quiet = Some(0);
        }
        let silent = self.dog.look(self.answers, self.quiet.is_none());
        match &mut self.quiet {
            Some(looks) if *looks < LOOKS_BETWEEN => *looks += 1,
            Some(_) => {
                // One whose buffer is full does not read; one that has ended is heard of elsewhere.
                let _ = send(&self.control, PING, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
                self.quiet = None;
            }
            None => {}
        }
        silent
    }

    fn take(&self, channel: &OwnedFd) -> rustix::io::Result<()> {
        let fds = [channel.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(&self.control, &[IoSlice::new(HELLO)], &mut ancillary, flags).map(|_| ())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.spawned.pidfd, Signal::KILL);
        let _ = self.spawned.status(true);
    }
}

fn pair() -> Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(Error::os("create a socket pair"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;

    use super::*;

    /// A dialer that does what the script says.
    fn dialer(dir: &Path, script: &str) -> Dialer {
        // The dialer is nobody, who must reach its program by name, since it is a script.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir, open).unwrap();
        let path = dir.join("dial");
        // By another process, as in the tests of `process`.
        let mut write = std::process::Command::new("sh");
        write
            .arg0("sh")
            .args(["-c", "printf '#!/bin/sh\\n%s\\n' \"$1\" > \"$0\" && chmod 755 \"$0\""])
            .arg(&path)
            .arg(script);
        assert!(write.status().unwrap().success());
        let reach = Reach { portals: vec!["h:1".into(), "[::1]".into()], any: true };
        Dialer::new(&path, "disk0", reach, 0x7fff_0000, Duration::from_secs(1), None)
    }

    fn ended(watch: &OwnedFd) {
        rustix::event::poll(&mut [rustix::event::PollFd::new(watch, rustix::event::PollFlags::IN)], None)
            .unwrap();
    }

    #[test]
    fn one_that_does_not_answer_is_killed_and_one_that_does_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let silent = dialer(dir.path(), "exec sleep 1000");
        assert_eq!(silent.look(), None, "there is none");
        let _channel = silent.channel().unwrap();
        let looks = std::iter::repeat_with(|| silent.look()).take(100);
        let said: Vec<_> = looks.enumerate().filter_map(|(n, said)| said.map(|said| (n, said))).collect();
        // Asked after some looks, and given as many as its patience has.
        let (first, time) = said[0];
        assert_eq!((first, time), (LOOKS_BETWEEN as usize + 2, Duration::from_secs(1)));
        ended(&silent.watch().unwrap());
        assert_eq!(silent.forget(), "signal 9");
        // What it answers does not matter, as long as it does: here whatever it hears comes back.
        let answers = dialer(
            dir.path(),
            "exec perl -e 'open(my $c, \"+<&=\", 3); while (1) { my $r = \"\"; vec($r, 3, 1) = 1; \
             select($r, undef, undef, undef); recv($c, my $m, 64, 0); send($c, $m, 0); }'",
        );
        let _channel = answers.channel().unwrap();
        for asked in 1..=3 {
            while answers.running.lock().unwrap().as_ref().unwrap().quiet.is_some() {
                assert_eq!(answers.look(), None);
            }
            let dialer = answers.running.lock().unwrap();
            let control = &dialer.as_ref().unwrap().control;
            let mut fds = [rustix::event::PollFd::new(control, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut fds, None).unwrap();
            drop(dialer);
            assert_eq!(answers.look(), None, "after {asked} questions");
        }
    }

    #[test]
    fn one_process_for_all_channels_and_another_when_it_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let dialer = dialer(dir.path(), "exec sleep 1000");
        assert!(dialer.watch().is_none());
        let _first = dialer.channel().unwrap();
        let pid = || dialer.running.lock().unwrap().as_ref().unwrap().spawned.pid;
        let old = pid();
        let _second = dialer.channel().unwrap();
        assert_eq!(pid(), old);
        let watch = dialer.watch().unwrap();
        pidfd_send_signal(&*watch, Signal::KILL).unwrap();
        ended(&watch);
        assert!(dialer.channel().is_err());
        assert_eq!(dialer.forget(), "signal 9");
        let _third = dialer.channel().unwrap();
        let new = pid();
        assert_ne!(new, old);
        drop(dialer);
        assert!(!Path::new(&format!("/proc/{new}")).exists());
    }
}
