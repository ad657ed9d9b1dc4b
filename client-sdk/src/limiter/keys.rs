//! All keys of a client, found by their names.

use std::{
    hash::BuildHasher,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use hashbrown::{DefaultHashBuilder, HashMap, HashTable};
use parking_lot::{Mutex, RwLock};

use super::key::{Key, Shell};
use crate::binding::Binding;

/// Keys that lease, of all policies of a client: about 100 MB. Those past it are asked for call by call, and leave at
/// once.
const KEYS_MOST: usize = 100_000;

/// Parts of a policy's keys with a lock each, a power of two: threads that look up different keys seldom meet.
const SHARDS: usize = 16;

/// The policies that are in use, and what is in use of them.
#[derive(Default)]
pub(super) struct Keys {
    families: Mutex<HashMap<Arc<str>, Arc<Family>>>,
    /// In the order in which they came, which is that in which they are looked after.
    all: Mutex<Vec<Arc<Key>>>,
    count: AtomicUsize,
}

/// The keys of one policy.
pub(super) struct Family {
    policy: Arc<str>,
    hasher: DefaultHashBuilder,
    shards: [Shard; SHARDS],
}

type Shard = RwLock<HashTable<Arc<Key>>>;

impl Family {
    fn is_empty(&self) -> bool {
        self.shards.iter().all(|shard| shard.read().is_empty())
    }

    /// Where a key is, and by which hash: one does for both, since a table goes by other bits of it.
    #[inline]
    fn shard(&self, key: &str) -> (&Shard, u64) {
        let hash = self.hasher.hash_one(key);
        #[allow(clippy::cast_possible_truncation)] // bits from the middle
        let shard = (hash >> 32) as usize % SHARDS;
        (&self.shards[shard], hash)
    }

    /// Does something with the key of that name, if it is there, which must not look for another one.
    #[inline]
    pub(super) fn find<T>(&self, name: &str, act: impl FnOnce(&Arc<Key>) -> T) -> Option<T> {
        let (shard, hash) = self.shard(name);
        shard.read().find(hash, |key| *key.binding.key == *name).map(act)
    }
}

impl Keys {
    pub(super) fn family(&self, policy: &str) -> Arc<Family> {
        let mut families = self.families.lock();
        if let Some(family) = families.get(policy) {
            return Arc::clone(family);
        }
        let family = Arc::new(Family {
            policy: policy.into(),
            hasher: DefaultHashBuilder::default(),
            shards: Default::default(),
        });
        families.insert(Arc::clone(&family.policy), Arc::clone(&family));
        family
    }

    /// The key of that name; one that was not there begins.
    pub(super) fn key(&self, shell: &Arc<Shell>, family: &Family, name: &str) -> Arc<Key> {
        family.find(name, Arc::clone).unwrap_or_else(|| self.begin(shell, family, name))
    }

    #[cold]
    fn begin(&self, shell: &Arc<Shell>, family: &Family, name: &str) -> Arc<Key> {
        if self.count.load(Ordering::Relaxed) >= KEYS_MOST {
            return Self::one_too_many(shell, family, name);
        }
        let binding = shell.context.exchange.bind(&family.policy, name);
        let (shard, hash) = family.shard(name);
        let mut shard = shard.write();
        if let Some(key) = shard.find(hash, |key| *key.binding.key == *name) {
            return Arc::clone(key);
        }
        let key = Key::new(shell, binding, true);
        let hasher = |key: &Arc<Key>| family.hasher.hash_one(&*key.binding.key);
        shard.insert_unique(hash, Arc::clone(&key), hasher);
        drop(shard);
        self.count.fetch_add(1, Ordering::Relaxed);
        self.all.lock().push(Arc::clone(&key));
        key
    }

    /// A key that there is no room for: it is not bound either, and judged alone as the policy's own key is.
    fn one_too_many(shell: &Arc<Shell>, family: &Family, name: &str) -> Arc<Key> {
        let binding = Binding::new(&family.policy, name, 0);
        family.find("", |own| binding.is_told(own.binding.settings(), own.binding.clients()));
        Key::new(shell, Arc::new(binding), false)
    }

    pub(super) fn for_each(&self, mut each: impl FnMut(&Arc<Key>)) {
        // Not under the lock: what is done may take a while, and calls wait for it that use a new key.
        let all = self.all.lock().clone();
        all.iter().for_each(&mut each);
    }

    /// Leaves out those that `stays` says no of, if nobody has a handle of them.
    pub(super) fn retain(&self, mut stays: impl FnMut(&Arc<Key>) -> bool) {
        // Held all along, so that no key is missing where somebody adds up counts; who begins a new one waits.
        self.all.lock().retain(|key| stays(key) || !self.leave(key));
        // Nobody comes by another while they are locked.
        let mut families = self.families.lock();
        families.retain(|_, family| Arc::strong_count(family) > 1 || !family.is_empty());
    }

    fn leave(&self, key: &Arc<Key>) -> bool {
        let family = self.family(&key.binding.policy);
        let (shard, hash) = family.shard(&key.binding.key);
        let mut shard = shard.write();
        // The shard's and this one: nobody can come by another while the shard is locked.
        if Arc::strong_count(key) > 2 {
            return false;
        }
        if let Ok(place) = shard.find_entry(hash, |one| Arc::ptr_eq(one, key)) {
            place.remove();
        }
        self.count.fetch_sub(1, Ordering::Relaxed);
        true
    }
}

#[cfg(test)]
impl Keys {
    pub(super) fn policies(&self) -> usize {
        self.families.lock().len()
    }
}
