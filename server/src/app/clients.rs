//! Who called lately.

use std::hash::BuildHasher;

use fusebox_core::Time;
use hashbrown::{DefaultHashBuilder, HashTable};
use parking_lot::Mutex;

use super::Client;
use crate::limits;

/// Clients that name themselves, by namespace and id, each until it was silent for a while.
#[derive(Debug)]
pub(super) struct Clients {
    hasher: DefaultHashBuilder,
    shards: [Mutex<HashTable<Seen>>; limits::CLIENT_SHARDS],
    tended: Mutex<Time>,
}

/// A client that called.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    namespace: Box<str>,
    pub(super) id: Box<str>,
    pub(super) service: Box<str>,
    pub(super) zone: Box<str>,
    pub(super) last: Time,
}

impl Clients {
    pub(super) fn new() -> Self {
        Self {
            hasher: DefaultHashBuilder::default(),
            shards: std::array::from_fn(|_| Mutex::default()),
            tended: Mutex::default(),
        }
    }

    /// Notes that a client calls. Nobody waits for that: where another one is being noted, the next call does
    /// as well.
    pub(super) fn see(&self, namespace: &str, client: Client<'_>, now: Time) {
        let hash = self.hash(namespace, client.id);
        #[allow(clippy::cast_possible_truncation)]
        let shard = &self.shards[hash as usize % limits::CLIENT_SHARDS];
        let Some(mut clients) = shard.try_lock() else { return };
        let same = |seen: &Seen| *seen.id == *client.id && *seen.namespace == *namespace;
        if let Some(seen) = clients.find_mut(hash, same) {
            seen.last = seen.last.max(now);
        } else if clients.len() < limits::CLIENTS / limits::CLIENT_SHARDS {
            let Client { id, service, zone } = client;
            let seen = Seen {
                namespace: namespace.into(),
                id: id.into(),
                service: service.into(),
                zone: zone.into(),
                last: now,
            };
            clients.insert_unique(hash, seen, |seen| self.hash(&seen.namespace, &seen.id));
        }
    }

    /// Every client that called, of one namespace if one is given.
    pub(super) fn visit(&self, namespace: Option<&str>, mut visit: impl FnMut(&Seen)) {
        for shard in &self.shards {
            let clients = shard.lock();
            let wanted = |seen: &&Seen| namespace.is_none_or(|wanted| *seen.namespace == *wanted);
            clients.iter().filter(wanted).for_each(&mut visit);
        }
    }

    /// Forgets those that were silent, once in a few seconds.
    pub(super) fn tend(&self, now: Time) {
        let mut tended = self.tended.lock();
        if tended.after(limits::CLIENTS_TENDED) > now {
            return;
        }
        *tended = now;
        for shard in &self.shards {
            shard.lock().retain(|seen| seen.last.after(limits::CLIENT_SILENCE) > now);
        }
    }

    fn hash(&self, namespace: &str, id: &str) -> u64 {
        self.hasher.hash_one((namespace, id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(clients: &Clients, namespace: Option<&str>) -> Vec<(String, Time)> {
        let mut all = Vec::new();
        clients.visit(namespace, |seen| all.push((seen.id.to_string(), seen.last)));
        all.sort_unstable();
        all
    }

    #[test]
    fn those_that_call_are_remembered_until_they_are_silent() {
        let clients = Clients::new();
        let at = |seconds: u64| Time::from_nanos(seconds * 1_000_000_000);
        let see = |namespace, id, now| {
            clients.see(namespace, Client { id, service: "api", zone: "" }, now);
        };
        see("one", "a", at(1));
        see("one", "b", at(2));
        see("two", "b", at(3));
        see("one", "a", at(500));
        see("one", "a", at(400));
        let a = ("a".to_owned(), at(500));
        assert_eq!(seen(&clients, Some("one")), [a.clone(), ("b".into(), at(2))]);
        assert_eq!(seen(&clients, None).len(), 3);
        clients.tend(at(700));
        assert_eq!(seen(&clients, None), [a]);
    }

    #[test]
    fn there_is_an_end_to_them() {
        let clients = Clients::new();
        for id in 0..2 * limits::CLIENTS {
            let client = Client { id: &id.to_string(), service: "", zone: "" };
            clients.see("one", client, Time::ZERO);
        }
        let count = seen(&clients, None).len();
        assert!((limits::CLIENTS / 2..=limits::CLIENTS).contains(&count), "{count}");
    }
}
