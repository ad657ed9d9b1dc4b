//! What the clients know of each bucket, kept apart from the server, and what must follow from it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::policies::{Kept, Key};

/// What a server that forgets what it was slow to write may forget: its interval, and one slow write.
const FORGOTTEN: Duration = Duration::from_secs(1);

/// What a server's time may lose between its readings of two clocks at a start.
const CLOCKS: Duration = Duration::from_millis(1);

/// Everything that was ever sent, on the one clock of the test.
pub struct Ledger {
    origin: Instant,
    /// The same, on the clock of the wall.
    wall: Duration,
    buckets: Vec<(Key, Vec<Entry>)>,
    kills: Vec<Duration>,
}

/// What was sent about one bucket, and when the answer came.
#[derive(Clone, Copy, Debug)]
struct Entry {
    what: What,
    tokens: i128,
    sent: Duration,
    received: Option<Duration>,
    /// The answer came, or it was certain that none would.
    over: Option<Duration>,
    /// Its permits are about to be released.
    released: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// An ask that was allowed.
    Charge,
    /// What a call cost beyond its estimate.
    Owed,
    /// What a call cost less than its estimate.
    Credit,
    /// So many tokens were said to be left while nobody else asked: as good as a charge of them.
    Left,
}

/// An entry whose answer is not there yet.
#[derive(Clone, Copy)]
pub struct Ticket(usize, usize);

impl Ledger {
    pub fn new(keys: impl IntoIterator<Item = Key>) -> Self {
        let buckets = keys.into_iter().map(|key| (key, Vec::new())).collect();
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        Self { origin: Instant::now(), wall, buckets, kills: Vec::new() }
    }

    pub fn keys(&self) -> Vec<Key> {
        self.buckets.iter().map(|(key, _)| *key).collect()
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// Something is about to be sent.
    pub fn sends(&mut self, key: Key, what: What, tokens: u64) -> Ticket {
        let sent = self.now();
        let bucket = self.buckets.iter().position(|(known, _)| *known == key).unwrap();
        let entries = &mut self.buckets[bucket].1;
        let tokens = i128::from(tokens);
        entries.push(Entry { what, tokens, sent, received: None, over: None, released: None });
        Ticket(bucket, entries.len() - 1)
    }

    /// The server did what was asked.
    pub fn done(&mut self, Ticket(bucket, entry): Ticket) {
        let now = self.now();
        let entry = &mut self.buckets[bucket].1[entry];
        (entry.received, entry.over) = (Some(now), Some(now));
    }

    /// The server said that it did not.
    pub fn refused(&mut self, ticket: Ticket) {
        self.buckets[ticket.0].1[ticket.1].tokens = 0;
        self.done(ticket);
    }

    /// The permits of a charge are about to be released.
    pub fn releases(&mut self, Ticket(bucket, entry): Ticket) {
        let now = self.now();
        self.buckets[bucket].1[entry].released = Some(now);
    }

    /// The server was killed a moment ago.
    pub fn killed(&mut self) {
        self.kills.push(self.now());
        self.ended();
    }

    /// What was not answered will not be.
    pub fn ended(&mut self) {
        let now = self.now();
        for entry in self.buckets.iter_mut().flat_map(|(_, entries)| entries) {
            entry.over.get_or_insert(now);
        }
    }

    /// This many tokens are left, says a server whom nobody else asks: are they as many as must be?
    ///
    /// Counted from when there was last something left, with everything charged that was sent since, answered or
    /// not, as late as it can have been, and nothing given back.
    pub fn left(&mut self, asked: Ticket, left: u64) -> Result<(), String> {
        let left = i128::from(left);
        self.done(asked);
        let (key, entries) = &mut self.buckets[asked.0];
        entries[asked.1].tokens = left;
        if key.policy.ttl().is_some() {
            return Ok(()); // permits come back as they are released
        }
        let now = entries[asked.1];
        let before = &entries[..asked.1];
        // Where nothing is left, something may be owed besides.
        let known = |entry: &Entry| entry.what == What::Left && entry.tokens > 0;
        let Some(last) = before.iter().rposition(known) else { return Ok(()) };
        let looked = before[last].received.unwrap();
        let kills =
            i128::try_from(self.kills.iter().filter(|kill| **kill > looked).count()).unwrap();
        let lost = match key.policy.kept {
            Kept::Fast if kills > 0 => return Ok(()),
            // A mark counts whole tokens.
            Kept::Strict => kills * (key.policy.step() + 1),
            Kept::Fast | Kept::Relaxed => 0,
        };
        let mut charges: Vec<_> = before[last..]
            .iter()
            .filter(|entry| matches!(entry.what, What::Charge | What::Owed))
            .map(|entry| (entry.over.unwrap(), entry.tokens))
            .collect();
        charges.sort_unstable();
        charges.push((now.sent, 0));
        let policy = key.policy;
        let mut parts = before[last].tokens * policy.parts();
        let mut at = looked;
        for (then, tokens) in charges {
            let full = policy.burst() * policy.parts();
            parts = (parts + policy.refill(then.saturating_sub(at + CLOCKS))).min(full);
            parts -= tokens * policy.parts();
            at = at.max(then);
        }
        let least = parts.div_euclid(policy.parts()) - lost;
        if left >= least {
            return Ok(());
        }
        Err(format!(
            "capacity is lost: {key} has {left} left, and {least} must be; looked at {:?} ago, {kills} \
             kills since",
            now.sent.saturating_sub(looked)
        ))
    }

    /// Nothing was spent twice: no stretch of time has more in it than a full bucket and its refill, or what
    /// was said to be left at its start and its refill.
    pub fn check(&self) -> Result<(), String> {
        self.buckets.iter().try_for_each(|(key, entries)| match key.policy.ttl() {
            Some(ttl) => check_permits(*key, ttl, entries),
            None => self.check_one(*key, entries),
        })
    }

    /// What was allowed from one moment to another is what was both sent after the first and received before
    /// the last: the stretch that is best for the server. What may have been given back by then counts as
    /// given back.
    fn check_one(&self, key: Key, entries: &[Entry]) -> Result<(), String> {
        let policy = key.policy;
        let says = |entry: &&Entry| entry.tokens > 0 || entry.what == What::Left;
        let mut latest_first: Vec<_> = entries.iter().filter(says).collect();
        latest_first.sort_unstable_by_key(|entry| std::cmp::Reverse(entry.sent));
        let mut credits: Vec<_> =
            latest_first.iter().filter(|entry| entry.what == What::Credit).collect();
        credits.sort_unstable_by_key(|credit| std::cmp::Reverse(credit.over));
        // Where nothing is left, more may be owed.
        let bounds =
            |entry: &&&Entry| entry.tokens > 0 && matches!(entry.what, What::Charge | What::Left);
        for last in latest_first.iter().filter(bounds) {
            let Some(end) = last.received else { continue };
            let mut back = credits.iter().filter(|credit| credit.sent <= end).peekable();
            let (mut spent, mut given_back) = (last.tokens, 0);
            for first in &latest_first {
                let counts = match (first.what, first.received) {
                    _ if std::ptr::eq(*first, *last) => true,
                    (What::Charge, Some(received)) => received <= end,
                    // A debt may follow what was allowed before it.
                    (What::Owed, Some(received)) => received <= last.sent,
                    (What::Left, Some(_)) => true,
                    _ => false,
                };
                if !counts || first.sent > end {
                    continue;
                }
                let spends = first.what != What::Left && !std::ptr::eq(*first, *last);
                if spends && !self.may_be_forgotten(key, first, end) {
                    spent += first.tokens;
                }
                while let Some(credit) =
                    back.next_if(|credit| credit.over.is_none_or(|over| over >= first.sent))
                {
                    given_back += credit.tokens;
                }
                let at_first = match first.what {
                    // And a part of a token, at most.
                    What::Left
                        if !std::ptr::eq(*first, *last) && policy.is_bound_by_what_is_left() =>
                    {
                        first.tokens + 1
                    }
                    _ => policy.burst(),
                };
                let stretch = end.saturating_sub(first.sent);
                let refill = policy.most_refill(self.wall + first.sent, self.wall + end);
                let most = (at_first + given_back) * policy.parts() + refill;
                if first.sent <= last.sent && spent * policy.parts() > most {
                    return Err(format!(
                        "spent twice: {spent} of {key} in {stretch:?} that began with {at_first}, and \
                         {given_back} given back; from {first:?} to {last:?}, with kills at {:?}",
                        self.kills_in(first.sent, end)
                    ));
                }
            }
        }
        Ok(())
    }

    fn kills_in(&self, start: Duration, end: Duration) -> Vec<Duration> {
        self.kills.iter().copied().filter(|kill| (start..=end).contains(kill)).collect()
    }

    /// Whether a kill before `end` may have taken this with it.
    fn may_be_forgotten(&self, key: Key, entry: &Entry, end: Duration) -> bool {
        let takes = |kill: Duration| entry.received.is_some_and(|at| at + FORGOTTEN >= kill);
        key.policy.kept == Kept::Relaxed && self.kills_in(entry.sent, end).into_iter().any(takes)
    }

    /// Number of answers that allowed something.
    pub fn allowed(&self) -> usize {
        let charged = |entry: &&Entry| {
            entry.what == What::Charge && entry.tokens > 0 && entry.received.is_some()
        };
        self.buckets.iter().flat_map(|(_, entries)| entries).filter(charged).count()
    }
}

/// Whenever somebody was given permits, or told how many are left, they were no more than others did not surely
/// hold: had been told of before it asked, and had neither released nor had for as long as they last when
/// it was answered.
fn check_permits(key: Key, ttl: Duration, entries: &[Entry]) -> Result<(), String> {
    let asks = entries.iter().filter(|entry| matches!(entry.what, What::Charge | What::Left));
    let charges = || entries.iter().filter(|entry| entry.what == What::Charge);
    for asked in asks.filter(|entry| entry.tokens > 0) {
        let Some(answered) = asked.received else { continue };
        let surely_held = |other: &&Entry| {
            other.received.is_some_and(|received| received <= asked.sent)
                && other.released.is_none_or(|released| released > answered)
                && other.sent + ttl > answered
        };
        let held: i128 = charges().filter(surely_held).map(|other| other.tokens).sum();
        if held + asked.tokens > key.policy.burst() {
            return Err(format!("held twice: {held} of {key} were held before {asked:?}"));
        }
    }
    Ok(())
}
