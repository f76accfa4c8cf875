//! A connection in its full-feature phase: joins the protocol machine to the device.

use std::net::SocketAddr;

use iscsi::discovery::{Answer, FoundTarget, TargetAddress, Wanted};
use iscsi::pdu::framing::Digests;
use iscsi::pdu::{Bhs, RejectReason, TaskFunction, TaskManagementRequest, TaskResponseCode, TextRequest};
use iscsi::scsi::{Lun, Sense, SenseKey, Status, opcode as op, sense::asc};
use iscsi::target::{Completion, Event, OutgoingData, Session, SessionError, TaskId};

use super::out::Batch;
use crate::device::{Attentions, Device, NexusId, UnitIndex};
use crate::lu::{Step, Transfer};
use crate::storage::Extent;

/// Data that waits for the socket, at most (one more command may exceed it): then no further command is taken.
const MAX_WAITING_BYTES: usize = 4 << 20;

/// The portals of the server, as one initiator sees them.
#[derive(Debug)]
pub(super) struct Portals<'a> {
    /// Where they listen, and their groups.
    pub(super) all: &'a [(SocketAddr, u16)],
    /// Our address on the connection at hand.
    pub(super) here: SocketAddr,
}

impl Portals<'_> {
    fn addresses(&self) -> impl Iterator<Item = TargetAddress> {
        self.all.iter().map(|&(addr, group)| {
            // One that listens everywhere is told as the address by which the initiator came.
            let ip = if addr.ip().is_unspecified() { self.here.ip() } else { addr.ip() };
            TargetAddress { host: ip.to_string(), port: addr.port(), portal_group_tag: Some(group) }
        })
    }
}

/// What a PDU asks for that concerns other sessions too.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wider {
    /// Task management beyond this session's own tasks.
    TaskManagement(TaskManagementRequest),
    /// A command changed the mode parameters of a logical unit.
    ModeChanged(UnitIndex),
}

/// A command under way.
#[derive(Debug, Default)]
struct TaskIo {
    unit: Option<UnitIndex>,
    transfer: Option<Transfer>,
    /// Data for the initiator, and how far it has been handed out: extent and byte in it.
    reply: Vec<Extent>,
    next: (usize, usize),
    /// Bytes of it that are still to be handed out.
    waiting: usize,
    staged: Vec<u8>,
    /// Placing data failed: the command ends with this once all data has come.
    error: Option<Sense>,
}

impl TaskIo {
    fn clear(&mut self) {
        self.reply.clear();
        self.next = (0, 0);
        self.waiting = 0;
        // A staging buffer that grew is given back: parameter lists are short.
        self.staged.clear();
        self.staged.shrink_to(4096);
        self.error = None;
        self.transfer = None;
    }

    /// The next `len` bytes of the reply.
    fn take(&mut self, mut len: usize) -> impl Iterator<Item = Extent> + '_ {
        std::iter::from_fn(move || {
            if len == 0 {
                return None;
            }
            let (index, at) = self.next;
            let extent = self.reply.get(index)?;
            let now = len.min(extent.len() - at);
            let piece = extent.slice(at, now);
            self.next = if at + now == extent.len() { (index + 1, 0) } else { (index, at + now) };
            len -= now;
            Some(piece)
        })
    }
}

/// The state of one session.
pub(super) struct FullFeature {
    pub(super) session: Session,
    pub(super) digests: Digests,
    pub(super) nexus: NexusId,
    /// Index of the target; none in a discovery session.
    pub(super) target: Option<usize>,
    pub(super) attentions: Attentions,
    tasks: Vec<TaskIo>,
    waiting_bytes: usize,
    text: Answer,
    /// Close once everything is sent.
    pub(super) closing: bool,
}

impl FullFeature {
    pub(super) fn new(
        session: Session,
        digests: Digests,
        nexus: NexusId,
        target: Option<usize>,
        group: u16,
    ) -> Self {
        let slots = session.slots();
        Self {
            session,
            digests,
            nexus,
            target,
            attentions: Attentions::new(group),
            tasks: std::iter::repeat_with(TaskIo::default).take(slots).collect(),
            waiting_bytes: 0,
            text: Answer::new(),
            closing: false,
        }
    }

    /// Whether another PDU may be taken now.
    pub(super) fn can_receive(&self) -> bool {
        self.waiting_bytes < MAX_WAITING_BYTES && self.session.can_receive() && !self.closing
    }

    /// Takes one PDU.
    pub(super) fn receive(
        &mut self,
        devices: &mut [Device],
        portals: &Portals<'_>,
        bhs: &Bhs,
        data: &[u8],
        digest_ok: bool,
    ) -> Result<Option<Wider>, SessionError> {
        match self.session.receive(bhs, data, digest_ok)? {
            Event::Handled => {}
            Event::Command(task) => {
                if let Some(device) = self.target.and_then(|target| devices.get_mut(target)) {
                    return Ok(self.start(device, task, data));
                }
            }
            Event::Data(placement) => {
                let piece = &data[..data.len().min(placement.len as usize)];
                if let Some(device) = self.target.and_then(|target| devices.get_mut(target)) {
                    self.place(device, placement.task, placement.offset, piece);
                    if placement.complete {
                        return Ok(self.finish(device, placement.task));
                    }
                }
            }
            Event::Aborted(task) => self.forget(task),
            Event::TaskManagement(request) => {
                return Ok(self.task_management(devices, &request).then_some(Wider::TaskManagement(request)));
            }
            Event::Text(request) => self.text(devices, portals, bhs, &request, data),
            Event::Logout => {}
        }
        Ok(None)
    }

    fn start(&mut self, device: &mut Device, task: TaskId, data: &[u8]) -> Option<Wider> {
        let command = self.session.command(task);
        let io = &mut self.tasks[task.slot()];
        io.clear();
        let edtl = if command.write { command.expected_len_bytes } else { 0 };
        let (step, unit) =
            device.start(self.nexus, &mut self.attentions, command.lun, &command.cdb, edtl, &mut io.reply);
        io.unit = unit;
        match step {
            Step::Done(status) => self.session.complete(task, Completion::status(status)),
            Step::In { len } => {
                // The initiator gets no more than it asked for; the rest is a residual.
                io.waiting = if command.read { len.min(command.expected_len_bytes) as usize } else { 0 };
                self.waiting_bytes += io.waiting;
                let completion = Completion { device_len: len, ..Completion::status(Status::GOOD) };
                self.session.complete(task, completion);
            }
            Step::Failed(sense) => self.fail(device, task, &sense),
            Step::Out(transfer) => {
                io.transfer = Some(transfer);
                let accepted = self.session.accept_data(task, transfer.len);
                let immediate = &data[..data.len().min(accepted.immediate_len as usize)];
                self.place(device, task, 0, immediate);
                if accepted.complete {
                    return self.finish(device, task);
                }
            }
        }
        None
    }

    fn place(&mut self, device: &mut Device, task: TaskId, offset: u32, data: &[u8]) {
        let io = &mut self.tasks[task.slot()];
        if let (Some(unit), Some(transfer), None, false) = (io.unit, &io.transfer, io.error, data.is_empty())
        {
            io.error = device.place(unit, transfer, offset, data, &mut io.staged).err();
        }
    }

    /// All data of a command has come.
    fn finish(&mut self, device: &mut Device, task: TaskId) -> Option<Wider> {
        let command = self.session.command(task);
        let io = &mut self.tasks[task.slot()];
        let result = match (io.error, io.unit, &io.transfer) {
            (None, Some(unit), Some(transfer)) => device.finish(unit, &command.cdb, transfer, &io.staged),
            (Some(sense), ..) => Err(sense),
            _ => Err(Sense::new(SenseKey::HardwareError, asc::INTERNAL_TARGET_FAILURE)),
        };
        match result {
            Ok(()) => {
                self.session.complete(task, Completion::status(Status::GOOD));
                let changed = matches!(command.cdb[0], op::MODE_SELECT_6 | op::MODE_SELECT_10);
                io.unit.filter(|_| changed).map(Wider::ModeChanged)
            }
            Err(sense) => {
                self.fail(device, task, &sense);
                None
            }
        }
    }

    fn fail(&mut self, device: &Device, task: TaskId, sense: &Sense) {
        let io = &mut self.tasks[task.slot()];
        io.reply.clear();
        let mut bytes = [0; 32];
        let len = device.encode_sense(io.unit, sense, &mut bytes);
        let status = Status::CHECK_CONDITION;
        self.session.complete(task, Completion { status, device_len: 0, sense: &bytes[..len] });
    }

    /// An aborted task: its data is no longer waited for.
    fn forget(&mut self, task: TaskId) {
        let io = &mut self.tasks[task.slot()];
        self.waiting_bytes -= io.waiting;
        io.clear();
    }

    /// Answers what concerns this session only; `true` if other sessions are concerned.
    fn task_management(&mut self, devices: &[Device], request: &TaskManagementRequest) -> bool {
        let device = self.target.and_then(|target| devices.get(target));
        let whole_target =
            matches!(request.function, TaskFunction::TargetWarmReset | TaskFunction::TargetColdReset);
        if !whole_target && device.is_none_or(|device| device.find(request.lun).is_none()) {
            self.session.complete_task_management(request.itt, TaskResponseCode::NoLun);
            return false;
        }
        if request.function == TaskFunction::AbortTaskSet {
            self.abort(Some(request.lun));
            self.session.complete_task_management(request.itt, TaskResponseCode::Complete);
            return false;
        }
        true
    }

    /// Ends the tasks of a logical unit, or all; returns whether there were any.
    pub(super) fn abort(&mut self, lun: Option<Lun>) -> bool {
        let mut ended = Vec::new();
        self.session.abort_tasks(lun, |task| ended.push(task));
        let any = !ended.is_empty();
        ended.into_iter().for_each(|task| self.forget(task));
        any
    }

    fn text(
        &mut self,
        devices: &[Device],
        portals: &Portals<'_>,
        bhs: &Bhs,
        request: &TextRequest,
        data: &[u8],
    ) {
        let own = self.target;
        let limit_bytes = self.session.config().max_send_segment_bytes;
        let answer = self.text.receive(request, data, limit_bytes, |wanted| {
            let found = devices.iter().enumerate().filter(|(index, device)| match (wanted, own) {
                // A session on a target may ask about that target only (RFC 7143 appendix C).
                (Wanted::All, own) => own.is_none(),
                (Wanted::Current, own) => own == Some(*index),
                (Wanted::Named(name), own) => device.name() == name && own.is_none_or(|own| own == *index),
            });
            let allowed = !matches!((wanted, own), (Wanted::All, Some(_)) | (Wanted::Current, None));
            let addresses: Vec<_> = portals.addresses().collect();
            let found = found.map(|(_, device)| FoundTarget {
                name: device.name().to_owned(),
                addresses: addresses.clone(),
            });
            allowed.then(|| found.collect())
        });
        match answer {
            Ok(answer) => self.session.send_text(request.itt, answer.ttt, answer.continues, answer.data),
            Err(error) => {
                tracing::warn!(%error, "text request refused");
                self.session.reject(bhs, RejectReason::Protocol);
            }
        }
    }

    /// Fills a batch with what is to be sent.
    pub(super) fn transmit(&mut self, batch: &mut Batch) {
        while !batch.is_full()
            && let Some(outgoing) = self.session.poll_transmit()
        {
            let header = &outgoing.header;
            match outgoing.data {
                OutgoingData::None => batch.push(header, &[], self.digests),
                OutgoingData::Bytes(bytes) => batch.push(header, &bytes, self.digests),
                OutgoingData::Sense { bytes, len } => {
                    batch.push(header, &bytes[..usize::from(len)], self.digests);
                }
                OutgoingData::Task { task, len, .. } => {
                    let (io, len) = (&mut self.tasks[task.slot()], len as usize);
                    io.waiting -= len;
                    self.waiting_bytes -= len;
                    batch.push_extents(header, io.take(len), self.digests);
                    if io.waiting == 0 {
                        // Held no longer than needed: a write to a held chunk copies it.
                        io.reply.clear();
                    }
                }
            }
        }
    }
}
