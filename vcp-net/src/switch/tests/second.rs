//! The same with a second thread: everything that is true of one thread has to be true of two, pass for pass.

use std::cell::Cell;

use super::bed::{ALL_FEATURES, Bed, RING_SIZE, ether, mac};
use super::{offloads, watch, ways};
use crate::frame::VnetHeader;
use crate::port::{OnFull, PortSpec};

thread_local! {
    static WANTED: Cell<bool> = const { Cell::new(false) };
}

/// Whether beds of this thread have a second thread.
pub(super) fn is_wanted() -> bool {
    WANTED.get()
}

fn on_two_threads(test: fn()) {
    WANTED.set(true);
    test();
    WANTED.set(false);
}

#[test]
fn what_is_true_of_one_thread_is_true_of_two() {
    for test in [
        ways::an_unknown_station_is_looked_for_everywhere_and_a_known_one_is_not,
        ways::frames_arrive_in_order_once_and_whole,
        ways::a_full_port_holds_its_senders_up_and_nothing_is_lost,
        ways::a_port_that_stands_still_holds_nobody_up_for_long,
        ways::a_port_that_drops_holds_nobody_up,
        ways::vlans_are_apart_and_trunks_carry_tags,
        ways::an_address_is_its_owners_alone,
        ways::a_rate_is_kept_over_time,
        ways::a_broken_ring_stops_its_port_and_no_other,
        ways::an_uplink_that_is_full_holds_frames_back,
        ways::ports_are_changed_while_they_run,
        offloads::an_uplink_gets_what_it_takes_and_its_frames_are_finished_for_guests,
        offloads::metadata_that_lies_is_dropped_at_the_sender,
        offloads::a_sender_that_may_leave_nothing_undone_is_not_believed_to_have,
        offloads::a_row_of_segments_that_meets_a_full_port_goes_on_where_it_stopped,
        watch::a_port_is_seen_in_both_directions_with_what_was_left_undone,
        watch::an_operation_is_seen_with_what_it_decided,
    ] {
        on_two_threads(test);
    }
}

/// What came to each guest and back from it, pass for pass, in a traffic of several senders, some of which meet full ports.
fn story() -> (Vec<String>, u64) {
    let waits = PortSpec::default();
    let drops = PortSpec { on_full: OnFull::Drop, ..PortSpec::default() };
    let specs = [waits.clone(), drops, waits.clone(), waits];
    let mut bed = Bed::new(&specs.map(|spec| (spec, ALL_FEATURES)), None);
    bed.guests.iter_mut().for_each(|guest| guest.offer(32));
    (0..4).for_each(|at| bed.introduce(at));
    let mut told = Vec::new();
    let mut seed = 7u32;
    let mut next = move |below: u32| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) % below
    };
    for round in 0..300u32 {
        for at in 0..4 {
            for number in 0..next(24) {
                let to = next(5) as usize;
                // Number 4 is nobody's: it goes to all.
                let mut frame = ether(mac(at), mac(to), &[at as u8, round as u8, number as u8]);
                frame.resize(60 + next(900) as usize, 1);
                let guest = &mut bed.guests[at];
                if guest.tx.avail_idx.wrapping_sub(guest.tx.used_seen) < 40 {
                    guest.send(VnetHeader::default(), &frame);
                }
            }
        }
        bed.pass();
        for (at, guest) in bed.guests.iter_mut().enumerate() {
            let sent = guest.sent();
            let mut got = Vec::new();
            while let Some((_, bytes)) = guest.receive() {
                got.push((bytes[11], bytes[14], bytes[15], bytes[16], bytes.len()));
            }
            // Guest 2 is slow: it gives room back in every third round.
            let free = usize::from(guest.rx.avail_idx.wrapping_sub(guest.rx.used_seen));
            if at != 2 || round % 3 == 0 {
                guest.offer(32usize.saturating_sub(free));
            }
            told.push(format!("{round}.{at}: sent {sent}, got {got:?}"));
        }
    }
    let held = bed.fabric.switches[0].back.enqueue.held;
    assert!(held > 10, "ports were full: {held}");
    (told, bed.fabric.second.as_ref().map_or(0, |second| second.counts.passes))
}

#[test]
fn two_threads_tell_the_same_story_as_one() {
    let (one, passes) = story();
    assert_eq!(passes, 0);
    WANTED.set(true);
    let (two, passes) = story();
    WANTED.set(false);
    assert!(passes > 200, "the second thread took part: {passes}");
    for (one, two) in one.iter().zip(&two) {
        assert_eq!(one, two);
    }
}

#[test]
fn what_was_taken_behind_a_burst_that_is_held_stays_in_its_ring() {
    on_two_threads(|| {
        let mut bed = Bed::plain(2);
        bed.introduce(0);
        bed.introduce(1);
        bed.guests.iter_mut().for_each(|guest| while guest.receive().is_some() {});
        let sent = bed.guests[0].sent();
        assert_eq!(sent, 1);
        // Two bursts, of which the first meets the end of the room.
        let room = usize::from(bed.guests[1].rx.avail_idx.wrapping_sub(bed.guests[1].rx.used_seen));
        for number in 0..RING_SIZE {
            let frame = ether(mac(0), mac(1), &number.to_be_bytes());
            bed.guests[0].send_whole(number, &frame);
        }
        bed.pass();
        assert_eq!(bed.guests[0].sent(), room);
        let mut got = Vec::new();
        while got.len() < RING_SIZE.into() {
            bed.guests[1].offer(20);
            bed.pass();
            while let Some((_, bytes)) = bed.guests[1].receive() {
                got.push(u16::from_be_bytes([bytes[14], bytes[15]]));
            }
        }
        assert_eq!(got, (0..RING_SIZE).collect::<Vec<_>>());
        assert_eq!(bed.guests[0].sent(), usize::from(RING_SIZE) - room);
        let tally = bed.fabric.switches[0].account.total();
        assert_eq!(tally.drops_from() + tally.drops_to(), 2, "the two introductions: {tally:?}");
    });
}

#[test]
fn little_is_not_worth_a_second_thread() {
    on_two_threads(|| {
        let mut bed = Bed::plain(2);
        let passes = |bed: &Bed| bed.fabric.second.as_ref().unwrap().counts.passes;
        bed.fabric.busy_from = 64;
        let before = passes(&bed);
        bed.introduce(0);
        bed.introduce(1);
        for _ in 0..10 {
            bed.guests[0].send(VnetHeader::default(), &ether(mac(0), mac(1), &[1]));
            bed.run();
        }
        assert_eq!(passes(&bed), before);
    });
}
