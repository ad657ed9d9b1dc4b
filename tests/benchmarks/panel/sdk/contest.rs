//! Turns of those that are compared, and what each took.

use std::{
    hint::black_box,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use crate::Result;

/// Length of a turn: much longer than a clock reading, and shorter than what a scheduler gives at once.
const TURN: Duration = Duration::from_millis(2);

/// One thread's work: does something so many times, and says how often it went as it should.
pub(super) type Work = Box<dyn FnMut(u32) -> u32 + Send>;

/// One that is compared with others.
pub(super) struct Contestant {
    pub(super) name: &'static str,
    /// Makes the work of a thread.
    begin: Box<dyn Fn() -> Work>,
}

/// What one took, in nanoseconds for each time.
#[derive(Clone, Copy, Default)]
pub(super) struct Took {
    /// On one thread, in its best turn.
    pub(super) alone: f64,
    /// On each of two threads at once, in the turn in the middle.
    pub(super) together: f64,
    /// How much of it went as it should.
    pub(super) share: f64,
}

impl Contestant {
    /// One whose threads each do what `begin` gives.
    pub(super) fn new<F: FnMut() -> bool + Send + 'static>(
        name: &'static str,
        begin: impl Fn() -> F + 'static,
    ) -> Self {
        let begin = move || {
            let mut act = begin();
            Box::new(move |times: u32| (0..times).map(|_| u32::from(black_box(act()))).sum())
                as Work
        };
        Self { name, begin: Box::new(begin) }
    }
}

/// Lets all take turns for about so long each.
pub(super) fn hold(contestants: &[Contestant], each: Duration) -> Result<Vec<Took>> {
    let turns = (each.as_secs_f64() / TURN.as_secs_f64() / 2.0).max(5.0) as usize;
    let mut all = Vec::new();
    for contestant in contestants {
        // Whatever happens once is over then: leases are there, and branches are known.
        let mut work = (contestant.begin)();
        let warm = Instant::now();
        while warm.elapsed() < 50 * TURN {
            work(1_000);
        }
        let (nanos, _) = turn(&mut work, 10_000);
        let times = (TURN.as_nanos() as f64 / nanos).clamp(100.0, 10_000_000.0) as u32;
        all.push((times, work, (contestant.begin)(), Vec::new(), Vec::new(), (0_u64, 0_u64)));
    }
    for _ in 0..turns {
        for (times, one, other, alone, together, (went, tried)) in &mut all {
            let (nanos, did) = turn(one, *times);
            alone.push(nanos);
            let both = both(one, other, *times)?;
            together.push(both.0);
            *went += u64::from(did) + both.1;
            *tried += 3 * u64::from(*times);
        }
    }
    let middle = |mut nanos: Vec<f64>| {
        nanos.sort_by(f64::total_cmp);
        nanos[nanos.len() / 2]
    };
    let took =
        |(_, _, _, alone, together, (went, tried)): (_, _, _, Vec<f64>, _, (u64, u64))| Took {
            alone: alone.iter().copied().fold(f64::INFINITY, f64::min),
            together: middle(together),
            share: went as f64 / tried as f64,
        };
    Ok(all
        .into_iter()
        .map(|(a, b, c, d, e, f): (u32, Work, Work, _, _, _)| took((a, b, c, d, e, f)))
        .collect())
}

fn turn(work: &mut Work, times: u32) -> (f64, u32) {
    let begin = Instant::now();
    let went = work(times);
    (begin.elapsed().as_nanos() as f64 / f64::from(times), went)
}

/// Two threads at once: what each took in the mean.
fn both(one: &mut Work, other: &mut Work, times: u32) -> Result<(f64, u64)> {
    let start = Barrier::new(2);
    let run = |work: &mut Work| {
        start.wait();
        turn(work, times)
    };
    let told = thread::scope(|scope| {
        let other = scope.spawn(|| run(other));
        let one = run(one);
        (one, other.join())
    });
    let (one, other) = (told.0, told.1.map_err(|_| "a thread panicked")?);
    Ok(((one.0 + other.0) / 2.0, u64::from(one.1) + u64::from(other.1)))
}
