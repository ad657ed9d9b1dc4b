//! The decision over several cells, in two phases: plan, then commit.

use core::time::Duration;

use arrayvec::ArrayVec;

use crate::{
    Admission, Ask, Cell, Kind, Level, Limit, Moment, Policy, Purpose, Reason, Settled, Settlement,
    State,
};

/// Most rules that one decision takes: 16 asks of policies with four limits each.
pub const MAX_RULES: usize = 64;

/// The rules of one decision.
pub type Rules<'a> = ArrayVec<Rule<'a>, MAX_RULES>;

/// The cells that the rules speak of, each once; absent means full.
pub type Cells = ArrayVec<Option<Cell>, MAX_RULES>;

/// The verdicts of one decision, in the order of its rules.
pub type Verdicts = ArrayVec<Verdict, MAX_RULES>;

/// One ask, the policy that judges it and the cell that it charges.
#[derive(Clone, Copy, Debug)]
pub struct Rule<'a> {
    /// Index of the cell. Two rules may name the same: the later one sees what the earlier one charges.
    pub cell: usize,
    /// Who judges.
    pub policy: &'a Policy,
    /// What is asked.
    pub ask: Ask,
    /// It only watches: it is charged with the others, unless it is a permit, and never denies.
    pub shadow: bool,
    /// It is one of several that serve the same: it denies only where all such rules of the decision do.
    pub quota: bool,
    /// The cell is shared by keys that have none of their own, and a denial says so.
    pub overflow: bool,
    /// Others wait for the cell, so what is there is theirs.
    pub held: bool,
}

/// What is charged when not every rule allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Charging {
    /// Every rule, or none.
    AllOrNothing,
    /// Each rule that allows, whatever the others say.
    EachAlone,
    /// Every rule; one that denies drains its cell, or leaves it in debt, unless others wait for it.
    Always,
    /// None: something else denies, and only what the rules say is wanted.
    Nothing,
}

/// The answer of one rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Tokens that were asked for; 0 was a peek.
    pub cost: u64,
    /// Whether the rule alone allows.
    pub admission: Admission,
    /// It only watches: what it says denies nothing.
    pub shadow: bool,
    /// Tokens that were spent before it, which no one could have; more than the limit is debt.
    pub spent: u64,
    /// Most tokens that this caller could ever be granted at once.
    pub limit: u64,
    /// Whole tokens left, after what was charged.
    pub remaining: u64,
    /// Time until the cell is full if nobody charges it, after what was charged.
    pub reset_after: Duration,
    /// Tokens that were charged if the Acquire was allowed; of a lease maybe fewer than were wanted.
    pub granted: u64,
    /// The part of the cell's time that was charged, which a later settlement names.
    pub slice: u64,
}

/// The answer of all rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Whether every rule allows that does not only watch, of those with `quota` any.
    pub allowed: bool,
    /// One for each rule, in their order.
    pub verdicts: Verdicts,
}

impl Decision {
    /// Leaves one verdict for each ask, of which the first `ends[0]` rules are the first one's, and so on: that
    /// of the tightest rule.
    ///
    /// # Panics
    /// If there are fewer verdicts than the last end.
    pub fn merge(&mut self, ends: &[usize]) {
        let mut start = 0;
        for (ask, end) in ends.iter().enumerate() {
            let rules = &self.verdicts[start..*end];
            let tightest = rules.iter().copied().reduce(tighter);
            if let Some(tightest) = tightest {
                self.verdicts[ask] = tightest;
            }
            start = *end;
        }
        self.verdicts.truncate(ends.len());
    }
}

/// Of two verdicts about one ask the one that binds: a denial, the one that lasts longer, the one that leaves
/// less.
fn tighter(one: Verdict, other: Verdict) -> Verdict {
    let wait = |verdict: &Verdict| match verdict.admission {
        Admission::Allow => Duration::ZERO,
        Admission::Deny { retry_after, .. } => retry_after.unwrap_or(Duration::MAX),
    };
    let key = |verdict: &Verdict| {
        let denied = verdict.admission != Admission::Allow;
        (denied, wait(verdict), core::cmp::Reverse(verdict.remaining))
    };
    if key(&other) > key(&one) { other } else { one }
}

/// Decides over all rules, and charges `cells` as `charging` says.
///
/// The plan works on a copy; the commit writes back what is to be charged and nothing else. A peek (cost
/// 0) changes and creates nothing.
///
/// # Panics
/// If a rule names a cell that is not there, or there are more than [`MAX_RULES`] of either.
pub fn apply(
    rules: &[Rule<'_>],
    charging: Charging,
    cells: &mut [Option<Cell>],
    now: Moment,
) -> Decision {
    let mut decision = Decision::default();
    apply_to(&mut decision, rules, charging, cells, now);
    decision
}

/// The same, in the place of an earlier decision: it is a kilobyte, which takes longer to move than to make.
///
/// # Panics
/// As [`apply`].
pub fn apply_to(
    decision: &mut Decision,
    rules: &[Rule<'_>],
    charging: Charging,
    cells: &mut [Option<Cell>],
    now: Moment,
) {
    decision.allowed = true;
    decision.verdicts.clear();
    let mut planned = Cells::new();
    planned.extend(cells.iter().copied());

    let (mut quota_asked, mut quota_left) = (false, false);
    let mut lease = None;
    for rule in rules {
        let mut ask = rule.ask;
        if is_lease(rule) {
            let most = *lease.get_or_insert_with(|| smallest_lease(rules, &planned, now));
            ask.tokens = ask.tokens.min(most);
        }
        let cell = &mut planned[rule.cell];
        let state = rule.policy.state(*cell);
        let plan = rule.policy.limit.plan(state, ask, now);
        let admission = told(plan.admission, rule);
        let allows = admission == Admission::Allow;
        if rule.quota {
            quota_asked = true;
            quota_left |= allows || rule.shadow;
        } else {
            decision.allowed &= allows || rule.shadow;
        }
        // What others wait for is not drained by who is denied for that.
        let always = charging == Charging::Always && !is_held(rule);
        let charge = (allows || always || is_credit(rule)) && !is_watched_permit(rule);
        if charge {
            put(cell, rule.policy, state, plan.charged);
        }
        let Level { remaining, reset_after } = if charge { plan.after } else { plan.before };
        decision.verdicts.push(Verdict {
            cost: rule.ask.tokens,
            admission,
            shadow: rule.shadow,
            spent: plan.spent,
            limit: plan.limit,
            remaining,
            reset_after,
            granted: plan.granted,
            slice: plan.slice,
        });
    }

    decision.allowed &= (quota_left || !quota_asked) && charging != Charging::Nothing;
    if matches!(charging, Charging::AllOrNothing | Charging::Nothing) && !decision.allowed {
        give_back(rules, cells, now);
        tell_uncharged(&mut decision.verdicts, rules, cells, now);
    } else {
        cells.copy_from_slice(&planned);
    }
}

const fn is_lease(rule: &Rule<'_>) -> bool {
    matches!(rule.ask.purpose, Purpose::Lease { .. })
}

/// What every rule that is asked for a lease can give: of several limits on a key each leases as much, since what
/// is spent of it counts against all.
fn smallest_lease(rules: &[Rule<'_>], cells: &[Option<Cell>], now: Moment) -> u64 {
    let leases = rules.iter().filter(|rule| is_lease(rule)).map(|rule| {
        let state = rule.policy.state(cells[rule.cell]);
        rule.policy.limit.plan(state, rule.ask, now).granted
    });
    leases.min().unwrap_or(0)
}

/// What comes back does so whatever becomes of the rest, and whether it is enough or not.
const fn is_credit(rule: &Rule<'_>) -> bool {
    matches!(rule.ask.purpose, Purpose::Credit)
}

/// Whether others go first. What comes back is what they wait for.
const fn is_held(rule: &Rule<'_>) -> bool {
    rule.held && !is_credit(rule)
}

/// Charges `cells` for what comes back, and for nothing else.
fn give_back(rules: &[Rule<'_>], cells: &mut [Option<Cell>], now: Moment) {
    for rule in rules.iter().filter(|rule| is_credit(rule)) {
        let cell = &mut cells[rule.cell];
        let state = rule.policy.state(*cell);
        let plan = rule.policy.limit.plan(state, rule.ask, now);
        put(cell, rule.policy, state, plan.charged);
    }
}

/// Gives a cell another state, if it is another: one that nothing changed keeps its revision.
fn put(cell: &mut Option<Cell>, policy: &Policy, before: Option<State>, after: Option<State>) {
    if after != before {
        *cell = after.map(|state| Cell { revision: policy.revision, state });
    }
}

/// Whether it is a permit of a limiter that only watches: nobody would release it, so it is not taken.
const fn is_watched_permit(rule: &Rule<'_>) -> bool {
    rule.shadow && matches!(rule.policy.limit, Limit::Concurrency(_))
}

/// Nothing more was charged, so each verdict tells its cell as it is; a denial tells the wait for all that
/// is asked of the cell, as only all of it would be charged.
fn tell_uncharged(
    verdicts: &mut [Verdict],
    rules: &[Rule<'_>],
    cells: &[Option<Cell>],
    now: Moment,
) {
    for (index, (rule, verdict)) in rules.iter().zip(verdicts).enumerate() {
        let same_cell = rules[..=index].iter().filter(|other| other.cell == rule.cell);
        // A credit asks for nothing more: what it gives is there.
        let charged = same_cell.filter(|other| !is_credit(other) && !is_credit(rule));
        let tokens = charged.fold(0, |sum: u64, other| sum.saturating_add(other.ask.tokens));
        let state = rule.policy.state(cells[rule.cell]);
        let plan = rule.policy.limit.plan(state, Ask { tokens, ..rule.ask }, now);
        let Level { remaining, reset_after } = plan.before;
        (verdict.remaining, verdict.reset_after) = (remaining, reset_after);
        let admission = told(plan.admission, rule);
        // A peek that found nothing left by the others would find it now, and is denied all the same.
        if verdict.admission != Admission::Allow && admission != Admission::Allow {
            verdict.admission = admission;
        }
    }
}

/// What is told of a rule's answer: who waits for a cell has it first, and who shares one must know that it is
/// not the key's own.
fn told(admission: Admission, rule: &Rule<'_>) -> Admission {
    match admission {
        Admission::Allow if is_held(rule) && rule.ask.tokens > 0 => {
            Admission::Deny { reason: rule.policy.limit.exhausted(), retry_after: None }
        }
        Admission::Deny {
            reason: Reason::RateLimited | Reason::ConcurrencyLimited,
            retry_after,
        } if rule.overflow => Admission::Deny { reason: Reason::OverflowBucket, retry_after },
        admission => admission,
    }
}

/// Corrects a charge by what is known of it now.
///
/// The tokens refunded, owed or dropped are told; the cell's state is replaced.
pub fn settle(
    policy: &Policy,
    cell: &mut Option<Cell>,
    settlement: Settlement,
    now: Moment,
) -> Settled<Cell> {
    let state = policy.state(*cell);
    let settled = policy.limit.settle(state, settlement, now);
    put(cell, policy, state, settled.state);
    Settled {
        state: *cell,
        refunded: settled.refunded,
        owed: settled.owed,
        dropped: settled.dropped,
    }
}
