//! This process's share of a limit, while the server cannot be reached.

use std::{num::NonZeroU32, time::Duration};

use fusebox_core::{
    Admission, Ask, Cell, Charging, Kind as _, Limit, Moment, Policy, Rule, SlidingWindow,
    TokenBucket, WindowLimit, apply, token_bucket, window::Period,
};

/// A share of some limits, and what was spent of it.
///
/// It is kept from one outage to the next, so that a link that flaps refills nothing but what time does.
#[derive(Debug, Default)]
pub(super) struct Share {
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    policy: Policy,
    cell: Option<Cell>,
}

impl Share {
    /// Whether `cost` can be had of one of so many shares of `limits`; if not, after which wait, as far as it is
    /// known.
    pub(super) fn spend(
        &mut self,
        cost: u64,
        limits: &[Limit],
        clients: u32,
        now: Moment,
    ) -> Result<(), Option<Duration>> {
        let clients = NonZeroU32::new(clients).unwrap_or(NonZeroU32::MIN);
        self.adopt(limits, clients, now);
        let rules: Vec<_> =
            self.parts.iter().enumerate().map(|(cell, part)| part.rule(cell, cost)).collect();
        let mut cells: Vec<_> = self.parts.iter().map(|part| part.cell).collect();
        let decision = apply(&rules, Charging::AllOrNothing, &mut cells, now);
        for (part, cell) in self.parts.iter_mut().zip(cells) {
            part.cell = cell;
        }
        if decision.allowed {
            return Ok(());
        }
        let waits = decision.verdicts.iter().filter_map(|verdict| match verdict.admission {
            Admission::Allow => None,
            Admission::Deny { retry_after, .. } => Some(retry_after),
        });
        // Of several the longest, and one that nobody knows is longer than any.
        Err(waits.reduce(|one, other| one.zip(other).map(|(one, other)| one.max(other))).flatten())
    }

    /// Whether nothing of it is spent any more, so that it need not be remembered.
    pub(super) fn is_full(&self, now: Moment) -> bool {
        self.parts.iter().all(|part| {
            part.cell.is_none_or(|cell| {
                part.policy.leaves_at(cell, now).is_some_and(|full| full <= now.time)
            })
        })
    }

    /// Takes over settings and a number of clients that may be others than before; what was spent stays spent.
    fn adopt(&mut self, limits: &[Limit], clients: NonZeroU32, now: Moment) {
        self.parts.truncate(limits.len());
        for (index, limit) in limits.iter().enumerate() {
            let limit = share_of(*limit, clients);
            match self.parts.get_mut(index) {
                None => self.parts.push(Part { policy: Policy::new(limit, 0), cell: None }),
                Some(part) if part.policy.limit != limit => {
                    part.policy = part.policy.changed(limit, now);
                }
                Some(_) => {}
            }
        }
    }
}

impl Part {
    fn rule(&self, cell: usize, cost: u64) -> Rule<'_> {
        Rule {
            cell,
            policy: &self.policy,
            ask: Ask::spend(cost),
            shadow: false,
            quota: false,
            overflow: false,
            held: false,
        }
    }
}

/// One of so many shares of a limit. The rate of a bucket is shared exactly: as many tokens in more time.
fn share_of(limit: Limit, clients: NonZeroU32) -> Limit {
    let of = |tokens: u64| (tokens / u64::from(clients.get())).max(1);
    if limit.capacity() == 0 {
        return limit;
    }
    let shared = match &limit {
        Limit::TokenBucket(bucket) => {
            let per = bucket.per().saturating_mul(clients.get());
            let shared = if per <= token_bucket::MAX_PER {
                TokenBucket::new(bucket.limit(), per, of(bucket.burst()))
            } else {
                // Too long a period to be told: years for one bucket, so whole tokens are fine enough.
                TokenBucket::new(of(bucket.limit()), bucket.per(), of(bucket.burst()))
            };
            shared.ok().map(Limit::TokenBucket)
        }
        Limit::SlidingWindow(window) => {
            SlidingWindow::new(of(window.limit()), window.per()).ok().map(Limit::SlidingWindow)
        }
        Limit::Window(window) => match window.period() {
            Period::Fixed(_) => {
                WindowLimit::fixed(of(window.limit()), window.longest()).ok().map(Limit::Window)
            }
            Period::Calendar { .. } => None,
        },
        Limit::Concurrency(_) | Limit::RetryBudget(_) => None,
    };
    shared.unwrap_or(limit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::bucket;

    fn at(millis: u64) -> Moment {
        Moment::from_nanos(millis * 1_000_000)
    }

    fn had(share: &mut Share, limit: Limit, clients: u32, millis: u64) -> usize {
        let spend = |_: &i32| share.spend(1, &[limit], clients, at(millis)).is_ok();
        (0..1_000).filter(spend).count()
    }

    #[test]
    fn a_share_of_a_bucket_has_its_part_of_the_burst_and_exactly_of_the_rate() {
        let mut share = Share::default();
        assert_eq!(had(&mut share, bucket(10), 3, 0), 3);
        let wait = share.spend(1, &[bucket(10)], 3, at(0)).unwrap_err();
        assert_eq!(wait, Some(Duration::from_millis(300)));
        let trickle: usize =
            (1..=60).map(|second| had(&mut share, bucket(10), 3, second * 500)).sum();
        assert_eq!(trickle, 100, "in thirty seconds a third of 300");
    }

    #[test]
    fn a_share_is_at_least_one_token_and_nothing_of_nothing() {
        let mut share = Share::default();
        assert_eq!(had(&mut share, bucket(2), 100, 0), 1);
        let nothing = TokenBucket::new(0, Duration::from_secs(1), 0).unwrap();
        assert_eq!(had(&mut Share::default(), Limit::TokenBucket(nothing), 1, 0), 0);
    }

    #[test]
    fn a_share_of_a_window_is_its_part_in_each_and_of_several_limits_the_tightest() {
        let hour = Duration::from_secs(3_600);
        let fixed = Limit::Window(WindowLimit::fixed(30, hour).unwrap());
        let sliding = Limit::SlidingWindow(SlidingWindow::new(20, hour).unwrap());
        assert_eq!(had(&mut Share::default(), fixed, 3, 0), 10);
        let mut share = Share::default();
        let spend = |share: &mut Share| share.spend(1, &[fixed, sliding], 2, at(0)).is_ok();
        assert_eq!((0..100).filter(|_| spend(&mut share)).count(), 10);
    }

    #[test]
    fn what_was_spent_stays_so_when_the_clients_become_fewer() {
        let mut share = Share::default();
        assert_eq!(had(&mut share, bucket(100), 10, 0), 10);
        assert_eq!(had(&mut share, bucket(100), 5, 0), 10, "20, of which 10 were spent");
        assert!(!share.is_full(at(0)) && share.is_full(at(1_000)));
    }
}
