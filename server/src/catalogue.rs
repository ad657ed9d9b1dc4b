//! The policies in force: an immutable snapshot, swapped whole.

use std::{fmt, hash::Hasher, sync::Arc};

use fusebox_core::Cost;
use hashbrown::HashMap;
use siphasher::sip128::{Hash128, Hasher128, SipHasher24};

use crate::{
    counters::Decisions,
    storage::{CellAsk, Keeping},
};

/// All policies at one moment.
#[derive(Debug, Default)]
pub struct Catalogue {
    /// Counts the snapshots of this run.
    pub revision: u64,
    namespaces: HashMap<Box<str>, Namespace>,
    /// Also those that the configuration no longer names, while cells of theirs may live.
    numbered: HashMap<PolicyNumber, Arc<Policy>>,
}

/// The policies of one tenant, by name.
#[derive(Debug, Default)]
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
    /// What its cells call it.
    pub number: PolicyNumber,
    /// What decides.
    pub settings: fusebox_core::Policy,
    /// How its cells are kept on disk.
    pub keeping: Keeping,
    /// Names its cells.
    pub cells: CellHasher,
    /// Counts its decisions; outlives the snapshot.
    pub decisions: Arc<Decisions>,
}

/// What the cells of a policy call it: given once, never reused in a data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyNumber(pub u32);

impl Catalogue {
    /// A snapshot of these policies, each with whether it can be asked by name.
    pub fn new(revision: u64, policies: impl IntoIterator<Item = (Policy, bool)>) -> Self {
        let mut catalogue = Self { revision, ..Self::default() };
        for (policy, named) in policies {
            let policy = Arc::new(policy);
            if named {
                let namespace = policy.namespace.as_ref().into();
                let namespace = catalogue.namespaces.entry(namespace).or_default();
                namespace.policies.insert(policy.name.as_ref().into(), Arc::clone(&policy));
            }
            catalogue.numbered.insert(policy.number, policy);
        }
        catalogue
    }

    /// The namespace of that name.
    pub fn namespace(&self, name: &str) -> Option<&Namespace> {
        self.namespaces.get(name)
    }

    /// The policy of that number.
    pub fn numbered(&self, number: PolicyNumber) -> Option<&Arc<Policy>> {
        self.numbered.get(&number)
    }

    /// Every policy that cannot be asked: the configuration no longer names it.
    pub fn unnamed(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.numbered.values().filter(|policy| !self.names(policy))
    }

    /// Whether the policy can be asked.
    pub fn names(&self, policy: &Policy) -> bool {
        let namespace = self.namespace(&policy.namespace);
        namespace.is_some_and(|namespace| namespace.policy(&policy.name).is_some())
    }

    /// Every policy that can be asked.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.namespaces.values().flat_map(|namespace| namespace.policies.values())
    }
}

impl Policy {
    /// An ask of one of its cells.
    pub fn ask(&self, key: &str, cost: Cost) -> CellAsk<'_> {
        CellAsk {
            cell: self.cells.cell(key),
            number: self.number,
            policy: &self.settings,
            keeping: self.keeping,
            cost,
        }
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
#[derive(Clone)]
pub struct CellHasher(SipHasher24);

impl fmt::Debug for CellHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CellHasher")
    }
}

impl CellHasher {
    /// For the cells of one policy, under the secret of a data directory.
    pub fn new(secret: &[u8; 16], namespace: &str, policy: &str) -> Self {
        let mut hasher = SipHasher24::new_with_key(secret);
        write_prefixed(&mut hasher, namespace);
        write_prefixed(&mut hasher, policy);
        Self(hasher)
    }

    /// The cell of `key`.
    pub fn cell(&self, key: &str) -> CellId {
        let mut hasher = self.0;
        write_prefixed(&mut hasher, key);
        let Hash128 { h1, h2 } = hasher.finish128();
        CellId([h1, h2])
    }
}

/// Each part with its length first: `a_b` and `c` is not `a` and `b_c`.
fn write_prefixed(hasher: &mut SipHasher24, part: &str) {
    hasher.write(&(part.len() as u64).to_le_bytes());
    hasher.write(part.as_bytes());
}

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
