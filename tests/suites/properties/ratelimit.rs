//! Envoy's requests, against a counter of thirty lines.

use std::{collections::HashMap, sync::Arc, time::Duration};

use fusebox_server::{
    app::{App, Descriptor, Principal, RatelimitRequest},
    clock::Clock,
    config::envoy::Unit,
    storage::{Answer, journal::Nothing},
};
use fusebox_tests::{ManualClock, panel};
use proptest::{collection::vec, prelude::*};

/// What a descriptor wants of the rule of one key, or by a limit that it carries.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    value: usize,
    hits: u64,
    negative: bool,
    limit: Option<u32>,
}

/// Whether it is over the limit, and what is left.
type Told = (bool, u64);

/// A fixed window for each value, as envoyproxy/ratelimit counts: what is denied counts as well.
struct Reference {
    limit: u64,
    /// By value and by whether it is judged by a limit that a request carries: a window and what it has counted.
    counts: HashMap<(usize, bool), (u64, u64)>,
}

impl Reference {
    fn tell(&mut self, wanted: &Wanted, window: u64) -> Told {
        let count = self.counts.entry((wanted.value, wanted.limit.is_some())).or_default();
        if count.0 != window {
            *count = (window, 0);
        }
        count.1 = match wanted.negative {
            true => count.1.saturating_sub(wanted.hits),
            false => count.1.saturating_add(wanted.hits),
        };
        let limit = wanted.limit.map_or(self.limit, u64::from);
        (count.1 > limit, limit.saturating_sub(count.1))
    }
}

const VALUES: [&str; 3] = ["a", "b", "c"];

fn wanted() -> impl Strategy<Value = Wanted> {
    let hits = prop_oneof![4 => 0..4_u64, 1 => 0..30_u64, 1 => u64::MAX - 2..];
    let limit = prop::option::weighted(0.3, prop_oneof![0..12_u32, Just(u32::MAX)]);
    let negative = prop::bool::weighted(0.2);
    (0..VALUES.len(), hits, negative, limit).prop_map(|(value, hits, negative, limit)| Wanted {
        value,
        hits,
        negative,
        limit,
    })
}

/// Requests with the pause before each, in hundredths of the unit.
fn histories() -> impl Strategy<Value = Vec<(u32, Vec<Wanted>)>> {
    let pause = prop_oneof![3 => Just(0), 2 => 0..60_u32, 1 => 95..105_u32, 1 => 0..300_u32];
    vec((pause, vec(wanted(), 1..5)), 1..40)
}

fn app(unit: Unit, limit: u32, settings: &str) -> (App, Arc<ManualClock>) {
    let clock = Arc::default();
    let rate_limit = format!("rate_limit: {{unit: {}, requests_per_unit: {limit}}}", unit.name());
    let file = format!("domain: rl\ndescriptors: [{{key: user, {rate_limit}}}]");
    let rules = panel::ruleset(settings, &file);
    let (app, _) = panel::app_of_rules(Nothing::open(), &rules, &clock).unwrap();
    (app, clock)
}

/// Whether the request is over a limit, and what each descriptor is told.
fn ask(app: &App, unit: Unit, wanted: &[Wanted]) -> (bool, Vec<Told>) {
    let descriptors = wanted.iter().map(|wanted| Descriptor {
        entries: std::iter::once(("user", VALUES[wanted.value])),
        limit: wanted.limit.map(|limit| (limit, unit)),
        hits: wanted.hits,
        negative: wanted.negative,
    });
    let request = RatelimitRequest { domain: "rl", descriptors };
    let caller = app.caller(Principal::Anonymous);
    let answer = app.should_rate_limit(caller, request, |limited| {
        let told = limited.statuses.iter().map(|status| (status.over, status.remaining));
        (limited.over, told.collect())
    });
    let Ok(Answer::Now(told)) = answer else { panic!("nothing is kept, so nothing is waited for") };
    told
}

fn units() -> impl Strategy<Value = Unit> {
    prop::sample::select(&Unit::ALL[..])
}

/// Nothing but a look at each value.
fn left(app: &App, unit: Unit) -> Vec<Told> {
    let peek = |value| Wanted { value, hits: 0, negative: false, limit: None };
    ask(app, unit, &[peek(0), peek(1), peek(2)]).1
}

/// What is told as the time until all is left again.
fn reset_after(app: &App, unit: Unit) -> Duration {
    let entries = std::iter::once(("user", VALUES[0]));
    let peek = Descriptor { entries, limit: None, hits: 0, negative: false };
    let request = RatelimitRequest { domain: "rl", descriptors: std::iter::once(peek) };
    let caller = app.caller(Principal::Anonymous);
    let answer = app.should_rate_limit(caller, request, |limited| limited.statuses[0].reset_after);
    let Ok(Answer::Now(reset_after)) = answer else { panic!("of {unit:?}") };
    reset_after
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_request_is_told_what_thirty_lines_tell(
        unit in units(),
        limit in prop_oneof![0..12_u32, Just(u32::MAX)],
        history in histories(),
    ) {
        let (app, clock) = app(unit, limit, "");
        let mut reference = Reference { limit: limit.into(), counts: HashMap::new() };
        for (pause, wanted) in history {
            clock.advance(unit.per() * pause / 100);
            let window = (clock.wall().as_nanos() / unit.per().as_nanos()) as u64;
            let expected: Vec<_> = wanted.iter().map(|one| reference.tell(one, window)).collect();
            let over = expected.iter().any(|(over, _)| *over);
            prop_assert_eq!(ask(&app, unit, &wanted), (over, expected), "{:?}", wanted);
        }
    }

    /// Whatever counts, and in whichever order the same is asked for twice.
    #[test]
    fn all_or_nothing_charges_what_passes_and_nothing_else(
        unit in units(),
        limit in 0..12_u32,
        algorithm in prop::sample::select(&["fixed_window", "token_bucket", "sliding_window"][..]),
        requests in vec(vec((0..VALUES.len(), 0..6_u64), 1..5), 1..20),
    ) {
        let settings = format!("domains: {{rl: {{charge: all_or_nothing, algorithm: {algorithm}}}}}");
        let (app, _clock) = app(unit, limit, &settings);
        let mut spent = [0; VALUES.len()];
        for request in requests {
            let wanted: Vec<_> = request
                .iter()
                .map(|&(value, hits)| Wanted { value, hits, negative: false, limit: None })
                .collect();
            let (over, told) = ask(&app, unit, &wanted);
            prop_assert_eq!(over, told.iter().any(|(over, _)| *over));
            if !over {
                request.iter().for_each(|(value, hits)| spent[*value] += hits);
            }
            let remaining: Vec<_> = left(&app, unit).iter().map(|(_, left)| *left).collect();
            let expected = spent.map(|spent| u64::from(limit) - spent);
            prop_assert_eq!(remaining, expected, "{:?} was over: {}", wanted, over);
        }
    }

    /// A wall clock that people set back grants no window twice, and locks nobody out for good.
    #[test]
    fn a_clock_that_is_set_back_grants_nothing_twice(
        unit in units(),
        limit in 1..12_u32,
        back in 0..3_600_u64,
    ) {
        let (app, clock) = app(unit, limit, "");
        let all = Wanted { value: 0, hits: limit.into(), negative: false, limit: None };
        prop_assert_eq!(ask(&app, unit, &[all]), (false, vec![(false, 0)]));
        clock.turn_wall_back(Duration::from_secs(back));
        prop_assert_eq!(left(&app, unit)[0], (false, 0));
        prop_assert!(reset_after(&app, unit) <= unit.per());
        // Once it is past the window for good: it comes through it once more.
        clock.advance(unit.per() * 2 + Duration::from_secs(back));
        prop_assert_eq!(left(&app, unit)[0], (false, limit.into()));
    }
}
