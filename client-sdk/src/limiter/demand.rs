//! How many tokens a key is asked for, and so how many to have ahead.

use std::time::Duration;

use fusebox_core::{Time, saturating_nanos};

use super::word::TOKENS_MOST;

/// What is asked for within it is one measurement: a burst of some calls is no rate.
const SLICE: Duration = Duration::from_millis(20);

/// What a lease is to last for: long enough that few messages are sent, short enough that little is held by who needs
/// it no more.
const AHEAD: Duration = Duration::from_millis(200);

/// Of a lease's time to live, the part that it is to last for at most: what is not spent by then was taken in vain.
const AHEAD_OF_LEASE: u32 = 3;

/// In which a demand that ended is forgotten by half.
const HALF_LIFE: Duration = Duration::from_millis(500);

/// The demand for one key, in tokens per second: it grows at once, and is forgotten by halves.
#[derive(Debug, Default)]
pub(super) struct Demand {
    per_second: f64,
    since: Time,
    counted: u64,
}

impl Demand {
    /// So many tokens more were asked for, whether they were had or not.
    pub(super) fn add(&mut self, tokens: u64, now: Time) {
        self.turn(now);
        self.counted = self.counted.saturating_add(tokens);
    }

    /// Tokens to have ahead, of leases that live so long: at least 1.
    pub(super) fn ahead(&mut self, lease_time: Duration, now: Time) -> u64 {
        self.turn(now);
        let ahead = AHEAD.min(lease_time / AHEAD_OF_LEASE);
        // The slice that goes on is known to be at least this much.
        let slice = seconds(now.nanos_since(self.since)).max(SLICE.as_secs_f64());
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let rate = self.per_second.max(self.counted as f64 / slice);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
        let tokens = (rate * ahead.as_secs_f64()).ceil() as u64;
        tokens.clamp(1, TOKENS_MOST)
    }

    /// Ends the slice that is over.
    fn turn(&mut self, now: Time) {
        let nanos = now.nanos_since(self.since);
        if nanos < saturating_nanos(SLICE) {
            return;
        }
        let elapsed = seconds(nanos);
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let measured = self.counted as f64 / elapsed;
        let forgotten = 0.5_f64.powf(elapsed / HALF_LIFE.as_secs_f64());
        let before = measured + (self.per_second - measured) * forgotten;
        (self.per_second, self.since, self.counted) = (measured.max(before), now, 0);
    }
}

fn seconds(nanos: u64) -> f64 {
    Duration::from_nanos(nanos).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(1);

    fn at(millis: u64) -> Time {
        Time::ZERO.after(Duration::from_millis(millis))
    }

    #[test]
    fn a_key_that_nobody_asked_for_has_one_token_ahead() {
        assert_eq!(Demand::default().ahead(LEASE, at(5_000)), 1);
    }

    #[test]
    fn a_steady_demand_has_a_fifth_of_a_second_ahead() {
        let mut demand = Demand::default();
        for millis in 0..1_000 {
            demand.add(1, at(millis));
        }
        assert!((190..=220).contains(&demand.ahead(LEASE, at(1_000))));
        assert!((30..=40).contains(&demand.ahead(LEASE / 10, at(1_000))), "less of short leases");
    }

    #[test]
    fn a_demand_that_grows_is_met_at_once_and_one_that_ends_is_forgotten() {
        let mut demand = Demand::default();
        demand.add(1, at(0));
        demand.add(100, at(1_000));
        assert_eq!(demand.ahead(LEASE, at(1_000)), 1_000, "a burst counts as one of 20 ms");
        assert!(demand.ahead(LEASE, at(1_100)) <= 250);
        assert!(demand.ahead(LEASE, at(9_000)) <= 3);
    }

    #[test]
    fn what_is_had_ahead_is_bounded() {
        let mut demand = Demand::default();
        demand.add(u64::MAX, at(0));
        demand.add(u64::MAX, at(1));
        assert_eq!(demand.ahead(LEASE, at(2)), TOKENS_MOST);
    }
}
