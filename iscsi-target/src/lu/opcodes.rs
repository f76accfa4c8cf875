//! The operation codes that a logical unit supports, with the bits of their CDBs that it looks at
//! (REPORT SUPPORTED OPERATION CODES, SPC-4 6.35).

use iscsi::scsi::opcode as op;

/// ORWRITE(16).
pub(super) const ORWRITE_16: u8 = 0x8B;

/// One supported operation.
#[derive(Debug)]
pub(crate) struct Support {
    pub(crate) opcode: u8,
    /// For operation codes with several meanings.
    pub(crate) service_action: Option<u8>,
    /// CDB usage data: a one for every bit that is evaluated; its length is the CDB's.
    pub(crate) usage: &'static [u8],
}

const fn plain(opcode: u8, usage: &'static [u8]) -> Support {
    Support { opcode, service_action: None, usage }
}

const fn action(opcode: u8, service_action: u8, usage: &'static [u8]) -> Support {
    Support { opcode, service_action: Some(service_action), usage }
}

/// Ordered by operation code.
pub(crate) static SUPPORTED: &[Support] = &[
    plain(op::TEST_UNIT_READY, &[0x00, 0, 0, 0, 0, 0]),
    plain(op::REQUEST_SENSE, &[0x03, 0x01, 0, 0, 0xFF, 0]),
    plain(op::READ_6, &[0x08, 0x1F, 0xFF, 0xFF, 0xFF, 0]),
    plain(op::WRITE_6, &[0x0A, 0x1F, 0xFF, 0xFF, 0xFF, 0]),
    plain(op::INQUIRY, &[0x12, 0x01, 0xFF, 0xFF, 0xFF, 0]),
    plain(op::MODE_SELECT_6, &[0x15, 0x11, 0, 0, 0xFF, 0]),
    plain(op::RESERVE_6, &[0x16, 0, 0, 0, 0, 0]),
    plain(op::RELEASE_6, &[0x17, 0, 0, 0, 0, 0]),
    plain(op::MODE_SENSE_6, &[0x1A, 0x08, 0xFF, 0xFF, 0xFF, 0]),
    plain(op::START_STOP_UNIT, &[0x1B, 0x01, 0, 0, 0xF7, 0]),
    plain(op::PREVENT_ALLOW, &[0x1E, 0, 0, 0, 0x03, 0]),
    plain(op::READ_CAPACITY_10, &[0x25, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0x01, 0]),
    plain(op::READ_10, &[0x28, 0xF8, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0xFF, 0xFF, 0]),
    plain(op::WRITE_10, &[0x2A, 0xF8, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0xFF, 0xFF, 0]),
    plain(op::WRITE_VERIFY_10, &[0x2E, 0xF6, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0xFF, 0xFF, 0]),
    plain(op::VERIFY_10, &[0x2F, 0xF6, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0xFF, 0xFF, 0]),
    plain(op::PREFETCH_10, &[0x34, 0x02, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0xFF, 0xFF, 0]),
    plain(op::SYNCHRONIZE_CACHE_10, &[0x35, 0x02, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0xFF, 0xFF, 0]),
    plain(op::WRITE_SAME_10, &[0x41, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0xFF, 0xFF, 0]),
    plain(op::UNMAP, &[0x42, 0x01, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0]),
    plain(op::MODE_SELECT_10, &[0x55, 0x11, 0, 0, 0, 0, 0, 0xFF, 0xFF, 0]),
    plain(op::MODE_SENSE_10, &[0x5A, 0x18, 0xFF, 0xFF, 0, 0, 0, 0xFF, 0xFF, 0]),
    plain(op::READ_16, &LONG),
    plain(
        op::COMPARE_AND_WRITE,
        &[0x89, 0xF8, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0xFF, 0, 0],
    ),
    plain(op::WRITE_16, &with_opcode(op::WRITE_16, 0xF8)),
    plain(ORWRITE_16, &with_opcode(ORWRITE_16, 0xF8)),
    plain(op::WRITE_VERIFY_16, &with_opcode(op::WRITE_VERIFY_16, 0xF6)),
    plain(op::VERIFY_16, &with_opcode(op::VERIFY_16, 0xF6)),
    plain(op::PREFETCH_16, &with_opcode(op::PREFETCH_16, 0x02)),
    plain(op::SYNCHRONIZE_CACHE_16, &with_opcode(op::SYNCHRONIZE_CACHE_16, 0x02)),
    plain(op::WRITE_SAME_16, &with_opcode(op::WRITE_SAME_16, 0xFF)),
    action(
        op::SERVICE_ACTION_IN_16,
        op::SA_READ_CAPACITY_16,
        &[0x9E, 0x1F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01, 0],
    ),
    action(op::SERVICE_ACTION_IN_16, op::SA_GET_LBA_STATUS, &with_opcode(op::SERVICE_ACTION_IN_16, 0x1F)),
    plain(op::REPORT_LUNS, &[0xA0, 0, 0xFF, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0]),
    action(
        op::MAINTENANCE_IN,
        op::SA_REPORT_TARGET_PORT_GROUPS,
        &[0xA3, 0xFF, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0],
    ),
    action(
        op::MAINTENANCE_IN,
        op::SA_REPORT_SUPPORTED_OPCODES,
        &[0xA3, 0x1F, 0x87, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0],
    ),
    plain(op::READ_12, &[0xA8, 0xF8, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0]),
    plain(op::WRITE_12, &[0xAA, 0xF8, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0]),
    plain(op::WRITE_VERIFY_12, &[0xAE, 0xF6, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0]),
    plain(op::VERIFY_12, &[0xAF, 0xF6, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0]),
];

const LONG: [u8; 16] = with_opcode(op::READ_16, 0xF8);

/// Usage data of a 16-byte CDB with an 8-byte LBA and a 4-byte length.
const fn with_opcode(opcode: u8, flags: u8) -> [u8; 16] {
    [opcode, flags, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0]
}

/// The entry for an operation code (and service action where it has them).
pub(crate) fn find(opcode: u8, service_action: u16) -> Option<&'static Support> {
    SUPPORTED.iter().find(|s| {
        s.opcode == opcode && s.service_action.is_none_or(|action| u16::from(action) == service_action)
    })
}

pub(super) fn is_known(opcode: u8) -> bool {
    SUPPORTED.iter().any(|s| s.opcode == opcode)
}

pub(super) fn has_service_actions(opcode: u8) -> bool {
    SUPPORTED.iter().any(|s| s.opcode == opcode && s.service_action.is_some())
}

/// A command timeouts descriptor without estimates (SPC-4 6.35.4).
const TIMEOUTS: [u8; 12] = [0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// The "all commands" parameter data.
pub(super) fn all(with_timeouts: bool) -> Vec<u8> {
    let mut data = vec![0; 4];
    for support in SUPPORTED {
        // CTDP, SERVACTV.
        let flags = u8::from(with_timeouts) << 1 | u8::from(support.service_action.is_some());
        data.extend_from_slice(&[support.opcode, 0, 0, support.service_action.unwrap_or(0), 0, flags, 0]);
        data.push(support.usage.len() as u8);
        if with_timeouts {
            data.extend_from_slice(&TIMEOUTS);
        }
    }
    let len = (data.len() - 4) as u32;
    data[..4].copy_from_slice(&len.to_be_bytes());
    data
}

/// The "one command" parameter data.
pub(super) fn one(support: Option<&Support>, with_timeouts: bool) -> Vec<u8> {
    let Some(support) = support else {
        // SUPPORT 001b: not supported.
        return vec![0, 1, 0, 0];
    };
    // SUPPORT 011b: as the standard says.
    let mut data = vec![0, u8::from(with_timeouts) << 7 | 3, 0, support.usage.len() as u8];
    data.extend_from_slice(support.usage);
    if let (Some(action), Some(byte)) = (support.service_action, data.get_mut(5)) {
        // The service action stands in its field instead of a mask.
        *byte = *byte & 0xE0 | action;
    }
    if with_timeouts {
        data.extend_from_slice(&TIMEOUTS);
    }
    data
}
