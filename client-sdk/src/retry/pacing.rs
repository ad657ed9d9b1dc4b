//! The tries of one call: how many, how far apart, until when. Pure; [`Attempts`](super::Attempts) acts on it.

use std::time::Duration;

use fusebox_core::Time;

use super::{Again, Backoff, GaveUp};

/// Longest pause that a target may ask for. A caller who is to come back later than that is told so now, rather than
/// kept, and with it all that it holds.
const PUSHBACK_MOST: Duration = Duration::from_secs(60);

/// What a caller wants of its retries.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Terms {
    pub(super) backoff: Backoff,
    /// Tries in all, the first among them; at least 1.
    pub(super) max_attempts: u32,
    /// Time for all tries and the pauses between them.
    pub(super) deadline: Option<Duration>,
}

impl Default for Terms {
    fn default() -> Self {
        Self { backoff: Backoff::default(), max_attempts: 3, deadline: None }
    }
}

/// The tries of one call so far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pacing {
    terms: Terms,
    /// Retries that were let through.
    retries: u32,
    previous: Duration,
    ends: Option<Time>,
}

impl Pacing {
    pub(super) fn new(terms: Terms, now: Time) -> Self {
        let ends = terms.deadline.map(|deadline| now.after(deadline));
        Self { terms, retries: 0, previous: Duration::ZERO, ends }
    }

    /// The number of the try under way, counted from 0.
    pub(super) fn attempt(&self) -> u32 {
        self.retries
    }

    /// Time left until the deadline, if there is one.
    pub(super) fn left(&self, now: Time) -> Option<Duration> {
        self.ends.map(|ends| Duration::from_nanos(ends.nanos_since(now)))
    }

    /// The pause before the next try, if there may be one. Nothing changes by it: see [`retry`](Self::retry).
    pub(super) fn pause(
        &self,
        again: Again,
        now: Time,
        up_to: impl FnOnce(Duration) -> Duration,
    ) -> Result<Duration, GaveUp> {
        if again == Again::No {
            return Err(GaveUp::Done);
        }
        let next = self.retries.saturating_add(1);
        if next >= self.terms.max_attempts {
            return Err(GaveUp::Attempts);
        }
        let pause = match again {
            Again::After(pause) if pause > PUSHBACK_MOST => return Err(GaveUp::Pushback),
            Again::After(pause) => pause,
            _ => self.terms.backoff.pause(next, self.previous, up_to),
        };
        match self.ends {
            Some(ends) if now.after(pause) >= ends => Err(GaveUp::Deadline),
            _ => Ok(pause),
        }
    }

    /// The next try is let through, after that pause.
    pub(super) fn retry(&mut self, pause: Duration) {
        self.retries = self.retries.saturating_add(1);
        self.previous = pause;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::retry::Jitter;

    fn all(most: Duration) -> Duration {
        most
    }

    fn at(millis: u64) -> Time {
        Time::ZERO.after(Duration::from_millis(millis))
    }

    fn terms() -> Terms {
        let backoff = Backoff { jitter: Jitter::None, ..Backoff::default() };
        Terms { backoff, ..Terms::default() }
    }

    #[test]
    fn a_call_is_tried_three_times_in_all() {
        let mut pacing = Pacing::new(terms(), at(0));
        for millis in [50, 100] {
            let pause = pacing.pause(Again::Yes, at(0), all).unwrap();
            assert_eq!(pause, Duration::from_millis(millis));
            pacing.retry(pause);
        }
        assert_eq!(pacing.attempt(), 2);
        assert_eq!(pacing.pause(Again::Yes, at(0), all), Err(GaveUp::Attempts));
    }

    #[test]
    fn one_attempt_is_no_retry() {
        for max_attempts in [0, 1] {
            let pacing = Pacing::new(Terms { max_attempts, ..terms() }, at(0));
            assert_eq!(pacing.pause(Again::Yes, at(0), all), Err(GaveUp::Attempts));
        }
    }

    #[test]
    fn what_is_done_is_not_tried_again() {
        let pacing = Pacing::new(terms(), at(0));
        assert_eq!(pacing.pause(Again::No, at(0), all), Err(GaveUp::Done));
    }

    #[test]
    fn pushback_replaces_the_backoff() {
        let pacing = Pacing::new(terms(), at(0));
        let after = |seconds| Again::After(Duration::from_secs(seconds));
        assert_eq!(pacing.pause(after(0), at(0), all), Ok(Duration::ZERO));
        assert_eq!(pacing.pause(after(60), at(0), all), Ok(Duration::from_secs(60)));
        assert_eq!(pacing.pause(after(61), at(0), all), Err(GaveUp::Pushback));
    }

    #[test]
    fn no_try_begins_at_the_deadline_or_after_it() {
        let deadline = Some(Duration::from_millis(100));
        let pacing = Pacing::new(Terms { deadline, ..terms() }, at(1_000));
        assert_eq!(pacing.pause(Again::Yes, at(1_049), all), Ok(Duration::from_millis(50)));
        assert_eq!(pacing.pause(Again::Yes, at(1_050), all), Err(GaveUp::Deadline));
        assert_eq!(pacing.left(at(1_049)), Some(Duration::from_millis(51)));
        assert_eq!(pacing.left(at(2_000)), Some(Duration::ZERO));
    }
}
