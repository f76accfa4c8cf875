use proptest::prelude::*;

use super::*;
use crate::scsi::lun::Lun;

/// Headers with any content but a known opcode.
fn header_of(opcode: Opcode) -> impl Strategy<Value = Bhs> {
    any::<[u8; BHS_BYTES]>().prop_map(move |mut bytes| {
        bytes[0] = (bytes[0] & 0x40) | opcode as u8;
        Bhs(bytes)
    })
}

/// Encoding what was decoded keeps everything that is not reserved: it decodes to the same, and encodes to a fixed
/// point.
fn stable<P: Pdu + PartialEq + std::fmt::Debug>(bhs: &Bhs) -> Result<(), TestCaseError> {
    if let Ok(pdu) = P::decode(bhs) {
        let encoded = pdu.encode();
        prop_assert_eq!(P::decode(&encoded), Ok(pdu));
        prop_assert_eq!(encoded.opcode(), Some(P::OPCODE));
        prop_assert_eq!(P::decode(&encoded).map(|pdu| pdu.encode()), Ok(encoded));
    }
    Ok(())
}

macro_rules! stable_tests {
    ($($name:ident: $ty:ident,)*) => {
        proptest! {
            $(#[test]
            fn $name(bhs in header_of(<$ty as Pdu>::OPCODE)) {
                stable::<$ty>(&bhs)?;
            })*
        }
    };
}

stable_tests! {
    nop_out: NopOut,
    nop_in: NopIn,
    scsi_command: ScsiCommand,
    scsi_response: ScsiResponse,
    task_management_request: TaskManagementRequest,
    task_management_response: TaskManagementResponse,
    login_request: LoginRequest,
    login_response: LoginResponse,
    text_request: TextRequest,
    text_response: TextResponse,
    data_out: DataOut,
    data_in: DataIn,
    logout_request: LogoutRequest,
    logout_response: LogoutResponse,
    r2t: R2t,
    snack: Snack,
    async_message: AsyncMessage,
    reject: Reject,
}

proptest! {
    #[test]
    fn arbitrary_headers_never_panic(bytes in any::<[u8; BHS_BYTES]>()) {
        let bhs = Bhs(bytes);
        let (initiator, target) = (InitiatorPdu::decode(&bhs), TargetPdu::decode(&bhs));
        prop_assert!(initiator.is_err() || target.is_err());
        if bhs.opcode().is_none() {
            prop_assert_eq!(initiator, Err(PduError::UnknownOpcode(bhs.opcode_bits())));
            prop_assert_eq!(target, Err(PduError::UnknownOpcode(bhs.opcode_bits())));
        }
    }

    #[test]
    fn dispatch_finds_the_right_pdu(opcode in prop::sample::select(&Opcode::ALL[..]), bytes in any::<[u8; BHS_BYTES]>()) {
        let mut bhs = Bhs(bytes);
        bhs.0[0] = opcode as u8;
        let other_side = if opcode.is_from_initiator() {
            TargetPdu::decode(&bhs).map(|pdu| pdu.encode())
        } else {
            InitiatorPdu::decode(&bhs).map(|pdu| pdu.encode())
        };
        let refused = matches!(other_side, Err(PduError::UnexpectedOpcode { .. }));
        prop_assert!(refused);
        let own_side = if opcode.is_from_initiator() {
            InitiatorPdu::decode(&bhs).map(|pdu| pdu.encode())
        } else {
            TargetPdu::decode(&bhs).map(|pdu| pdu.encode())
        };
        match own_side {
            Ok(encoded) => prop_assert_eq!(encoded.opcode(), Some(opcode)),
            Err(error) => {
                let of_this_pdu = matches!(error, PduError::Format { pdu, .. } if pdu == opcode);
                prop_assert!(of_this_pdu);
            }
        }
    }
}

/// Bytes from hex, blanks ignored.
fn hex(text: &str) -> Bhs {
    let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let mut bytes = [0; BHS_BYTES];
    assert_eq!(digits.len(), BHS_BYTES * 2);
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    }
    Bhs(bytes)
}

const LUN_300: Lun = Lun([0x41, 0x2C, 0, 0, 0, 0, 0, 0]);

const SN: TargetSn = TargetSn {
    stat_sn: Serial(0x0101_0101),
    exp_cmd_sn: Serial(0x0202_0202),
    max_cmd_sn: Serial(0x0303_0303),
};

/// Layouts written out by hand from the figures of RFC 7143 chapter 11.
#[test]
fn layouts() {
    let command = ScsiCommand {
        immediate: false,
        final_bit: true,
        read: true,
        write: false,
        attribute: TaskAttribute::Simple,
        ahs_len_bytes: 8,
        data_len_bytes: 0,
        lun: LUN_300,
        itt: Itt(0x1122_3344),
        expected_len_bytes: 0x1000,
        cmd_sn: Serial(5),
        exp_stat_sn: Serial(6),
        cdb: [0x28, 0, 0, 0, 0, 9, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0],
    };
    let bhs = hex(
        "01c10000 02000000 412c0000 00000000 11223344 00001000 00000005 00000006 28000000 00090000 08000000 00000000",
    );
    assert_eq!(command.encode(), bhs);
    assert_eq!(ScsiCommand::decode(&bhs), Ok(command));

    let response = ScsiResponse {
        response: ScsiResponseCode::Completed,
        status: 2,
        residual: Residual::Underflow(0x200),
        bidi_residual: Residual::Overflow(3),
        data_len_bytes: 20,
        itt: Itt(7),
        snack_tag: 0,
        sn: SN,
        exp_data_sn: Serial(4),
    };
    let bhs = hex(
        "21920002 00000014 00000000 00000000 00000007 00000000 01010101 02020202 03030303 00000004 00000003 00000200",
    );
    assert_eq!(response.encode(), bhs);
    assert_eq!(ScsiResponse::decode(&bhs), Ok(response));

    let data_in = DataIn {
        final_bit: true,
        ack: false,
        status: Some(DataInStatus {
            status: 0,
            residual: Residual::Overflow(16),
            stat_sn: Serial(0x0101_0101),
        }),
        data_len_bytes: 0x01_0203,
        lun: Lun::ZERO,
        itt: Itt(7),
        ttt: Ttt::NONE,
        exp_cmd_sn: Serial(0x0202_0202),
        max_cmd_sn: Serial(0x0303_0303),
        data_sn: Serial(2),
        offset_bytes: 0x2000,
    };
    let bhs = hex(
        "25850000 00010203 00000000 00000000 00000007 ffffffff 01010101 02020202 03030303 00000002 00002000 00000010",
    );
    assert_eq!(data_in.encode(), bhs);
    assert_eq!(DataIn::decode(&bhs), Ok(data_in));

    let r2t = R2t {
        lun: LUN_300,
        itt: Itt(7),
        ttt: Ttt(8),
        sn: SN,
        r2t_sn: Serial(1),
        offset_bytes: 0x4000,
        desired_len_bytes: 0x8000,
    };
    let bhs = hex(
        "31800000 00000000 412c0000 00000000 00000007 00000008 01010101 02020202 03030303 00000001 00004000 00008000",
    );
    assert_eq!(r2t.encode(), bhs);
    assert_eq!(R2t::decode(&bhs), Ok(r2t));

    let data_out = DataOut {
        final_bit: true,
        data_len_bytes: 512,
        lun: LUN_300,
        itt: Itt(7),
        ttt: Ttt(8),
        exp_stat_sn: Serial(9),
        data_sn: Serial(1),
        offset_bytes: 0x200,
    };
    let bhs = hex(
        "05800000 00000200 412c0000 00000000 00000007 00000008 00000000 00000009 00000000 00000001 00000200 00000000",
    );
    assert_eq!(data_out.encode(), bhs);

    let login = LoginRequest {
        transit: Some(Stage::Operational),
        continues: false,
        stage: Stage::Security,
        version_max: 0,
        version_min: 0,
        data_len_bytes: 100,
        isid: Isid::random([1, 2, 3], 4),
        tsih: 0,
        itt: Itt(1),
        cid: 0x0505,
        cmd_sn: Serial(1),
        exp_stat_sn: Serial(0),
    };
    let bhs = hex(
        "43810000 00000064 80010203 00040000 00000001 05050000 00000001 00000000 00000000 00000000 00000000 00000000",
    );
    assert_eq!(login.encode(), bhs);
    assert_eq!(LoginRequest::decode(&bhs), Ok(login));

    let abort = TaskManagementRequest {
        immediate: true,
        function: TaskFunction::AbortTask,
        lun: LUN_300,
        itt: Itt(9),
        referenced_itt: Itt(7),
        cmd_sn: Serial(2),
        exp_stat_sn: Serial(3),
        ref_cmd_sn: Serial(1),
        exp_data_sn: Serial(0),
    };
    let bhs = hex(
        "42810000 00000000 412c0000 00000000 00000009 00000007 00000002 00000003 00000001 00000000 00000000 00000000",
    );
    assert_eq!(abort.encode(), bhs);

    let event = AsyncMessage {
        event: AsyncEvent::LogoutRequested,
        vendor_code: 0,
        data_len_bytes: 0,
        lun: Lun::ZERO,
        sn: SN,
        parameter1: 1,
        parameter2: 2,
        parameter3: 3,
    };
    let bhs = hex(
        "32800000 00000000 00000000 00000000 ffffffff 00000000 01010101 02020202 03030303 01000001 00020003 00000000",
    );
    assert_eq!(event.encode(), bhs);

    let reject =
        Reject { reason: RejectReason::Protocol, data_len_bytes: 48, sn: SN, data_sn: Serial(0x0404_0404) };
    let bhs = hex(
        "3f800400 00000030 00000000 00000000 ffffffff 00000000 01010101 02020202 03030303 04040404 00000000 00000000",
    );
    assert_eq!(reject.encode(), bhs);
}

#[test]
fn format_errors() {
    let refuse = |bhs: Bhs, part: &str| {
        let error = match bhs.opcode() {
            Some(opcode) if opcode.is_from_initiator() => InitiatorPdu::decode(&bhs).unwrap_err(),
            _ => TargetPdu::decode(&bhs).unwrap_err(),
        };
        assert!(error.to_string().contains(part), "{error} does not contain {part}");
    };
    let mut bhs = Bhs::new(Opcode::ScsiResponse);
    bhs.0[3] = 2;
    refuse(bhs, "without sense data");
    // With another response the status is nothing to look at (11.4.3).
    bhs.0[2] = 1;
    assert!(ScsiResponse::decode(&bhs).is_ok());

    let mut bhs = Bhs::new(Opcode::ScsiResponse);
    bhs.0[1] = 0x86;
    refuse(bhs, "both overflow and underflow");

    refuse(Bhs::new(Opcode::NopIn), "both task tags");

    let mut bhs = Bhs::new(Opcode::NopOut);
    bhs.put_u32(16, Itt::NONE.0);
    refuse(bhs, "not immediate");

    let mut bhs = Bhs::new(Opcode::DataIn);
    bhs.0[1] = 0x01;
    refuse(bhs, "without the final bit");

    let mut bhs = Bhs::new(Opcode::R2t);
    refuse(bhs, "length is 0");
    bhs.put_u32(20, Ttt::NONE.0);
    refuse(bhs, "no target transfer tag");

    let mut bhs = Bhs::new(Opcode::TextRequest);
    bhs.0[1] = 0xC0;
    refuse(bhs, "final and continue");

    for (flags, part) in [
        (0xC1, "transit and continue"),
        (0x08, "reserved current stage"),
        (0x82, "reserved next stage"),
        (0x85, "not later"),
        (0x0C, "full-feature"),
    ] {
        let mut bhs = Bhs::new(Opcode::LoginRequest);
        bhs.0[1] = flags;
        refuse(bhs, part);
        let mut bhs = Bhs::new(Opcode::LoginResponse);
        bhs.0[1] = flags;
        refuse(bhs, part);
        bhs.0[36] = 2;
        assert!(LoginResponse::decode(&bhs).is_ok(), "an error's stages do not matter");
    }
    assert_eq!(InitiatorPdu::decode(&Bhs([0x1C; 48])), Err(PduError::UnknownOpcode(0x1C)));
}
