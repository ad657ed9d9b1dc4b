//! Grants: what allowed Acquires may still owe.

use std::{
    collections::{BTreeSet, HashMap, VecDeque, hash_map::Entry},
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
    storage::OpenGrant,
};

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

/// Whose a grant is, and the namespace that it was given in.
type Owner = (Principal, Arc<str>);

impl Grant {
    fn owner(&self) -> Owner {
        (self.principal, Arc::clone(&self.policy.namespace))
    }
}

/// Names a grant: the number of the start that gave it, and a number that nobody can guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrantId {
    /// The start that gave it.
    pub boot: u64,
    /// Nobody can guess it.
    pub secret: u128,
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
    capacity: usize,
    open: Arc<AtomicUsize>,
    shards: [Mutex<Shard>; limits::GRANT_SHARDS],
}

#[derive(Debug, Default)]
struct Shard {
    open: HashMap<GrantId, Grant>,
    by_expiry: BTreeSet<(Time, GrantId)>,
    /// Those settled lately, and whose they were.
    settled: HashMap<GrantId, Owner>,
    settled_in_order: VecDeque<GrantId>,
}

impl Grants {
    /// No grants yet in this start, and room for `capacity` of them.
    pub(super) fn new(boot: u64, capacity: usize) -> Self {
        Self { boot, capacity, open: Arc::default(), shards: Default::default() }
    }

    /// Grants that are open now.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Makes sure of room for so many grants; `None` if there is not.
    pub(super) fn reserve(&self, amount: usize) -> Option<Reservation> {
        Reservation::of(&self.open, amount, self.capacity)
    }

    /// Opens a grant in the room that has been reserved for it; `None` if there is none left.
    pub(super) fn open_grant(
        &self,
        grant: Grant,
        room: &mut Reservation,
        entropy: &dyn Entropy,
    ) -> Option<GrantId> {
        if !room.keep_one() {
            return None;
        }
        let id = GrantId { boot: self.boot, secret: u128::from_be_bytes(entropy.bytes16()) };
        self.shard(id).lock().open(id, grant);
        Some(id)
    }

    /// Opens a grant again that an earlier start gave, and a clean stop left open.
    pub(super) fn restore(&self, left: &OpenGrant, policy: Arc<Policy>) {
        let OpenGrant { id, cell, amount, expires_at, .. } = *left;
        let principal = Principal::Anonymous;
        self.shard(id).lock().open(id, Grant { principal, policy, cell, amount, expires_at });
        self.open.fetch_add(1, Ordering::Relaxed);
    }

    /// Every grant that is open.
    pub fn all(&self) -> Vec<OpenGrant> {
        let mut all = Vec::with_capacity(self.open());
        for shard in &self.shards {
            all.extend(shard.lock().open.iter().map(|(id, grant)| OpenGrant {
                id: *id,
                number: grant.policy.number,
                cell: grant.cell,
                amount: grant.amount,
                expires_at: grant.expires_at,
            }));
        }
        all
    }

    /// Takes an open grant of this principal, to be settled: nobody can take it again.
    pub(super) fn settle(
        &self,
        id: GrantId,
        principal: Principal,
        namespace: &str,
        now: Time,
    ) -> Taken {
        let mut shard = self.shard(id).lock();
        let is_theirs = |owner: &Owner| owner.0 == principal && *owner.1 == *namespace;
        if shard.settled.get(&id).is_some_and(is_theirs) {
            return Taken::Settled;
        }
        let Entry::Occupied(entry) = shard.open.entry(id) else { return Taken::Unknown };
        if !is_theirs(&entry.get().owner()) || entry.get().expires_at <= now {
            return Taken::Unknown;
        }
        let grant = entry.remove();
        shard.by_expiry.remove(&(grant.expires_at, id));
        shard.remember_settled(id, grant.owner());
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
                let Some((expiry, id)) = first.filter(|(expiry, _)| *expiry <= now) else {
                    break;
                };
                shard.by_expiry.remove(&(expiry, id));
                expired.extend(shard.open.remove(&id));
            }
        }
        self.open.fetch_sub(expired.len(), Ordering::Relaxed);
        expired
    }

    fn shard(&self, id: GrantId) -> &Mutex<Shard> {
        &self.shards[id.secret as usize % limits::GRANT_SHARDS]
    }
}

impl Shard {
    fn open(&mut self, id: GrantId, grant: Grant) {
        self.by_expiry.insert((grant.expires_at, id));
        self.open.insert(id, grant);
    }

    fn remember_settled(&mut self, id: GrantId, owner: Owner) {
        if self.settled_in_order.len() == limits::SETTLED_GRANTS / limits::GRANT_SHARDS
            && let Some(oldest) = self.settled_in_order.pop_front()
        {
            self.settled.remove(&oldest);
        }
        self.settled.insert(id, owner);
        self.settled_in_order.push_back(id);
    }
}

#[cfg(test)]
mod tests {
    use fusebox_core::{Limit, TokenBucket};

    use super::*;
    use crate::{
        catalogue::{CellHasher, PolicyNumber},
        entropy::SystemEntropy,
        storage::Keeping,
    };

    fn grant(expires_at: Time) -> Grant {
        let bucket = TokenBucket::new(1, std::time::Duration::from_secs(1), 1).unwrap();
        let cells = CellHasher::new(&[0; 16], "test", "policy");
        let cell = cells.cell("");
        let policy = Arc::new(Policy {
            namespace: "test".into(),
            name: "policy".into(),
            number: PolicyNumber(0),
            settings: fusebox_core::Policy::new(Limit::TokenBucket(bucket), 0),
            keeping: Keeping::AtStop,
            cells,
            decisions: Arc::default(),
        });
        Grant { principal: Principal::Anonymous, policy, cell, amount: 1, expires_at }
    }

    fn open(grants: &Grants) -> Option<GrantId> {
        let mut room = grants.reserve(1)?;
        grants.open_grant(grant(Time::from_nanos(10)), &mut room, &SystemEntropy)
    }

    fn settle(grants: &Grants, id: GrantId, now: u64) -> Taken {
        grants.settle(id, Principal::Anonymous, "test", Time::from_nanos(now))
    }

    #[test]
    fn no_more_are_open_than_there_is_room_for() {
        let grants = Grants::new(1, 2);
        let first = open(&grants).unwrap();
        assert!(open(&grants).is_some());
        assert!(open(&grants).is_none());
        assert!(matches!(settle(&grants, first, 0), Taken::Open(_)));
        assert!(open(&grants).is_some(), "a settled one makes room");
        assert_eq!(grants.expire(Time::from_nanos(10)).len(), 2);
        assert_eq!(grants.open(), 0, "and so does an expired one");
    }

    #[test]
    fn a_grant_is_open_until_the_moment_it_expires() {
        let grants = Grants::new(1, 2);
        let (first, second) = (open(&grants).unwrap(), open(&grants).unwrap());
        assert!(matches!(settle(&grants, first, 9), Taken::Open(_)));
        assert!(matches!(settle(&grants, first, 9), Taken::Settled));
        assert!(matches!(settle(&grants, second, 10), Taken::Unknown));
        assert_eq!(grants.expire(Time::from_nanos(9)).len(), 0);
        assert_eq!(grants.expire(Time::from_nanos(10)).len(), 1);
    }

    #[test]
    fn the_oldest_settled_grant_is_forgotten_first() {
        let mut shard = Shard::default();
        let id = |secret| GrantId { boot: 1, secret };
        let owner = || grant(Time::ZERO).owner();
        let most = limits::SETTLED_GRANTS / limits::GRANT_SHARDS;
        for secret in 0..=most as u128 {
            shard.remember_settled(id(secret), owner());
        }
        assert_eq!(shard.settled.len(), most);
        assert!(!shard.settled.contains_key(&id(0)) && shard.settled.contains_key(&id(1)));
    }

    #[test]
    fn a_round_takes_a_bounded_number_of_expired_grants() {
        let grants = Grants::new(1, usize::MAX);
        let most = limits::EXPIRED_PER_ROUND * limits::GRANT_SHARDS;
        for _ in 0..=most {
            open(&grants).unwrap();
        }
        let now = Time::from_nanos(10);
        let first = grants.expire(now).len();
        assert!(first <= most);
        assert_eq!(first + grants.expire(now).len(), most + 1);
    }

    #[test]
    fn an_id_has_one_spelling() {
        let id = GrantId { boot: 26, secret: 1 };
        assert_eq!(id.to_string(), "1a-00000000000000000000000000000001");
        assert_eq!(id.to_string().parse(), Ok(id));
        for other in ["", "-", "1a-1", "01a-00000000000000000000000000000001", "+1-2", "1a"] {
            assert_eq!(other.parse::<GrantId>(), Err(NotAGrantId), "{other}");
        }
    }
}
