//! Takes everything over from an old process: the new one's steps.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vhost::vhost_user::BackendReqHandler;

use super::connection::Connection;
use super::handler::{Facts, Handler};
use super::listen::SocketFile;
use super::port::{Command, Port};
use super::resume;
use super::server::{End, Entry, ServeError, ServeOptions, Server, ask_device, system};
use crate::control::{Control, StatusSource};
use crate::device::RingDevice;
use crate::fabric::{Apart, Fabric};
use crate::handover::Fds;
use crate::handover::anchor::Lifeline;
use crate::handover::state::{BadState, DeviceState, ServerState};
use crate::handover::taker::Taker;
use crate::mailbox::Mailbox;
use crate::mem::MemTable;
use crate::poll::{DataLoop, check_cpu};
use crate::process::{Signals, chain};

/// Takes over from the process behind `taker` and serves until a signal asks to end, or until the next hand-over.
/// `devices` are those of the offer, in its order, with their names; they get their state here. `ready` is called
/// once, when this process is the owner.
///
/// # Errors
/// Nothing was taken over, and the old process goes on; or [`ServeError`] later.
pub fn take_over<D: RingDevice>(
    taker: Taker,
    devices: Vec<(Arc<str>, D)>,
    options: &ServeOptions,
    signals: &Signals,
    extra: StatusSource,
    ready: impl FnOnce(),
) -> Result<End, ServeError> {
    take_over_joined(taker, devices, Apart, options, signals, extra, ready)
}

/// As [`take_over`], of devices that `fabric` joins, which gets its state here as well.
///
/// # Errors
/// As [`take_over`].
pub fn take_over_joined<D: RingDevice, F: Fabric<D>>(
    taker: Taker,
    devices: Vec<(Arc<str>, D)>,
    fabric: F,
    options: &ServeOptions,
    signals: &Signals,
    extra: StatusSource,
    ready: impl FnOnce(),
) -> Result<End, ServeError> {
    let parts = Parts::new(options)?;
    let (state, fds) = taker.state()?;
    let server = match parts.build(state, fds, (devices, fabric), options, extra) {
        Ok(server) => server,
        Err(error) => {
            taker.refuse(chain(&error));
            return Err(error.into());
        }
    };
    // With an error this process is not the owner, and what it built ends without a trace: no socket file is removed, no
    // session logged out.
    taker.own()?;
    let server = server.own(options)?;
    ready();
    server.run(signals)
}

/// What can be made before anything stops.
struct Parts {
    mailbox: Arc<Mailbox<Command>>,
}

/// What is made of the state, and touches nothing yet.
struct Built<D, F> {
    entries: Vec<Entry>,
    front_ends: Vec<Option<FrontEnd>>,
    control: Control,
    data: DataLoop<D, F>,
    mailbox: Arc<Mailbox<Command>>,
    lifeline: Option<OwnedFd>,
    log: Option<OwnedFd>,
}

struct FrontEnd {
    stream: UnixStream,
    handler: Arc<Mutex<Handler>>,
    requests: BackendReqHandler<Mutex<Handler>>,
}

impl Parts {
    fn new(options: &ServeOptions) -> Result<Self, ServeError> {
        if let Some(cpu) = options.cpu {
            check_cpu(cpu)?;
        }
        Ok(Self { mailbox: Arc::new(Mailbox::new().map_err(system("create an event descriptor"))?) })
    }

    fn build<D: RingDevice, F: Fabric<D>>(
        self,
        state: ServerState,
        mut fds: Fds,
        (devices, fabric): (Vec<(Arc<str>, D)>, F),
        options: &ServeOptions,
        extra: StatusSource,
    ) -> Result<Built<D, F>, BadState> {
        let now = Instant::now();
        if state.devices.len() != devices.len() {
            let (theirs, ours) = (state.devices.len(), devices.len());
            return Err(BadState::Text(format!("a state of {theirs} devices for an offer of {ours}")));
        }
        let (side_names, sides): (Vec<_>, Vec<_>) = options.take_sides().into_iter().unzip();
        let metrics = serde_json::from_value(state.metrics)
            .map_err(|source| BadState::Json { what: "the counters", source })?;
        let metrics = Arc::new(metrics);
        let failed = |source: rustix::io::Errno| BadState::System {
            what: "create an epoll instance",
            source: source.into(),
        };
        let mut data = DataLoop::new(
            Vec::new(),
            fabric,
            Arc::clone(&self.mailbox),
            options.poll,
            Arc::default(),
            Arc::clone(&metrics),
        )
        .map_err(failed)?
        .with_sides(sides)
        .with_ring(options.take_ring())
        .supervised(options.pulse.clone(), options.poll_share);
        let (mut entries, mut front_ends) = (Vec::new(), Vec::new());
        for (index, (state, (name, device))) in state.devices.into_iter().zip(devices).enumerate() {
            if state.name != *name {
                return Err(BadState::Text(format!("a state of {} for {name}", state.name)));
            }
            let DeviceState { socket, front_end, port: port_state, .. } = state;
            let socket = SocketFile::import(socket, &mut fds)?;
            let memory = match &front_end {
                Some(front_end) => {
                    let region = |region: &crate::handover::state::RegionState| -> Result<_, BadState> {
                        Ok((region.spec, fds.take(region.fd)?.into()))
                    };
                    let regions = front_end.memory.iter().map(region).collect::<Result<Vec<_>, _>>()?;
                    MemTable::new(regions)?
                }
                None => MemTable::default(),
            };
            let features = port_state.features;
            let mut port = Port::new(Arc::clone(&name), device);
            data.import(&mut port, port_state, memory.map(), &mut fds, now)?;
            let facts = Facts::of(&port.device);
            let metrics = Arc::clone(port.device.metrics());
            front_ends.push(match front_end {
                Some(state) => {
                    let stream = UnixStream::from(fds.take(state.fd)?);
                    let handler =
                        Handler::resume(index, facts, Arc::clone(&self.mailbox), memory, state.status);
                    let handler = Arc::new(Mutex::new(handler));
                    let failed = |source| BadState::System { what: "go on with a front end", source };
                    let requests = resume::requests(&stream, &handler, features, state.protocol);
                    Some(FrontEnd { stream, requests: requests.map_err(failed)?, handler })
                }
                None => None,
            });
            entries.push(Entry { name, socket, facts, metrics, connection: None });
            data.add(port);
        }
        data.import_sides(state.sides, &mut fds, now)?;
        data.import_fabric(state.fabric, &mut fds, now)?;
        data.resume_from(state.stopped_ns, state.completed_ns);
        let names = entries.iter().map(|entry| (Arc::clone(&entry.name), Arc::clone(&entry.metrics)));
        let names = names.chain(side_names.into_iter().zip(data.side_metrics())).collect();
        let ask = ask_device(Arc::clone(&self.mailbox));
        let control = Control::import((state.control, state.page), &mut fds, metrics, names, ask, extra)?;
        let lifeline = fds.take_if(state.lifeline)?;
        let log = fds.take_if(state.log)?;
        fds.finish()?;
        Ok(Built { entries, front_ends, control, data, mailbox: self.mailbox, lifeline, log })
    }
}

impl<D: RingDevice, F: Fabric<D>> Built<D, F> {
    /// This process is the owner: the data thread first, everything else can wait.
    fn own(mut self, options: &ServeOptions) -> Result<Server, ServeError> {
        let lifeline = self.lifeline.map(Lifeline::new).transpose().map_err(system("follow the anchor"))?;
        self.entries.iter_mut().for_each(|entry| entry.socket.own());
        self.control.own();
        self.data.own_sides().map_err(system("accept msgq clients"))?;
        let mut server = Server::start(self.entries, self.control, self.data, self.mailbox, options)?;
        server.lifeline = lifeline;
        if let Some(log) = self.log {
            rustix::stdio::dup2_stderr(log).map_err(system("go on with the log"))?;
        }
        for (entry, front_end) in server.entries.iter_mut().zip(self.front_ends.drain(..)) {
            let Some(FrontEnd { stream, handler, requests }) = front_end else { continue };
            let connection = Connection::resume(Arc::clone(&entry.name), stream, handler, requests);
            entry.connection = Some(connection.map_err(system("serve a front end"))?);
        }
        Ok(server)
    }
}
