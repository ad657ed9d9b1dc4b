//! Callers that meet at one cell are answered as if each had come alone, at some moment of its own call.
//!
//! This is linearizability (Herlihy and Wing, TOPLAS 12(3), 1990), and the core is its specification. A
//! recorded history is searched for an order that explains every answer (Wing and Gong, JPDC 17, 1993);
//! what was tried in vain is remembered (Lowe, "Testing for linearizability", CCPE 29(4), 2017).

use std::{
    collections::HashMap,
    ops::RangeInclusive,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use fusebox_core::{
    Ask, Cell, Charging, Concurrency, Decision, Kind, Limit, Moment, Policy, Purpose, RetryBudget,
    Settled, Settlement, SlidingWindow, TokenBucket, Verdict, WindowLimit, apply, saturating_nanos,
    settle,
};
use fusebox_server::{
    catalogue::{Budget, Catalogue, CellId, Limiter, LimiterNumber, PolicyName},
    storage::{self, Answer, CellAsk, Charge, Decided, Embedded, Judge, Keeping, Storage},
};
use parking_lot::Mutex;

use crate::{policy, rule, settlement};

/// Operations of one history: what fits the bits of a [`Done`].
const OPERATIONS: usize = 64;

/// Callers of one history.
const CALLERS: RangeInclusive<usize> = 2..=8;

/// Histories of each kind and number of callers; all of them take a few seconds.
const HISTORIES: usize = 300;

/// What a caller wants of the cell.
#[derive(Clone, Copy, Debug)]
enum Call {
    Ask(Ask),
    Settle(Settlement),
}

/// What it is told.
#[derive(Clone, Debug, PartialEq)]
enum Told {
    Decided { allowed: bool, verdict: Verdict },
    Settled(Settled<Cell>),
}

/// Cells by number, called by many at once.
trait Cells: Sync {
    fn call(&self, cell: u64, call: Call, now: Moment) -> Told;
}

/// What a lone caller is told: the specification.
fn alone(policy: &Policy, cell: &mut Option<Cell>, call: Call, now: Moment) -> Told {
    match call {
        Call::Ask(ask) => {
            let cells = std::slice::from_mut(cell);
            decided(&apply(&[rule(policy, ask)], Charging::AllOrNothing, cells, now))
        }
        Call::Settle(settlement) => Told::Settled(settle(policy, cell, settlement, now)),
    }
}

/// The storage itself, and limiters of one policy that are kept in every way.
struct Stored {
    cells: Embedded,
    limiters: [Limiter; 3],
    catalogue: Catalogue,
}

impl Stored {
    fn new(policy: &Policy) -> Self {
        let (name, budget) =
            (PolicyName { namespace: "n".into(), policy: "p".into() }, Budget::new(0));
        let budget = Arc::new(budget);
        // Answers are compared as they are decided; when they may be told is for others to test.
        let limiters = [Keeping::AtStop, Keeping::Behind, Keeping::Marked].map(|keeping| Limiter {
            name: name.clone(),
            number: LimiterNumber(0),
            settings: policy.clone(),
            keeping,
            calendar: None,
            budget: Arc::clone(&budget),
        });
        Self { cells: Embedded::new(HISTORIES).0, limiters, catalogue: Catalogue::default() }
    }
}

impl Cells for Stored {
    fn call(&self, cell: u64, call: Call, now: Moment) -> Told {
        let Self { cells, limiters, catalogue } = self;
        let limiter = &limiters[cell as usize % limiters.len()];
        let cell = CellId([cell << 32, cell]);
        match call {
            Call::Ask(ask) => {
                let asks = [CellAsk {
                    cell,
                    key: cell,
                    overflow: None,
                    limiter,
                    ask,
                    shadow: false,
                    quota: false,
                    held: false,
                }];
                let charge = Charge { charging: Charging::AllOrNothing, asks: &asks, catalogue };
                let mut told = Decided::default();
                cells.apply(&charge, None, now, &mut told).unwrap();
                decided(&told.decision)
            }
            Call::Settle(known) => {
                let (judge, revision) = (Judge { limiter, catalogue }, limiter.settings.revision);
                let settlement = storage::Settlement { cell, judge, revision, known };
                match cells.settle(&settlement, now).unwrap() {
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
    now: Moment,
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
        let fills_in = self.policy.limit.fills_in().unwrap_or(Duration::from_secs(1));
        // In every other history time stands still, so that nothing but the calls changes the cell.
        let longest_step = if cell.is_multiple_of(2) { 0 } else { saturating_nanos(fills_in) / 16 };
        let mut owed = Vec::new();

        self.start_together(cell);
        let operation = |_| {
            let settled = if random.below(3) == 0 { owed.pop() } else { None };
            let call = match settled {
                Some(owed) => Call::Settle(self.settlement(owed, &mut random)),
                None => Call::Ask(self.ask(&mut random)),
            };
            let step = random.below(longest_step + 1);

            let called = self.sequence.fetch_add(1, Ordering::SeqCst);
            let now = Moment::from_nanos(self.clock.fetch_add(step, Ordering::SeqCst));
            if random.below(4) == 0 {
                // Others read a later clock meanwhile, and are decided first.
                thread::yield_now();
            }
            let told = self.cells.call(cell as u64, call, now);
            let answered = self.sequence.fetch_add(1, Ordering::SeqCst);

            match (call, &told) {
                (Call::Ask(ask), Told::Decided { allowed: true, verdict }) if self.owes(ask) => {
                    let (charged, slice) = (verdict.granted, Some(verdict.slice));
                    owed.push(Settlement { slice, ..settlement(charged, 0) });
                }
                (Call::Settle(known), _) if known.partial => {
                    owed.push(Settlement { told: known.actual, ..known });
                }
                _ => {}
            }
            Operation { call, now, told, called, answered }
        };
        (0..OPERATIONS / self.callers).map(operation).collect()
    }

    fn ask(&self, random: &mut Random) -> Ask {
        let most = match self.policy.limit {
            // As many retries as are there when nobody made a request.
            Limit::RetryBudget(_) => 60,
            limit => limit.capacity(),
        };
        let tokens = match random.below(8) {
            0 => 0,
            1 => random.below(most + 2),
            _ => random.below(most / 8) + 1,
        };
        let purpose = match random.below(4) {
            0 => Purpose::Estimate,
            1 => Purpose::Lease { clients: 1 + random.below(3) as u32 },
            _ => Purpose::Spend,
        };
        let reserved = if random.below(4) == 0 { most / 4 } else { 0 };
        let ask = Ask { reserved, retry: random.below(2) == 0, ..Ask::spend(tokens) };
        match self.policy.limit {
            Limit::Concurrency(_) | Limit::RetryBudget(_) => ask,
            _ => ask.to(purpose),
        }
    }

    /// Whether what is charged may come back.
    fn owes(&self, ask: Ask) -> bool {
        matches!(self.policy.limit, Limit::Concurrency(_)) || ask.purpose != Purpose::Spend
    }

    fn settlement(&self, owed: Settlement, random: &mut Random) -> Settlement {
        let actual = owed.told + random.below(2 * owed.charged + 1);
        let (partial, max_debt) = (random.below(4) == 0, self.policy.max_debt);
        Settlement { actual, partial, max_debt, ..owed }
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
        let cells = Stored::new(policy);
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
    histories(&bucket());
}

#[test]
fn callers_of_one_window_are_answered_as_if_each_came_alone() {
    let limit = WindowLimit::fixed(60, Duration::from_secs(3)).unwrap();
    histories(&Policy::new(Limit::Window(limit), 20));
}

#[test]
fn callers_of_one_sliding_window_are_answered_as_if_each_came_alone() {
    let limit = SlidingWindow::new(60, Duration::from_secs(3)).unwrap();
    histories(&Policy::new(Limit::SlidingWindow(limit), 20));
}

#[test]
fn callers_of_the_same_permits_are_answered_as_if_each_came_alone() {
    let limit = Concurrency::new(60, Duration::from_secs(3)).unwrap();
    histories(&Policy::new(Limit::Concurrency(limit), 0));
}

#[test]
fn callers_of_one_retry_budget_are_answered_as_if_each_came_alone() {
    let limit = RetryBudget::new(333, 20, Duration::from_secs(3)).unwrap();
    histories(&Policy::new(Limit::RetryBudget(limit), 0));
}

fn bucket() -> Policy {
    policy(TokenBucket::new(7, Duration::from_secs(3), 60).unwrap(), 20)
}

/// A storage that forgets its lock between reading a cell and writing it.
struct Torn {
    policy: Policy,
    cells: Mutex<HashMap<u64, Option<Cell>>>,
}

impl Cells for Torn {
    fn call(&self, cell: u64, call: Call, now: Moment) -> Told {
        let mut state = self.cells.lock().get(&cell).copied().flatten();
        thread::yield_now();
        let told = alone(&self.policy, &mut state, call, now);
        self.cells.lock().insert(cell, state);
        told
    }
}

#[test]
fn a_storage_that_reads_and_writes_without_a_lock_is_found_out() {
    let torn = Torn { policy: bucket(), cells: Mutex::default() };
    let recorded = Recorder::new(&torn, &torn.policy, 4, 200).record();
    let wrong = recorded.iter().filter(|history| !is_linearizable(&torn.policy, history)).count();
    println!("{wrong} of {} torn histories have no order", recorded.len());
    assert!(wrong > 0);
}

#[test]
fn an_order_must_explain_every_answer_and_agree_with_time() {
    let policy = policy(TokenBucket::new(1, Duration::from_secs(1), 10).unwrap(), 0);
    let spent = |tokens| {
        let mut cell = None;
        alone(&policy, &mut cell, Call::Ask(crate::tokens(tokens)), Moment::ZERO);
        cell
    };
    // Asks of so many tokens, each told what it would be told once so many were spent.
    let history = |operations: &[(u64, u64, u64, u64)]| {
        let operation = |&(tokens, before, called, answered): &(u64, u64, u64, u64)| {
            let call = Call::Ask(crate::tokens(tokens));
            let told = alone(&policy, &mut spent(before), call, Moment::ZERO);
            Operation { call, now: Moment::ZERO, told, called, answered }
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
