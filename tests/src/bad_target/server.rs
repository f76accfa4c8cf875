//! The process: sockets, threads, and the state that they share.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::TcpListener;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use iscsi::scsi::Lun;

use super::disk::Disk;
use super::event::Event;
use super::fields::to_hex;
use super::script::{Action, Line, Options, Rule, line};
use super::send::Conn;
use super::{conn, control};
use crate::Result;

/// Something that happened.
#[derive(Clone, Debug)]
pub struct Note {
    /// The connection.
    pub conn: usize,
    /// When, since the start.
    pub at: Duration,
    /// `in`, `out` or `event`.
    pub way: &'static str,
    /// What it is.
    pub label: String,
    /// The header, of a PDU.
    pub header: Option<[u8; 48]>,
}

impl Note {
    /// As the control socket tells it: connection, microseconds, way, label, header in hexadecimal or `-`.
    pub fn line(&self) -> String {
        let mut text = format!("{} {} {} {} ", self.conn, self.at.as_micros(), self.way, self.label);
        let _ = match &self.header {
            Some(header) => write!(text, "{}", to_hex(header)),
            None => write!(text, "-"),
        };
        text
    }
}

/// All that there is.
#[derive(Debug)]
pub struct State {
    pub(super) disk: Disk,
    pub(super) options: Options,
    pub(super) rules: Vec<Rule>,
    pub(super) conns: Vec<Conn>,
    pub(super) notes: Vec<Note>,
    /// What the initiator did against RFC 7143.
    pub(super) breaches: Vec<String>,
    pub(super) next_tsih: u16,
    start: Instant,
    /// For answers that come later.
    pub(super) shared: Weak<Shared>,
}

/// The state and its bell.
#[derive(Debug)]
pub struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }

    /// Waits until the state is as wanted; whether it is in time.
    pub(super) fn wait(&self, limit: Duration, wanted: impl Fn(&State) -> bool) -> bool {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if wanted(&state) {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl State {
    /// Takes a line of a script, other than `now`.
    ///
    /// # Errors
    /// It makes no sense.
    pub fn script(&mut self, text: &str) -> Result<()> {
        match line(text)? {
            Line::Empty => {}
            Line::Rule(rule) => self.rules.push(rule),
            Line::Option(key, value) => {
                if !self.options.set(&key, &value)? && !self.disk.set(&key, &value)? {
                    anyhow::bail!("no option {key:?}");
                }
            }
            Line::Now(_) => anyhow::bail!("`now` is for the control socket"),
        }
        Ok(())
    }

    /// Counts an event; what the rules want of it.
    pub fn turn(&mut self, event: Event) -> Vec<Action> {
        let actions = self.rules.iter_mut().filter_map(|rule| rule.turn(event)).collect();
        self.rules.retain(|rule| !rule.is_over());
        actions
    }

    /// Writes something down.
    pub fn note(&mut self, conn: usize, way: &'static str, label: &str, header: Option<[u8; 48]>) {
        self.notes.push(Note { conn, at: self.start.elapsed(), way, label: label.into(), header });
    }

    /// The unit's address.
    pub fn lun(&self) -> Lun {
        Lun::from_number(self.options.lun)
    }
}

/// Runs with a script until the process is killed; prints `ready: portal=... control=...`.
///
/// # Errors
/// The script makes no sense, or there are no sockets.
pub fn run(script: &str) -> Result<()> {
    let portal = TcpListener::bind("127.0.0.1:0")?;
    // A small receive buffer: whoever sends more than is read is stopped soon.
    rustix::net::sockopt::set_socket_recv_buffer_size(&portal, 64 << 10)?;
    let control = TcpListener::bind("127.0.0.1:0")?;
    let shared = Arc::new_cyclic(|shared| Shared {
        state: Mutex::new(State {
            disk: Disk::default(),
            options: Options::default(),
            rules: Vec::new(),
            conns: Vec::new(),
            notes: Vec::new(),
            breaches: Vec::new(),
            next_tsih: 1,
            start: Instant::now(),
            shared: shared.clone(),
        }),
        changed: Condvar::new(),
    });
    for text in script.lines() {
        shared.lock().script(text)?;
    }
    println!("ready: portal={} control={}", portal.local_addr()?, control.local_addr()?);
    std::io::stdout().flush()?;
    let controlled = Arc::clone(&shared);
    thread::spawn(move || {
        for stream in control.incoming().flatten() {
            let shared = Arc::clone(&controlled);
            thread::spawn(move || control::serve(&shared, stream));
        }
    });
    for stream in portal.incoming() {
        let stream = stream?;
        let shared = Arc::clone(&shared);
        thread::spawn(move || conn::serve(&shared, stream));
    }
    Ok(())
}
