//! A TCP proxy in front of a target: cuts connections at a byte or at once, turns new ones away, stalls, and records.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;
use socket2::SockRef;

use crate::Result;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the initiator to the target.
    ToTarget,
    /// From the target to the initiator.
    ToInitiator,
}

/// What one connection carried, if it was recorded.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// The pieces in the order in which they passed.
    pub pieces: Vec<(Way, Vec<u8>)>,
}

impl Record {
    /// All bytes of one way.
    pub fn bytes(&self, way: Way) -> Vec<u8> {
        self.pieces.iter().filter(|(w, _)| *w == way).flat_map(|(_, b)| b.iter().copied()).collect()
    }

    /// ISID and TSIH of the first Login Request (RFC 7143 11.12.5, 11.12.6).
    pub fn login(&self) -> Option<([u8; 6], u16)> {
        let bytes = self.bytes(Way::ToTarget);
        let bhs = bytes.get(..48)?;
        // Opcode 0x03 with the immediate bit.
        (bhs[0] == 0x43).then(|| {
            let mut isid = [0; 6];
            isid.copy_from_slice(&bhs[8..14]);
            (isid, u16::from_be_bytes([bhs[14], bhs[15]]))
        })
    }
}

/// Where a connection is cut.
#[derive(Clone, Copy, Debug)]
struct Cut {
    way: Way,
    /// Bytes of that way that still pass, counted on each connection.
    after: u64,
}

/// Where one connection is cut: after so many bytes of a way; with a reset in place of an orderly end.
#[derive(Clone, Copy, Debug)]
pub struct OwnCut {
    /// The way whose bytes are counted.
    pub way: Way,
    /// Bytes that pass.
    pub after: u64,
    /// RST in place of FIN.
    pub reset: bool,
}

type Chooser = Box<dyn FnMut() -> OwnCut + Send>;

/// Changes a PDU of the target's, or swallows it.
type Rewrite = Box<dyn FnMut(Vec<u8>) -> Option<Vec<u8>> + Send>;

#[derive(Default)]
struct State {
    accepted: usize,
    open: usize,
    refuse: bool,
    stalled: bool,
    /// Connections up to this one are held.
    held: usize,
    reset: bool,
    record: bool,
    cut: Option<Cut>,
    chooser: Option<Chooser>,
    /// Connections that were cut where the chooser said.
    own_cuts: usize,
    live: Vec<(usize, TcpStream, TcpStream)>,
    records: Vec<Record>,
    /// Ways that ended, two for each connection.
    finished: usize,
    /// Bytes that came, passed on or not.
    arrived: u64,
    bytes: u64,
    rewrite: Option<Rewrite>,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }
}

/// A running proxy; ends, with its connections, when it is dropped.
pub struct Proxy {
    listen: SocketAddr,
    shared: Arc<Shared>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("listen", &self.listen).finish_non_exhaustive()
    }
}

impl Proxy {
    /// Listens on a free port in front of `target`.
    pub fn start(target: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let listen = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        let serve = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming() {
                if serve.lock().stop {
                    break;
                }
                if let Ok(client) = client {
                    accept(&serve, client, target);
                }
            }
        });
        Ok(Self { listen, shared })
    }

    /// Where to connect.
    pub fn addr(&self) -> SocketAddr {
        self.listen
    }

    /// Keeps what each following connection carries.
    pub fn record(&self) {
        self.shared.update(|s| s.record = true);
    }

    /// What the connections carried, in the order of their start; one for each since [`Proxy::record`].
    pub fn records(&self) -> Vec<Record> {
        self.shared.lock().records.clone()
    }

    /// Number of connections so far, those turned away included.
    pub fn accepted(&self) -> usize {
        self.shared.lock().accepted
    }

    /// Number of open connections.
    pub fn open(&self) -> usize {
        self.shared.lock().open
    }

    /// Waits until there were `count` connections.
    pub fn wait_accepted(&self, count: usize, deadline: Duration) -> Result<()> {
        self.wait(deadline, &format!("{count} connections"), |s| s.accepted >= count)
    }

    /// Waits until `count` connections are open.
    pub fn wait_open(&self, count: usize, deadline: Duration) -> Result<()> {
        self.wait(deadline, &format!("{count} open connections"), |s| s.open == count)
    }

    /// Waits until `connections` have ended, both ways.
    pub fn wait_finished(&self, connections: usize, deadline: Duration) -> Result<()> {
        self.wait(deadline, &format!("the end of {connections} connections"), |s| {
            s.finished >= 2 * connections
        })
    }

    /// Waits until `bytes` more have passed, both ways together.
    pub fn wait_bytes(&self, bytes: u64, deadline: Duration) -> Result<()> {
        let until = self.shared.lock().bytes + bytes;
        self.wait(deadline, &format!("{bytes} bytes"), |s| s.bytes >= until)
    }

    /// Bytes that came from either side, held back or passed on.
    pub fn arrived(&self) -> u64 {
        self.shared.lock().arrived
    }

    /// Waits until [`Proxy::arrived`] is `bytes` at least.
    pub fn wait_arrived(&self, bytes: u64, deadline: Duration) -> Result<()> {
        self.wait(deadline, &format!("{bytes} bytes come"), |s| s.arrived >= bytes)
    }

    /// Cuts all open connections; with `reset`, by RST in place of FIN.
    pub fn cut_now(&self, reset: bool) {
        self.shared.update(|s| {
            s.reset = reset;
            for (_, a, b) in s.live.drain(..) {
                end(&a, &b, reset);
            }
        });
    }

    /// Cuts each connection after that many bytes of one way; `None`: no more.
    pub fn cut_after(&self, cut: Option<(Way, u64)>) {
        self.shared.update(|s| s.cut = cut.map(|(way, after)| Cut { way, after }));
    }

    /// Cuts each connection that begins from here on where `choose` says; `None`: no more are.
    pub fn cut_each(&self, choose: Option<impl FnMut() -> OwnCut + Send + 'static>) {
        self.shared.update(|s| s.chooser = choose.map(|choose| Box::new(choose) as Chooser));
    }

    /// Connections that were cut by [`cut_each`](Self::cut_each).
    pub fn own_cuts(&self) -> usize {
        self.shared.lock().own_cuts
    }

    /// Whether new connections are closed at once.
    pub fn refuse(&self, refuse: bool) {
        self.shared.update(|s| s.refuse = refuse);
    }

    /// Whether bytes are held back, with the connections open: a peer that does not answer.
    pub fn stall(&self, stalled: bool) {
        self.shared.update(|s| s.stalled = stalled);
    }

    /// Holds back what the connections of now carry from here on, while later ones run: a half-open link. With false,
    /// what was held goes on its way.
    pub fn hold(&self, hold: bool) {
        self.shared.update(|s| s.held = if hold { s.accepted } else { 0 });
    }

    /// Lets `rewrite` change or swallow (`None`) every PDU of the target's from here on, on connections without digests
    /// that begin later: a target that errs.
    pub fn rewrite(&self, rewrite: impl FnMut(Vec<u8>) -> Option<Vec<u8>> + Send + 'static) {
        self.shared.update(|s| s.rewrite = Some(Box::new(rewrite)));
    }

    fn wait(&self, deadline: Duration, what: &str, until: impl Fn(&State) -> bool) -> Result<()> {
        let end = Instant::now() + deadline;
        let mut state = self.shared.lock();
        while !until(&state) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "the proxy did not see {what} within {deadline:?}: {} accepted, {} open, {} bytes",
                    state.accepted,
                    state.open,
                    state.bytes
                );
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.update(|s| {
            s.stop = true;
            s.stalled = false;
            s.held = 0;
            for (_, a, b) in s.live.drain(..) {
                end(&a, &b, false);
            }
        });
        // Wakes the accepting thread.
        let _ = TcpStream::connect(self.listen);
    }
}

fn accept(shared: &Arc<Shared>, client: TcpStream, target: SocketAddr) {
    let refuse = shared.update(|s| {
        s.accepted += 1;
        s.refuse
    });
    if refuse {
        return;
    }
    let Ok(server) = TcpStream::connect(target) else { return };
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let clones = (client.try_clone(), server.try_clone(), client.try_clone(), server.try_clone());
    let (Ok(c1), Ok(s1), Ok(c2), Ok(s2)) = clones else { return };
    let (id, record, own) = shared.update(|s| {
        s.open += 1;
        let id = s.accepted;
        s.live.push((id, c2, s2));
        let record = s.record.then(|| {
            s.records.push(Record::default());
            s.records.len() - 1
        });
        let own = s.chooser.as_mut().map(|choose| choose());
        (id, record, own)
    });
    let conn = Conn { id, record, own };
    let (up, down) = (Arc::clone(shared), Arc::clone(shared));
    let back = thread::spawn(move || pump(&down, conn, Way::ToInitiator, s1, c1));
    thread::spawn(move || {
        pump(&up, conn, Way::ToTarget, client, server);
        let _ = back.join();
        up.update(|s| {
            s.open -= 1;
            s.live.retain(|(n, _, _)| *n != id);
        });
    });
}

/// A connection, for both of its ways.
#[derive(Clone, Copy)]
struct Conn {
    id: usize,
    record: Option<usize>,
    own: Option<OwnCut>,
}

fn pump(shared: &Shared, conn: Conn, way: Way, mut from: TcpStream, mut to: TcpStream) {
    let Conn { id, record, own } = conn;
    let mut buf = vec![0; 64 << 10];
    let mut passed = 0;
    // A PDU that has not come whole; only where PDUs are rewritten.
    let mut part = Vec::new();
    let rewriting = way == Way::ToInitiator && shared.lock().rewrite.is_some();
    loop {
        let n = match from.read(&mut buf) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        shared.update(|s| s.arrived += n as u64);
        if rewriting {
            part.extend_from_slice(&buf[..n]);
            let changed = shared.update(|s| change_pdus(&mut part, s.rewrite.as_mut()));
            if to.write_all(&changed).is_err() {
                break;
            }
            continue;
        }
        let (keep, reset) = {
            let mut state = shared.lock();
            while (state.stalled || id <= state.held) && !state.stop {
                state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let all = state.cut.filter(|c| c.way == way).map_or(u64::MAX, |c| c.after);
            let own_after = own.filter(|c| c.way == way).map_or(u64::MAX, |c| c.after);
            let left = all.min(own_after).saturating_sub(passed);
            let keep = n.min(usize::try_from(left).unwrap_or(usize::MAX));
            if keep < n && own_after <= all {
                state.own_cuts += 1;
            }
            if let Some(record) = record.and_then(|r| state.records.get_mut(r)) {
                record.pieces.push((way, buf[..keep].to_vec()));
            }
            (keep, own.map_or(state.reset, |own| own.reset))
        };
        if to.write_all(&buf[..keep]).is_err() {
            break;
        }
        passed += keep as u64;
        shared.update(|s| s.bytes += keep as u64);
        if keep < n {
            end(&from, &to, reset);
            break;
        }
    }
    // One end closed: so does the other.
    let _ = to.shutdown(Shutdown::Write);
    shared.update(|s| s.finished += 1);
}

/// Takes the whole PDUs off `part` and returns what is to be sent for them.
fn change_pdus(part: &mut Vec<u8>, rewrite: Option<&mut Rewrite>) -> Vec<u8> {
    let mut out = Vec::new();
    let Some(rewrite) = rewrite else { return std::mem::take(part) };
    while let Some(len) = pdu_len(part).filter(|len| *len <= part.len()) {
        let pdu = part.drain(..len).collect();
        out.extend(rewrite(pdu).unwrap_or_default());
    }
    out
}

/// Length of the PDU that begins here, without digests: header, additional segments, data padded to 4 bytes (RFC 7143
/// 11.2.1); `None` before its header is whole.
pub fn pdu_len(bytes: &[u8]) -> Option<usize> {
    let bhs = bytes.get(..48)?;
    let data = usize::from(bhs[5]) << 16 | usize::from(bhs[6]) << 8 | usize::from(bhs[7]);
    Some(48 + usize::from(bhs[4]) * 4 + data.next_multiple_of(4))
}

fn end(a: &TcpStream, b: &TcpStream, reset: bool) {
    for stream in [a, b] {
        if reset {
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
        let _ = stream.shutdown(Shutdown::Both);
    }
}
