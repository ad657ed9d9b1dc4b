//! Callers that meet at one cell are answered as if each had come alone, at some moment of its own call.
//!
//! This is linearizability (Herlihy and Wing, TOPLAS 12(3), 1990), and the core is its specification. A
//! recorded history is searched for an order that explains every answer (Wing and Gong, JPDC 17, 1993);
//! what was tried in vain is remembered (Lowe, "Testing for linearizability", CCPE 29(4), 2017).

use std::{
    collections::HashMap,
    ops::RangeInclusive,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use fusebox_core::{
    Cell, Charging, Cost, Decision, Kind, Policy, Rule, Settled, Time, TokenBucket, Verdict, apply,
    saturating_nanos, settle,
};
use fusebox_server::{
    catalogue::{CellId, PolicyNumber},
    storage::{Answer, CellAsk, Charge, Embedded, Keeping, Settlement, Storage},
};
use parking_lot::Mutex;

use crate::{policy, tokens};

/// Operations of one history: what fits the bits of a [`Done`].
const OPERATIONS: usize = 64;

/// Callers of one history.
const CALLERS: RangeInclusive<usize> = 2..=8;

/// Histories of each number of callers; all of them take a few seconds.
const HISTORIES: usize = 1_500;

/// What a caller wants of the cell.
#[derive(Clone, Copy, Debug)]
enum Call {
    Ask(Cost),
    Settle { charged: u64, actual: u64 },
}

/// What it is told.
#[derive(Clone, Debug, PartialEq)]
enum Told {
    Decided { allowed: bool, verdict: Verdict },
    Settled(Settled<Cell>),
}

/// Cells by number, called by many at once.
trait Cells: Sync {
    fn call(&self, policy: &Policy, cell: u64, call: Call, now: Time) -> Told;
}

/// What a lone caller is told: the specification.
fn alone(policy: &Policy, cell: &mut Option<Cell>, call: Call, now: Time) -> Told {
    match call {
        Call::Ask(cost) => {
            let rules = [Rule { cell: 0, policy, cost }];
            let cells = std::slice::from_mut(cell);
            decided(&apply(&rules, Charging::AllOrNothing, cells, now))
        }
        Call::Settle { charged, actual } => {
            Told::Settled(settle(policy, cell, charged, actual, now))
        }
    }
}

impl Cells for Embedded {
    fn call(&self, policy: &Policy, cell: u64, call: Call, now: Time) -> Told {
        let number = PolicyNumber(0);
        // Answers are compared as they are decided; when they may be told is for others to test.
        let keepings = [Keeping::AtStop, Keeping::Behind, Keeping::Marked];
        let keeping = keepings[cell as usize % keepings.len()];
        let cell = CellId([cell << 32, cell]);
        match call {
            Call::Ask(cost) => {
                let asks = [CellAsk { cell, number, policy, keeping, cost }];
                let charge = Charge { charging: Charging::AllOrNothing, asks: &asks };
                let mut decision = Decision::default();
                self.apply(&charge, None, now, &mut decision).unwrap();
                decided(&decision)
            }
            Call::Settle { charged, actual } => {
                let settlement = Settlement { cell, number, policy, keeping, charged, actual };
                match Storage::settle(self, &settlement, now).unwrap() {
                    Answer::Now(settled) | Answer::Later(settled, _) => Told::Settled(settled),
                }
            }
        }
    }
}

fn decided(decision: &Decision) -> Told {
    Told::Decided { allowed: decision.allowed, verdict: decision.verdicts[0] }
}

/// One call and its answer; the numbers of all calls and answers of a history are in the order of time.
#[derive(Clone, Debug)]
struct Operation {
    call: Call,
    now: Time,
    told: Told,
    called: u64,
    answered: u64,
}

type History = Vec<Operation>;

/// Histories of callers that make random calls, each history on a cell of its own.
struct Recorder<'a> {
    cells: &'a dyn Cells,
    policy: &'a Policy,
    callers: usize,
    histories: usize,
    /// How many callers have come to the start of a history, over all histories.
    arrived: AtomicUsize,
    sequence: AtomicU64,
    clock: AtomicU64,
}

impl<'a> Recorder<'a> {
    fn new(cells: &'a dyn Cells, policy: &'a Policy, callers: usize, histories: usize) -> Self {
        let (arrived, sequence, clock) = Default::default();
        Self { cells, policy, callers, histories, arrived, sequence, clock }
    }

    fn record(&self) -> Vec<History> {
        let mut recorded = vec![History::new(); self.histories];
        thread::scope(|scope| {
            let calls = |caller| {
                move || {
                    let _leaving = Leaving(&self.arrived);
                    (0..self.histories).map(|cell| self.calls(caller, cell)).collect::<Vec<_>>()
                }
            };
            let callers = (0..self.callers).map(|caller| scope.spawn(calls(caller)));
            for caller in callers.collect::<Vec<_>>() {
                for (history, calls) in recorded.iter_mut().zip(caller.join().unwrap()) {
                    history.extend(calls);
                }
            }
        });
        recorded
    }

    /// What one caller does in one history.
    fn calls(&self, caller: usize, cell: usize) -> History {
        let mut random = Random((caller * self.histories + cell) as u64);
        let capacity = self.policy.limit.capacity();
        let fills_in = self.policy.limit.fills_in().unwrap_or(Duration::from_secs(1));
        // In every other history time stands still, so that nothing but the calls changes the cell.
        let longest_step = if cell.is_multiple_of(2) { 0 } else { saturating_nanos(fills_in) / 16 };
        let mut estimates = Vec::new();

        self.start_together(cell);
        let operation = |_| {
            let estimate = if random.below(3) == 0 { estimates.pop() } else { None };
            let call = match (estimate, random.below(8)) {
                (Some(charged), _) => {
                    Call::Settle { charged, actual: random.below(2 * charged + 1) }
                }
                (None, 0) => Call::Ask(tokens(0)),
                (None, 1) => Call::Ask(tokens(random.below(capacity + 2))),
                (None, _) => {
                    let (tokens, estimated) =
                        (random.below(capacity / 8) + 1, random.below(2) == 0);
                    Call::Ask(Cost { tokens, estimated })
                }
            };
            let step = random.below(longest_step + 1);

            let called = self.sequence.fetch_add(1, Ordering::SeqCst);
            let now = Time::from_nanos(self.clock.fetch_add(step, Ordering::SeqCst));
            if random.below(4) == 0 {
                // Others read a later clock meanwhile, and are decided first.
                thread::yield_now();
            }
            let told = self.cells.call(self.policy, cell as u64, call, now);
            let answered = self.sequence.fetch_add(1, Ordering::SeqCst);

            if let (Call::Ask(cost), Told::Decided { allowed: true, .. }) = (call, &told) {
                estimates.extend(cost.estimated.then_some(cost.tokens));
            }
            Operation { call, now, told, called, answered }
        };
        (0..OPERATIONS / self.callers).map(operation).collect()
    }

    /// Waits by looking: to be woken takes longer than a history.
    fn start_together(&self, history: usize) {
        self.arrived.fetch_add(1, Ordering::SeqCst);
        while self.arrived.load(Ordering::SeqCst) < (history + 1) * self.callers {
            thread::yield_now();
        }
    }
}

/// Nobody waits for a caller that panics.
struct Leaving<'a>(&'a AtomicUsize);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(usize::MAX / 2, Ordering::SeqCst);
        }
    }
}

/// Numbers that look random (Steele et al., "Fast splittable pseudorandom number generators", 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end.max(1)
    }
}

/// The operations that an order has so far, one bit for each.
type Done = u64;

/// The search for an order of one history.
struct Search<'a> {
    policy: &'a Policy,
    history: &'a [Operation],
    /// What was done, and the cells that it led to, from where the rest is explained by no order.
    dead_ends: HashMap<Done, Vec<Option<Cell>>>,
}

impl Search<'_> {
    fn explains(&mut self, done: Done, cell: Option<Cell>) -> bool {
        let open = |index: &usize| done & (1 << index) == 0;
        let left = || (0..self.history.len()).filter(open);
        // Nobody comes after one that was called when it had been answered.
        let Some(first_answer) = left().map(|index| self.history[index].answered).min() else {
            return true;
        };
        if self.dead_ends.get(&done).is_some_and(|cells| cells.contains(&cell)) {
            return false;
        }
        for index in left().collect::<Vec<_>>() {
            let Operation { call, now, ref told, called, .. } = self.history[index];
            let mut after = cell;
            if called < first_answer
                && alone(self.policy, &mut after, call, now) == *told
                && self.explains(done | (1 << index), after)
            {
                return true;
            }
        }
        self.dead_ends.entry(done).or_default().push(cell);
        false
    }
}

/// Whether some order of the operations, consistent with their order in time, explains all answers.
fn is_linearizable(policy: &Policy, history: &[Operation]) -> bool {
    assert!(history.len() <= OPERATIONS);
    Search { policy, history, dead_ends: HashMap::new() }.explains(0, None)
}

/// Whether two callers were there at once.
fn overlaps(history: &[Operation]) -> bool {
    // In the order of calls, somebody is called before an earlier one is answered.
    history.windows(2).any(|pair| pair[1].called < pair[0].answered)
}

/// Whether the operations took effect in another order than they were called in.
fn is_reordered(policy: &Policy, history: &[Operation]) -> bool {
    let mut cell = None;
    !history
        .iter()
        .all(|operation| alone(policy, &mut cell, operation.call, operation.now) == operation.told)
}

/// Records histories on the real storage, and finds an order for each.
fn histories(policy: &Policy) {
    let began = Instant::now();
    let (mut all, mut overlapping, mut reordered) = (0, 0, 0);
    for callers in CALLERS {
        let cells = Embedded::new(HISTORIES).0;
        for mut history in Recorder::new(&cells, policy, callers, HISTORIES).record() {
            history.sort_by_key(|operation| operation.called);
            let lines = || history.iter().map(|line| format!("\n{line:?}")).collect::<String>();
            assert!(is_linearizable(policy, &history), "no order explains:{}", lines());
            all += 1;
            overlapping += usize::from(overlaps(&history));
            reordered += usize::from(is_reordered(policy, &history));
        }
    }
    println!(
        "{all} histories: {overlapping} with calls that overlap, {reordered} decided in another order \
         than called; {:.1?}",
        began.elapsed()
    );
    assert!(reordered > 0, "nobody met anybody: nothing was tested");
}

#[test]
fn callers_of_one_token_bucket_are_answered_as_if_each_came_alone() {
    histories(&policy(TokenBucket::new(7, Duration::from_secs(3), 60).unwrap(), 20));
}

/// A storage that forgets its lock between reading a cell and writing it.
#[derive(Default)]
struct Torn(Mutex<HashMap<u64, Option<Cell>>>);

impl Cells for Torn {
    fn call(&self, policy: &Policy, cell: u64, call: Call, now: Time) -> Told {
        let mut state = self.0.lock().get(&cell).copied().flatten();
        thread::yield_now();
        let told = alone(policy, &mut state, call, now);
        self.0.lock().insert(cell, state);
        told
    }
}

#[test]
fn a_storage_that_reads_and_writes_without_a_lock_is_found_out() {
    let policy = policy(TokenBucket::new(7, Duration::from_secs(3), 60).unwrap(), 20);
    let torn = Torn::default();
    let recorded = Recorder::new(&torn, &policy, 4, 200).record();
    let wrong = recorded.iter().filter(|history| !is_linearizable(&policy, history)).count();
    println!("{wrong} of {} torn histories have no order", recorded.len());
    assert!(wrong > 0);
}

#[test]
fn an_order_must_explain_every_answer_and_agree_with_time() {
    let policy = policy(TokenBucket::new(1, Duration::from_secs(1), 10).unwrap(), 0);
    let spent = |tokens| {
        let mut cell = None;
        alone(&policy, &mut cell, Call::Ask(crate::tokens(tokens)), Time::ZERO);
        cell
    };
    // Asks of so many tokens, each told what it would be told once so many were spent.
    let history = |operations: &[(u64, u64, u64, u64)]| {
        let operation = |&(tokens, before, called, answered): &(u64, u64, u64, u64)| {
            let call = Call::Ask(crate::tokens(tokens));
            let told = alone(&policy, &mut spent(before), call, Time::ZERO);
            Operation { call, now: Time::ZERO, told, called, answered }
        };
        operations.iter().map(operation).collect::<History>()
    };
    for (why, explained, operations) in [
        ("one after the other", true, vec![(1, 0, 0, 1), (1, 1, 2, 3)]),
        ("the second did not see the first", false, vec![(1, 0, 0, 1), (1, 0, 2, 3)]),
        ("a lost update, though they overlap", false, vec![(1, 0, 0, 2), (1, 0, 1, 3)]),
        ("the other way round while they overlap", true, vec![(1, 1, 0, 2), (1, 0, 1, 3)]),
        ("the other way round, too late", false, vec![(1, 1, 0, 1), (1, 0, 2, 3)]),
        ("a peek in the middle of a charge, before", true, vec![(5, 0, 0, 3), (0, 0, 1, 2)]),
        ("a peek in the middle of a charge, after", true, vec![(5, 0, 0, 3), (0, 5, 1, 2)]),
        ("half of a charge", false, vec![(5, 0, 0, 3), (0, 3, 1, 2)]),
        (
            "charged, and then not charged any more",
            false,
            vec![(5, 0, 0, 5), (0, 5, 1, 2), (0, 0, 3, 4)],
        ),
        ("both got the last ten", false, vec![(10, 0, 0, 2), (10, 0, 1, 3)]),
        ("one of them was denied", true, vec![(10, 10, 0, 2), (10, 0, 1, 3)]),
    ] {
        assert_eq!(is_linearizable(&policy, &history(&operations)), explained, "{why}");
    }
}
