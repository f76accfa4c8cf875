//! A target that misbehaves on demand: the login and session machines of the `iscsi` crate over a socket, a small disk in
//! memory, and a list of faults for the commands to come. Real targets cannot be made to do these things at a chosen
//! moment.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use iscsi::chap::Entropy;
use iscsi::login::target::{Config, Decision, Login, Progress, TargetConfig};
use iscsi::params::Params;
use iscsi::pdu::framing::{Digests, Limits, Receiver, Step, append_pdu};
use iscsi::pdu::{Bhs, Opcode, Pdu, TaskFunction, TaskResponseCode};
use iscsi::scsi::sense::asc;
use iscsi::scsi::{Sense, SenseKey, Status, opcode};
use iscsi::serial::Serial;
use iscsi::target::{Completion, Event, OutgoingData, Session, TaskId};

pub const IQN: &str = "iqn.2026-01.test:faulty";

/// What goes wrong with the next READ, WRITE or SYNCHRONIZE CACHE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// This status.
    Status(Status),
    /// CHECK CONDITION with this key and code.
    Sense(SenseKey, u16),
    /// Half of the data, GOOD, an honest residual (defect B).
    Half,
    /// Response 01h with status GOOD (defect A).
    TargetFailure,
    /// One byte of a Data-In digest is wrong.
    BadDigest,
    /// No answer, until the task is aborted.
    Hang,
    /// The connection is closed without an answer; `true`: after the command was carried out.
    Close(bool),
    /// WRITEs: GOOD for all of them as soon as the last one's data was asked for, and nothing is read any more.
    Early,
    /// The unit now has this many blocks, and says so by a unit attention.
    Resize(u64),
}

#[derive(Debug, Default)]
pub struct State {
    pub disk: Vec<u8>,
    pub blocks: u64,
    pub serial: String,
    pub faults: VecDeque<Fault>,
    pub fua: bool,
    pub isids: Vec<String>,
    pub aborts: usize,
    pub flushes: usize,
    pub refuse_logins: bool,
    /// TargetPortalGroupTag of the connections to come.
    pub group: u16,
    pub resets: usize,
    pub refuse_resets: bool,
    /// Connections, to cut them all.
    pub streams: Vec<TcpStream>,
}

pub struct Faulty {
    pub addr: SocketAddr,
    pub state: Arc<Mutex<State>>,
}

impl Faulty {
    pub fn start(blocks: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // A small window: whoever sends more than is read is stopped soon.
        rustix::net::sockopt::set_socket_recv_buffer_size(&listener, 4096).unwrap();
        let addr = listener.local_addr().unwrap();
        let state = State {
            disk: vec![0; blocks as usize * 512],
            blocks,
            serial: "FAULTY-1".into(),
            fua: true,
            group: 1,
            ..State::default()
        };
        let state = Arc::new(Mutex::new(state));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let shared = Arc::clone(&shared);
                shared.lock().unwrap().streams.push(stream.try_clone().unwrap());
                // Ends with the connection.
                std::thread::spawn(move || drop(Connection::new(stream, shared).run()));
            }
        });
        Self { addr, state }
    }

    pub fn url(&self) -> String {
        format!("iscsi://{}/{IQN}/0", self.addr)
    }

    pub fn fault(&self, faults: &[Fault]) {
        self.state.lock().unwrap().faults.extend(faults);
    }

    pub fn cut(&self) {
        for stream in self.state.lock().unwrap().streams.drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

struct Connection {
    stream: TcpStream,
    state: Arc<Mutex<State>>,
    rx: Receiver,
    digests: Digests,
    input: Vec<u8>,
    buffers: Vec<Vec<u8>>,
    /// Tasks that will never be answered, tasks whose response is to be spoiled.
    spoil_response: Option<u32>,
    spoil_digest: bool,
    /// The tasks of [`Fault::Early`], and whether they are all.
    early: (Vec<u32>, bool),
}

impl Connection {
    fn new(stream: TcpStream, state: Arc<Mutex<State>>) -> Self {
        Self {
            stream,
            state,
            rx: Receiver::new(Limits::default()),
            digests: Digests::default(),
            input: Vec::new(),
            buffers: Vec::new(),
            spoil_response: None,
            spoil_digest: false,
            early: (Vec::new(), false),
        }
    }

    fn pdu(&mut self) -> std::io::Result<(Bhs, Vec<u8>)> {
        let mut data = Vec::new();
        loop {
            match self.rx.step() {
                Step::Header => self.rx.accept(),
                Step::Done { data_digest_ok } => {
                    assert!(data_digest_ok);
                    let header = *self.rx.header();
                    self.rx.next_pdu();
                    return Ok((header, data));
                }
                _ if self.input.is_empty() => {
                    let mut buffer = [0; 65536];
                    let got = self.stream.read(&mut buffer)?;
                    if got == 0 {
                        return Err(std::io::ErrorKind::UnexpectedEof.into());
                    }
                    self.input.extend_from_slice(&buffer[..got]);
                }
                Step::Framing { .. } => {
                    let taken = self.rx.feed(&self.input).map_err(std::io::Error::other)?;
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

    fn run(mut self) -> std::io::Result<()> {
        let config = Config {
            targets: vec![TargetConfig::new(IQN)],
            portal_group_tag: self.state.lock().unwrap().group,
            discovery_auth: Default::default(),
            params: Params { max_burst_bytes: 65536, first_burst_bytes: 8192, ..Params::default() },
            command_window: 32,
        };
        let mut login = Login::new(Arc::new(config), Entropy([7; 33]), Serial(0xFFFF_FFF0));
        let mut session = loop {
            let (header, data) = self.pdu()?;
            let mut progress = login.receive(&header, &data);
            if let Progress::Decide(claim) = &progress {
                let mut state = self.state.lock().unwrap();
                state.isids.push(claim.isid.to_string());
                let decision = if state.refuse_logins {
                    Decision::Refuse(iscsi::login::LoginStatus::SERVICE_UNAVAILABLE)
                } else {
                    Decision::Accept { tsih: 1 }
                };
                drop(state);
                progress = login.decide(decision);
            }
            let mut out = Vec::new();
            match progress {
                Progress::Send(pdu) => pdu.write(&mut out),
                Progress::Failed(pdu, _) => {
                    pdu.write(&mut out);
                    self.stream.write_all(&out)?;
                    return Ok(());
                }
                Progress::Done(pdu, logged_in) => {
                    pdu.write(&mut out);
                    self.stream.write_all(&out)?;
                    let n = &logged_in.negotiated;
                    self.digests = n.digests;
                    self.rx.configure(n.limits(0), n.digests);
                    break Session::new(iscsi::target::Config {
                        queue_depth: 32,
                        max_recv_segment_bytes: n.max_recv_data_segment_bytes,
                        max_send_segment_bytes: n.max_send_data_segment_bytes,
                        max_burst_bytes: n.max_burst_bytes,
                        first_burst_bytes: n.first_burst_bytes,
                        initial_r2t: n.initial_r2t,
                        immediate_data: n.immediate_data,
                        max_outstanding_r2t: n.max_outstanding_r2t.min(255) as u8,
                        discovery: false,
                        exp_cmd_sn: logged_in.nexus.cmd_sn,
                        stat_sn: logged_in.nexus.stat_sn,
                        cid: logged_in.nexus.cid,
                    });
                }
                Progress::Decide(_) => unreachable!("decided above"),
            }
            self.stream.write_all(&out)?;
        };
        self.buffers = vec![Vec::new(); session.slots()];
        loop {
            let (header, data) = self.pdu()?;
            let event = session.receive(&header, &data, true).map_err(std::io::Error::other)?;
            let open = self.event(&mut session, event, &data);
            if open {
                self.flush(&mut session)?;
            }
            if !open || session.is_finished() {
                // What was carried out but not answered stays so.
                let _ = self.stream.shutdown(std::net::Shutdown::Both);
                return Ok(());
            }
        }
    }

    fn flush(&mut self, session: &mut Session) -> std::io::Result<()> {
        let mut out = Vec::new();
        let mut next = None;
        while let Some(mut pdu) = session.poll_transmit() {
            next = iscsi::pdu::R2t::decode(&pdu.header).ok().map(|r2t| r2t.sn).or(next);
            if pdu.header.opcode() == Some(Opcode::ScsiResponse)
                && self.spoil_response == Some(pdu.header.itt().0)
            {
                pdu.header.0[2] = 1;
                self.spoil_response = None;
            }
            let data = match &pdu.data {
                OutgoingData::None => &[][..],
                OutgoingData::Task { task, offset, len } => {
                    &self.buffers[task.slot()][*offset as usize..][..*len as usize]
                }
                OutgoingData::Sense { bytes, len } => &bytes[..usize::from(*len)],
                OutgoingData::Bytes(bytes) => bytes,
            };
            append_pdu(&mut out, &pdu.header, data, self.digests);
            if self.spoil_digest && pdu.header.opcode() == Some(Opcode::DataIn) && self.digests.data {
                self.spoil_digest = false;
                *out.last_mut().unwrap() ^= 0x55;
            }
        }
        if let (true, Some(mut sn)) = (self.early.1, next) {
            let mut responses = Vec::new();
            for &itt in &self.early.0 {
                let response = iscsi::pdu::ScsiResponse {
                    response: iscsi::pdu::ScsiResponseCode::Completed,
                    status: Status::GOOD.0,
                    residual: iscsi::pdu::Residual::None,
                    bidi_residual: iscsi::pdu::Residual::None,
                    data_len_bytes: 0,
                    itt: iscsi::pdu::Itt(itt),
                    snack_tag: 0,
                    sn,
                    exp_data_sn: Serial(0),
                };
                append_pdu(&mut responses, &response.encode(), &[], self.digests);
                sn.stat_sn = sn.stat_sn.next();
            }
            self.stream.write_all(&out)?;
            // The data is on its way, but stays with the sender for the most part.
            let mut fds = [rustix::event::PollFd::new(&self.stream, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut fds, None)?;
            self.stream.write_all(&responses)?;
            // Until the other side has had enough of it.
            let mut fds = [rustix::event::PollFd::new(&self.stream, rustix::event::PollFlags::RDHUP)];
            rustix::event::poll(&mut fds, None)?;
            return Err(std::io::ErrorKind::ConnectionAborted.into());
        }
        self.stream.write_all(&out)
    }

    /// Returns whether the connection stays open.
    fn event(&mut self, session: &mut Session, event: Event, data: &[u8]) -> bool {
        match event {
            Event::Command(task) => {
                let command = session.command(task);
                let len = command.expected_len_bytes as usize;
                self.buffers[task.slot()] = vec![0; len];
                if !command.write {
                    return self.carry_out(session, task);
                }
                let accepted = session.accept_data(task, len as u32);
                let mut state = self.state.lock().unwrap();
                if state.faults.front() == Some(&Fault::Early) {
                    state.faults.pop_front();
                    self.early.0.push(command.itt.0);
                    self.early.1 = state.faults.is_empty();
                }
                drop(state);
                let now = accepted.immediate_len as usize;
                self.buffers[task.slot()][..now].copy_from_slice(&data[..now]);
                !accepted.complete || self.carry_out(session, task)
            }
            Event::Data(place) => {
                let (at, len) = (place.offset as usize, place.len as usize);
                self.buffers[place.task.slot()][at..at + len].copy_from_slice(&data[..len]);
                !place.complete || self.carry_out(session, place.task)
            }
            Event::Aborted(_) => {
                self.state.lock().unwrap().aborts += 1;
                true
            }
            Event::TaskManagement(request) => {
                let mut state = self.state.lock().unwrap();
                let response = match request.function {
                    TaskFunction::LogicalUnitReset if !state.refuse_resets => {
                        state.resets += 1;
                        TaskResponseCode::Complete
                    }
                    _ => TaskResponseCode::Unsupported,
                };
                session.complete_task_management(request.itt, response);
                true
            }
            Event::Handled | Event::Logout => true,
            Event::Text(_) => panic!("text in a normal session"),
        }
    }

    fn carry_out(&mut self, session: &mut Session, task: TaskId) -> bool {
        let command = session.command(task);
        let cdb = command.cdb;
        let shared = Arc::clone(&self.state);
        let mut state = shared.lock().unwrap();
        let medium = matches!(cdb[0], opcode::READ_10 | opcode::WRITE_10 | opcode::SYNCHRONIZE_CACHE_10);
        let fault = if medium { state.faults.pop_front() } else { None };
        let check = |session: &mut Session, key, code| {
            let sense = Sense::new(key, code).encode_fixed();
            session
                .complete(task, Completion { status: Status::CHECK_CONDITION, device_len: 0, sense: &sense });
        };
        match fault {
            Some(Fault::Status(status)) => session.complete(task, Completion::status(status)),
            Some(Fault::Sense(key, code)) => check(session, key, code),
            Some(Fault::Resize(blocks)) => {
                state.blocks = blocks;
                state.disk.resize(blocks as usize * 512, 0);
                check(session, SenseKey::UnitAttention, asc::CAPACITY_CHANGED);
            }
            Some(Fault::Hang) => {}
            Some(Fault::Close(false)) => return false,
            _ => {
                if fault == Some(Fault::TargetFailure) {
                    // Not carried out, as the response says.
                    self.spoil_response = Some(command.itt.0);
                    session.complete(task, Completion::status(Status::GOOD));
                    return true;
                }
                self.spoil_digest |= fault == Some(Fault::BadDigest);
                let buffer = &mut self.buffers[task.slot()];
                let Some(device_len) = answer(&mut state, &cdb, buffer) else {
                    check(session, SenseKey::IllegalRequest, asc::INVALID_OPCODE);
                    return true;
                };
                let device_len = if fault == Some(Fault::Half) { device_len / 2 } else { device_len };
                session.complete(
                    task,
                    Completion { status: Status::GOOD, device_len: device_len as u32, sense: &[] },
                );
                return fault != Some(Fault::Close(true));
            }
        }
        true
    }
}

/// Carries a command out; the bytes that there are for the initiator.
fn answer(state: &mut State, cdb: &[u8; 16], buffer: &mut Vec<u8>) -> Option<usize> {
    let put = |buffer: &mut Vec<u8>, data: &[u8]| {
        let len = data.len().min(buffer.len());
        buffer[..len].copy_from_slice(&data[..len]);
        Some(data.len())
    };
    match (cdb[0], cdb[1], cdb[2]) {
        (opcode::TEST_UNIT_READY, ..) => Some(0),
        (opcode::SYNCHRONIZE_CACHE_10, ..) => {
            state.flushes += 1;
            Some(0)
        }
        (opcode::INQUIRY, 0, _) => {
            let mut data = vec![0, 0, 6, 2, 31, 0, 0, 2];
            data.extend_from_slice(b"TEST    FAULTY          1   ");
            put(buffer, &data)
        }
        (opcode::INQUIRY, 1, 0x00) => put(buffer, &[0, 0, 0, 2, 0, 0x80]),
        (opcode::INQUIRY, 1, 0x80) => {
            let mut data = vec![0, 0x80, 0, state.serial.len() as u8];
            data.extend_from_slice(state.serial.as_bytes());
            put(buffer, &data)
        }
        (opcode::REPORT_LUNS, ..) => put(buffer, &[0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (opcode::SERVICE_ACTION_IN_16, ..) => {
            let mut data = (state.blocks - 1).to_be_bytes().to_vec();
            data.extend_from_slice(&512u32.to_be_bytes());
            data.resize(32, 0);
            put(buffer, &data)
        }
        (opcode::MODE_SENSE_6, ..) => {
            // DPOFUA as wanted, write cache on.
            let mut data = vec![23, 0, if state.fua { 0x10 } else { 0 }, 0, 8, 18, 4];
            data.resize(24, 0);
            put(buffer, &data)
        }
        (opcode::READ_10 | opcode::WRITE_10, ..) => {
            let at = u32::from_be_bytes([cdb[2], cdb[3], cdb[4], cdb[5]]) as usize * 512;
            let end = at + buffer.len();
            if cdb[0] == opcode::WRITE_10 {
                state.disk[at..end].copy_from_slice(buffer);
            } else {
                buffer.copy_from_slice(&state.disk[at..end]);
            }
            Some(buffer.len())
        }
        _ => None,
    }
}
