//! MODE SENSE and MODE SELECT (SPC-4 6.11, 7.5): read-write error recovery, caching, control, informational
//! exceptions. An initiator can change WCE, SWP and D_SENSE; nothing is saved.

use iscsi::scsi::sense::asc;
use iscsi::scsi::{Sense, Status, opcode as op};

use super::{CdbBytes, LogicalUnit, MAX_STAGED_BYTES, Sink, Step, Transfer, be16, illegal, invalid_field};
use crate::storage::Extent;

/// Mode parameters that can change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ModeState {
    /// Write cache enabled: a write may be answered before it is durable.
    pub(super) wce: bool,
    /// Software write protect.
    pub(super) swp: bool,
    /// Sense data in descriptor format.
    pub(super) d_sense: bool,
}

const RECOVERY: u8 = 0x01;
const CACHING: u8 = iscsi::scsi::mode::CACHING_PAGE;
const CONTROL: u8 = 0x0A;
const EXCEPTIONS: u8 = 0x1C;
const ALL: u8 = iscsi::scsi::mode::ALL_PAGES;
const PAGES: [u8; 4] = [RECOVERY, CACHING, CONTROL, EXCEPTIONS];

const WCE: u8 = 0x04;
const D_SENSE: u8 = 0x04;
const SWP: u8 = 0x08;

/// One page with `state` in it; `bare` leaves all other fields zero (the "changeable values" form).
fn page(code: u8, state: ModeState, bare: bool, out: &mut Vec<u8>) {
    let bits = |set: bool, bit: u8| if set { bit } else { 0 };
    let start = out.len();
    let len = match code {
        CACHING => 20,
        _ => 12,
    };
    out.resize(start + len, 0);
    let page = &mut out[start..];
    page[0] = code;
    page[1] = (len - 2) as u8;
    match code {
        CACHING => page[2] = bits(state.wce, WCE),
        CONTROL => {
            page[2] = bits(state.d_sense, D_SENSE);
            page[4] = bits(state.swp, SWP);
            if !bare {
                page[3] = 0x10; // QUEUE ALGORITHM MODIFIER 1: the initiator orders what must be ordered
                page[8..10].copy_from_slice(&0xFFFFu16.to_be_bytes()); // busy timeout: unlimited
            }
        }
        _ => {}
    }
}

impl LogicalUnit {
    pub(super) fn mode_sense(&mut self, cdb: &CdbBytes, reply: &mut Vec<Extent>) -> Result<Step, Sense> {
        let long = cdb[0] == op::MODE_SENSE_10;
        let no_descriptor = cdb[1] & 0x08 != 0;
        let (control, code, subpage) = (cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]);
        let (state, bare) = match control {
            0 => (self.mode, false),
            1 => (ModeState { wce: true, swp: true, d_sense: true }, true),
            2 => (self.default_mode, false),
            _ => return Err(illegal(asc::SAVING_NOT_SUPPORTED)),
        };
        // No page has subpages; FFh asks for all that there are.
        if subpage != 0 && !(subpage == 0xFF && code == ALL) {
            return Err(invalid_field());
        }
        let mut data = vec![0; if long { 8 } else { 4 }];
        let header_bytes = data.len();
        if !no_descriptor {
            let blocks = u32::try_from(self.blocks).unwrap_or(u32::MAX);
            data.extend_from_slice(&blocks.to_be_bytes());
            data.extend_from_slice(&self.block_bytes.to_be_bytes());
        }
        let descriptor_bytes = data.len() - header_bytes;
        match code {
            ALL => PAGES.iter().for_each(|&code| page(code, state, bare, &mut data)),
            _ if PAGES.contains(&code) => page(code, state, bare, &mut data),
            _ => return Err(invalid_field()),
        }
        // Device-specific parameter: WP, DPOFUA.
        let device = if self.check_writable().is_err() { 0x90 } else { 0x10 };
        if long {
            let len = (data.len() - 2) as u16;
            data[..2].copy_from_slice(&len.to_be_bytes());
            data[3] = device;
            data[7] = descriptor_bytes as u8;
        } else {
            data[0] = (data.len() - 1) as u8;
            data[2] = device;
            data[3] = descriptor_bytes as u8;
        }
        let allocation_bytes = if long { usize::from(be16(cdb, 7)) } else { usize::from(cdb[4]) };
        Ok(self.reply(&data, allocation_bytes, reply))
    }

    pub(super) fn mode_select_start(&mut self, cdb: &CdbBytes, edtl: u32) -> Result<Step, Sense> {
        // PF must say "as the standard", SP cannot be honoured.
        if cdb[1] & 0x11 != 0x10 {
            return Err(invalid_field());
        }
        let len = if cdb[0] == op::MODE_SELECT_10 { u32::from(be16(cdb, 7)) } else { u32::from(cdb[4]) };
        match len {
            0 => Ok(Step::Done(Status::GOOD)),
            _ if edtl < len || len > MAX_STAGED_BYTES => Err(illegal(asc::PARAMETER_LIST_LENGTH)),
            _ => Ok(Step::Out(Transfer { len, sink: Sink::Staged })),
        }
    }

    pub(super) fn mode_select_finish(&mut self, cdb: &CdbBytes, list: &[u8]) -> Result<(), Sense> {
        const LENGTH: Sense = illegal(asc::PARAMETER_LIST_LENGTH);
        const FIELD: Sense = illegal(asc::INVALID_FIELD_IN_PARAMETERS);
        let long = cdb[0] == op::MODE_SELECT_10;
        let header_bytes = if long { 8 } else { 4 };
        if list.len() < header_bytes {
            return Err(LENGTH);
        }
        let descriptor_bytes = if long { usize::from(be16(list, 6)) } else { usize::from(list[3]) };
        let mut rest = list.get(header_bytes + descriptor_bytes..).ok_or(LENGTH)?;
        if !matches!(descriptor_bytes, 0 | 8) {
            return Err(FIELD);
        }
        // The block size cannot be changed here.
        let descriptor = &list[header_bytes..header_bytes + descriptor_bytes];
        if let [_, _, _, _, _, size @ ..] = descriptor
            && size != &self.block_bytes.to_be_bytes()[1..]
        {
            return Err(FIELD);
        }
        let mut new = self.mode;
        while !rest.is_empty() {
            let len = 2 + usize::from(*rest.get(1).ok_or(LENGTH)?);
            let sent = rest.get(..len).ok_or(LENGTH)?;
            let code = sent[0] & 0x3F;
            if !PAGES.contains(&code) || sent[0] & 0x40 != 0 {
                return Err(FIELD);
            }
            // Whatever cannot be changed must stand as it is: compare with the page that the new state would show.
            let mut candidate = new;
            match code {
                CACHING if len > 2 => candidate.wce = sent[2] & WCE != 0,
                CONTROL if len > 4 => {
                    candidate.d_sense = sent[2] & D_SENSE != 0;
                    candidate.swp = sent[4] & SWP != 0;
                }
                _ => {}
            }
            let mut shown = Vec::new();
            page(code, candidate, false, &mut shown);
            if shown.len() != len || shown[1..] != sent[1..] {
                return Err(FIELD);
            }
            new = candidate;
            rest = &rest[len..];
        }
        self.mode = new;
        // With the write cache off nothing may be left in it.
        self.settle(false)
    }
}
