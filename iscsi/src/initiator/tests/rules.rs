//! Rules of RFC 7143, each by PDUs that keep or break it.

use super::*;
use crate::initiator::Violation;
use crate::pdu::{AsyncEvent, AsyncMessage, Opcode, Reject, RejectReason};
use crate::scsi::SenseKey;
use crate::scsi::sense::asc;

fn violation(result: Result<Place, SessionError>) -> Violation {
    match result {
        Err(SessionError::Violation { violation, .. }) => violation,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_read_in_several_pieces_with_status_in_the_last() {
    let mut bench = Bench::new();
    let command = bench.start(3, read(16384));
    assert!(command.final_bit && command.read && !command.write);
    assert_eq!(command.lun.0, [0x41, 0x2C, 0, 0, 0, 0, 0, 0], "defect H: flat addressing above 255");
    let place = bench.data_in(command.itt, 0, 0, 8192, End::More).unwrap();
    assert_eq!(place, Place::Task { slot: 3, offset_bytes: 0, len_bytes: 8192 });
    // Zero-length Data-In is legal (11.7.7).
    assert_eq!(bench.data_in(command.itt, 1, 8192, 0, End::More).unwrap(), Place::None);
    let place = bench.data_in(command.itt, 2, 8192, 8192, End::Good(Residual::None)).unwrap();
    assert_eq!(place, Place::Task { slot: 3, offset_bytes: 8192, len_bytes: 8192 });
    assert_eq!(bench.outcome(), Some((3, status_good(16384))));
    assert!(bench.session.is_free(3));
    assert_eq!(bench.session.counters().seen().count(), 0);
}

#[test]
fn defect_a_a_response_code_overrides_status_good() {
    let mut bench = Bench::new();
    let command = bench.start(0, write(4096));
    let pdu = ScsiResponse { response: ScsiResponseCode::TargetFailure, ..bench.response_pdu(command.itt) };
    bench.take(&pdu.encode(), &[]).unwrap();
    assert_eq!(bench.outcome(), Some((0, Outcome::TargetFailure { response: 1 })));
}

#[test]
fn defect_b_a_read_with_an_honest_residual_is_not_a_full_read() {
    let mut bench = Bench::new();
    let command = bench.start(0, read(4096));
    bench.data_in(command.itt, 0, 0, 2048, End::Good(Residual::Underflow(2048))).unwrap();
    assert_eq!(bench.outcome(), Some((0, Outcome::Damaged(Violation::ShortData))));
    // The same for a command whose answer may be short is an answer.
    let command = bench.start(0, Command { exact: false, ..read(4096) });
    bench.data_in(command.itt, 0, 0, 2048, End::Good(Residual::Underflow(2048))).unwrap();
    assert_eq!(bench.outcome(), Some((0, status_good(2048))));
}

#[test]
fn defect_c_missing_bytes_without_a_residual() {
    let mut bench = Bench::new();
    let command = bench.start(0, read(4096));
    bench.data_in(command.itt, 0, 0, 2048, End::Burst).unwrap();
    bench.good(command.itt).unwrap();
    assert_eq!(bench.outcome(), Some((0, Outcome::Damaged(Violation::ShortData))));
}

#[test]
fn defect_c_a_gap_in_the_data_numbers() {
    let mut bench = Bench::new();
    let command = bench.start(0, read(4096));
    bench.data_in(command.itt, 0, 0, 2048, End::More).unwrap();
    let place = bench.data_in(command.itt, 2, 2048, 2048, End::Good(Residual::None)).unwrap();
    assert_eq!(place, Place::Discard { len_bytes: 2048 });
    assert_eq!(bench.outcome(), Some((0, Outcome::Damaged(Violation::DataSnGap))));
    assert_eq!(bench.session.counters().get(Violation::DataSnGap), 1);
}

#[test]
fn overlapping_and_missing_offsets() {
    for offset in [0, 1024, 3072] {
        let mut bench = Bench::new();
        let command = bench.start(0, read(4096));
        bench.data_in(command.itt, 0, 0, 2048, End::More).unwrap();
        let place = bench.data_in(command.itt, 1, offset, 1024, End::Good(Residual::None)).unwrap();
        assert_eq!(place, Place::Discard { len_bytes: 1024 });
        assert_eq!(bench.outcome(), Some((0, Outcome::Damaged(Violation::DataOffset))));
    }
}

#[test]
fn nothing_is_placed_outside_the_buffer() {
    for (offset, len) in [(4096, 1), (0, 4097), (u32::MAX, 8), (4095, 8)] {
        let mut bench = Bench::new();
        let command = bench.start(0, read(4096));
        let place = bench.data_in(command.itt, 0, offset, len, End::Good(Residual::None)).unwrap();
        assert_eq!(place, Place::Discard { len_bytes: len });
        assert!(matches!(bench.outcome(), Some((0, Outcome::Damaged(_)))));
    }
    // Data for a write has no place at all.
    let mut bench = Bench::new();
    let command = bench.start(0, write(4096));
    let place = bench.data_in(command.itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
    assert_eq!(place, Place::Discard { len_bytes: 512 });
    assert_eq!(bench.outcome(), Some((0, Outcome::Damaged(Violation::WrongDirection))));
}

#[test]
fn a_residual_that_contradicts_the_bytes() {
    let mut bench = Bench::new();
    let command = bench.start(0, Command { exact: false, ..read(4096) });
    bench.data_in(command.itt, 0, 0, 4096, End::Good(Residual::Underflow(1000))).unwrap();
    assert_eq!(bench.outcome(), Some((0, Outcome::Damaged(Violation::Residual))));
    let command = bench.start(0, Command { exact: false, ..read(4096) });
    bench.data_in(command.itt, 0, 0, 4096, End::Good(Residual::Underflow(5000))).unwrap();
    assert_eq!(bench.outcome(), Some((0, Outcome::Damaged(Violation::Residual))));
    // An overflow leaves the expected bytes whole.
    let command = bench.start(0, read(4096));
    bench.data_in(command.itt, 0, 0, 4096, End::Good(Residual::Overflow(100))).unwrap();
    assert_eq!(bench.outcome(), Some((0, status_good(4096))));
}

#[test]
fn the_response_counts_data_pdus() {
    let mut bench = Bench::new();
    let command = bench.start(0, read(4096));
    bench.data_in(command.itt, 0, 0, 4096, End::Burst).unwrap();
    let pdu = ScsiResponse { exp_data_sn: Serial(2), ..bench.response_pdu(command.itt) };
    bench.take(&pdu.encode(), &[]).unwrap();
    assert_eq!(bench.outcome(), Some((0, Outcome::Damaged(Violation::ExpDataSn))));
}

#[test]
fn defect_g_the_a_bit_is_ignored_at_level_0() {
    let mut bench = Bench::new();
    let command = bench.start(0, read(4096));
    let pdu = bench.data_in_pdu(command.itt, 0, 0, 4096, End::Burst);
    bench.take(&DataIn { ack: true, ttt: Ttt(5), ..pdu }.encode(), &[]).unwrap();
    bench.good(command.itt).unwrap();
    assert_eq!(bench.outcome(), Some((0, status_good(4096))));
    assert!(bench.sent().is_empty());
}

#[test]
fn unknown_and_stale_tags_are_violations() {
    let mut bench = Bench::new();
    let command = bench.start(0, read(512));
    for itt in [Itt(command.itt.0 ^ 1), Itt(command.itt.0 ^ 0x1_0000), Itt(0xFFF0), Itt::NONE] {
        assert_eq!(violation(bench.data_in(itt, 0, 0, 512, End::Burst)), Violation::UnknownTask);
    }
    bench.data_in(command.itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
    assert!(bench.outcome().is_some());
    // The tag of a task that ended is not that of the next one in the slot.
    let next = bench.start(0, read(512));
    assert_ne!(next.itt, command.itt);
    assert_eq!(violation(bench.good(command.itt)), Violation::UnknownTask);
}

#[test]
fn tags_never_take_the_reserved_value_and_differ_for_a_long_time() {
    let mut bench = Bench::new();
    let mut before = std::collections::HashSet::new();
    for _ in 0..0x10000 {
        let command = bench.start(31, read(512));
        assert!(!command.itt.is_none());
        assert!(before.insert(command.itt.0));
        bench.data_in(command.itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
        assert!(bench.outcome().is_some());
    }
}

#[test]
fn command_numbers_wrap_and_stay_in_the_window() {
    let mut bench = Bench::with(Config { max_cmd_sn: Serial(FIRST_CMD_SN).add(3), ..config() });
    for slot in 0..32 {
        bench.submit(slot, read(512));
    }
    let mut expected = Serial(FIRST_CMD_SN);
    let mut answered = 0;
    while answered < 32 {
        let mut itts = Vec::new();
        while let Some(tx) = bench.session.next_pdu(bench.now) {
            let command = ScsiCommand::decode(&Bhs(tx.header().try_into().unwrap())).unwrap();
            assert_eq!(command.cmd_sn, expected.take());
            itts.push(command.itt);
        }
        assert_eq!(itts.len(), 4, "the window is four commands");
        for itt in itts {
            answered += 1;
            bench.exp_cmd_sn = expected;
            bench.max_cmd_sn = expected.add(3);
            bench.data_in(itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
            assert!(matches!(bench.session.next_event(), Some(Event::Done { .. })));
        }
    }
}

#[test]
fn contradictory_windows_are_ignored() {
    let mut bench = Bench::with(Config { max_cmd_sn: Serial(FIRST_CMD_SN), ..config() });
    let first = bench.start(0, read(512));
    bench.submit(1, read(512));
    assert!(bench.sent().is_empty(), "the window is closed");
    // MaxCmdSN < ExpCmdSN - 1: both are ignored (4.2.2.1). A MaxCmdSN that goes back is ignored, too.
    bench.exp_cmd_sn = Serial(FIRST_CMD_SN).add(40);
    bench.max_cmd_sn = Serial(FIRST_CMD_SN).add(38);
    bench.ping(Ttt::NONE, Lun::ZERO).unwrap();
    assert!(bench.sent().is_empty());
    bench.exp_cmd_sn = Serial(FIRST_CMD_SN).add(1);
    bench.max_cmd_sn = Serial(FIRST_CMD_SN).add(1);
    bench.data_in(first.itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
    assert_eq!(bench.session.next_pdu(bench.now).map(|p| p.data), Some(None));
}

#[test]
fn status_numbers_are_acknowledged_and_gaps_end_the_session() {
    let mut bench = Bench::new();
    for n in 0..16 {
        let command = bench.start(0, read(512));
        assert_eq!(command.exp_stat_sn, Serial(FIRST_STAT_SN).add(n));
        bench.data_in(command.itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
        assert!(bench.outcome().is_some());
    }
    let command = bench.start(0, write(512));
    bench.stat_sn = bench.stat_sn.next();
    assert_eq!(violation(bench.good(command.itt)), Violation::StatSnGap);
}

#[test]
fn the_four_cases_of_unsolicited_data() {
    // (InitialR2T, ImmediateData) with FirstBurstLength 8192, 4096 bytes per PDU, 12288 bytes to write.
    for (initial_r2t, immediate_data, expected) in [
        (false, true, vec![(true, 0, 4096, false), (false, 4096, 4096, true)]),
        (false, false, vec![(true, 0, 0, false), (false, 0, 4096, false), (false, 4096, 4096, true)]),
        (true, true, vec![(true, 0, 4096, true)]),
        (true, false, vec![(true, 0, 0, true)]),
    ] {
        let mut bench = Bench::with(Config { initial_r2t, immediate_data, ..config() });
        bench.submit(0, write(12288));
        bench.submit(1, read(512));
        let sent = bench.sent();
        let mut seen = Vec::new();
        let mut itt = Itt::NONE;
        for (n, (pdu, tx)) in sent[..sent.len() - 1].iter().enumerate() {
            let data = tx.data.map_or((0, 0), |d| (d.offset_bytes, d.len_bytes));
            match pdu {
                InitiatorPdu::ScsiCommand(c) => {
                    assert_eq!(c.expected_len_bytes, 12288);
                    itt = c.itt;
                    seen.push((true, data.0, data.1, c.final_bit));
                }
                InitiatorPdu::DataOut(d) => {
                    assert_eq!((d.offset_bytes, d.itt, d.ttt), (data.0, itt, Ttt::NONE));
                    assert_eq!(d.data_sn, Serial(n as u32 - 1));
                    seen.push((false, data.0, data.1, d.final_bit));
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(seen, expected, "InitialR2T={initial_r2t} ImmediateData={immediate_data}");
        // Unsolicited data of a command precedes the next command's (4.2.5.2).
        assert!(matches!(sent[sent.len() - 1].0, InitiatorPdu::ScsiCommand(c) if c.read));
        // The rest by R2T; GOOD without having fetched it is damage.
        bench.good(itt).unwrap();
        assert_eq!(bench.outcome(), Some((0, Outcome::Damaged(Violation::Unfetched))));
    }
}

#[test]
fn a_short_write_is_all_immediate_and_final() {
    let mut bench = Bench::new();
    let command = bench.start(0, write(4096));
    assert!(command.final_bit);
    assert_eq!(command.data_len_bytes, 4096);
    assert!(bench.sent().is_empty());
    bench.good(command.itt).unwrap();
    assert_eq!(bench.outcome(), Some((0, status_good(4096))));
}

#[test]
fn several_r2ts_are_answered_in_order() {
    let mut bench = Bench::with(Config { initial_r2t: true, immediate_data: false, ..config() });
    let command = bench.start(0, write(24576));
    bench.r2t(command.itt, 0, 0, 8192).unwrap();
    bench.r2t(command.itt, 1, 8192, 16384).unwrap();
    let sent = bench.sent();
    let mut offset = 0;
    for (n, (pdu, tx)) in sent.iter().enumerate() {
        let InitiatorPdu::DataOut(d) = pdu else { panic!("{pdu:?}") };
        assert_eq!((d.offset_bytes, d.data_len_bytes), (offset, 4096));
        assert_eq!(tx.data.unwrap().offset_bytes, offset);
        assert_eq!(d.ttt, Ttt(if n < 2 { 0x77 } else { 0x78 }));
        assert_eq!(d.lun, Lun::from_number(300));
        assert_eq!(d.data_sn, Serial(if n < 2 { n as u32 } else { n as u32 - 2 }));
        assert_eq!(d.final_bit, n == 1 || n == 5);
        offset += 4096;
    }
    assert_eq!(offset, 24576);
    bench.good(command.itt).unwrap();
    assert_eq!(bench.outcome(), Some((0, status_good(24576))));
}

#[test]
fn bad_r2ts_end_the_session_before_any_data_is_sent() {
    for (r2t_sn, offset, len, expected) in [
        (0, 0, 16385, Violation::R2tTooLong),
        (0, 24576, 4096, Violation::R2tOutOfBounds),
        (0, 24000, 4096, Violation::R2tOutOfBounds),
        (0, u32::MAX, 2, Violation::R2tOutOfBounds),
        (0, 4096, 4096, Violation::R2tOverlap),
        (1, 0, 4096, Violation::R2tSnGap),
    ] {
        let mut bench = Bench::with(Config { initial_r2t: true, immediate_data: false, ..config() });
        let command = bench.start(0, write(24576));
        let error = bench.r2t(command.itt, r2t_sn, offset, len).unwrap_err();
        assert_eq!(error, SessionError::Violation { violation: expected, slot: Some(0) });
        assert!(bench.sent().is_empty());
    }
    let mut bench = Bench::with(Config { initial_r2t: true, immediate_data: false, ..config() });
    let command = bench.start(0, write(24576));
    bench.r2t(command.itt, 0, 0, 4096).unwrap();
    bench.r2t(command.itt, 1, 4096, 4096).unwrap();
    assert_eq!(violation(bench.r2t(command.itt, 2, 8192, 4096)), Violation::R2tTooMany);
    bench.sent();
    let command = bench.start(1, read(512));
    assert_eq!(violation(bench.r2t(command.itt, 0, 0, 512)), Violation::WrongDirection);
}

#[test]
fn data_for_an_answered_command_is_not_sent() {
    let mut bench = Bench::with(Config { initial_r2t: true, immediate_data: false, ..config() });
    let command = bench.start(0, write(8192));
    bench.r2t(command.itt, 0, 0, 8192).unwrap();
    assert!(bench.next_tx().is_some());
    let sense = Sense::new(SenseKey::DataProtect, asc::WRITE_PROTECTED);
    bench.check_condition(command.itt, sense).unwrap();
    let Some((0, Outcome::Status { status, sense: got, .. })) = bench.outcome() else { panic!() };
    assert_eq!((status, got), (Status::CHECK_CONDITION, Some(sense)));
    assert!(bench.sent().is_empty());
}

#[test]
fn sense_longer_than_its_segment_and_a_check_condition_without() {
    let mut bench = Bench::new();
    let command = bench.start(0, read(512));
    let pdu = ScsiResponse { status: 2, data_len_bytes: 4, ..bench.response_pdu(command.itt) };
    assert_eq!(violation(bench.take(&pdu.encode(), &[0, 3, 0x70, 0])), Violation::SenseLength);
    let mut bench = Bench::new();
    let command = bench.start(0, read(512));
    let pdu = ScsiResponse { status: 2, ..bench.response_pdu(command.itt) };
    assert!(matches!(bench.take(&pdu.encode(), &[]), Err(SessionError::Format { slot: Some(0), .. })));
}

#[test]
fn pings_are_answered_with_tag_and_lun_and_do_not_advance() {
    let mut bench = Bench::new();
    let lun = Lun::from_number(7);
    bench.ping(Ttt(9), lun).unwrap();
    bench.ping(Ttt::NONE, lun).unwrap();
    bench.ping(Ttt(10), lun).unwrap();
    let sent = bench.sent();
    assert_eq!(sent.len(), 2);
    for ((pdu, _), ttt) in sent.iter().zip([9, 10]) {
        let InitiatorPdu::NopOut(nop) = pdu else { panic!("{pdu:?}") };
        assert!(nop.immediate);
        assert_eq!((nop.itt, nop.ttt, nop.lun), (Itt::NONE, Ttt(ttt), lun));
        assert_eq!((nop.cmd_sn, nop.exp_stat_sn), (Serial(FIRST_CMD_SN), Serial(FIRST_STAT_SN)));
    }
    for n in 0..64 {
        bench.ping(Ttt(n), lun).unwrap();
    }
    assert_eq!(violation(bench.ping(Ttt(64), lun)), Violation::PingFlood);
}

#[test]
fn what_has_no_place_ends_the_session() {
    for opcode in [Opcode::LoginResponse, Opcode::TextResponse, Opcode::ScsiCommand] {
        let mut bench = Bench::new();
        assert!(bench.take(&Bhs::new(opcode), &[]).is_err(), "{opcode}");
    }
    let mut bench = Bench::new();
    let mut bhs = Bhs([0; 48]);
    bhs.0[0] = 0x3E;
    assert!(matches!(bench.take(&bhs, &[]), Err(SessionError::Format { .. })));
    assert_eq!(bench.session.counters().get(Violation::UnexpectedPdu), 1);
    let mut bench = Bench::new();
    let mut bhs = Bhs::new(Opcode::NopIn);
    bhs.set_data_len(8193);
    assert_eq!(violation(bench.take(&bhs, &[])), Violation::SegmentTooLong);
}

#[test]
fn a_wrong_data_digest_spoils_the_task_not_the_session() {
    let mut bench = Bench::new();
    let command = bench.start(0, read(4096));
    let pdu = bench.data_in_pdu(command.itt, 0, 0, 2048, End::More);
    bench.session.header(&pdu.encode(), bench.now).unwrap();
    bench.session.end(&[], false).unwrap();
    let place = bench.data_in(command.itt, 1, 2048, 2048, End::Good(Residual::None)).unwrap();
    assert_eq!(place, Place::Discard { len_bytes: 2048 });
    assert_eq!(bench.outcome(), Some((0, Outcome::Damaged(Violation::DataDigest))));
    // With any other PDU its status is lost, and so is the session.
    let command = bench.start(0, read(4096));
    let pdu = ScsiResponse { status: 2, data_len_bytes: 20, ..bench.response_pdu(command.itt) };
    bench.session.header(&pdu.encode(), bench.now).unwrap();
    assert!(bench.session.end(&[0; 20], false).is_err());
}

#[test]
fn digests_where_negotiated() {
    let mut bench = Bench::with(Config { header_digest: true, data_digest: true, ..config() });
    bench.submit(0, write(1024));
    bench.submit(1, read(512));
    let write = bench.session.next_pdu(bench.now).unwrap();
    assert_eq!(write.header().len(), 52);
    assert_eq!(write.header()[48..], crate::digest::digest_bytes(&write.header()[..48]));
    assert!(write.data_digest);
    let read = bench.session.next_pdu(bench.now).unwrap();
    assert!(!read.data_digest, "no data, no data digest");
}

#[test]
fn unanswered_commands_come_back_in_command_order() {
    let mut bench = Bench::with(Config { max_cmd_sn: Serial(FIRST_CMD_SN).add(19), ..config() });
    let order: Vec<u16> = (0..24).map(|n| n * 7 % 32).collect();
    for &slot in &order {
        bench.submit(slot, read(512));
    }
    let sent = bench.sent();
    assert!(sent.len() == 20 || sent.len() == 24);
    let InitiatorPdu::ScsiCommand(third) = sent[2].0 else { panic!() };
    bench.data_in(third.itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
    assert_eq!(bench.outcome().unwrap().0, order[2]);
    let mut left = Vec::new();
    bench.session.unanswered(&mut left);
    let expected: Vec<u16> = order.iter().copied().filter(|&s| s != order[2]).collect();
    assert_eq!(left, expected);
}

#[test]
fn asynchronous_messages() {
    let message = |bench: &mut Bench, event, data: &[u8]| {
        let pdu = AsyncMessage {
            event,
            vendor_code: 0,
            data_len_bytes: data.len() as u32,
            lun: Lun::ZERO,
            sn: bench.sn(),
            parameter1: 0,
            parameter2: 3,
            parameter3: 10,
        };
        bench.take(&pdu.encode(), data)
    };
    let mut bench = Bench::new();
    let sense = Sense::new(SenseKey::UnitAttention, asc::CAPACITY_CHANGED);
    let mut data = vec![0, 18];
    data.extend_from_slice(&sense.encode_fixed());
    message(&mut bench, AsyncEvent::Scsi, &data).unwrap();
    assert_eq!(bench.session.next_event(), Some(Event::UnitEvent { lun: Lun::ZERO, sense: Some(sense) }));
    message(&mut bench, AsyncEvent::Vendor, &[1, 2, 3]).unwrap();
    assert_eq!(bench.session.next_event(), None);
    assert_eq!(
        message(&mut bench, AsyncEvent::SessionDropped, &[]),
        Err(SessionError::Dropped { time2wait_s: 3 })
    );

    // A wanted logout lets what is underway end, takes nothing new, and comes.
    let mut bench = Bench::new();
    let command = bench.start(0, read(512));
    message(&mut bench, AsyncEvent::LogoutRequested, &[]).unwrap();
    assert_eq!(bench.session.next_event(), Some(Event::LogoutWanted));
    bench.submit(1, read(512));
    assert!(bench.sent().is_empty());
    bench.data_in(command.itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
    let sent = bench.sent();
    assert!(matches!(sent[..], [(InitiatorPdu::LogoutRequest(_), _)]));
    let mut left = Vec::new();
    bench.session.unanswered(&mut left);
    assert_eq!(left, [1]);
}

#[test]
fn rejects() {
    let reject = |bench: &mut Bench, reason, bhs: &Bhs| {
        let pdu = Reject { reason, data_len_bytes: 48, sn: bench.sn(), data_sn: Serial(0) };
        bench.take(&pdu.encode(), &bhs.0)
    };
    let mut bench = Bench::new();
    bench.submit(0, read(512));
    let tx = bench.session.next_pdu(bench.now).unwrap();
    let bhs = Bhs(tx.header().try_into().unwrap());
    bench.exp_cmd_sn = bench.exp_cmd_sn.next();
    reject(&mut bench, RejectReason::Protocol, &bhs).unwrap();
    assert_eq!(bench.session.next_event(), Some(Event::Rejected { reason: RejectReason::Protocol }));
    assert_eq!(bench.session.counters().get(Violation::Rejected), 1);
    // No answer follows within a second: the task is aborted.
    bench.now += Duration::from_secs(1);
    bench.session.timers(bench.now).unwrap();
    assert!(matches!(bench.sent()[..], [(InitiatorPdu::TaskManagementRequest(_), _)]));
    assert!(reject(&mut bench, RejectReason::WaitingForLogout, &bhs).is_err());
}

/// Checklist line 12 (RFC 7143 7.9): duplicates are discarded, and cost nothing else.
#[test]
fn duplicates_are_discarded() {
    let mut bench = Bench::new();
    let command = bench.start(0, read(4096));
    bench.data_in(command.itt, 0, 0, 2048, End::More).unwrap();
    let place = bench.data_in(command.itt, 0, 0, 2048, End::More).unwrap();
    assert_eq!(place, Place::Discard { len_bytes: 2048 });
    bench.data_in(command.itt, 1, 2048, 2048, End::Good(Residual::None)).unwrap();
    assert_eq!(bench.outcome(), Some((0, status_good(4096))));
    assert_eq!(bench.session.counters().get(Violation::DataSnRepeat), 1);
    // New data under an old number is no duplicate, but it is not believed either.
    let command = bench.start(0, read(4096));
    bench.data_in(command.itt, 0, 0, 2048, End::More).unwrap();
    bench.data_in(command.itt, 0, 2048, 2048, End::Good(Residual::None)).unwrap();
    assert_eq!(bench.outcome(), Some((0, Outcome::Damaged(Violation::ShortData))));

    let mut bench = Bench::with(Config { initial_r2t: true, immediate_data: false, ..config() });
    let command = bench.start(0, write(8192));
    bench.r2t(command.itt, 0, 0, 4096).unwrap();
    bench.r2t(command.itt, 0, 0, 4096).unwrap();
    assert_eq!(bench.sent().len(), 1, "answered once");
    bench.r2t(command.itt, 1, 4096, 4096).unwrap();
    assert_eq!(bench.sent().len(), 1);
    bench.good(command.itt).unwrap();
    assert_eq!(bench.outcome(), Some((0, status_good(8192))));
    assert_eq!(bench.session.counters().get(Violation::R2tSnRepeat), 1);
}
