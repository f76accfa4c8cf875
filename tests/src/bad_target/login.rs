//! The login phase: the machine of the `iscsi` crate, and rules that spoil its answers.

use std::io;
use std::sync::Arc;

use iscsi::chap::Entropy;
use iscsi::login::target::{Config, Decision, Login, Progress, TargetConfig};
use iscsi::login::{LoginPdu, LoginStatus};
use iscsi::params::Params;
use iscsi::pdu::{Bhs, Itt, LoginRequest, LoginResponse, Pdu, Stage, TargetSn};
use iscsi::serial::Serial;

use super::IQN;
use super::answer::{Numbers, Out, spoil};
use super::conn::Reader;
use super::event::Event;
use super::script::Action;
use super::server::{Shared, State};

/// Where StatSN starts: just before the wrap.
const FIRST_STAT_SN: u32 = 0xFFFF_FFF8;

/// Logs in; false if the connection ended instead.
pub fn run(shared: &Arc<Shared>, id: usize, reader: &mut Reader) -> io::Result<bool> {
    let options = shared.lock().options.clone();
    let params = Params {
        max_recv_data_segment_bytes: options.segment_bytes,
        max_burst_bytes: options.max_burst_bytes,
        first_burst_bytes: options.first_burst_bytes,
        initial_r2t: options.initial_r2t,
        immediate_data: options.immediate_data,
        max_outstanding_r2t: options.max_r2t,
        ..Params::default()
    };
    let config = Config {
        targets: vec![TargetConfig::new(IQN)],
        portal_group_tag: options.group,
        discovery_auth: Default::default(),
        params,
        command_window: options.window,
    };
    let mut login = Login::new(Arc::new(config), Entropy([7; 33]), Serial(FIRST_STAT_SN));
    loop {
        let (header, data) = reader.pdu()?;
        let data = data.unwrap_or_default();
        let stalled = shared.lock().conns[id].stalled;
        if stalled {
            shared.wait(std::time::Duration::from_secs(3600), |s| !s.conns[id].stalled || !s.conns[id].open);
        }
        let actions = shared.update(|s| {
            s.note(id, "in", "login", Some(header.0));
            let actions = s.turn(Event::Login);
            actions.iter().for_each(|action| {
                s.at_once(id, action);
            });
            actions
        });
        if !shared.lock().conns[id].open {
            return Ok(false);
        }
        if let Some(refusal) = actions.iter().find_map(|action| refusal(&header, action)) {
            shared.update(|s| send(s, id, &refusal, &actions));
            return finish_refusal(shared, id, reader);
        }
        let mut progress = login.receive(&header, &data);
        if let Progress::Decide(claim) = &progress {
            let tsih = shared.update(|s| {
                reinstate(s, id, (claim.initiator_name.clone(), claim.isid.0, options.group));
                s.next_tsih += 1;
                s.next_tsih - 1
            });
            progress = login.decide(Decision::Accept { tsih });
        }
        match progress {
            Progress::Send(pdu) => shared.update(|s| send(s, id, &pdu, &actions)),
            Progress::Failed(pdu, error) => {
                shared.update(|s| {
                    if !matches!(error.status(), LoginStatus::NOT_FOUND) {
                        s.breaches.push(format!("connection {id}: login: {error}"));
                    }
                    send(s, id, &pdu, &actions);
                });
                return finish_refusal(shared, id, reader);
            }
            Progress::Done(pdu, logged_in) => {
                let n = logged_in.negotiated;
                let nexus = logged_in.nexus;
                reader.rx.configure(n.limits(0), n.digests);
                shared.update(|s| {
                    send(s, id, &pdu, &actions);
                    let conn = &mut s.conns[id];
                    conn.digests = n.digests;
                    conn.stat_sn = nexus.stat_sn;
                    conn.acknowledged = nexus.stat_sn;
                    conn.exp_cmd_sn = nexus.cmd_sn;
                    conn.window = options.window;
                    conn.max_told = nexus.cmd_sn.add(options.window.max(1)).sub(1);
                    conn.negotiated = Some(n);
                    s.note(id, "event", "full-feature", None);
                });
                return Ok(true);
            }
            Progress::Decide(_) => return Ok(false),
        }
    }
}

/// A login under the name of a session ends it and its tasks (6.3.5), which those under other ISIDs or to other portal
/// groups survive.
fn reinstate(state: &mut State, id: usize, name: (String, [u8; 6], u16)) {
    let name = Some(name);
    for other in 0..state.conns.len() {
        let conn = &mut state.conns[other];
        if other != id && conn.name == name {
            conn.tasks.clear();
            conn.hung.clear();
            conn.held_back.clear();
            conn.name = None;
            conn.stalled = false;
            if conn.open {
                conn.close(false);
            }
            state.note(other, "event", "reinstated", None);
        }
    }
    state.conns[id].name = name;
}

fn send(state: &mut State, id: usize, pdu: &LoginPdu, actions: &[Action]) {
    let mut data = pdu.data.clone();
    for action in actions {
        match action {
            Action::Text(pair) => {
                data.extend_from_slice(pair.as_bytes());
                data.push(0);
            }
            Action::Strip(key) => {
                let named = format!("{key}=");
                let pairs = data.split_inclusive(|&byte| byte == 0);
                data = pairs.filter(|pair| !pair.starts_with(named.as_bytes())).flatten().copied().collect();
            }
            _ => {}
        }
    }
    let mut header = pdu.header;
    header.set_data_len(data.len() as u32);
    // Its numbers are the machine's; padded here, since it goes out as it is.
    let mut out = Out {
        header: header.0,
        data,
        numbers: Numbers::Status,
        edits: Vec::new(),
        spoil_header: false,
        spoil_data: false,
    };
    let mut outs = vec![out.clone()];
    let manner = spoil(&mut outs, actions, state.lun(), None);
    let at = outs.iter().position(|o| o.numbers == Numbers::Status);
    if let Some(at) = at {
        out.edits = std::mem::take(&mut outs[at].edits);
        outs[at].header = out.edited();
        let mut bytes = outs[at].header.to_vec();
        bytes.extend_from_slice(&out.data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        outs[at].data = bytes;
        outs[at].numbers = Numbers::None;
    }
    state.send(id, outs, manner.truncate);
}

fn refusal(request: &Bhs, action: &Action) -> Option<LoginPdu> {
    let (class, detail, text) = match action {
        Action::Refuse(class, detail) => (*class, *detail, String::new()),
        Action::Redirect(address) => (1, 1, format!("TargetAddress={address}\0")),
        _ => return None,
    };
    let request = LoginRequest::decode(request).ok()?;
    let response = LoginResponse {
        transit: None,
        continues: false,
        stage: Stage::Security,
        version_max: 0,
        version_active: 0,
        data_len_bytes: text.len() as u32,
        isid: request.isid,
        tsih: 0,
        itt: if request.itt.is_none() { Itt(0) } else { request.itt },
        // Not valid, whatever they are (11.13.5): nonsense.
        sn: TargetSn { stat_sn: Serial(0xDEAD_BEEF), exp_cmd_sn: Serial(0x8000_0000), max_cmd_sn: Serial(7) },
        status_class: class,
        status_detail: detail,
    };
    Some(LoginPdu { header: response.encode(), data: text.into_bytes() })
}

/// The initiator closes a connection whose login was refused (11.13.5), and sends nothing more.
fn finish_refusal(shared: &Arc<Shared>, id: usize, reader: &mut Reader) -> io::Result<bool> {
    shared.update(|s| s.note(id, "event", "refused", None));
    reader.pdu()?;
    shared.update(|s| s.breaches.push(format!("connection {id}: a PDU after a refused login (11.13.5)")));
    Ok(false)
}
