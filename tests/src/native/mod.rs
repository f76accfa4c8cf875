//! A guest at native speed: a thread of this process that drives a network back end as a guest's kernel would, over
//! vhost-user or over QEMU's stream socket, and is the server behind the back end as well. It looks at both all the time and
//! copies no payload, so that the back end is what ends its rates; an emulated guest ends them itself.
//!
//! `link` is the way to the back end, `tcp` the guest's TCP, which does as little as a TCP can.

mod link;
mod tcp;

use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::net::RecvFlags;

pub use link::Link;
use tcp::{Conn, Shape};

use crate::Result;

/// How long anything may take that does not move data.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes that the server takes or gives at once.
const CHUNK: usize = 1 << 20;
/// Bytes of a request and of its answer.
const MESSAGE: usize = 64;

/// How a guest is connected.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    /// Its address.
    pub address: Ipv4Addr,
    /// The gateway's, which leads to the host's loopback.
    pub gateway: Ipv4Addr,
    /// Its MTU.
    pub mtu: usize,
}

/// What came of a transfer.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// Bytes that arrived at the other end.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
    /// Times that the guest had to send again.
    pub resent: u64,
}

/// An open connection between a guest and a server.
#[derive(Debug)]
pub struct Bed {
    conn: Conn,
    server: TcpStream,
    buffer: Vec<u8>,
}

impl Bed {
    /// Connects through a back end.
    ///
    /// # Errors
    /// The connection does not come about.
    pub fn connect(link: Link, guest: Guest) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no server")?;
        listener.set_nonblocking(true)?;
        let shape = Shape { offloads: link.has_offloads(), mtu: guest.mtu };
        let port = listener.local_addr()?.port();
        let mut conn = Conn::new(link, guest.address, guest.gateway, port, shape);
        let end = Instant::now() + PATIENCE;
        let mut server = None;
        while server.is_none() || !conn.is_open() {
            conn.poll()?;
            match listener.accept() {
                Ok((stream, _)) => server = Some(stream),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("accept"),
            }
            ensure!(Instant::now() < end, "no connection: {conn:?}");
        }
        let server = server.context("no connection")?;
        server.set_nonblocking(true)?;
        server.set_nodelay(true)?;
        Ok(Self { conn, server, buffer: vec![0; CHUNK] })
    }

    /// Sends from the guest as fast as it goes.
    ///
    /// # Errors
    /// The connection broke.
    pub fn from_guest(&mut self, time: Duration) -> Result<Transfer> {
        let (begin, resent) = (Instant::now(), self.conn.resent);
        let mut bytes = 0;
        while begin.elapsed() < time {
            self.conn.poll()?;
            self.conn.fill()?;
            bytes += self.take()?;
        }
        let took = begin.elapsed();
        // What is on its way still does not disturb what comes next.
        self.conn.stop_filling();
        let end = Instant::now() + PATIENCE;
        while self.conn.in_flight() != 0 || self.take()? != 0 {
            self.conn.poll()?;
            ensure!(Instant::now() < end, "bytes that never arrive: {:?}", self.conn);
        }
        Ok(Transfer { bytes, took, resent: self.conn.resent - resent })
    }

    /// Sends to the guest as fast as it goes.
    ///
    /// # Errors
    /// The connection broke.
    pub fn to_guest(&mut self, time: Duration) -> Result<Transfer> {
        let (begin, before) = (Instant::now(), self.conn.received);
        let mut sent = 0;
        while begin.elapsed() < time {
            sent += self.give()?;
            self.conn.poll()?;
        }
        let (took, bytes) = (begin.elapsed(), self.conn.received - before);
        let end = Instant::now() + PATIENCE;
        while self.conn.received - before < sent {
            self.conn.poll()?;
            ensure!(Instant::now() < end, "bytes that never arrive: {:?}", self.conn);
        }
        Ok(Transfer { bytes, took, resent: 0 })
    }

    /// Requests of the guest, one after the other, each answered by the server; `gap` is waited in between, so that a back
    /// end has the time to fall asleep. How long each took, from the shortest to the longest.
    ///
    /// # Errors
    /// The connection broke.
    pub fn requests(&mut self, time: Duration, gap: Duration) -> Result<Vec<Duration>> {
        let begin = Instant::now();
        let mut took = Vec::new();
        while begin.elapsed() < time || took.is_empty() {
            let (sent, before) = (Instant::now(), self.conn.received);
            self.conn.send(MESSAGE)?;
            let mut asked = 0;
            while self.conn.received - before < MESSAGE as u64 {
                if asked < MESSAGE {
                    asked += self.take()? as usize;
                    if asked == MESSAGE {
                        let answered = self.server.write(&self.buffer[..MESSAGE]).context("answer")?;
                        ensure!(answered == MESSAGE, "an answer of {answered} bytes");
                    }
                }
                self.conn.poll()?;
                ensure!(sent.elapsed() < PATIENCE, "no answer: {:?}", self.conn);
            }
            took.push(sent.elapsed());
            let end = Instant::now() + gap;
            while Instant::now() < end {
                self.conn.poll()?;
            }
        }
        took.sort_unstable();
        Ok(took)
    }

    /// The server takes what is there, without a look at it.
    fn take(&mut self) -> Result<u64> {
        match rustix::net::recv(&self.server, &mut self.buffer[..], RecvFlags::TRUNC) {
            Ok((_, 0)) => bail!("the connection was closed"),
            Ok((_, len)) => Ok(len as u64),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(0),
            Err(error) => Err(error).context("receive"),
        }
    }

    fn give(&mut self) -> Result<u64> {
        match self.server.write(&self.buffer[..256 << 10]) {
            Ok(len) => Ok(len as u64),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error).context("send"),
        }
    }
}

/// Waits for the socket of a back end.
///
/// # Errors
/// It is not there in time.
pub fn wait_for(socket: &Path) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !socket.exists() {
        ensure!(Instant::now() < end, "no {}", socket.display());
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Keeps this thread on a hardware thread.
///
/// # Errors
/// There is no such one.
pub fn pin(cpu: usize) -> Result<()> {
    Ok(vcp_core::poll::pin_to(cpu)?)
}
