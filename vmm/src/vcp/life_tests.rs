//! The life of a backend: each transition by name, then all sequences of events against what must hold in any of them.

use proptest::prelude::*;

use super::*;

fn text(text: &str) -> String {
    text.to_owned()
}

/// A VCP that has served for long, at a time.
fn served(now: Instant) -> Life {
    Life::serving(true, true, true, now.checked_sub(Duration::from_secs(60)).unwrap())
}

#[test]
fn a_killed_process_is_replaced_at_once() {
    let now = Instant::now();
    let mut life = served(now);
    assert_eq!(life.on(Event::Lost(text("closed its connection")), now), []);
    assert_eq!(life.deadline(), Some(now + LAST_WORDS), "it may tell how it ended");
    let [gone, ready, back] = [1, 3, 7].map(|ms| now + Duration::from_millis(ms));
    assert_eq!(life.on(Event::Ended(text("signal 9")), gone), [Action::Detach, Action::Start]);
    assert_eq!(life.facts.last_death.as_deref(), Some("signal 9"));
    assert_eq!(life.on(Event::Ready, ready), [Action::Attach]);
    assert_eq!(life.on(Event::Attached, back), []);
    assert_eq!(life.state(), &State::Serving);
    assert_eq!((life.facts.restarts, life.facts.last_away), (1, Some(Duration::from_millis(7))));
    let [death, start, attach] = [1, 2, 4].map(Duration::from_millis);
    assert_eq!(life.facts.last_parts, AwayParts { death, start, attach });
}

#[test]
fn the_order_of_end_and_loss_does_not_matter() {
    let now = Instant::now();
    let mut life = served(now);
    assert_eq!(life.on(Event::Ended(text("signal 9")), now), []);
    assert!(life.serves(), "it may have left its connection to another process");
    assert_eq!(life.on(Event::Lost(text("closed")), now), [Action::Detach, Action::Start]);
    assert_eq!(life.facts.last_death.as_deref(), Some("signal 9"));
}

#[test]
fn one_that_has_lost_its_connection_and_lives_is_killed_before_anything_else() {
    let now = Instant::now();
    let mut life = served(now);
    life.on(Event::Lost(text("did not answer")), now);
    assert_eq!(life.on(Event::Time, now), [], "too early");
    let later = now + LAST_WORDS;
    assert_eq!(life.on(Event::Time, later), [Action::Kill]);
    assert_eq!(life.deadline(), None, "its end is waited for without a limit");
    assert_eq!(life.on(Event::Time, later + Duration::from_secs(3600)), []);
    assert_eq!(life.on(Event::Ended(text("signal 9")), later), [Action::Detach, Action::Start]);
    assert_eq!(life.facts.last_death.as_deref(), Some("did not answer"));
}

#[test]
fn one_that_stands_still_is_killed() {
    let now = Instant::now();
    let mut life = served(now);
    assert_eq!(life.on(Event::Stalled(Duration::from_secs(5)), now), [Action::Kill]);
    assert_eq!(life.on(Event::Lost(text("closed")), now), []);
    assert_eq!(life.on(Event::Ended(text("signal 9")), now), [Action::Detach, Action::Start]);
    assert_eq!(life.facts.stalls, 1);
    assert!(life.facts.last_death.unwrap().contains("stood still for 5000 ms"));
}

#[test]
fn a_crash_loop_backs_off_and_shows_it() {
    let now = Instant::now();
    let mut life = served(now);
    life.on(Event::Ended(text("signal 9")), now);
    life.on(Event::Lost(text("closed")), now);
    let mut at = now;
    for pause in [50, 100, 200, 400, 800, 1600, 3000, 3000] {
        assert_eq!(life.state(), &State::Starting);
        assert_eq!(life.on(Event::Ended(text("exit code 1")), at), [Action::Detach]);
        let next = at + Duration::from_millis(pause);
        assert_eq!(life.deadline(), Some(next));
        assert_eq!(life.on(Event::Time, next - Duration::from_millis(1)), []);
        assert_eq!(life.on(Event::Time, next), [Action::Start]);
        at = next;
    }
    assert_eq!(life.facts.restarts, 0, "none has taken its place");
}

#[test]
fn a_restart_that_the_user_wants_has_no_pause() {
    let now = Instant::now();
    let mut life = Life::serving(true, true, true, now);
    for _ in 0..10 {
        assert_eq!(life.on(Event::Restart, now), [Action::Kill]);
        assert_eq!(life.on(Event::Ended(text("signal 9")), now), [Action::Detach, Action::Start]);
        life.on(Event::Ready, now);
        life.on(Event::Attached, now);
    }
}

#[test]
fn an_upgrade_changes_the_process_and_not_the_connection() {
    let now = Instant::now();
    let mut life = served(now);
    assert_eq!(life.on(Event::Upgrade, now), [Action::StartSuccessor]);
    assert!(life.serves());
    // The old one leaves as the new one says that it is the owner, in either order.
    assert_eq!(life.on(Event::Ended(text("exit code 0")), now), []);
    assert_eq!(life.on(Event::Upgraded, now), [Action::Adopt]);
    assert_eq!((life.state(), life.facts.upgrades), (&State::Serving, 1));
    // The new one is watched like the old one.
    assert_eq!(life.on(Event::Lost(text("closed")), now), []);
    assert_eq!(life.on(Event::Ended(text("signal 11")), now), [Action::Detach, Action::Start]);
    assert_eq!(life.facts.last_death.as_deref(), Some("signal 11"));
}

#[test]
fn an_upgrade_that_fails_changes_nothing() {
    let now = Instant::now();
    let mut life = served(now);
    life.on(Event::Upgrade, now);
    assert_eq!(life.on(Event::NotUpgraded(text("another version")), now), [Action::DropSuccessor]);
    assert_eq!(life.state(), &State::Serving);
    life.on(Event::Upgrade, now);
    assert_eq!(life.on(Event::Time, now + UPGRADE_LIMIT), [Action::DropSuccessor]);
    assert_eq!(life.state(), &State::Serving);
}

#[test]
fn the_death_of_an_old_process_during_an_upgrade_ends_both() {
    let now = Instant::now();
    let mut life = served(now);
    life.on(Event::Upgrade, now);
    life.on(Event::Ended(text("signal 9")), now);
    let actions = life.on(Event::Lost(text("closed")), now);
    assert_eq!(actions, [Action::DropSuccessor, Action::Detach, Action::Start]);
}

#[test]
fn what_cannot_go_on_or_is_not_to_ends_the_run() {
    let now = Instant::now();
    let mut life = Life::serving(false, false, false, now);
    assert_eq!(life.on(Event::Lost(text("closed")), now), [Action::GiveUp(text("closed"))]);
    let mut life = Life::serving(false, false, true, now);
    assert_eq!(life.on(Event::Lost(text("closed")), now), [Action::Detach, Action::Attach]);
    let why = text("kept no log");
    assert_eq!(life.on(Event::Hopeless(why.clone()), now), [Action::GiveUp(why)]);
    assert_eq!(life.on(Event::Time, now + Duration::from_secs(60)), []);
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Time),
        Just(Event::Ready),
        Just(Event::Attached),
        Just(Event::Failed(text("failed"))),
        Just(Event::Lost(text("lost"))),
        Just(Event::Ended(text("ended"))),
        Just(Event::Stalled(Duration::from_secs(5))),
        Just(Event::Restart),
        Just(Event::Upgrade),
        Just(Event::Upgraded),
        Just(Event::NotUpgraded(text("not"))),
    ]
}

proptest! {
    /// Whatever happens in whatever order: no second process beside one that lives, no attempt without a process, and
    /// never a state in which nothing would ever happen again.
    #[test]
    fn any_order(events in proptest::collection::vec((any_event(), 0u64..5000), 0..200), ours: bool) {
        let mut now = Instant::now();
        let mut life = Life::serving(ours, ours, true, now);
        let mut alive = ours;
        let mut successor = false;
        for (event, after) in events {
            now += Duration::from_millis(after);
            match &event {
                // Only what lives can end.
                Event::Ended(_) if !alive => continue,
                Event::Ended(_) => alive = false,
                // Only one that was started can take over.
                Event::Upgraded | Event::NotUpgraded(_) if !successor => continue,
                _ => {}
            }
            for action in life.on(event, now) {
                match action {
                    Action::Start => {
                        prop_assert!(ours && !alive);
                        alive = true;
                    }
                    Action::Attach => prop_assert!(!ours || life.state() == &State::Attaching),
                    Action::Kill => prop_assert!(alive),
                    Action::StartSuccessor => {
                        prop_assert!(alive && !successor);
                        successor = true;
                    }
                    Action::Adopt => {
                        prop_assert!(successor);
                        (alive, successor) = (true, false);
                    }
                    Action::DropSuccessor => {
                        prop_assert!(successor);
                        successor = false;
                    }
                    Action::Detach => prop_assert!(!alive),
                    Action::GiveUp(_) => prop_assert!(false, "nothing was hopeless"),
                }
            }
            match life.state() {
                State::Away(_) => prop_assert!(!alive && life.deadline().is_some()),
                State::Starting => prop_assert!(ours && alive),
                State::Dying(_) => prop_assert!(alive),
                State::Upgrading(_) => prop_assert!(successor),
                _ => {}
            }
            prop_assert_eq!(successor, matches!(life.state(), State::Upgrading(_)));
        }
    }
}
