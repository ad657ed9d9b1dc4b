//! A million periods, at rates that do not divide the clock's unit.

use std::time::Duration;

use fusebox_core::{Admission, Kind, Moment, Time, TokenBucket, token_bucket::State};

use crate::{later, tokens};

const PERIODS: u64 = 1_000_000;

fn rates() -> [TokenBucket; 3] {
    [
        TokenBucket::new(3, Duration::from_secs(1), 3).unwrap(),
        TokenBucket::new(7, Duration::from_secs(60), 7).unwrap(),
        TokenBucket::new(1_000_003, Duration::from_secs(86_400), 1_000_003).unwrap(),
    ]
}

/// The same bucket as if its last period had been the first: a million days are 2,700 years, and server
/// time ends after 584.
fn back_to_zero(state: Option<State>) -> Option<State> {
    state.map(|state| State { at: Time::ZERO, ..state })
}

/// Takes what is left.
fn drain(bucket: &TokenBucket, state: &mut Option<State>, now: Moment) -> u64 {
    let left = bucket.plan(*state, tokens(0), now).before.remaining;
    let plan = bucket.plan(*state, tokens(left), now);
    assert_eq!(plan.admission, Admission::Allow);
    *state = plan.charged.or(*state);
    left
}

#[test]
fn a_million_periods_admit_exactly_a_million_limits() {
    for bucket in rates() {
        let period = bucket.per_nanos();
        let (mut state, mut now) = (None, Moment::ZERO);
        let mut admitted = drain(&bucket, &mut state, now);
        assert_eq!(admitted, bucket.burst());
        for _ in 0..PERIODS {
            (state, now) = (back_to_zero(state), Moment::ZERO);
            // Never in step with the tokens: drained at two odd moments and at the end of each period.
            for part in [period / 7 + 1, period / 3, period - period / 7 - 1 - period / 3] {
                now = later(now, part);
                admitted += drain(&bucket, &mut state, now);
            }
        }
        assert_eq!(admitted, bucket.burst() + PERIODS * bucket.limit(), "{bucket:?}");
    }
}

#[test]
fn every_period_fills_at_its_end_and_not_before() {
    for bucket in rates() {
        let period = bucket.per_nanos();
        let (mut state, mut now) = (None, Moment::ZERO);
        drain(&bucket, &mut state, now);
        for _ in 0..PERIODS {
            (state, now) = (back_to_zero(state), Moment::ZERO);
            let full = tokens(bucket.limit());
            assert_ne!(
                bucket.plan(state, full, later(now, period - 1)).admission,
                Admission::Allow
            );
            now = later(now, period);
            let plan = bucket.plan(state, full, now);
            assert_eq!(plan.admission, Admission::Allow);
            state = plan.charged;
        }
    }
}
