//! A session goes on in another process: numbers, tags, and what is refused.

use super::*;
use crate::initiator::{ImportError, SessionState, Underway, Violation};

/// A bench whose session did some work and is quiet.
fn quiet() -> Bench {
    let mut bench = Bench::new();
    for slot in [0, 3, 3] {
        let command = bench.start(slot, read(512));
        bench.data_in(command.itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
        assert_eq!(bench.outcome(), Some((slot, status_good(512))));
    }
    bench
}

fn through_text(state: &SessionState) -> SessionState {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

/// RFC 7143 4.2.2: the numbers go on as if nothing had happened; the target sees no difference.
#[test]
fn numbers_and_tags_go_on() {
    let mut bench = quiet();
    let before = bench.start(3, read(512));
    bench.data_in(before.itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
    bench.outcome().unwrap();
    let state = through_text(&bench.session.export().unwrap());
    bench.session = Session::import(state, bench.now).unwrap();

    let after = bench.start(3, read(512));
    assert_eq!(after.cmd_sn, before.cmd_sn.next());
    assert_eq!(after.exp_stat_sn, before.exp_stat_sn.next());
    assert_eq!(after.itt.0 >> 16, (before.itt.0 >> 16) + 1, "the tag's generation goes on");
    bench.data_in(after.itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
    assert_eq!(bench.outcome(), Some((3, status_good(512))));
}

#[test]
fn a_late_pdu_of_the_old_process_finds_no_task() {
    let mut bench = quiet();
    let before = bench.start(3, read(512));
    bench.data_in(before.itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
    bench.outcome().unwrap();
    bench.session = Session::import(bench.session.export().unwrap(), bench.now).unwrap();
    bench.start(3, read(512));
    let error = bench.data_in(before.itt, 0, 0, 512, End::Good(Residual::None)).unwrap_err();
    assert!(matches!(error, SessionError::Violation { violation: Violation::UnknownTask, .. }), "{error}");
}

#[test]
fn what_is_under_way_is_not_handed_over() {
    let mut bench = quiet();
    bench.submit(5, read(512));
    assert_eq!(bench.session.export().unwrap_err(), Underway::Commands(1));
    let (command, _) = bench.next_tx().unwrap();
    assert_eq!(bench.session.export().unwrap_err(), Underway::Commands(1));
    let InitiatorPdu::ScsiCommand(command) = command else { panic!("{command:?}") };
    bench.data_in(command.itt, 0, 0, 512, End::Good(Residual::None)).unwrap();
    assert_eq!(bench.session.export().unwrap_err(), Underway::Events);
    bench.outcome().unwrap();

    bench.ping(Ttt(9), Lun::ZERO).unwrap();
    assert_eq!(bench.session.export().unwrap_err(), Underway::Due);
    bench.sent();
    bench.session.export().unwrap();

    bench.now += Duration::from_secs(6);
    bench.session.timers(bench.now).unwrap();
    assert_eq!(bench.session.export().unwrap_err(), Underway::Ping);

    let mut bench = quiet();
    bench.session.logout(bench.now, Duration::from_secs(1));
    assert_eq!(bench.session.export().unwrap_err(), Underway::Logout);
}

#[test]
fn what_no_session_can_be_is_refused() {
    let bench = quiet();
    let good = bench.session.export().unwrap();
    let import = |change: &dyn Fn(&mut SessionState)| {
        let mut state = good.clone();
        change(&mut state);
        Session::import(state, bench.now).unwrap_err()
    };
    let slots = import(&|state| state.generations.truncate(31));
    assert_eq!(slots, ImportError::Slots { slots: 32, generations: 31 });
    assert!(matches!(import(&|state| state.config.slots = 0), ImportError::Slots { .. }));
    let window = import(&|state| state.exp_cmd_sn = state.cmd_sn.next());
    assert!(matches!(window, ImportError::Window { .. }), "{window}");
    let window = import(&|state| state.max_cmd_sn = state.exp_cmd_sn.sub(2));
    assert!(matches!(window, ImportError::Window { .. }), "{window}");
    let length = import(&|state| state.config.max_send_bytes = 1 << 24);
    assert!(matches!(length, ImportError::Parameter(_)), "{length}");
    let r2ts = import(&|state| state.config.max_outstanding_r2t = 17);
    assert!(matches!(r2ts, ImportError::Parameter("MaxOutstandingR2T")), "{r2ts}");

    let mut unknown = serde_json::to_value(&good).unwrap();
    unknown["later"] = 1.into();
    assert!(serde_json::from_value::<SessionState>(unknown).is_err());
}

#[test]
fn violations_stay_counted() {
    let mut bench = quiet();
    bench.session.counters.count(Violation::UnknownTask);
    let session = Session::import(through_text(&bench.session.export().unwrap()), bench.now).unwrap();
    assert_eq!(session.counters(), bench.session.counters());
}
