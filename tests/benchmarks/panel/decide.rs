//! Instructions of one decision, beside the crate `governor`: counted by valgrind, so that no neighbour
//! changes them.
//!
//! Each decision runs N and 2 N times in a process of its own, counted inside [`repeat`] only, where no clock is
//! calibrated; the difference is what N of them take.

use std::{env, hint::black_box, num::NonZeroU32, process::Command, time::Duration};

use clap::ValueEnum;
use fusebox_core::{Charging, Cost, Decision, Limit, Policy, Rule, Time, TokenBucket};
use fusebox_server::{
    catalogue::{CellHasher, PolicyNumber},
    clock::{Clock, SystemClock},
    storage::{Answer, CellAsk, Charge, Embedded, Keeping, Storage},
};
use governor::{
    Quota, RateLimiter,
    clock::{self, DefaultClock, FakeRelativeClock},
    middleware::NoOpMiddleware,
    state::keyed::HashMapStateStore,
};

use crate::{
    Result, print,
    table::{Table, figure},
};

/// N: whatever happens once, such as a table that grows, is a small part of it.
const TIMES: usize = 100_000;

/// Keys in turn, as many as fit the caches.
const KEYS: usize = 1_000;

const LIMIT: u32 = 1_000_000_000;
const PER: Duration = Duration::from_secs(24 * 60 * 60);

/// Time that passes between two decisions.
const STEP: Duration = Duration::from_micros(1);

/// Whose decision.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum What {
    /// Nothing: what the loop itself takes.
    Nothing,
    /// The core's, on a cell at hand.
    Core,
    /// The server's storage: names the cell, locks, finds, decides, writes back.
    Embedded,
    /// The same, and the server's clock.
    EmbeddedClock,
    /// `governor`, by a clock that is a number.
    Governor,
    /// `governor`, by its default clock.
    GovernorClock,
}

impl What {
    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "the loop",
            Self::Core => "`fusebox_core::apply_to`, the cell at hand",
            Self::Embedded => "`Embedded::apply`, with the hash of the key",
            Self::EmbeddedClock => "`Embedded::apply`, with the hash of the key and a clock read",
            Self::Governor => "`governor` `check_key`, fake clock",
            Self::GovernorClock => "`governor` `check_key`, default clock",
        }
    }

    /// What it is compared with: the same work, as far as there is the same.
    fn twin(self) -> Option<Self> {
        match self {
            Self::Core | Self::Embedded => Some(Self::Governor),
            Self::EmbeddedClock => Some(Self::GovernorClock),
            Self::Nothing | Self::Governor | Self::GovernorClock => None,
        }
    }
}

pub(crate) fn measure() -> Result<()> {
    let mut counted = Vec::new();
    for what in What::value_variants() {
        eprintln!("counting instructions: {}", what.name());
        counted.push((
            *what,
            (instructions(*what, 2 * TIMES)? - instructions(*what, TIMES)?) / TIMES as f64,
        ));
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
         The core alone finds no cell and locks nothing.",
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
    let bucket = TokenBucket::new(LIMIT.into(), PER, LIMIT.into())?;
    let policy = Policy::new(Limit::TokenBucket(bucket), 0);
    let mut now = Time::ZERO;
    let mut passes = move || {
        now = now.after(STEP);
        now
    };
    match what {
        What::Nothing => each(&mut |_, key| {
            black_box(key);
        }),
        What::Core => {
            let mut cells = vec![None; KEYS];
            let mut decision = Decision::default();
            each(&mut |index, _| {
                let cost = Cost { tokens: 1, estimated: false };
                let rule = Rule { cell: 0, policy: black_box(&policy), cost };
                let cell = &mut cells[index..=index];
                let charging = Charging::AllOrNothing;
                fusebox_core::apply_to(&mut decision, &[rule], charging, cell, passes());
                assert!(black_box(&decision).allowed);
            });
        }
        What::Embedded => embedded(&policy, each, passes),
        What::EmbeddedClock => {
            let clock = SystemClock::default();
            embedded(&policy, each, || Time::ZERO.after(clock.monotonic()));
        }
        What::Governor => {
            let clock = FakeRelativeClock::default();
            let advance = || clock.advance(STEP);
            governed(clock.clone(), each, advance)?;
        }
        What::GovernorClock => governed(DefaultClock::default(), each, || {})?,
    }
    Ok(())
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
    policy: &Policy,
    each: impl Fn(&mut dyn FnMut(usize, &String)),
    mut now: impl FnMut() -> Time,
) {
    let hasher = CellHasher::new(&[7; 16], "bench", "slow");
    let (storage, _woken) = Embedded::new(KEYS);
    let mut decision = Decision::default();
    each(&mut |_, key| {
        let ask = CellAsk {
            cell: black_box(&hasher).cell(key),
            number: PolicyNumber(0),
            policy: black_box(policy),
            keeping: Keeping::AtStop,
            cost: Cost { tokens: 1, estimated: false },
        };
        let charge = Charge { charging: Charging::AllOrNothing, asks: &[ask] };
        let answer = storage.apply(&charge, None, now(), &mut decision);
        assert!(matches!(answer, Ok(Answer::Now(()))), "memory answers at once");
        assert!(black_box(&decision).allowed, "there is enough");
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
