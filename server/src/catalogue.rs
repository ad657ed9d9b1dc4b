//! The policies in force: an immutable snapshot, swapped whole.

mod almanac;
mod budget;
pub mod domains;
mod names;
pub mod registry;

use std::{fmt, sync::Arc, time::Duration};

use arrayvec::ArrayVec;
use fusebox_core::{Ask, Kind, Limit, Moment, Purpose, Window, circuit::Breaker};
use hashbrown::HashMap;

pub use self::{almanac::Almanac, budget::Budget, domains::Domains, names::Names};
use crate::{
    app::{Priority, top_keys::TopKeys},
    config::{
        self,
        envoy::{self, EnvoyRatelimit, Path, Ruleset},
    },
    counters::Decisions,
    digest::{Content, Digest},
    limits,
    storage::{CellAsk, CircuitName, Keeping, Place},
};

/// All policies at one moment.
#[derive(Clone, Debug, Default)]
pub struct Catalogue {
    /// Counts the snapshots of this run.
    pub revision: u64,
    namespaces: HashMap<Box<str>, Namespace>,
    /// Also those that no policy has any more, while cells of theirs may live.
    numbered: HashMap<LimiterNumber, Arc<Limiter>>,
    /// What Envoy's rate limit service knows, if it is served.
    pub ratelimit: Option<Arc<Ratelimit>>,
}

/// What Envoy's rate limit service knows.
#[derive(Debug)]
pub struct Ratelimit {
    /// How it answers.
    pub settings: Arc<EnvoyRatelimit>,
    /// The rules.
    pub domains: Domains,
}

/// The policies of one tenant, by name.
#[derive(Clone, Debug, Default)]
pub struct Namespace {
    policies: HashMap<Box<str>, Arc<Policy>>,
}

/// A policy, ready to be asked.
#[derive(Debug)]
pub struct Policy {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// As it was written.
    pub settings: Arc<config::Policy>,
    /// What judges keys that no override names.
    pub rules: Rules,
    /// What judges the keys of overrides.
    pub overrides: Overrides,
    /// When its circuits open, if it is a breaker; then it has no limits.
    pub breakers: Option<Breakers>,
    /// It only watches.
    pub shadow: bool,
    /// What is kept from callers of a lower priority.
    pub reserves: Reserves,
    /// Most callers that stand in line at one key.
    pub max_waiting: usize,
    /// How long a lease lives.
    pub lease_time: Duration,
    /// What it counts that is no hits, if it does: then it judges no rule of Envoy's.
    pub no_hits: Option<&'static str>,
    /// Names its cells.
    pub cells: CellHasher,
    /// How many cells it may have.
    pub budget: Arc<Budget>,
    /// Counts its decisions; outlives the snapshot.
    pub decisions: Arc<Decisions>,
    /// The keys that are asked for most; outlives the snapshot.
    pub top_keys: Arc<TopKeys>,
    /// The keys of its cells; outlives the snapshot.
    pub names: Arc<Names>,
}

/// The limits that judge a key together, and where it is counted once the policy has too many keys.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Each has its own cell of the key.
    pub limiters: ArrayVec<Arc<Limiter>, { limits::LIMITS }>,
    /// The cell that keys past the budget share; without one each key always has its own.
    pub overflow: Option<CellId>,
}

/// Rules of some keys: of one by its name, else of the longest prefix.
#[derive(Debug, Default)]
pub struct Overrides {
    /// By key.
    pub exact: HashMap<Box<str>, Rules>,
    /// By prefix, the longest first.
    pub prefixes: Vec<(Box<str>, Rules)>,
}

/// When the circuits of a policy open.
#[derive(Debug)]
pub struct Breakers {
    /// Of keys that no override names.
    pub own: Arc<Breaker>,
    /// By key.
    pub exact: HashMap<Box<str>, Arc<Breaker>>,
    /// By prefix, the longest first.
    pub prefixes: Vec<(Box<str>, Arc<Breaker>)>,
    /// Most circuits.
    pub most: usize,
}

/// Shares of what a policy has that callers of a lower priority must leave, in basis points: 10,000 is all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reserves {
    /// Kept for critical calls.
    pub critical_basis_points: u16,
    /// Kept for critical and normal calls.
    pub normal_basis_points: u16,
}

/// One limit of a policy or of one of its overrides: what the cells are counted by.
#[derive(Debug)]
pub struct Limiter {
    /// The policy that it belongs to, or did.
    pub name: PolicyName,
    /// What its cells call it.
    pub number: LimiterNumber,
    /// What decides.
    pub settings: fusebox_core::Policy,
    /// How its cells are kept on disk.
    pub keeping: Keeping,
    /// The calendar that its windows are counted in, if they are.
    pub calendar: Option<Almanac>,
    /// The policy's cells.
    pub budget: Arc<Budget>,
}

/// The names of a policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyName {
    /// Of its namespace.
    pub namespace: Arc<str>,
    /// Its own.
    pub policy: Arc<str>,
}

/// What the cells of a limiter call it: given once, never reused in a data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LimiterNumber(pub u32);

impl Catalogue {
    /// A snapshot of these policies, and of limiters that belong to none of them any more.
    pub fn new(
        revision: u64,
        policies: impl IntoIterator<Item = Policy>,
        retired: impl IntoIterator<Item = Arc<Limiter>>,
    ) -> Self {
        let mut catalogue = Self { revision, ..Self::default() };
        for policy in policies {
            catalogue.insert(Arc::new(policy));
        }
        for limiter in retired {
            catalogue.numbered.entry(limiter.number).or_insert(limiter);
        }
        catalogue
    }

    /// The next snapshot, which is the same so far.
    fn next(&self) -> Self {
        Self { revision: self.revision + 1, ..self.clone() }
    }

    /// There is no policy of that name any more. Its limiters stay known, for the cells that they count.
    fn remove(&mut self, name: &PolicyName) {
        if let Some(namespace) = self.namespaces.get_mut(&*name.namespace) {
            namespace.policies.remove(&*name.policy);
            if namespace.policies.is_empty() {
                self.namespaces.remove(&*name.namespace);
            }
        }
    }

    /// That policy stands instead of one of its name. Limiters that only that one had stay known, for the cells
    /// that they count.
    fn insert(&mut self, policy: Arc<Policy>) {
        for limiter in policy.limiters() {
            self.numbered.insert(limiter.number, Arc::clone(limiter));
        }
        let namespace = self.namespaces.entry(policy.namespace.as_ref().into()).or_default();
        namespace.policies.insert(policy.name.as_ref().into(), policy);
    }

    /// The namespace of that name.
    pub fn namespace(&self, name: &str) -> Option<&Namespace> {
        self.namespaces.get(name)
    }

    /// The policy of that name.
    pub fn policy(&self, name: &PolicyName) -> Option<&Arc<Policy>> {
        self.namespace(&name.namespace)?.policy(&name.policy)
    }

    /// The limiter of that number.
    pub fn numbered(&self, number: LimiterNumber) -> Option<&Arc<Limiter>> {
        self.numbered.get(&number)
    }

    /// Every limiter that cannot be asked: no policy has it any more.
    pub fn retired(&self) -> impl Iterator<Item = &Arc<Limiter>> {
        self.numbered.values().filter(|limiter| !self.has(limiter))
    }

    /// Whether the limiter can be asked.
    pub fn has(&self, limiter: &Limiter) -> bool {
        let policy = self.policy(&limiter.name);
        policy.is_some_and(|policy| policy.limiters().any(|own| own.number == limiter.number))
    }

    /// Every policy that can be asked.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.namespaces.values().flat_map(|namespace| namespace.policies.values())
    }
}

impl Ratelimit {
    /// Rules whose policies are in a catalogue, and which go on counting what its own rules did.
    fn new(Ruleset { settings, rules, .. }: &Ruleset, catalogue: &Catalogue) -> Self {
        let policy_of = |path: &Path| {
            catalogue.policy(&PolicyName::new(envoy::NAMESPACE, path.as_str())).map(Arc::clone)
        };
        let none = Domains::default();
        let former = catalogue.ratelimit.as_ref().map_or(&none, |former| &former.domains);
        let domains = Domains::new(settings, rules, policy_of, former);
        Self { settings: Arc::clone(settings), domains }
    }
}

impl Policy {
    /// Whether it is a rule of Envoy's rate limit service. There may be many, and few are ever met.
    pub fn is_rule(&self) -> bool {
        self.name.contains('|')
    }

    /// What judges that key.
    pub fn rules_of(&self, key: &str) -> &Rules {
        if self.overrides.is_empty() {
            &self.rules
        } else {
            self.overrides.of(key).unwrap_or(&self.rules)
        }
    }

    /// Where the circuit of that key is, if this is a breaker.
    pub fn place<'a>(&'a self, key: &'a str) -> Option<Place<'a>> {
        self.place_at(key, || self.cells.cell(key))
    }

    /// The same of a circuit that is there, whose id is known.
    pub fn place_of<'a>(&'a self, name: &'a CircuitName) -> Option<Place<'a>> {
        self.place_at(&name.key, || name.cell)
    }

    fn place_at<'a>(&'a self, key: &'a str, cell: impl FnOnce() -> CellId) -> Option<Place<'a>> {
        let breakers = self.breakers.as_ref()?;
        Some(Place {
            namespace: &self.namespace,
            policy: &self.name,
            key,
            cell: cell(),
            breaker: breakers.of(key),
            most: breakers.most,
        })
    }

    /// Every limiter, also of overrides.
    pub fn limiters(&self) -> impl Iterator<Item = &Arc<Limiter>> {
        let overrides = self.overrides.exact.values();
        let overrides = overrides.chain(self.overrides.prefixes.iter().map(|(_, rules)| rules));
        std::iter::once(&self.rules).chain(overrides).flat_map(|rules| &rules.limiters)
    }

    /// The asks of one key, one for each limit that judges it. What only watches owes nothing: nobody would
    /// settle it.
    pub fn asks<'a>(
        &'a self,
        key: &str,
        ask: Ask,
        priority: Priority,
        now: Moment,
    ) -> impl ExactSizeIterator<Item = CellAsk<'a>> + use<'a> {
        let rules = self.rules_of(key);
        let cell = self.cells.cell(key);
        rules.limiters.iter().enumerate().map(move |(index, limiter)| CellAsk {
            cell: cell.of_limit(index),
            key: cell,
            overflow: rules.overflow.map(|overflow| overflow.of_limit(index)),
            limiter,
            ask: Ask {
                reserved: self.reserves.kept_from(priority, limiter.settings.limit.capacity()),
                window: limiter.window(now),
                purpose: match ask.purpose {
                    Purpose::Estimate | Purpose::Lease { .. } if self.shadow => Purpose::Spend,
                    purpose => purpose,
                },
                ..ask
            },
            shadow: self.shadow,
            quota: false,
            held: false,
        })
    }
}

impl Overrides {
    fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.prefixes.is_empty()
    }

    fn of(&self, key: &str) -> Option<&Rules> {
        let longest = || self.prefixes.iter().find(|(prefix, _)| key.starts_with(&**prefix));
        self.exact.get(key).or_else(|| longest().map(|(_, rules)| rules))
    }
}

impl Breakers {
    /// Of that key.
    pub fn of(&self, key: &str) -> &Arc<Breaker> {
        let longest = || self.prefixes.iter().find(|(prefix, _)| key.starts_with(&**prefix));
        let other = self.exact.get(key).or_else(|| longest().map(|(_, breaker)| breaker));
        other.unwrap_or(&self.own)
    }
}

impl Reserves {
    /// Tokens of `capacity` that a caller of that priority must leave to others. Rounded up: a reserve of
    /// something is never nothing.
    pub fn kept_from(self, priority: Priority, capacity: u64) -> u64 {
        let share = match priority {
            Priority::Critical => return 0,
            Priority::Normal => u64::from(self.critical_basis_points),
            Priority::Bulk => {
                u64::from(self.critical_basis_points) + u64::from(self.normal_basis_points)
            }
        };
        if share == 0 {
            return 0;
        }
        let kept = u128::from(capacity) * u128::from(share);
        u64::try_from(kept.div_ceil(10_000)).unwrap_or(u64::MAX)
    }
}

impl Limiter {
    /// Whether it counts permits.
    pub fn is_concurrency(&self) -> bool {
        matches!(self.settings.limit, Limit::Concurrency(_))
    }

    /// The calendar's window at this moment, if it is counted in one.
    pub fn window(&self, now: Moment) -> Option<Window> {
        self.calendar.as_ref().map(|calendar| calendar.window(now.wall))
    }
}

impl Namespace {
    /// The policy of that name.
    pub fn policy(&self, name: &str) -> Option<&Arc<Policy>> {
        self.policies.get(name)
    }
}

/// Names a cell: 128 bits of a keyed hash of namespace, policy and key, never of settings.
///
/// The key of the hash is drawn once for a data directory, so that nobody outside can make two names
/// collide; by chance two of 10^8 do with odds of 10^-23.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CellId(pub [u64; 2]);

impl fmt::Debug for CellId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}{:016x}", self.0[0], self.0[1])
    }
}

impl CellId {
    /// The cell of the same key under another limit of its policy; in the same shard. The first one's is its
    /// own.
    #[must_use]
    pub fn of_limit(self, index: usize) -> Self {
        // An odd factor: no two indices meet.
        let apart = (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self([self.0[0], self.0[1] ^ apart])
    }

    /// The id as it is stored.
    pub fn to_bytes(self) -> [u8; 16] {
        ((u128::from(self.0[0]) << 64) | u128::from(self.0[1])).to_be_bytes()
    }

    /// The id of stored bytes; `None` if they are not 16.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (high, low) = bytes.split_at_checked(8)?;
        Some(Self([
            u64::from_be_bytes(high.try_into().ok()?),
            u64::from_be_bytes(low.try_into().ok()?),
        ]))
    }
}

/// Hashes keys of one policy; namespace and policy are hashed already.
#[derive(Clone, Debug)]
pub struct CellHasher(Content);

impl CellHasher {
    /// For the cells of one policy, under the secret of a data directory.
    pub fn new(secret: &[u8; 16], namespace: &str, policy: &str) -> Self {
        Self(Content::new(secret).text(namespace).text(policy))
    }

    /// The cell of `key`.
    pub fn cell(&self, key: &str) -> CellId {
        let Digest(id) = self.0.text(key).digest();
        CellId(id)
    }

    /// The cell that keys past the policy's budget share; those of an override's prefix have their own.
    pub fn overflow(&self, prefix: Option<&str>) -> CellId {
        let shared = self.0.number(OVERFLOW);
        let Digest(id) = prefix.map_or(shared, |prefix| shared.text(prefix)).digest();
        CellId(id)
    }
}

/// In the place of a key's length: no key has it.
const OVERFLOW: u64 = u64::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_join_to_the_same_text_are_different_cells() {
        let secret = [7; 16];
        let cell = |namespace, policy, key| CellHasher::new(&secret, namespace, policy).cell(key);
        let cells = [
            cell("n", "a_b", "c"),
            cell("n", "a", "b_c"),
            cell("n_a", "b", "c"),
            cell("n", "a", ""),
            cell("n", "a", "\0"),
            cell("n", "a", "\u{e9}"),
            cell("n", "a", "e\u{301}"),
        ];
        for (index, one) in cells.iter().enumerate() {
            assert!(!cells[..index].contains(one), "cell {index} collides");
        }
    }

    #[test]
    fn a_cell_keeps_its_name_across_releases() {
        // Written to disk by the first release: a change of this value loses every stored cell.
        let cell = CellHasher::new(&[7; 16], "demo", "api").cell("alice");
        assert_eq!(format!("{cell:?}"), "67b9c0875ee0939367e8535d90a41d1e");
        assert_eq!(CellId::from_bytes(&cell.to_bytes()), Some(cell));
    }
}
