//! Instructions of one decision, beside the crate `governor`: counted by valgrind, so that no neighbour
//! changes them.
//!
//! Each decision runs N and 2 N times in a process of its own, counted inside [`repeat`] only, where no clock is
//! calibrated; the difference is what N of them take.

use std::{
    env, fs,
    hint::black_box,
    num::NonZeroU32,
    pin::pin,
    process::Command,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use clap::ValueEnum;
use fusebox_core::{
    Ask, Charging, Concurrency, Decision, Limit, Moment, Policy, RetryBudget, Rule, Rules,
    SlidingWindow, Time, TokenBucket, Wall, Window, WindowLimit,
    circuit::{Call, Generation, LATENCIES, Outcome},
};
use fusebox_server::{
    app::{
        self, Acquire, App, Caller, Client, Delta, Descriptor, Entry, Granted, Principal, Priority,
        RatelimitRequest, Ratelimited, Report, Reported, Told,
    },
    catalogue::{Budget, Catalogue, CellHasher, Domains, Limiter, LimiterNumber, PolicyName},
    clock::{Clock, SystemClock},
    config::{Config, envoy::files},
    lifecycle::Lifecycle,
    storage::{Answer, CellAsk, Charge, Decided, Embedded, Keeping, Storage},
};
use fusebox_tests::panel::app;
use governor::{
    Quota, RateLimiter,
    clock::{self, DefaultClock, FakeRelativeClock},
    middleware::NoOpMiddleware,
    state::keyed::HashMapStateStore,
};

use crate::{
    Result, print,
    rules::{self, Others},
    table::{Table, figure},
};

/// N: whatever happens once, such as a table that grows, is a small part of it.
const TIMES: usize = 100_000;

/// Keys in turn, as many as fit the caches.
const KEYS: usize = 1_000;

const LIMIT: u32 = 1_000_000_000;
const PER: Duration = Duration::from_secs(24 * 60 * 60);

/// Life of a permit, and of what a retry budget remembers.
const TTL: Duration = Duration::from_secs(10);

/// Rules of a file that has many.
const MANY: u32 = 10_000;

/// Settings of Envoy's rate limit service, where no folder is read.
const RATELIMIT: &str = "envoy_ratelimit: {config_dir: none}";

/// What is asked of the app by name, and told to it.
const POLICIES: &str = "
namespaces:
  bench:
    policies:
      slow: {token_bucket: {limit: 1000000000, per: 1d}}
      target: {breaker: {}}
";

/// Reporters of a circuit, where there are as many as are told apart.
const REPORTERS: usize = 32;

/// Latency that is told of calls: one bucket of a delta's.
const LATENCY: Duration = Duration::from_millis(10);
const LATENCY_BUCKET: usize = 13;

/// Time that passes between two decisions.
const STEP: Duration = Duration::from_micros(1);

/// Whose decision.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum What {
    /// Nothing: what the loop itself takes.
    Nothing,
    /// The core's, on a cell at hand: of a token bucket.
    Core,
    /// Of a fixed window.
    CoreFixed,
    /// Of a window of a calendar that is looked up already.
    CoreCalendar,
    /// Of a sliding window.
    CoreSliding,
    /// Of permits.
    CorePermits,
    /// Of a retry budget.
    CoreRetries,
    /// Of a token bucket that only watches.
    CoreShadow,
    /// Of a policy of three limits.
    CoreThree,
    /// The server's storage: names the cell, locks, finds, decides, writes back.
    Embedded,
    /// The same, of a policy of three limits.
    EmbeddedThree,
    /// As of one limit, and the server's clock.
    EmbeddedClock,
    /// The rule of a descriptor and its bucket, of 10 rules.
    Rule,
    /// Of 10,000.
    RuleOfMany,
    /// Of 10,000 that end with a star.
    RuleOfPrefixes,
    /// All that a request of one descriptor to Envoy's rate limit service is.
    Ratelimit,
    /// The same, of three descriptors.
    RatelimitThree,
    /// All that an Acquire of a limiter is.
    AcquireLimiter,
    /// The same, of a circuit that is closed.
    AcquireCircuit,
    /// The same, of both.
    AcquireBoth,
    /// The id of a call through a circuit, as it is written and read again.
    Id,
    /// All that a Report of one outcome is, of a call through a closed circuit of one reporter.
    Outcome,
    /// The same, of many reporters.
    OutcomeOfMany,
    /// The same, of 100 outcomes.
    Outcomes,
    /// All that a Report of one delta is, of one call.
    DeltaOne,
    /// The same, of 100.
    DeltaHundred,
    /// The same, of 10,000.
    DeltaMany,
    /// The same, of 10,000 and many reporters.
    DeltaOfMany,
    /// `governor`, by a clock that is a number.
    Governor,
    /// `governor`, by its default clock.
    GovernorClock,
}

impl What {
    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "the loop",
            Self::Core => "`fusebox_core::apply_to`, the cell at hand: token bucket",
            Self::CoreFixed => "the same: fixed window",
            Self::CoreCalendar => "the same: calendar window",
            Self::CoreSliding => "the same: sliding window",
            Self::CorePermits => "the same: concurrency",
            Self::CoreRetries => "the same: retry budget",
            Self::CoreShadow => "the same: token bucket that only watches",
            Self::CoreThree => "the same: token bucket, fixed and sliding window together",
            Self::Embedded => "`Embedded::apply`, with the hash of the key",
            Self::EmbeddedThree => "the same: token bucket, fixed and sliding window together",
            Self::EmbeddedClock => "`Embedded::apply`, with the hash of the key and a clock read",
            Self::Rule => "`Domain::rule` and `Rule::key`, 10 rules",
            Self::RuleOfMany => "the same: 10,000 rules",
            Self::RuleOfPrefixes => "the same: 10,000 rules of one key, each of another prefix",
            Self::Ratelimit => "`App::should_rate_limit`, 1 descriptor",
            Self::RatelimitThree => "the same: 3 descriptors",
            Self::AcquireLimiter => "`App::acquire`, a token bucket",
            Self::AcquireCircuit => "the same: a closed circuit",
            Self::AcquireBoth => "the same: a token bucket and a closed circuit",
            Self::Id => "the id of a call through a circuit, written and read",
            Self::Outcome => "`App::report`, 1 outcome of a circuit of 1 reporter",
            Self::OutcomeOfMany => "the same: 32 reporters",
            Self::Outcomes => "the same: 100 outcomes, 1 reporter",
            Self::DeltaOne => "`App::report`, a delta of 1 call, 1 reporter",
            Self::DeltaHundred => "the same: 100 calls",
            Self::DeltaMany => "the same: 10,000 calls",
            Self::DeltaOfMany => "the same: 10,000 calls, 32 reporters",
            Self::Governor => "`governor` `check_key`, fake clock",
            Self::GovernorClock => "`governor` `check_key`, default clock",
        }
    }

    /// How often it is counted: what takes longest less often.
    fn times(self) -> usize {
        match self {
            Self::OutcomeOfMany | Self::DeltaOfMany => TIMES / 10,
            Self::Outcomes => TIMES / 100,
            _ => TIMES,
        }
    }

    /// What it is compared with: the same work, as far as there is the same.
    fn twin(self) -> Option<Self> {
        match self {
            Self::EmbeddedClock => Some(Self::GovernorClock),
            Self::Nothing | Self::Rule | Self::RuleOfMany | Self::RuleOfPrefixes => None,
            Self::Id => None,
            Self::Governor | Self::GovernorClock => None,
            _ => Some(Self::Governor),
        }
    }

    /// The limits of the policy that is asked, which has enough of all.
    fn limits(self) -> Result<Vec<Limit>> {
        let bucket = Limit::TokenBucket(TokenBucket::new(LIMIT.into(), PER, LIMIT.into())?);
        let fixed = Limit::Window(WindowLimit::fixed(LIMIT.into(), PER)?);
        let sliding = Limit::SlidingWindow(SlidingWindow::new(LIMIT.into(), PER)?);
        Ok(match self {
            Self::CoreFixed => vec![fixed],
            Self::CoreCalendar => vec![Limit::Window(WindowLimit::calendar(LIMIT.into(), PER)?)],
            Self::CoreSliding => vec![sliding],
            Self::CorePermits => vec![Limit::Concurrency(Concurrency::new(LIMIT.into(), TTL)?)],
            Self::CoreRetries => vec![Limit::RetryBudget(RetryBudget::new(200, 10, TTL)?)],
            Self::CoreThree | Self::EmbeddedThree => vec![bucket, fixed, sliding],
            _ => vec![bucket],
        })
    }

    /// What is asked of each of them.
    fn ask(self) -> Ask {
        let day = Window { start: Wall::from_nanos(0), end: Wall::from_nanos(0).after(PER) };
        Ask { window: (self == Self::CoreCalendar).then_some(day), ..Ask::spend(1) }
    }
}

pub(crate) fn measure() -> Result<()> {
    let mut counted = Vec::new();
    for what in What::value_variants() {
        eprintln!("counting instructions: {}", what.name());
        let times = what.times();
        let count = instructions(*what, 2 * times)? - instructions(*what, times)?;
        counted.push((*what, count / times as f64));
    }
    let of =
        |wanted| counted.iter().find(|(what, _)| *what == wanted).map_or(0.0, |(_, count)| *count);
    let overhead = of(What::Nothing);
    let columns = ["decision", "instructions", "to governor's"];
    let mut table =
        Table::new(&format!("Instructions of one decision, {KEYS} keys in turn"), &columns);
    for (what, count) in counted.iter().filter(|(what, _)| *what != What::Nothing) {
        let own = count - overhead;
        let ratio = what.twin().map(|twin| figure(own / (of(twin) - overhead)));
        table.row([what.name().to_owned(), figure(own), ratio.unwrap_or_else(|| "–".into())]);
    }
    table.note(
        "Counted by callgrind, less the loop's own. `governor` (GCRA, one atomic word for each key, behind its one locked \
         hash map) says yes or no; ours also tells limit, remaining and the wait until full, and remembers open estimates. \
         The core alone finds no cell and locks nothing. What a proxy asks is found by its rule, decided as an ask is, \
         counted and told; no message is read or written. Nor is one for what is asked of the app and told to it.",
    );
    print(&table.take_text())
}

fn instructions(what: What, times: usize) -> Result<f64> {
    let name = what.to_possible_value().ok_or("no name")?;
    let run = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg("--toggle-collect=*::decide::repeat")
        .arg(env::current_exe()?)
        .args(["decide", name.get_name(), &times.to_string()])
        .output()
        .map_err(|error| format!("valgrind: {error}"))?;
    let told = String::from_utf8_lossy(&run.stderr);
    let count = told.lines().find_map(|line| line.split_once("Collected :"));
    let (_, count) = count.ok_or_else(|| format!("valgrind: {told}"))?;
    match count.trim().parse()? {
        // The loop itself takes some.
        0.0 => Err("valgrind did not find the function to count in".into()),
        count => Ok(count),
    }
}

/// Decides so many times.
pub(crate) fn run(what: What, times: usize) -> Result<()> {
    let keys: Vec<String> = (0..KEYS).map(|key| format!("tenant-{key:07}")).collect();
    let each = |decide: &mut dyn FnMut(usize, &String)| {
        // The first round makes the cells.
        keys.iter().enumerate().for_each(|(index, key)| decide(index, key));
        repeat(times, &keys, decide);
    };
    let limits = what.limits()?;
    let policies: Vec<_> = limits.into_iter().map(|limit| Policy::new(limit, 0)).collect();
    let mut passed = Duration::ZERO;
    let mut passes = move || {
        passed += STEP;
        at(passed)
    };
    match what {
        What::Nothing => each(&mut |_, key| {
            black_box(key);
        }),
        What::Embedded | What::EmbeddedThree => embedded(&policies, each, passes),
        What::EmbeddedClock => {
            let clock = SystemClock::default();
            embedded(&policies, each, || at(clock.monotonic()));
        }
        What::Rule => rule(&rules::file(10, Others::Exact), each)?,
        What::RuleOfMany => rule(&rules::file(MANY, Others::Exact), each)?,
        What::RuleOfPrefixes => rule(&rules::file(MANY, Others::Prefixes), each)?,
        What::Ratelimit => ratelimit(1, each, passes)?,
        What::RatelimitThree => ratelimit(3, each, passes)?,
        What::AcquireLimiter => acquire(&["slow"], each, passes),
        What::AcquireCircuit => acquire(&["target"], each, passes),
        What::AcquireBoth => acquire(&["slow", "target"], each, passes),
        What::Id => id(each, at(STEP)),
        What::Outcome => report(Telling::Outcomes(1), 1, each, passes),
        What::OutcomeOfMany => report(Telling::Outcomes(1), REPORTERS, each, passes),
        What::Outcomes => report(Telling::Outcomes(100), 1, each, passes),
        What::DeltaOne => report(Telling::Delta(1), 1, each, passes),
        What::DeltaHundred => report(Telling::Delta(100), 1, each, passes),
        What::DeltaMany => report(Telling::Delta(10_000), 1, each, passes),
        What::DeltaOfMany => report(Telling::Delta(10_000), REPORTERS, each, passes),
        What::Governor => {
            let clock = FakeRelativeClock::default();
            let advance = || clock.advance(STEP);
            governed(clock.clone(), each, advance)?;
        }
        What::GovernorClock => governed(DefaultClock::default(), each, || {})?,
        _ => {
            let count = policies.len();
            let (shadow, overflow) = (what == What::CoreShadow, false);
            let mut cells = vec![None; KEYS * count];
            let mut decision = Decision::default();
            let mut rules = Rules::new();
            each(&mut |index, _| {
                let rule = |(cell, policy)| {
                    let policy = black_box(policy);
                    let ask = what.ask();
                    Rule { cell, policy, ask, shadow, quota: false, overflow, held: false }
                };
                rules.clear();
                rules.extend(policies.iter().enumerate().map(rule));
                let cells = &mut cells[index * count..(index + 1) * count];
                let charging = Charging::AllOrNothing;
                fusebox_core::apply_to(&mut decision, &rules, charging, cells, passes());
                assert!(black_box(&decision).allowed);
            });
        }
    }
    Ok(())
}

/// That moment, on both clocks.
fn at(passed: Duration) -> Moment {
    Moment { time: Time::ZERO.after(passed), wall: Wall::from_nanos(0).after(passed) }
}

/// What is counted.
#[inline(never)]
fn repeat(times: usize, keys: &[String], decide: &mut dyn FnMut(usize, &String)) {
    for time in 0..times {
        let index = time % keys.len();
        decide(index, black_box(&keys[index]));
    }
}

fn embedded(
    policies: &[Policy],
    each: impl Fn(&mut dyn FnMut(usize, &String)),
    mut now: impl FnMut() -> Moment,
) {
    let hasher = CellHasher::new(&[7; 16], "bench", "slow");
    let budget = Arc::new(Budget::new(KEYS * policies.len()));
    let limiter = |(number, settings): (u32, &Policy)| Limiter {
        name: PolicyName { namespace: "bench".into(), policy: "slow".into() },
        number: LimiterNumber(number),
        settings: settings.clone(),
        keeping: Keeping::AtStop,
        calendar: None,
        budget: Arc::clone(&budget),
    };
    let limiters: Vec<_> = (0..).zip(policies).map(limiter).collect();
    let catalogue = Catalogue::default();
    let overflow = Some(hasher.overflow(None));
    let (storage, _woken) = Embedded::new(KEYS * policies.len());
    let mut decided = Decided::default();
    let mut asks = Vec::with_capacity(limiters.len());
    each(&mut |_, key| {
        let cell = black_box(&hasher).cell(key);
        let ask = |(index, limiter): (usize, _)| CellAsk {
            cell: cell.of_limit(index),
            key: cell,
            overflow: overflow.map(|overflow| overflow.of_limit(index)),
            limiter: black_box(limiter),
            ask: Ask::spend(1),
            shadow: false,
            quota: false,
            held: false,
        };
        asks.clear();
        asks.extend(limiters.iter().enumerate().map(ask));
        let charge =
            Charge { charging: Charging::AllOrNothing, asks: &asks, catalogue: &catalogue };
        let answer = storage.apply(&charge, None, now(), &mut decided);
        assert!(matches!(answer, Ok(Answer::Now(()))), "memory answers at once");
        assert!(black_box(&decided).decision.allowed, "there is enough");
    });
}

/// Looks up the rule of what each asks, and its bucket.
fn rule(file: &str, each: impl Fn(&mut dyn FnMut(usize, &String))) -> Result<()> {
    let settings = Config::parse("bench", RATELIMIT)?.envoy_ratelimit.ok_or("no settings")?;
    let rules = files::parse(&[("bench.yaml".into(), file.into())], &settings)?.rules;
    let domains = Domains::new(&settings, &rules, |_| None, &Domains::default());
    let domain = domains.domain(rules::DOMAIN).ok_or("no domain")?;
    each(&mut |_, key| {
        let entries = [("remote_address", key.as_str())].into_iter();
        let rule = black_box(domain).rule(entries.clone());
        assert!(rule.is_some_and(|rule| black_box(rule.key(entries)).len() <= key.len()));
    });
    Ok(())
}

/// Asks the app as a proxy does, and makes no message of what it tells.
fn ratelimit(
    count: u32,
    each: impl Fn(&mut dyn FnMut(usize, &String)),
    mut now: impl FnMut() -> Moment,
) -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("bench.yaml"), rules::file(10, Others::Exact))?;
    let config = format!("envoy_ratelimit: {{config_dir: {:?}}}", folder.path());
    let app = app(&Lifecycle::default(), &config);
    let asked: Vec<Vec<_>> = (0..KEYS as u32)
        .map(|value| (0..count).map(|index| rules::descriptor(index, value)).collect())
        .collect();
    let principal = Principal::Anonymous;
    each(&mut |index, _| {
        let descriptors = asked[index].iter().map(|descriptor| Descriptor {
            entries: descriptor.entries.iter().map(|entry| (&*entry.key, &*entry.value)),
            limit: None,
            hits: 1,
            negative: false,
        });
        let request = RatelimitRequest { domain: rules::DOMAIN, descriptors };
        let caller = Caller { principal, now: now() };
        let passes = |limited: &Ratelimited<'_>| !black_box(limited).over;
        let answer = black_box(&app).should_rate_limit(caller, request, passes);
        assert!(matches!(answer, Ok(Answer::Now(true))), "there is enough, and it is told at once");
    });
    Ok(())
}

/// Asks the app for some policies of one key; gives the grant, and the generation of a circuit.
fn ask_app(
    app: &App,
    policies: &[&str],
    key: &str,
    now: Moment,
) -> (Option<Granted>, Option<Generation>) {
    let caller = Caller { principal: Principal::Anonymous, now };
    let ask = |policy| app::Ask { policy, key, cost: 1, estimated: false, lease: 0 };
    let asks = policies.iter().copied().map(ask);
    let entry = Entry { asks, priority: Priority::Normal, retry: false };
    let request = Acquire { namespace: "bench", client: None, entry };
    let answer = black_box(app).acquire(caller, request, |acquired| {
        let view = acquired.circuits.first().and_then(|crossed| crossed.view.as_ref());
        let generation = view.map(|view| view.generation);
        acquired.decided.decision.allowed.then(|| (acquired.grant.clone(), generation))
    });
    match answer {
        Ok(Answer::Now(Some(allowed))) => allowed,
        _ => panic!("there is enough, and it is told at once"),
    }
}

fn acquire(
    policies: &[&str],
    each: impl Fn(&mut dyn FnMut(usize, &String)),
    mut now: impl FnMut() -> Moment,
) {
    let app = app(&Lifecycle::default(), POLICIES);
    each(&mut |_, key| {
        black_box(ask_app(&app, policies, key, now()));
    });
}

fn id(each: impl Fn(&mut dyn FnMut(usize, &String)), now: Moment) {
    let app = app(&Lifecycle::default(), POLICIES);
    let granted = |key: &String| ask_app(&app, &["target"], key, now).0;
    let mut ids = Vec::new();
    each(&mut |index, key| {
        if index == ids.len() {
            ids.extend(granted(key));
        }
        let text = black_box(&ids[index]).to_string();
        assert!(black_box(&text).parse::<Granted>().is_ok(), "it is one");
    });
}

/// What is told in one report.
#[derive(Clone, Copy)]
enum Telling {
    /// So many outcomes of one circuit.
    Outcomes(usize),
    /// A delta of so many calls.
    Delta(u32),
}

/// Tells the app how calls went, as each of so many reporters in turn, which were there before.
fn report(
    telling: Telling,
    reporters: usize,
    each: impl Fn(&mut dyn FnMut(usize, &String)),
    mut now: impl FnMut() -> Moment,
) {
    let app = app(&Lifecycle::default(), POLICIES);
    let names: Vec<_> = (0..reporters).map(|number| format!("checkout-{number:02}")).collect();
    let mut tell = |telling, name: &str, key: &String, (granted, generation)| {
        let now = now();
        let call = Call { outcome: Outcome::Success, latency: Some(LATENCY), kind: "" };
        let told = Told { call, ..Told::default() };
        let mut latencies = [0; LATENCIES];
        let mut report = Report {
            namespace: "bench",
            client: Some(Client { id: name, service: "checkout", zone: "a" }),
            ..Report::default()
        };
        match telling {
            Telling::Outcomes(count) => report.outcomes = vec![(granted, told); count],
            Telling::Delta(calls) => {
                latencies[LATENCY_BUCKET] = calls.into();
                let (policy, successes, latencies) = ("target", calls, &latencies[..]);
                let delta =
                    Delta { policy, key, generation, successes, latencies, ..Delta::default() };
                report.deltas = vec![delta];
            }
        }
        let caller = Caller { principal: Principal::Anonymous, now };
        let done = pin!(black_box(&app).report(caller, &report))
            .poll(&mut Context::from_waker(Waker::noop()));
        let Poll::Ready(Ok(receipt)) = done else { panic!("it is told at once") };
        let mut results = receipt.results.iter().chain(&receipt.delta_results);
        assert!(results.all(|result| *result == Reported::Applied), "it counts");
    };
    let mut passed = Vec::new();
    let mut times = 0;
    each(&mut |index, key| {
        if index == passed.len() {
            let (granted, generation) = ask_app(&app, &["target"], key, at(STEP));
            passed.push((granted, generation.unwrap_or_default()));
            for name in &names {
                tell(Telling::Outcomes(1), name, key, passed[index].clone());
            }
        }
        times += 1;
        tell(telling, &names[times / KEYS % names.len()], key, passed[index].clone());
    });
}

fn governed<C: clock::Clock>(
    clock: C,
    each: impl Fn(&mut dyn FnMut(usize, &String)),
    advance: impl Fn(),
) -> Result<()> {
    let burst = NonZeroU32::new(LIMIT).ok_or("no limit")?;
    let quota = Quota::with_period(PER / LIMIT).ok_or("no period")?.allow_burst(burst);
    let limiter = RateLimiter::<_, _, _, NoOpMiddleware<C::Instant>>::new(
        quota,
        HashMapStateStore::<String>::default(),
        clock,
    );
    each(&mut |_, key| {
        advance();
        assert!(black_box(&limiter).check_key(key).is_ok(), "there is enough");
    });
    Ok(())
}
