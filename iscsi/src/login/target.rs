//! The target's side of the login phase.
//!
//! [`Login`] takes the requests of one connection. When the initiator has proved who it is and both sides have agreed,
//! it asks the caller to look at its sessions ([`Progress::Decide`]): only the caller knows which there are (6.3.1).

use std::sync::Arc;

use super::{LoginPdu, LoginStatus, MAX_LOGIN_DATA_BYTES, MAX_LOGIN_PDUS, Nexus};
use crate::chap::{Account, Algorithm, Challenge, ChapError, Entropy, Secret};
use crate::discovery::TargetAddress;
use crate::params::{self, Negotiation, ParamError, Seen, SessionType};
use crate::pdu::{Bhs, Isid, Itt, LoginRequest, LoginResponse, Pdu, Stage, TargetSn};
use crate::serial::Serial;
use crate::text::{self, Assembler, Outgoing};

mod config;

pub use config::{Auth, Chap, Claim, Config, Decision, LoggedIn, LoginError, Progress, TargetConfig};

#[derive(Clone, Debug, PartialEq, Eq)]
enum Security {
    /// Nothing said, or an offer that was declined so far.
    Open,
    /// CHAP was chosen; CHAP_A has to come.
    Chosen,
    /// Our challenge was sent.
    Challenged(Algorithm, Challenge),
    /// The initiator has proved who it is, or need not.
    Done,
}

/// Who is at the other end, known from the first whole text on.
#[derive(Clone, Debug)]
struct Peer {
    claim: Claim,
    auth: Auth,
}

/// A login under way.
#[derive(Clone, Debug)]
pub struct Login {
    config: Arc<Config>,
    entropy: Entropy,
    stat_sn: Serial,
    /// The first request: its fields must stay what they are.
    first: Option<LoginRequest>,
    stage: Stage,
    peer: Option<Peer>,
    initiator_alias: Option<String>,
    chap_name: Option<String>,
    security: Security,
    negotiation: Option<Negotiation>,
    seen: Seen,
    assembler: Assembler,
    out: Outgoing,
    pdus: u32,
    /// The final response waits for the caller's decision.
    deciding: bool,
    ended: bool,
}

#[derive(Default)]
struct Keys<'a> {
    initiator_name: Option<&'a str>,
    target_name: Option<&'a str>,
    session_type: Option<&'a str>,
    method: Option<&'a str>,
    algorithms: Option<&'a str>,
    identifier: Option<&'a str>,
    challenge: Option<&'a str>,
    name: Option<&'a str>,
    response: Option<&'a str>,
}

impl Login {
    /// For a new connection. `entropy` is fresh random bytes; `stat_sn` is the first StatSN, any number.
    #[must_use]
    pub fn new(config: Arc<Config>, entropy: Entropy, stat_sn: Serial) -> Self {
        Self {
            config,
            entropy,
            stat_sn,
            first: None,
            stage: Stage::Security,
            peer: None,
            initiator_alias: None,
            chap_name: None,
            security: Security::Open,
            negotiation: None,
            seen: Seen::default(),
            assembler: Assembler::default(),
            out: Outgoing::new(),
            pdus: 0,
            deciding: false,
            ended: false,
        }
    }

    /// Takes the initiator's request.
    pub fn receive(&mut self, header: &Bhs, data: &[u8]) -> Progress {
        match self.take_request(header, data) {
            Ok(progress) => progress,
            Err(error) => self.fail(header.itt(), error),
        }
    }

    /// Tells what the caller decided after [`Progress::Decide`].
    pub fn decide(&mut self, decision: Decision) -> Progress {
        let itt = self.first.map_or(Itt::NONE, |first| first.itt);
        match self.accept(decision) {
            Ok(progress) => progress,
            Err(error) => self.fail(itt, error),
        }
    }

    fn fail(&mut self, itt: Itt, error: LoginError) -> Progress {
        self.ended = true;
        let status = error.status();
        let mut out = Outgoing::new();
        if let LoginError::Moved { .. } = error {
            let target = self.peer.as_ref().and_then(|peer| peer.claim.target);
            let moved = target.and_then(|index| self.config.targets[index].moved.as_ref());
            for address in moved.iter().flat_map(|(_, addresses)| addresses) {
                // 13.8: without the tag here.
                out.push(
                    "TargetAddress",
                    &TargetAddress { portal_group_tag: None, ..address.clone() }.to_string(),
                );
            }
        }
        let (data, _) = out.next_segment(MAX_LOGIN_DATA_BYTES);
        let response = LoginResponse {
            transit: None,
            continues: false,
            stage: self.stage,
            version_max: 0,
            version_active: 0,
            data_len_bytes: data.len() as u32,
            isid: self.first.map_or(Isid([0; 6]), |first| first.isid),
            tsih: self.first.map_or(0, |first| first.tsih),
            itt,
            sn: self.sn(),
            status_class: status.class,
            status_detail: status.detail,
        };
        Progress::Failed(LoginPdu { header: response.encode(), data }, error)
    }

    fn sn(&self) -> TargetSn {
        let exp_cmd_sn = self.first.map_or(Serial(0), |first| first.cmd_sn);
        let max_cmd_sn = exp_cmd_sn.add(self.config.command_window.max(1) - 1);
        TargetSn { stat_sn: self.stat_sn, exp_cmd_sn, max_cmd_sn }
    }

    fn take_request(&mut self, header: &Bhs, data: &[u8]) -> Result<Progress, LoginError> {
        let request = LoginRequest::decode(header)?;
        if self.ended || self.deciding {
            return Err(LoginError::Protocol("a request that is one too many"));
        }
        self.pdus += 1;
        if self.pdus > MAX_LOGIN_PDUS {
            return Err(LoginError::Endless);
        }
        self.check_request(&request)?;
        if !self.out.is_empty() && (!data.is_empty() || request.continues) {
            // 6.2: an unfinished text is answered by an empty PDU.
            return Err(LoginError::Protocol("request to an unfinished text is not empty"));
        }
        let mut assembler = std::mem::take(&mut self.assembler);
        if let Some(text) = assembler.push(data, request.continues)? {
            let pairs = text::parse(text)?;
            self.take_text(&pairs)?;
        }
        self.assembler = assembler;
        self.answer(&request)
    }

    fn check_request(&mut self, request: &LoginRequest) -> Result<(), LoginError> {
        if let Some(first) = &self.first {
            if request.itt != first.itt {
                return Err(LoginError::Protocol("another task tag than in the first request"));
            }
            if (request.isid, request.tsih, request.cid) != (first.isid, first.tsih, first.cid) {
                return Err(LoginError::Protocol("another session or connection than in the first request"));
            }
            if request.cmd_sn != first.cmd_sn {
                return Err(LoginError::Protocol("another CmdSN than in the first request"));
            }
            if request.stage != self.stage {
                return Err(LoginError::Protocol("request of another stage than the current one"));
            }
        } else {
            if request.version_min != 0 {
                return Err(LoginError::Version { min: request.version_min, max: request.version_max });
            }
            self.stage = request.stage;
            self.first = Some(*request);
        }
        Ok(())
    }

    fn take_text(&mut self, pairs: &[(&str, &str)]) -> Result<(), LoginError> {
        let mut keys = Keys::default();
        let mut operational = Vec::new();
        for &(key, value) in pairs {
            let slot = match key {
                "InitiatorName" => &mut keys.initiator_name,
                "TargetName" => &mut keys.target_name,
                "SessionType" => &mut keys.session_type,
                "InitiatorAlias" => {
                    self.seen.note(key)?;
                    self.initiator_alias = Some(value.chars().take(255).collect());
                    continue;
                }
                "TargetAlias" | "TargetAddress" | "TargetPortalGroupTag" => {
                    return Err(LoginError::Protocol("request has a key that only targets send"));
                }
                "AuthMethod" | "CHAP_A" | "CHAP_I" | "CHAP_C" | "CHAP_N" | "CHAP_R"
                    if self.stage != Stage::Security =>
                {
                    return Err(LoginError::Protocol("security key in the operational stage"));
                }
                "AuthMethod" => &mut keys.method,
                "CHAP_A" => &mut keys.algorithms,
                "CHAP_I" => &mut keys.identifier,
                "CHAP_C" => &mut keys.challenge,
                "CHAP_N" => &mut keys.name,
                "CHAP_R" => &mut keys.response,
                "SendTargets" => return Err(LoginError::Protocol("SendTargets during login")),
                _ if self.stage == Stage::Security => {
                    if params::is_operational(key) {
                        return Err(LoginError::Protocol("operational key in the security stage"));
                    }
                    self.seen.note(key)?;
                    if value == text::NOT_UNDERSTOOD {
                        return Err(ParamError::NotUnderstood(key.to_owned()).into());
                    }
                    self.out.push(key, text::NOT_UNDERSTOOD);
                    continue;
                }
                _ => {
                    operational.push((key, value));
                    continue;
                }
            };
            self.seen.note(key)?;
            *slot = Some(value);
        }
        if self.peer.is_none() {
            self.identify(&keys)?;
        } else if keys.initiator_name.or(keys.target_name).or(keys.session_type).is_some() {
            return Err(LoginError::Protocol("a name or the session type after the first request"));
        }
        if self.stage == Stage::Security {
            self.take_security(&keys)?;
        }
        if let Some(negotiation) = &mut self.negotiation
            && self.stage == Stage::Operational
        {
            for (key, value) in operational {
                negotiation.take(key, value, &mut self.out)?;
            }
            negotiation.declare(&mut self.out);
        }
        Ok(())
    }

    /// Reads the first whole text: who is it, and what does it want?
    fn identify(&mut self, keys: &Keys<'_>) -> Result<(), LoginError> {
        let bad = |key, value: &str| LoginError::BadValue { key, value: value.chars().take(64).collect() };
        let initiator_name = keys.initiator_name.ok_or(LoginError::Missing("InitiatorName"))?;
        if !text::is_iscsi_name(initiator_name) {
            return Err(bad("InitiatorName", initiator_name));
        }
        let session_type = match keys.session_type {
            None | Some("Normal") => SessionType::Normal,
            Some("Discovery") => SessionType::Discovery,
            Some(other) => return Err(bad("SessionType", other)),
        };
        let target = match (session_type, keys.target_name) {
            (SessionType::Discovery, _) => None,
            (SessionType::Normal, None) => return Err(LoginError::Missing("TargetName")),
            (SessionType::Normal, Some(name)) => {
                let index = self.config.targets.iter().position(|target| target.name == name);
                Some(index.ok_or_else(|| LoginError::NoTarget(name.chars().take(223).collect()))?)
            }
        };
        let first = self.first.ok_or(LoginError::Protocol("no first request"))?;
        let claim = Claim {
            session_type,
            initiator_name: initiator_name.to_owned(),
            target,
            isid: first.isid,
            tsih: first.tsih,
            cid: first.cid,
        };
        let config = Arc::clone(&self.config);
        let (auth, alias) = match target {
            None => (&config.discovery_auth, None),
            Some(index) => {
                let target = &config.targets[index];
                let allowed = target.initiators.as_ref();
                if allowed.is_some_and(|names| names.iter().all(|name| name != initiator_name)) {
                    return Err(LoginError::NotAllowed(initiator_name.to_owned()));
                }
                (&target.auth, target.alias.as_deref())
            }
        };
        self.peer = Some(Peer { claim, auth: auth.clone() });
        if let Some((permanently, _)) = target.and_then(|index| config.targets[index].moved.as_ref()) {
            return Err(LoginError::Moved { permanently: *permanently });
        }
        if self.stage == Stage::Operational {
            // The initiator has passed the security stage over.
            if matches!(auth, Auth::Chap(_)) {
                return Err(LoginError::AuthenticationRequired);
            }
            self.security = Security::Done;
        }
        // 6.3.1: in the first response that may have it.
        self.out.push_number("TargetPortalGroupTag", u64::from(config.portal_group_tag));
        if let Some(alias) = alias {
            self.out.push("TargetAlias", alias);
        }
        self.negotiation = Some(Negotiation::new(session_type, config.params.clone()));
        Ok(())
    }

    fn take_security(&mut self, keys: &Keys<'_>) -> Result<(), LoginError> {
        let auth = self.peer.as_ref().map_or(Auth::None, |peer| peer.auth.clone());
        if let Some(offered) = keys.method {
            let ours = match &auth {
                Auth::None => text::NONE,
                Auth::Chap(_) => "CHAP",
            };
            if !offered.split(',').any(|method| method == ours) {
                return Err(LoginError::AuthenticationRequired);
            }
            self.out.push("AuthMethod", ours);
            self.security = if matches!(auth, Auth::None) { Security::Done } else { Security::Chosen };
        }
        match (auth, keys) {
            (Auth::Chap(chap), Keys { algorithms: Some(offered), .. }) => self.challenge(&chap, offered),
            (Auth::Chap(chap), Keys { response: Some(_), .. } | Keys { name: Some(_), .. }) => {
                self.verify(&chap, keys)
            }
            (
                _,
                Keys {
                    algorithms: None, identifier: None, challenge: None, name: None, response: None, ..
                },
            ) => Ok(()),
            _ => Err(LoginError::Protocol("CHAP out of turn")),
        }
    }

    fn challenge(&mut self, chap: &Chap, offered: &str) -> Result<(), LoginError> {
        if self.security != Security::Chosen {
            return Err(LoginError::Protocol("CHAP_A out of turn"));
        }
        let algorithm = Algorithm::choose(offered, &chap.algorithms)
            .ok_or_else(|| ChapError::NoAlgorithm(offered.chars().take(64).collect()))?;
        let challenge = Challenge::generate(algorithm, &self.entropy);
        self.out.push_number("CHAP_A", algorithm as u64);
        challenge.write(&mut self.out);
        self.security = Security::Challenged(algorithm, challenge);
        Ok(())
    }

    fn verify(&mut self, chap: &Chap, keys: &Keys<'_>) -> Result<(), LoginError> {
        let Security::Challenged(algorithm, ours) = &self.security else {
            return Err(LoginError::Protocol("CHAP response out of turn"));
        };
        let algorithm = *algorithm;
        let name = keys.name.ok_or(ChapError::Missing("CHAP_N"))?;
        let account = chap.accounts.iter().find(|account| account.name() == name);
        let own = chap.own.as_ref().map(Account::secret);
        let Some(account) = account else {
            // The same work as for a known name, so that time does not tell which names there are.
            let nobody = Secret::new(self.entropy.0)?;
            let _ = ours.verify(algorithm, &nobody, own, keys.response);
            return Err(LoginError::UnknownAccount(name.chars().take(255).collect()));
        };
        ours.verify(algorithm, account.secret(), own, keys.response)?;
        self.chap_name = Some(name.to_owned());
        if keys.identifier.is_some() || keys.challenge.is_some() {
            let theirs = Challenge::parse(keys.identifier, keys.challenge)?;
            if theirs.reflects(ours) {
                return Err(ChapError::ReflectedChallenge.into());
            }
            // 11.13.5: this status also says that target authentication is not supported.
            let own = chap.own.as_ref().ok_or(LoginError::MutualUnsupported)?;
            self.out.push("CHAP_N", own.name());
            self.out.push("CHAP_R", &theirs.respond(algorithm, own.secret()).to_text());
        }
        self.security = Security::Done;
        Ok(())
    }

    /// Makes the response once the request's text, if it is whole, was taken.
    fn answer(&mut self, request: &LoginRequest) -> Result<Progress, LoginError> {
        let (Some(peer), false) = (&self.peer, request.continues) else {
            // 6.2: an unfinished text is answered by an empty PDU.
            return Ok(Progress::Send(self.response(Vec::new(), false, None, 0)));
        };
        let unfinished = self.out.len_bytes() > MAX_LOGIN_DATA_BYTES;
        let authenticated = match (&self.security, &peer.auth) {
            (Security::Done, _) => true,
            (Security::Open, Auth::None) => true,
            (Security::Open, Auth::Chap(_)) if request.transit.is_some() => {
                return Err(LoginError::AuthenticationRequired);
            }
            _ => false,
        };
        let next = request.transit.filter(|_| authenticated && !unfinished);
        if next == Some(Stage::FullFeature) {
            // Refused before anyone looks for sessions.
            if let Some(negotiation) = &self.negotiation {
                negotiation.finish()?;
            }
            self.deciding = true;
            return Ok(Progress::Decide(peer.claim.clone()));
        }
        let (data, continues) = self.out.next_segment(MAX_LOGIN_DATA_BYTES);
        let response = self.response(data, continues, next, 0);
        if let Some(next) = next {
            self.stage = next;
        }
        Ok(Progress::Send(response))
    }

    fn accept(&mut self, decision: Decision) -> Result<Progress, LoginError> {
        if !std::mem::take(&mut self.deciding) {
            return Err(LoginError::Protocol("a decision that was not asked for"));
        }
        let tsih = match decision {
            Decision::Accept { tsih: 0 } => return Err(LoginError::Refused(LoginStatus::TARGET_ERROR)),
            Decision::Accept { tsih } => tsih,
            Decision::Refuse(status) => return Err(LoginError::Refused(status)),
        };
        let (Some(first), Some(peer), Some(negotiation)) = (self.first, &self.peer, &self.negotiation) else {
            return Err(LoginError::Protocol("a decision that was not asked for"));
        };
        let logged_in = LoggedIn {
            claim: peer.claim.clone(),
            initiator_alias: self.initiator_alias.clone(),
            chap_name: self.chap_name.clone(),
            negotiated: negotiation.finish()?,
            nexus: Nexus {
                isid: first.isid,
                tsih,
                cid: first.cid,
                cmd_sn: first.cmd_sn,
                max_cmd_sn: self.sn().max_cmd_sn,
                stat_sn: self.stat_sn.next(),
            },
        };
        let (data, _) = self.out.next_segment(MAX_LOGIN_DATA_BYTES);
        let response = self.response(data, false, Some(Stage::FullFeature), tsih);
        self.ended = true;
        Ok(Progress::Done(response, Box::new(logged_in)))
    }

    fn response(&mut self, data: Vec<u8>, continues: bool, transit: Option<Stage>, tsih: u16) -> LoginPdu {
        let sn = self.sn();
        self.stat_sn = self.stat_sn.next();
        let (isid, old_tsih, itt) =
            self.first.map_or((Isid([0; 6]), 0, Itt::NONE), |first| (first.isid, first.tsih, first.itt));
        let response = LoginResponse {
            transit,
            continues,
            stage: self.stage,
            version_max: 0,
            version_active: 0,
            data_len_bytes: data.len() as u32,
            isid,
            tsih: if tsih == 0 { old_tsih } else { tsih },
            itt,
            sn,
            status_class: 0,
            status_detail: 0,
        };
        LoginPdu { header: response.encode(), data }
    }
}
