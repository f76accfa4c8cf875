//! Interim login (to be replaced by iscsi::login::target).
use super::conn::ConnError;
use super::out::Batch;
use crate::config::{Config, SessionConfig};
use iscsi::pdu::framing::{Digests, append_pdu};
use iscsi::pdu::{Bhs, Isid, LoginRequest, LoginResponse, Pdu, Stage, TargetSn};
use iscsi::target::Config as SessionParams;

pub(super) struct LoginContext {
    targets: Vec<String>,
    session: SessionConfig,
}
impl LoginContext {
    pub(super) fn new(c: &Config) -> Self {
        Self { targets: c.targets.iter().map(|t| t.name.clone()).collect(), session: c.session }
    }
}
pub(super) struct Login {
    targets: Vec<String>,
    session: SessionConfig,
    stat: u32,
    kv: Vec<(String, String)>,
}
pub(super) enum LoginStep {
    Continue,
    Established(Box<Established>),
}
pub(super) struct Established {
    pub(super) initiator: String,
    pub(super) isid: Isid,
    pub(super) target: Option<usize>,
    req: LoginRequest,
    reply: Vec<u8>,
    session: SessionConfig,
    kv: Vec<(String, String)>,
    stat: u32,
}
fn respond(req: &LoginRequest, tsih: u16, data: &[u8], stat: u32, batch: &mut Batch) {
    let r = LoginResponse {
        transit: req.transit,
        continues: false,
        stage: req.stage,
        version_max: 0,
        version_active: 0,
        isid: req.isid,
        tsih,
        itt: req.itt,
        sn: TargetSn { stat_sn: stat.into(), exp_cmd_sn: req.cmd_sn, max_cmd_sn: req.cmd_sn.add(31) },
        status_class: 0,
        status_detail: 0,
        data_len_bytes: data.len() as u32,
    };
    let mut out = Vec::new();
    append_pdu(&mut out, &r.encode(), data, Digests::default());
    batch.push_raw(&out);
}
impl Login {
    pub(super) fn new(c: &LoginContext) -> Self {
        Self { targets: c.targets.clone(), session: c.session, stat: 0, kv: vec![] }
    }
    pub(super) fn receive(
        &mut self,
        bhs: &Bhs,
        data: &[u8],
        batch: &mut Batch,
    ) -> Result<LoginStep, ConnError> {
        let req = LoginRequest::decode(bhs).map_err(|e| ConnError::Login(e.to_string()))?;
        let mut reply = String::new();
        for p in data.split(|b| *b == 0).filter(|p| !p.is_empty()) {
            let p = String::from_utf8_lossy(p).to_string();
            let (k, v) = p.split_once('=').unwrap();
            self.kv.push((k.into(), v.into()));
            let s = &self.session;
            match k {
                "AuthMethod" => reply += "AuthMethod=None\0TargetPortalGroupTag=1\0",
                "HeaderDigest" => {
                    reply +=
                        &format!("HeaderDigest={}\0", if v.starts_with("CRC32C") { "CRC32C" } else { "None" })
                }
                "DataDigest" => {
                    reply +=
                        &format!("DataDigest={}\0", if v.starts_with("CRC32C") { "CRC32C" } else { "None" })
                }
                "InitialR2T" => {
                    reply +=
                        &format!("InitialR2T={}\0", if s.initial_r2t || v == "Yes" { "Yes" } else { "No" })
                }
                "ImmediateData" => {
                    reply += &format!(
                        "ImmediateData={}\0",
                        if s.immediate_data && v == "Yes" { "Yes" } else { "No" }
                    )
                }
                "MaxBurstLength" => {
                    reply += &format!("MaxBurstLength={}\0", s.max_burst_bytes.min(v.parse().unwrap()))
                }
                "FirstBurstLength" => {
                    reply += &format!("FirstBurstLength={}\0", s.first_burst_bytes.min(v.parse().unwrap()))
                }
                "MaxRecvDataSegmentLength" => {
                    reply += &format!("MaxRecvDataSegmentLength={}\0", s.max_recv_segment_bytes)
                }
                "MaxOutstandingR2T" => reply += "MaxOutstandingR2T=1\0",
                "MaxConnections" => reply += "MaxConnections=1\0",
                "ErrorRecoveryLevel" => reply += "ErrorRecoveryLevel=0\0",
                "DataPDUInOrder" | "DataSequenceInOrder" => reply += &format!("{k}=Yes\0"),
                "DefaultTime2Wait" | "DefaultTime2Retain" => reply += &format!("{k}=0\0"),
                _ => {}
            }
        }
        let get = |k: &str| self.kv.iter().rev().find(|x| x.0 == k).map(|x| x.1.clone());
        if req.transit == Some(Stage::FullFeature) {
            let target = match get("TargetName") {
                Some(t) => Some(
                    self.targets
                        .iter()
                        .position(|x| *x == t)
                        .ok_or(ConnError::Login("no such target".into()))?,
                ),
                None => None,
            };
            return Ok(LoginStep::Established(Box::new(Established {
                initiator: get("InitiatorName").unwrap_or_default(),
                isid: req.isid,
                target,
                req,
                reply: reply.into_bytes(),
                session: self.session,
                kv: self.kv.clone(),
                stat: self.stat,
            })));
        }
        respond(&req, 0, reply.as_bytes(), self.stat, batch);
        self.stat += 1;
        Ok(LoginStep::Continue)
    }
}
impl Established {
    pub(super) fn answer(&self, tsih: u16, batch: &mut Batch) -> (SessionParams, Digests) {
        respond(&self.req, tsih, &self.reply, self.stat, batch);
        let get = |k: &str| self.kv.iter().rev().find(|x| x.0 == k).map(|x| x.1.clone());
        let s = &self.session;
        (
            SessionParams {
                queue_depth: s.queue_depth,
                max_recv_segment_bytes: s.max_recv_segment_bytes,
                max_send_segment_bytes: get("MaxRecvDataSegmentLength").map_or(8192, |v| v.parse().unwrap()),
                max_burst_bytes: s
                    .max_burst_bytes
                    .min(get("MaxBurstLength").map_or(262144, |v| v.parse().unwrap())),
                first_burst_bytes: s
                    .first_burst_bytes
                    .min(get("FirstBurstLength").map_or(65536, |v| v.parse().unwrap())),
                initial_r2t: get("InitialR2T").is_none_or(|v| v == "Yes") || s.initial_r2t,
                immediate_data: s.immediate_data && get("ImmediateData").is_none_or(|v| v == "Yes"),
                max_outstanding_r2t: 1,
                discovery: self.target.is_none(),
                exp_cmd_sn: self.req.cmd_sn,
                stat_sn: (self.stat + 1).into(),
                cid: self.req.cid,
            },
            Digests {
                header: get("HeaderDigest").is_some_and(|v| v.starts_with("CRC32C")),
                data: get("DataDigest").is_some_and(|v| v.starts_with("CRC32C")),
            },
        )
    }
}
