//! [`Client`]: a session used one command at a time, blocking; for the time before there is a data thread, and for the
//! commands that look and go.

use std::sync::Arc;
use std::time::{Duration, Instant};

use iscsi::initiator::{Command, Direction, Event, Outcome, SessionError};
use iscsi::scsi::alua::AccessState;
use iscsi::scsi::lun::ReportLuns;
use iscsi::scsi::{self, Cdb, Sense, SenseKey, Status};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::engine::own_job;
use super::job::Jobs;
use super::link::Dial;
use super::login::{LoggedIn, Purpose};
use super::probe::{Found, Next, PROBE_BUFFER_BYTES, Probe, ProbeError, Reply};
use super::wire::{Wire, WireError};
use super::{Options, PortalError, socket};

pub use super::login::Negotiated;

/// Time limit of a command here.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a command is repeated after a unit attention.
const MAX_RETRIES: u32 = 16;
/// Pause before a unit in transition is looked at again.
const TRANSITION_PAUSE: Duration = Duration::from_millis(250);

/// How a command ended, with the data that came.
#[derive(Clone, Debug)]
pub struct Answer {
    /// SCSI status.
    pub status: Status,
    /// Sense data.
    pub sense: Option<Sense>,
    /// The data.
    pub data: Vec<u8>,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Client {
    options: Arc<Options>,
    wire: Wire,
    jobs: Jobs,
    own_slot: u16,
    negotiated: Negotiated,
    portal: String,
}

impl Client {
    /// Connects and logs in; blocks for the connect and login time limits at most.
    ///
    /// # Errors
    /// The portal cannot be reached or refuses us.
    pub fn connect(options: impl Into<Arc<Options>>, purpose: Purpose) -> Result<Self, PortalError> {
        let options = options.into();
        let logged_in = dial(&options, purpose)?;
        let own_slot = options.queue_depth;
        Ok(Self {
            jobs: Jobs::new(own_slot + 1),
            own_slot,
            negotiated: logged_in.negotiated(),
            portal: logged_in.portal.to_string(),
            wire: logged_in.into_wire(&options, Instant::now()),
            options,
        })
    }

    /// What the login agreed on.
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// What it was opened with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    pub(super) fn into_parts(self) -> (Arc<Options>, Wire, Jobs, Negotiated) {
        (self.options, self.wire, self.jobs, self.negotiated)
    }

    fn target(&self) -> String {
        self.options.url.target.clone().unwrap_or_default()
    }

    fn broken(&self, source: WireError) -> PortalError {
        PortalError::Wire { portal: self.portal.clone(), source }
    }

    /// Carries out one command with up to [`PROBE_BUFFER_BYTES`] of data from the target.
    ///
    /// # Errors
    /// The session broke off or the command took too long. A status other than GOOD is an answer.
    pub fn command(&mut self, command: Command) -> Result<Answer, PortalError> {
        let slot = self.own_slot;
        self.jobs.put(slot, own_job(command));
        let deadline = Instant::now() + COMMAND_TIMEOUT;
        self.wire.session.submit(slot, command, Instant::now());
        let outcome = self.run(deadline, command.cdb.name(), |event| match event {
            Event::Done { outcome, .. } => Some(outcome),
            _ => None,
        })?;
        let job = self.jobs.take(slot);
        match outcome {
            Outcome::Status { status, sense, transferred_bytes } => {
                let mut data = vec![0; transferred_bytes as usize];
                if let Some(job) = job {
                    job.data.copy_to(0, &mut data);
                }
                Ok(Answer { status, sense, data })
            }
            Outcome::TargetFailure { .. } => {
                Ok(Answer { status: Status::BUSY, sense: None, data: Vec::new() })
            }
            Outcome::Damaged(violation) => {
                Err(self.broken(SessionError::Violation { violation, slot: None }.into()))
            }
            Outcome::Aborted => Err(self.timeout(command.cdb.name())),
        }
    }

    fn timeout(&self, what: &'static str) -> PortalError {
        PortalError::Timeout { portal: self.portal.clone(), what, timeout: COMMAND_TIMEOUT }
    }

    /// Moves the session until `take` has found its event.
    fn run<T>(
        &mut self,
        deadline: Instant,
        what: &'static str,
        mut take: impl FnMut(Event) -> Option<T>,
    ) -> Result<T, PortalError> {
        loop {
            let now = Instant::now();
            let moved = self.exchange(now);
            // Answers that arrived before the connection broke count.
            while let Some(event) = self.wire.session.next_event() {
                if let Some(found) = take(event) {
                    return Ok(found);
                }
            }
            if moved.map_err(|error| self.broken(error))? {
                continue;
            }
            if now >= deadline {
                return Err(self.timeout(what));
            }
            let until = self.wire.session.deadline().map_or(deadline, |at| at.min(deadline));
            let until = until.max(now + Duration::from_millis(1));
            socket::wait_until(self.wire.stream(), self.wire.wants_write(), until)
                .map_err(|source| PortalError::System { what: "wait for a socket", source })?;
        }
    }

    fn exchange(&mut self, now: Instant) -> Result<bool, WireError> {
        self.wire.session.timers(now)?;
        let sent = self.wire.send(&mut self.jobs, now)?;
        Ok(self.wire.receive(&mut self.jobs, now)? | sent)
    }

    /// The target's logical units.
    ///
    /// # Errors
    /// The session broke off; `Ok(Err(..))`: the target answers, but not with a list.
    pub fn report_luns(&mut self) -> Result<Result<Vec<scsi::Lun>, String>, PortalError> {
        for _ in 0..MAX_RETRIES {
            let len_bytes = PROBE_BUFFER_BYTES as u32;
            let answer = self.command(Command {
                lun: scsi::Lun::ZERO,
                cdb: Cdb::report_luns(len_bytes),
                direction: Direction::Read,
                len_bytes,
                exact: false,
                timeout: COMMAND_TIMEOUT,
            })?;
            if answer.status == Status::GOOD {
                return Ok(ReportLuns::parse(&answer.data).map(|r| r.luns).map_err(|e| e.to_string()));
            }
            if answer.sense.map(|s| s.key) != Some(SenseKey::UnitAttention) {
                return Ok(Err(super::probe::reason(answer.status, answer.sense)));
            }
        }
        Ok(Err("unit attentions without end".to_owned()))
    }

    /// Finds out what a logical unit is.
    ///
    /// # Errors
    /// The session broke off (outer), or the unit cannot be used (inner).
    pub fn probe(&mut self, lun: scsi::Lun) -> Result<Result<Found, ProbeError>, PortalError> {
        let mut tries = 0;
        loop {
            match self.probe_once(lun)? {
                // Between two states it does not stay long.
                Err(ProbeError::NoAccess(AccessState::Transitioning)) if tries < MAX_RETRIES => {
                    tries += 1;
                    std::thread::sleep(TRANSITION_PAUSE);
                }
                ended => return Ok(ended),
            }
        }
    }

    fn probe_once(&mut self, lun: scsi::Lun) -> Result<Result<Found, ProbeError>, PortalError> {
        let mut probe = Probe::new(lun);
        loop {
            let answer = self.command(probe.next())?;
            match probe.answer(Reply { status: answer.status, sense: answer.sense, data: &answer.data }) {
                Ok(Next::Send) => {}
                // What the target asked for; nothing else runs here.
                Ok(Next::Later(pause)) => std::thread::sleep(pause),
                Ok(Next::Done) => return Ok(probe.finish()),
                Err(error) => return Ok(Err(error)),
            }
        }
    }

    /// Finds the unit that a user means by `lun`: by its number among those that the target reports, whose address is
    /// then used as reported; and finds out what it is.
    ///
    /// # Errors
    /// It is not there (with those that are), or cannot be used.
    pub fn find_lun(&mut self, lun: scsi::Lun) -> Result<(scsi::Lun, Found), PortalError> {
        let list = self.report_luns()?;
        let address = match &list {
            Ok(luns) => luns.iter().copied().find(|l| *l == lun || l.number() == lun.number()),
            // A target that has no list may have the unit.
            Err(why) => {
                tracing::debug!(why, "REPORT LUNS failed");
                Some(lun)
            }
        };
        let no_lun = |client: &Self| PortalError::NoLun {
            portal: client.portal.clone(),
            target: client.target(),
            lun: lun.to_string(),
            there: list.as_deref().map_or_else(|_| "it does not list its LUNs".to_owned(), describe_luns),
        };
        let Some(address) = address else { return Err(no_lun(self)) };
        match self.probe(address)? {
            Ok(found) => Ok((address, found)),
            Err(ProbeError::NoLun) => Err(no_lun(self)),
            Err(source) => Err(PortalError::Probe {
                portal: self.portal.clone(),
                target: self.target(),
                lun: address.to_string(),
                source: source.into(),
            }),
        }
    }

    /// Logs out, within the logout time limit.
    pub fn logout(mut self) {
        let limit = self.options.timeouts.logout;
        let now = Instant::now();
        self.wire.session.logout(now, Duration::ZERO);
        // However it ends, the connection is closed behind it.
        let _ =
            self.run(now + limit, "logout", |event| matches!(event, Event::LoggedOut { .. }).then_some(()));
    }
}

/// Connects and logs in, blocking; the connect and login time limits bound it.
///
/// # Errors
/// The portal cannot be reached or refuses us.
pub fn dial(options: &Arc<Options>, purpose: Purpose) -> Result<LoggedIn, PortalError> {
    let mut dial = Dial::start(Arc::clone(options), purpose, Instant::now())?;
    loop {
        let now = Instant::now();
        if let Some(logged_in) = dial.poll(now)? {
            return Ok(logged_in);
        }
        let timeout = dial.deadline().saturating_duration_since(now);
        let timeout =
            Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
        let waited = match dial.fd() {
            Some(fd) => {
                let mut events = PollFlags::IN;
                if dial.wants_write() {
                    events |= PollFlags::OUT;
                }
                poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&timeout))
            }
            None => poll(&mut [], Some(&timeout)),
        };
        match waited {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                return Err(PortalError::System { what: "wait for a socket", source: error.into() });
            }
        }
    }
}

fn describe_luns(luns: &[scsi::Lun]) -> String {
    const SHOWN: usize = 16;
    if luns.is_empty() {
        return "it has none that this initiator may see".to_owned();
    }
    let shown: Vec<_> = luns.iter().take(SHOWN).map(ToString::to_string).collect();
    let more = if luns.len() > SHOWN { format!(" and {} more", luns.len() - SHOWN) } else { String::new() };
    format!("it has {}{more}", shown.join(", "))
}
