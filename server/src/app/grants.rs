//! Grants: what allowed Acquires may still owe.

mod holdings;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    fmt,
    hash::Hasher,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fusebox_core::{Limit, Settlement, Time, circuit::Call};
use parking_lot::Mutex;
use siphasher::sip::SipHasher24;

use super::{Passes, Principal};
use crate::{
    catalogue::{Catalogue, CellId, Limiter, LimiterNumber},
    entropy::Entropy,
    limits,
    reservation::Reservation,
    storage::{Holds, OpenGrant, OpenPart},
};

/// What an allowed Acquire may still owe. Each part settles once, or when it expires.
#[derive(Clone, Debug)]
pub(super) struct Grant {
    /// Whose it is: nobody else can settle it.
    pub(super) owner: Owner,
    /// The client that it was given to; empty if it did not say.
    pub(super) client: Arc<str>,
    /// What it holds.
    pub(super) parts: Vec<Part>,
    /// Calls through circuits that were let through with it: they are told of it at its end.
    pub(super) passes: Passes,
    /// When the last of those that are probes has expired. Until then it is open, whatever else has.
    pub(super) probes_until: Time,
}

/// Whose a grant is, and the namespace that it was given in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) principal: Principal,
    pub(super) namespace: Arc<str>,
}

/// What a grant holds of one cell.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// Who judged.
    pub(super) limiter: Arc<Limiter>,
    /// What was charged.
    pub(super) open: OpenPart,
}

/// What a settled part has to tell its cell.
#[derive(Clone, Debug)]
pub(super) struct Due {
    /// Who judged.
    pub(super) limiter: Arc<Limiter>,
    /// The cell that was charged.
    pub(super) cell: CellId,
    /// The limiter's revision when it was.
    pub(super) revision: u32,
    /// What is known now.
    pub(super) known: Settlement,
}

/// How one granted call went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told<'a> {
    /// Tokens that it cost in all so far; `None` if as estimated.
    pub actual_cost: Option<u64>,
    /// Leased tokens that were not spent.
    pub lease_returned: u64,
    /// More will follow.
    pub partial: bool,
    /// How the call went, for circuits; nobody knows while more will follow.
    pub call: Call<'a>,
}

impl Part {
    fn due(&self, actual: u64, partial: bool) -> Due {
        let OpenPart { revision, cell, slice, charged, told, .. } = self.open;
        let known = Settlement {
            charged,
            told,
            actual,
            partial,
            slice: Some(slice),
            window: None,
            max_debt: self.limiter.settings.max_debt,
        };
        Due { limiter: Arc::clone(&self.limiter), cell, revision, known }
    }

    /// What is due when the caller tells how it went; what was told before is not unsaid.
    fn settled(&mut self, told: Told<'_>) -> Option<Due> {
        let OpenPart { holds, charged, told: before, .. } = self.open;
        let actual = match holds {
            Holds::Estimate => {
                told.actual_cost.unwrap_or(if told.partial { before } else { charged })
            }
            Holds::Lease | Holds::Permit if told.partial => return None,
            Holds::Lease => charged - told.lease_returned.min(charged),
            Holds::Permit => 0,
        };
        let actual = actual.max(before);
        let due = self.due(actual, told.partial);
        self.open.told = actual;
        Some(due)
    }

    /// What is due when nobody tells: a permit is released, all else stands as charged.
    fn expired(&self) -> Due {
        let actual = if self.open.holds == Holds::Permit { 0 } else { self.open.charged };
        self.due(actual.max(self.open.told), false)
    }

    /// How long it lives when it is renewed under these policies; `None` if it is not. A permit of what was of
    /// another kind since is none that its cell counts.
    fn renewed_for(&self, catalogue: &Catalogue) -> Option<Duration> {
        let settings = &catalogue.numbered(self.open.number).unwrap_or(&self.limiter).settings;
        match (self.open.holds, &settings.limit) {
            (Holds::Permit, Limit::Concurrency(permits)) => {
                settings.is_like_since(self.open.revision).then(|| permits.ttl())
            }
            _ => None,
        }
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

/// What the id of a permit says of it, so that a later start can check it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The cell that was charged.
    pub cell: CellId,
    /// What the cell calls its limiter.
    pub number: LimiterNumber,
    /// Permits.
    pub permits: u64,
    /// Says that this server has written it.
    pub seal: u64,
}

/// A grant as its id on the wire names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantName {
    /// Which.
    pub id: GrantId,
    /// What it claims to hold, if it is a permit.
    pub claim: Option<Claim>,
}

impl fmt::Display for GrantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{:032x}", self.boot, self.secret)
    }
}

impl fmt::Display for GrantName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id.fmt(f)?;
        let Some(Claim { cell, number, permits, seal }) = self.claim else { return Ok(()) };
        write!(f, "-{cell:?}-{:x}-{permits:x}-{seal:016x}", number.0)
    }
}

/// Not the id of a grant that any start of this server gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAGrantId;

impl FromStr for GrantName {
    type Err = NotAGrantId;

    fn from_str(text: &str) -> Result<Self, NotAGrantId> {
        let mut parts = text.split('-');
        let mut next = || parts.next().ok_or(NotAGrantId);
        let short = |text: &str| u64::from_str_radix(text, 16).map_err(|_| NotAGrantId);
        let long = |text: &str| u128::from_str_radix(text, 16).map_err(|_| NotAGrantId);
        let id = GrantId { boot: short(next()?)?, secret: long(next()?)? };
        let claim = match next() {
            Err(NotAGrantId) => None,
            Ok(cell) => Some(Claim {
                cell: CellId::from_bytes(&long(cell)?.to_be_bytes()).ok_or(NotAGrantId)?,
                number: LimiterNumber(u32::from_str_radix(next()?, 16).map_err(|_| NotAGrantId)?),
                permits: short(next()?)?,
                seal: short(next()?)?,
            }),
        };
        // One spelling only: `+1` and `01` parse as well.
        let name = Self { id, claim };
        if name.to_string() == text { Ok(name) } else { Err(NotAGrantId) }
    }
}

/// What became of the attempt to settle or renew a grant.
#[derive(Debug)]
pub(super) enum Taken<T> {
    /// It was open, and is the caller's.
    Open(T),
    /// It had been settled before.
    Settled,
    /// There is no such grant, or it is somebody else's.
    Unknown,
}

/// The grants that are open, and some that were settled lately.
#[derive(Debug)]
pub struct Grants {
    boot: u64,
    /// Seals what the ids of permits claim.
    secret: [u8; 16],
    capacity: usize,
    open: Arc<AtomicUsize>,
    shards: [Mutex<Shard>; limits::GRANT_SHARDS],
}

#[derive(Debug, Default)]
struct Shard {
    open: HashMap<GrantId, Grant>,
    /// Each by its part that expires first.
    by_expiry: BTreeSet<(Time, GrantId)>,
    /// Those settled lately, and whose they were.
    settled: HashMap<GrantId, Owner>,
    settled_in_order: VecDeque<GrantId>,
}

impl Grant {
    /// When its first part settles by itself; once all have, when its probes have expired.
    fn expires_at(&self) -> Time {
        let expiries = self.parts.iter().map(|part| part.open.expires_at);
        expiries.min().unwrap_or(self.probes_until)
    }

    /// What its id says of it: of one permit all there is to know.
    fn claim(&self, id: GrantId, secret: &[u8; 16]) -> Option<Claim> {
        let [Part { open, .. }] = self.parts.as_slice() else { return None };
        let OpenPart { holds: Holds::Permit, cell, number, charged: permits, .. } = *open else {
            return None;
        };
        let claim = Claim { cell, number, permits, seal: 0 };
        Some(Claim { seal: claim.sealed(id, &self.owner, secret), ..claim })
    }
}

impl Claim {
    /// The seal of a claim that is true of that grant and its owner.
    fn sealed(&self, id: GrantId, owner: &Owner, secret: &[u8; 16]) -> u64 {
        let mut hasher = SipHasher24::new_with_key(secret);
        hasher.write_u64(id.boot);
        hasher.write_u128(id.secret);
        hasher.write(&self.cell.to_bytes());
        hasher.write_u32(self.number.0);
        hasher.write_u64(self.permits);
        let Principal::Anonymous = owner.principal;
        hasher.write(owner.namespace.as_bytes());
        hasher.finish()
    }

    /// Whether this server, or the one before it in the data directory, has given that grant to its owner.
    pub(super) fn is_true(&self, id: GrantId, owner: &Owner, secret: &[u8; 16]) -> bool {
        self.seal == self.sealed(id, owner, secret)
    }
}

impl Grants {
    /// No grants yet in this start, and room for `capacity` of them.
    pub(super) fn new(boot: u64, secret: [u8; 16], capacity: usize) -> Self {
        Self { boot, secret, capacity, open: Arc::default(), shards: Default::default() }
    }

    /// What seals what callers are given to keep.
    pub(super) const fn secret(&self) -> &[u8; 16] {
        &self.secret
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
    ) -> Option<GrantName> {
        if !room.keep_one() {
            return None;
        }
        let id = GrantId { boot: self.boot, secret: u128::from_be_bytes(entropy.bytes16()) };
        let claim = grant.claim(id, &self.secret);
        self.shard(id).lock().open(id, grant);
        Some(GrantName { id, claim })
    }

    /// Opens a grant again that an earlier start gave: a clean stop left it open, or its holder has told of
    /// it.
    pub(super) fn restore(&self, id: GrantId, grant: Grant) {
        self.shard(id).lock().open(id, grant);
        self.open.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether another start gave that grant, if any did.
    pub(super) fn is_of_earlier(&self, id: GrantId) -> bool {
        id.boot != self.boot
    }

    /// Whether a grant of an earlier start is one that this one knows nothing of, and its id is true.
    pub(super) fn is_forgotten(&self, name: GrantName, owner: &Owner) -> bool {
        let GrantName { id, claim } = name;
        let shard = self.shard(id).lock();
        let known = shard.open.contains_key(&id) || shard.settled.contains_key(&id);
        let is_true = claim.is_some_and(|claim| claim.is_true(id, owner, &self.secret));
        self.is_of_earlier(id) && !known && is_true
    }

    /// Every grant that is open.
    pub fn all(&self) -> Vec<OpenGrant> {
        let mut all = Vec::with_capacity(self.open());
        for shard in &self.shards {
            let shard = shard.lock();
            // One that has only probes left says nothing to a later start, which knows none of them.
            let open = shard.open.iter().filter(|(_, grant)| !grant.parts.is_empty());
            all.extend(open.map(|(id, grant)| OpenGrant {
                id: *id,
                client: grant.client.to_string(),
                parts: grant.parts.iter().map(|part| part.open).collect(),
            }));
        }
        all
    }

    /// Settles an open grant of this owner, or a part of what it owes: nobody can do that again. With it end its
    /// calls through circuits, which are yet to be told of it.
    pub(super) fn settle(
        &self,
        id: GrantId,
        owner: &Owner,
        told: Told<'_>,
        now: Time,
    ) -> Taken<(Vec<Due>, Passes)> {
        let mut shard = self.shard(id).lock();
        if shard.settled.get(&id).is_some_and(|other| other == owner) {
            return Taken::Settled;
        }
        let Some(grant) = shard.open_of(id, owner, now) else { return Taken::Unknown };
        // With the grant end also those of its parts that expired before and were not taken yet.
        let due = |part: &mut Part| match part.open.expires_at > now {
            true => part.settled(told),
            false => (!told.partial).then(|| part.expired()),
        };
        let dues = grant.parts.iter_mut().filter_map(due).collect();
        let mut passes = Passes::new();
        if !told.partial {
            passes = std::mem::take(&mut grant.passes);
            shard.end(id);
            self.open.fetch_sub(1, Ordering::Relaxed);
        }
        Taken::Open((dues, passes))
    }

    /// Renews the permits of an open grant of this owner; how long it lives now.
    pub(super) fn renew(
        &self,
        id: GrantId,
        owner: &Owner,
        catalogue: &Catalogue,
        now: Time,
    ) -> Taken<Duration> {
        let mut shard = self.shard(id).lock();
        if shard.settled.get(&id).is_some_and(|other| other == owner) {
            return Taken::Settled;
        }
        let Some(grant) = shard.open_of(id, owner, now) else { return Taken::Unknown };
        let before = grant.expires_at();
        let mut lives = None;
        for part in &mut grant.parts {
            if let Some(life) = part.renewed_for(catalogue) {
                part.open.expires_at = now.after(life);
                lives = lives.min(Some(life)).or(Some(life));
            }
        }
        let after = grant.expires_at();
        shard.by_expiry.remove(&(before, id));
        shard.by_expiry.insert((after, id));
        lives.map_or(Taken::Unknown, Taken::Open)
    }

    /// Takes the permits and the calls through circuits of an open grant, whoever it is of; what else it holds
    /// stays.
    pub(super) fn take_permits(&self, id: GrantId) -> (Vec<Due>, Passes) {
        let mut shard = self.shard(id).lock();
        let Some(mut grant) = shard.take(id) else { return Default::default() };
        let passes = std::mem::take(&mut grant.passes);
        let permits = grant.parts.extract_if(.., |part| part.open.holds == Holds::Permit);
        let dues = permits.map(|part| part.expired()).collect();
        if grant.parts.is_empty() {
            shard.remember_settled(id, grant.owner);
            self.open.fetch_sub(1, Ordering::Relaxed);
        } else {
            shard.open(id, grant);
        }
        (dues, passes)
    }

    /// Ends an open grant, whoever it is of, as if all of it had expired now.
    pub(super) fn force_release(&self, id: GrantId) -> Option<Vec<Due>> {
        let mut shard = self.shard(id).lock();
        let grant = shard.end(id)?;
        self.open.fetch_sub(1, Ordering::Relaxed);
        Some(grant.parts.iter().map(Part::expired).collect())
    }

    /// Ends every open grant that the owner's client was given, as if all of it had expired now; its calls through
    /// circuits are yet to be told.
    pub(super) fn end_all_of(&self, owner: &Owner, client: &str) -> Vec<(Vec<Due>, Passes)> {
        let mut ended = Vec::new();
        for shard in &self.shards {
            let mut shard = shard.lock();
            let of_client = |grant: &Grant| *grant.client == *client && grant.owner == *owner;
            let theirs = shard.open.iter().filter(|(_, grant)| of_client(grant));
            let theirs: Vec<_> = theirs.map(|(id, _)| *id).collect();
            let taken = theirs.into_iter().filter_map(|id| shard.end(id));
            let taken = taken.map(|Grant { parts, passes, .. }| {
                (parts.iter().map(Part::expired).collect(), passes)
            });
            ended.extend(taken);
        }
        self.open.fetch_sub(ended.len(), Ordering::Relaxed);
        ended
    }

    /// Takes what has expired, a bounded number of it.
    pub(super) fn expire(&self, now: Time) -> Vec<Due> {
        let (mut dues, mut ended) = (Vec::new(), 0);
        for shard in &self.shards {
            let mut shard = shard.lock();
            for _ in 0..limits::EXPIRED_PER_ROUND {
                let first = shard.by_expiry.first().copied();
                let Some((_, id)) = first.filter(|(expiry, _)| *expiry <= now) else { break };
                let Some(mut grant) = shard.take(id) else { break };
                for part in grant.parts.extract_if(.., |part| part.open.expires_at <= now) {
                    dues.push(part.expired());
                }
                if grant.parts.is_empty() && grant.probes_until <= now {
                    ended += 1;
                } else {
                    shard.open(id, grant);
                }
            }
        }
        self.open.fetch_sub(ended, Ordering::Relaxed);
        dues
    }

    fn shard(&self, id: GrantId) -> &Mutex<Shard> {
        &self.shards[id.secret as usize % limits::GRANT_SHARDS]
    }
}

impl Shard {
    fn open(&mut self, id: GrantId, grant: Grant) {
        self.by_expiry.insert((grant.expires_at(), id));
        self.open.insert(id, grant);
    }

    /// The open grant of that owner.
    fn open_of(&mut self, id: GrantId, owner: &Owner, now: Time) -> Option<&mut Grant> {
        let alive = |part: &Part| part.open.expires_at > now;
        let grant = self.open.get_mut(&id)?;
        let is_alive = grant.probes_until > now || grant.parts.iter().any(alive);
        (grant.owner == *owner && is_alive).then_some(grant)
    }

    fn take(&mut self, id: GrantId) -> Option<Grant> {
        let grant = self.open.remove(&id)?;
        self.by_expiry.remove(&(grant.expires_at(), id));
        Some(grant)
    }

    /// Takes a grant for good, and remembers that it is settled.
    fn end(&mut self, id: GrantId) -> Option<Grant> {
        let grant = self.take(id)?;
        self.remember_settled(id, grant.owner.clone());
        Some(grant)
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
    use fusebox_core::{
        Concurrency, TokenBucket,
        circuit::{Generation, Outcome, ProbeId},
    };

    use super::*;
    use crate::{app::Pass, catalogue::PolicyName, entropy::SystemEntropy, storage::Keeping};

    const ESTIMATE: Told<'_> = Told {
        actual_cost: None,
        lease_returned: 0,
        partial: false,
        call: Call { outcome: Outcome::Abandoned, latency: None, kind: "" },
    };

    fn owner() -> Owner {
        Owner { principal: Principal::Anonymous, namespace: "test".into() }
    }

    fn limiter(limit: Limit) -> Arc<Limiter> {
        Arc::new(Limiter {
            name: PolicyName { namespace: "test".into(), policy: "policy".into() },
            number: LimiterNumber(0),
            settings: fusebox_core::Policy::new(limit, 0),
            keeping: Keeping::AtStop,
            calendar: None,
            budget: Arc::default(),
        })
    }

    fn part(holds: Holds, charged: u64, expires_at: u64) -> Part {
        let limit = match holds {
            Holds::Permit => {
                Limit::Concurrency(Concurrency::new(9, Duration::from_secs(1)).unwrap())
            }
            _ => Limit::TokenBucket(TokenBucket::new(9, Duration::from_secs(1), 9).unwrap()),
        };
        let open = OpenPart {
            holds,
            number: LimiterNumber(0),
            revision: 1,
            cell: CellId([1, 2]),
            slice: 0,
            charged,
            told: 0,
            expires_at: Time::from_nanos(expires_at),
        };
        Part { limiter: limiter(limit), open }
    }

    fn grant(parts: Vec<Part>) -> Grant {
        let (client, passes, probes_until) = ("".into(), Passes::new(), Time::ZERO);
        Grant { owner: owner(), client, parts, passes, probes_until }
    }

    fn open_parts(grants: &Grants, parts: Vec<Part>) -> Option<GrantName> {
        let mut room = grants.reserve(1)?;
        grants.open_grant(grant(parts), &mut room, &SystemEntropy)
    }

    fn open(grants: &Grants) -> Option<GrantId> {
        open_parts(grants, vec![part(Holds::Estimate, 5, 10)]).map(|name| name.id)
    }

    fn settle(grants: &Grants, id: GrantId, now: u64) -> Taken<(Vec<Due>, Passes)> {
        grants.settle(id, &owner(), ESTIMATE, Time::from_nanos(now))
    }

    #[test]
    fn no_more_are_open_than_there_is_room_for() {
        let grants = Grants::new(1, [0; 16], 2);
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
        let grants = Grants::new(1, [0; 16], 2);
        let (first, second) = (open(&grants).unwrap(), open(&grants).unwrap());
        assert!(matches!(settle(&grants, first, 9), Taken::Open(_)));
        assert!(matches!(settle(&grants, first, 9), Taken::Settled));
        assert!(matches!(settle(&grants, second, 10), Taken::Unknown));
        assert_eq!(grants.expire(Time::from_nanos(9)).len(), 0);
        assert_eq!(grants.expire(Time::from_nanos(10)).len(), 1);
    }

    #[test]
    fn what_was_told_in_parts_is_a_total_and_is_not_unsaid() {
        let grants = Grants::new(1, [0; 16], 2);
        let id = open(&grants).unwrap();
        let tell = |actual, partial| {
            let told = Told { actual_cost: actual, partial, ..ESTIMATE };
            match grants.settle(id, &owner(), told, Time::ZERO) {
                Taken::Open((dues, _)) => dues[0].known,
                other => panic!("{other:?}"),
            }
        };
        let known = tell(Some(3), true);
        assert_eq!((known.out_before(), known.out_after(), known.refund()), (5, 2, 0));
        let known = tell(Some(3), true);
        assert_eq!((known.out_before(), known.out_after()), (2, 2), "repeated, it adds nothing");
        let known = tell(Some(7), true);
        assert_eq!((known.excess(), known.out_after()), (2, 0));
        let known = tell(Some(1), false);
        assert_eq!((known.excess(), known.refund(), known.actual), (0, 0, 7));
        assert!(matches!(settle(&grants, id, 0), Taken::Settled));
    }

    #[test]
    fn parts_expire_each_at_its_time() {
        let grants = Grants::new(1, [0; 16], 2);
        let parts = vec![part(Holds::Permit, 1, 5), part(Holds::Lease, 4, 10)];
        let id = open_parts(&grants, parts).unwrap().id;
        let permit = grants.expire(Time::from_nanos(5));
        assert_eq!(permit[0].known.refund(), 1, "a permit comes back");
        assert_eq!(grants.open(), 1);
        let told = Told { lease_returned: 3, ..ESTIMATE };
        let Taken::Open((dues, _)) = grants.settle(id, &owner(), told, Time::from_nanos(5)) else {
            panic!("the lease is still open");
        };
        assert_eq!((dues.len(), dues[0].known.refund()), (1, 3));
        assert_eq!(grants.open(), 0);
    }

    #[test]
    fn a_part_that_expired_a_moment_before_the_report_is_not_lost() {
        let grants = Grants::new(1, [0; 16], 2);
        let parts = vec![part(Holds::Permit, 1, 5), part(Holds::Estimate, 4, 10)];
        let id = open_parts(&grants, parts).unwrap().id;
        let tell = |partial| {
            let told = Told { actual_cost: Some(3), partial, ..ESTIMATE };
            match grants.settle(id, &owner(), told, Time::from_nanos(5)) {
                Taken::Open((dues, _)) => {
                    dues.iter().map(|due| due.known.refund()).collect::<Vec<_>>()
                }
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(tell(true), [0], "housekeeping will take the permit");
        assert_eq!(tell(false), [1, 1], "unless the grant ends before it could");
        assert!(grants.expire(Time::from_nanos(10)).is_empty());
    }

    #[test]
    fn a_probe_outlives_what_was_granted_with_it() {
        let grants = Grants::new(1, [0; 16], 2);
        let pass =
            Pass { cell: CellId([1, 2]), generation: Generation(3), probe: Some(ProbeId(0)) };
        let open = || {
            let mut probing = grant(vec![part(Holds::Lease, 4, 5)]);
            (probing.passes, probing.probes_until) =
                ([pass].into_iter().collect(), Time::from_nanos(10));
            let mut room = grants.reserve(1).unwrap();
            grants.open_grant(probing, &mut room, &SystemEntropy).unwrap().id
        };
        let (told, late) = (open(), open());
        assert_eq!(grants.expire(Time::from_nanos(5)).len(), 2, "the leases stand as spent");
        let Taken::Open((dues, passes)) = settle(&grants, told, 9) else {
            panic!("its probe runs");
        };
        assert!(dues.is_empty() && passes[..] == [pass]);
        assert!(matches!(settle(&grants, told, 9), Taken::Settled));
        assert!(matches!(settle(&grants, late, 10), Taken::Unknown));
        assert!(grants.expire(Time::from_nanos(10)).is_empty());
        assert_eq!(grants.open(), 0);
    }

    #[test]
    fn all_that_a_client_holds_ends_at_once_and_nothing_of_others() {
        let grants = Grants::new(1, [0; 16], 9);
        let give = |client: &str, namespace: &str, holds| {
            let owner = Owner { namespace: namespace.into(), ..owner() };
            let given = Grant { owner, client: client.into(), ..grant(vec![part(holds, 3, 10)]) };
            let mut room = grants.reserve(1).unwrap();
            grants.open_grant(given, &mut room, &SystemEntropy).unwrap().id
        };
        let permit = give("one", "test", Holds::Permit);
        give("one", "test", Holds::Lease);
        give("one", "test", Holds::Estimate);
        let others = [give("other", "test", Holds::Permit), give("one", "other", Holds::Permit)];
        let ended = grants.end_all_of(&owner(), "one");
        let mut refunds: Vec<_> = ended.iter().map(|(dues, _)| dues[0].known.refund()).collect();
        refunds.sort_unstable();
        assert_eq!(refunds, [0, 0, 3], "the permits are free, all else stands as charged");
        assert!(matches!(settle(&grants, permit, 0), Taken::Settled));
        assert!(others.iter().all(|id| grants.look(*id).is_some()));
        assert_eq!(grants.open(), 2);
    }

    #[test]
    fn an_expired_lease_stands_as_spent() {
        let grants = Grants::new(1, [0; 16], 2);
        open_parts(&grants, vec![part(Holds::Lease, 4, 10)]).unwrap();
        let due = grants.expire(Time::from_nanos(10)).remove(0);
        assert_eq!((due.known.refund(), due.known.out_before(), due.known.out_after()), (0, 4, 0));
    }

    #[test]
    fn a_renewed_permit_lives_on() {
        let grants = Grants::new(1, [0; 16], 2);
        let id = open_parts(&grants, vec![part(Holds::Permit, 1, 10)]).unwrap().id;
        let renew = |now| grants.renew(id, &owner(), &Catalogue::default(), Time::from_nanos(now));
        assert!(matches!(renew(9), Taken::Open(_)));
        assert!(grants.expire(Time::from_nanos(1_000_000_008)).is_empty());
        assert_eq!(grants.expire(Time::from_nanos(1_000_000_009)).len(), 1);
        assert!(matches!(renew(0), Taken::Unknown));
    }

    #[test]
    fn a_later_start_believes_the_id_of_a_permit_and_nothing_else() {
        let name = open_parts(&Grants::new(1, [7; 16], 2), vec![part(Holds::Permit, 2, 10)]);
        let name = name.unwrap();
        assert_eq!(name.to_string().parse(), Ok(name));
        assert!(name.to_string().len() <= limits::GRANT_ID_BYTES);
        let later = Grants::new(2, [7; 16], 2);
        assert!(later.is_forgotten(name, &owner()));
        let stranger = Owner { namespace: "other".into(), ..owner() };
        assert!(!later.is_forgotten(name, &stranger));
        let more = Claim { permits: 3, ..name.claim.unwrap() };
        assert!(!later.is_forgotten(GrantName { claim: Some(more), ..name }, &owner()));
        assert!(!Grants::new(2, [8; 16], 2).is_forgotten(name, &owner()), "another data directory");
        later.restore(name.id, grant(Vec::new()));
        assert!(!later.is_forgotten(name, &owner()), "once");
    }

    #[test]
    fn the_oldest_settled_grant_is_forgotten_first() {
        let mut shard = Shard::default();
        let id = |secret| GrantId { boot: 1, secret };
        let most = limits::SETTLED_GRANTS / limits::GRANT_SHARDS;
        for secret in 0..=most as u128 {
            shard.remember_settled(id(secret), owner());
        }
        assert_eq!(shard.settled.len(), most);
        assert!(!shard.settled.contains_key(&id(0)) && shard.settled.contains_key(&id(1)));
    }

    #[test]
    fn a_round_takes_a_bounded_number_of_expired_grants() {
        let grants = Grants::new(1, [0; 16], usize::MAX);
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
        assert_eq!(id.to_string().parse(), Ok(GrantName { id, claim: None }));
        for other in ["", "-", "1a-1", "01a-00000000000000000000000000000001", "+1-2", "1a"] {
            assert_eq!(other.parse::<GrantName>(), Err(NotAGrantId), "{other}");
        }
    }
}
