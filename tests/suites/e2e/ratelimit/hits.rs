//! How many hits a request counts, gives back or only looks at, and by which limit.

use fusebox_proto::envoy::{
    service::ratelimit::v3::{
        RateLimitRequest,
        rate_limit_response::{RateLimit, rate_limit::Unit},
    },
    r#type::v3::RateLimitUnit,
};

use super::{
    Files, Machine, Proxy, Told, back, descriptor, hits, limited, peek, request, rl, rule,
};
use crate::caller::seconds;

fn files() -> Files {
    let rules = [
        rule("user", 10, "minute"),
        rule("none", 0, "minute"),
        rule("most", u32::MAX, "year"),
        rule("path", 5, "hour"),
    ];
    Files::of(&[("rl.yaml", &rl(&rules))])
}

#[tokio::test]
async fn a_descriptor_counts_its_own_hits_or_those_of_the_request_or_one() {
    let server = files().serve().await;
    let mut proxy = Proxy::of(&server).await;
    let plain = || descriptor([("user", "a")]);
    for (of_request, of_descriptor, left) in [
        (0, None, 9),
        (3, None, 6),
        (3, Some(1), 5),
        (3, Some(0), 5),
        (0, Some(2), 3),
        (1, None, 2),
    ] {
        let one = super::RateLimitDescriptor { hits_addend: of_descriptor, ..plain() };
        let request = RateLimitRequest { hits_addend: of_request, ..request([one]) };
        let answer = proxy.send(request).await;
        assert_eq!(super::told(&answer.statuses[0]), Told::Ok(left));
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_is_over_the_limit_counts_until_the_window_ends() {
    let server = files().serve().await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(hits("user", "a", 7)).await, Told::Ok(3));
    assert_eq!(proxy.one(hits("user", "a", 4)).await, Told::Over(0));
    assert_eq!(proxy.hit("user", "a").await, Told::Over(0));
    assert_eq!(proxy.one(peek("user", "a")).await, Told::Over(0), "12 of 10");
    server.advance(seconds(39));
    assert_eq!(proxy.one(peek("user", "a")).await, Told::Over(0));
    server.advance(seconds(1));
    assert_eq!(proxy.one(peek("user", "a")).await, Told::Ok(10));
    assert_eq!(proxy.hit("user", "a").await, Told::Ok(9));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn no_number_of_hits_is_too_large() {
    let server = files().serve().await;
    let mut proxy = Proxy::of(&server).await;
    for _ in 0..3 {
        assert_eq!(proxy.one(hits("user", "a", u64::MAX)).await, Told::Over(0));
        assert_eq!(proxy.one(hits("most", "a", u64::MAX)).await, Told::Over(0));
        let both = [hits("user", "b", u64::MAX), hits("user", "b", u64::MAX)];
        assert_eq!(proxy.ask(both).await, (true, vec![Told::Over(0); 2]));
    }
    assert_eq!(proxy.one(back("user", "a", u64::MAX)).await, Told::Ok(10));
    assert_eq!(proxy.one(hits("user", "a", 10)).await, Told::Ok(0));
    assert_eq!(proxy.one(hits("most", "b", u64::from(u32::MAX))).await, Told::Ok(0));
    assert_eq!(proxy.hit("most", "b").await, Told::Over(0));
    let (status, _) = server.http("/metrics").await;
    assert_eq!(status, 200);
    server.advance(seconds(40));
    assert_eq!(proxy.hit("user", "a").await, Told::Ok(9));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_comes_back_makes_no_more_than_there_is() {
    let server = files().serve().await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(back("user", "a", 5)).await, Told::Ok(10), "nothing was spent");
    assert_eq!(proxy.one(hits("user", "a", 4)).await, Told::Ok(6));
    assert_eq!(proxy.one(back("user", "a", 1)).await, Told::Ok(7));
    assert_eq!(proxy.one(back("user", "a", 100)).await, Told::Ok(10));
    assert_eq!(proxy.one(hits("user", "a", 10)).await, Told::Ok(0));
    // Of what was counted over the limit, too.
    assert_eq!(proxy.one(hits("user", "a", 5)).await, Told::Over(0));
    assert_eq!(proxy.one(back("user", "a", 4)).await, Told::Over(0), "11 of 10");
    assert_eq!(proxy.one(back("user", "a", 1)).await, Told::Ok(0));
    assert_eq!(proxy.one(back("user", "a", 1)).await, Told::Ok(1));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_rule_of_nothing_denies_all_but_what_asks_for_nothing() {
    let server = files().serve().await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(peek("none", "a")).await, Told::Ok(0));
    assert_eq!(proxy.hit("none", "a").await, Told::Over(0));
    assert_eq!(proxy.one(back("none", "a", 1)).await, Told::Ok(0));
    server.advance(seconds(40));
    assert_eq!(proxy.hit("none", "a").await, Told::Over(0));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn the_same_descriptor_twice_counts_twice() {
    let server = files().serve().await;
    let mut proxy = Proxy::of(&server).await;
    let twice = || [hits("user", "a", 4), hits("user", "a", 4)];
    assert_eq!(proxy.ask(twice()).await, (false, vec![Told::Ok(6), Told::Ok(2)]));
    assert_eq!(proxy.ask(twice()).await, (true, vec![Told::Over(0); 2]));
    assert_eq!(proxy.one(back("user", "a", 6)).await, Told::Ok(0), "all 16 were counted");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_limit_that_a_request_carries_counts_by_unit_apart_from_rules() {
    let server = files().serve().await;
    let mut proxy = Proxy::of(&server).await;
    let asked = |requests, unit| limited(hits("user", "a", 1), requests, unit);
    let (minute, hour) = (RateLimitUnit::Minute, RateLimitUnit::Hour);
    assert_eq!(proxy.hit("user", "a").await, Told::Ok(9));
    assert_eq!(proxy.one(asked(3, minute)).await, Told::Ok(2));
    assert_eq!(proxy.one(asked(3, hour)).await, Told::Ok(2));
    // One count for whatever limit it is asked by.
    assert_eq!(proxy.one(asked(5, minute)).await, Told::Ok(3));
    assert_eq!(proxy.one(asked(2, minute)).await, Told::Over(0));
    assert_eq!(proxy.one(asked(4, minute)).await, Told::Ok(0));
    assert_eq!(proxy.one(asked(0, minute)).await, Told::Over(0));
    assert_eq!(proxy.one(asked(u32::MAX, minute)).await, Told::Ok(u32::MAX - 6));
    assert_eq!(proxy.hit("user", "a").await, Told::Ok(8), "the rule's own is apart");
    // Keys that no rule has count as well, and values that are none of each other.
    let other = |key, value| limited(descriptor([(key, value)]), 1, minute);
    assert_eq!(proxy.one(other("a_b", "c")).await, Told::Ok(0));
    assert_eq!(proxy.one(other("a", "b_c")).await, Told::Ok(0));
    assert_eq!(proxy.one(limited(descriptor([]), 1, minute)).await, Told::Ok(0));
    // But not in a domain that no file has.
    let elsewhere = RateLimitRequest { domain: "no".into(), ..request([asked(0, minute)]) };
    let answer = proxy.send(elsewhere).await;
    assert_eq!(super::told(&answer.statuses[0]), Told::Free);

    let answer = proxy.send(request([asked(9, RateLimitUnit::Day)])).await;
    let limit = RateLimit { requests_per_unit: 9, unit: Unit::Day.into(), name: String::new() };
    assert_eq!(answer.statuses[0].current_limit, Some(limit));
    assert_eq!(answer.statuses[0].duration_until_reset.unwrap().seconds, 35_200);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn any_number_of_limits_that_a_request_carries_is_counted() {
    let server = files().serve().await;
    let mut proxy = Proxy::of(&server).await;
    let units = [
        RateLimitUnit::Second,
        RateLimitUnit::Minute,
        RateLimitUnit::Hour,
        RateLimitUnit::Day,
        RateLimitUnit::Month,
        RateLimitUnit::Year,
    ];
    let all = || (0..60).map(|one| limited(hits("user", "a", 1), 10, units[one % units.len()]));
    let (over, told) = proxy.ask(all()).await;
    // Ten of each unit.
    assert!(!over && told[54..].iter().all(|told| *told == Told::Ok(0)), "{told:?}");
    assert_eq!(proxy.ask(all()).await, (true, vec![Told::Over(0); 60]));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_limit_that_a_request_carries_is_still_counted_after_a_crash() {
    let (files, machine) = (files(), Machine::default());
    let config = files.config("", "");
    let asked = |count| limited(hits("user", "a", count), 10, RateLimitUnit::Day);
    let server = machine.start(&config).await;
    assert_eq!(Proxy::of(&server).await.one(asked(7)).await, Told::Ok(3));
    machine.crash(server).await;
    let server = machine.start(&config).await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(asked(0)).await, Told::Ok(3));
    assert_eq!(proxy.one(asked(4)).await, Told::Over(0));
    server.stop().await.unwrap();
}
