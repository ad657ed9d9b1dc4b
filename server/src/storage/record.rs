//! What is written to the journal: protobuf messages, so that they may grow.

use std::time::Duration;

use fusebox_core::{
    Cell, Former, Formers, Limit, MAX_FORMERS, Policy, State, Time, TokenBucket, saturating_nanos,
    token_bucket,
};
use prost::{Message, Oneof};

use super::OpenGrant;
use crate::{
    app::GrantId,
    catalogue::{CellId, PolicyNumber},
    clock::ClockPair,
};

/// Version of these records and their keys. A data directory of another version is not opened.
pub(super) const FORMAT: u32 = 1;

/// Facts of the data directory itself: one record.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Directory {
    #[prost(uint32, tag = "1")]
    pub(super) format: u32,
    /// Key of the hash that names cells.
    #[prost(bytes = "vec", tag = "2")]
    pub(super) secret: Vec<u8>,
    /// Number of the latest start.
    #[prost(uint64, tag = "3")]
    pub(super) boot: u64,
    /// Number that the next policy gets.
    #[prost(uint32, tag = "4")]
    pub(super) next_policy: u32,
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
#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct GrantRecord {
    #[prost(uint32, tag = "1")]
    number: u32,
    #[prost(fixed64, tag = "2")]
    cell_high: u64,
    #[prost(fixed64, tag = "3")]
    cell_low: u64,
    #[prost(uint64, tag = "4")]
    amount: u64,
    #[prost(uint64, tag = "5")]
    expires_at_nanos: u64,
    /// The start that wrote it: beside the clean stop of another it says nothing.
    #[prost(uint64, tag = "6")]
    pub(super) exact_of: u64,
}

/// A policy: what its cells call it, and the settings they were counted in.
#[derive(Clone, PartialEq, Message)]
pub(super) struct PolicyRecord {
    #[prost(string, tag = "1")]
    pub(super) namespace: String,
    #[prost(string, tag = "2")]
    pub(super) name: String,
    #[prost(uint32, tag = "3")]
    pub(super) number: u32,
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
    pub(super) fast: bool,
    /// What a cell that is not there is, if not full.
    #[prost(message, optional, tag = "9")]
    absent: Option<CellRecord>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct FormerRecord {
    #[prost(uint32, tag = "1")]
    revision: u32,
    #[prost(message, optional, tag = "2")]
    limit: Option<LimitRecord>,
    #[prost(uint64, tag = "3")]
    until_nanos: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct LimitRecord {
    #[prost(oneof = "KindRecord", tags = "1")]
    kind: Option<KindRecord>,
}

#[derive(Clone, Copy, PartialEq, Oneof)]
enum KindRecord {
    #[prost(message, tag = "1")]
    TokenBucket(TokenBucketRecord),
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

/// A cell of the policy of that number: an upper bound of what it has spent.
#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct CellRecord {
    #[prost(uint32, tag = "1")]
    pub(super) number: u32,
    #[prost(uint32, tag = "2")]
    revision: u32,
    #[prost(oneof = "StateRecord", tags = "3")]
    state: Option<StateRecord>,
    /// The start whose clean stop wrote it, if one did. Beside the record of that stop it is exact.
    #[prost(uint64, tag = "4")]
    pub(super) exact_of: u64,
}

#[derive(Clone, Copy, PartialEq, Oneof)]
enum StateRecord {
    #[prost(message, tag = "3")]
    TokenBucket(TokenBucketState),
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

impl CommitRecord {
    pub(super) fn of(number: u64, pair: ClockPair) -> Self {
        let (server_nanos, wall_nanos) = (pair.server.as_nanos(), saturating_nanos(pair.wall));
        Self { server_nanos, wall_nanos, number }
    }

    pub(super) fn pair(self) -> ClockPair {
        ClockPair {
            server: Time::from_nanos(self.server_nanos),
            wall: Duration::from_nanos(self.wall_nanos),
        }
    }
}

impl PolicyRecord {
    pub(super) fn of(
        namespace: &str,
        name: &str,
        number: PolicyNumber,
        policy: &Policy,
        fast: bool,
    ) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            number: number.0,
            revision: policy.revision,
            limit: Some(LimitRecord::of(&policy.limit)),
            max_debt: policy.max_debt,
            formers: policy.formers.iter().map(FormerRecord::of).collect(),
            fast,
            absent: policy.absent.map(|cell| CellRecord::of(number, cell)),
        }
    }

    /// The policy; `None` if the record makes no sense.
    pub(super) fn policy(&self) -> Option<Policy> {
        if self.formers.len() > MAX_FORMERS {
            return None;
        }
        Some(Policy {
            limit: self.limit?.limit()?,
            revision: self.revision,
            max_debt: self.max_debt,
            formers: self.formers.iter().map(FormerRecord::former).collect::<Option<Formers>>()?,
            absent: match self.absent {
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
            until_nanos: former.until.as_nanos(),
        }
    }

    fn former(&self) -> Option<Former> {
        Some(Former {
            revision: self.revision,
            limit: self.limit?.limit()?,
            until: Time::from_nanos(self.until_nanos),
        })
    }
}

impl LimitRecord {
    fn of(limit: &Limit) -> Self {
        let Limit::TokenBucket(bucket) = limit;
        let kind = KindRecord::TokenBucket(TokenBucketRecord {
            limit: bucket.limit(),
            per_nanos: bucket.per_nanos(),
            burst: bucket.burst(),
        });
        Self { kind: Some(kind) }
    }

    fn limit(self) -> Option<Limit> {
        let KindRecord::TokenBucket(TokenBucketRecord { limit, per_nanos, burst }) = self.kind?;
        TokenBucket::new(limit, Duration::from_nanos(per_nanos), burst).ok().map(Limit::TokenBucket)
    }
}

impl CellRecord {
    /// What is out is not written: what a crash interrupts stays charged, and what a clean stop leaves open
    /// is known by its grants.
    pub(super) fn of(number: PolicyNumber, cell: Cell) -> Self {
        let State::TokenBucket(state) = cell.state;
        let state = StateRecord::TokenBucket(TokenBucketState {
            spent: state.spent,
            remainder: state.remainder,
            at_nanos: state.at.as_nanos(),
        });
        Self { number: number.0, revision: cell.revision, state: Some(state), exact_of: 0 }
    }

    /// The cell as a clean stop of that start leaves it.
    pub(super) fn exact(number: PolicyNumber, cell: Cell, boot: u64) -> Self {
        Self { exact_of: boot, ..Self::of(number, cell) }
    }

    /// The cell with nothing out; `None` if the record makes no sense.
    pub(super) fn cell(self) -> Option<Cell> {
        let StateRecord::TokenBucket(state) = self.state?;
        let TokenBucketState { spent, remainder, at_nanos } = state;
        // More than a burst and as much debt, or than a part of one token: no cell has that.
        if spent > 2 * token_bucket::MAX_TOKENS
            || remainder >= saturating_nanos(token_bucket::MAX_PER)
        {
            return None;
        }
        let at = Time::from_nanos(at_nanos);
        let state = token_bucket::State { spent, remainder, out: 0, at };
        Some(Cell { revision: self.revision, state: State::TokenBucket(state) })
    }
}

impl GrantRecord {
    pub(super) fn of(grant: &OpenGrant, boot: u64) -> Self {
        Self {
            number: grant.number.0,
            cell_high: grant.cell.0[0],
            cell_low: grant.cell.0[1],
            amount: grant.amount,
            expires_at_nanos: grant.expires_at.as_nanos(),
            exact_of: boot,
        }
    }

    pub(super) fn grant(self, id: GrantId) -> OpenGrant {
        OpenGrant {
            id,
            number: PolicyNumber(self.number),
            cell: CellId([self.cell_high, self.cell_low]),
            amount: self.amount,
            expires_at: Time::from_nanos(self.expires_at_nanos),
        }
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
