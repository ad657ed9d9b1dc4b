//! Grant time: what clients spend from leases obeys the limit, whatever the network does.
//!
//! Four small worlds: [`grants`] (leases and estimates, their answers and reports), [`requests`] (one
//! request, sent again), [`overflow`] (keys that share a cell) and [`line`] (callers that wait). Their
//! clocks only count down and what has no more effect is forgotten, so each is finite without an end of
//! time: histories of any length are searched. They are judged by what was *spent*, and when.

mod grants;
mod line;
mod overflow;
mod requests;

use std::time::Duration;

use fusebox_core::{
    Admission, Ask, Kind, Moment, Purpose, Settlement, TokenBucket, token_bucket::State,
};

use crate::search::{expect_harm, expect_nothing};

/// Most tokens that gather.
const BURST: u8 = 2;
/// Ticks in which one token flows. More than one, so that a lease may end between two tokens.
const PER: u8 = 2;

/// The core's bucket, with as much of it as these worlds need: this is the only place that calls it.
///
/// It is refilled at each tick, so that it need not know when it was touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Bucket {
    spent: u8,
    /// Ticks' worth of one more token.
    remainder: u8,
    out: u8,
}

impl Bucket {
    const FULL: Self = Self { spent: 0, remainder: 0, out: 0 };

    fn settings() -> TokenBucket {
        TokenBucket::new(1, Duration::from_nanos(PER.into()), BURST.into()).unwrap()
    }

    fn at(ticks: u8) -> Moment {
        Moment::from_nanos(ticks.into())
    }

    fn state(self) -> State {
        let Self { spent, remainder, out } = self;
        State {
            spent: spent.into(),
            remainder: remainder.into(),
            out: out.into(),
            at: Self::at(0).time,
        }
    }

    fn of(State { spent, remainder, out, .. }: State) -> Self {
        let small = |wide: u64| u8::try_from(wide).unwrap();
        Self { spent: small(spent), remainder: small(remainder), out: small(out) }
    }

    /// The bucket after a charge, which may come back if it is `owed`; `None` if it is denied.
    fn charged(self, tokens: u8, owed: bool) -> Option<Self> {
        let purpose = if owed { Purpose::Estimate } else { Purpose::Spend };
        let ask = Ask::spend(tokens.into()).to(purpose);
        let plan = Self::settings().plan(Some(self.state()), ask, Self::at(0));
        (plan.admission == Admission::Allow).then(|| plan.charged.map_or(self, Self::of))
    }

    /// The bucket once it is known what tokens that were out really cost.
    fn settled(self, charged: u8, actual: u8) -> Self {
        self.settled_at(charged, actual, 0)
    }

    fn after_a_tick(self) -> Self {
        self.settled_at(0, 0, 1)
    }

    fn settled_at(self, charged: u8, actual: u8, now: u8) -> Self {
        let (charged, actual) = (charged.into(), actual.into());
        let (partial, slice, window) = (false, None, None);
        let settlement =
            Settlement { charged, told: 0, actual, partial, slice, window, max_debt: 0 };
        let settled = Self::settings().settle(Some(self.state()), settlement, Self::at(now));
        settled.state.map_or(self, Self::of)
    }

    /// The bucket after a crash: a mark is all that is left of it, so nothing is out any more.
    fn recovered(self) -> Self {
        let state = Self { out: 0, remainder: 0, spent: self.spent + u8::from(self.remainder > 0) };
        Self::of(Self::settings().revive(state.state(), 0, Self::at(0)))
    }

    /// A bucket that begins as a copy: what is out comes back to the first one only.
    fn copied(self) -> Self {
        Self { out: 0, ..self }
    }

    fn remaining(self) -> u8 {
        BURST - (self.spent + u8::from(self.remainder > 0)).min(BURST)
    }
}

/// The judge's ledger, in ticks' worth of tokens: by how much spends outran the rate since any moment, at
/// most.
///
/// `burst + rate x (d + widened)` holds in every interval of any length d just if this never exceeds
/// `burst + rate x widened`: whichever moment an interval begins at, it is in the maximum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Outrun(u8);

impl Outrun {
    fn spend(&mut self, tokens: u8) {
        self.0 += tokens * PER;
    }

    fn tick(&mut self) {
        self.0 = self.0.saturating_sub(1);
    }

    fn wrong(self, widened: u8) -> Option<String> {
        let most = BURST * PER + widened;
        (self.0 > most).then(|| format!("{} ticks' worth spent of {most}", self.0))
    }
}

/// What spends are held to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Bound {
    /// What is promised: every interval is widened by a lease time.
    Promised,
    /// No interval is widened, as long as no crash has made the server forget what is out: until a lease is
    /// settled or has ended, nothing flows into its place.
    Exact,
}

impl Bound {
    fn widened(self, crashed: bool, lease_time: u8) -> u8 {
        if self == Self::Promised || crashed { lease_time } else { 0 }
    }
}

/// A time to come, in ticks, counted down; `None` when it is over. At its very end it is not.
type Countdown = Option<u8>;

fn count_down(time: Countdown) -> Countdown {
    time.and_then(|ticks| ticks.checked_sub(1))
}
