//! Policies and keys in use, and the short numbers of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::binding::Binding;

/// Numbers of bindings are 1 to this; the server's limit is one more, see [`SPARE`].
const NUMBERS: u32 = 4_095;

/// The number that bindings without one share: each is bound by it for a moment, in turn, to be told its settings.
/// It also serves to probe a session.
pub(crate) const SPARE: u32 = 4_096;

/// Names that are remembered, at most: some 20 MB. Each binding of more names is a new one.
const NAMES_MOST: usize = 100_000;

/// All bindings of a client.
#[derive(Debug, Default)]
pub(crate) struct Bindings {
    /// By policy and key, in an order of their own: nothing depends on the seed of a hash.
    names: BTreeMap<Arc<str>, BTreeMap<Arc<str>, Entry>>,
    count: usize,
    /// Numbers up to this one were given out.
    highest: u32,
    free: BTreeSet<u32>,
}

#[derive(Debug)]
struct Entry {
    binding: Arc<Binding>,
    /// Nobody used it when that was looked at last.
    unused: bool,
}

impl Bindings {
    /// The binding of these names, and whether it is new.
    pub(crate) fn bind(&mut self, policy: &str, key: &str) -> (Arc<Binding>, bool) {
        let known = self.names.get_mut(policy).and_then(|keys| keys.get_mut(key));
        if let Some(entry) = known {
            entry.unused = false;
            return (Arc::clone(&entry.binding), false);
        }
        if self.count >= NAMES_MOST {
            return (Arc::new(Binding::new(policy, key, 0)), true);
        }
        let binding = Arc::new(Binding::new(policy, key, self.number()));
        let keys = self.names.entry(Arc::clone(&binding.policy)).or_default();
        let entry = Entry { binding: Arc::clone(&binding), unused: false };
        keys.insert(Arc::clone(&binding.key), entry);
        self.count += 1;
        (binding, true)
    }

    fn number(&mut self) -> u32 {
        if let Some(free) = self.free.pop_first() {
            return free;
        }
        if self.highest == NUMBERS {
            return 0;
        }
        self.highest += 1;
        self.highest
    }

    /// All of them.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Binding>> {
        self.names.values().flat_map(|keys| keys.values()).map(|entry| &entry.binding)
    }

    /// Forgets those that nobody used the last time either. Tells whether their numbers are to be unbound.
    pub(crate) fn sweep(&mut self) -> bool {
        let (before, free) = (self.count, &mut self.free);
        for keys in self.names.values_mut() {
            keys.retain(|_, entry| {
                let unused = Arc::strong_count(&entry.binding) == 1;
                let keep = !(unused && entry.unused);
                entry.unused = unused;
                if !keep && entry.binding.handle != 0 {
                    free.insert(entry.binding.handle);
                }
                keep
            });
        }
        self.names.retain(|_, keys| !keys.is_empty());
        self.count = self.names.values().map(BTreeMap::len).sum();
        self.count < before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_names_have_the_same_binding() {
        let mut bindings = Bindings::default();
        let (first, new) = bindings.bind("api", "a");
        assert!(new);
        let (second, new) = bindings.bind("api", "a");
        assert!(!new && Arc::ptr_eq(&first, &second));
        // Keys are never joined.
        assert_eq!(bindings.bind("ap", "ia").0.handle, 2);
    }

    #[test]
    fn there_are_4095_numbers_and_then_none() {
        let mut bindings = Bindings::default();
        let all: Vec<_> = (0..4097).map(|key| bindings.bind("api", &key.to_string()).0).collect();
        assert_eq!(all[0].handle, 1);
        assert_eq!(all[4094].handle, 4095);
        assert_eq!(all[4095].handle, 0);
        assert_eq!(all[4096].handle, 0);
    }

    #[test]
    fn a_number_is_given_again_after_two_looks_at_a_binding_that_nobody_uses() {
        let mut bindings = Bindings::default();
        let (used, _) = bindings.bind("api", "used");
        let (unused, _) = bindings.bind("api", "unused");
        let number = unused.handle;
        drop(unused);
        assert!(!bindings.sweep());
        assert!(bindings.sweep());
        assert_eq!(bindings.bind("api", "other").0.handle, number);
        assert!(Arc::ptr_eq(&bindings.bind("api", "used").0, &used));
    }

    #[test]
    fn one_that_is_used_between_two_looks_stays() {
        let mut bindings = Bindings::default();
        let (binding, _) = bindings.bind("api", "a");
        drop(binding);
        bindings.sweep();
        drop(bindings.bind("api", "a"));
        assert!(!bindings.sweep());
        assert_eq!(bindings.all().count(), 1);
    }

    #[test]
    fn past_the_most_a_binding_is_nobody_elses() {
        let mut bindings = Bindings { count: NAMES_MOST, ..Default::default() };
        let (first, _) = bindings.bind("api", "a");
        let (second, _) = bindings.bind("api", "a");
        assert_eq!(first.handle, 0);
        assert!(!Arc::ptr_eq(&first, &second));
        assert_eq!(bindings.all().count(), 0);
    }
}
