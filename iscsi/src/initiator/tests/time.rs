//! Keepalive, time limits and logout on virtual time.

use super::super::FlowStats;
use super::*;
use crate::pdu::{
    LogoutResponse, LogoutResponseCode, TaskFunction, TaskManagementResponse, TaskResponseCode,
};

impl Bench {
    /// Advances to the session's next deadline and runs the timers.
    fn wake(&mut self) -> Result<(), SessionError> {
        let at = self.session.deadline().unwrap();
        assert!(at > self.now, "a deadline in the past is a busy loop");
        self.now = at;
        self.session.timers(self.now)
    }

    fn tmf_answer(&mut self, itt: Itt, response: TaskResponseCode) -> Result<Place, SessionError> {
        let pdu = TaskManagementResponse { response, itt, sn: self.sn() };
        self.take(&pdu.encode(), &[])
    }

    fn tmf(&mut self) -> crate::pdu::TaskManagementRequest {
        match self.next_tx() {
            Some((InitiatorPdu::TaskManagementRequest(pdu), _)) => pdu,
            other => panic!("{other:?}"),
        }
    }

    fn alive(&mut self) {
        self.ping(Ttt::NONE, Lun::ZERO).unwrap();
    }
}

#[test]
fn an_idle_connection_is_probed_and_found_dead() {
    let mut bench = Bench::new();
    let start = bench.now;
    bench.wake().unwrap();
    assert_eq!(bench.now - start, Duration::from_secs(5));
    let Some((InitiatorPdu::NopOut(ping), _)) = bench.next_tx() else { panic!() };
    assert!(ping.immediate && !ping.itt.is_none() && ping.ttt.is_none());
    // Answered: on with it.
    let answer = NopIn { data_len_bytes: 0, lun: Lun::ZERO, itt: ping.itt, ttt: Ttt::NONE, sn: bench.sn() };
    bench.take(&answer.encode(), &[]).unwrap();
    bench.wake().unwrap();
    assert!(matches!(bench.next_tx(), Some((InitiatorPdu::NopOut(p), _)) if p.itt != ping.itt));
    assert_eq!(bench.wake(), Err(SessionError::Silent { timeout: Duration::from_secs(5) }));
    assert_eq!(bench.now - start, Duration::from_secs(15));
    // An answer to a ping that is no longer underway is none.
    assert!(bench.take(&answer.encode(), &[]).is_err());
}

#[test]
fn a_slow_command_is_aborted() {
    let mut bench = Bench::new();
    let command = bench.start(5, read(512));
    bench.now += Duration::from_secs(29);
    bench.alive();
    bench.now += Duration::from_secs(1);
    bench.session.timers(bench.now).unwrap();
    assert_eq!(bench.session.next_event(), Some(Event::Recovering { step: "ABORT TASK", slot: 5 }));
    let tmf = bench.tmf();
    assert_eq!(tmf.function, TaskFunction::AbortTask);
    assert!(tmf.immediate);
    assert_eq!((tmf.referenced_itt, tmf.ref_cmd_sn, tmf.lun), (command.itt, command.cmd_sn, command.lun));
    bench.tmf_answer(tmf.itt, TaskResponseCode::Complete).unwrap();
    assert_eq!(bench.outcome(), Some((5, Outcome::Aborted)));
    assert!(bench.session.is_free(5));
    // The answer of the aborted task is one of an unknown task from now on.
    assert!(bench.good(command.itt).is_err());
}

#[test]
fn an_answer_that_crosses_the_abort_counts() {
    let mut bench = Bench::new();
    let command = bench.start(5, read(512));
    bench.now += Duration::from_secs(30);
    bench.alive();
    bench.session.timers(bench.now).unwrap();
    assert!(bench.session.next_event().is_some());
    let tmf = bench.tmf();
    bench.data_in(command.itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
    assert_eq!(bench.outcome(), Some((5, status_good(512))));
    assert!(matches!(bench.next_tx(), Some((InitiatorPdu::NopOut(_), _))), "the ping that was due as well");
    // The slot lives on under another tag while the answer to the abort is on its way.
    let next = bench.start(5, read(512));
    bench.tmf_answer(tmf.itt, TaskResponseCode::NoTask).unwrap();
    assert_eq!(bench.outcome(), None);
    bench.data_in(next.itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
    assert_eq!(bench.outcome(), Some((5, status_good(512))));
}

#[test]
fn the_ladder_abort_reset_new_session() {
    let mut bench = Bench::new();
    let first = bench.start(1, read(512));
    let second = bench.start(2, Command { timeout: Duration::from_secs(60), ..read(512) });
    let other = bench.start(3, Command { lun: Lun::ZERO, timeout: Duration::from_secs(60), ..read(512) });
    bench.now += Duration::from_secs(30);
    bench.alive();
    bench.session.timers(bench.now).unwrap();
    assert_eq!(bench.tmf().referenced_itt, first.itt);
    bench.now += Duration::from_secs(5);
    bench.alive();
    bench.session.timers(bench.now).unwrap();
    let reset = bench.tmf();
    assert_eq!(reset.function, TaskFunction::LogicalUnitReset);
    assert!(reset.referenced_itt.is_none());
    while bench.session.next_event().is_some() {}
    // A reset that works ends all tasks of the unit, and only those.
    bench.tmf_answer(reset.itt, TaskResponseCode::Complete).unwrap();
    let ended: Vec<_> = std::iter::from_fn(|| bench.session.next_event()).collect();
    let aborted = |slot| Event::Done { slot, outcome: Outcome::Aborted };
    assert_eq!(ended, [aborted(1), aborted(2)]);
    assert!(bench.good(second.itt).is_err());
    let _ = other;

    // One that does not ends the session.
    let mut bench = Bench::new();
    bench.start(1, read(512));
    bench.now += Duration::from_secs(30);
    bench.alive();
    bench.session.timers(bench.now).unwrap();
    let abort = bench.tmf();
    bench.tmf_answer(abort.itt, TaskResponseCode::Unsupported).unwrap();
    let reset = bench.tmf();
    let error = bench.tmf_answer(reset.itt, TaskResponseCode::Rejected).unwrap_err();
    assert!(matches!(error, SessionError::Stuck { step: "LOGICAL UNIT RESET", .. }));
    let mut left = Vec::new();
    bench.session.unanswered(&mut left);
    assert_eq!(left, [1]);
}

#[test]
fn a_window_that_stays_closed_is_noticed() {
    let mut bench = Bench::with(Config { max_cmd_sn: Serial(FIRST_CMD_SN).sub(1), ..config() });
    bench.submit(0, read(512));
    assert!(bench.sent().is_empty());
    bench.now += Duration::from_secs(29);
    bench.max_cmd_sn = Serial(FIRST_CMD_SN).sub(1);
    bench.alive();
    bench.now += Duration::from_secs(1);
    assert_eq!(bench.session.timers(bench.now), Err(SessionError::WindowClosed));
}

/// Found by simulation: the engine ran in circles until the logout was due.
#[test]
fn a_logout_that_waits_does_not_stop_the_pings() {
    let mut bench = Bench::new();
    bench.start(0, read(512));
    bench.session.logout(bench.now, Duration::from_secs(20));
    bench.wake().unwrap();
    assert!(matches!(bench.next_tx(), Some((InitiatorPdu::NopOut(_), _))));
    assert_eq!(bench.wake(), Err(SessionError::Silent { timeout: Duration::from_secs(5) }));
}

/// Found by simulation: the socket takes nothing, and the logout's time has come.
#[test]
fn a_logout_that_cannot_be_sent_times_out() {
    let mut bench = Bench::new();
    bench.start(0, read(512));
    bench.session.logout(bench.now, Duration::from_secs(1));
    bench.wake().unwrap();
    // Nobody asks for what is to be sent.
    let due = bench.now;
    assert_eq!(
        bench.wake(),
        Err(SessionError::LogoutTimeout { timeout: bench.session.config().logout_timeout })
    );
    assert_eq!(bench.now - due, bench.session.config().logout_timeout);
}

#[test]
fn logout_waits_for_commands_and_for_its_answer() {
    let mut bench = Bench::new();
    let command = bench.start(0, read(512));
    bench.session.logout(bench.now, Duration::from_secs(1));
    assert!(bench.sent().is_empty());
    bench.data_in(command.itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
    assert!(bench.outcome().is_some());
    let Some((InitiatorPdu::LogoutRequest(logout), _)) = bench.next_tx() else { panic!() };
    // Nothing follows a Logout, not even an answer to a ping.
    bench.ping(Ttt(1), Lun::ZERO).unwrap();
    assert!(bench.sent().is_empty());
    let answer = LogoutResponse {
        response: LogoutResponseCode::Closed,
        itt: logout.itt,
        sn: bench.sn(),
        time2wait_s: 0,
        time2retain_s: 0,
    };
    assert_eq!(bench.session.logged_out(), None);
    bench.take(&answer.encode(), &[]).unwrap();
    // The target's FIN is waited for (11.14), but not for long.
    assert_eq!(bench.session.logged_out(), Some(0));
    assert_eq!(bench.session.next_event(), None);
    let answered = bench.now;
    bench.wake().unwrap();
    assert_eq!(bench.session.next_event(), Some(Event::LoggedOut { time2wait_s: 0 }));
    assert!(bench.now - answered <= Duration::from_secs(1));
    assert_eq!(bench.session.deadline(), None, "nothing is left to wait for");

    // Neither a command nor the target's silence can hold it up.
    let mut bench = Bench::new();
    bench.start(0, read(512));
    bench.session.logout(bench.now, Duration::from_secs(1));
    bench.wake().unwrap();
    assert!(matches!(bench.next_tx(), Some((InitiatorPdu::LogoutRequest(_), _))));
    assert!(matches!(bench.wake(), Err(SessionError::LogoutTimeout { .. })));
}

#[test]
fn a_unit_is_reset_for_a_caller_in_doubt() {
    let mut bench = Bench::new();
    bench.session.reset_unit(Lun::ZERO, bench.now);
    let request = bench.tmf();
    assert_eq!((request.function, request.referenced_itt), (TaskFunction::LogicalUnitReset, Itt::NONE));
    bench.tmf_answer(request.itt, TaskResponseCode::Complete).unwrap();
    assert_eq!(bench.session.next_event(), Some(Event::UnitReset { lun: Lun::ZERO }));

    bench.session.reset_unit(Lun::ZERO, bench.now);
    let request = bench.tmf();
    let refused = bench.tmf_answer(request.itt, TaskResponseCode::Unsupported);
    assert!(matches!(refused, Err(SessionError::ResetFailed { .. })), "{refused:?}");
}

fn commands(sent: &[(InitiatorPdu, TxPdu)]) -> usize {
    sent.iter().filter(|(pdu, _)| matches!(pdu, InitiatorPdu::ScsiCommand(_))).count()
}

/// Checklist line 30 (RFC 7143 4.2.3.3): what is sent behind a reset need not be ended by it, so nothing is.
#[test]
fn no_command_follows_a_reset_before_its_answer() {
    let mut bench = Bench::new();
    bench.start(1, read(512));
    bench.now += Duration::from_secs(30);
    bench.alive();
    bench.session.timers(bench.now).unwrap();
    let abort = bench.tmf();
    bench.submit(2, write(512));
    assert_eq!(commands(&bench.sent()), 1, "an abort of one task holds nothing up");
    bench.tmf_answer(abort.itt, TaskResponseCode::Unsupported).unwrap();
    let reset = bench.tmf();
    assert_eq!(reset.function, TaskFunction::LogicalUnitReset);
    bench.submit(3, write(512));
    assert_eq!(commands(&bench.sent()), 0);
    while bench.session.next_event().is_some() {}
    bench.tmf_answer(reset.itt, TaskResponseCode::Complete).unwrap();
    let ended: Vec<_> = std::iter::from_fn(|| bench.session.next_event()).collect();
    assert_eq!(ended.len(), 2, "those before the reset: {ended:?}");
    assert_eq!(commands(&bench.sent()), 1, "the one behind it, now");
}

/// Found by simulation: a command's time ends while the unit is being reset, and nothing can be done about it before.
#[test]
fn a_command_whose_time_ends_during_a_reset_wakes_nobody() {
    let mut bench = Bench::new();
    let limit = Duration::from_secs(1);
    let slow = bench.start(0, Command { timeout: limit, ..read(512) });
    bench.session.reset_unit(slow.lun, bench.now + limit / 2);
    let reset = bench.tmf();
    bench.now += limit;
    bench.session.timers(bench.now).unwrap();
    assert!(bench.session.deadline().unwrap() > bench.now, "a deadline in the past is a busy loop");
    bench.tmf_answer(reset.itt, TaskResponseCode::Complete).unwrap();
    assert_eq!(
        bench.session.next_event(),
        Some(Event::Done { slot: slow.itt.0 as u16, outcome: Outcome::Aborted })
    );
}

#[test]
fn round_trips_are_measured_under_load_as_well() {
    let mut bench = Bench::new();
    assert_eq!(bench.session.round_trip(), None);
    let mut expected = None;
    for rtt_ms in [8, 16, 8] {
        // Something arrives all the time.
        for _ in 0..50 {
            bench.now += Duration::from_millis(100);
            bench.alive();
            bench.session.timers(bench.now).unwrap();
        }
        let Some((InitiatorPdu::NopOut(ping), _)) = bench.next_tx() else { panic!("no ping") };
        bench.now += Duration::from_millis(rtt_ms);
        let answer =
            NopIn { data_len_bytes: 0, lun: Lun::ZERO, itt: ping.itt, ttt: Ttt::NONE, sn: bench.sn() };
        bench.take(&answer.encode(), &[]).unwrap();
        let new = Duration::from_millis(rtt_ms);
        expected = Some(expected.map_or(new, |old: Duration| old - old / 8 + new / 8));
        assert_eq!(bench.session.round_trip(), expected);
    }
}

#[test]
fn a_session_that_is_watched_closely_pings_as_soon_as_it_is_kept_waiting() {
    let mut bench = Bench::new();
    let interval = Duration::from_millis(100);
    bench.session.watch_closely(Some(interval));
    // Idle: as always.
    let start = bench.now;
    assert_eq!(bench.session.deadline(), Some(start + Duration::from_secs(5)));
    bench.now += Duration::from_secs(3);
    let command = bench.start(0, read(512));
    bench.wake().unwrap();
    assert_eq!(bench.now, start + Duration::from_secs(3) + interval, "counted from the command");
    let Some((InitiatorPdu::NopOut(ping), _)) = bench.next_tx() else { panic!() };
    assert_eq!(bench.session.pinging_since(), Some(bench.now));
    bench.now += Duration::from_millis(50);
    let answer = NopIn { data_len_bytes: 0, lun: Lun::ZERO, itt: ping.itt, ttt: Ttt::NONE, sn: bench.sn() };
    bench.take(&answer.encode(), &[]).unwrap();
    assert_eq!(bench.session.pinging_since(), None);
    assert_eq!(bench.session.last_received(), bench.now);
    bench.wake().unwrap();
    let Some((InitiatorPdu::NopOut(_), _)) = bench.next_tx() else { panic!() };
    // Not to be judged by the session before the usual time.
    let asked = bench.now;
    bench.wake().unwrap_err();
    assert_eq!(bench.now - asked, Duration::from_secs(5));
    bench.data_in(command.itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
}

#[test]
fn what_a_session_waits_for_is_counted() {
    let mut bench = Bench::with(Config { initial_r2t: true, max_cmd_sn: Serial(FIRST_CMD_SN), ..config() });
    let start = bench.now;
    let command = bench.start(0, write(16384));
    assert_eq!(bench.session.flow(), FlowStats::default());
    // The window had room for one.
    bench.submit(1, read(512));
    assert!(bench.next_tx().is_none() && bench.next_tx().is_none());
    bench.now = start + Duration::from_millis(3);
    bench.r2t(command.itt, 0, 4096, 4096).unwrap();
    assert_eq!(bench.sent().len(), 2, "the data that was asked for, and the command that waited");
    bench.now = start + Duration::from_millis(10);
    bench.r2t(command.itt, 1, 8192, 8192).unwrap();
    bench.sent();
    let flow = bench.session.flow();
    assert_eq!((flow.window_stalls, flow.window_stall_ns), (1, 3_000_000));
    assert_eq!((flow.r2ts, flow.r2t_wait_ns), (2, 10_000_000));
    // Nothing is left to ask for.
    bench.now = start + Duration::from_secs(1);
    bench.good(command.itt).unwrap();
    let mut sum = flow;
    sum.add(bench.session.flow());
    assert_eq!((sum.r2ts, sum.r2t_wait_ns), (4, 20_000_000));
}

#[test]
fn what_a_reset_of_others_may_have_ended_is_asked_for_soon() {
    let mut bench = Bench::new();
    let command = bench.start(0, read(512));
    bench.session.hasten(bench.now, Duration::from_secs(2));
    let start = bench.now;
    bench.wake().unwrap();
    assert_eq!(bench.now - start, Duration::from_secs(2));
    let abort = bench.tmf();
    assert_eq!((abort.function, abort.referenced_itt), (TaskFunction::AbortTask, command.itt));
    bench.tmf_answer(abort.itt, TaskResponseCode::NoTask).unwrap();
    while let Some(event) = bench.session.next_event() {
        if let Event::Done { slot, outcome } = event {
            assert_eq!((slot, outcome), (0, Outcome::Aborted));
            return;
        }
    }
    panic!("the command did not end");
}
