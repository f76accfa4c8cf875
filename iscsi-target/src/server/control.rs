//! The control socket: access states of target port groups, read and set while the server runs.
//!
//! A Unix socket that takes lines of text: `groups` answers `1=optimized 2=standby ...`, `group ID STATE` sets a state and
//! answers `ok`. Whatever is wrong is answered with `error: WHY`. A thread of its own reads and parses; the server carries
//! a command out between two events.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use iscsi::scsi::alua::{AccessState, TargetPortGroup};

use super::Server;
use super::conn::Phase;

/// A client that says nothing for so long is left.
const SILENCE: Duration = Duration::from_secs(60);
/// Longest line.
const MAX_LINE_BYTES: u64 = 256;

/// The names of the states on the command line and here.
const STATES: [(&str, AccessState); 6] = [
    ("optimized", AccessState::Optimized),
    ("non-optimized", AccessState::NonOptimized),
    ("standby", AccessState::Standby),
    ("unavailable", AccessState::Unavailable),
    ("offline", AccessState::Offline),
    ("transitioning", AccessState::Transitioning),
];

/// Reads the name of an access state.
///
/// # Errors
/// Which names there are.
pub fn parse_state(text: &str) -> Result<AccessState, String> {
    STATES.iter().find(|(name, _)| *name == text).map(|&(_, state)| state).ok_or_else(|| {
        let names: Vec<_> = STATES.iter().map(|(name, _)| *name).collect();
        format!("`{text}` is no access state: there are {}", names.join(", "))
    })
}

/// The name that [`parse_state`] reads.
pub fn state_name(state: AccessState) -> &'static str {
    STATES.iter().find(|(_, other)| *other == state).map_or("lba-dependent", |(name, _)| name)
}

#[derive(Debug)]
enum Command {
    List,
    Set(u16, AccessState),
}

/// A command with the way back for its answer.
type Message = (Command, mpsc::Sender<String>);

/// The server's end.
#[derive(Debug)]
pub(super) struct Control {
    messages: mpsc::Receiver<Message>,
    /// Readable when there are messages.
    pub(super) wake: UnixStream,
    path: PathBuf,
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Control {
    /// Listens at `path`. A socket that nobody listens on any more is replaced.
    pub(super) fn start(path: &Path) -> std::io::Result<Self> {
        if UnixStream::connect(path).is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused) {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        let (wake, waker) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        let (sender, messages) = mpsc::channel();
        std::thread::Builder::new().name("control".into()).spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { continue };
                let (sender, waker) = (sender.clone(), waker.try_clone());
                let Ok(waker) = waker else { continue };
                let spawned = std::thread::Builder::new().name("control-client".into()).spawn(move || {
                    // It may go as it came; nobody else depends on it.
                    let _ = converse(&client, &sender, &waker);
                });
                if let Err(error) = spawned {
                    tracing::warn!(%error, "control: cannot serve a client");
                }
            }
        })?;
        Ok(Self { messages, wake, path: path.to_owned() })
    }
}

/// Serves one client until it ends.
fn converse(
    client: &UnixStream,
    sender: &mpsc::Sender<Message>,
    mut waker: &UnixStream,
) -> std::io::Result<()> {
    client.set_read_timeout(Some(SILENCE))?;
    let mut reader = BufReader::new(client);
    loop {
        let mut line = String::new();
        if (&mut reader).take(MAX_LINE_BYTES).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let answer = match parse(line.trim()) {
            Err(why) => format!("error: {why}"),
            Ok(command) => {
                let (reply, answer) = mpsc::channel();
                let sent = sender.send((command, reply)).is_ok() && waker.write_all(&[0]).is_ok();
                let answer = sent.then(|| answer.recv().ok()).flatten();
                answer.unwrap_or_else(|| "error: the server is ending".into())
            }
        };
        writeln!(&mut &*client, "{answer}")?;
    }
}

fn parse(line: &str) -> Result<Command, String> {
    let words: Vec<_> = line.split_ascii_whitespace().collect();
    match words[..] {
        ["groups"] => Ok(Command::List),
        ["group", id, state] => {
            let id = id.parse().map_err(|_| format!("`{id}` is no group number"))?;
            Ok(Command::Set(id, parse_state(state)?))
        }
        _ => Err("expected `groups` or `group ID STATE`".into()),
    }
}

impl Server {
    /// Carries out what came over the control socket.
    pub(super) fn controlled(&mut self) {
        let Some(control) = &mut self.control else { return };
        let mut bytes = [0; 64];
        while control.wake.read(&mut bytes).is_ok_and(|len| len > 0) {}
        let messages: Vec<_> = control.messages.try_iter().collect();
        for (command, reply) in messages {
            let answer = match command {
                Command::List => self.groups.iter().fold(String::new(), |mut text, group| {
                    let space = if text.is_empty() { "" } else { " " };
                    let _ = write!(text, "{space}{}={}", group.id, state_name(group.state));
                    text
                }),
                Command::Set(id, state) => match self.set_group(id, state) {
                    Ok(()) => "ok".into(),
                    Err(why) => format!("error: {why}"),
                },
            };
            // A client that did not wait for it knows why.
            let _ = reply.send(answer);
        }
    }

    /// Sets the access state of a target port group; every initiator is told by a unit attention (SPC-4 5.15.2.5).
    fn set_group(&mut self, id: u16, state: AccessState) -> Result<(), String> {
        let Some(group) = self.groups.iter_mut().find(|group| group.id == id) else {
            return Err(format!("there is no target port group {id}"));
        };
        if group.state == state {
            return Ok(());
        }
        tracing::info!(group = id, from = %group.state, to = %state, "asymmetric access state changed");
        group.state = state;
        for device in &mut self.devices {
            device.set_groups(&self.groups);
        }
        for slot in &mut self.slots {
            if let Some(Phase::Full(full)) = slot.conn.as_mut().map(|conn| &mut conn.phase)
                && let Some(device) = full.target.and_then(|target| self.devices.get(target))
            {
                device.note_access_change(&mut full.attentions);
            }
        }
        Ok(())
    }
}

/// The groups of a configuration, in the order of their numbers.
pub(super) fn groups(listen: &[(u16, Option<AccessState>)]) -> Vec<TargetPortGroup> {
    let mut groups: Vec<TargetPortGroup> = Vec::new();
    for &(id, state) in listen {
        match groups.iter_mut().find(|group| group.id == id) {
            Some(group) => group.state = state.unwrap_or(group.state),
            None => groups.push(TargetPortGroup {
                id,
                state: state.unwrap_or(AccessState::Optimized),
                preferred: false,
                // All portals of a group are one SCSI target port (RFC 7143 4.4.1), which has the group's number.
                ports: vec![id],
            }),
        }
    }
    groups.sort_by_key(|group| group.id);
    groups
}
