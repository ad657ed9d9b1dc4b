//! What it takes to open a closed circuit: every small fleet, and what each of its reporters told.
//!
//! The rule that is judged is [`Fleet::opens`]; the judges only look at what was told and by how many.

/// A rule that is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// The pool alone decides.
    NoQuorum,
    /// One who fails is enough if no others are active now, however many were just before.
    OnlyTheActiveCount,
    /// A single call makes a reporter active.
    NoFloor,
    /// Reporters below the floor are nobody, however many they are.
    FewCallsAreNone,
    /// One failed call of a reporter below the floor makes it unhealthy, if there is one more call.
    OneFailureIsEnough,
    /// Who is unhealthy by either rate counts, whichever of them the pool is over.
    RatesAreOne,
    /// Each reporter weighs what it told.
    NoClamp,
    /// What a reporter told stays when it says goodbye.
    GoodbyesAreKept,
    /// A reporter that said goodbye still makes the fleet look large.
    GoodbyesAreRecent,
}

/// What a call may be too often.
#[derive(Clone, Copy, Debug)]
enum Rate {
    Failed,
    Slow,
}

/// Each rate that opens is a half, inclusive.
fn over(bad: u64, calls: u64) -> bool {
    2 * bad >= calls
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Reporter {
    successes: u64,
    failures: u64,
    /// More that succeeded, slowly.
    slow: u64,
    gone: bool,
}

impl Reporter {
    const fn told(successes: u64, failures: u64) -> Self {
        Self { successes, failures, slow: 0, gone: false }
    }

    fn calls(self) -> u64 {
        self.successes + self.failures + self.slow
    }

    fn bad(self, rate: Rate) -> u64 {
        match rate {
            Rate::Failed => self.failures,
            Rate::Slow => self.slow,
        }
    }
}

/// A circuit's reporters of the last minute, all that they told in its window.
#[derive(Clone, Debug)]
struct Fleet {
    broken: Broken,
    min_calls: u64,
    min_reporters: usize,
    reporters: Vec<Reporter>,
}

impl Fleet {
    fn floor(&self) -> u64 {
        if self.broken == Broken::NoFloor { 1 } else { (self.min_calls / 10).max(2) }
    }

    fn known(&self) -> impl Iterator<Item = Reporter> {
        let kept = self.broken == Broken::GoodbyesAreKept;
        self.reporters.iter().copied().filter(move |one| kept || !one.gone)
    }

    /// How many are active.
    fn active(&self) -> usize {
        let (large, small) = self.by_size();
        large.len() + if self.small_count(&small) { small.len() } else { 0 }
    }

    fn by_size(&self) -> (Vec<Reporter>, Vec<Reporter>) {
        let calling = self.known().filter(|one| one.calls() > 0);
        calling.partition(|one| one.calls() >= self.floor())
    }

    /// Whether those below the floor make as many calls together as one that is active.
    fn small_count(&self, small: &[Reporter]) -> bool {
        let calls = small.iter().map(|one| one.calls()).sum::<u64>();
        calls >= self.floor() && self.broken != Broken::FewCallsAreNone
    }

    fn is_unhealthy(&self, one: Reporter, rate: Rate) -> bool {
        if one.calls() >= self.floor() {
            return over(one.bad(rate), one.calls());
        }
        let (_, small) = self.by_size();
        let calls = small.iter().map(|one| one.calls()).sum();
        let bad = small.iter().map(|one| one.bad(rate)).sum();
        let enough = bad >= 2 || self.broken == Broken::OneFailureIsEnough;
        self.small_count(&small) && one.bad(rate) > 0 && enough && over(bad, calls)
    }

    fn unhealthy(&self, rate: Rate) -> usize {
        let unhealthy = |one: &Reporter| match self.broken {
            Broken::RatesAreOne => {
                self.is_unhealthy(*one, Rate::Failed) || self.is_unhealthy(*one, Rate::Slow)
            }
            _ => self.is_unhealthy(*one, rate),
        };
        self.known().filter(unhealthy).count()
    }

    /// Whether all together are over a rate, each weighing no more than the least calls that any verdict takes.
    fn pool_is_over(&self, rate: Rate) -> bool {
        // In parts of a call, so that the ratio is kept.
        let whole = |one: &Reporter| one.calls().max(1);
        let parts = self.known().map(|one| whole(&one)).product::<u64>();
        let (mut bad, mut calls) = (0, 0);
        for one in self.known() {
            let weight = match self.broken {
                Broken::NoClamp => one.calls(),
                _ => one.calls().min(self.min_calls),
            };
            bad += weight * one.bad(rate) * (parts / whole(&one));
            calls += weight * parts;
        }
        calls >= self.min_calls * parts && over(bad, calls)
    }

    fn opens(&self) -> bool {
        let recent = match self.broken {
            Broken::OnlyTheActiveCount => self.active(),
            Broken::GoodbyesAreRecent => self.reporters.len(),
            _ => self.known().count(),
        };
        let least = if recent >= 3 { 2 } else { 1 };
        let quorum = match self.broken {
            Broken::NoQuorum => 0,
            _ => self.min_reporters.min(self.active()).max(least),
        };
        let opens = |rate| self.pool_is_over(rate) && self.unhealthy(rate) >= quorum;
        opens(Rate::Failed) || opens(Rate::Slow)
    }
}

/// Each multiset of up to so many reporters with up to three calls each, or just one that said goodbye.
fn all_reporters(most: usize, some_are_slow: bool) -> Vec<Vec<Reporter>> {
    let mut kinds = vec![Reporter { gone: true, ..Reporter::told(0, 3) }];
    for calls in 0..=3 {
        for slow in 0..=if some_are_slow { calls } else { 0 } {
            let told = |failures| Reporter::told(calls - slow - failures, failures);
            kinds.extend((0..=calls - slow).map(|failures| Reporter { slow, ..told(failures) }));
        }
    }
    let mut all = vec![Vec::new()];
    let mut longest = all.clone();
    for _ in 0..most {
        let longer = |reporters: &Vec<Reporter>| {
            let from = reporters.last().and_then(|last| kinds.iter().position(|one| one == last));
            let with = |kind: &Reporter| [&reporters[..], &[*kind]].concat();
            kinds[from.unwrap_or(0)..].iter().map(with).collect::<Vec<_>>()
        };
        longest = longest.iter().flat_map(longer).collect();
        all.extend(longest.iter().cloned());
    }
    all
}

fn all_fleets(broken: Broken) -> impl Iterator<Item = Fleet> {
    let settings = [(1, 1), (1, 2), (2, 2), (4, 2), (2, 3), (4, 3), (10, 3)];
    let all = [all_reporters(5, false), all_reporters(3, true)].concat();
    settings.into_iter().flat_map(move |(min_calls, min_reporters)| {
        let fleet = move |reporters| Fleet { broken, min_calls, min_reporters, reporters };
        all.clone().into_iter().map(fleet)
    })
}

/// The first fleet that a judge finds something wrong with.
fn wrong(broken: Broken, judge: impl Fn(&Fleet) -> bool) -> Option<Fleet> {
    let found = all_fleets(broken).find(judge);
    println!("{broken:?}: {found:?}");
    found
}

/// Opened, though of three or more that reported of late no two ever told of a failure, nor of a slow call.
fn opened_by_one(fleet: &Fleet) -> bool {
    let here = || fleet.reporters.iter().filter(|one| !one.gone);
    let two = |rate| here().filter(|one| one.bad(rate) > 0).count() >= 2;
    fleet.opens() && here().count() >= 3 && !two(Rate::Failed) && !two(Rate::Slow)
}

/// Opened by who is not there any more: without that there is no failure.
fn opened_by_the_gone(fleet: &Fleet) -> bool {
    fleet.opens() && fleet.reporters.iter().all(|one| one.gone || one.failures + one.slow == 0)
}

/// Another verdict if one reporter had made ten times the calls that it made, with the same share of failures.
fn opened_by_the_loud(fleet: &Fleet) -> bool {
    (0..fleet.reporters.len()).any(|index| {
        let mut louder = fleet.clone();
        let enough = louder.reporters[index].calls() >= fleet.min_calls.max(fleet.floor());
        let Reporter { successes, failures, slow, .. } = &mut louder.reporters[index];
        (*successes, *failures, *slow) = (*successes * 10, *failures * 10, *slow * 10);
        enough && louder.opens() != fleet.opens()
    })
}

/// Opened by one reporter and a single call that failed for another, while all others are well.
fn opened_by_one_and_a_call(fleet: &Fleet) -> bool {
    let failing = || fleet.known().filter(|one| one.failures + one.slow > 0);
    let single = failing().filter(|one| one.calls() == 1).count() == 1;
    fleet.opens() && fleet.known().count() >= 3 && failing().count() == 2 && single
}

/// Closed, though the only one that is left makes calls enough, and each fails.
fn not_opened_by_the_last(fleet: &Fleet) -> bool {
    let here: Vec<_> = fleet.reporters.iter().filter(|one| !one.gone).collect();
    let enough = |one: &Reporter| one.failures >= fleet.min_calls.max(2) && one.successes == 0;
    here.len() == 1 && enough(here[0]) && !fleet.opens()
}

fn fleet(min_calls: u64, min_reporters: usize, reporters: &[Reporter]) -> Fleet {
    Fleet { broken: Broken::Nothing, min_calls, min_reporters, reporters: reporters.to_vec() }
}

#[test]
fn no_small_fleet_is_opened_by_one_of_three_or_by_the_gone_or_by_the_loud() {
    assert!(wrong(Broken::Nothing, opened_by_one).is_none());
    assert!(wrong(Broken::Nothing, opened_by_one_and_a_call).is_none());
    assert!(wrong(Broken::Nothing, opened_by_the_gone).is_none());
    assert!(wrong(Broken::Nothing, opened_by_the_loud).is_none());
    assert!(wrong(Broken::Nothing, not_opened_by_the_last).is_none());
    assert!(all_fleets(Broken::Nothing).count() > 30_000);
}

#[test]
fn every_rule_is_needed() {
    assert!(wrong(Broken::NoQuorum, opened_by_one).is_some());
    assert!(wrong(Broken::OnlyTheActiveCount, opened_by_one).is_some());
    assert!(wrong(Broken::RatesAreOne, opened_by_one).is_some());
    assert!(wrong(Broken::NoClamp, opened_by_the_loud).is_some());
    assert!(wrong(Broken::GoodbyesAreKept, opened_by_the_gone).is_some());
    assert!(wrong(Broken::GoodbyesAreRecent, not_opened_by_the_last).is_some());
    let ten =
        Fleet { broken: Broken::FewCallsAreNone, ..fleet(10, 2, &[Reporter::told(0, 1); 10]) };
    assert!(!ten.opens());
    assert!(wrong(Broken::NoFloor, opened_by_one_and_a_call).is_some());
    assert!(wrong(Broken::OneFailureIsEnough, opened_by_one_and_a_call).is_some());
}

#[test]
fn ten_reporters_with_one_failed_call_each_open_it() {
    for min_reporters in 1..=10 {
        assert!(fleet(10, min_reporters, &[Reporter::told(0, 1); 10]).opens());
        assert!(!fleet(10, min_reporters, &[Reporter::told(0, 1); 9]).opens(), "too few calls");
    }
}

/// While the eight make calls at all: of those who make none it is not known whether they would fail, too.
#[test]
fn two_of_ten_that_fail_hard_leave_it_closed_for_a_quorum_of_three() {
    for failures in [1, 2, 10, 1_000] {
        for successes in 0..=3 {
            let mut reporters = vec![Reporter::told(successes, 0); 8];
            reporters.extend([Reporter::told(0, failures); 2]);
            let idle = successes == 0 && failures >= 10;
            assert_eq!(fleet(10, 3, &reporters).opens(), idle, "{failures} and {successes}");
        }
    }
}

#[test]
fn one_opens_it_alone_if_no_two_others_are_there() {
    let failing = Reporter::told(0, 10);
    assert!(fleet(10, 2, &[failing]).opens());
    // Who is idle, or has next to no calls, is not asked; with two such there is a fleet.
    for other in [Reporter::told(0, 0), Reporter::told(1, 0)] {
        assert!(fleet(10, 2, &[failing, other]).opens());
        assert!(!fleet(10, 2, &[failing, other, other]).opens());
    }
    assert!(!fleet(10, 2, &[failing, Reporter::told(2, 0)]).opens());
    assert!(fleet(10, 1, &[failing, Reporter::told(2, 0)]).opens());
}

/// Each pod of a bad release fails, says goodbye and comes again under another id.
#[test]
fn a_rolling_deploy_of_pods_that_fail_and_die_leaves_it_closed() {
    let opened = |broken, gone| {
        let mut fleet = Fleet { broken, ..fleet(10, 2, &[Reporter::told(3, 0); 3]) };
        (0..10).any(|_| {
            fleet.reporters.push(Reporter::told(0, 10));
            let opens = fleet.opens();
            fleet.reporters.last_mut().unwrap().gone = gone;
            opens
        })
    };
    assert!(!opened(Broken::Nothing, true));
    assert!(opened(Broken::GoodbyesAreKept, true));
    // Pods that are killed say no goodbye: two in one window are a quorum of two.
    assert!(opened(Broken::Nothing, false));
}

#[test]
fn the_order_of_reporters_does_not_matter() {
    for mut fleet in all_fleets(Broken::Nothing) {
        let opens = fleet.opens();
        for _ in 0..fleet.reporters.len() {
            fleet.reporters.rotate_left(1);
            assert_eq!(fleet.opens(), opens, "{fleet:?}");
        }
        fleet.reporters.reverse();
        assert_eq!(fleet.opens(), opens, "{fleet:?}");
    }
}

/// Each report is looked at as it comes: what opens it need not be a failure, and it stays open whatever comes
/// after.
#[test]
fn a_success_can_open_it_and_a_failure_could_have_kept_it_closed() {
    assert!(!fleet(2, 1, &[Reporter::told(0, 1)]).opens());
    assert!(fleet(2, 1, &[Reporter::told(1, 1)]).opens());
    let failing = Reporter::told(0, 4);
    let two = [failing, Reporter::told(1, 0)];
    assert!(fleet(4, 3, &two).opens());
    assert!(!fleet(4, 3, &[two[0], two[1], Reporter::told(0, 1)]).opens());
}
