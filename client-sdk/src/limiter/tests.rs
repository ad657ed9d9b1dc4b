//! One client on a bucket of the core's, under virtual time.

use fusebox_core::{Limit, SlidingWindow};

use super::*;
use crate::{
    fake::{Events, Lane, Server, bucket, pass},
    settings::OnUnreachable,
};

struct Fixture {
    server: Arc<Server>,
    lane: Arc<Lane>,
    part: Arc<Limiters>,
    limiter: Limiter,
    events: Events,
}

fn fixture(limit: Limit, on_unreachable: OnUnreachable) -> Fixture {
    let server = Server::of(limit, on_unreachable);
    let (lane, events) = (Lane::to(&server, 0, (1, 1)), Events::default());
    lane.clients.store(2, Ordering::Relaxed);
    let part = Arc::new(Limiters::new(lane.context(&events)));
    lane.carry(&part);
    let limiter = part.of("api");
    Fixture { server, lane, part, limiter, events }
}

impl Fixture {
    fn asked(&self) -> usize {
        self.lane.asked.load(Ordering::Relaxed)
    }

    fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        self.part.count(&mut counts);
        counts
    }

    async fn spend(&self, calls: u64) -> u64 {
        let mut spent = 0;
        for _ in 0..calls {
            spent += u64::from(self.limiter.acquire(1).await.is_ok());
        }
        spent
    }
}

#[tokio::test(start_paused = true)]
async fn a_steady_demand_is_served_from_memory() {
    let fixture = fixture(bucket(10_000), OnUnreachable::Deny);
    for _ in 0..2_000 {
        assert_eq!(fixture.spend(5).await, 5);
        pass(1).await;
    }
    let messages = fixture.asked() + fixture.lane.reports.load(Ordering::Relaxed);
    assert!(messages < 100, "{messages} messages for 10,000 decisions");
    assert!(fixture.counts().memory > 9_900);
}

#[tokio::test(start_paused = true)]
async fn a_thousand_callers_at_once_cost_one_message_at_a_time() {
    let fixture = fixture(bucket(10_000), OnUnreachable::Deny);
    let call = |_| {
        let limiter = fixture.limiter.clone();
        tokio::spawn(async move { limiter.acquire(1).await })
    };
    let calls: Vec<_> = (0..1_000).map(call).collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!(fixture.lane.under_way_most.load(Ordering::Relaxed), 1);
    assert!(fixture.asked() <= 6, "{} messages", fixture.asked());
}

#[tokio::test(start_paused = true)]
async fn a_denial_is_remembered_for_its_cost_and_above_and_asked_again_when_its_time_is_over() {
    let fixture = fixture(bucket(10), OnUnreachable::Deny);
    fixture.limiter.acquire(10).await.unwrap();
    let denied = fixture.limiter.acquire(5).await.unwrap_err();
    assert_eq!((denied.reason, denied.decider), (Reason::RateLimited, Decider::Server));
    let asked = fixture.asked();
    let denied = fixture.limiter.acquire(6).await.unwrap_err();
    assert_eq!((denied.decider, fixture.asked()), (Decider::Memory, asked));
    assert_eq!(fixture.limiter.try_acquire(5).unwrap_err().decider, Decider::Memory);
    assert_eq!(fixture.counts().rejected, 2);
    pass(denied.retry_after.unwrap().as_millis().try_into().unwrap()).await;
    pass(100).await;
    fixture.limiter.acquire(5).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_served_when_tokens_come_and_told_when_they_do_not() {
    let fixture = fixture(bucket(10), OnUnreachable::Allow);
    fixture.limiter.acquire(10).await.unwrap();
    let asked = fixture.lane.now();
    fixture.limiter.clone().max_wait(Duration::from_secs(1)).acquire(5).await.unwrap();
    let waited = crate::fake::millis_since(asked, fixture.lane.now());
    assert!((495..700).contains(&waited), "{waited}");
    let waits = fixture.limiter.clone().max_wait(Duration::from_millis(300));
    let denied = waits.acquire(10).await.unwrap_err();
    assert_eq!(denied.reason, Reason::RateLimited);
    assert!(fixture.server.charged() <= 15);
}

#[tokio::test(start_paused = true)]
async fn what_is_not_leased_works_by_asking() {
    let window = SlidingWindow::new(20, Duration::from_secs(1)).unwrap();
    let fixture = fixture(Limit::SlidingWindow(window), OnUnreachable::Deny);
    assert_eq!(fixture.spend(30).await, 20);
    assert_eq!(fixture.server.charged(), 20);
    pass(2_000).await;
    assert_eq!(fixture.limiter.try_acquire(1).unwrap_err().reason, Reason::Undecided);
}

#[tokio::test(start_paused = true)]
async fn a_try_that_memory_cannot_answer_has_a_lease_asked_for() {
    let fixture = fixture(bucket(1_000), OnUnreachable::Deny);
    assert_eq!(fixture.limiter.try_acquire(1).unwrap_err().reason, Reason::Undecided);
    pass(5).await;
    fixture.limiter.try_acquire(1).unwrap();
    fixture.limiter.try_acquire_for("other", 1).unwrap_err();
    pass(5).await;
    fixture.limiter.key("other").try_acquire(1).unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_idle_key_gives_back_what_it_leased_and_leaves_memory() {
    let fixture = fixture(bucket(1_000), OnUnreachable::Deny);
    for _ in 0..20 {
        let _ = fixture.limiter.acquire_for("tenant", 1).await;
        pass(5).await;
    }
    assert!(fixture.server.charged() > 20, "more is leased than spent");
    pass(2_500).await;
    assert_eq!((fixture.server.charged(), fixture.server.grants()), (20, 0));
    assert!(fixture.counts().memory == 0, "its counts went with it to the client's");
    let mut left = 0;
    fixture.part.keys.for_each(|_| left += 1);
    assert_eq!(left, 1, "only the key of the handle is there");
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_nobody_uses_leaves_memory() {
    let fixture = fixture(bucket(1_000), OnUnreachable::Deny);
    for name in 0..10 {
        fixture.part.of(&format!("policy{name}")).acquire(1).await.unwrap();
    }
    assert_eq!(fixture.part.keys.policies(), 11);
    pass(2_500).await;
    assert_eq!(fixture.part.keys.policies(), 1);
}

#[tokio::test(start_paused = true)]
async fn leases_serve_without_a_server_until_they_expire_and_then_the_policy_decides() {
    for (on_unreachable, had) in
        [(OnUnreachable::Allow, 1_000), (OnUnreachable::Deny, 0), (OnUnreachable::Local, 50)]
    {
        let fixture = fixture(bucket(100), on_unreachable);
        fixture.spend(5).await;
        pass(100).await;
        fixture.lane.set_up(&*fixture.part, false);
        assert_eq!(fixture.limiter.try_acquire(1).map_err(|denied| denied.reason), Ok(()));
        pass(1_000).await;
        assert_eq!(fixture.spend(1_000).await, had, "{on_unreachable:?}");
        let heard = || fixture.events.lock().iter().filter(|e| e.contains("Degraded")).count();
        assert_eq!(heard(), 1);
        fixture.lane.set_up(&*fixture.part, true);
        assert_eq!(heard(), 2);
        fixture.lane.set_up(&*fixture.part, false);
        let had = if had == 50 { 0 } else { had };
        assert_eq!(fixture.spend(1_000).await, had, "a flap refills nothing");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_hangs_costs_one_wait_and_no_more() {
    let fixture = fixture(bucket(100), OnUnreachable::Allow);
    fixture.lane.hangs.store(true, Ordering::Relaxed);
    let asked = fixture.lane.now();
    assert_eq!(fixture.spend(100).await, 100);
    assert!(crate::fake::millis_since(asked, fixture.lane.now()) <= 52);
    fixture.lane.hangs.store(false, Ordering::Relaxed);
    pass(10).await;
    fixture.limiter.acquire(1).await.unwrap();
    assert!(fixture.counts().memory > 0, "leases serve again");
}

#[tokio::test(start_paused = true)]
async fn what_is_told_to_a_process_that_was_stopped_meanwhile_is_not_spent() {
    let fixture = fixture(bucket(100), OnUnreachable::Deny);
    for estimated in [false, true] {
        let limiter = fixture.limiter.clone();
        let asked = tokio::spawn(async move {
            if estimated { limiter.estimate(10).await.map(drop) } else { limiter.acquire(10).await }
        });
        // The answer is on its way, and the process is stopped for longer than what it tells is worth something.
        tokio::time::sleep(Duration::from_micros(1_500)).await;
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(asked.await.unwrap().unwrap_err().reason, Reason::Unreachable);
    }
    pass(1_200).await;
    assert_eq!(fixture.server.grants(), 0, "the estimate is given back");
    assert_eq!(fixture.limiter.acquire(1).await.map_err(|denied| denied.reason), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn an_estimate_is_settled_once_and_one_that_nobody_gets_is_given_back() {
    let fixture = fixture(bucket(1_000), OnUnreachable::Deny);
    let estimate = fixture.limiter.estimate(100).await.unwrap();
    estimate.settle(40);
    drop(fixture.limiter.estimate(10).await.unwrap());
    let gone = tokio::time::timeout(Duration::from_millis(1), fixture.limiter.estimate(500)).await;
    assert!(gone.is_err());
    pass(2_500).await;
    assert_eq!((fixture.server.charged(), fixture.server.grants()), (50, 0));
}

#[tokio::test(start_paused = true)]
async fn one_cost_that_is_never_possible_is_refused_and_takes_nobody_along() {
    let fixture = fixture(bucket(1_000), OnUnreachable::Deny);
    fixture.lane.most.store(1_000, Ordering::Relaxed);
    let call = |number: u64| {
        let limiter = fixture.limiter.clone();
        let cost = if number == 5 { 2_000 } else { 1 };
        tokio::spawn(async move { limiter.acquire(cost).await })
    };
    let calls: Vec<_> = (0..20).map(call).collect();
    for (number, call) in calls.into_iter().enumerate() {
        let refused = call.await.unwrap().err().map(|rejected| rejected.reason);
        assert_eq!(refused, (number == 5).then_some(Reason::Refused), "{number}");
    }
    assert_eq!(fixture.events.lock().iter().filter(|e| e.contains("Refused")).count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_is_not_there_is_refused_at_once_and_said_once() {
    let fixture = fixture(bucket(1_000), OnUnreachable::Deny);
    fixture.lane.is_unknown.store(true, Ordering::Relaxed);
    for _ in 0..5 {
        let asked = fixture.lane.now();
        assert_eq!(fixture.limiter.acquire(1).await.unwrap_err().reason, Reason::Refused);
        assert!(crate::fake::millis_since(asked, fixture.lane.now()) <= 5);
        pass(1_100).await;
    }
    assert_eq!(fixture.events.lock().iter().filter(|e| e.contains("Refused")).count(), 1);
}

#[tokio::test(start_paused = true)]
async fn leases_of_another_truth_are_worth_nothing_and_those_of_a_restart_last() {
    let fixture = fixture(bucket(1_000), OnUnreachable::Deny);
    fixture.spend(1).await;
    pass(5).await;
    fixture.part.linked(Link::Restarted, fixture.lane.now());
    fixture.lane.up.store(false, Ordering::Relaxed);
    fixture.limiter.try_acquire(1).unwrap();
    fixture.part.linked(Link::Replaced, fixture.lane.now());
    assert!(fixture.limiter.try_acquire(1).is_err());
    let mut draft = Draft::default();
    fixture.part.report(&mut draft, fixture.lane.now());
    assert!(draft.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_closes_gives_back_what_it_did_not_spend() {
    let fixture = fixture(bucket(1_000), OnUnreachable::Allow);
    fixture.spend(1).await;
    pass(5).await;
    let mut draft = Draft::default();
    fixture.part.close(&mut draft, fixture.lane.now());
    assert!(draft.outcomes.iter().any(|outcome| outcome.lease_returned > 0));
    assert_eq!(fixture.limiter.acquire(1).await.unwrap_err().reason, Reason::Closed);
    assert_eq!(fixture.limiter.try_acquire(1).unwrap_err().reason, Reason::Closed);
    fixture.limiter.acquire(0).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn who_comes_while_it_is_denied_and_waits_in_vain_is_denied_and_not_decided_alone() {
    let fixture = fixture(bucket(10), OnUnreachable::Allow);
    fixture.limiter.acquire(10).await.unwrap();
    assert_eq!(fixture.limiter.acquire(10).await.unwrap_err().reason, Reason::RateLimited);
    for wait in [1, 60, 120] {
        let waits = fixture.limiter.clone().max_wait(Duration::from_millis(wait));
        let decided = waits.acquire(10).await.map_err(|denied| denied.reason);
        assert_eq!(decided, Err(Reason::RateLimited), "waited {wait} ms");
    }
    assert_eq!(fixture.server.charged(), 10);
}

#[tokio::test(start_paused = true)]
async fn an_estimate_that_arrives_as_its_caller_leaves_is_given_back() {
    let fixture = fixture(bucket(1_000), OnUnreachable::Deny);
    let mut asking = Box::pin(fixture.limiter.estimate(500));
    assert!(is_pending(&mut asking).await);
    // The answer is told, and nobody has looked at it.
    pass(3).await;
    assert!(fixture.server.charged() >= 500);
    drop(asking);
    pass(2_500).await;
    assert_eq!((fixture.server.charged(), fixture.server.grants()), (0, 0));
}

/// Looks once at what is waited for; whether it is still waited for.
async fn is_pending<F: Future + Unpin>(future: &mut F) -> bool {
    std::future::poll_fn(|cx| {
        std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(cx).is_pending())
    })
    .await
}
