//! What is written to the journal: protobuf messages, so that they may grow.

use std::{sync::Arc, time::Duration};

use fusebox_core::{
    Cell, Concurrency, Former, Formers, Limit, MAX_FORMERS, Moment, Policy, RetryBudget,
    SlidingWindow, State, Time, TokenBucket, Wall, WindowLimit,
    circuit::{self, Evidence, Generation, Phase, Share, Transition},
    concurrency, retry_budget, saturating_nanos, sliding_window, token_bucket, window,
};
use prost::{Message, Oneof};

use super::{Holds, OpenGrant, OpenPart, circuits::CircuitName, embedded::Kept};
use crate::{
    app::GrantId,
    catalogue::{CellId, LimiterNumber},
};

/// Version of these records and their keys. A data directory of another version is not opened.
pub(crate) const FORMAT: u32 = 2;

/// Facts of the data directory itself: one record.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Directory {
    #[prost(uint32, tag = "1")]
    pub(crate) format: u32,
    /// Key of the hash that names cells.
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) secret: Vec<u8>,
    /// Number of the latest start.
    #[prost(uint64, tag = "3")]
    pub(crate) boot: u64,
    /// Number that the next limiter gets.
    #[prost(uint32, tag = "4")]
    pub(crate) next_limiter: u32,
    /// Version that the next change of a policy gets.
    #[prost(uint64, tag = "5")]
    pub(crate) next_version: u64,
}

/// What an operator wrote of a policy.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct PolicyRecord {
    #[prost(string, tag = "1")]
    pub(crate) namespace: String,
    #[prost(string, tag = "2")]
    pub(crate) name: String,
    /// As a configuration file would have it.
    #[prost(string, tag = "3")]
    pub(crate) settings: String,
    #[prost(uint64, tag = "4")]
    pub(crate) version: u64,
    #[prost(uint64, tag = "5")]
    pub(crate) created_nanos: u64,
    #[prost(uint64, tag = "6")]
    pub(crate) updated_nanos: u64,
    /// The Admin service manages it, and no file.
    #[prost(bool, tag = "7")]
    pub(crate) made: bool,
    /// A rule of Envoy's rate limit service, of a file of its own.
    #[prost(bool, tag = "8")]
    pub(crate) rule: bool,
}

/// The last commit: its number, and its moment on both clocks. Part of every commit.
#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct CommitRecord {
    #[prost(uint64, tag = "1")]
    server_nanos: u64,
    #[prost(uint64, tag = "2")]
    wall_nanos: u64,
    #[prost(uint64, tag = "3")]
    pub(super) number: u64,
}

/// Says that a start ended as it should: what it wrote last is exact.
#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct CleanStop {
    /// The start that it ended.
    #[prost(uint64, tag = "1")]
    pub(super) boot: u64,
}

/// An open grant, written by a clean stop.
#[derive(Clone, PartialEq, Message)]
pub(super) struct GrantRecord {
    #[prost(string, tag = "7")]
    client: String,
    #[prost(message, repeated, tag = "8")]
    parts: Vec<PartRecord>,
    /// The start that wrote it: beside the clean stop of another it says nothing.
    #[prost(uint64, tag = "6")]
    pub(super) exact_of: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct PartRecord {
    #[prost(uint32, tag = "1")]
    number: u32,
    #[prost(fixed64, tag = "2")]
    cell_high: u64,
    #[prost(fixed64, tag = "3")]
    cell_low: u64,
    #[prost(uint64, tag = "4")]
    charged: u64,
    #[prost(uint64, tag = "5")]
    expires_at_nanos: u64,
    #[prost(uint64, tag = "6")]
    told: u64,
    #[prost(uint64, tag = "7")]
    slice: u64,
    #[prost(uint32, tag = "8")]
    revision: u32,
    /// 0 is an estimate, 1 a lease, 2 a permit.
    #[prost(uint32, tag = "9")]
    holds: u32,
}

/// A limiter: what its cells call it, and the settings they were counted in.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct LimiterRecord {
    #[prost(string, tag = "1")]
    pub(crate) namespace: String,
    #[prost(string, tag = "2")]
    pub(crate) name: String,
    #[prost(uint32, tag = "3")]
    pub(crate) number: u32,
    #[prost(uint32, tag = "4")]
    revision: u32,
    #[prost(message, optional, tag = "5")]
    limit: Option<LimitRecord>,
    #[prost(uint64, tag = "6")]
    max_debt: u64,
    #[prost(message, repeated, tag = "7")]
    formers: Vec<FormerRecord>,
    /// Its cells are not written while they live.
    #[prost(bool, tag = "8")]
    pub(crate) fast: bool,
    /// What a cell that is not there is, if not full.
    #[prost(message, optional, tag = "9")]
    absent: Option<CellRecord>,
    /// Which keys of the policy it is for: all that no override names if empty, one if it begins with `=`,
    /// those of a prefix if with `^`.
    #[prost(string, tag = "10")]
    pub(crate) keys: String,
    /// Which of several limits on a key.
    #[prost(uint32, tag = "11")]
    pub(crate) index: u32,
    /// The first revision since which it has been of one kind; 0 if its formers say.
    #[prost(uint32, tag = "12")]
    like_since: u32,
    /// Its cells are not written only because the policy watches: what a crash forgets was no promise.
    #[prost(bool, tag = "13")]
    pub(crate) watches: bool,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct FormerRecord {
    #[prost(uint32, tag = "1")]
    revision: u32,
    #[prost(message, optional, tag = "2")]
    limit: Option<LimitRecord>,
    #[prost(uint64, tag = "3")]
    until_nanos: u64,
    #[prost(uint64, tag = "4")]
    until_wall_nanos: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct LimitRecord {
    #[prost(oneof = "KindRecord", tags = "1, 2, 3, 4, 5, 6")]
    kind: Option<KindRecord>,
}

#[derive(Clone, Copy, PartialEq, Oneof)]
enum KindRecord {
    #[prost(message, tag = "1")]
    TokenBucket(TokenBucketRecord),
    #[prost(message, tag = "2")]
    FixedWindow(PeriodRecord),
    #[prost(message, tag = "3")]
    CalendarWindow(PeriodRecord),
    #[prost(message, tag = "4")]
    SlidingWindow(PeriodRecord),
    #[prost(message, tag = "5")]
    Concurrency(PeriodRecord),
    #[prost(message, tag = "6")]
    RetryBudget(RetryBudgetRecord),
}

/// A limit and the time that it is about.
#[derive(Clone, Copy, PartialEq, Message)]
struct PeriodRecord {
    #[prost(uint64, tag = "1")]
    limit: u64,
    #[prost(uint64, tag = "2")]
    nanos: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct RetryBudgetRecord {
    #[prost(uint32, tag = "1")]
    ratio_per_mille: u32,
    #[prost(uint32, tag = "2")]
    min_per_second: u32,
    #[prost(uint64, tag = "3")]
    ttl_nanos: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct TokenBucketRecord {
    #[prost(uint64, tag = "1")]
    limit: u64,
    #[prost(uint64, tag = "2")]
    per_nanos: u64,
    #[prost(uint64, tag = "3")]
    burst: u64,
}

/// A cell of the limiter of that number: an upper bound of what it has spent.
#[derive(Clone, PartialEq, Message)]
pub(super) struct CellRecord {
    #[prost(uint32, tag = "1")]
    pub(super) number: u32,
    #[prost(uint32, tag = "2")]
    revision: u32,
    #[prost(oneof = "StateRecord", tags = "3, 5, 6, 7, 8")]
    state: Option<StateRecord>,
    /// Many keys share it.
    #[prost(bool, tag = "9")]
    is_overflow: bool,
    /// The start whose clean stop wrote it, if one did. Beside the record of that stop it is exact.
    #[prost(uint64, tag = "4")]
    pub(super) exact_of: u64,
}

#[derive(Clone, PartialEq, Oneof)]
enum StateRecord {
    #[prost(message, tag = "3")]
    TokenBucket(TokenBucketState),
    #[prost(message, tag = "5")]
    Window(WindowState),
    #[prost(message, tag = "6")]
    SlidingWindow(SlidingWindowState),
    #[prost(message, tag = "7")]
    Concurrency(ConcurrencyState),
    #[prost(message, tag = "8")]
    RetryBudget(RetryBudgetState),
}

#[derive(Clone, Copy, PartialEq, Message)]
struct TokenBucketState {
    #[prost(uint64, tag = "1")]
    spent: u64,
    #[prost(uint64, tag = "2")]
    remainder: u64,
    #[prost(uint64, tag = "3")]
    at_nanos: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct WindowState {
    #[prost(uint64, tag = "1")]
    spent: u64,
    #[prost(uint64, tag = "2")]
    start_nanos: u64,
    #[prost(uint64, tag = "3")]
    end_nanos: u64,
    #[prost(uint64, tag = "4")]
    since_nanos: u64,
}

#[derive(Clone, PartialEq, Message)]
struct SlidingWindowState {
    #[prost(uint32, repeated, tag = "1")]
    counts: Vec<u32>,
    #[prost(uint64, tag = "2")]
    newest: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct ConcurrencyState {
    #[prost(uint64, tag = "1")]
    held: u64,
    #[prost(uint64, tag = "2")]
    anonymous: u64,
    #[prost(uint64, tag = "3")]
    until_nanos: u64,
}

#[derive(Clone, PartialEq, Message)]
struct RetryBudgetState {
    #[prost(sint32, repeated, tag = "1")]
    balances: Vec<i32>,
    #[prost(uint64, tag = "2")]
    newest: u64,
}

/// A circuit, of which something is known that its breaker does not say.
#[derive(Clone, PartialEq, Message)]
pub(super) struct CircuitRecord {
    #[prost(string, tag = "1")]
    pub(super) namespace: String,
    #[prost(string, tag = "2")]
    pub(super) policy: String,
    #[prost(string, tag = "3")]
    pub(super) key: String,
    /// In the order of [`Phase::ALL`].
    #[prost(uint32, tag = "4")]
    phase: u32,
    #[prost(uint64, tag = "5")]
    generation: u64,
    #[prost(uint64, tag = "6")]
    since_nanos: u64,
    #[prost(uint64, optional, tag = "7")]
    opened_at_nanos: Option<u64>,
    #[prost(uint64, tag = "8")]
    wait_until_nanos: u64,
    #[prost(uint32, tag = "9")]
    attempt: u32,
    #[prost(bool, tag = "10")]
    ramps: bool,
    #[prost(message, optional, tag = "11")]
    forced: Option<ForcedRecord>,
    #[prost(message, repeated, tag = "12")]
    history: Vec<TransitionRecord>,
}

#[derive(Clone, PartialEq, Message)]
struct ForcedRecord {
    #[prost(uint64, tag = "1")]
    until_nanos: u64,
    #[prost(string, tag = "2")]
    reason: String,
    #[prost(string, tag = "3")]
    actor: String,
}

#[derive(Clone, PartialEq, Message)]
struct TransitionRecord {
    #[prost(uint64, tag = "1")]
    generation: u64,
    #[prost(uint64, tag = "2")]
    at_nanos: u64,
    /// In the order of [`Event::ALL`].
    #[prost(uint32, tag = "3")]
    event: u32,
    #[prost(uint32, tag = "4")]
    phase: u32,
    #[prost(message, optional, tag = "5")]
    evidence: Option<EvidenceRecord>,
    #[prost(message, optional, tag = "6")]
    order: Option<OrderRecord>,
}

#[derive(Clone, PartialEq, Message)]
struct OrderRecord {
    #[prost(string, tag = "1")]
    reason: String,
    #[prost(string, tag = "2")]
    actor: String,
}

#[derive(Clone, PartialEq, Message)]
struct EvidenceRecord {
    #[prost(uint32, tag = "1")]
    failure_rate_basis_points: u32,
    #[prost(uint32, tag = "2")]
    slow_rate_basis_points: u32,
    #[prost(uint64, tag = "3")]
    calls: u64,
    #[prost(uint32, tag = "4")]
    reporters: u32,
    #[prost(uint32, tag = "5")]
    unhealthy: u32,
    #[prost(string, repeated, tag = "6")]
    zones: Vec<String>,
    #[prost(string, repeated, tag = "7")]
    kinds: Vec<String>,
}

impl CircuitRecord {
    pub(super) fn of(name: &CircuitName, kept: &circuit::Kept) -> Self {
        Self {
            namespace: name.breaker.namespace.to_string(),
            policy: name.breaker.policy.to_string(),
            key: name.key.to_string(),
            phase: number_of(&Phase::ALL, &kept.phase),
            generation: kept.generation.0,
            since_nanos: kept.since.as_nanos(),
            opened_at_nanos: kept.opened_at.map(Time::as_nanos),
            wait_until_nanos: kept.wait_until.as_nanos(),
            attempt: kept.attempt,
            ramps: kept.ramps,
            forced: kept.forced.as_ref().map(|forced| ForcedRecord {
                until_nanos: forced.until.as_nanos(),
                reason: forced.reason.to_string(),
                actor: forced.actor.to_string(),
            }),
            history: kept.history.iter().map(TransitionRecord::of).collect(),
        }
    }

    /// What was kept; `None` if the record makes no sense.
    pub(super) fn kept(&self) -> Option<circuit::Kept> {
        Some(circuit::Kept {
            phase: numbered(&Phase::ALL, self.phase)?,
            generation: Generation(self.generation),
            since: Time::from_nanos(self.since_nanos),
            opened_at: self.opened_at_nanos.map(Time::from_nanos),
            wait_until: Time::from_nanos(self.wait_until_nanos),
            attempt: self.attempt,
            ramps: self.ramps,
            forced: self.forced.as_ref().map(|forced| circuit::Forced {
                until: Time::from_nanos(forced.until_nanos),
                reason: forced.reason.as_str().into(),
                actor: forced.actor.as_str().into(),
            }),
            history: self
                .history
                .iter()
                .map(TransitionRecord::transition)
                .collect::<Option<_>>()?,
        })
    }
}

impl TransitionRecord {
    fn of(transition: &Transition) -> Self {
        Self {
            generation: transition.generation.0,
            at_nanos: transition.at.as_nanos(),
            event: number_of(&circuit::Event::ALL, &transition.event),
            phase: number_of(&Phase::ALL, &transition.phase),
            evidence: transition.evidence.as_deref().map(EvidenceRecord::of),
            order: transition.order.as_ref().map(|(reason, actor)| OrderRecord {
                reason: reason.to_string(),
                actor: actor.to_string(),
            }),
        }
    }

    fn transition(&self) -> Option<Transition> {
        Some(Transition {
            generation: Generation(self.generation),
            at: Time::from_nanos(self.at_nanos),
            event: numbered(&circuit::Event::ALL, self.event)?,
            phase: numbered(&Phase::ALL, self.phase)?,
            evidence: match &self.evidence {
                Some(evidence) => Some(Arc::new(evidence.evidence()?)),
                None => None,
            },
            order: self
                .order
                .as_ref()
                .map(|order| (order.reason.as_str().into(), order.actor.as_str().into())),
        })
    }
}

impl EvidenceRecord {
    fn of(evidence: &Evidence) -> Self {
        let texts = |all: &[Arc<str>]| all.iter().map(ToString::to_string).collect();
        Self {
            failure_rate_basis_points: evidence.failure_rate.basis_points().into(),
            slow_rate_basis_points: evidence.slow_rate.basis_points().into(),
            calls: evidence.calls,
            reporters: evidence.reporters,
            unhealthy: evidence.unhealthy,
            zones: texts(&evidence.zones),
            kinds: texts(&evidence.kinds),
        }
    }

    fn evidence(&self) -> Option<Evidence> {
        let share = |basis_points| Share::new(u16::try_from(basis_points).ok()?);
        let texts = |all: &[String]| all.iter().map(|text| text.as_str().into()).collect();
        Some(Evidence {
            failure_rate: share(self.failure_rate_basis_points)?,
            slow_rate: share(self.slow_rate_basis_points)?,
            calls: self.calls,
            reporters: self.reporters,
            unhealthy: self.unhealthy,
            zones: texts(&self.zones),
            kinds: texts(&self.kinds),
        })
    }
}

/// The place of a value among all of its type, which is never changed once there are records.
fn number_of<T: PartialEq>(all: &[T], one: &T) -> u32 {
    let place = all.iter().position(|other| other == one).unwrap_or_default();
    u32::try_from(place).unwrap_or_default()
}

fn numbered<T: Copy>(all: &[T], number: u32) -> Option<T> {
    all.get(usize::try_from(number).ok()?).copied()
}

impl CommitRecord {
    pub(super) fn of(number: u64, at: Moment) -> Self {
        Self { server_nanos: at.time.as_nanos(), wall_nanos: at.wall.as_nanos(), number }
    }

    pub(super) fn at(self) -> Moment {
        Moment {
            time: Time::from_nanos(self.server_nanos),
            wall: Wall::from_nanos(self.wall_nanos),
        }
    }
}

impl LimiterRecord {
    pub(crate) fn of(
        (namespace, name): (&str, &str),
        (keys, index): (&str, u32),
        number: LimiterNumber,
        policy: &Policy,
        (fast, watches): (bool, bool),
    ) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            keys: keys.to_owned(),
            index,
            number: number.0,
            revision: policy.revision,
            like_since: policy.like_since,
            limit: Some(LimitRecord::of(&policy.limit)),
            max_debt: policy.max_debt,
            formers: policy.formers.iter().map(FormerRecord::of).collect(),
            fast,
            watches,
            absent: policy
                .absent
                .map(|cell| CellRecord::of(&Kept { number, cell, is_overflow: false })),
        }
    }

    /// The policy; `None` if the record makes no sense.
    pub(crate) fn policy(&self) -> Option<Policy> {
        if self.formers.len() > MAX_FORMERS {
            return None;
        }
        let limit = self.limit?.limit()?;
        let formers = self.formers.iter().map(FormerRecord::former).collect::<Option<Formers>>()?;
        let like = formers.iter().rev().take_while(|former| former.limit.is_like(&limit)).last();
        Some(Policy {
            limit,
            revision: self.revision,
            like_since: match self.like_since {
                0 => like.map_or(self.revision, |former| former.revision),
                known => known,
            },
            max_debt: self.max_debt,
            formers,
            absent: match &self.absent {
                Some(absent) => Some(absent.cell()?),
                None => None,
            },
        })
    }
}

impl FormerRecord {
    fn of(former: &Former) -> Self {
        Self {
            revision: former.revision,
            limit: Some(LimitRecord::of(&former.limit)),
            until_nanos: former.until.time.as_nanos(),
            until_wall_nanos: former.until.wall.as_nanos(),
        }
    }

    fn former(&self) -> Option<Former> {
        let until = Moment {
            time: Time::from_nanos(self.until_nanos),
            wall: Wall::from_nanos(self.until_wall_nanos),
        };
        Some(Former { revision: self.revision, limit: self.limit?.limit()?, until })
    }
}

impl LimitRecord {
    fn of(limit: &Limit) -> Self {
        let period = |limit, time| PeriodRecord { limit, nanos: saturating_nanos(time) };
        let kind = match limit {
            Limit::TokenBucket(bucket) => KindRecord::TokenBucket(TokenBucketRecord {
                limit: bucket.limit(),
                per_nanos: bucket.per_nanos(),
                burst: bucket.burst(),
            }),
            Limit::Window(window) => {
                let record = period(window.limit(), window.longest());
                match window.period() {
                    window::Period::Fixed(_) => KindRecord::FixedWindow(record),
                    window::Period::Calendar(_) => KindRecord::CalendarWindow(record),
                }
            }
            Limit::SlidingWindow(window) => {
                KindRecord::SlidingWindow(period(window.limit(), window.per()))
            }
            Limit::Concurrency(permits) => {
                KindRecord::Concurrency(period(permits.limit(), permits.ttl()))
            }
            Limit::RetryBudget(budget) => KindRecord::RetryBudget(RetryBudgetRecord {
                ratio_per_mille: budget.ratio_per_mille().into(),
                min_per_second: budget.min_per_second(),
                ttl_nanos: saturating_nanos(budget.ttl()),
            }),
        };
        Self { kind: Some(kind) }
    }

    fn limit(self) -> Option<Limit> {
        let time = |period: PeriodRecord| Duration::from_nanos(period.nanos);
        Some(match self.kind? {
            KindRecord::TokenBucket(TokenBucketRecord { limit, per_nanos, burst }) => {
                let per = Duration::from_nanos(per_nanos);
                Limit::TokenBucket(TokenBucket::new(limit, per, burst).ok()?)
            }
            KindRecord::FixedWindow(period) => {
                Limit::Window(WindowLimit::fixed(period.limit, time(period)).ok()?)
            }
            KindRecord::CalendarWindow(period) => {
                Limit::Window(WindowLimit::calendar(period.limit, time(period)).ok()?)
            }
            KindRecord::SlidingWindow(period) => {
                Limit::SlidingWindow(SlidingWindow::new(period.limit, time(period)).ok()?)
            }
            KindRecord::Concurrency(period) => {
                Limit::Concurrency(Concurrency::new(period.limit, time(period)).ok()?)
            }
            KindRecord::RetryBudget(budget) => {
                let ratio = u16::try_from(budget.ratio_per_mille).ok()?;
                let ttl = Duration::from_nanos(budget.ttl_nanos);
                Limit::RetryBudget(RetryBudget::new(ratio, budget.min_per_second, ttl).ok()?)
            }
        })
    }
}

impl CellRecord {
    /// What is out is not written: what a crash interrupts stays charged, and what a clean stop leaves open
    /// is known by its grants.
    pub(super) fn of(Kept { number, cell, is_overflow }: &Kept) -> Self {
        let state = match cell.state {
            State::TokenBucket(state) => StateRecord::TokenBucket(TokenBucketState {
                spent: state.spent,
                remainder: state.remainder,
                at_nanos: state.at.as_nanos(),
            }),
            State::Window(state) => StateRecord::Window(WindowState {
                spent: state.spent,
                start_nanos: state.start.as_nanos(),
                end_nanos: state.end.as_nanos(),
                since_nanos: state.since.as_nanos(),
            }),
            State::SlidingWindow(state) => StateRecord::SlidingWindow(SlidingWindowState {
                counts: state.counts.to_vec(),
                newest: state.newest(),
            }),
            State::Concurrency(state) => StateRecord::Concurrency(ConcurrencyState {
                held: state.held,
                anonymous: state.anonymous,
                until_nanos: state.until.as_nanos(),
            }),
            State::RetryBudget(state) => StateRecord::RetryBudget(RetryBudgetState {
                balances: state.counts.to_vec(),
                newest: state.newest(),
            }),
        };
        let state = Some(state);
        Self {
            number: number.0,
            revision: cell.revision,
            state,
            is_overflow: *is_overflow,
            exact_of: 0,
        }
    }

    /// The cell as a clean stop of that start leaves it.
    pub(super) fn exact(kept: &Kept, boot: u64) -> Self {
        Self { exact_of: boot, ..Self::of(kept) }
    }

    /// The cell and whose it is; `None` if the record makes no sense.
    pub(super) fn kept(&self) -> Option<Kept> {
        let number = LimiterNumber(self.number);
        Some(Kept { number, cell: self.cell()?, is_overflow: self.is_overflow })
    }

    /// The cell with nothing out; `None` if the record makes no sense.
    fn cell(&self) -> Option<Cell> {
        // More than a limit and as much debt: no cell has that.
        let sane = |tokens: u64| tokens <= 2 * token_bucket::MAX_TOKENS;
        let state = match self.state.as_ref()? {
            StateRecord::TokenBucket(TokenBucketState { spent, remainder, at_nanos }) => {
                // Nor a part of a token that is longer than a period.
                if !sane(*spent) || *remainder >= saturating_nanos(token_bucket::MAX_PER) {
                    return None;
                }
                State::TokenBucket(token_bucket::State {
                    spent: *spent,
                    remainder: *remainder,
                    out: 0,
                    at: Time::from_nanos(*at_nanos),
                })
            }
            // Of a window that counts also what it denies any number makes sense.
            StateRecord::Window(state) => State::Window(window::State {
                spent: state.spent,
                start: Wall::from_nanos(state.start_nanos),
                end: Wall::from_nanos(state.end_nanos),
                since: Time::from_nanos(state.since_nanos),
            }),
            StateRecord::SlidingWindow(state) => {
                let counts = state.counts.as_slice().try_into().ok()?;
                State::SlidingWindow(sliding_window::State::new(counts, state.newest))
            }
            StateRecord::Concurrency(state) => {
                if !sane(state.held) || !sane(state.anonymous) {
                    return None;
                }
                let until = Time::from_nanos(state.until_nanos);
                let ConcurrencyState { held, anonymous, .. } = *state;
                State::Concurrency(concurrency::State { held, anonymous, until })
            }
            StateRecord::RetryBudget(state) => {
                let balances = state.balances.as_slice().try_into().ok()?;
                State::RetryBudget(retry_budget::State::new(balances, state.newest))
            }
        };
        Some(Cell { revision: self.revision, state })
    }
}

impl GrantRecord {
    pub(super) fn of(grant: &OpenGrant, boot: u64) -> Self {
        let parts = grant.parts.iter().map(|part| PartRecord {
            number: part.number.0,
            cell_high: part.cell.0[0],
            cell_low: part.cell.0[1],
            charged: part.charged,
            expires_at_nanos: part.expires_at.as_nanos(),
            told: part.told,
            slice: part.slice,
            revision: part.revision,
            holds: match part.holds {
                Holds::Estimate => 0,
                Holds::Lease => 1,
                Holds::Permit => 2,
            },
        });
        Self { client: grant.client.clone(), parts: parts.collect(), exact_of: boot }
    }

    /// The grant; `None` if the record makes no sense.
    pub(super) fn grant(&self, id: GrantId) -> Option<OpenGrant> {
        let part = |part: &PartRecord| {
            Some(OpenPart {
                holds: match part.holds {
                    0 => Holds::Estimate,
                    1 => Holds::Lease,
                    2 => Holds::Permit,
                    _ => return None,
                },
                number: LimiterNumber(part.number),
                revision: part.revision,
                cell: CellId([part.cell_high, part.cell_low]),
                slice: part.slice,
                charged: part.charged,
                told: part.told,
                expires_at: Time::from_nanos(part.expires_at_nanos),
            })
        };
        let parts = self.parts.iter().map(part).collect::<Option<Vec<_>>>()?;
        Some(OpenGrant { id, client: self.client.clone(), parts })
    }
}

/// The key of a grant.
pub(super) fn grant_key(id: GrantId) -> [u8; 24] {
    let mut key = [0; 24];
    key[..8].copy_from_slice(&id.boot.to_be_bytes());
    key[8..].copy_from_slice(&id.secret.to_be_bytes());
    key
}

/// The grant of a key; `None` if it is not one.
pub(super) fn grant_of_key(key: &[u8]) -> Option<GrantId> {
    let (boot, secret) = key.split_first_chunk()?;
    let secret = u128::from_be_bytes(secret.try_into().ok()?);
    Some(GrantId { boot: u64::from_be_bytes(*boot), secret })
}
