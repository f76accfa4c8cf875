//! The second way to run a device model: `vhost-user-backend`'s daemon and its epoll thread (`--server epoll`).
//!
//! It is the reference that tests compare the poll loop with, and the simple choice for hosts that do not want a
//! polling thread. It shares the device model and the chain walk with the poll loop; rings, notifications and messages
//! are the crate's. What the crate lacks stays missing here: no rejection of a second front end by message (it waits
//! in the backlog), no configuration-change message.
//!
//! The daemon serves one connection, so each connection gets a new one. Between connections, and while requests of the
//! previous one are still under way, this module drives the device itself.

mod state;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringRwLock};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use self::state::State;
use crate::ask::{Ask, Told, tell};
use crate::control::{AskSource, Control, StatusSource};
use crate::device::RingDevice;
use crate::poll::FABRIC;
use crate::poll::{CLOSE_AT_EXIT, check_cpu, pin_to};
use crate::process::Signals;
use crate::vu::listen::SocketFile;
use crate::vu::port::{F_INDIRECT, F_PROTOCOL_FEATURES};
use crate::vu::server::system;
use crate::vu::{DeviceSpec, STOP_TIMEOUT, ServeError, ServeOptions};

/// How long a question to a device waits for its lock.
const ASK_TIMEOUT: Duration = Duration::from_millis(500);

type Memory = GuestMemoryAtomic<GuestMemoryMmap<()>>;
type Vring = VringRwLock<Memory>;

/// The device as the crate sees it.
struct Backend<D> {
    state: Arc<Mutex<State<D>>>,
    queues: usize,
    size_max: usize,
    features: u64,
    /// Ends the worker thread of this connection.
    exit: Arc<Mutex<Option<(EventConsumer, EventNotifier)>>>,
}

impl<D> Clone for Backend<D> {
    fn clone(&self) -> Self {
        Self { state: Arc::clone(&self.state), exit: Arc::clone(&self.exit), ..*self }
    }
}

impl<D> Backend<D> {
    fn lock(&self) -> MutexGuard<'_, State<D>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: RingDevice> Backend<D> {
    /// Drives the device until `done`, for [`STOP_TIMEOUT`] at most.
    fn settle(&self, done: impl Fn(&State<D>) -> bool) -> MutexGuard<'_, State<D>> {
        let deadline = Instant::now() + STOP_TIMEOUT;
        loop {
            let mut state = self.lock();
            let moved = state.pass();
            if done(&state) || Instant::now() >= deadline {
                return state;
            }
            if !moved {
                let wait = state.device.wait();
                let mut fds: Vec<_> =
                    wait.fd.into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
                let _ = rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 10_000_000 }));
            }
        }
    }
}

impl<D: RingDevice> VhostUserBackend for Backend<D> {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queues
    }

    // One thread for all queues; what the crate assumes by itself leaves out those from the 33rd on.
    fn queues_per_thread(&self) -> Vec<u64> {
        vec![u64::MAX]
    }

    fn max_queue_size(&self) -> usize {
        self.size_max
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn acked_features(&self, features: u64) {
        let mut state = self.lock();
        state.indirect = features & F_INDIRECT != 0;
        state.device.set_features(features & !F_PROTOCOL_FEATURES);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        let mut state = self.lock();
        let (vrings, memory) = (std::mem::take(&mut state.vrings), state.memory.take());
        state.detach();
        (state.vrings, state.memory) = (vrings, memory);
        drop(state);
        // After a reset the guest uses the memory for something else.
        drop(self.settle(|state| state.inflight() == 0));
    }

    // The crate sets the flag in its queues itself.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut bytes = vec![0; size as usize];
        self.lock().device.read_config(offset, &mut bytes);
        bytes
    }

    fn set_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        self.lock().device.write_config(offset, data);
        Ok(())
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        self.lock().memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.exit.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        let at = queue as usize;
        self.lock().stopping[at] = true;
        let mut state = self.settle(|state| state.flights[at].is_quiet() || state.stalled);
        if !state.flights[at].is_drained() {
            let inflight = state.flights[at].inflight() + state.flights[at].orphans();
            tracing::warn!(queue, inflight, "ring stopped with requests in flight");
            state.leave_behind(at);
        }
        (state.stopping[at], state.broken[at]) = (false, false);
        Ok(())
    }

    fn handle_event(
        &self,
        _event: u16,
        _set: EventSet,
        vrings: &[Self::Vring],
        _thread: usize,
    ) -> io::Result<()> {
        let mut state = self.lock();
        if state.vrings.is_empty() {
            state.vrings = vrings.to_vec();
        }
        state.run();
        Ok(())
    }
}

/// A device served by the crate's daemon, connection after connection, on a thread of its own.
struct EpollServer {
    thread: std::thread::JoinHandle<Result<(), ServeError>>,
    stop: Arc<AtomicBool>,
    /// Ends the present connection.
    active: Arc<Mutex<Option<ShutdownHandle>>>,
    /// Closed to wake the accepting thread.
    wake: UnixStream,
    /// Reads end-of-file when the thread ended.
    ended: UnixStream,
    /// The device under its lock.
    asked: Arc<dyn Asked>,
}

/// Something that answers on the thread that asks.
trait Asked: Send + Sync {
    fn ask(&self, ask: Ask) -> Option<Told>;
}

impl<D: RingDevice> Asked for Mutex<State<D>> {
    fn ask(&self, ask: Ask) -> Option<Told> {
        let deadline = Instant::now() + ASK_TIMEOUT;
        let mut state = loop {
            match self.try_lock() {
                Ok(state) => break state,
                Err(TryLockError::Poisoned(state)) => break state.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::yield_now(),
                Err(TryLockError::WouldBlock) => return None,
            }
        };
        let is_command = matches!(ask, Ask::Command { .. });
        let told = tell(&mut state.device, ask, Instant::now());
        if is_command {
            // It may have changed what the device waits for.
            state.run();
        }
        Some(told)
    }
}

fn ask_devices(devices: Vec<Arc<dyn Asked>>) -> AskSource {
    Box::new(move |device, ask| match device {
        // Nothing joins the devices here.
        FABRIC => Some(Told::Unknown),
        _ => devices.get(device)?.ask(ask),
    })
}

impl EpollServer {
    fn start<D: RingDevice>(
        device: D,
        socket: SocketFile,
        cpu: Option<usize>,
        devices: u32,
    ) -> Result<Self, ServeError> {
        let (wake, woken) = UnixStream::pair().map_err(system("create a socket pair"))?;
        let (ended, guard) = UnixStream::pair().map_err(system("create a socket pair"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let active = Arc::new(Mutex::new(None));
        let backend = Backend {
            queues: device.queues().into(),
            size_max: device.queue_size_max().into(),
            features: device.features() | F_PROTOCOL_FEATURES,
            exit: Arc::default(),
            state: Arc::new(Mutex::new(State::new(device).map_err(system("create an epoll instance"))?)),
        };
        let asked: Arc<dyn Asked> = Arc::clone(&backend.state) as _;
        let (flag, slot) = (Arc::clone(&stop), Arc::clone(&active));
        let thread = std::thread::Builder::new()
            .name("vcp-epoll".into())
            .spawn(move || {
                // Dropped (closed) when the thread ends, also by a panic.
                let _guard = guard;
                // The daemon's threads inherit it.
                if let Some(cpu) = cpu {
                    pin_to(cpu)?;
                }
                let share = CLOSE_AT_EXIT / devices;
                while !flag.load(Ordering::Acquire) {
                    if wait_for_front_end(&backend, &socket, &woken)
                        .map_err(system("wait for a front end"))?
                    {
                        converse(&backend, &socket, &slot, &flag)?;
                    }
                }
                backend.lock().device.close(share);
                Ok(())
            })
            .map_err(system("start the serving thread"))?;
        Ok(Self { thread, stop, active, wake, ended, asked })
    }

    /// Ends the connection and the server.
    fn end(self) -> Result<(), ServeError> {
        self.stop.store(true, Ordering::Release);
        if let Some(handle) = &*self.active.lock().unwrap_or_else(PoisonError::into_inner) {
            handle.shutdown();
        }
        drop(self.wake);
        match self.thread.join() {
            Ok(result) => result,
            Err(_) => Err(ServeError::DataThread("it panicked".into())),
        }
    }
}

/// Waits for a connection, driving the device meanwhile; whether one is there.
fn wait_for_front_end<D: RingDevice>(
    backend: &Backend<D>,
    socket: &SocketFile,
    woken: &UnixStream,
) -> io::Result<bool> {
    let mut state = backend.lock();
    state.run();
    // A new connection may repeat what is still under way for the old one, so it has to wait.
    let drained = state.inflight() == 0;
    let mut fds = vec![PollFd::new(woken, PollFlags::IN), PollFd::new(&state.events, PollFlags::IN)];
    if drained {
        fds.push(PollFd::new(socket, PollFlags::IN));
    }
    match rustix::event::poll(&mut fds, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(fds.get(2).is_some_and(|fd| !fd.revents().is_empty()))
}

/// Serves one connection with a daemon of its own.
fn converse<D: RingDevice>(
    backend: &Backend<D>,
    socket: &SocketFile,
    active: &Mutex<Option<ShutdownHandle>>,
    stop: &AtomicBool,
) -> Result<(), ServeError> {
    let exit = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC);
    *backend.exit.lock().unwrap_or_else(PoisonError::into_inner) =
        Some(exit.map_err(system("create an event descriptor"))?);
    let failed = |error: vhost_user_backend::Error| ServeError::DataThread(error.to_string());
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("vcp-vu".into(), backend.clone(), memory).map_err(failed)?;
    for handler in daemon.get_epoll_handlers() {
        let events: RawFd = backend.lock().events.as_raw_fd();
        handler
            .register_listener(events, EventSet::IN, backend.queues as u64 + 1)
            .map_err(system("watch the engine"))?;
    }
    let mut listener = socket.listener().map_err(system("share the listening socket"))?;
    daemon.start(&mut listener).map_err(failed)?;
    backend.lock().device.metrics().connections.add(1);
    tracing::info!("front end connected");
    *active.lock().unwrap_or_else(PoisonError::into_inner) = daemon.shutdown_handle();
    if stop.load(Ordering::Acquire) {
        // The end was asked for before there was a handle.
        daemon.request_shutdown();
    }
    let result = daemon.wait();
    *active.lock().unwrap_or_else(PoisonError::into_inner) = None;
    for handler in daemon.get_epoll_handlers() {
        handler.send_exit_event();
    }
    // Joins the worker, so that nothing of this connection runs any more.
    drop(daemon);
    backend.lock().detach();
    match result {
        Ok(()) => tracing::info!("front end disconnected"),
        Err(error) => tracing::info!(%error, "front end disconnected"),
    }
    Ok(())
}

/// Serves `devices` as [`crate::vu::serve`] does, by the crate's daemons: one thread (and per connection two more) for
/// each device.
///
/// # Errors
/// [`ServeError`].
pub fn serve<D: RingDevice>(
    devices: Vec<DeviceSpec<D>>,
    mut options: ServeOptions,
    signals: &Signals,
    extra: StatusSource,
    ready: impl FnOnce(),
) -> Result<(), ServeError> {
    if let Some(cpu) = options.cpu {
        check_cpu(cpu)?;
    }
    let parts =
        devices.iter().map(|spec| (Arc::clone(&spec.name), Arc::clone(spec.device.metrics()))).collect();
    let count = u32::try_from(devices.len().max(1)).unwrap_or(u32::MAX);
    let servers: Result<Vec<_>, _> = devices
        .into_iter()
        .map(|spec| EpollServer::start(spec.device, spec.socket, options.cpu, count))
        .collect();
    let servers = servers?;
    let ask = ask_devices(servers.iter().map(|server| Arc::clone(&server.asked)).collect());
    let (socket, http) = (options.control.take(), options.metrics.take());
    let mut control = Control::new(socket, http, Arc::default(), parts, ask, extra);
    ready();
    let result = loop {
        let mut fds = vec![PollFd::new(signals, PollFlags::IN)];
        fds.extend(servers.iter().map(|server| PollFd::new(&server.ended, PollFlags::IN)));
        let own = fds.len();
        fds.extend(control.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        match rustix::event::poll(&mut fds, control.timeout().as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => break Err(system("wait for signals")(error)),
        }
        let fired = fds[..own].iter().any(|fd| !fd.revents().is_empty());
        drop(fds);
        if fired {
            if let Some(signal) = signals.take() {
                tracing::info!(signal, "ending");
            }
            break Ok(());
        }
        control.serve();
    };
    servers.into_iter().fold(result, |result, server| result.and(server.end()))
}
