//! Answers that belong to no task: pings, text, task management, Reject, Asynchronous Messages.

use std::collections::VecDeque;

use crate::pdu::{
    AsyncMessage, Bhs, Itt, NopIn, Pdu, Reject, TargetSn, TaskManagementResponse, TextResponse, Ttt,
};

/// Answers that may wait; then [`can_receive`](super::Session::can_receive) says no.
const MAX_WAITING: usize = 32;
/// Bytes of their data that may wait.
const MAX_WAITING_BYTES: usize = 1 << 20;

/// One answer; its counters are filled in when it is sent.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    NopIn(NopIn),
    Text(TextResponse),
    TaskManagement(TaskManagementResponse),
    Reject(Reject),
    Async(AsyncMessage),
}

impl Answer {
    /// Whether it takes a StatSN (11.19.2: the target's own ping does not).
    pub(super) fn takes_stat_sn(&self) -> bool {
        !matches!(self, Self::NopIn(nop) if nop.itt.is_none())
    }

    pub(super) fn encode(mut self, sn: TargetSn) -> Bhs {
        match &mut self {
            Self::NopIn(pdu) => pdu.sn = sn,
            Self::Text(pdu) => pdu.sn = sn,
            Self::TaskManagement(pdu) => pdu.sn = sn,
            Self::Reject(pdu) => pdu.sn = sn,
            Self::Async(pdu) => pdu.sn = sn,
        }
        match self {
            Self::NopIn(pdu) => pdu.encode(),
            Self::Text(pdu) => pdu.encode(),
            Self::TaskManagement(pdu) => pdu.encode(),
            Self::Reject(pdu) => {
                let mut bhs = pdu.encode();
                // Reject has all ones where others have a tag (11.17).
                bhs.0[16..20].fill(0xFF);
                bhs
            }
            Self::Async(pdu) => {
                let mut bhs = pdu.encode();
                bhs.0[16..20].fill(0xFF);
                bhs
            }
        }
    }
}

/// Answers in the order in which they go out.
#[derive(Debug, Default)]
pub(super) struct Control {
    waiting: VecDeque<(Answer, Vec<u8>)>,
    waiting_bytes: usize,
}

impl Control {
    pub(super) fn new() -> Self {
        Self { waiting: VecDeque::with_capacity(MAX_WAITING), waiting_bytes: 0 }
    }

    pub(super) fn push(&mut self, answer: Answer, data: Vec<u8>) {
        self.waiting_bytes += data.len();
        self.waiting.push_back((answer, data));
    }

    pub(super) fn pop(&mut self) -> Option<(Answer, Vec<u8>)> {
        let (answer, data) = self.waiting.pop_front()?;
        self.waiting_bytes -= data.len();
        Some((answer, data))
    }

    pub(super) fn has_room(&self) -> bool {
        self.waiting.len() < MAX_WAITING && self.waiting_bytes < MAX_WAITING_BYTES
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

/// A NOP-In from the target: a ping with `ttt`, or without one only the counters.
pub(super) fn own_nop_in(ttt: Ttt) -> NopIn {
    NopIn { data_len_bytes: 0, lun: Default::default(), itt: Itt::NONE, ttt, sn: super::session::NO_SN }
}
