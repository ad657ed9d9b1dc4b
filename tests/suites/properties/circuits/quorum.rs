//! What opens a circuit, against the rule in plain fractions.

use fusebox_core::circuit::Phase;

use super::*;

/// A rule that [`Circuit`] keeps by other means.
struct Fleet<'a> {
    breaker: &'a Breaker,
    /// The circuit is there for longer than its window: whoever is there has told something.
    all_are_known: bool,
    told: &'a [(String, Counts)],
}

impl Fleet<'_> {
    fn reporters(&self) -> Vec<Counts> {
        let mut sums = BTreeMap::<&str, Counts>::new();
        for (id, counts) in self.told {
            let sum = sums.entry(id).or_default();
            sum.calls += counts.calls;
            sum.failures += counts.failures;
            sum.slow += counts.slow;
        }
        sums.into_values().collect()
    }

    fn is_over(&self, rate: Share, bad: impl Fn(&Counts) -> u32) -> bool {
        let over = |part: u128, whole: u128| {
            whole > 0 && part * 10_000 >= u128::from(rate.basis_points()) * whole
        };
        let sum = |of: &[&Counts], count: &dyn Fn(&Counts) -> u32| {
            of.iter().map(|one| u128::from(count(one))).sum::<u128>()
        };
        let least = u128::from(self.breaker.min_calls);
        let floor = (self.breaker.min_calls / 10).max(2);
        let reporters = self.reporters();
        let calling = reporters.iter().filter(|one| one.calls > 0);
        let (large, small): (Vec<_>, Vec<_>) = calling.partition(|one| one.calls >= floor);

        let small_speak = sum(&small, &|one| one.calls) >= floor.into();
        let active = large.len() + if small_speak { small.len() } else { 0 };
        let mut unhealthy =
            large.iter().filter(|one| over(bad(one).into(), one.calls.into())).count();
        let bad_of_small = sum(&small, &bad);
        if small_speak && bad_of_small >= 2 && over(bad_of_small, sum(&small, &|one| one.calls)) {
            unhealthy += small.iter().filter(|one| bad(one) > 0).count();
        }
        let most = if self.all_are_known { active } else { usize::MAX };
        let quorum = (self.breaker.min_reporters as usize).min(most);
        let quorum = quorum.max(if reporters.len() >= 3 { 2 } else { 1 });

        // In parts of a call, of which each has as many as it takes to divide by anybody's calls.
        let all: Vec<_> = large.into_iter().chain(small).collect();
        let parts: u128 = all.iter().map(|one| u128::from(one.calls)).product();
        let (mut calls, mut failed) = (0, 0);
        for one in &all {
            let weight = u128::from(one.calls).min(least);
            calls += weight * parts;
            failed += weight * u128::from(bad(one)) * (parts / u128::from(one.calls));
        }
        unhealthy >= quorum && calls >= least * parts && over(failed, calls)
    }

    fn judge(&self) -> (bool, bool) {
        let slow = self.breaker.slow_call.map(|slow| slow.rate);
        let is_slow = slow.is_some_and(|rate| self.is_over(rate, |one| one.slow));
        (self.is_over(self.breaker.failure_rate, |one| one.failures), is_slow)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn it_opens_as_the_rule_in_fractions_says(
        rates in (shares(), prop::option::of(shares())),
        min_calls in prop_oneof![1..40_u32, Just(20)],
        min_reporters in 1..5_u32,
        all_are_known: bool,
        told in vec((0..10_u8, prop_oneof![counted(9), counted(1)]), 1..24),
    ) {
        let (failure_rate, slow_rate) = rates;
        let slow_call = slow_rate.map(|rate| SlowCall { over: millis(100), rate });
        let settings =
            Settings { failure_rate, slow_call, min_calls, min_reporters, ..Settings::default() };
        let breaker = Breaker::new(settings).unwrap();
        let told: Vec<_> = told.into_iter().map(|(id, counts)| (id.to_string(), counts)).collect();

        let mut opens = World::new(breaker.clone(), true);
        let mut notes = World::new(breaker.clone(), true);
        let age = if all_are_known { Duration::from_secs(10) } else { Duration::ZERO };
        let now = opens.newest.after(age);
        let order = Order {
            mode: Mode::MetricsOnly,
            ttl: Duration::from_secs(60),
            reason: "".into(),
            actor: "".into(),
        };
        notes.turn(now, |circuit, turn| circuit.set(&order, turn));
        let mut exceeded = (false, false);
        for until in 1..=told.len() {
            let fleet = Fleet { breaker: &breaker, all_are_known, told: &told[..until] };
            let (failing, slow) = fleet.judge();
            exceeded = (exceeded.0 || failing, exceeded.1 || slow);
            let (reporter, counts) = &told[until - 1];
            let delta = Delta { counts: *counts, ..Delta::default() };
            for world in [&mut opens, &mut notes] {
                let generation = world.circuit.generation();
                world.turn(now, |circuit, turn| {
                    circuit.report(generation, delta, by(reporter), turn)
                });
            }
            let found = notes.circuit.exceeded();
            prop_assert_eq!((found.failures, found.slow), exceeded);
            let phase = if exceeded == (false, false) { Phase::Closed } else { Phase::Open };
            prop_assert_eq!(opens.circuit.phase(), phase);
        }
    }
}
