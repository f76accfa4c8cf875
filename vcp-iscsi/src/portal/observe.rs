//! What the port tells of itself: the calls that the data path makes for the flight recorder and the latency split.
//!
//! Times are those of passes: no clock is read here.

use std::time::Instant;

use iscsi::initiator::TxPdu;
use iscsi::pdu::Opcode;

use super::job::{Data, Jobs};
use crate::recorder::{DATA_BYTES, Recorder};

/// Initiator task tag in a header (RFC 7143 11.2.1.8); its lower half is the slot.
const SLOT_AT: usize = 18;

/// A PDU is about to go out.
#[inline]
pub(super) fn observe_sent(recorder: &mut Recorder, pdu: &TxPdu, jobs: &mut Jobs, now: Instant) {
    let header = pdu.header();
    if header[0] & 0x3f == Opcode::ScsiCommand as u8 {
        jobs.sent(u16::from_be_bytes([header[SLOT_AT], header[SLOT_AT + 1]]), now);
    }
    let Some(data) = pdu.data.filter(|_| recorder.keeps_data()) else {
        recorder.sent(header, &[], now);
        return;
    };
    let mut first = [0; DATA_BYTES];
    let len = (data.len_bytes as usize).min(DATA_BYTES);
    let at = data.offset_bytes as usize;
    match jobs.data(data.slot) {
        Data::Guest(guest) => guest.copy_to(at, &mut first[..len]),
        Data::Private(bytes) => {
            first[..len].copy_from_slice(bytes.get(at..at + len).unwrap_or(&[0; DATA_BYTES][..len]));
        }
    }
    recorder.sent(header, &first[..len], now);
}
