//! The model target: the login and session machines of the `iscsi` crate over a disk with a volatile cache.
//!
//! It keeps the rules that an initiator relies on - above all RFC 7143 6.3.5: a login with the ISID of a session in the
//! same portal group ends that session and its commands before it succeeds - and takes its time otherwise: commands are
//! executed when their time has come, in any order, even if nobody waits for them any more, as long as their session
//! lives. Faults are drawn where they would arise.

mod conn;
mod disk;
mod mangle;
mod unit;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use iscsi::chap::Entropy;
use iscsi::discovery::TargetAddress;
use iscsi::login::target::{Config, Login, TargetConfig};
use iscsi::params::{DigestPolicy, Params};
use iscsi::pdu::framing::{Digests, Limits, Receiver};
use iscsi::scsi::sense::asc;
use iscsi::serial::Serial;

use conn::{Connection, Phase};
pub use disk::Disk;
pub use unit::Unit;

use crate::faults::{Faults, Kind};
use crate::net::ConnId;
use crate::oracle::WriteId;
use crate::rng::Rng;
use crate::trace::Trace;

pub const IQN: &str = "iqn.2026-01.sim:disk";

/// How a portal is reached and what group it belongs to.
#[derive(Clone, Copy, Debug)]
pub struct Portal {
    pub address: std::net::SocketAddr,
    pub group: u16,
}

/// What the target grants.
#[derive(Clone, Debug)]
pub struct Settings {
    pub portals: Vec<Portal>,
    pub params: Params,
    pub window: u16,
    /// Longest data segment that the target sends, where it may send longer ones.
    pub segment_bytes: u32,
    /// Shortest and longest time that a command takes, in nanoseconds.
    pub latency_ns: (u64, u64),
    /// POWER ON for the first command of a new nexus, as many targets do.
    pub attention_at_login: bool,
}

/// What the target wants of the world.
#[derive(Debug)]
pub enum Action {
    Send(ConnId, Vec<u8>),
    Close(ConnId),
    /// Call [`Target::execute`] then.
    Timer {
        at: u64,
        conn: ConnId,
        serial: u64,
    },
}

/// What a call may use.
pub struct Context<'a> {
    pub now: u64,
    pub faults: &'a mut Faults,
    pub trace: &'a mut Trace,
    pub actions: &'a mut Vec<Action>,
}

/// A session's name.
type Nexus = ([u8; 6], u16);

pub struct Target {
    pub settings: Settings,
    pub unit: Unit,
    pub disk: Disk,
    rng: Rng,
    conns: BTreeMap<ConnId, Connection>,
    attentions: BTreeMap<Nexus, VecDeque<u16>>,
    /// Sessions that were there since the last power loss.
    known: Vec<Nexus>,
    next_serial: u64,
    next_tsih: u16,
    /// Until then nothing is executed.
    stalled_until: u64,
    /// Blocks of each write that were answered with GOOD.
    answered: BTreeMap<WriteId, u64>,
    powered_on: bool,
}

impl Target {
    pub fn new(settings: Settings, unit: Unit, seed: u64) -> Self {
        Self {
            disk: Disk::new(unit.blocks, unit.write_cache),
            settings,
            unit,
            rng: Rng::new(seed, 2),
            conns: BTreeMap::new(),
            attentions: BTreeMap::new(),
            known: Vec::new(),
            next_serial: 0,
            next_tsih: 0,
            stalled_until: 0,
            answered: BTreeMap::new(),
            powered_on: false,
        }
    }

    /// A connection was made to a portal.
    pub fn connected(&mut self, id: ConnId, portal: usize, cx: &mut Context<'_>) {
        let mut target = TargetConfig::new(IQN);
        let others: Vec<_> = self.settings.portals.iter().enumerate().filter(|(n, _)| *n != portal).collect();
        // Not where that may be a portal without access.
        if !others.is_empty() && self.unit.groups.len() == 1 && cx.faults.roll(Kind::Redirect, cx.now) {
            let (_, other) = others[cx.faults.rng().below(others.len() as u64) as usize];
            let address = TargetAddress {
                host: other.address.ip().to_string(),
                port: other.address.port(),
                portal_group_tag: None,
            };
            target.moved = Some((cx.faults.rng().permille(500), vec![address]));
        }
        let config = Config {
            targets: vec![target],
            portal_group_tag: self.settings.portals[portal].group,
            discovery_auth: Default::default(),
            params: self.settings.params.clone(),
            command_window: u32::from(self.settings.window),
        };
        // Near the ends of the number space, where signed and unsigned arithmetic part.
        let stat_sn = self.rng.pick(&[0, 0xFFFF_FFF0, 0x7FFF_FFF8, 12345]);
        let login = Login::new(Arc::new(config), Entropy([7; 33]), Serial(stat_sn));
        self.conns.insert(
            id,
            Connection {
                id,
                group: self.settings.portals[portal].group,
                rx: Receiver::new(Limits::default()),
                input: Vec::new(),
                data: Vec::new(),
                digests: Digests::default(),
                phase: Phase::Login(Box::new(login)),
            },
        );
    }

    /// Bytes of the initiator arrived.
    pub fn bytes(&mut self, id: ConnId, bytes: &[u8], cx: &mut Context<'_>) {
        let Some(mut conn) = self.conns.remove(&id) else { return };
        conn.input.extend_from_slice(bytes);
        let open = conn.work(self, cx);
        self.put_back(conn, open, cx);
    }

    fn put_back(&mut self, conn: Connection, open: bool, cx: &mut Context<'_>) {
        if open {
            self.conns.insert(conn.id, conn);
        } else {
            cx.actions.push(Action::Close(conn.id));
        }
    }

    /// The initiator closed the connection, or it broke: with it the session ends, and its commands (error recovery level
    /// 0, Time2Retain 0).
    pub fn closed(&mut self, id: ConnId) {
        self.conns.remove(&id);
    }

    pub fn has(&self, id: ConnId) -> bool {
        self.conns.contains_key(&id)
    }

    /// Whether bytes to the initiator may be garbled: digests tell.
    pub fn has_digests(&self, id: ConnId) -> bool {
        self.conns.get(&id).is_some_and(|c| c.digests.header && c.digests.data)
    }

    /// The time of a command has come.
    pub fn execute(&mut self, id: ConnId, serial: u64, cx: &mut Context<'_>) {
        if cx.now < self.stalled_until {
            cx.actions.push(Action::Timer { at: self.stalled_until, conn: id, serial });
            return;
        }
        let Some(mut conn) = self.conns.remove(&id) else { return };
        conn.execute(self, serial, cx);
        conn.transmit(self, cx);
        self.put_back(conn, true, cx);
    }

    /// Nothing is executed until then.
    pub fn stall(&mut self, until: u64) {
        self.stalled_until = until;
    }

    /// All connections are gone, and what was underway on them.
    pub fn restart(&mut self, power_loss: bool) -> usize {
        self.conns.clear();
        if !power_loss {
            return 0;
        }
        self.powered_on = true;
        self.attentions.clear();
        for &nexus in &self.known {
            self.attentions.insert(nexus, VecDeque::from([asc::POWER_ON_OR_RESET]));
        }
        self.disk.power_loss()
    }

    /// Whether all blocks of a write were answered with GOOD.
    pub fn has_answered(&self, write: WriteId, blocks: u64) -> bool {
        self.answered.get(&write).is_some_and(|&n| n >= blocks)
    }

    /// Something that the target does by itself.
    pub fn spontaneous(&mut self, kind: Kind, id: ConnId, cx: &mut Context<'_>) {
        let Some(mut conn) = self.conns.remove(&id) else { return };
        let open = conn.spontaneous(self, kind, cx);
        conn.transmit(self, cx);
        self.put_back(conn, open, cx);
    }

    /// Command windows that were kept closed move again.
    pub fn open_windows(&mut self, cx: &mut Context<'_>) {
        let ids: Vec<_> = self.conns.keys().copied().collect();
        for id in ids {
            let Some(mut conn) = self.conns.remove(&id) else { continue };
            conn.open_window();
            conn.transmit(self, cx);
            self.put_back(conn, true, cx);
        }
    }

    /// A unit attention for every nexus.
    pub fn attention(&mut self, code: u16) {
        for nexus in &self.known {
            self.attentions.entry(*nexus).or_default().push_back(code);
        }
    }

    /// An ALUA state changes.
    pub fn set_state(&mut self, group: usize, state: u8) {
        if let Some(group) = self.unit.groups.get_mut(group) {
            group.1 = state;
        }
        if self.unit.groups.len() > 1 {
            self.attention(asc::ALUA_STATE_CHANGED);
        }
    }

    /// The ALUA state of a group, 0 (active/optimised) where there is no ALUA.
    fn state(&self, group: u16) -> u8 {
        self.unit.groups.iter().find(|(tag, _)| *tag == group).map_or(0, |(_, state)| *state)
    }

    /// Makes room in the cache.
    pub fn destage(&mut self) {
        self.disk.destage(&mut self.rng);
    }

    /// Another session of the same initiator port with the same portal group: it is reinstated, the old one ends (6.3.5).
    fn reinstate(&mut self, nexus: Nexus, cx: &mut Context<'_>) {
        let old: Vec<_> = self
            .conns
            .iter()
            .filter(|(_, conn)| matches!(&conn.phase, Phase::Full(full) if full.nexus == nexus))
            .map(|(id, _)| *id)
            .collect();
        for id in old {
            self.conns.remove(&id);
            cx.actions.push(Action::Close(id));
        }
        let queue = self.attentions.entry(nexus).or_default();
        if !self.known.contains(&nexus) {
            self.known.push(nexus);
            if self.settings.attention_at_login || self.powered_on {
                queue.push_back(asc::POWER_ON_OR_RESET);
            }
        } else if self.settings.attention_at_login {
            queue.push_back(asc::NEXUS_LOSS);
        }
    }

    /// LOGICAL UNIT RESET: the unit's commands of all sessions end.
    fn reset_unit(&mut self, by: Nexus) {
        for conn in self.conns.values_mut() {
            if let Phase::Full(full) = &mut conn.phase {
                full.abort_all();
            }
        }
        let others: Vec<_> = self.known.iter().copied().filter(|nexus| *nexus != by).collect();
        for nexus in others {
            self.attentions.entry(nexus).or_default().push_back(0x2903);
        }
    }

    fn latency(&mut self) -> u64 {
        let (low, high) = self.settings.latency_ns;
        self.rng.spread(low, high)
    }
}

/// What a target of the seed grants.
pub fn params(rng: &mut Rng, digests: bool) -> Params {
    let policy = if digests { DigestPolicy::Optional } else { DigestPolicy::Off };
    Params {
        header_digest: policy,
        data_digest: policy,
        max_recv_data_segment_bytes: rng.pick(&[512, 1024, 4096, 8192, 65536]),
        max_burst_bytes: rng.pick(&[512, 2048, 4096, 16384, 262_144]),
        first_burst_bytes: rng.pick(&[512, 1024, 4096, 65536]),
        initial_r2t: rng.permille(500),
        immediate_data: rng.permille(600),
        max_outstanding_r2t: rng.pick(&[1, 2, 8]),
        time2wait_s: 0,
        time2retain_s: 0,
        ..Params::default()
    }
}
