//! Properties of the core, for random settings and histories, against a naive model.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod circuits;
mod circuits_app;
mod concurrency;
mod decisions;
mod drift;
mod histories;
mod kinds;
mod leases;
mod linearizable;
mod marks;
mod model;
mod ratelimit;
mod retry_budget;
mod sliding_window;
mod token_bucket;
mod window;

use std::time::Duration;

use fusebox_core::{
    Ask, Cell, Limit, Moment, Policy, Purpose, Rule, Settlement, State, TokenBucket,
};
use proptest::prelude::*;

/// Settings of every size: the primes among them divide nothing.
fn buckets() -> impl Strategy<Value = TokenBucket> {
    let limit = prop_oneof![1..20_u64, Just(7), Just(1_000_003), 1..1_000_000_000_000_u64];
    let per_nanos = prop_oneof![
        1..1_000_u64,
        Just(1_000_000_000),
        Just(60_000_000_000),
        Just(86_400_000_000_000),
        1..31_622_400_000_000_000_u64,
    ];
    let burst = prop_oneof![1..20_u64, 1..1_000_000_000_000_u64];
    (limit, per_nanos, burst).prop_map(|(limit, per, burst)| {
        // Server time ends after 584 years; so does every wait. These fill within 146.
        let fills = (u128::from(u64::MAX / 4) * u128::from(limit) / u128::from(per)).max(1);
        let burst = burst.min(u64::try_from(fills).unwrap_or(u64::MAX));
        TokenBucket::new(limit, Duration::from_nanos(per), burst).unwrap()
    })
}

/// Steps of time that matter to a bucket: none, a part of a token, some tokens, the whole of it.
fn steps(bucket: TokenBucket) -> impl Strategy<Value = u64> {
    let token = (bucket.per().as_nanos() as u64 / bucket.limit()).max(1);
    let whole = u128::from(token) * u128::from(bucket.burst());
    let whole = u64::try_from(whole).unwrap_or(u64::MAX / 1_000).min(u64::MAX / 1_000);
    prop_oneof![Just(0), 0..=token, 0..=token.saturating_mul(5), 0..=whole.saturating_mul(2)]
}

/// Costs that matter to a bucket: a few tokens, or a good part of it.
fn costs(bucket: TokenBucket) -> impl Strategy<Value = u64> {
    prop_oneof![0..=bucket.burst().min(5), 0..=bucket.burst()]
}

fn tokens(tokens: u64) -> Ask {
    Ask::spend(tokens)
}

fn estimate(tokens: u64) -> Ask {
    Ask::spend(tokens).to(Purpose::Estimate)
}

/// That of an estimate of which nothing was known before.
fn settlement(charged: u64, actual: u64) -> Settlement {
    let (slice, window) = (None, None);
    Settlement { charged, told: 0, actual, partial: false, slice, window, max_debt: 0 }
}

fn policy(bucket: TokenBucket, max_debt: u64) -> Policy {
    Policy::new(Limit::TokenBucket(bucket), max_debt)
}

/// One that is decided over the first cell.
fn rule(policy: &Policy, ask: Ask) -> Rule<'_> {
    Rule { cell: 0, policy, ask, shadow: false, quota: false, overflow: false, held: false }
}

fn spent(cell: Option<Cell>) -> u64 {
    cell.map_or(0, |cell| {
        let State::TokenBucket(state) = cell.state else { panic!("of another kind") };
        state.spent
    })
}

/// So much later on both clocks.
fn later(now: Moment, nanos: u64) -> Moment {
    let pause = Duration::from_nanos(nanos);
    Moment { time: now.time.after(pause), wall: now.wall.after(pause) }
}
