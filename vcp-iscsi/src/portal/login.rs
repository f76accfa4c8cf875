//! The login phase over a socket: moves bytes between it and the machine of the `iscsi` crate, and puts its errors into
//! words that say what to do.

use std::io::{self, Read, Write};
use std::time::Instant;

use iscsi::chap::{Account, Algorithm, ChapError, Entropy};
use iscsi::initiator::{Config as SessionConfig, Session};
use iscsi::login::initiator::{Auth, Chap, Config, LoggedIn as Agreed, Login, LoginError, Progress};
use iscsi::login::{LoginPdu, LoginStatus};
use iscsi::params::{DigestPolicy, ParamError, Params};
use iscsi::pdu::framing::{Limits, Receiver, Step};
use iscsi::pdu::{Isid, Opcode};

use super::engine::MAX_PATHS;
use super::net::Stream;
use super::options::{Credentials, DigestChoice};
use super::wire::Wire;
use super::{Options, PortalError};
use crate::recorder::Recorder;
use crate::url::Portal;

/// What a target's PDU begins with in the login phase: Login Response or Reject, reserved bits clear (RFC 7143 11.2.1.2).
const FIRST_BYTES: [u8; 2] = [Opcode::LoginResponse as u8, Opcode::Reject as u8];

/// What a session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// SCSI commands to the URL's target.
    Normal,
    /// SendTargets (RFC 7143 4.3).
    Discovery,
}

impl Purpose {
    /// The target in words, for errors.
    pub fn target_name(self, options: &Options) -> String {
        match self {
            Self::Normal => options.url.target.clone().unwrap_or_default(),
            Self::Discovery => "the discovery service".to_owned(),
        }
    }
}

/// What a login agreed on, for people and programs that ask.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Negotiated {
    /// The portal in the end, after redirections.
    pub portal: String,
    /// Our part of the session's name, in hexadecimal.
    pub isid: String,
    /// The target's handle for the session.
    pub tsih: u16,
    /// TargetPortalGroupTag.
    pub portal_group_tag: Option<u16>,
    /// TargetAlias.
    pub target_alias: Option<String>,
    /// The CHAP algorithm, if the target asked for authentication.
    pub chap: Option<String>,
    /// CRC32C over headers.
    pub header_digest: bool,
    /// CRC32C over data.
    pub data_digest: bool,
    /// Longest data segment that the target sends.
    pub max_receive_bytes: u32,
    /// Longest data segment that the target takes.
    pub max_send_bytes: u32,
    /// MaxBurstLength.
    pub max_burst_bytes: u32,
    /// FirstBurstLength.
    pub first_burst_bytes: u32,
    /// InitialR2T.
    pub initial_r2t: bool,
    /// ImmediateData.
    pub immediate_data: bool,
    /// MaxOutstandingR2T.
    pub max_outstanding_r2t: u16,
    /// Commands that the target takes at once, as the login left the window.
    pub command_window: u32,
    /// ErrorRecoveryLevel.
    pub error_recovery_level: u8,
}

/// A connection that just logged in.
#[derive(Debug)]
pub struct LoggedIn {
    /// It.
    pub stream: Stream,
    /// What was agreed on.
    pub agreed: Box<Agreed>,
    /// What arrived behind the last Login Response.
    pub early: Vec<u8>,
    /// The portal.
    pub portal: Portal,
}

impl LoggedIn {
    /// What was agreed on, for people.
    pub fn negotiated(&self) -> Negotiated {
        let (agreed, n, nexus) = (&self.agreed, &self.agreed.negotiated, &self.agreed.nexus);
        Negotiated {
            portal: self.portal.to_string(),
            isid: nexus.isid.to_string(),
            tsih: nexus.tsih,
            portal_group_tag: agreed.portal_group_tag,
            target_alias: agreed.target_alias.clone(),
            chap: agreed.chap_algorithm.map(|a| a.to_string()),
            header_digest: n.digests.header,
            data_digest: n.digests.data,
            max_receive_bytes: n.max_recv_data_segment_bytes,
            max_send_bytes: n.max_send_data_segment_bytes,
            max_burst_bytes: n.max_burst_bytes,
            first_burst_bytes: n.first_burst_bytes,
            initial_r2t: n.initial_r2t,
            immediate_data: n.immediate_data,
            max_outstanding_r2t: n.max_outstanding_r2t,
            command_window: nexus.max_cmd_sn.next().since(nexus.cmd_sn),
            error_recovery_level: n.error_recovery_level,
        }
    }

    /// The full-feature session over it.
    pub fn into_wire(self, options: &Options, now: Instant) -> Wire {
        let (n, nexus, timeouts) = (&self.agreed.negotiated, &self.agreed.nexus, &options.timeouts);
        let config = SessionConfig {
            // The rest for commands of our own, one for each path.
            slots: options.queue_depth + MAX_PATHS as u16,
            cmd_sn: nexus.cmd_sn,
            exp_stat_sn: nexus.stat_sn,
            max_cmd_sn: nexus.max_cmd_sn,
            cid: nexus.cid,
            initial_r2t: n.initial_r2t,
            immediate_data: n.immediate_data,
            first_burst_bytes: n.first_burst_bytes,
            max_burst_bytes: n.max_burst_bytes,
            max_send_bytes: n.max_send_data_segment_bytes,
            max_receive_bytes: n.max_recv_data_segment_bytes,
            max_outstanding_r2t: n.max_outstanding_r2t,
            header_digest: n.digests.header,
            data_digest: n.digests.data,
            nop_interval: timeouts.nop_interval,
            nop_timeout: timeouts.nop_timeout,
            task_management_timeout: timeouts.task_management,
            logout_timeout: timeouts.logout,
        };
        let mut wire = Wire::new(self.stream, Session::new(config, now), &self.early);
        wire.recorder = Recorder::of(options.recorder.as_ref());
        wire
    }
}

/// What [`LoginPort::poll`] came to.
#[derive(Debug)]
pub enum LoginStep {
    /// Not there yet.
    Pending,
    /// Full feature phase.
    Done(LoggedIn),
    /// The target is to be reached at another portal.
    Redirect(Portal),
}

/// A login underway.
#[derive(Debug)]
pub struct LoginPort {
    stream: Option<Stream>,
    portal: Portal,
    target: String,
    login: Login,
    receiver: Receiver,
    data: Vec<u8>,
    out: Vec<u8>,
}

impl LoginPort {
    /// Begins a login on a connection that just was made.
    ///
    /// # Errors
    /// The options contradict the rules of the login phase.
    pub fn start(
        stream: Stream,
        options: &Options,
        purpose: Purpose,
        portal: &Portal,
    ) -> Result<Self, PortalError> {
        let target = purpose.target_name(options);
        let failed = |error: &LoginError| login_failed(portal, &target, error);
        let config = config(options, purpose).map_err(|error| failed(&error))?;
        let (login, first) = Login::start(config).map_err(|error| failed(&error))?;
        let mut port = Self {
            stream: Some(stream),
            portal: portal.clone(),
            target,
            login,
            receiver: Receiver::new(Limits::default()),
            data: Vec::new(),
            out: Vec::new(),
        };
        port.queue(&first);
        Ok(port)
    }

    fn queue(&mut self, pdu: &LoginPdu) {
        pdu.write(&mut self.out);
    }

    /// Moves on.
    ///
    /// # Errors
    /// The login failed.
    pub fn poll(&mut self) -> Result<LoginStep, PortalError> {
        loop {
            self.send()?;
            if !self.out.is_empty() {
                return Ok(LoginStep::Pending);
            }
            let mut buffer = [0; 4096];
            let Some(stream) = &mut self.stream else { return Ok(LoginStep::Pending) };
            let got = match stream.read(&mut buffer) {
                Ok(0) => {
                    let error =
                        io::Error::new(io::ErrorKind::UnexpectedEof, "the target closed the connection");
                    return Err(self.broken(&error));
                }
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(LoginStep::Pending),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.broken(&error)),
            };
            match self.take(&buffer[..got])? {
                LoginStep::Pending => {}
                end => return Ok(end),
            }
        }
    }

    fn send(&mut self) -> Result<(), PortalError> {
        while !self.out.is_empty() {
            let Some(stream) = &mut self.stream else { return Ok(()) };
            match stream.write(&self.out) {
                Ok(sent) => {
                    self.out.drain(..sent);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken(&error)),
            }
        }
        Ok(())
    }

    fn take(&mut self, mut bytes: &[u8]) -> Result<LoginStep, PortalError> {
        loop {
            match self.receiver.step() {
                Step::Framing { .. } => {
                    let Some(&first) = bytes.first() else { return Ok(LoginStep::Pending) };
                    // Something else than iSCSI is told by its first byte. As a length, what it sends could be waited
                    // for until the time is up.
                    if self.receiver.is_between_pdus() && !FIRST_BYTES.contains(&first) {
                        let what = format!("what came, {first:#04x} first, is no Login Response");
                        return Err(self.broken(&io::Error::new(io::ErrorKind::InvalidData, what)));
                    }
                    let taken = self.receiver.feed(bytes).map_err(|error| self.broken(&error))?;
                    bytes = &bytes[taken..];
                }
                Step::Header => self.receiver.accept(),
                Step::Data { len_bytes, .. } => {
                    if bytes.is_empty() {
                        return Ok(LoginStep::Pending);
                    }
                    let (data, rest) = bytes.split_at(bytes.len().min(len_bytes as usize));
                    self.data.extend_from_slice(data);
                    self.receiver.data(data);
                    bytes = rest;
                }
                Step::Done { .. } => {
                    let header = *self.receiver.header();
                    let data = std::mem::take(&mut self.data);
                    self.receiver.next_pdu();
                    let progress = self
                        .login
                        .receive(&header, &data)
                        .map_err(|error| login_failed(&self.portal, &self.target, &error))?;
                    match progress {
                        Progress::Send(pdu) => self.queue(&pdu),
                        Progress::Done(agreed) => return Ok(self.done(agreed, bytes)),
                        Progress::Moved(moved) => {
                            let Some(first) = moved.addresses.first() else { continue };
                            let portal = Portal { host: first.host.clone(), port: first.port };
                            return Ok(LoginStep::Redirect(portal));
                        }
                    }
                }
            }
        }
    }

    fn done(&mut self, agreed: Box<Agreed>, early: &[u8]) -> LoginStep {
        match self.stream.take() {
            Some(stream) => LoginStep::Done(LoggedIn {
                stream,
                agreed,
                early: early.to_vec(),
                portal: self.portal.clone(),
            }),
            None => LoginStep::Pending,
        }
    }

    fn broken(&self, error: &dyn std::error::Error) -> PortalError {
        PortalError::Login {
            portal: self.portal.to_string(),
            target: self.target.clone(),
            why: format!("{error} (is it an iSCSI target that listens there?)"),
            may_retry: true,
            broken: true,
            wants_no_chap: false,
        }
    }

    /// The connection; `None` once the login ended.
    pub fn stream(&self) -> Option<&Stream> {
        self.stream.as_ref()
    }

    /// Whether it waits to write.
    pub fn wants_write(&self) -> bool {
        !self.out.is_empty()
    }
}

fn policy(choice: DigestChoice) -> DigestPolicy {
    match choice {
        DigestChoice::Crc32c => DigestPolicy::Require,
        DigestChoice::None => DigestPolicy::Optional,
    }
}

fn account(credentials: &Credentials) -> Result<Account, ChapError> {
    let secret = iscsi::chap::Secret::new(credentials.secret.reveal())?;
    if secret.is_short() {
        tracing::warn!(
            user = credentials.user,
            "CHAP secret is shorter than the 12 bytes that RFC 7143 9.2.1 asks for"
        );
    }
    Account::new(&credentials.user, secret)
}

fn config(options: &Options, purpose: Purpose) -> Result<Config, LoginError> {
    let mut config = Config::new(&options.initiator, Isid(options.isid()));
    if purpose == Purpose::Normal {
        config.target_name.clone_from(&options.url.target);
    }
    config.params = Params {
        header_digest: policy(options.header_digest),
        data_digest: policy(options.data_digest),
        max_outstanding_r2t: SessionConfig::MAX_OUTSTANDING_R2T.min(8),
        // A session that is reinstated need not wait for the old one's end: the login is its end (6.3.5).
        time2wait_s: 0,
        time2retain_s: 0,
        ..Params::default()
    };
    if let Some(chap) = &options.chap {
        let mut entropy = Entropy([0; 33]);
        let mut filled = 0;
        while filled < entropy.0.len() {
            filled +=
                rustix::rand::getrandom(&mut entropy.0[filled..], rustix::rand::GetRandomFlags::empty())
                    .map_err(|_| LoginError::Protocol("the system has no random numbers"))?;
        }
        config.auth = Auth::Chap(Chap {
            account: account(chap)?,
            target: options.mutual_chap.as_ref().map(account).transpose()?,
            algorithms: Algorithm::DEFAULT_OFFER.to_vec(),
            entropy,
        });
    }
    Ok(config)
}

/// A login error in words, with what to try.
fn login_failed(portal: &Portal, target: &str, error: &LoginError) -> PortalError {
    let advice = match error {
        LoginError::Refused(status) => match *status {
            LoginStatus::NOT_FOUND => {
                format!("; `vcp-iscsi discover iscsi://{portal}` lists the targets that there are")
            }
            LoginStatus::AUTHENTICATION_FAILURE => {
                "; check --chap-user and the secret (or that the target wants none)".to_owned()
            }
            LoginStatus::AUTHORIZATION_FAILURE => {
                "; the target has to allow this initiator's name (--initiator-name) and address".to_owned()
            }
            _ => String::new(),
        },
        LoginError::Chap(ChapError::WrongResponse) => {
            "; the target did not prove itself: check --mutual-chap-secret-file".to_owned()
        }
        LoginError::Chap(ChapError::WrongName(_)) => "; check --mutual-chap-user".to_owned(),
        LoginError::AuthMethod { .. } => {
            "; the target wants another authentication: give --chap-user and --chap-secret-file, or leave them out"
                .to_owned()
        }
        LoginError::AuthenticationSkipped => {
            "; leave the CHAP options out if the target is to be trusted without".to_owned()
        }
        LoginError::Param(ParamError::BadAnswer { key: "HeaderDigest" | "DataDigest", .. })
        | LoginError::Param(ParamError::Refused { .. }) => {
            "; the target has to allow the digest, or leave --header-digest and --data-digest out".to_owned()
        }
        _ => String::new(),
    };
    let may_retry = match error {
        LoginError::Refused(status) => status.may_retry(),
        LoginError::BadName { .. } | LoginError::BadAlias | LoginError::Chap(_) => false,
        LoginError::AuthenticationSkipped | LoginError::AuthMethod { .. } | LoginError::Param(_) => false,
        _ => true,
    };
    PortalError::Login {
        portal: portal.to_string(),
        target: target.to_owned(),
        why: super::engine::chain(error) + &advice,
        may_retry,
        broken: false,
        wants_no_chap: matches!(error, LoginError::AuthenticationSkipped | LoginError::AuthMethod { .. }),
    }
}
