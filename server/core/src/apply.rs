//! The decision over several cells, in two phases: plan, then commit.

use core::time::Duration;

use arrayvec::ArrayVec;

use crate::{Admission, Cell, Cost, Kind, Level, Policy, Settled, Settlement, Time};

/// Most rules that one decision takes: as many as an Acquire has asks.
pub const MAX_RULES: usize = 16;

/// The rules of one decision.
pub type Rules<'a> = ArrayVec<Rule<'a>, MAX_RULES>;

/// The cells that the rules speak of, each once; absent means full.
pub type Cells = ArrayVec<Option<Cell>, MAX_RULES>;

/// The verdicts of one decision, in the order of its rules.
pub type Verdicts = ArrayVec<Verdict, MAX_RULES>;

/// One cost, the policy that judges it and the cell that it charges.
#[derive(Clone, Copy, Debug)]
pub struct Rule<'a> {
    /// Index of the cell. Two rules may name the same: the later one sees what the earlier one charges.
    pub cell: usize,
    /// Who judges.
    pub policy: &'a Policy,
    /// What it costs.
    pub cost: Cost,
}

/// What is charged when not every rule allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Charging {
    /// Every rule, or none.
    AllOrNothing,
    /// Each rule that allows, whatever the others say.
    EachAlone,
    /// Every rule; one that denies drains its cell.
    Always,
}

/// The answer of one rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Tokens that were asked for; 0 was a peek.
    pub cost: u64,
    /// Whether the rule alone allows.
    pub admission: Admission,
    /// Most tokens that could ever be granted at once.
    pub limit: u64,
    /// Whole tokens left, after what was charged.
    pub remaining: u64,
    /// Time until the cell is full if nobody charges it, after what was charged.
    pub reset_after: Duration,
}

/// The answer of all rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Whether every rule allows.
    pub allowed: bool,
    /// One for each rule, in their order.
    pub verdicts: Verdicts,
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
    now: Time,
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
    now: Time,
) {
    decision.allowed = true;
    decision.verdicts.clear();
    let mut planned = Cells::new();
    planned.extend(cells.iter().copied());

    for rule in rules {
        let cell = &mut planned[rule.cell];
        let state = rule.policy.state(*cell);
        let plan = rule.policy.limit.plan(state, rule.cost, now);
        let allows = plan.admission == Admission::Allow;
        decision.allowed &= allows;
        let charge = allows || charging == Charging::Always;
        if charge && plan.charged != state {
            *cell = plan.charged.map(|state| Cell { revision: rule.policy.revision, state });
        }
        let Level { remaining, reset_after } = if charge { plan.after } else { plan.before };
        decision.verdicts.push(Verdict {
            cost: rule.cost.tokens,
            admission: plan.admission,
            limit: plan.limit,
            remaining,
            reset_after,
        });
    }

    if charging == Charging::AllOrNothing && !decision.allowed {
        tell_uncharged(&mut decision.verdicts, rules, cells, now);
    } else {
        cells.copy_from_slice(&planned);
    }
}

/// Nothing was charged, so each verdict tells its cell as it still is; a denial tells the wait for all that
/// is asked of the cell, as only all of it would be charged.
fn tell_uncharged(verdicts: &mut [Verdict], rules: &[Rule<'_>], cells: &[Option<Cell>], now: Time) {
    for (index, (rule, verdict)) in rules.iter().zip(verdicts).enumerate() {
        let same_cell = rules[..=index].iter().filter(|other| other.cell == rule.cell);
        let cost = same_cell.fold(0, |cost: u64, other| cost.saturating_add(other.cost.tokens));
        let state = rule.policy.state(cells[rule.cell]);
        let plan = rule.policy.limit.plan(state, Cost { tokens: cost, estimated: false }, now);
        let Level { remaining, reset_after } = plan.before;
        (verdict.remaining, verdict.reset_after) = (remaining, reset_after);
        if verdict.admission != Admission::Allow {
            verdict.admission = plan.admission;
        }
    }
}

/// Corrects the charge of an estimate by what the call really cost.
///
/// The tokens refunded, owed or dropped are told; the cell's state is replaced.
pub fn settle(
    policy: &Policy,
    cell: &mut Option<Cell>,
    charged: u64,
    actual: u64,
    now: Time,
) -> Settled<Cell> {
    let settlement = Settlement { charged, actual, max_debt: policy.max_debt };
    let state = policy.state(*cell);
    let settled = policy.limit.settle(state, settlement, now);
    *cell = settled.state.map(|state| Cell { revision: policy.revision, state });
    Settled {
        state: *cell,
        refunded: settled.refunded,
        owed: settled.owed,
        dropped: settled.dropped,
    }
}
