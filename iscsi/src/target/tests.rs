use proptest::prelude::*;

use super::*;
use crate::pdu::{
    Bhs, DataIn, DataOut, Itt, LogoutReason, LogoutRequest, NopIn, NopOut, Opcode, Pdu, R2t, Reject,
    RejectReason, Residual, ScsiCommand, ScsiResponse, TaskFunction, TaskManagementRequest,
    TaskManagementResponse, TaskResponseCode, Ttt,
};
use crate::scsi::lun::Lun;
use crate::scsi::{Sense, Status, sense::asc};
use crate::serial::Serial;

const FIRST_CMD_SN: u32 = 0xFFFF_FFFE;

fn config() -> Config {
    Config {
        queue_depth: 4,
        max_recv_segment_bytes: 8192,
        max_send_segment_bytes: 4096,
        max_burst_bytes: 8192,
        first_burst_bytes: 4096,
        initial_r2t: false,
        immediate_data: true,
        max_outstanding_r2t: 2,
        discovery: false,
        exp_cmd_sn: Serial(FIRST_CMD_SN),
        stat_sn: Serial(0xFFFF_FFFF),
        cid: 7,
    }
}

/// The initiator's half, no more than it takes to write PDUs.
struct Initiator {
    cmd_sn: u32,
}

impl Initiator {
    fn new() -> Self {
        Self { cmd_sn: FIRST_CMD_SN }
    }

    fn command(&mut self, itt: u32, write: bool, edtl: u32, immediate_len: u32, last: bool) -> Bhs {
        let cmd_sn = Serial(self.cmd_sn);
        self.cmd_sn = self.cmd_sn.wrapping_add(1);
        ScsiCommand {
            immediate: false,
            final_bit: last,
            read: !write && edtl > 0,
            write,
            attribute: Default::default(),
            ahs_len_bytes: 0,
            data_len_bytes: immediate_len,
            lun: Lun::ZERO,
            itt: Itt(itt),
            expected_len_bytes: edtl,
            cmd_sn,
            exp_stat_sn: Serial(0),
            cdb: [0; 16],
        }
        .encode()
    }
}

fn data_out(itt: u32, ttt: Ttt, data_sn: u32, offset: u32, len: u32, last: bool) -> Bhs {
    DataOut {
        final_bit: last,
        data_len_bytes: len,
        lun: Lun::ZERO,
        itt: Itt(itt),
        ttt,
        exp_stat_sn: Serial(0),
        data_sn: Serial(data_sn),
        offset_bytes: offset,
    }
    .encode()
}

fn started(session: &mut Session, bhs: &Bhs) -> TaskId {
    match session.receive(bhs, &[], true) {
        Ok(Event::Command(task)) => task,
        other => panic!("{other:?}"),
    }
}

fn good(device_len: u32) -> Completion<'static> {
    Completion { status: Status::GOOD, device_len, sense: &[] }
}

fn next<P: Pdu>(session: &mut Session) -> P {
    let outgoing = session.poll_transmit().expect("a PDU to send");
    P::decode(&outgoing.header).expect("a PDU of this kind")
}

fn sense_of(session: &mut Session) -> (ScsiResponse, Sense) {
    let outgoing = session.poll_transmit().expect("a response");
    let OutgoingData::Sense { bytes, len } = outgoing.data else { panic!("no sense data") };
    let response = ScsiResponse::decode(&outgoing.header).unwrap();
    assert_eq!(response.data_len_bytes, u32::from(len));
    (response, Sense::parse(&bytes[2..usize::from(len)]).unwrap())
}

#[test]
fn read_is_cut_into_segments_and_ends_with_the_status() {
    let mut session = Session::new(config());
    let task = started(&mut session, &Initiator::new().command(5, false, 12_000, 0, true));
    session.complete(task, good(10_000));
    let mut got = Vec::new();
    while let Some(outgoing) = session.poll_transmit() {
        let pdu = DataIn::decode(&outgoing.header).unwrap();
        assert!(
            matches!(outgoing.data, OutgoingData::Task { offset, len, .. } if (offset, len) == (pdu.offset_bytes, pdu.data_len_bytes))
        );
        got.push((pdu.offset_bytes, pdu.data_len_bytes, pdu.final_bit, pdu.data_sn.0));
        if let Some(status) = pdu.status {
            assert_eq!(status.residual, Residual::Underflow(2000));
            assert_eq!(status.stat_sn, Serial(0xFFFF_FFFF));
            // The slot is free again: the window is as wide as at the start, one further on.
            assert_eq!(pdu.max_cmd_sn, Serial(FIRST_CMD_SN).add(4));
        }
    }
    // A burst ends at 8192 with F.
    assert_eq!(got, [(0, 4096, false, 0), (4096, 4096, true, 1), (8192, 1808, true, 2)]);
}

#[test]
fn what_the_initiator_did_not_ask_for_is_a_residual() {
    let mut session = Session::new(config());
    let task = started(&mut session, &Initiator::new().command(5, false, 100, 0, true));
    session.complete(task, good(512));
    let pdu: DataIn = next(&mut session);
    assert_eq!((pdu.data_len_bytes, pdu.status.unwrap().residual), (100, Residual::Overflow(412)));
    // Without any room there is no Data-In at all.
    let mut initiator = Initiator { cmd_sn: FIRST_CMD_SN.wrapping_add(1) };
    let task = started(&mut session, &initiator.command(6, false, 0, 0, true));
    session.complete(task, good(512));
    assert_eq!(next::<ScsiResponse>(&mut session).residual, Residual::Overflow(512));
}

#[test]
fn commands_outside_the_window_are_ignored_and_gaps_are_fatal() {
    let mut session = Session::new(config());
    for wrong in [FIRST_CMD_SN.wrapping_sub(1), FIRST_CMD_SN.wrapping_add(4)] {
        let bhs = Initiator { cmd_sn: wrong }.command(1, false, 0, 0, true);
        assert_eq!(session.receive(&bhs, &[], true), Ok(Event::Handled));
    }
    assert_eq!(session.counters().outside_window, 2);
    let gap = Initiator { cmd_sn: FIRST_CMD_SN.wrapping_add(1) }.command(1, false, 0, 0, true);
    assert!(matches!(session.receive(&gap, &[], true), Err(SessionError::CmdSnGap { .. })));
}

#[test]
fn the_window_closes_when_all_slots_are_taken() {
    let mut session = Session::new(config());
    let mut initiator = Initiator::new();
    for itt in 0..4 {
        started(&mut session, &initiator.command(itt, true, 512, 0, true));
    }
    assert_eq!(session.max_cmd_sn(), session.exp_cmd_sn.sub(1));
    let bhs = initiator.command(9, true, 512, 0, true);
    assert_eq!(session.receive(&bhs, &[], true), Ok(Event::Handled));
    assert_eq!(session.counters().outside_window, 1);
}

#[test]
fn duplicate_tags_are_rejected() {
    let mut session = Session::new(config());
    let mut initiator = Initiator::new();
    started(&mut session, &initiator.command(1, true, 512, 0, true));
    let bhs = initiator.command(1, true, 512, 0, true);
    assert_eq!(session.receive(&bhs, &[], true), Ok(Event::Handled));
    assert_eq!(next::<Reject>(&mut session).reason, RejectReason::TaskInProgress);
}

#[test]
fn status_waits_for_unsolicited_data() {
    let mut session = Session::new(config());
    let task = started(&mut session, &Initiator::new().command(1, true, 4096, 1024, false));
    session.complete(task, Completion::status(Status::RESERVATION_CONFLICT));
    assert!(session.poll_transmit().is_none());
    assert_eq!(session.receive(&data_out(1, Ttt::NONE, 0, 1024, 1024, false), &[], true), Ok(Event::Handled));
    assert!(session.poll_transmit().is_none());
    assert_eq!(session.receive(&data_out(1, Ttt::NONE, 1, 2048, 2048, true), &[], true), Ok(Event::Handled));
    assert_eq!(next::<ScsiResponse>(&mut session).status, Status::RESERVATION_CONFLICT.0);
}

#[test]
fn broken_data_sequences_fail_the_task() {
    type Case = (u32, u32, u32, bool, bool, u16);
    // DataSN, offset, length, F, digest right, sense code; the R2T asks for 0..8192.
    let cases: [Case; 7] = [
        (1, 0, 8192, true, true, asc::INCORRECT_AMOUNT_OF_DATA),
        (0, 512, 7680, true, true, asc::INCORRECT_AMOUNT_OF_DATA),
        (0, 0, 8193, true, true, asc::INCORRECT_AMOUNT_OF_DATA),
        (0, 0, 4096, true, true, asc::INCORRECT_AMOUNT_OF_DATA),
        (0, u32::MAX, 8192, true, true, asc::INCORRECT_AMOUNT_OF_DATA),
        (u32::MAX, 0, 8192, true, true, asc::INCORRECT_AMOUNT_OF_DATA),
        (0, 0, 8192, true, false, asc::PROTOCOL_SERVICE_CRC),
    ];
    for (data_sn, offset, len, last, digest_ok, code) in cases {
        let mut session = Session::new(Config { max_recv_segment_bytes: 16384, ..config() });
        let task = started(&mut session, &Initiator::new().command(1, true, 8192, 0, true));
        assert_eq!(session.accept_data(task, 8192), Accepted { immediate_len: 0, complete: false });
        let r2t: R2t = next(&mut session);
        let event = session.receive(&data_out(1, r2t.ttt, data_sn, offset, len, last), &[], digest_ok);
        assert_eq!(event, Ok(Event::Handled));
        if !digest_ok {
            assert_eq!(next::<Reject>(&mut session).reason, RejectReason::DataDigest);
        }
        let (response, sense) = sense_of(&mut session);
        assert_eq!((response.status, sense.code), (Status::CHECK_CONDITION.0, code));
        assert_eq!(response.residual, Residual::Underflow(8192));
    }
}

#[test]
fn unsolicited_data_that_was_not_agreed_fails_the_task() {
    let limits = [
        (Config { immediate_data: false, ..config() }, 512, true, asc::UNEXPECTED_UNSOLICITED_DATA),
        (Config { initial_r2t: true, ..config() }, 0, false, asc::UNEXPECTED_UNSOLICITED_DATA),
        (config(), 4097, true, asc::INCORRECT_AMOUNT_OF_DATA),
    ];
    for (config, immediate_len, last, code) in limits {
        let mut session = Session::new(config);
        let bhs = Initiator::new().command(1, true, 8192, immediate_len, last);
        assert_eq!(session.receive(&bhs, &[], true), Ok(Event::Handled));
        if !last {
            assert!(session.poll_transmit().is_none());
            session.receive(&data_out(1, Ttt::NONE, 0, 0, 512, true), &[], true).unwrap();
        }
        assert_eq!(sense_of(&mut session).1.code, code);
    }
}

#[test]
fn aborted_tasks_say_nothing_and_their_data_is_dropped() {
    let mut session = Session::new(config());
    let mut initiator = Initiator::new();
    let task = started(&mut session, &initiator.command(1, true, 8192, 0, true));
    session.accept_data(task, 8192);
    let r2t: R2t = next(&mut session);
    let abort = |tag: u32, ref_cmd_sn: u32, cmd_sn: u32| {
        TaskManagementRequest {
            immediate: true,
            function: TaskFunction::AbortTask,
            lun: Lun::ZERO,
            itt: Itt(77),
            referenced_itt: Itt(tag),
            cmd_sn: Serial(cmd_sn),
            exp_stat_sn: Serial(0),
            ref_cmd_sn: Serial(ref_cmd_sn),
            exp_data_sn: Serial(0),
        }
        .encode()
    };
    let now = initiator.cmd_sn;
    assert_eq!(session.receive(&abort(1, FIRST_CMD_SN, now), &[], true), Ok(Event::Aborted(task)));
    assert_eq!(next::<TaskManagementResponse>(&mut session).response, TaskResponseCode::Complete);
    session.receive(&data_out(1, r2t.ttt, 0, 0, 8192, true), &[], true).unwrap();
    assert_eq!(session.counters().data_discarded, 1);
    assert!(session.poll_transmit().is_none());
    // A new task in the same slot does not take the old one's data.
    let again = started(&mut session, &initiator.command(1, true, 8192, 0, true));
    assert_eq!(again.slot(), task.slot());
    assert_ne!(again, task);
    session.accept_data(again, 8192);
    session.receive(&data_out(1, r2t.ttt, 0, 0, 8192, true), &[], true).unwrap();
    assert_eq!(session.counters().data_discarded, 2);
    // Unknown: gone, unless its CmdSN has not come yet.
    session.receive(&abort(9, FIRST_CMD_SN, initiator.cmd_sn), &[], true).unwrap();
    session.receive(&abort(9, initiator.cmd_sn, initiator.cmd_sn.wrapping_add(1)), &[], true).unwrap();
    assert_eq!(next::<TaskManagementResponse>(&mut session).response, TaskResponseCode::NoTask);
    assert_eq!(next::<TaskManagementResponse>(&mut session).response, TaskResponseCode::Complete);
}

#[test]
fn pings_both_ways() {
    let mut session = Session::new(config());
    let ping = |itt, ttt, cmd_sn| {
        NopOut {
            immediate: true,
            data_len_bytes: 5,
            lun: Lun::ZERO,
            itt,
            ttt,
            cmd_sn: Serial(cmd_sn),
            exp_stat_sn: Serial(0),
        }
        .encode()
    };
    session.receive(&ping(Itt(3), Ttt::NONE, FIRST_CMD_SN), b"hello", true).unwrap();
    let outgoing = session.poll_transmit().unwrap();
    assert!(matches!(outgoing.data, OutgoingData::Bytes(data) if data == b"hello"));
    assert_eq!(NopIn::decode(&outgoing.header).unwrap().sn.stat_sn, Serial(0xFFFF_FFFF));

    assert!(session.send_ping() && !session.send_ping());
    let ours: NopIn = next(&mut session);
    assert!(ours.itt.is_none() && !ours.ttt.is_none());
    // It names the next StatSN without taking it.
    assert_eq!(ours.sn.stat_sn, Serial(0));
    session.receive(&ping(Itt::NONE, ours.ttt, FIRST_CMD_SN), &[], true).unwrap();
    assert!(!session.ping_outstanding() && session.poll_transmit().is_none());
}

#[test]
fn a_flood_of_pings_meets_a_bound() {
    let mut session = Session::new(config());
    let ping = NopOut {
        immediate: true,
        data_len_bytes: 8192,
        lun: Lun::ZERO,
        itt: Itt(3),
        ttt: Ttt::NONE,
        cmd_sn: Serial(FIRST_CMD_SN),
        exp_stat_sn: Serial(0),
    }
    .encode();
    let mut taken = 0;
    while session.can_receive() && taken < 10_000 {
        session.receive(&ping, &[0; 8192], true).unwrap();
        taken += 1;
    }
    assert!(taken < 1000);
    while session.poll_transmit().is_some() {}
    assert!(session.can_receive());
}

#[test]
fn logout_goes_out_last() {
    let mut session = Session::new(config());
    let mut initiator = Initiator::new();
    let task = started(&mut session, &initiator.command(1, false, 512, 0, true));
    session.complete(task, good(512));
    let logout = LogoutRequest {
        immediate: true,
        reason: LogoutReason::CloseSession,
        itt: Itt(2),
        cid: 0,
        cmd_sn: Serial(initiator.cmd_sn),
        exp_stat_sn: Serial(0),
    };
    assert_eq!(session.receive(&logout.encode(), &[], true), Ok(Event::Logout));
    assert!(!session.can_receive());
    assert_eq!(session.poll_transmit().unwrap().header.opcode(), Some(Opcode::DataIn));
    assert!(!session.is_finished());
    assert_eq!(session.poll_transmit().unwrap().header.opcode(), Some(Opcode::LogoutResponse));
    assert!(session.is_finished() && session.poll_transmit().is_none());
}

#[test]
fn discovery_sessions_take_no_commands() {
    let mut session = Session::new(Config { discovery: true, ..config() });
    session.receive(&Initiator::new().command(1, false, 512, 0, true), &[], true).unwrap();
    assert_eq!(next::<Reject>(&mut session).reason, RejectReason::Protocol);
}

proptest! {
    /// A well-behaved initiator, whatever was negotiated and however it cuts its data: every byte that the device
    /// takes is placed once and in order, the command is carried out once, the residual is right.
    #[test]
    fn writes_arrive_whole(
        edtl in 1u32..40_000,
        device_len in 0u32..40_000,
        (initial_r2t, immediate_data) in any::<(bool, bool)>(),
        max_outstanding_r2t in 1u8..5,
        segment in 1u32..8192,
    ) {
        let config = Config { initial_r2t, immediate_data, max_outstanding_r2t, ..config() };
        let mut session = Session::new(config);
        let first_burst = config.first_burst_bytes.min(edtl);
        let immediate = if immediate_data { first_burst.min(segment) } else { 0 };
        let unsolicited = !initial_r2t && immediate < first_burst;
        let task = started(&mut session, &Initiator::new().command(1, true, edtl, immediate, !unsolicited));
        let accepted = session.accept_data(task, device_len);
        let want = device_len.min(edtl);
        let mut placed = accepted.immediate_len;
        let mut runs = u32::from(accepted.complete);
        prop_assert_eq!(placed, immediate.min(want));
        let mut send = |session: &mut Session, ttt, mut from: u32, to: u32| {
            let mut data_sn = 0;
            while from < to {
                let len = segment.min(to - from);
                let bhs = data_out(1, ttt, data_sn, from, len, from + len == to);
                match session.receive(&bhs, &[], true) {
                    Ok(Event::Data(p)) => {
                        assert_eq!((p.task, p.offset.min(want)), (task, placed));
                        placed += p.len;
                        runs += u32::from(p.complete);
                    }
                    other => panic!("{other:?}"),
                }
                from += len;
                data_sn += 1;
            }
        };
        if unsolicited {
            send(&mut session, Ttt::NONE, immediate, first_burst);
        }
        let mut r2ts = std::collections::VecDeque::new();
        loop {
            while let Some(outgoing) = session.poll_transmit() {
                let r2t = R2t::decode(&outgoing.header).unwrap();
                prop_assert!(r2t.desired_len_bytes > 0 && r2t.desired_len_bytes <= config.max_burst_bytes);
                r2ts.push_back(r2t);
            }
            prop_assert!(r2ts.len() <= usize::from(max_outstanding_r2t));
            let Some(r2t) = r2ts.pop_front() else { break };
            send(&mut session, r2t.ttt, r2t.offset_bytes, r2t.offset_bytes + r2t.desired_len_bytes);
        }
        prop_assert_eq!((placed, runs), (want, 1));
        session.complete(task, good(0));
        let residual = next::<ScsiResponse>(&mut session).residual;
        let expected = match device_len.cmp(&edtl) {
            std::cmp::Ordering::Less => Residual::Underflow(edtl - device_len),
            std::cmp::Ordering::Equal => Residual::None,
            std::cmp::Ordering::Greater => Residual::Overflow(device_len - edtl),
        };
        prop_assert_eq!(residual, expected);
        prop_assert_eq!(session.free.len(), session.slots());
    }

    /// A hostile initiator: headers that are nearly right. No panic; what is placed lies inside what was accepted;
    /// the window never goes back; no slot is lost.
    #[test]
    fn hostile_headers(seeds in proptest::collection::vec((0u8..8, any::<[u8; 6]>(), any::<bool>()), 1..200)) {
        let mut session = Session::new(config());
        let mut accepted = vec![0u32; session.slots()];
        let mut max_cmd_sn = session.max_cmd_sn();
        let mut last_ttt = 0;
        for (kind, r, digest_ok) in seeds {
            let small = |at: usize| u32::from(r[at] % 4);
            let sn = session.exp_cmd_sn;
            let mut bhs = match kind {
                0..=2 => {
                    let mut initiator = Initiator { cmd_sn: sn.0 };
                    initiator.command(small(0), r[1] & 1 != 0, u32::from(r[2]) * 100, small(3) * 1024, r[4] & 1 != 0)
                }
                3 => data_out(small(0), Ttt::NONE, small(1), u32::from(r[2]) * 64, u32::from(r[3]) * 32, r[4] & 1 != 0),
                4 => data_out(small(0), Ttt(last_ttt), small(1), u32::from(r[2]) * 64, u32::from(r[3]) * 32, r[4] & 1 != 0),
                5 => TaskManagementRequest {
                    immediate: r[1] & 1 != 0,
                    function: TaskFunction::from_code(r[2] % 10),
                    lun: Lun::ZERO,
                    itt: Itt(99),
                    referenced_itt: Itt(small(0)),
                    cmd_sn: sn,
                    exp_stat_sn: Serial(0),
                    ref_cmd_sn: sn,
                    exp_data_sn: Serial(0),
                }
                .encode(),
                6 => NopOut { immediate: true, data_len_bytes: 0, lun: Lun::ZERO, itt: Itt(small(0)), ttt: Ttt(small(1)), cmd_sn: sn, exp_stat_sn: Serial(0) }.encode(),
                _ => Bhs([r[0]; 48]),
            };
            if r[5] > 200 {
                bhs.0[usize::from(r[5]) % 48] ^= r[0];
            }
            match session.receive(&bhs, &[], digest_ok) {
                Ok(Event::Command(task)) => {
                    // Some device answers.
                    match r[5] % 3 {
                        0 => session.complete(task, good(u32::from(r[2]) * 50)),
                        1 => session.complete(task, Completion { status: Status::CHECK_CONDITION, device_len: 0, sense: &[0x70; 18] }),
                        _ => {
                            accepted[task.slot()] = u32::from(r[2]) * 64;
                            let a = session.accept_data(task, accepted[task.slot()]);
                            prop_assert!(a.immediate_len <= accepted[task.slot()]);
                            if a.complete {
                                session.complete(task, good(0));
                            }
                        }
                    }
                }
                Ok(Event::Data(p)) => {
                    if p.len > 0 {
                        prop_assert!(p.offset + p.len <= accepted[p.task.slot()]);
                    }
                    if p.complete {
                        session.complete(p.task, good(0));
                    }
                }
                Ok(Event::TaskManagement(request)) => {
                    session.abort_tasks(None, |_| {});
                    session.complete_task_management(request.itt, TaskResponseCode::Complete);
                }
                Ok(_) => {}
                Err(_) => break,
            }
            if r[4] & 2 != 0 {
                while let Some(outgoing) = session.poll_transmit() {
                    if let Ok(r2t) = R2t::decode(&outgoing.header) {
                        last_ttt = r2t.ttt.0;
                    }
                }
            }
            prop_assert!(session.max_cmd_sn().is_at_or_after(max_cmd_sn));
            max_cmd_sn = session.max_cmd_sn();
            let busy = usize::from(session.in_window + session.immediate);
            prop_assert_eq!(session.free.len() + busy, session.slots());
            prop_assert!(session.sending.len() <= session.slots());
        }
    }
}

#[test]
fn a_late_end_does_not_reach_the_next_task_of_the_slot() {
    let mut session = Session::new(config());
    let mut initiator = Initiator::new();
    let old = started(&mut session, &initiator.command(1, false, 512, 0, true));
    session.abort_tasks(None, |ended| assert_eq!(ended, old));
    let new = started(&mut session, &initiator.command(2, true, 512, 0, true));
    assert_eq!(new.slot(), old.slot());
    session.complete(old, Completion::status(Status::GOOD));
    assert_eq!(session.accept_data(old, 512), Accepted { immediate_len: 0, complete: false });
    assert!(!session.wants_transmit(), "neither a status nor an R2T for the new task");
    session.complete(new, Completion::status(Status::BUSY));
    let response = ScsiResponse::decode(&session.poll_transmit().unwrap().header).unwrap();
    assert_eq!((response.itt, response.status), (Itt(2), Status::BUSY.0));
}
