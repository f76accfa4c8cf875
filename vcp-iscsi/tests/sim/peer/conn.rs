//! One connection of the model target: login, then a session whose commands are executed in their time.

use iscsi::login::LoginStatus;
use iscsi::login::target::{Decision, Login, Progress};
use iscsi::pdu::framing::{Digests, Receiver, Step, append_pdu};
use iscsi::pdu::{AsyncEvent, AsyncMessage, Bhs, TargetSn, TaskFunction, TaskResponseCode};
use iscsi::scsi::lun::Lun;
use iscsi::scsi::sense::asc;
use iscsi::scsi::{Sense, SenseKey, Status, opcode};
use iscsi::serial::Serial;
use iscsi::target::{Completion, Config, Event, OutgoingData, Session, TaskId};

use super::mangle::{self, Mangle};
use super::unit::{Medium, Unit};
use super::{Action, Context, Nexus, Target};
use crate::content::{BLOCK, claim};
use crate::faults::Kind;
use crate::net::ConnId;
use crate::trace::trace;

/// One second.
const S: u64 = 1_000_000_000;

pub(super) enum Phase {
    Login(Box<Login>),
    Full(Box<Full>),
}

/// A command underway.
struct Task {
    id: TaskId,
    itt: u32,
    serial: u64,
    cdb: [u8; 16],
    medium: Option<Medium>,
    write: bool,
    data: Vec<u8>,
    fault: Option<Kind>,
}

pub(super) struct Full {
    pub(super) nexus: Nexus,
    session: Session,
    tasks: Vec<Option<Task>>,
    mangles: Vec<(u32, Mangle)>,
    /// Responses of the machine that were given before their time.
    swallow: Vec<u32>,
    stat_shift: u32,
    /// MaxCmdSN as it is told while the window is kept closed.
    frozen: Option<u32>,
    last_max: u32,
}

pub(super) struct Connection {
    pub(super) id: ConnId,
    pub(super) group: u16,
    pub(super) rx: Receiver,
    pub(super) input: Vec<u8>,
    pub(super) data: Vec<u8>,
    pub(super) digests: Digests,
    pub(super) phase: Phase,
}

fn check(session: &mut Session, task: TaskId, key: SenseKey, code: u16) {
    let sense = Sense::new(key, code).encode_fixed();
    session.complete(task, Completion { status: Status::CHECK_CONDITION, device_len: 0, sense: &sense });
}

impl Full {
    pub(super) fn abort_all(&mut self) {
        self.session.abort_tasks(None, |_| {});
        self.tasks.iter_mut().for_each(|task| *task = None);
    }

    fn task(&mut self, id: TaskId) -> Option<&mut Task> {
        self.tasks.get_mut(id.slot())?.as_mut().filter(|task| task.id == id)
    }
}

impl Connection {
    /// Works off what arrived; whether the connection stays open.
    pub(super) fn work(&mut self, target: &mut Target, cx: &mut Context<'_>) -> bool {
        let input = std::mem::take(&mut self.input);
        let mut bytes = &input[..];
        loop {
            match self.rx.step() {
                Step::Header => self.rx.accept(),
                Step::Done { data_digest_ok } => {
                    let (header, data) = (*self.rx.header(), std::mem::take(&mut self.data));
                    self.rx.next_pdu();
                    if !self.pdu(target, &header, &data, data_digest_ok, cx) {
                        return false;
                    }
                }
                _ if bytes.is_empty() => break,
                Step::Framing { .. } => match self.rx.feed(bytes) {
                    Ok(taken) => bytes = &bytes[taken..],
                    Err(error) => {
                        trace!(cx.trace, cx.now, "target: conn {}: {error}", self.id);
                        return false;
                    }
                },
                Step::Data { len_bytes, .. } => {
                    let (part, rest) = bytes.split_at(bytes.len().min(len_bytes as usize));
                    self.rx.data(part);
                    self.data.extend_from_slice(part);
                    bytes = rest;
                }
            }
        }
        self.transmit(target, cx)
    }

    fn pdu(
        &mut self,
        target: &mut Target,
        header: &Bhs,
        data: &[u8],
        intact: bool,
        cx: &mut Context<'_>,
    ) -> bool {
        let Phase::Full(full) = &mut self.phase else { return self.login(target, header, data, cx) };
        trace!(
            cx.trace,
            cx.now,
            "target: conn {} < {} itt {:08x} +{}",
            self.id,
            header.opcode().map_or("?", |o| o.name()),
            header.itt().0,
            data.len()
        );
        match full.session.receive(header, data, intact) {
            Ok(event) => self.event(target, event, data, cx),
            Err(error) => {
                trace!(cx.trace, cx.now, "target: conn {}: {error}", self.id);
                false
            }
        }
    }

    fn login(&mut self, target: &mut Target, header: &Bhs, data: &[u8], cx: &mut Context<'_>) -> bool {
        let Phase::Login(login) = &mut self.phase else { return false };
        let mut progress = login.receive(header, data);
        let mut nexus = ([0; 6], 0);
        if let Progress::Decide(claim) = &progress {
            nexus = (claim.isid.0, self.group);
            let decision = if cx.faults.roll(Kind::RefuseLogin, cx.now) {
                let refusals = [
                    LoginStatus::SERVICE_UNAVAILABLE,
                    LoginStatus::OUT_OF_RESOURCES,
                    LoginStatus::TARGET_ERROR,
                ];
                Decision::Refuse(cx.faults.rng().pick(&refusals))
            } else {
                target.reinstate(nexus, cx);
                target.next_tsih = target.next_tsih.wrapping_add(1).max(1);
                Decision::Accept { tsih: target.next_tsih }
            };
            trace!(cx.trace, cx.now, "target: conn {} login {decision:?} isid {:02x?}", self.id, nexus.0);
            progress = login.decide(decision);
        }
        let mut out = Vec::new();
        let open = match progress {
            Progress::Send(pdu) => {
                pdu.write(&mut out);
                true
            }
            Progress::Failed(pdu, error) => {
                trace!(cx.trace, cx.now, "target: conn {} login failed: {error}", self.id);
                pdu.write(&mut out);
                false
            }
            Progress::Done(pdu, logged_in) => {
                pdu.write(&mut out);
                let n = &logged_in.negotiated;
                self.digests = n.digests;
                self.rx.configure(n.limits(0), n.digests);
                let session = Session::new(Config {
                    queue_depth: target.settings.window,
                    max_recv_segment_bytes: n.max_recv_data_segment_bytes,
                    max_send_segment_bytes: n.max_send_data_segment_bytes.min(target.settings.segment_bytes),
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
                self.phase = Phase::Full(Box::new(Full {
                    nexus,
                    tasks: (0..session.slots()).map(|_| None).collect(),
                    session,
                    mangles: Vec::new(),
                    swallow: Vec::new(),
                    stat_shift: 0,
                    frozen: None,
                    last_max: logged_in.nexus.max_cmd_sn.0,
                }));
                true
            }
            Progress::Decide(_) => false,
        };
        cx.actions.push(Action::Send(self.id, out));
        open
    }

    fn event(&mut self, target: &mut Target, event: Event, data: &[u8], cx: &mut Context<'_>) -> bool {
        let Phase::Full(full) = &mut self.phase else { return false };
        match event {
            Event::Command(id) => {
                let command = full.session.command(id);
                let medium = Medium::of(&command.cdb);
                let fault = if medium.is_some() { draw(cx) } else { None };
                target.next_serial += 1;
                let serial = target.next_serial;
                if let Some(kind) = fault {
                    trace!(
                        cx.trace,
                        cx.now, "target: conn {} itt {:08x} will suffer {kind:?}", self.id, command.itt.0
                    );
                    full.mangles.push((command.itt.0, Mangle::new(kind, cx.faults.rng())));
                }
                let mut task = Task {
                    id,
                    itt: command.itt.0,
                    serial,
                    cdb: command.cdb,
                    medium,
                    write: command.write,
                    data: Vec::new(),
                    fault,
                };
                let mut ready = true;
                if command.write {
                    task.data.resize(command.expected_len_bytes as usize, 0);
                    let accepted = full.session.accept_data(id, command.expected_len_bytes);
                    let now = accepted.immediate_len as usize;
                    task.data[..now].copy_from_slice(&data[..now]);
                    ready = accepted.complete;
                }
                full.tasks[id.slot()] = Some(task);
                if ready {
                    self.schedule(target, serial, fault, cx);
                }
                true
            }
            Event::Data(place) => {
                let (at, len) = (place.offset as usize, place.len as usize);
                let Some(task) = full.task(place.task) else { return true };
                task.data[at..at + len].copy_from_slice(&data[..len]);
                if place.complete {
                    let (serial, fault) = (task.serial, task.fault);
                    self.schedule(target, serial, fault, cx);
                }
                true
            }
            Event::Aborted(id) => {
                full.tasks[id.slot()] = None;
                true
            }
            Event::TaskManagement(request) => {
                let nexus = full.nexus;
                if cx.faults.roll(Kind::IgnoreTaskManagement, cx.now) {
                    return true;
                }
                let refused = cx.faults.roll(Kind::RefuseTaskManagement, cx.now);
                let response = match request.function {
                    TaskFunction::LogicalUnitReset if !refused => {
                        full.abort_all();
                        full.session.complete_task_management(request.itt, TaskResponseCode::Complete);
                        target.reset_unit(nexus);
                        return true;
                    }
                    _ => TaskResponseCode::Unsupported,
                };
                full.session.complete_task_management(request.itt, response);
                true
            }
            Event::Logout | Event::Handled | Event::Text(_) => true,
        }
    }

    fn schedule(&mut self, target: &mut Target, serial: u64, fault: Option<Kind>, cx: &mut Context<'_>) {
        let mut delay = target.latency();
        match fault {
            Some(Kind::Slow) => delay += cx.faults.rng().spread(S / 100, 20 * S),
            // Executed after all others gave up, or never.
            Some(Kind::Hang) => delay = cx.faults.rng().pick(&[5 * S, 30 * S, 1_000_000 * S]),
            _ => {}
        }
        cx.actions.push(Action::Timer { at: cx.now + delay, conn: self.id, serial });
    }

    /// The time of a command has come.
    pub(super) fn execute(&mut self, target: &mut Target, serial: u64, cx: &mut Context<'_>) {
        let Phase::Full(full) = &mut self.phase else { return };
        let Some(slot) = full.tasks.iter().position(|t| t.as_ref().is_some_and(|t| t.serial == serial))
        else {
            return;
        };
        let Some(task) = full.tasks[slot].take() else { return };
        let session = &mut full.session;
        if full.swallow.contains(&task.itt) {
            // Answered before its time; it must not happen.
            session.complete(task.id, Completion::status(Status::GOOD));
            return;
        }
        let quiet = matches!(task.cdb[0], opcode::INQUIRY | opcode::REPORT_LUNS);
        if !quiet
            && let Some(code) =
                target.attentions.get_mut(&full.nexus).and_then(std::collections::VecDeque::pop_front)
        {
            trace!(
                cx.trace,
                cx.now, "target: conn {} itt {:08x} unit attention {code:04x}", self.id, task.itt
            );
            return check(session, task.id, SenseKey::UnitAttention, code);
        }
        let Some(medium) = task.medium else {
            match target.unit.tell(&task.cdb, self.group) {
                Some(data) => {
                    let len = data.len();
                    full.tasks[slot] = Some(Task { data, ..task });
                    let id = full.tasks[slot].as_ref().map_or(task.id, |t| t.id);
                    session.complete(
                        id,
                        Completion { status: Status::GOOD, device_len: len as u32, sense: &[] },
                    );
                }
                None if task.cdb[0] == opcode::INQUIRY => {
                    check(session, task.id, SenseKey::IllegalRequest, asc::INVALID_FIELD_IN_CDB);
                }
                None => check(session, task.id, SenseKey::IllegalRequest, asc::INVALID_OPCODE),
            }
            return;
        };
        match target.state(self.group) {
            0 | 1 => {}
            state => {
                let code = match state {
                    2 => 0x040B,
                    0xF => asc::ALUA_TRANSITION,
                    _ => 0x040C,
                };
                return check(session, task.id, SenseKey::NotReady, code);
            }
        }
        let rng = cx.faults.rng();
        match task.fault {
            Some(Kind::Busy) => {
                let status = rng.pick(&[Status::BUSY, Status::TASK_SET_FULL]);
                return session.complete(task.id, Completion::status(status));
            }
            Some(Kind::TaskAborted) => {
                return session.complete(task.id, Completion::status(Status::TASK_ABORTED));
            }
            Some(Kind::NotReady) => return check(session, task.id, SenseKey::NotReady, asc::BECOMING_READY),
            Some(Kind::AbortedCommand) => {
                let code = rng.pick(&[asc::PROTOCOL_SERVICE_CRC, asc::NONE, asc::INSUFFICIENT_RESOURCES]);
                return check(session, task.id, SenseKey::AbortedCommand, code);
            }
            Some(Kind::Reject) => {
                // As if the command had not been understood; no answer follows.
                let header = command_header(&task);
                session.reject(&header, iscsi::pdu::RejectReason::InvalidField);
                full.tasks[slot] = Some(task);
                return;
            }
            Some(Kind::TargetFailure) if rng.permille(500) && !matches!(medium, Medium::Read { .. }) => {
                return session.complete(task.id, Completion::status(Status::GOOD));
            }
            _ => {}
        }
        let mut data = Vec::new();
        let in_range = |lba, blocks| target.unit.in_range(lba, blocks);
        let done = match medium {
            Medium::Read { lba, blocks } if in_range(lba, blocks) => {
                target.disk.read(lba, blocks, &mut data);
                true
            }
            Medium::Write { lba, blocks, fua }
                if in_range(lba, blocks) && task.data.len() == blocks as usize * BLOCK =>
            {
                target.disk.write(lba, &task.data, fua);
                for block in task.data.chunks_exact(BLOCK) {
                    *target.answered.entry(claim(block).0).or_default() += 1;
                }
                true
            }
            Medium::Flush => {
                target.disk.flush();
                true
            }
            Medium::WriteSame { lba, blocks } if in_range(lba, blocks) && task.data.len() == BLOCK => {
                target.disk.write(lba, &task.data.repeat(blocks as usize), false);
                true
            }
            Medium::Unmap => match Unit::unmap_range(&task.data) {
                Some((lba, blocks)) if in_range(lba, blocks) => {
                    target.disk.write(lba, &vec![0; blocks as usize * BLOCK], false);
                    true
                }
                _ => false,
            },
            _ => false,
        };
        trace!(cx.trace, cx.now, "target: conn {} itt {:08x} executes {medium:?}: {done}", self.id, task.itt);
        if !done {
            return check(session, task.id, SenseKey::IllegalRequest, asc::LBA_OUT_OF_RANGE);
        }
        let mut device_len = data.len() as u32;
        if task.fault == Some(Kind::ShortHonest) {
            device_len /= 2;
        }
        let id = task.id;
        if !task.write {
            full.tasks[slot] = Some(Task { data, ..task });
        }
        session.complete(id, Completion { status: Status::GOOD, device_len, sense: &[] });
    }

    /// Sends what the session has; whether the connection stays open.
    pub(super) fn transmit(&mut self, target: &mut Target, cx: &mut Context<'_>) -> bool {
        let _ = &target;
        let Phase::Full(full) = &mut self.phase else { return true };
        let mut out = Vec::new();
        while let Some(pdu) = full.session.poll_transmit() {
            let data = match &pdu.data {
                OutgoingData::None => Vec::new(),
                OutgoingData::Task { task, offset, len } => full.tasks[task.slot()]
                    .as_ref()
                    .map_or(Vec::new(), |t| t.data[*offset as usize..][..*len as usize].to_vec()),
                OutgoingData::Sense { bytes, len } => bytes[..usize::from(*len)].to_vec(),
                OutgoingData::Bytes(bytes) => bytes.clone(),
            };
            let mut header = pdu.header;
            header.set_data_len(data.len() as u32);
            let itt = header.itt().0;
            full.last_max = u32::from_be_bytes([header.0[32], header.0[33], header.0[34], header.0[35]]);
            if let Some(frozen) = full.frozen {
                header.0[32..36].copy_from_slice(&frozen.to_be_bytes());
            }
            if mangle::has_stat_sn(&header) {
                let sn = u32::from_be_bytes([header.0[24], header.0[25], header.0[26], header.0[27]]);
                header.0[24..28].copy_from_slice(&sn.wrapping_add(full.stat_shift).to_be_bytes());
            }
            let is_response = header.opcode() == Some(iscsi::pdu::Opcode::ScsiResponse);
            if is_response && let Some(at) = full.swallow.iter().position(|&tag| tag == itt) {
                full.swallow.swap_remove(at);
                full.stat_shift = full.stat_shift.wrapping_sub(1);
                continue;
            }
            let mut early = false;
            let pdus = match full.mangles.iter_mut().find(|(tag, _)| *tag == itt) {
                Some((_, mangle)) => mangle.apply(header, data, cx.faults.rng(), &mut early),
                None => vec![(header, data)],
            };
            for (header, data) in pdus {
                trace!(cx.trace, cx.now, "target: conn {} > {}", self.id, mangle::name(&header));
                append_pdu(&mut out, &header, &data, self.digests);
            }
            if early && let Some(response) = mangle::early_good(&header) {
                trace!(
                    cx.trace,
                    cx.now,
                    "target: conn {} > {} (too early)",
                    self.id,
                    mangle::name(&response)
                );
                append_pdu(&mut out, &response, &[], self.digests);
                full.swallow.push(itt);
                full.stat_shift = full.stat_shift.wrapping_add(1);
            }
        }
        if !out.is_empty() {
            cx.actions.push(Action::Send(self.id, out));
        }
        !full.session.is_finished()
    }

    /// Something unasked.
    pub(super) fn spontaneous(&mut self, target: &mut Target, kind: Kind, cx: &mut Context<'_>) -> bool {
        let Phase::Full(full) = &mut self.phase else { return true };
        let rng = cx.faults.rng();
        let none = TargetSn { stat_sn: Serial(0), exp_cmd_sn: Serial(0), max_cmd_sn: Serial(0) };
        let message = |event, parameter2, parameter3| AsyncMessage {
            event,
            vendor_code: 0,
            data_len_bytes: 0,
            lun: Lun::ZERO,
            sn: none,
            parameter1: 0,
            parameter2,
            parameter3,
        };
        match kind {
            Kind::Ping => drop(full.session.send_ping()),
            Kind::AskLogout => {
                let within_s = rng.range(0, 5) as u16;
                let event = rng.pick(&[AsyncEvent::LogoutRequested, AsyncEvent::NegotiationRequested]);
                full.session.send_async(message(event, 0, within_s), Vec::new());
            }
            Kind::TellDropped => {
                let event = rng.pick(&[AsyncEvent::ConnectionDropped, AsyncEvent::SessionDropped]);
                full.session.send_async(message(event, rng.range(0, 3) as u16, 0), Vec::new());
                self.transmit(target, cx);
                return false;
            }
            Kind::Chatter => {
                let event = rng.pick(&[AsyncEvent::Vendor, AsyncEvent::Scsi, AsyncEvent::Other(99)]);
                let mut data = Vec::new();
                if event == AsyncEvent::Scsi {
                    let sense = Sense::new(SenseKey::UnitAttention, asc::CAPACITY_CHANGED).encode_fixed();
                    data.extend_from_slice(&[0, sense.len() as u8]);
                    data.extend_from_slice(&sense);
                }
                full.session.send_async(message(event, 0, 0), data);
            }
            Kind::CloseWindow => full.frozen = Some(full.last_max),
            _ => {}
        }
        true
    }

    /// The window moves again, and the initiator hears of it.
    pub(super) fn open_window(&mut self) {
        if let Phase::Full(full) = &mut self.phase
            && full.frozen.take().is_some()
        {
            full.session.send_ping();
        }
    }
}

/// The header of a command, as far as a Reject shows it.
fn command_header(task: &Task) -> Bhs {
    let mut bhs = Bhs::new(iscsi::pdu::Opcode::ScsiCommand);
    bhs.0[16..20].copy_from_slice(&task.itt.to_be_bytes());
    bhs.0[32..48].copy_from_slice(&task.cdb);
    bhs
}

/// The fault of a command, if it has one.
fn draw(cx: &mut Context<'_>) -> Option<Kind> {
    const KINDS: &[Kind] = &[
        Kind::Busy,
        Kind::TaskAborted,
        Kind::NotReady,
        Kind::AbortedCommand,
        Kind::Slow,
        Kind::Hang,
        Kind::TargetFailure,
        Kind::ShortHonest,
        Kind::DropDataIn,
        Kind::DoubleDataIn,
        Kind::SwapDataIn,
        Kind::WrongDataSn,
        Kind::WrongOffset,
        Kind::WrongResidual,
        Kind::WrongExpDataSn,
        Kind::WrongStatSn,
        Kind::DoubleResponse,
        Kind::WrongTag,
        Kind::WrongR2t,
        Kind::EarlyGood,
        Kind::Reject,
        Kind::Nonsense,
        Kind::WrongWindow,
    ];
    KINDS.iter().copied().find(|&kind| cx.faults.roll(kind, cx.now))
}
