//! The buckets under virtual time.

use proptest::prelude::*;
use serde_json::json;

use super::*;

const SECOND_NS: u64 = 1_000_000_000;

proptest! {
    /// In any span of time no more begins than the burst, the rate, and one request.
    #[test]
    fn never_more_than_burst_and_rate_and_one_request(
        per_second in 1u64..1_000_000, burst in 1u64..100_000,
        steps in prop::collection::vec((0u64..50_000_000, 1u64..5_000), 1..100),
    ) {
        let mut bucket = Bucket::new(Rate::new(per_second, Some(burst)).unwrap(), 0);
        let (mut now, mut begun) = (0u64, Vec::new());
        for (pause, cost) in steps {
            now += pause;
            bucket.refill(now);
            while bucket.is_open() && begun.len() < 300 {
                bucket.spend(cost);
                begun.push((now, cost));
            }
        }
        for first in 0..begun.len() {
            let (mut sum, mut largest) = (0u128, 0);
            for &(at, cost) in &begun[first..] {
                sum += u128::from(cost);
                largest = largest.max(u128::from(cost));
                let span = u128::from(at - begun[first].0);
                let most = u128::from(burst) * PARTS as u128 + u128::from(per_second) * span + largest * PARTS as u128;
                prop_assert!(sum * PARTS as u128 <= most, "{} in {} ns", sum, span);
            }
        }
    }

    /// Who comes back exactly when the bucket says that it opens gets the whole rate, and finds it open.
    #[test]
    fn the_rate_is_reached_and_the_time_told_is_right(
        per_second in 1u64..1_000_000, burst in 1u64..1000, costs in prop::collection::vec(1u64..3000, 50..200),
    ) {
        let mut bucket = Bucket::new(Rate::new(per_second, Some(burst)).unwrap(), 0);
        let (mut now, mut sum) = (0, 0u64);
        for cost in costs {
            let open = bucket.open_at_ns();
            prop_assert!(open >= now);
            if open > now {
                let mut early = bucket.clone();
                early.refill(open - 1);
                prop_assert!(!early.is_open(), "open before it says");
            }
            now = open;
            bucket.refill(now);
            prop_assert!(bucket.is_open());
            bucket.spend(cost);
            sum += cost;
        }
        // All but the last debt was paid by time or burst.
        let least = i128::from(sum) * PARTS - i128::from(burst) * PARTS - 3000 * PARTS;
        let most = i128::from(now) * i128::from(per_second);
        prop_assert!(most >= least, "waited too short a time");
        prop_assert!(most <= i128::from(sum) * PARTS + i128::from(per_second) * 200, "waited too long");
    }

    /// Being asked often changes nothing.
    #[test]
    fn refills_add_up(per_second in 1u64..1_000_000_000, pauses in prop::collection::vec(0u64..10_000, 1..100)) {
        let rate = Rate::new(per_second, Some(1 << 40)).unwrap();
        let (mut often, mut once) = (Bucket::new(rate, 0), Bucket::new(rate, 0));
        often.spend(1 << 41);
        once.spend(1 << 41);
        let mut now = 0;
        for pause in pauses {
            now += pause;
            often.refill(now);
        }
        once.refill(now);
        prop_assert_eq!(often.level, once.level);
    }

    /// Whatever the numbers, nothing overflows, and time that goes backwards does no harm.
    #[test]
    fn extreme_numbers(
        per_second in 1u64..=MAX_RATE, burst in 1u64..=MAX_RATE, times: Vec<u64>, costs: Vec<u64>,
    ) {
        let mut bucket = Bucket::new(Rate::new(per_second, Some(burst)).unwrap(), 0);
        for (at, cost) in times.into_iter().zip(costs) {
            bucket.refill(at);
            bucket.spend(cost);
            prop_assert!(bucket.open_at_ns() >= bucket.at_ns);
        }
    }

    /// A disk with both limits over virtual time, woken only when it says: it keeps to both limits, and the tighter one
    /// is used up.
    #[test]
    fn a_limited_disk_gets_what_the_tighter_limit_allows(
        iops in 10u64..100_000, bps in 10_000u64..1_000_000_000, size in 512u64..200_000,
    ) {
        let start = Instant::now();
        let limits = Limits {
            iops: Some(Rate::new(iops, None).unwrap()),
            bps: Some(Rate::new(bps, None).unwrap()),
        };
        let mut limiter = Limiter::new(limits, start);
        let end = start + Duration::from_secs(10);
        let (mut now, mut requests, mut wakes) = (start, 0u64, 0u64);
        while now < end && requests < 20_000 {
            limiter.refill(now);
            wakes += 1;
            while limiter.is_open() && requests < 20_000 {
                limiter.spend(size, now);
                requests += 1;
            }
            let until = limiter.closed_until().unwrap_or(now);
            prop_assert!(until > now || limiter.is_open());
            now = until;
        }
        let seconds = (now - start).as_secs_f64();
        let allowed = (iops as f64).min(bps as f64 / size as f64) * seconds;
        let burst = (iops as f64 / 10.0).max(1.0).max(bps as f64 / 10.0 / size as f64) + 2.0;
        prop_assert!(requests as f64 <= allowed + burst, "{requests} of {allowed} in {seconds} s");
        prop_assert!(requests as f64 >= allowed * 0.98 - 2.0, "{requests} of {allowed} in {seconds} s");
        // A wake-up takes a batch: no more than one in a millisecond where the burst allows it.
        let fast = limits.iops.unwrap().burst > iops / 500 && limits.bps.unwrap().burst > bps / 500;
        prop_assert!(!fast || wakes as f64 <= seconds * 1000.0 + 2.0, "{wakes} wake-ups in {seconds} s");
    }
}

#[test]
fn an_idle_disk_may_burst_and_then_gets_the_rate() {
    let rate = Rate::new(100, Some(20)).unwrap();
    let mut bucket = Bucket::new(rate, 0);
    let mut take = |now| {
        bucket.refill(now);
        let mut taken = 0;
        while bucket.is_open() {
            bucket.spend(1);
            taken += 1;
        }
        taken
    };
    assert_eq!(take(0), 20);
    assert_eq!(take(SECOND_NS / 2), 20, "no more than the burst collects");
    assert_eq!(take(SECOND_NS / 2 + SECOND_NS / 10), 10);
    assert_eq!(take(100 * SECOND_NS), 20);
}

#[test]
fn limits_change_while_they_hold_requests_back() {
    let start = Instant::now();
    let iops = |per_second| Change { iops: Some(Rate::new(per_second, Some(1)).ok()), bps: None };
    let mut limiter = Limiter::new(Limits::default(), start);
    assert!(limiter.is_open() && !limiter.is_on());
    limiter.change(iops(1), start);
    limiter.spend(4096, start);
    let until = limiter.closed_until().unwrap();
    assert_eq!(until, start + Duration::from_secs(1));
    // Faster: what is missing comes sooner.
    limiter.change(iops(1000), start);
    assert_eq!(limiter.closed_until(), Some(start + Duration::from_millis(1)));
    // Much slower, with a debt from before: not longer than for one token.
    limiter.spend(1 << 30, start);
    limiter.change(Change { iops: None, bps: Some(Rate::new(2, Some(1)).ok()) }, start);
    limiter.change(Change { iops: Some(None), bps: None }, start + Duration::from_secs(1));
    limiter.spend(1 << 30, start + Duration::from_secs(1));
    limiter
        .change(Change { iops: None, bps: Some(Rate::new(1, Some(1)).ok()) }, start + Duration::from_secs(2));
    assert!(limiter.closed_until().unwrap() <= start + Duration::from_secs(3));
    limiter = Limiter::new(Limits { iops: Rate::new(1, Some(1)).ok(), bps: None }, start);
    limiter.spend(0, start);
    // None: at once.
    limiter.change(Change { iops: Some(None), bps: None }, start + Duration::from_micros(10));
    assert!(limiter.is_open());
    assert_eq!(limiter.limits(), Limits::default());
    assert!(limiter.stats().closed >= 1 && limiter.stats().closed_ns == 10_000);
}

#[test]
fn rates_are_read_as_written() {
    let rate = |per_second, burst| Ok(Rate { per_second, burst });
    assert_eq!("1000".parse(), rate(1000, 100));
    assert_eq!("100M,burst=1G".parse(), rate(100 << 20, 1 << 30));
    assert_eq!("5".parse(), rate(5, 1));
    for wrong in ["", "0", "x", "1,2", "1,burst=0", "1,burst=", "-1", "2000000T", "1.5M"] {
        assert!(wrong.parse::<Rate>().is_err(), "{wrong}");
    }
}

#[test]
fn changes_are_read_from_json() {
    let parse = |value: Value| Change::parse(value.as_object().unwrap());
    let rate = Rate { per_second: 1000, burst: 50 };
    assert_eq!(
        parse(json!({"iops": 1000, "iops_burst": 50})),
        Ok(Change { iops: Some(Some(rate)), bps: None })
    );
    assert_eq!(parse(json!({"bps": null, "iops": 0})), Ok(Change { iops: Some(None), bps: Some(None) }));
    assert_eq!(parse(json!({"bps": "1M"})).unwrap().bps, Some(Rate::new(1 << 20, None).ok()));
    assert_eq!(parse(json!({})), Ok(Change::default()));
    for wrong in [
        json!({"iosp": 1}),
        json!({"iops": -1}),
        json!({"iops": 1.5}),
        json!({"iops": true}),
        json!({"iops_burst": 1}),
        json!({"iops": 0, "iops_burst": 1}),
        json!({"bps": "fast"}),
        json!({"bps": u64::MAX}),
    ] {
        assert!(parse(wrong.clone()).is_err(), "{wrong}");
    }
}
