//! Permits of one or two clients on a server of the core's, under virtual time.

use fusebox_core::{Concurrency, Limit};
use tokio::time::timeout;

use super::*;
use crate::{
    fake::{Events, Lane, Server, pass},
    settings::OnUnreachable,
};

struct Fixture {
    server: Arc<Server>,
    lane: Arc<Lane>,
    part: Arc<Bulkheads>,
    bulkhead: Bulkhead,
    events: Events,
}

const TTL: Duration = Duration::from_secs(3);

fn fixture(limit: u64, on_unreachable: OnUnreachable) -> Fixture {
    let limit = Limit::Concurrency(Concurrency::new(limit, TTL).unwrap());
    fixture_of(Server::of(limit, on_unreachable), 0)
}

fn fixture_of(server: Arc<Server>, client: usize) -> Fixture {
    let (lane, events) = (Lane::to(&server, client, (1, 1)), Events::default());
    let part = Arc::new(Bulkheads::new(lane.context(&events)));
    lane.carry(&part);
    let bulkhead = part.of("db");
    Fixture { server, lane, part, bulkhead, events }
}

impl Fixture {
    fn waiting(&self) -> Bulkhead {
        self.bulkhead.clone().max_wait(Duration::from_secs(1))
    }

    fn heard(&self, what: &str) -> usize {
        self.events.lock().iter().filter(|event| event.contains(what)).count()
    }
}

#[tokio::test(start_paused = true)]
async fn a_fleet_has_as_many_as_the_limit_and_one_that_is_dropped_is_free_at_once() {
    let one = fixture(2, OnUnreachable::Deny);
    let other = fixture_of(Arc::clone(&one.server), 1);
    let first = one.bulkhead.acquire().await.unwrap();
    let _second = other.bulkhead.acquire().await.unwrap();
    let denied = one.bulkhead.acquire().await.unwrap_err();
    assert_eq!((denied.reason, denied.decider), (Reason::ConcurrencyLimited, Decider::Server));
    drop(first);
    pass(5).await;
    let _third = other.bulkhead.acquire().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_permit_lives_for_as_long_as_it_is_renewed_and_expires_when_it_is_not() {
    let fixture = fixture(1, OnUnreachable::Deny);
    let permit = fixture.bulkhead.acquire().await.unwrap();
    pass(20_000).await;
    assert!(!permit.is_expired() && fixture.server.grants() == 1);
    fixture.lane.set_up(&*fixture.part, false);
    timeout(TTL, permit.expired()).await.unwrap();
    assert!(permit.is_expired());
    assert_eq!(fixture.heard("PermitExpired"), 1);
    pass(1_000).await;
    assert!(permit.is_expired());
    assert_eq!(fixture.heard("PermitExpired"), 1, "told once");
}

#[tokio::test(start_paused = true)]
async fn a_permit_that_the_server_knows_no_more_expires_with_the_next_renewal() {
    let fixture = fixture(1, OnUnreachable::Deny);
    let permit = fixture.bulkhead.acquire().await.unwrap();
    fixture.server.forget_grants();
    fixture.part.linked(Link::Restarted, fixture.lane.now());
    timeout(Duration::from_millis(60), permit.expired()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_permit_of_another_truth_has_expired_and_nobody_is_told_of_its_end() {
    let fixture = fixture(1, OnUnreachable::Deny);
    let permit = fixture.bulkhead.acquire().await.unwrap();
    fixture.part.linked(Link::Replaced, fixture.lane.now());
    assert!(permit.is_expired());
    drop(permit);
    let mut draft = Draft::default();
    fixture.part.report(&mut draft, fixture.lane.now());
    assert!(draft.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_call_is_cancelled_when_its_permit_expires_only_if_that_was_wanted() {
    let fixture = fixture(2, OnUnreachable::Deny);
    let cancels = fixture.bulkhead.clone().on_expiry(OnExpiry::Cancel);
    let (bulkhead, call) = (fixture.bulkhead.clone(), async || pass(10_000).await);
    let goes_on = tokio::spawn(async move { bulkhead.call(call()).await });
    let cancelled = tokio::spawn(async move { cancels.call(pass(10_000)).await });
    pass(10).await;
    fixture.lane.set_up(&*fixture.part, false);
    assert!(matches!(cancelled.await.unwrap(), Err(CallError::Expired)));
    goes_on.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn those_who_wait_are_served_in_their_order_with_one_message_at_a_time() {
    let fixture = fixture(1, OnUnreachable::Deny);
    let first = fixture.bulkhead.acquire().await.unwrap();
    let order = Arc::new(Mutex::new(Vec::new()));
    let waiting = (0..20).map(|number| {
        let (bulkhead, order) = (fixture.waiting(), Arc::clone(&order));
        tokio::spawn(async move {
            let _permit = bulkhead.acquire().await.unwrap();
            order.lock().push(number);
            pass(5).await;
        })
    });
    let waiting: Vec<_> = waiting.collect();
    pass(100).await;
    let denied = fixture.bulkhead.acquire().await.unwrap_err();
    assert_eq!(denied.decider, Decider::Memory, "who waits goes first");
    drop(first);
    for one in waiting {
        one.await.unwrap();
    }
    assert_eq!(*order.lock(), (0..20).collect::<Vec<_>>());
    assert_eq!(fixture.lane.under_way_most.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn who_waits_in_vain_is_denied_when_its_time_is_over() {
    let fixture = fixture(1, OnUnreachable::Allow);
    let _permit = fixture.bulkhead.acquire().await.unwrap();
    let asked = fixture.lane.now();
    let denied = fixture.waiting().acquire().await.unwrap_err();
    assert_eq!(denied.reason, Reason::ConcurrencyLimited);
    let waited = crate::fake::millis_since(asked, fixture.lane.now());
    assert!((1_000..=1_050).contains(&waited), "{waited}");
}

#[tokio::test(start_paused = true)]
async fn what_is_granted_to_who_left_is_the_next_ones_or_given_back() {
    let fixture = fixture(1, OnUnreachable::Deny);
    let mut leaves = Box::pin(fixture.bulkhead.acquire());
    assert!(timeout(Duration::from_millis(1), &mut leaves).await.is_err());
    let (waits, part) = (fixture.waiting(), Arc::clone(&fixture.part));
    drop(leaves);
    let permit = waits.acquire().await.unwrap();
    drop((permit, part));
    pass(10).await;
    assert_eq!(fixture.server.grants(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_was_lost_with_its_session_is_had_again_and_charged_once() {
    let fixture = fixture(2, OnUnreachable::Deny);
    fixture.lane.loses.store(1, Ordering::Relaxed);
    let _permit = fixture.bulkhead.acquire().await.unwrap();
    assert_eq!((fixture.server.grants(), fixture.lane.asked.load(Ordering::Relaxed)), (1, 2));
}

#[tokio::test(start_paused = true)]
async fn without_a_server_the_policy_decides() {
    for (on_unreachable, limit, had) in
        [(OnUnreachable::Allow, 4, 9), (OnUnreachable::Deny, 4, 0), (OnUnreachable::Local, 4, 2)]
    {
        let permits = Limit::Concurrency(Concurrency::new(limit, TTL).unwrap());
        let server = Server::of(permits, on_unreachable);
        let (lane, events) = (Lane::to(&server, 0, (1, 1)), Events::default());
        lane.clients.store(2, Ordering::Relaxed);
        let part = Arc::new(Bulkheads::new(lane.context(&events)));
        lane.carry(&part);
        let bulkhead = part.of("db");
        lane.set_up(&*part, false);
        let mut permits = Vec::new();
        for _ in 0..9 {
            permits.extend(bulkhead.acquire().await.ok());
        }
        assert_eq!(permits.len(), had, "{on_unreachable:?}");
        let degraded = || events.lock().iter().filter(|event| event.contains("Degraded")).count();
        assert_eq!(degraded(), 1);
        permits.clear();
        lane.set_up(&*part, true);
        assert_eq!(degraded(), 2);
        drop(bulkhead.acquire().await.unwrap());
    }
}

#[tokio::test(start_paused = true)]
async fn a_local_limit_holds_without_a_server_and_in_the_order_of_coming() {
    let fixture = fixture(100, OnUnreachable::Allow);
    fixture.lane.set_up(&*fixture.part, false);
    let bulkhead = fixture.bulkhead.clone().local_limit(1);
    let permit = bulkhead.acquire().await.unwrap();
    assert_eq!(bulkhead.acquire().await.unwrap_err().decider, Decider::Local);
    let _other_key = bulkhead.key("other").acquire().await.unwrap();
    let waits = bulkhead.clone().max_wait(Duration::from_secs(1));
    let waits = tokio::spawn(async move { waits.acquire().await.map(drop) });
    pass(10).await;
    drop(permit);
    waits.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_closed_client_gives_no_permits() {
    let fixture = fixture(1, OnUnreachable::Allow);
    let _permit = fixture.bulkhead.acquire().await.unwrap();
    let waits = fixture.waiting();
    let waits = tokio::spawn(async move { waits.acquire().await.map(drop) });
    pass(700).await;
    fixture.part.close(&mut Draft::default(), fixture.lane.now());
    assert_eq!(fixture.bulkhead.acquire().await.unwrap_err().reason, Reason::Closed);
    assert!(waits.await.unwrap().is_err());
}

#[tokio::test(start_paused = true)]
async fn what_was_granted_in_line_and_lost_with_its_session_is_had_again_and_charged_once() {
    let fixture = fixture(1, OnUnreachable::Deny);
    let permit = fixture.bulkhead.acquire().await.unwrap();
    let waits = fixture.waiting();
    let waits = tokio::spawn(async move { waits.acquire().await });
    pass(100).await;
    fixture.lane.loses.store(1, Ordering::Relaxed);
    drop(permit);
    let _permit = waits.await.unwrap().unwrap();
    assert_eq!(fixture.server.grants(), 1);
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_longer_than_a_permit_lives_stands_in_line_all_the_time() {
    let fixture = fixture(1, OnUnreachable::Deny);
    let permit = fixture.bulkhead.acquire().await.unwrap();
    let waits = fixture.bulkhead.clone().max_wait(TTL * 3);
    let waits = tokio::spawn(async move { waits.acquire().await });
    pass(7_500).await;
    assert_eq!(fixture.lane.asked.load(Ordering::Relaxed), 3, "it lost its place in line");
    drop(permit);
    let permit = waits.await.unwrap().unwrap();
    pass(1).await;
    assert!(!permit.is_expired());
    pass(20_000).await;
    assert!(!permit.is_expired() && fixture.server.grants() == 1);
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_is_not_there_is_refused_at_once_and_said_once() {
    let fixture = fixture(1, OnUnreachable::Deny);
    fixture.lane.is_unknown.store(true, Ordering::Relaxed);
    for _ in 0..5 {
        assert_eq!(fixture.waiting().acquire().await.unwrap_err().reason, Reason::Refused);
    }
    assert_eq!(fixture.heard("Refused"), 1);
}
