//! Which reports of each client have come, so that one that arrives twice counts once.
//!
//! Each client has a window over its latest numbers, as receivers of packets have over theirs (RFC 4303, 3.4.3):
//! the highest that came, and which of those below it did. One that is too old for the window is taken to have
//! come: to count too little for once is better than to count twice.

use std::{collections::HashMap, num::NonZeroU64};

use fusebox_core::Time;
use parking_lot::Mutex;

use super::{Principal, grants::Owner};
use crate::{
    digest::{Content, Digest},
    limits,
};

/// The windows of clients, each until it was silent for a while.
#[derive(Debug)]
pub(super) struct Sequences {
    secret: [u8; 16],
    shards: [Mutex<HashMap<Digest, Window>>; limits::SEQUENCE_SHARDS],
    tended: Mutex<Time>,
}

/// What has come of one client.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    highest: u64,
    /// Bit i: whether the one `i` below the highest has come.
    came: u64,
    last: Time,
}

impl Window {
    /// Whether that number comes for the first time.
    fn take(&mut self, sequence: NonZeroU64) -> bool {
        let sequence = sequence.get();
        if let Some(on @ 1..) = sequence.checked_sub(self.highest) {
            self.highest = sequence;
            self.came = if on < u64::from(u64::BITS) { self.came << on } else { 0 };
        }
        let age = self.highest - sequence;
        let bit = if age < u64::from(u64::BITS) { 1 << age } else { 0 };
        let is_new = bit != 0 && self.came & bit == 0;
        self.came |= bit;
        is_new
    }
}

impl Sequences {
    /// Nothing came yet; the secret is what nobody can guess, so that nobody finds two clients of one name.
    pub(super) fn new(secret: [u8; 16]) -> Self {
        let shards = std::array::from_fn(|_| Mutex::default());
        Self { secret, shards, tended: Mutex::default() }
    }

    /// Whether a client's report of that number comes for the first time. Of two at once only one does.
    pub(super) fn take(
        &self,
        owner: &Owner,
        client: &str,
        sequence: NonZeroU64,
        now: Time,
    ) -> bool {
        let Principal::Anonymous = owner.principal;
        let named = Content::new(&self.secret).text("").text(&owner.namespace).text(client);
        let name = named.digest();
        let shard = (name.0[0] >> 32) as usize % limits::SEQUENCE_SHARDS;
        let mut windows = self.shards[shard].lock();
        if windows.len() == limits::SEQUENCES / limits::SEQUENCE_SHARDS
            && !windows.contains_key(&name)
        {
            // Who was silent for longest is the least likely to repeat anything.
            let silent = windows.iter().min_by_key(|(_, window)| window.last);
            if let Some(silent) = silent.map(|(name, _)| *name) {
                windows.remove(&silent);
            }
        }
        let window = windows.entry(name).or_default();
        window.last = window.last.max(now);
        window.take(sequence)
    }

    /// Forgets those that were silent, once in a few seconds.
    pub(super) fn tend(&self, now: Time) {
        let mut tended = self.tended.lock();
        if tended.after(limits::CLIENTS_TENDED) > now {
            return;
        }
        *tended = now;
        for shard in &self.shards {
            shard.lock().retain(|_, window| window.last.after(limits::CLIENT_SILENCE) > now);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn number(sequence: u64) -> NonZeroU64 {
        NonZeroU64::new(sequence).unwrap()
    }

    fn owner(namespace: &str) -> Owner {
        Owner { principal: Principal::Anonymous, namespace: namespace.into() }
    }

    fn remembered(sequences: &Sequences) -> usize {
        sequences.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    #[test]
    fn each_counts_once_in_any_order_and_what_is_too_old_does_not() {
        let mut window = Window::default();
        for first in [100, 98, 37, 99] {
            assert!(window.take(number(first)), "{first}");
            assert!(!window.take(number(first)), "{first} again");
        }
        assert!(!window.take(number(36)), "64 before the highest");
        assert!(window.take(number(163)));
        assert!(!window.take(number(100)), "the last of the window, and it came");
        assert!(window.take(number(101)));
        assert!(window.take(number(u64::MAX)));
        assert!(window.take(number(u64::MAX - 63)));
        assert!(!window.take(number(u64::MAX - 64)) && !window.take(number(1)));
        assert!(Window::default().take(number(u64::MAX)));
    }

    #[test]
    fn a_window_is_the_set_of_what_came() {
        let (mut window, mut came, mut highest) = (Window::default(), HashSet::new(), 0_u64);
        // Steps as drawn: one of a linear congruential generator each (Knuth's MMIX).
        let mut drawn = 1_u64;
        for _ in 0..100_000 {
            drawn = drawn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (back, by) = (drawn >> 63 == 1, (drawn >> 32) % 80);
            let sequence = if back { highest.saturating_sub(by) } else { highest + by / 20 };
            let Some(sequence) = NonZeroU64::new(sequence) else { continue };
            let is_old = sequence.get() + 64 <= highest;
            let is_new = came.insert(sequence) && !is_old;
            assert_eq!(window.take(sequence), is_new, "{sequence}, and {highest} came");
            highest = highest.max(sequence.get());
        }
        assert!(came.len() > 10_000, "{}", came.len());
    }

    #[test]
    fn clients_and_namespaces_have_their_own_until_they_are_silent() {
        let sequences = Sequences::new([7; 16]);
        let at = |seconds: u64| Time::from_nanos(seconds * 1_000_000_000);
        let take =
            |namespace, client, now| sequences.take(&owner(namespace), client, number(1), at(now));
        assert!(take("one", "a", 1) && take("one", "b", 2) && take("two", "a", 3));
        assert!(!take("one", "a", 500) && !take("two", "a", 3));
        sequences.tend(at(700));
        assert_eq!(remembered(&sequences), 1);
        assert!(!take("one", "a", 701) && take("one", "b", 701), "who was silent is forgotten");
    }

    #[test]
    fn past_the_bound_who_was_silent_for_longest_is_forgotten() {
        let sequences = Sequences::new([7; 16]);
        let take = |client: usize, now| {
            let now = Time::from_nanos(now as u64);
            sequences.take(&owner("one"), &client.to_string(), number(1), now)
        };
        let all = limits::SEQUENCES + limits::SEQUENCES / 50;
        for client in 0..all {
            assert!(take(client, client));
            assert!(!take(client, client), "the newest is always there");
        }
        assert!((limits::SEQUENCES / 2..=limits::SEQUENCES).contains(&remembered(&sequences)));
        assert!((all / 2..all).all(|client| !take(client, client)), "and so is who came lately");
        assert!(!(0..all / 10).all(|client| !take(client, client)));
    }

    #[test]
    fn of_two_that_race_one_counts() {
        let sequences = Sequences::new([7; 16]);
        for sequence in 1..=200 {
            let take = || sequences.take(&owner("one"), "a", number(sequence), Time::ZERO);
            let (one, other) = std::thread::scope(|scope| {
                let one = scope.spawn(take);
                (take(), one.join().unwrap())
            });
            assert!(one != other);
        }
    }
}
