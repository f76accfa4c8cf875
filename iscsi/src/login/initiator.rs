//! The initiator's side of the login phase.
//!
//! ```
//! use iscsi::login::initiator::{Config, Login, Progress};
//! use iscsi::pdu::{Bhs, Isid};
//!
//! # fn exchange(pdu: &iscsi::login::LoginPdu) -> Option<(Bhs, Vec<u8>)> { None }
//! # fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let isid = Isid::random([1, 2, 3], 0);
//! let mut config = Config::new("iqn.2026-11.example:me", isid);
//! config.target_name = Some("iqn.2026-11.example:disk".into());
//! let (mut login, mut request) = Login::start(config)?;
//! while let Some((header, data)) = exchange(&request) {
//!     match login.receive(&header, &data)? {
//!         Progress::Send(next) => request = next,
//!         Progress::Done(logged_in) => {
//!             println!("session {} of {:?}", logged_in.nexus.tsih, logged_in.negotiated);
//!             break;
//!         }
//!         Progress::Moved(moved) => {
//!             println!("log in at {:?} instead", moved.addresses);
//!             break;
//!         }
//!     }
//! }
//! # Ok(())
//! # }
//! # run().unwrap();
//! ```

use super::{LoginPdu, LoginStatus, MAX_LOGIN_DATA_BYTES, MAX_LOGIN_PDUS, Nexus};
use crate::chap::{Algorithm, Challenge, ChapError};
use crate::discovery::TargetAddress;
use crate::params::{self, Negotiation, ParamError, Seen, SessionType};
use crate::pdu::{Bhs, LoginRequest, LoginResponse, Opcode, Pdu, Reject, Stage};
use crate::serial::Serial;
use crate::text::{self, Assembler, Outgoing};

mod config;

pub use config::{Auth, Chap, Config, LoggedIn, LoginError, Moved, Progress};

#[derive(Clone, Debug, PartialEq, Eq)]
enum Security {
    /// AuthMethod was offered.
    MethodOffered,
    /// CHAP_A was offered.
    AlgorithmsOffered,
    /// Our response was sent, with a challenge to the target if it has to prove itself.
    Responded(Option<Challenge>),
    /// Nothing is open.
    Done,
}

/// A login under way.
#[derive(Clone, Debug)]
pub struct Login {
    config: Config,
    session_type: SessionType,
    stage: Stage,
    security: Security,
    algorithm: Option<Algorithm>,
    negotiation: Negotiation,
    seen: Seen,
    assembler: Assembler,
    out: Outgoing,
    /// What the last request asked for.
    asked_transit: Option<Stage>,
    last_continued: bool,
    exp_stat_sn: Option<Serial>,
    max_cmd_sn: Serial,
    pdus: u32,
    portal_group_tag: Option<u16>,
    target_alias: Option<String>,
    ended: bool,
}

/// Keys of the security stage as they came in one text.
#[derive(Default)]
struct SecurityKeys<'a> {
    method: Option<&'a str>,
    algorithm: Option<&'a str>,
    identifier: Option<&'a str>,
    challenge: Option<&'a str>,
    name: Option<&'a str>,
    response: Option<&'a str>,
}

impl Login {
    /// Checks the configuration and makes the first request.
    ///
    /// # Errors
    /// The configuration breaks a rule: names, the list of CHAP algorithms, equal secrets in both directions.
    pub fn start(config: Config) -> Result<(Self, LoginPdu), LoginError> {
        let bad_name = |what, name: &str| LoginError::BadName { what, name: name.to_owned() };
        if !text::is_iscsi_name(&config.initiator_name) {
            return Err(bad_name("initiator name", &config.initiator_name));
        }
        if let Some(name) = &config.target_name
            && !text::is_iscsi_name(name)
        {
            return Err(bad_name("target name", name));
        }
        if config.initiator_alias.as_ref().is_some_and(|alias| alias.len() > 255 || alias.contains('\0')) {
            return Err(LoginError::BadAlias);
        }
        if let Auth::Chap(chap) = &config.auth {
            if !chap.algorithms.contains(&Algorithm::Md5) {
                return Err(ChapError::Md5NotOffered.into());
            }
            if chap.target.as_ref().is_some_and(|target| target.secret() == chap.account.secret()) {
                return Err(ChapError::EqualSecrets.into());
            }
        }
        let session_type =
            if config.target_name.is_some() { SessionType::Normal } else { SessionType::Discovery };
        let mut out = Outgoing::new();
        out.push("InitiatorName", &config.initiator_name);
        if let Some(alias) = &config.initiator_alias {
            out.push("InitiatorAlias", alias);
        }
        out.push("SessionType", session_type.name());
        if let Some(name) = &config.target_name {
            out.push("TargetName", name);
        }
        // The security stage is always entered, so that a target that wants authentication can say so.
        out.push("AuthMethod", method_offered(&config.auth));
        let negotiation = Negotiation::new(session_type, config.params.clone());
        let max_cmd_sn = config.cmd_sn;
        let mut login = Self {
            config,
            session_type,
            stage: Stage::Security,
            security: Security::MethodOffered,
            algorithm: None,
            negotiation,
            seen: Seen::default(),
            assembler: Assembler::default(),
            out,
            asked_transit: None,
            last_continued: false,
            exp_stat_sn: None,
            max_cmd_sn,
            pdus: 0,
            portal_group_tag: None,
            target_alias: None,
            ended: false,
        };
        let request = login.next_request();
        Ok((login, request))
    }

    /// Takes the target's response.
    ///
    /// # Errors
    /// The login failed; the connection is to be closed.
    pub fn receive(&mut self, header: &Bhs, data: &[u8]) -> Result<Progress, LoginError> {
        if self.ended {
            return Err(LoginError::Ended);
        }
        let progress = self.take_response(header, data);
        self.ended = !matches!(progress, Ok(Progress::Send(_)));
        progress
    }

    fn take_response(&mut self, header: &Bhs, data: &[u8]) -> Result<Progress, LoginError> {
        self.pdus += 1;
        if self.pdus > MAX_LOGIN_PDUS {
            return Err(LoginError::Endless);
        }
        if header.opcode() == Some(Opcode::Reject) {
            return Err(LoginError::Rejected(Reject::decode(header)?.reason));
        }
        let response = LoginResponse::decode(header)?;
        if response.itt != self.config.itt {
            return Err(LoginError::Protocol("response has another task tag than the request"));
        }
        let status = LoginStatus { class: response.status_class, detail: response.status_detail };
        match status.class {
            0 => {}
            1 => return moved(status, data),
            _ => return Err(LoginError::Refused(status)),
        }
        self.check_response(&response)?;

        let mut assembler = std::mem::take(&mut self.assembler);
        let text = assembler.push(data, response.continues)?;
        if self.last_continued && (!data.is_empty() || response.transit.is_some()) {
            // 6.2: an unfinished text is answered by an empty PDU.
            return Err(LoginError::Protocol("response to an unfinished text is not empty"));
        }
        if let Some(text) = text {
            let pairs = text::parse(text)?;
            match self.stage {
                Stage::Security => self.take_security(&pairs, response.transit.is_some())?,
                _ => self.take_operational(&pairs, response.transit.is_some())?,
            }
        }
        self.assembler = assembler;
        if let Some(next) = response.transit {
            self.enter(next)?;
            if next == Stage::FullFeature {
                return self.finish(&response).map(|logged_in| Progress::Done(Box::new(logged_in)));
            }
        }
        if response.continues && !self.out.is_empty() {
            return Err(LoginError::Protocol("response has an unfinished text while ours is unfinished"));
        }
        Ok(Progress::Send(self.next_request()))
    }

    fn check_response(&mut self, response: &LoginResponse) -> Result<(), LoginError> {
        if response.isid != self.config.isid {
            return Err(LoginError::Protocol("response has another ISID than the request"));
        }
        if response.version_active != 0 {
            return Err(LoginError::Protocol("response has another version than the request"));
        }
        if response.stage != self.stage {
            return Err(LoginError::Protocol("response is of another stage than the request"));
        }
        match (response.transit, self.asked_transit) {
            (None, _) => {}
            (Some(_), None) => return Err(LoginError::Protocol("transit to a next stage was not asked for")),
            (Some(next), Some(asked)) if next > asked => {
                return Err(LoginError::Protocol("transit goes beyond the stage that was asked for"));
            }
            (Some(_), Some(_)) => {}
        }
        if self.exp_stat_sn.is_some_and(|expected| expected != response.sn.stat_sn) {
            return Err(LoginError::Protocol("StatSN does not follow that of the last response"));
        }
        self.exp_stat_sn = Some(response.sn.stat_sn.next());
        // 4.2.2.1: both are ignored where MaxCmdSN is below ExpCmdSN - 1.
        if response.sn.max_cmd_sn.is_at_or_after(response.sn.exp_cmd_sn.sub(1)) {
            self.max_cmd_sn = response.sn.max_cmd_sn;
        }
        Ok(())
    }

    /// Names and addresses, which may come in both stages. Returns whether it was one.
    fn take_any_stage(&mut self, key: &str, value: &str) -> Result<bool, LoginError> {
        match key {
            "TargetPortalGroupTag" => {
                let tag = text::parse_number_in(value, &(0..=0xFFFF))
                    .ok_or(LoginError::Protocol("TargetPortalGroupTag is not a number of 16 bits"))?;
                let got = tag as u16;
                if let Some(expected) = self.config.portal_group_tag
                    && expected != got
                {
                    return Err(LoginError::PortalGroup { got, expected });
                }
                self.portal_group_tag = Some(got);
            }
            "TargetAlias" => self.target_alias = Some(value.chars().take(255).collect()),
            // May come more than once; it matters in redirections only.
            "TargetAddress" => return Ok(true),
            "InitiatorName" | "InitiatorAlias" | "SessionType" | "TargetName" => {
                return Err(LoginError::Protocol("response has a key that only initiators send"));
            }
            _ => return Ok(false),
        }
        self.seen.note(key)?;
        Ok(true)
    }

    fn take_security(&mut self, pairs: &[(&str, &str)], last: bool) -> Result<(), LoginError> {
        let mut keys = SecurityKeys::default();
        for &(key, value) in pairs {
            if self.take_any_stage(key, value)? {
                continue;
            }
            let slot = match key {
                "AuthMethod" => &mut keys.method,
                "CHAP_A" => &mut keys.algorithm,
                "CHAP_I" => &mut keys.identifier,
                "CHAP_C" => &mut keys.challenge,
                "CHAP_N" => &mut keys.name,
                "CHAP_R" => &mut keys.response,
                _ if params::is_operational(key) => {
                    return Err(LoginError::Protocol("operational key in the security stage"));
                }
                _ => {
                    self.seen.note(key)?;
                    if value == text::NOT_UNDERSTOOD {
                        return Err(ParamError::NotUnderstood(key.to_owned()).into());
                    }
                    // Nothing can be said any more in the last exchange of a stage.
                    if !last {
                        self.out.push(key, text::NOT_UNDERSTOOD);
                    }
                    continue;
                }
            };
            self.seen.note(key)?;
            *slot = Some(value);
        }
        if let Some(method) = keys.method {
            self.take_method(method)?;
        }
        match self.config.auth.clone() {
            Auth::Chap(chap) => self.take_chap(&chap, &keys),
            Auth::None if keys.algorithm.is_some() || keys.response.is_some() => {
                Err(LoginError::Protocol("CHAP without agreement on it"))
            }
            Auth::None => Ok(()),
        }
    }

    fn take_method(&mut self, answer: &str) -> Result<(), LoginError> {
        let offered = method_offered(&self.config.auth);
        if answer != offered {
            let answer = answer.chars().take(64).collect();
            return Err(LoginError::AuthMethod { offered, answer });
        }
        self.security = match &self.config.auth {
            Auth::None => Security::Done,
            Auth::Chap(chap) => {
                self.out.push("CHAP_A", &Algorithm::list(&chap.algorithms));
                Security::AlgorithmsOffered
            }
        };
        Ok(())
    }

    fn take_chap(&mut self, chap: &Chap, keys: &SecurityKeys<'_>) -> Result<(), LoginError> {
        if let Some(answer) = keys.algorithm {
            if self.security != Security::AlgorithmsOffered || keys.method.is_some() {
                return Err(LoginError::Protocol("CHAP_A out of turn"));
            }
            let algorithm = text::parse_number(answer)
                .and_then(Algorithm::from_number)
                .filter(|algorithm| chap.algorithms.contains(algorithm))
                .ok_or_else(|| ChapError::NotOffered(answer.chars().take(16).collect()))?;
            self.algorithm = Some(algorithm);
            let theirs = Challenge::parse(keys.identifier, keys.challenge)?;
            self.out.push("CHAP_N", chap.account.name());
            self.out.push("CHAP_R", &theirs.respond(algorithm, chap.account.secret()).to_text());
            let ours = chap.target.is_some().then(|| Challenge::generate(algorithm, &chap.entropy));
            if let Some(ours) = &ours {
                // 9.2.1: a challenge of theirs must not become one of ours; only bad entropy can do that.
                if ours.reflects(&theirs) {
                    return Err(ChapError::ReflectedChallenge.into());
                }
                ours.write(&mut self.out);
            }
            self.security = Security::Responded(ours);
        } else if keys.identifier.is_some() || keys.challenge.is_some() {
            return Err(LoginError::Protocol("CHAP challenge without CHAP_A"));
        } else if keys.response.is_some() || keys.name.is_some() {
            let (Security::Responded(Some(ours)), Some(algorithm), Some(target)) =
                (&self.security, self.algorithm, &chap.target)
            else {
                return Err(LoginError::Protocol("CHAP response out of turn"));
            };
            let name = keys.name.ok_or(ChapError::Missing("CHAP_N"))?;
            ours.verify(algorithm, target.secret(), Some(chap.account.secret()), keys.response)?;
            if name != target.name() {
                return Err(ChapError::WrongName(name.chars().take(255).collect()).into());
            }
            self.security = Security::Done;
        }
        Ok(())
    }

    fn take_operational(&mut self, pairs: &[(&str, &str)], last: bool) -> Result<(), LoginError> {
        for &(key, value) in pairs {
            if self.take_any_stage(key, value)? {
                continue;
            }
            if key == "AuthMethod" || key.starts_with("CHAP_") {
                return Err(LoginError::Protocol("security key in the operational stage"));
            }
            let before = self.out.clone();
            self.negotiation.take(key, value, &mut self.out)?;
            if last && !params::is_operational(key) {
                // Nothing can be said any more in the last exchange, and unknown keys need not hold it up.
                self.out = before;
            }
        }
        Ok(())
    }

    fn enter(&mut self, next: Stage) -> Result<(), LoginError> {
        if !self.out.is_empty() {
            // 11.13.6: with T, the response must not need another answer.
            return Err(LoginError::Protocol("transit although an answer is needed"));
        }
        if self.stage == Stage::Security {
            match (&self.security, &self.config.auth) {
                // One-way: that the target moves on is its consent.
                (Security::Done | Security::Responded(None), _) => {}
                // A target without interest in security need not answer the method None.
                (Security::MethodOffered, Auth::None) => {}
                (Security::Responded(Some(_)), _) => return Err(ChapError::Missing("CHAP_R").into()),
                _ => return Err(LoginError::AuthenticationSkipped),
            }
            self.security = Security::Done;
        }
        self.stage = next;
        if next == Stage::Operational {
            self.negotiation.offer(&mut self.out);
        }
        Ok(())
    }

    fn finish(&self, response: &LoginResponse) -> Result<LoggedIn, LoginError> {
        if response.tsih == 0 || (self.config.tsih != 0 && response.tsih != self.config.tsih) {
            return Err(LoginError::Protocol("final response has a wrong session handle"));
        }
        Ok(LoggedIn {
            negotiated: self.negotiation.finish()?,
            nexus: Nexus {
                isid: self.config.isid,
                tsih: response.tsih,
                cid: self.config.cid,
                cmd_sn: self.config.cmd_sn,
                max_cmd_sn: self.max_cmd_sn,
                stat_sn: response.sn.stat_sn.next(),
            },
            portal_group_tag: self.portal_group_tag,
            target_alias: self.target_alias.clone(),
            chap_algorithm: self.algorithm,
        })
    }

    fn next_request(&mut self) -> LoginPdu {
        let (data, continues) = self.out.next_segment(MAX_LOGIN_DATA_BYTES);
        self.last_continued = continues;
        let wanted = match self.stage {
            // Only when there is no further step of ours to come.
            Stage::Security => match (&self.security, &self.config.auth) {
                (Security::Done | Security::Responded(_), _) | (Security::MethodOffered, Auth::None) => {
                    Some(Stage::Operational)
                }
                _ => None,
            },
            Stage::Operational | Stage::FullFeature => Some(Stage::FullFeature),
        };
        self.asked_transit = wanted.filter(|_| !continues);
        let request = LoginRequest {
            transit: self.asked_transit,
            continues,
            stage: self.stage,
            version_max: 0,
            version_min: 0,
            data_len_bytes: data.len() as u32,
            isid: self.config.isid,
            tsih: self.config.tsih,
            itt: self.config.itt,
            cid: self.config.cid,
            cmd_sn: self.config.cmd_sn,
            exp_stat_sn: self.exp_stat_sn.unwrap_or_default(),
        };
        LoginPdu { header: request.encode(), data }
    }

    /// The session type of the login.
    #[must_use]
    pub const fn session_type(&self) -> SessionType {
        self.session_type
    }
}

const fn method_offered(auth: &Auth) -> &'static str {
    match auth {
        Auth::None => text::NONE,
        // Not `None` as well: whoever configures a secret does not want to do without.
        Auth::Chap(_) => "CHAP",
    }
}

fn moved(status: LoginStatus, data: &[u8]) -> Result<Progress, LoginError> {
    let addresses: Vec<TargetAddress> = text::parse(data)?
        .into_iter()
        .filter(|(key, _)| *key == "TargetAddress")
        .filter_map(|(_, value)| TargetAddress::parse(value))
        .collect();
    if addresses.is_empty() {
        return Err(LoginError::Protocol("redirection without a usable TargetAddress"));
    }
    Ok(Progress::Moved(Moved { permanently: status == LoginStatus::MOVED_PERMANENTLY, addresses }))
}
