//! `vcp-iscsi dial`: connects to portals for processes that have no network.
//!
//! What it may connect to was fixed when it was started: the portals of a disk's declaration, or everything. Whoever asks
//! may be in a hostile target's or guest's hands: each request is bounded, none is waited for, and none makes another process
//! wait. It ends when its monitor does.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use vcp_core::process::confine::Mode as ConfineMode;

use super::message::{self, MAX_ADDRESSES, Reply, Request};
use crate::confine;
use crate::portal::socket;
use crate::serve::adopt;
use crate::url::Portal;

/// Processes that are served at once: one that serves, one that stands by, one that takes over, and such as are ending.
const MAX_CHANNELS: usize = 16;
/// Names that are looked up at once.
const MAX_LOOKUPS: usize = 4;
/// Longest list of portals, bytes.
const MAX_LIST_BYTES: u64 = 64 << 10;

/// Arguments of `dial`.
#[derive(Args, Debug)]
#[command(
    after_help = "A monitor starts it beside a `serve --dial-fd` that has no network of its own. Example:\n  \
    printf '192.0.2.7:3260\\n' >portals; vcp-iscsi dial --channel-fd 3 --portals portals"
)]
pub struct DialArgs {
    /// A Unix socket (seqpacket): each message on it brings the channel of a process that asks; its end is the end
    #[arg(long, value_name = "FDNUM")]
    pub channel_fd: i32,
    /// File with the portals that may be connected to, `HOST[:PORT]`, one a line
    #[arg(long, value_name = "FILE")]
    pub portals: PathBuf,
    /// Connect to everything that is asked for
    #[arg(long)]
    pub any: bool,
    /// Give up rights that are not needed: files, ports, processes, system calls, memory
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub confine: ConfineMode,
}

/// Serves until the monitor closes its end.
///
/// # Errors
/// What failed, on what.
pub fn run(args: &DialArgs) -> Result<()> {
    let rules = Rules { portals: read_portals(&args.portals)?, any: args.any };
    let control = adopt(args.channel_fd).context("--channel-fd")?;
    // What tells it from the processes that it connects for.
    rustix::thread::set_name(c"vcp-dial").context("cannot name the process")?;
    confine::confine_dialer(args.confine)?;
    serve(rules, &control).context("cannot wait for requests")
}

fn read_portals(file: &Path) -> Result<Vec<Portal>> {
    use std::io::Read;
    let failed = || format!("cannot read the portals in {}", file.display());
    let mut text = String::new();
    let bytes = std::fs::File::open(file).with_context(failed)?.take(MAX_LIST_BYTES + 1);
    let len = { bytes }.read_to_string(&mut text).with_context(failed)?;
    if len as u64 > MAX_LIST_BYTES {
        bail!("{}: more than {MAX_LIST_BYTES} bytes", file.display());
    }
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.map(|line| Portal::parse(line).with_context(|| format!("portal {line:?}"))).collect()
}

/// What may be connected to.
#[derive(Debug)]
struct Rules {
    portals: Vec<Portal>,
    any: bool,
}

/// What names of declared portals have led to.
type Known = Arc<Mutex<HashMap<Portal, Vec<SocketAddr>>>>;

impl Rules {
    fn allows_portal(&self, portal: &Portal) -> bool {
        self.any || self.portals.contains(portal)
    }

    fn allows(&self, address: &SocketAddr, known: &Known) -> bool {
        let literal = |portal: &Portal| socket::literal(portal).is_some_and(|it| same(&it, address));
        self.any
            || self.portals.iter().any(literal)
            || known
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .values()
                .flatten()
                .any(|it| same(it, address))
    }
}

/// Address and port; what an IPv6 address has besides (flow, scope) came with the answer to a name.
fn same(a: &SocketAddr, b: &SocketAddr) -> bool {
    (a.ip(), a.port()) == (b.ip(), b.port())
}

fn not_named(what: &dyn std::fmt::Display) -> Reply {
    Reply::Refused(format!(
        "{what} is not named by the disk's declaration (a target that redirects?): add portal={what}, or network=any"
    ))
}

fn serve(rules: Rules, control: &OwnedFd) -> io::Result<()> {
    let mut office = Office { rules, known: Known::default(), lookups: Arc::default() };
    let mut channels: Vec<OwnedFd> = Vec::new();
    loop {
        let mut fds = vec![PollFd::new(control, PollFlags::IN)];
        fds.extend(channels.iter().map(|channel| PollFd::new(channel, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let fired: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        // One request of each at a time, so that nobody's flood is another one's drought.
        let mut at = 0;
        channels.retain(|channel| {
            at += 1;
            !fired.get(at).copied().unwrap_or(false) || office.hear(channel)
        });
        if fired.first().copied().unwrap_or(false) {
            match message::receive::<Hello>(control) {
                Ok(Some((Hello::Channel, Some(channel)))) if channels.len() < MAX_CHANNELS => {
                    channels.push(channel);
                }
                Ok(Some((Hello::Ping, _))) => {
                    // A monitor that does not read its answers asks in vain.
                    let _ = message::send(control, &Pong::Pong, None);
                }
                Ok(Some(_)) => tracing::warn!("a channel is not taken: there are {}", channels.len()),
                Ok(None) => {}
                // The monitor is gone, or is not itself.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// What the monitor says.
#[derive(serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Hello {
    /// The descriptor with it is another channel.
    Channel,
    /// Is anybody there?
    Ping,
}

/// The answer to [`Hello::Ping`].
#[derive(serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Pong {
    Pong,
}

/// Carries out requests.
struct Office {
    rules: Rules,
    known: Known,
    lookups: Arc<AtomicUsize>,
}

impl Office {
    /// Takes the next request of a channel; false if there will be no more.
    fn hear(&mut self, channel: &OwnedFd) -> bool {
        let (request, answer) = match message::receive::<Request>(channel) {
            Ok(None) => return true,
            Ok(Some((request, Some(answer)))) => (request, answer),
            // Nobody to answer.
            Ok(Some((_, None))) => return true,
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return false,
            Err(error) => {
                tracing::warn!(%error, "a process asks for what makes no sense: it is not heard any more");
                return false;
            }
        };
        let reply = match request {
            Request::Resolve { host, port } => match self.resolve(Portal { host, port }, answer) {
                Some((reply, answer)) => return tell(&answer, &reply, None),
                None => return true,
            },
            Request::Connect(address) if !self.rules.allows(&address, &self.known) => not_named(&address),
            Request::Connect(address) => match socket::start_connect(address) {
                Ok(stream) => return tell(&answer, &Reply::Connecting, Some(stream.as_fd())),
                Err(error) => failed(&error),
            },
        };
        tell(&answer, &reply, None)
    }

    /// Begins to look a name up; what is answered at once, if so.
    fn resolve(&mut self, portal: Portal, answer: OwnedFd) -> Option<(Reply, OwnedFd)> {
        if !self.rules.allows_portal(&portal) {
            return Some((not_named(&portal), answer));
        }
        if let Some(address) = socket::literal(&portal) {
            return Some((Reply::Addresses(vec![address]), answer));
        }
        if self.lookups.fetch_add(1, Ordering::Relaxed) >= MAX_LOOKUPS {
            self.lookups.fetch_sub(1, Ordering::Relaxed);
            return Some((Reply::Failed(None, "too many names are looked up at once".into()), answer));
        }
        let (known, lookups) = (self.known.clone(), self.lookups.clone());
        let work = move || {
            let reply = match socket::resolve(&portal) {
                Ok(mut addresses) => {
                    addresses.truncate(MAX_ADDRESSES);
                    known.lock().unwrap_or_else(PoisonError::into_inner).insert(portal, addresses.clone());
                    Reply::Addresses(addresses)
                }
                Err(error) => failed(&error),
            };
            lookups.fetch_sub(1, Ordering::Relaxed);
            tell(&answer, &reply, None);
        };
        if let Err(error) = std::thread::Builder::new().name("resolve".into()).spawn(work) {
            // The answer's socket went with the closure: who asked hears that nobody answers.
            self.lookups.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(%error, "cannot start a thread");
        }
        None
    }
}

fn failed(error: &io::Error) -> Reply {
    Reply::Failed(error.raw_os_error(), error.to_string())
}

/// Answers; true, since the channel is as good as before whether anybody listens or not.
fn tell(answer: &OwnedFd, reply: &Reply, fd: Option<std::os::fd::BorrowedFd<'_>>) -> bool {
    if let Err(error) = message::send(answer, reply, fd) {
        tracing::debug!(%error, "nobody waits for an answer");
    }
    true
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::{Duration, Instant};

    use super::super::Dialer;
    use super::*;
    use crate::portal::net::{Connecting, Network, Resolution, Stream};

    /// A server on a thread, and a network that asks it.
    fn office(portals: &[String], any: bool) -> (Dialer, OwnedFd) {
        let rules = Rules { portals: portals.iter().map(|p| Portal::parse(p).unwrap()).collect(), any };
        let (ours, control) = message::pair().unwrap();
        std::thread::spawn(move || serve(rules, &control).unwrap());
        (channel(&ours), ours)
    }

    fn channel(control: &OwnedFd) -> Dialer {
        let (ours, theirs) = message::pair().unwrap();
        message::send(control, &Hello::Channel, Some(theirs.as_fd())).unwrap();
        Dialer::new(ours)
    }

    fn connect(network: &Dialer, address: SocketAddr) -> io::Result<Stream> {
        let Connecting::Asked(asked) = network.start_connect(address)? else { panic!("not asked") };
        let end = Instant::now() + Duration::from_secs(20);
        while Instant::now() < end {
            poll(&mut [PollFd::new(&asked, PollFlags::IN)], None).unwrap();
            if let Some(stream) = asked.try_take()? {
                assert!(socket::wait_until(&stream, true, end).unwrap());
                return network.connected(&stream).map(|up| {
                    assert!(up);
                    stream
                });
            }
        }
        panic!("no answer");
    }

    fn resolve(network: &Dialer, portal: &str) -> io::Result<Vec<SocketAddr>> {
        match network.resolve(&Portal::parse(portal).unwrap())? {
            Resolution::Done(addresses) => Ok(addresses),
            Resolution::Underway(resolving) => loop {
                if let Some(result) = resolving.try_take() {
                    return result;
                }
                std::thread::yield_now();
            },
        }
    }

    #[test]
    fn declared_portals_are_connected_to_and_no_others() {
        let (good, other) =
            (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let other_address = other.local_addr().unwrap();
        let (network, control) = office(&[good.local_addr().unwrap().to_string()], false);
        connect(&network, good.local_addr().unwrap()).unwrap();
        let error = connect(&network, other_address).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        assert!(error.to_string().contains(&format!("portal={other_address}")), "{error}");
        let error = resolve(&network, "elsewhere.invalid").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        // Another process has a channel of its own, whatever the first one does with its.
        drop(network);
        let next = channel(&control);
        assert!(connect(&next, other_address).is_err());
        let (network, _control) = office(&[], true);
        connect(&network, other_address).unwrap();
    }

    /// Between what it does for others: a monitor that hears nothing takes it for stuck.
    #[test]
    fn pings_are_answered() {
        let (network, control) = office(&[], true);
        for _ in 0..3 {
            message::send(&control, &Hello::Ping, None).unwrap();
            poll(&mut [PollFd::new(&control, PollFlags::IN)], None).unwrap();
            assert!(matches!(message::receive(&control), Ok(Some((Pong::Pong, None)))));
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        connect(&network, listener.local_addr().unwrap()).unwrap();
    }

    #[test]
    fn names_lead_to_their_addresses() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (network, _control) = office(&[format!("localhost:{port}")], false);
        // Not before it was asked for: what a name means is this process's to say.
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        assert!(connect(&network, address).is_err());
        let addresses = resolve(&network, &format!("localhost:{port}")).unwrap();
        assert!(addresses.contains(&address), "{addresses:?}");
        connect(&network, address).unwrap();
        assert!(resolve(&network, "localhost:1").is_err());
    }

    #[test]
    fn failures_are_the_systems() {
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (network, control) = office(&[closed.to_string()], false);
        assert_eq!(connect(&network, closed).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        // Nonsense ends a channel, and only that.
        rustix::net::send(network.raw(), b"nonsense", rustix::net::SendFlags::empty()).unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        let error = loop {
            match connect(&network, closed) {
                Err(error) if error.kind() != ErrorKind::ConnectionRefused => break error,
                _ => assert!(Instant::now() < end),
            }
        };
        assert!(error.to_string().contains("is gone"), "{error}");
        assert_eq!(connect(&channel(&control), closed).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
}
