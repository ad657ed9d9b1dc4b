//! What is left of a lease, and until when: one word, so that spending it is one exchange.

use std::sync::atomic::{AtomicU64, Ordering};

use fusebox_core::Time;

/// Bits of a word that count tokens; the rest count ticks, up to 4.5 years after the client's start. What would
/// expire later is taken as expired, so that such a client asks instead.
const TOKEN_BITS: u32 = 27;

/// Most tokens of one lease, by the bits that count them: 134 million.
pub(super) const TOKENS_MOST: u64 = (1 << TOKEN_BITS) - 1;

/// Last tick that a word can tell.
const TICKS_MOST: u64 = u64::MAX >> TOKEN_BITS;

/// Ticks are 2^20 ns, about a millisecond: a shift is all that telling one takes.
const TICK_SHIFT: u32 = 20;

/// The ticks that are over at a time.
#[inline]
pub(super) const fn ticks(time: Time) -> u64 {
    time.as_nanos() >> TICK_SHIFT
}

/// Tokens that may be spent until a tick. Nothing at all is in one that is 0.
#[derive(Debug, Default)]
pub(super) struct Word(AtomicU64);

impl Word {
    /// Takes `cost` tokens, at least 1, if there are as many and they have not expired; tells how many are left.
    #[inline]
    pub(super) fn take(&self, cost: u64, now: Time) -> Option<u64> {
        let now = ticks(now);
        // Nothing is told by the word but itself, so no order with other memory is needed.
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            let tokens = word & TOKENS_MOST;
            if tokens < cost || word >> TOKEN_BITS <= now {
                return None;
            }
            let less = word - cost;
            match self.0.compare_exchange_weak(word, less, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(tokens - cost),
                Err(seen) => word = seen,
            }
        }
    }

    /// Puts a lease where nothing is left of the last one. More than [`TOKENS_MOST`] cannot be put there.
    pub(super) fn put(&self, tokens: u64, expires: Time) {
        // Rounded down: early by a tick, never late.
        let tick = ticks(expires);
        let tick = if tick > TICKS_MOST { 0 } else { tick };
        self.0.store(tick << TOKEN_BITS | tokens.min(TOKENS_MOST), Ordering::Relaxed);
    }

    /// Takes all that is left, expired or not: from now on it is certain that nobody spends it.
    pub(super) fn clear(&self) -> u64 {
        self.0.swap(0, Ordering::Relaxed) & TOKENS_MOST
    }

    /// Tokens that are left, expired or not.
    pub(super) fn left(&self) -> u64 {
        self.0.load(Ordering::Relaxed) & TOKENS_MOST
    }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use super::*;

    const START: Time = Time::ZERO;

    fn at(millis: u64) -> Time {
        START.after(Duration::from_millis(millis))
    }

    #[test]
    fn what_is_put_is_spent_once() {
        let word = Word::default();
        assert_eq!(word.take(1, START), None);
        word.put(10, at(1_000));
        assert_eq!((word.take(4, START), word.take(7, START)), (Some(6), None));
        assert_eq!((word.left(), word.clear(), word.clear()), (6, 6, 0));
        assert_eq!(word.take(1, START), None);
    }

    #[test]
    fn nothing_is_spent_of_what_expired_but_it_can_be_given_back() {
        let word = Word::default();
        word.put(10, at(1_000));
        assert!(word.take(1, at(998)).is_some(), "a tick is no longer than two milliseconds");
        assert_eq!((word.take(1, at(1_000)), word.take(1, at(u64::MAX / 1_000_000))), (None, None));
        assert_eq!(word.clear(), 9);
    }

    #[test]
    fn the_largest_lease_and_the_last_tick_fit() {
        let word = Word::default();
        let last = Time::from_nanos(TICKS_MOST << TICK_SHIFT);
        word.put(TOKENS_MOST, last);
        assert_eq!(word.take(TOKENS_MOST, at(0)), Some(0));
        word.put(1, last.after(Duration::from_secs(1)));
        assert_eq!(word.take(1, at(0)), None, "past what a word can tell, it has expired");
        word.put(u64::MAX, at(9));
        assert_eq!(word.clear(), TOKENS_MOST);
    }

    #[test]
    fn threads_that_spend_while_leases_come_and_go_spend_no_more_than_was_put() {
        let word = Word::default();
        let (put, given_back) = (20_000, AtomicU64::new(0));
        let spent: u64 = thread::scope(|scope| {
            let spenders: Vec<_> = (1..=3)
                .map(|cost| {
                    let word = &word;
                    scope.spawn(move || {
                        let (mut spent, mut idle) = (0, 0);
                        while idle < 200_000 {
                            match word.take(cost, START) {
                                Some(_) => (spent, idle) = (spent + cost, 0),
                                None => idle += 1,
                            }
                        }
                        spent
                    })
                })
                .collect();
            for _ in 0..put / 10 {
                given_back.fetch_add(word.clear(), Ordering::Relaxed);
                word.put(10, at(1_000));
            }
            spenders.into_iter().map(|spender| spender.join().unwrap()).sum()
        });
        assert_eq!(spent + given_back.into_inner() + word.clear(), put);
    }
}
