//! A disk in memory behind the [`Engine`] seam: the device model's test double. It ends requests later and out of
//! order, has limits, keeps a log, and fails where it is told to. End-to-end tests use real targets instead.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vcp_core::handover::Fds;
use vcp_core::handover::state::{BadState, NotNow};

use super::engine::{Completion, Engine, Lun, Op, Outcome, Request, Wait};

/// What tests look at and turn while the device runs.
#[derive(Debug, Default)]
pub struct Control {
    pub disk: Vec<u8>,
    /// Operations in the order submitted: what, first block, blocks.
    pub log: Vec<(Op, u64, u32)>,
    /// Nothing ends while set.
    pub held: bool,
    /// Reads and writes that touch this block fail.
    pub bad_block: Option<u64>,
    /// Set by `abandon`.
    pub abandoned: bool,
    /// What is under way when `abandon` is called ends as failed, as that of an engine without a connection does.
    pub drops_abandoned: bool,
    /// The unit's new description.
    pub changed: Option<Lun>,
    pub peak_inflight: usize,
    /// After so many more operations a session is lost.
    pub lose_after: Option<usize>,
    pub losses: u64,
}

#[derive(Debug)]
pub struct MemEngine {
    lun: Lun,
    depth: usize,
    queued: VecDeque<Request>,
    dropped: Vec<Completion>,
    pub control: Arc<Mutex<Control>>,
    /// Readable while requests may end, as a socket would be.
    event: OwnedFd,
}

impl MemEngine {
    pub fn new(lun: Lun, depth: usize) -> Self {
        let disk = vec![0; (lun.blocks * u64::from(lun.block_bytes)) as usize];
        let control = Arc::new(Mutex::new(Control { disk, ..Control::default() }));
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        Self { lun, depth, queued: VecDeque::new(), dropped: Vec::new(), control, event }
    }

    /// Another one on the same disk.
    #[allow(dead_code)] // Not by every test program.
    pub fn sharing(lun: Lun, depth: usize, control: &Arc<Mutex<Control>>) -> Self {
        Self { control: Arc::clone(control), ..Self::new(lun, depth) }
    }

    fn carry_out(&self, control: &mut Control, request: &Request) -> Outcome {
        let block = self.lun.block_bytes as usize;
        let at = request.lba as usize * block;
        let len = request.blocks as usize * block;
        assert!(at + len <= control.disk.len(), "the device model let a request past the end through");
        let moves_data = matches!(request.op, Op::Read | Op::Write { .. });
        assert_eq!(request.data.len_bytes(), if moves_data { len } else { 0 }, "{request:?}");
        let range = request.lba..request.lba + u64::from(request.blocks);
        if control.bad_block.is_some_and(|bad| range.contains(&bad)) {
            return Outcome::IoError;
        }
        match request.op {
            Op::Read => {
                assert!(request.blocks <= self.lun.max_transfer_blocks);
                request.data.copy_from(0, &control.disk[at..at + len]);
            }
            Op::Write { .. } => {
                assert!(request.blocks <= self.lun.max_transfer_blocks);
                request.data.copy_to(0, &mut control.disk[at..at + len]);
            }
            Op::Flush => {}
            Op::Discard => {
                assert!(request.blocks <= self.lun.max_discard_blocks);
                control.disk[at..at + len].fill(0xdd);
            }
            Op::WriteZeroes { .. } => {
                assert!(request.blocks <= self.lun.max_write_zeroes_blocks);
                control.disk[at..at + len].fill(0);
            }
        }
        Outcome::Ok
    }
}

impl Engine for MemEngine {
    fn lun(&self) -> &Lun {
        &self.lun
    }

    fn room(&self) -> usize {
        self.depth - self.queued.len() - self.dropped.len()
    }

    fn submit(&mut self, request: Request) {
        assert!(self.room() > 0, "submitted without room");
        let mut control = self.control.lock().unwrap();
        control.log.push((request.op, request.lba, request.blocks));
        self.queued.push_back(request);
        control.peak_inflight = control.peak_inflight.max(self.queued.len());
    }

    fn poll(&mut self, _now: Instant, done: &mut Vec<Completion>) -> bool {
        let control = Arc::clone(&self.control);
        let mut control = control.lock().unwrap();
        let any_dropped = !self.dropped.is_empty();
        done.append(&mut self.dropped);
        if control.held {
            return any_dropped;
        }
        // The newest first, so that nobody relies on an order; not all at once.
        let before = done.len();
        for _ in 0..3 {
            let Some(request) = self.queued.pop_back() else { break };
            let outcome = self.carry_out(&mut control, &request);
            if let Some(left) = &mut control.lose_after {
                *left -= 1;
                if *left == 0 {
                    control.lose_after = None;
                    control.losses += 1;
                }
            }
            done.push(Completion { tag: request.tag, outcome, data: request.data });
        }
        any_dropped || done.len() != before
    }

    fn wait(&self) -> Wait<'_> {
        let held = self.control.lock().unwrap().held;
        // A held engine is looked at every now and then, as one that waits for its target's answer would be.
        let pause = if held { Duration::from_millis(2) } else { Duration::ZERO };
        let deadline = (!self.queued.is_empty()).then(|| Instant::now() + pause);
        Wait { fd: Some(self.event.as_fd()), writable: false, deadline }
    }

    fn export(&self, _fds: &mut Fds, _now: Instant) -> Result<serde_json::Value, NotNow> {
        match self.queued.len() + self.dropped.len() {
            0 => Ok(serde_json::json!("in memory")),
            some => Err(NotNow::Busy(format!("{some} requests"))),
        }
    }

    fn import(&mut self, state: serde_json::Value, _fds: &mut Fds, _now: Instant) -> Result<(), BadState> {
        if state == "in memory" { Ok(()) } else { Err(BadState::Text(state.to_string())) }
    }

    fn losses(&self) -> u64 {
        self.control.lock().unwrap().losses
    }

    fn take_change(&mut self) -> bool {
        // Taken and put in force at once: the test may change the unit between any two calls of the data thread.
        let Some(lun) = self.control.lock().unwrap().changed.take() else { return false };
        self.lun = lun;
        true
    }

    fn abandon(&mut self) {
        let mut control = self.control.lock().unwrap();
        control.abandoned = true;
        if control.drops_abandoned {
            let failed = |request: Request| Completion {
                tag: request.tag,
                outcome: Outcome::IoError,
                data: request.data,
            };
            self.dropped.extend(self.queued.drain(..).map(failed));
        }
    }
}

/// A unit with awkward limits.
pub fn lun(block_bytes: u32, blocks: u64) -> Lun {
    Lun {
        blocks,
        block_bytes,
        max_transfer_blocks: 7,
        max_discard_blocks: 10,
        discard_granularity: 1,
        max_write_zeroes_blocks: 5,
        write_zeroes_may_unmap: true,
        write_cache: true,
        serial: "MEM0123456789".into(),
        ..Lun::default()
    }
}
