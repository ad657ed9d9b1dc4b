//! Grants: what allowed Acquires may still owe.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque, hash_map::Entry},
    fmt,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use fusebox_core::Time;
use parking_lot::Mutex;

use super::Principal;
use crate::{
    catalogue::{CellId, Policy},
    entropy::Entropy,
    limits,
    reservation::Reservation,
};

/// A power of two: two callers rarely want the same lock.
const SHARDS: usize = 16;

/// What an allowed Acquire may still owe. Settled once, or when it expires.
#[derive(Debug)]
pub(super) struct Grant {
    /// Whose it is: nobody else can settle it.
    pub(super) principal: Principal,
    /// Who judged.
    pub(super) policy: Arc<Policy>,
    /// What was charged.
    pub(super) cell: CellId,
    /// Tokens that were charged.
    pub(super) amount: u64,
    /// When it settles by itself, as charged.
    pub(super) expires_at: Time,
}

/// Names a grant: the number of the start that gave it, and a number that nobody can guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GrantId {
    boot: u64,
    secret: u128,
}

impl fmt::Display for GrantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{:032x}", self.boot, self.secret)
    }
}

/// Not the id of a grant that any start of this server gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAGrantId;

impl FromStr for GrantId {
    type Err = NotAGrantId;

    fn from_str(text: &str) -> Result<Self, NotAGrantId> {
        let (boot, secret) = text.split_once('-').ok_or(NotAGrantId)?;
        let id = Self {
            boot: u64::from_str_radix(boot, 16).map_err(|_| NotAGrantId)?,
            secret: u128::from_str_radix(secret, 16).map_err(|_| NotAGrantId)?,
        };
        // One spelling only: `+1` and `01` parse as well.
        if id.to_string() == text { Ok(id) } else { Err(NotAGrantId) }
    }
}

/// What became of the attempt to settle a grant.
#[derive(Debug)]
pub(super) enum Taken {
    /// It was open, and is the caller's to settle.
    Open(Grant),
    /// It had been settled before.
    Settled,
    /// There is no such grant, or it is somebody else's.
    Unknown,
}

/// The grants that are open, and some that were settled lately.
#[derive(Debug)]
pub struct Grants {
    boot: u64,
    open: Arc<AtomicUsize>,
    shards: [Mutex<Shard>; SHARDS],
}

#[derive(Debug, Default)]
struct Shard {
    open: HashMap<u128, Grant>,
    by_expiry: BTreeSet<(Time, u128)>,
    settled: HashSet<u128>,
    settled_in_order: VecDeque<u128>,
}

impl Grants {
    /// No grants yet in this start.
    pub(super) fn new(boot: u64) -> Self {
        Self { boot, open: Arc::default(), shards: Default::default() }
    }

    /// Grants that are open now.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Makes sure of room for so many grants; `None` if there is not.
    pub(super) fn reserve(&self, amount: usize) -> Option<Reservation> {
        Reservation::of(&self.open, amount, limits::OPEN_GRANTS)
    }

    /// Opens a grant, for which room has been reserved.
    pub(super) fn open_grant(&self, grant: Grant, entropy: &dyn Entropy) -> GrantId {
        let id = GrantId { boot: self.boot, secret: u128::from_be_bytes(entropy.bytes16()) };
        self.open.fetch_add(1, Ordering::Relaxed);
        let mut shard = self.shard(id.secret).lock();
        shard.by_expiry.insert((grant.expires_at, id.secret));
        shard.open.insert(id.secret, grant);
        id
    }

    /// Takes an open grant of this principal, to be settled: nobody can take it again.
    pub(super) fn settle(
        &self,
        id: GrantId,
        principal: Principal,
        namespace: &str,
        now: Time,
    ) -> Taken {
        if id.boot != self.boot {
            return Taken::Unknown;
        }
        let mut shard = self.shard(id.secret).lock();
        if shard.settled.contains(&id.secret) {
            return Taken::Settled;
        }
        let Entry::Occupied(entry) = shard.open.entry(id.secret) else { return Taken::Unknown };
        let grant = entry.get();
        let theirs = grant.principal == principal && *grant.policy.namespace == *namespace;
        if !theirs || grant.expires_at <= now {
            return Taken::Unknown;
        }
        let grant = entry.remove();
        shard.by_expiry.remove(&(grant.expires_at, id.secret));
        shard.remember_settled(id.secret);
        self.open.fetch_sub(1, Ordering::Relaxed);
        Taken::Open(grant)
    }

    /// Takes grants that have expired, a bounded number of them.
    pub(super) fn expire(&self, now: Time) -> Vec<Grant> {
        let mut expired = Vec::new();
        for shard in &self.shards {
            let mut shard = shard.lock();
            for _ in 0..limits::EXPIRED_PER_ROUND {
                let first = shard.by_expiry.first().copied();
                let Some((expiry, secret)) = first.filter(|(expiry, _)| *expiry <= now) else {
                    break;
                };
                shard.by_expiry.remove(&(expiry, secret));
                expired.extend(shard.open.remove(&secret));
            }
        }
        self.open.fetch_sub(expired.len(), Ordering::Relaxed);
        expired
    }

    fn shard(&self, secret: u128) -> &Mutex<Shard> {
        &self.shards[secret as usize % SHARDS]
    }
}

impl Shard {
    fn remember_settled(&mut self, secret: u128) {
        if self.settled_in_order.len() == limits::SETTLED_GRANTS / SHARDS
            && let Some(oldest) = self.settled_in_order.pop_front()
        {
            self.settled.remove(&oldest);
        }
        self.settled.insert(secret);
        self.settled_in_order.push_back(secret);
    }
}
