//! A command underway, and the output data that it waits for.

use iscsi::pdu::{DataOut, ScsiCommand, Ttt};
use iscsi::scsi::Lun;

use super::script::Action;

/// An R2T that was sent.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Its tag.
    pub ttt: u32,
    /// Its LUN.
    pub lun: Lun,
    /// Where the next byte belongs.
    pub next: u32,
    /// End of what was asked for.
    pub end: u32,
    /// DataSN expected.
    pub data_sn: u32,
    /// It was sent as it should be: an answer is due, else none may come.
    pub is_sound: bool,
}

/// A command.
#[derive(Clone, Debug)]
pub struct Task {
    /// As it came.
    pub command: ScsiCommand,
    /// What rules say of it.
    pub actions: Vec<Action>,
    /// Output data.
    pub data: Vec<u8>,
    /// Bytes of it that are here, from the start.
    pub have: u32,
    /// Unsolicited Data-Out is still to come; its next DataSN.
    pub unsolicited: Option<u32>,
    /// Bytes asked for, or come unasked.
    pub asked: u32,
    /// R2Ts not answered in full.
    pub asks: Vec<Ask>,
    /// R2Ts so far.
    pub r2ts: u32,
}

impl Task {
    /// A command that just came, with its immediate data.
    pub fn new(command: ScsiCommand, immediate: &[u8], actions: Vec<Action>) -> Self {
        let want = if command.write { command.expected_len_bytes as usize } else { 0 };
        let mut data = vec![0; want];
        let have = immediate.len().min(want);
        data[..have].copy_from_slice(&immediate[..have]);
        let unsolicited = (command.write && !command.final_bit).then_some(0);
        Self {
            command,
            actions,
            data,
            have: have as u32,
            unsolicited,
            asked: have as u32,
            asks: Vec::new(),
            r2ts: 0,
        }
    }

    /// All output data is here.
    pub fn is_whole(&self) -> bool {
        self.have as usize >= self.data.len() && self.unsolicited.is_none()
    }

    /// Takes a Data-Out; what is wrong with it.
    pub fn take(&mut self, pdu: &DataOut, bytes: &[u8], first_burst_bytes: u32) -> Option<String> {
        let len = bytes.len() as u32;
        let end = pdu.offset_bytes.saturating_add(len);
        let wrong = |what: String| Some(format!("Data-Out of task {:#x}: {what}", pdu.itt.0));
        if pdu.ttt == Ttt::NONE {
            let Some(data_sn) = &mut self.unsolicited else {
                return wrong("unsolicited, after a command or Data-Out with F (11.3.1)".into());
            };
            if pdu.data_sn.0 != *data_sn || pdu.offset_bytes != self.have {
                return wrong(format!("DataSN {} at {} (11.7.5)", pdu.data_sn.0, pdu.offset_bytes));
            }
            let most = first_burst_bytes.min(self.data.len() as u32);
            if end > most {
                return wrong(format!("unsolicited data up to {end} of {most} (13.14)"));
            }
            *data_sn += 1;
            if pdu.final_bit {
                self.unsolicited = None;
                if end != most {
                    return wrong(format!("unsolicited data ends at {end} of {most} (11.3.4)"));
                }
            }
            self.asked = self.asked.max(end);
        } else {
            let Some(at) = self.asks.iter().position(|ask| ask.ttt == pdu.ttt.0) else {
                return wrong(format!("tag {:#x} of no R2T (11.7.4)", pdu.ttt.0));
            };
            let ask = &mut self.asks[at];
            if !ask.is_sound {
                return wrong("answers an R2T that breaks the rules (11.8.4)".into());
            }
            if at != 0 {
                return wrong("R2Ts are not answered in order (11.8)".into());
            }
            if pdu.lun != ask.lun {
                return wrong("another LUN than in the R2T (11.7.4)".into());
            }
            if pdu.data_sn.0 != ask.data_sn || pdu.offset_bytes != ask.next {
                return wrong(format!("DataSN {} at {} (11.7.5, 11.7.6)", pdu.data_sn.0, pdu.offset_bytes));
            }
            if end > ask.end || pdu.final_bit != (end == ask.end) {
                return wrong(format!("F={} at {end} of {} (11.7.1)", pdu.final_bit, ask.end));
            }
            ask.data_sn += 1;
            ask.next = end;
            if pdu.final_bit {
                self.asks.remove(0);
            }
        }
        self.data[pdu.offset_bytes as usize..end as usize].copy_from_slice(bytes);
        self.have = self.have.max(end);
        None
    }
}
