//! Whether what reporters tell together opens a circuit: none of three or more does alone.
//!
//! Each counts with at most `min_calls` calls, in the ratio that it told, so that nobody outvotes the others
//! by the number of its calls. And so many of them must see the target failing by themselves. Both for one
//! rate: who sees failures and who sees slow calls do not agree. This guards against faulty reporters, not
//! hostile ones.

use super::{
    breaker::{Breaker, Share},
    window::{Counts, PRESENT, Ring, Seen, Window},
};
use crate::Time;

/// What is bad about a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rate {
    Failures,
    Slow,
}

impl Rate {
    const fn bad(self, counts: Counts) -> u32 {
        match self {
            Self::Failures => counts.failures,
            Self::Slow => counts.slow,
        }
    }
}

/// What a window says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Judged {
    /// The failures are enough to open a circuit.
    pub(super) failing: bool,
    /// The slow calls are.
    pub(super) slow: bool,
    /// All calls.
    pub(super) counts: Counts,
    /// Reporters that have any.
    pub(super) reporters: u32,
    /// Those that see the target failing, or slow, by themselves.
    pub(super) unhealthy: u32,
}

impl Judged {
    pub(super) const fn opens(&self) -> bool {
        self.failing || self.slow
    }
}

/// What the window of a circuit says now, to which everybody tells who is there since that time.
///
/// For as long as its window it may be that others have yet to tell anything. Until then as many must see the
/// target failing as the breaker says, however few have told: else whoever is first after a restart, and fails,
/// would open it for all.
pub(super) fn judge(window: &Window, known_since: Time, breaker: &Breaker, now: Time) -> Judged {
    match window {
        Window::Time(reporters) => {
            let all_are_known = known_since.after(reporters.length().min(PRESENT)) <= now;
            Fleet::of(reporters.seen(now), breaker).judge(&reporters.seen(now), all_are_known)
        }
        Window::Calls(ring) => judge_ring(ring, breaker),
        Window::Consecutive { failures, .. } => Judged {
            failing: matches!(breaker.window, super::breaker::Window::Consecutive(most) if *failures >= most),
            counts: Counts { calls: *failures, failures: *failures, slow: 0 },
            ..Judged::default()
        },
    }
}

/// Whether a reporter sees the target failing, or slow, by itself: then its own breaker acts.
pub(super) fn is_unhealthy(window: &Window, reporter: &str, breaker: &Breaker, now: Time) -> bool {
    let Window::Time(reporters) = window else { return false };
    // Who has calls enough is judged by those alone.
    let fleet = Fleet::of([].into_iter(), breaker);
    let mut own = reporters.seen_of(now, |one| *one.id == *reporter);
    own.any(|one| one.counts.calls >= fleet.floor && fleet.is_unhealthy(one.counts))
}

/// What is to be known of all reporters to say something of one.
pub(super) struct Fleet<'a> {
    breaker: &'a Breaker,
    /// Calls with which a reporter speaks for itself.
    floor: u32,
    /// The calls of all that have fewer.
    small: Counts,
    /// Whether those are enough to speak together.
    small_speak: bool,
}

impl<'a> Fleet<'a> {
    pub(super) fn of<'s>(seen: impl Iterator<Item = Seen<'s>>, breaker: &'a Breaker) -> Self {
        let floor = (breaker.min_calls / 10).max(2);
        let mut small = Counts::default();
        seen.filter(|one| one.counts.calls < floor).for_each(|one| small.add(one.counts));
        Self { breaker, floor, small, small_speak: small.calls >= floor }
    }

    fn threshold(&self, rate: Rate) -> Option<Share> {
        match rate {
            Rate::Failures => Some(self.breaker.failure_rate),
            Rate::Slow => self.breaker.slow_rate(),
        }
    }

    /// Whether a reporter with these calls is asked.
    const fn is_active(&self, counts: Counts) -> bool {
        counts.calls >= self.floor || counts.calls > 0 && self.small_speak
    }

    fn is_over(&self, rate: Rate, counts: Counts) -> bool {
        let Some(threshold) = self.threshold(rate) else { return false };
        if counts.calls >= self.floor {
            return threshold.is_reached(rate.bad(counts).into(), counts.calls.into());
        }
        // One bad call of a small reporter says nothing, however small the others are.
        let bad = rate.bad(self.small);
        let together = threshold.is_reached(bad.into(), self.small.calls.into());
        self.small_speak && rate.bad(counts) > 0 && bad >= 2 && together
    }

    pub(super) fn is_unhealthy(&self, counts: Counts) -> bool {
        self.is_over(Rate::Failures, counts) || self.is_over(Rate::Slow, counts)
    }

    fn judge<'s>(
        &self,
        seen: &(impl Iterator<Item = Seen<'s>> + Clone),
        all_are_known: bool,
    ) -> Judged {
        let mut judged = Judged::default();
        let (mut present, mut active) = (0_u32, 0_u32);
        let mut unhealthy = [0_u32; 2];
        for Seen { counts, is_present, .. } in seen.clone() {
            judged.counts.add(counts);
            judged.reporters += u32::from(counts.calls > 0);
            present += u32::from(is_present);
            active += u32::from(self.is_active(counts));
            let over = [Rate::Failures, Rate::Slow].map(|rate| self.is_over(rate, counts));
            judged.unhealthy += u32::from(over[0] || over[1]);
            unhealthy[0] += u32::from(over[0]);
            unhealthy[1] += u32::from(over[1]);
        }
        let least = if present >= 3 { 2 } else { 1 };
        let most = if all_are_known { active } else { u32::MAX };
        let quorum = self.breaker.min_reporters.min(most).max(least);
        // The calls of all are weighed only where there are enough who see the target failing: that is rare.
        let opens = |rate, unhealthy| {
            let is_over = |threshold| Pool::of(seen.clone(), self.breaker).is_over(rate, threshold);
            unhealthy >= quorum && self.threshold(rate).is_some_and(is_over)
        };
        judged.failing = opens(Rate::Failures, unhealthy[0]);
        judged.slow = opens(Rate::Slow, unhealthy[1]);
        judged
    }
}

/// All calls, of which each reporter has at most `most`.
#[derive(Default)]
struct Pool {
    most: u32,
    calls: u128,
    /// In parts of a call, of which there are 2^64, rounded up: so what is exactly a threshold reaches it, and
    /// so does what is below it by less than 2^-58 of a call.
    failures: u128,
    slow: u128,
}

impl Pool {
    fn of<'s>(seen: impl Iterator<Item = Seen<'s>>, breaker: &Breaker) -> Self {
        let mut pool = Self { most: breaker.min_calls, ..Self::default() };
        seen.for_each(|one| pool.add(one.counts));
        pool
    }

    fn add(&mut self, counts: Counts) {
        if counts.calls == 0 {
            return;
        }
        let weight = u128::from(counts.calls.min(self.most));
        let parts =
            |bad: u32| ((weight * u128::from(bad)) << 64).div_ceil(u128::from(counts.calls));
        self.calls += weight;
        self.failures += parts(counts.failures);
        self.slow += parts(counts.slow);
    }

    fn is_over(&self, rate: Rate, threshold: Share) -> bool {
        let bad = match rate {
            Rate::Failures => self.failures,
            Rate::Slow => self.slow,
        };
        let needed = (self.calls * u128::from(threshold.basis_points())) << 64;
        self.calls >= u128::from(self.most) && bad * 10_000 >= needed
    }
}

/// Who told is not known of calls that stand in a row.
fn judge_ring(ring: &Ring, breaker: &Breaker) -> Judged {
    let counts = ring.sum();
    let super::breaker::Window::Calls(most) = breaker.window else { return Judged::default() };
    let enough = counts.calls >= breaker.min_calls.min(most);
    let over = |bad: u32, rate: Share| enough && rate.is_reached(bad.into(), counts.calls.into());
    Judged {
        failing: over(counts.failures, breaker.failure_rate),
        slow: breaker.slow_rate().is_some_and(|rate| over(counts.slow, rate)),
        counts,
        ..Judged::default()
    }
}
