//! A connection's receiving side: PDUs in, tasks along, answers out.

use std::io::{self, Read};
use std::net::TcpStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use iscsi::pdu::framing::{Limits, Receiver, Step};
use iscsi::pdu::{
    Bhs, DataOut, InitiatorPdu, LogoutRequest, LogoutResponse, LogoutResponseCode, NopIn, NopOut, Opcode,
    Pdu, ScsiCommand, TargetSn, TaskFunction, TaskManagementRequest, TaskManagementResponse,
    TaskResponseCode, Ttt,
};
use iscsi::scsi::{Sense, Status};
use iscsi::serial::Serial;

use super::answer::{Numbers, Out, Shape, compose, spoil};
use super::disk::{Disk, Done, luns};
use super::event::Event;
use super::script::{Action, Extra};
use super::send::Conn;
use super::server::{Shared, State};
use super::task::{Ask, Task};
use super::{login, oracle};

const FOREVER: Duration = Duration::from_secs(3600);
pub(super) const SN: TargetSn = TargetSn { stat_sn: Serial(0), exp_cmd_sn: Serial(0), max_cmd_sn: Serial(0) };

/// Takes PDUs off a socket.
#[derive(Debug)]
pub struct Reader {
    stream: TcpStream,
    pub(super) rx: Receiver,
    input: Vec<u8>,
}

impl Reader {
    /// The next PDU; `None` in place of data whose digest is wrong.
    pub fn pdu(&mut self) -> io::Result<(Bhs, Option<Vec<u8>>)> {
        let mut data = Vec::new();
        loop {
            match self.rx.step() {
                Step::Header => self.rx.accept(),
                Step::Done { data_digest_ok } => {
                    let header = *self.rx.header();
                    self.rx.next_pdu();
                    return Ok((header, data_digest_ok.then_some(data)));
                }
                _ if self.input.is_empty() => {
                    let mut buffer = [0; 65536];
                    let got = self.stream.read(&mut buffer)?;
                    if got == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    self.input.extend_from_slice(&buffer[..got]);
                }
                Step::Framing { .. } => {
                    let taken = self.rx.feed(&self.input).map_err(io::Error::other)?;
                    self.input.drain(..taken);
                }
                Step::Data { len_bytes, .. } => {
                    let part: Vec<u8> =
                        self.input.drain(..self.input.len().min(len_bytes as usize)).collect();
                    self.rx.data(&part);
                    data.extend(part);
                }
            }
        }
    }
}

/// Lives with a connection until it ends.
pub fn serve(shared: &Arc<Shared>, stream: TcpStream) {
    let Ok(writer) = stream.try_clone() else { return };
    let mut reader = Reader { stream, rx: Receiver::new(Limits::default()), input: Vec::new() };
    let id = shared.update(|s| {
        let id = s.conns.len();
        s.conns.push(Conn::new(id, writer));
        s.note(id, "event", "connect", None);
        for action in s.turn(Event::Connect) {
            s.at_once(id, &action);
        }
        id
    });
    let ended = talk(shared, id, &mut reader);
    shared.update(|s| {
        // EOF, or a reset: the initiator's end of it, unless it was ours.
        let label = match ended {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => "fin",
            Err(error)
                if error.kind() == io::ErrorKind::InvalidData || error.kind() == io::ErrorKind::Other =>
            {
                s.breaches.push(format!("a stream that is none of PDUs: {error}"));
                "garbage"
            }
            Err(_) => "reset",
            Ok(()) => "over",
        };
        let ours = !s.conns[id].open;
        s.note(id, "event", if ours { "closed" } else { label }, None);
        s.conns[id].close(false);
    });
}

fn talk(shared: &Arc<Shared>, id: usize, reader: &mut Reader) -> io::Result<()> {
    if !login::run(shared, id, reader)? {
        return Ok(());
    }
    loop {
        let (header, data) = reader.pdu()?;
        shared.wait(FOREVER, |s| !s.conns[id].stalled || !s.conns[id].open);
        let open = shared.update(|s| {
            if s.conns[id].open {
                s.receive(id, &header, data.as_deref());
            }
            s.conns[id].open
        });
        if !open {
            return Ok(());
        }
    }
}

impl State {
    /// Sends, and writes down what was sent.
    pub(super) fn send(&mut self, id: usize, outs: Vec<Out>, truncate: Option<usize>) {
        for header in self.conns[id].send(outs, truncate) {
            let name = Opcode::from_bits(header[0] & 0x3F).map_or("raw".into(), |o| format!("{o:?}"));
            self.note(id, "out", &name, Some(header));
        }
    }

    /// What concerns the connection as a whole. Returns whether it was such an action.
    pub(super) fn at_once(&mut self, id: usize, action: &Action) -> bool {
        match action {
            Action::Close { reset } => self.conns[id].close(*reset),
            Action::Stall => self.conns[id].stalled = true,
            Action::Window(n) => self.conns[id].window = *n,
            Action::Resize(blocks) => self.disk.resize(*blocks),
            _ => return false,
        }
        true
    }

    pub(super) fn breach(&mut self, id: usize, wrong: impl IntoIterator<Item = String>) {
        self.breaches.extend(wrong.into_iter().map(|what| format!("connection {id}: {what}")));
    }

    fn receive(&mut self, id: usize, bhs: &Bhs, data: Option<&[u8]>) {
        let label = match InitiatorPdu::decode(bhs) {
            Ok(InitiatorPdu::ScsiCommand(c)) => Event::of_cdb(&c.cdb).name().to_owned(),
            Ok(InitiatorPdu::NopOut(_)) => "nop-out".into(),
            Ok(InitiatorPdu::TaskManagementRequest(_)) => "tmf".into(),
            Ok(InitiatorPdu::DataOut(_)) => "data-out".into(),
            Ok(InitiatorPdu::LogoutRequest(_)) => "logout".into(),
            Ok(InitiatorPdu::TextRequest(_)) => "text".into(),
            other => {
                self.breach(id, [format!("a PDU that has no place here: {other:?}")]);
                "unexpected".into()
            }
        };
        self.note(id, "in", &label, Some(bhs.0));
        let wrong = oracle::request(&mut self.conns[id], bhs);
        self.breach(id, wrong);
        let Some(data) = data else {
            self.breach(id, ["a wrong data digest (13.1)".to_owned()]);
            return self.conns[id].close(false);
        };
        match InitiatorPdu::decode(bhs) {
            Ok(InitiatorPdu::ScsiCommand(command)) => self.command(id, bhs, command, data),
            Ok(InitiatorPdu::DataOut(pdu)) => self.data_out(id, bhs, &pdu, data),
            Ok(InitiatorPdu::NopOut(pdu)) => self.nop_out(id, &pdu, data),
            Ok(InitiatorPdu::TaskManagementRequest(pdu)) => self.task_management(id, bhs, &pdu),
            Ok(InitiatorPdu::LogoutRequest(pdu)) => self.logout(id, &pdu),
            Ok(InitiatorPdu::TextRequest(pdu)) => self.text(id, &pdu, data),
            _ => self.conns[id].close(false),
        }
    }

    fn command(&mut self, id: usize, bhs: &Bhs, command: ScsiCommand, data: &[u8]) {
        let wrong = oracle::command(&self.conns[id], &command, self.lun());
        self.breach(id, wrong);
        let actions = self.turn(Event::of_cdb(&command.cdb));
        for action in &actions {
            match action {
                Action::Reject(reason) => {
                    let out = Out::extra(&Extra::Reject(*reason), command.lun, Some(bhs));
                    return self.send(id, vec![out], None);
                }
                _ => {
                    self.at_once(id, action);
                }
            }
        }
        if !self.conns[id].open {
            return;
        }
        let itt = command.itt.0;
        let task = Task::new(command, data, actions);
        self.conns[id].tasks.insert(itt, task);
        self.advance(id, itt, bhs);
    }

    fn data_out(&mut self, id: usize, bhs: &Bhs, pdu: &DataOut, data: &[u8]) {
        let conn = &mut self.conns[id];
        let Some(n) = &conn.negotiated else { return };
        let (first_burst, segment) = (n.first_burst_bytes, n.max_recv_data_segment_bytes);
        if data.len() > segment as usize {
            self.breach(id, [format!("{} bytes in a Data-Out (13.12)", data.len())]);
        }
        // Data of a command that was answered, aborted or left hanging meanwhile is of no interest.
        let Some(task) = self.conns[id].tasks.get_mut(&pdu.itt.0) else { return };
        if let Some(wrong) = task.take(pdu, data, first_burst) {
            self.breach(id, [wrong]);
        }
        self.advance(id, pdu.itt.0, bhs);
    }

    /// Asks for more data, or carries the command out.
    fn advance(&mut self, id: usize, itt: u32, bhs: &Bhs) {
        let conn = &mut self.conns[id];
        let Some(n) = &conn.negotiated else { return };
        let (max_r2t, max_burst) = (usize::from(n.max_outstanding_r2t), n.max_burst_bytes);
        let Some(task) = conn.tasks.get_mut(&itt) else { return };
        let early = task.actions.iter().any(|a| matches!(a, Action::Early | Action::RefuseEarly(..)));
        if task.is_whole() || early {
            let Some(task) = conn.tasks.remove(&itt) else { return };
            return self.execute(id, task, bhs);
        }
        if task.unsolicited.is_some() {
            return;
        }
        let burst = task.actions.iter().find_map(|a| if let Action::Burst(n) = a { Some(*n) } else { None });
        let burst = burst.unwrap_or(max_burst).min(max_burst).max(1);
        let mut outs = Vec::new();
        while task.asks.len() < max_r2t && (task.asked as usize) < task.data.len() {
            let len = burst.min(task.data.len() as u32 - task.asked);
            let ttt = conn.next_ttt;
            conn.next_ttt += 1;
            outs.push(Out::r2t(&task.command, ttt, task.r2ts, task.asked, len));
            task.asks.push(Ask {
                ttt,
                lun: task.command.lun,
                next: task.asked,
                end: task.asked + len,
                data_sn: 0,
                is_sound: true,
            });
            task.asked += len;
            task.r2ts += 1;
        }
        let (actions, lun) = (task.actions.clone(), task.command.lun);
        let manner = spoil(&mut outs, &actions, lun, Some(bhs));
        // An R2T that was changed in what counts must not be answered.
        let counts = |header: &[u8; 48]| [&header[8..24], &header[36..48]].concat();
        for out in outs.iter().filter(|out| counts(&out.edited()) != counts(&out.header)) {
            let ttt = u32::from_be_bytes([out.header[20], out.header[21], out.header[22], out.header[23]]);
            task.asks.iter_mut().filter(|ask| ask.ttt == ttt).for_each(|ask| ask.is_sound = false);
        }
        self.later(id, outs, manner.after, manner.truncate);
    }

    fn execute(&mut self, id: usize, mut task: Task, bhs: &Bhs) {
        if self.options.depth > 0 && self.conns[id].later >= self.options.depth {
            task.actions = vec![Action::Status(Status::TASK_SET_FULL.0)];
        }
        if task.actions.contains(&Action::Hang) {
            self.conns[id].hung.push(task);
            self.note(id, "event", "hung", None);
            return;
        }
        let (command, moved) = (task.command, task.have as usize);
        let told = task.actions.iter().find_map(|action| match *action {
            Action::Status(status) => Some(Done { status, ..Done::default() }),
            Action::Sense(key, code) | Action::RefuseEarly(key, code) => Some(Done::check(key, code)),
            Action::Deferred(key, code) => Some(Done {
                sense: Some(Sense { deferred: true, ..Sense::new(key, code) }),
                ..Done::check(key, code)
            }),
            Action::Response(_) | Action::Early => Some(Done::default()),
            Action::Pretend if !command.read => Some(Done::default()),
            _ => None,
        });
        let lun = self.lun();
        let done = told.unwrap_or_else(|| match Event::of_cdb(&command.cdb) {
            Event::Luns => Done { data: luns(lun), ..Done::default() },
            _ => self.disk.run(&command.cdb, &task.data),
        });
        if task.actions.contains(&Action::CloseUnanswered) {
            return self.conns[id].close(false);
        }
        let Some(n) = &self.conns[id].negotiated else { return };
        let shape = Shape {
            segment_bytes: (n.max_send_data_segment_bytes as usize).min(self.options.in_segment_bytes),
            burst_bytes: n.max_burst_bytes as usize,
            apart: self.options.apart,
        };
        // What the device would have taken: GOOD for less is the initiator's to notice.
        let moved = if task.actions.contains(&Action::Early) {
            command.expected_len_bytes as usize
        } else if command.write && done.status == Status::GOOD.0 {
            Disk::transfer_bytes(&command.cdb).unwrap_or(moved).min(moved)
        } else {
            moved
        };
        let mut outs = compose(&command, &done, moved, shape, &task.actions);
        let manner = spoil(&mut outs, &task.actions, lun, Some(bhs));
        self.later(id, outs, manner.after, manner.truncate);
    }

    /// Sends now or after a while.
    fn later(&mut self, id: usize, outs: Vec<Out>, after: Option<Duration>, truncate: Option<usize>) {
        let (Some(after), Some(shared)) = (after, self.shared.upgrade()) else {
            return self.send(id, outs, truncate);
        };
        self.conns[id].later += 1;
        thread::spawn(move || {
            // The delay is the answer's, not a wait for something.
            thread::sleep(after);
            shared.update(|s| {
                s.conns[id].later -= 1;
                s.send(id, outs, truncate);
            });
        });
    }

    /// Carries out and answers what hangs.
    pub(super) fn release(&mut self) {
        for id in 0..self.conns.len() {
            for mut task in std::mem::take(&mut self.conns[id].hung) {
                task.actions.retain(|action| *action != Action::Hang);
                self.note(id, "event", "released", None);
                let bhs = task.command.encode();
                self.execute(id, task, &bhs);
            }
        }
    }

    /// Goes on where connections were stalled.
    pub(super) fn thaw(&mut self) {
        for id in 0..self.conns.len() {
            let conn = &mut self.conns[id];
            conn.stalled = false;
            let held = std::mem::take(&mut conn.held_back);
            self.send(id, held, None);
        }
    }

    fn nop_out(&mut self, id: usize, pdu: &NopOut, data: &[u8]) {
        let wrong = oracle::nop_out(&mut self.conns[id], pdu);
        self.breach(id, wrong);
        if pdu.itt.is_none() {
            return;
        }
        let actions = self.turn(Event::Ping);
        if actions.contains(&Action::Hang) {
            return;
        }
        let answer = NopIn { data_len_bytes: 0, lun: pdu.lun, itt: pdu.itt, ttt: Ttt::NONE, sn: SN };
        let mut outs = vec![Out::new(&answer, data.to_vec(), Numbers::Status)];
        self.finish(id, &mut outs, &actions);
    }

    pub(super) fn finish(&mut self, id: usize, outs: &mut Vec<Out>, actions: &[Action]) {
        let manner = spoil(outs, actions, self.lun(), None);
        for action in actions {
            self.at_once(id, action);
        }
        self.later(id, std::mem::take(outs), manner.after, manner.truncate);
    }

    fn task_management(&mut self, id: usize, _bhs: &Bhs, pdu: &TaskManagementRequest) {
        let wrong = oracle::task_management(&self.conns[id], pdu, self.lun());
        self.breach(id, wrong);
        let actions = self.turn(Event::Tmf);
        if actions.contains(&Action::Hang) {
            return;
        }
        let told =
            actions.iter().find_map(|a| if let Action::Respond(code) = a { Some(*code) } else { None });
        let lie = actions.contains(&Action::Lie);
        let mut response = TaskResponseCode::Complete;
        if told.is_none() && !lie {
            match pdu.function {
                TaskFunction::AbortTask => {
                    let conn = &mut self.conns[id];
                    let before = conn.hung.len() + conn.tasks.len();
                    conn.hung.retain(|task| task.command.itt != pdu.referenced_itt);
                    conn.tasks.remove(&pdu.referenced_itt.0);
                    if conn.hung.len() + conn.tasks.len() == before {
                        response = TaskResponseCode::NoTask;
                    }
                }
                _ => {
                    for conn in &mut self.conns {
                        conn.hung.clear();
                        conn.tasks.clear();
                    }
                }
            }
        }
        let answer = TaskManagementResponse { response, itt: pdu.itt, sn: SN };
        let mut out = Out::new(&answer, Vec::new(), Numbers::Status);
        if let Some(code) = told {
            out.header[2] = code;
        }
        self.finish(id, &mut vec![out], &actions);
    }

    fn logout(&mut self, id: usize, pdu: &LogoutRequest) {
        let wrong = oracle::logout(pdu, 0);
        self.breach(id, wrong);
        self.conns[id].logged_out = true;
        let actions = self.turn(Event::Logout);
        if actions.contains(&Action::Hang) {
            return;
        }
        let answer = LogoutResponse {
            response: LogoutResponseCode::Closed,
            itt: pdu.itt,
            sn: SN,
            time2wait_s: self.options.time2wait_s,
            time2retain_s: 0,
        };
        let mut outs = vec![Out::new(&answer, Vec::new(), Numbers::Status)];
        // The session and its tasks are over (11.14).
        self.conns[id].tasks.clear();
        self.conns[id].hung.clear();
        if !actions.contains(&Action::KeepOpen) {
            outs.push(Out::fin());
        }
        self.finish(id, &mut outs, &actions);
    }
}
