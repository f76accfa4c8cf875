//! Logging in: `iscsi::login::target` with what this server is configured to be.

use std::sync::Arc;

use iscsi::chap::{ChapError, Entropy};
use iscsi::login::LoginStatus;
use iscsi::login::target::{self, Auth, Chap, Claim, Decision, LoggedIn, LoginError};
use iscsi::params::{DigestPolicy, Params};
use iscsi::pdu::Bhs;
use iscsi::serial::Serial;
use iscsi::target::Config as FullFeatureConfig;
use rustix::rand::{GetRandomFlags, getrandom};

use super::conn::ConnError;
use super::out::Batch;
use crate::config::{Config, DigestChoice, SessionConfig};

/// What all logins at portals of one group are made with.
pub(super) struct LoginContext {
    config: Arc<target::Config>,
}

impl LoginContext {
    pub(super) fn new(config: &Config, group: u16) -> Result<Self, ChapError> {
        let mut targets = Vec::new();
        for target in &config.targets {
            let auth = match &target.chap {
                None => Auth::None,
                Some(account) => Auth::Chap(Chap::new(vec![account.clone()], target.mutual_chap.clone())?),
            };
            targets.push(target::TargetConfig { auth, ..target::TargetConfig::new(target.name.clone()) });
        }
        let config = target::Config {
            targets,
            portal_group_tag: group,
            // What is listed is no secret here; every target guards itself.
            discovery_auth: Auth::None,
            params: params(&config.session),
            command_window: u32::from(config.session.queue_depth),
        };
        Ok(Self { config: Arc::new(config) })
    }
}

fn params(session: &SessionConfig) -> Params {
    let policy = |choice| match choice {
        DigestChoice::Any => DigestPolicy::Optional,
        DigestChoice::None => DigestPolicy::Off,
        DigestChoice::Crc32c => DigestPolicy::Prefer,
    };
    Params {
        header_digest: policy(session.header_digest),
        data_digest: policy(session.data_digest),
        max_recv_data_segment_bytes: session.max_recv_segment_bytes,
        max_burst_bytes: session.max_burst_bytes,
        first_burst_bytes: session.first_burst_bytes,
        initial_r2t: session.initial_r2t,
        immediate_data: session.immediate_data,
        max_outstanding_r2t: u16::from(session.max_outstanding_r2t),
        // Nothing of a session outlives its connection.
        time2wait_s: 0,
        time2retain_s: 0,
        ..Params::default()
    }
}

/// One login under way.
pub(super) struct Login {
    machine: target::Login,
}

/// What a login PDU led to.
pub(super) enum LoginStep {
    /// The answer is in the batch.
    Continue,
    /// The initiator may come in, if the server has room: call [`Login::decide`].
    Decide(Claim),
}

impl Login {
    pub(super) fn new(context: &LoginContext) -> std::io::Result<Self> {
        let mut entropy = [0; 33];
        let mut filled = 0;
        while filled < entropy.len() {
            filled += getrandom(&mut entropy[filled..], GetRandomFlags::empty())?;
        }
        let machine = target::Login::new(Arc::clone(&context.config), Entropy(entropy), Serial(0));
        Ok(Self { machine })
    }

    pub(super) fn receive(
        &mut self,
        bhs: &Bhs,
        data: &[u8],
        batch: &mut Batch,
    ) -> Result<LoginStep, ConnError> {
        match self.machine.receive(bhs, data) {
            target::Progress::Send(pdu) => {
                batch.push(&pdu.header, &pdu.data, Default::default());
                Ok(LoginStep::Continue)
            }
            target::Progress::Decide(claim) => Ok(LoginStep::Decide(claim)),
            target::Progress::Failed(pdu, error) => {
                batch.push(&pdu.header, &pdu.data, Default::default());
                Err(error.into())
            }
            // Comes from `decide` only.
            target::Progress::Done(..) => Err(LoginError::Protocol("login ended without a decision").into()),
        }
    }

    /// Answers the last request of the login.
    pub(super) fn decide(
        &mut self,
        decision: Result<u16, LoginStatus>,
        batch: &mut Batch,
    ) -> Result<Box<LoggedIn>, ConnError> {
        let decision = match decision {
            Ok(tsih) => Decision::Accept { tsih },
            Err(status) => Decision::Refuse(status),
        };
        match self.machine.decide(decision) {
            target::Progress::Done(pdu, logged_in) => {
                batch.push(&pdu.header, &pdu.data, Default::default());
                Ok(logged_in)
            }
            target::Progress::Failed(pdu, error) => {
                batch.push(&pdu.header, &pdu.data, Default::default());
                Err(error.into())
            }
            target::Progress::Send(_) | target::Progress::Decide(_) => {
                Err(LoginError::Protocol("login goes on after the decision").into())
            }
        }
    }
}

/// The full-feature phase as it was agreed on.
pub(super) fn full_feature(logged_in: &LoggedIn, queue_depth: u16) -> FullFeatureConfig {
    let negotiated = &logged_in.negotiated;
    FullFeatureConfig {
        queue_depth,
        max_recv_segment_bytes: negotiated.max_recv_data_segment_bytes,
        max_send_segment_bytes: negotiated.max_send_data_segment_bytes,
        max_burst_bytes: negotiated.max_burst_bytes,
        first_burst_bytes: negotiated.first_burst_bytes,
        initial_r2t: negotiated.initial_r2t,
        immediate_data: negotiated.immediate_data,
        max_outstanding_r2t: negotiated.max_outstanding_r2t.min(255) as u8,
        discovery: logged_in.claim.target.is_none(),
        exp_cmd_sn: logged_in.nexus.cmd_sn,
        stat_sn: logged_in.nexus.stat_sn,
        cid: logged_in.nexus.cid,
    }
}
