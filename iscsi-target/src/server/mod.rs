//! The server: sockets, the event loop, and what concerns several sessions at once.
//!
//! One thread does everything, run to completion: it takes what a wake-up brought, carries the commands out and sends
//! the answers of the whole batch with one gather send. Nothing is shared, so nothing is locked.

mod conn;
mod control;
mod error;
mod frame;
mod full;
mod idle;
mod login;
mod out;
mod registry;
mod wider;

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use iscsi::login::LoginStatus;
use iscsi::login::target::Claim;
use iscsi::pdu::framing::Limits;
use iscsi::pdu::{AsyncEvent, AsyncMessage, TargetSn};
use iscsi::scsi::Lun;
use iscsi::scsi::alua::TargetPortGroup;
use iscsi::target::Session;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

pub use error::Error;
pub use idle::PollMode;

use crate::config::{Config, Medium, TargetConfig};
use crate::device::Device;
use crate::lu::{Identity, LogicalUnit};
use crate::storage::{FileStorage, MemoryStorage, Storage};
use conn::{Conn, ConnError, Phase, Progress};
use control::Control;
pub use control::{parse_state, state_name};
use error::{Chain, os};
use full::FullFeature;
use idle::Idle;
use login::{Login, LoginContext};
use registry::{Key, Registry};

const STOP: u64 = u64::MAX;
const CONTROL: u64 = u64::MAX - 1;
/// The listeners follow from here; no connection has such a number.
const LISTENERS: u64 = u64::MAX - 0xFFFF;
/// Most portals.
const MAX_PORTALS: usize = 64;
const MAX_EVENTS: usize = 64;
/// Deadlines are looked at this often.
const TICK: Duration = Duration::from_secs(1);

/// A slot for a connection. The generation tells events of an earlier one apart.
#[derive(Default)]
struct Slot {
    generation: u32,
    conn: Option<Conn>,
}

/// A portal.
struct Listener {
    socket: TcpListener,
    group: u16,
    login: LoginContext,
}

/// The server.
pub struct Server {
    config: Config,
    devices: Vec<Device>,
    listeners: Vec<Listener>,
    /// Where they listen, and their groups.
    portals: Vec<(SocketAddr, u16)>,
    groups: Vec<TargetPortGroup>,
    control: Option<Control>,
    /// No connections are taken until the next tick: the process is out of descriptors.
    resting: bool,
    epoll: OwnedFd,
    slots: Vec<Slot>,
    connections: usize,
    registry: Registry,
}

/// Builds a target with its logical units.
fn build_device(target: &TargetConfig) -> Result<Device, Error> {
    let mut device = Device::new(target.name.clone());
    let mut next = 0;
    for lun in &target.luns {
        let number = lun.number.unwrap_or(next);
        next = number.saturating_add(1);
        let (storage, label): (Box<dyn Storage>, String) = match &lun.medium {
            Medium::Memory(bytes) => (Box::new(MemoryStorage::new(*bytes)), "mem".into()),
            Medium::File(path) => {
                let label = path.canonicalize().unwrap_or_else(|_| path.clone()).display().to_string();
                let storage = FileStorage::open(path, lun.options.read_only).map_err(|source| {
                    Error::Medium { path: path.display().to_string(), lun: number, source }
                })?;
                (Box::new(storage), label)
            }
        };
        let derived = || Identity::derive(&target.name, u64::from(number), &label);
        let identity = lun.naa.map_or_else(derived, Identity::of_naa);
        let unit = LogicalUnit::new(storage, identity, lun.options);
        if unit.blocks() == 0 {
            return Err(Error::Empty { path: label, lun: number, block_bytes: lun.options.block_bytes });
        }
        if !device.add(Lun::from_number(u64::from(number)), unit) {
            return Err(Error::Lun { target: target.name.clone(), lun: number });
        }
    }
    Ok(device)
}

impl Server {
    /// Opens the media and listens. Sessions are served by [`run`](Self::run).
    pub fn new(config: Config) -> Result<Self, Error> {
        let mut devices: Vec<Device> = Vec::new();
        for target in &config.targets {
            if devices.iter().any(|device| device.name() == target.name) {
                return Err(Error::Target(target.name.clone()));
            }
            devices.push(build_device(target)?);
        }
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(os("creating an epoll instance"))?;
        let (mut listeners, mut portals) = (Vec::new(), Vec::new());
        for (portal, id) in config.listen.iter().take(MAX_PORTALS).zip(LISTENERS..) {
            let socket = TcpListener::bind(portal.addr)
                .map_err(|source| Error::Listen { addr: portal.addr, source })?;
            socket.set_nonblocking(true).map_err(os("setting the listener non-blocking"))?;
            portals
                .push((socket.local_addr().map_err(os("asking for the listener's address"))?, portal.group));
            epoll::add(&epoll, &socket, epoll::EventData::new_u64(id), epoll::EventFlags::IN)
                .map_err(os("watching the listener"))?;
            let login = LoginContext::new(&config, portal.group).map_err(Error::Chap)?;
            listeners.push(Listener { socket, group: portal.group, login });
        }
        let states = config.groups.iter().map(|&(group, state)| (group, Some(state)));
        let groups: Vec<_> = config.listen.iter().map(|portal| (portal.group, None)).chain(states).collect();
        let groups = control::groups(&groups);
        devices.iter_mut().for_each(|device| device.set_groups(&groups));
        let control = match &config.control {
            None => None,
            Some(path) => {
                let control = Control::start(path)
                    .map_err(|source| Error::Control { path: path.display().to_string(), source })?;
                epoll::add(&epoll, &control.wake, epoll::EventData::new_u64(CONTROL), epoll::EventFlags::IN)
                    .map_err(os("watching the control socket"))?;
                Some(control)
            }
        };
        Ok(Self {
            config,
            devices,
            listeners,
            portals,
            groups,
            control,
            resting: false,
            epoll,
            slots: Vec::new(),
            connections: 0,
            registry: Registry::default(),
        })
    }

    /// Where it listens, with the portal groups.
    pub fn portals(&self) -> &[(SocketAddr, u16)] {
        &self.portals
    }

    /// Number of logical units of all targets.
    pub fn unit_count(&self) -> usize {
        self.devices.iter().map(Device::unit_count).sum()
    }

    /// Most memory that receive buffers and waiting data take, beside the media.
    pub fn memory_bound_bytes(&self) -> u64 {
        // Receive buffer; waiting data and one command more; a batch.
        let per_connection = u64::from(self.config.session.max_recv_segment_bytes) + (128 << 10) + (16 << 20);
        per_connection * self.config.max_connections as u64
    }

    /// Pins the calling thread, which is to be the one that [`run`](Self::run)s, to the configured hardware thread.
    pub fn pin(&self) -> Result<(), Error> {
        if let Some(cpu) = self.config.cpu {
            let mut set = rustix::thread::CpuSet::new();
            if cpu >= rustix::thread::CpuSet::MAX_CPU {
                return Err(Error::Pin { cpu, source: io::ErrorKind::InvalidInput.into() });
            }
            set.set(cpu);
            rustix::thread::sched_setaffinity(None, &set)
                .map_err(|source| Error::Pin { cpu, source: source.into() })?;
        }
        Ok(())
    }

    /// Serves until `stop` becomes readable. Then writes back what is cached and closes all connections.
    pub fn run(&mut self, stop: impl AsFd) -> Result<(), Error> {
        epoll::add(&self.epoll, stop, epoll::EventData::new_u64(STOP), epoll::EventFlags::IN)
            .map_err(os("watching for the end"))?;
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
                MAX_EVENTS];
        let mut idle = Idle::new(self.config.poll);
        let mut next_tick = Instant::now() + TICK;
        loop {
            let count = self.wait(&mut events, &mut idle, next_tick)?;
            let now = Instant::now();
            for event in &events[..count] {
                match event.data.u64() {
                    STOP => return self.end(),
                    CONTROL => self.controlled(),
                    id @ LISTENERS..CONTROL => self.accept((id - LISTENERS) as usize, now),
                    id => self.serve(id, event.flags, now),
                }
            }
            if now >= next_tick {
                self.tick(now);
                next_tick = now + TICK;
            }
        }
    }

    /// Waits for events: looks for a while, if that pays, then sleeps.
    fn wait(&self, events: &mut [epoll::Event], idle: &mut Idle, next_tick: Instant) -> Result<usize, Error> {
        let since = Instant::now();
        let budget = idle.budget();
        loop {
            let now = Instant::now();
            let look = budget.is_none_or(|budget| now.duration_since(since) < budget);
            let timeout = if look {
                Some(Timespec::default())
            } else if self.connections == 0 && !self.resting {
                // Nothing has a deadline.
                None
            } else {
                Timespec::try_from(next_tick.saturating_duration_since(now)).ok()
            };
            match epoll::wait(&self.epoll, &mut *events, timeout.as_ref()) {
                Ok(0) if look && now < next_tick => {}
                Ok(count) => {
                    idle.worked(since, Instant::now());
                    return Ok(count);
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(os("waiting for events")(e)),
            }
        }
    }

    fn accept(&mut self, portal: usize, now: Instant) {
        loop {
            let Some(listener) = self.listeners.get(portal) else { return };
            match listener.socket.accept() {
                Ok((socket, peer)) => {
                    if self.connections >= self.config.max_connections {
                        tracing::warn!(%peer, limit = self.config.max_connections, "turned away: too many connections");
                        continue;
                    }
                    if let Err(error) = self.add(socket, portal, now) {
                        tracing::warn!(%peer, %error, "connection lost before its login");
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e)
                    if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {}
                Err(error) => {
                    // Out of descriptors, probably: the ones that wait are taken when others have gone. Until then the
                    // listener stays readable, and would be all that the thread deals with.
                    tracing::warn!(%error, "accept failed");
                    self.resting = self.watch_listeners(epoll::EventFlags::empty()).is_ok();
                    return;
                }
            }
        }
    }

    fn watch_listeners(&self, flags: epoll::EventFlags) -> rustix::io::Result<()> {
        self.listeners.iter().zip(LISTENERS..).try_for_each(|(listener, id)| {
            epoll::modify(&self.epoll, &listener.socket, epoll::EventData::new_u64(id), flags)
        })
    }

    fn add(&mut self, socket: TcpStream, portal: usize, now: Instant) -> io::Result<()> {
        let listener = self.listeners.get(portal).ok_or(io::ErrorKind::NotFound)?;
        let index = self.slots.iter().position(|slot| slot.conn.is_none()).unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        let conn = Conn::new(socket, listener.group, Login::new(&listener.login)?, Limits::default(), now)?;
        let slot = &mut self.slots[index];
        let id = u64::from(slot.generation) << 32 | index as u64;
        let data = epoll::EventData::new_u64(id);
        epoll::add(&self.epoll, &conn.socket, data, epoll::EventFlags::IN)?;
        tracing::debug!(peer = %conn.peer, "connected");
        slot.conn = Some(conn);
        self.connections += 1;
        Ok(())
    }

    fn serve(&mut self, id: u64, flags: epoll::EventFlags, now: Instant) {
        let (index, generation) = (id as u32 as usize, (id >> 32) as u32);
        let Some(slot) = self.slots.get_mut(index).filter(|slot| slot.generation == generation) else {
            return;
        };
        let Some(conn) = &mut slot.conn else { return };
        let readable =
            flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR);
        let result = if readable { conn.fill(now) } else { Ok(()) };
        if let Err(error) = result.and_then(|()| self.work(index)) {
            self.close(index, &error);
        }
    }

    /// Deals with what a connection received and sends its answers, until it must wait.
    fn work(&mut self, index: usize) -> Result<(), ConnError> {
        loop {
            let Some(conn) = self.slots.get_mut(index).and_then(|slot| slot.conn.as_mut()) else {
                return Ok(());
            };
            match conn.advance(&mut self.devices, &self.portals) {
                Ok(Progress::Idle) => {}
                Ok(Progress::Wider(wider)) => {
                    self.wider(index, wider);
                    continue;
                }
                Ok(Progress::Decide(claim)) => {
                    let admitted = self.admit(index, claim);
                    if admitted.is_err() {
                        self.last_words(index);
                    }
                    admitted?;
                    continue;
                }
                Err(error) => {
                    self.last_words(index);
                    return Err(error);
                }
            }
            conn.fill_batch();
            if conn.batch.is_empty() || !conn.batch.send(&conn.socket)? {
                if conn.is_finished() {
                    return Err(ConnError::LoggedOut);
                }
                return self.watch(index);
            }
        }
    }

    /// Before a connection is closed for an error: a Reject or a login response tells the initiator why. It has one
    /// chance to go out.
    fn last_words(&mut self, index: usize) {
        if let Some(conn) = self.slots.get_mut(index).and_then(|slot| slot.conn.as_mut()) {
            conn.fill_batch();
            let _ = conn.batch.send(&conn.socket);
        }
    }

    /// Tells epoll what the connection waits for, if that changed.
    fn watch(&mut self, index: usize) -> Result<(), ConnError> {
        let Some(slot) = self.slots.get_mut(index) else { return Ok(()) };
        let Some(conn) = &mut slot.conn else { return Ok(()) };
        let wanted = conn.wanted();
        if wanted != conn.interest {
            let mut flags = epoll::EventFlags::empty();
            flags.set(epoll::EventFlags::IN, wanted.0);
            flags.set(epoll::EventFlags::OUT, wanted.1);
            let id = u64::from(slot.generation) << 32 | index as u64;
            epoll::modify(&self.epoll, &conn.socket, epoll::EventData::new_u64(id), flags)
                .map_err(io::Error::from)?;
            conn.interest = wanted;
        }
        Ok(())
    }

    /// An initiator has proved who it is: an earlier session of the same name is closed before the login is answered
    /// (RFC 7143 6.3.5), so that nothing of it can act afterwards.
    fn admit(&mut self, index: usize, claim: Claim) -> Result<(), ConnError> {
        let Some(group) = self.slots.get(index).and_then(|slot| Some(slot.conn.as_ref()?.group)) else {
            return Ok(());
        };
        let key = Key { initiator: claim.initiator_name, isid: claim.isid, target: claim.target, group };
        let decision = match claim.tsih {
            0 => {
                if let Some(old) = self.registry.find(&key).filter(|&old| old != index) {
                    self.close(old, &ConnError::Reinstated);
                }
                Ok(self.registry.free_tsih())
            }
            // A session has one connection; another cannot join it.
            tsih if self.registry.has(tsih) => Err(LoginStatus::TOO_MANY_CONNECTIONS),
            _ => Err(LoginStatus::NO_SESSION),
        };
        let Some(conn) = self.slots.get_mut(index).and_then(|slot| slot.conn.as_mut()) else { return Ok(()) };
        let Phase::Login(login) = &mut conn.phase else { return Ok(()) };
        let logged_in = login.decide(decision, &mut conn.batch)?;
        let tsih = logged_in.nexus.tsih;
        let nexus = self.registry.enter(key, tsih, index);
        let target = logged_in.claim.target;
        tracing::info!(
            peer = %conn.peer,
            initiator = logged_in.claim.initiator_name,
            chap_name = logged_in.chap_name,
            target = target.and_then(|target| self.devices.get(target)).map_or("discovery", Device::name),
            isid = %logged_in.claim.isid,
            tsih,
            sessions = self.registry.len(),
            "logged in"
        );
        let session = Session::new(login::full_feature(&logged_in, self.config.session.queue_depth));
        conn.enter_full_feature(FullFeature::new(
            session,
            logged_in.negotiated.digests,
            nexus,
            target,
            group,
        ));
        Ok(())
    }

    /// Ends a connection with its session.
    fn close(&mut self, index: usize, reason: &ConnError) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let Some(conn) = slot.conn.take() else { return };
        slot.generation = slot.generation.wrapping_add(1);
        self.connections -= 1;
        if reason.is_ordinary() {
            tracing::info!(peer = %conn.peer, reason = %Chain(reason), "disconnected");
        } else {
            tracing::warn!(peer = %conn.peer, reason = %Chain(reason), "disconnected");
        }
        if let Phase::Full(full) = &conn.phase {
            self.registry.leave(index);
            if let Some(device) = full.target.and_then(|target| self.devices.get_mut(target)) {
                device.nexus_lost(full.nexus);
            }
            tracing::debug!(peer = %conn.peer, counters = ?full.session.counters(), "session ended");
        }
        // Dropping the socket closes it and takes it out of epoll.
    }

    /// Looks at deadlines: logins that take too long, connections that are silent.
    fn tick(&mut self, now: Instant) {
        if self.resting {
            self.resting = self.watch_listeners(epoll::EventFlags::IN).is_err();
        }
        let keepalive = self.config.keepalive;
        for index in 0..self.slots.len() {
            let Some(conn) = &mut self.slots[index].conn else { continue };
            let silent = now.saturating_duration_since(conn.last_heard);
            let error = match &mut conn.phase {
                Phase::Login(_) if now.duration_since(conn.since) >= self.config.login_timeout => {
                    Some(ConnError::LoginTimeout)
                }
                Phase::Full(full) if !keepalive.is_zero() && silent >= keepalive => {
                    if full.session.ping_outstanding() {
                        (silent >= 2 * keepalive).then_some(ConnError::Silent)
                    } else {
                        full.session.send_ping();
                        self.work(index).err()
                    }
                }
                _ => None,
            };
            if let Some(error) = error {
                self.close(index, &error);
            }
        }
    }

    /// An orderly end: initiators are told, media are written back.
    fn end(&mut self) -> Result<(), Error> {
        for slot in &mut self.slots {
            if let Some(conn) = &mut slot.conn
                && let Phase::Full(full) = &mut conn.phase
            {
                let message = AsyncMessage {
                    event: AsyncEvent::SessionDropped,
                    vendor_code: 0,
                    data_len_bytes: 0,
                    lun: Lun::ZERO,
                    sn: TargetSn {
                        stat_sn: Default::default(),
                        exp_cmd_sn: Default::default(),
                        max_cmd_sn: Default::default(),
                    },
                    parameter1: 0,
                    parameter2: 0,
                    parameter3: 0,
                };
                full.session.send_async(message, Vec::new());
                // As far as the socket takes it; nobody is waited for.
                conn.fill_batch();
                let _ = conn.batch.send(&conn.socket);
            }
            slot.conn = None;
        }
        for device in &mut self.devices {
            device.flush().map_err(os("writing the media back"))?;
        }
        Ok(())
    }
}
