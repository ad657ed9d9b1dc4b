//! Requests of several descriptors: what counts alone, what together, and what is charged then.

use super::{Files, Proxy, Told, back, flagged, hits, limited, peek, rl, rule};

const ALL_OR_NOTHING: &str = "domains: {rl: {charge: all_or_nothing}}";

fn files() -> Files {
    let rules = [
        rule("user", 10, "minute"),
        rule("path", 3, "minute"),
        flagged("seen", 2, "minute", "shadow_mode: true"),
        flagged("one", 2, "minute", "quota_mode: true"),
        flagged("two", 2, "minute", "quota_mode: true"),
        "{key: free, rate_limit: {unlimited: true}}".to_owned(),
    ];
    Files::of(&[("rl.yaml", &rl(&rules))])
}

#[tokio::test]
async fn a_denied_request_is_charged_for_all_that_it_meets() {
    let server = files().serve().await;
    let mut proxy = Proxy::of(&server).await;
    let request = || [hits("user", "a", 2), hits("path", "b", 4)];
    assert_eq!(proxy.ask(request()).await, (true, vec![Told::Ok(8), Told::Over(0)]));
    assert_eq!(proxy.ask(request()).await, (true, vec![Told::Ok(6), Told::Over(0)]));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn all_or_nothing_charges_a_denied_request_for_nothing() {
    let server = files().serve_with(ALL_OR_NOTHING, "").await;
    let mut proxy = Proxy::of(&server).await;
    let request = |of_path| [hits("user", "a", 2), hits("path", "b", of_path), hits("no", "c", 1)];
    let free = Told::Free;
    assert_eq!(proxy.ask(request(4)).await, (true, vec![Told::Ok(10), Told::Over(0), free]));
    assert_eq!(proxy.ask(request(3)).await, (false, vec![Told::Ok(8), Told::Ok(0), free]));
    assert_eq!(proxy.ask(request(1)).await, (true, vec![Told::Ok(8), Told::Over(0), free]));
    assert_eq!(proxy.hit("user", "a").await, Told::Ok(7));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn all_or_nothing_charges_the_same_descriptor_twice_or_not_at_all() {
    let server = files().serve_with(ALL_OR_NOTHING, "").await;
    let mut proxy = Proxy::of(&server).await;
    let twice = |one, other| [hits("user", "a", one), hits("user", "a", other)];
    assert_eq!(proxy.ask(twice(6, 5)).await, (true, vec![Told::Ok(10), Told::Over(0)]));
    assert_eq!(proxy.ask(twice(6, 4)).await, (false, vec![Told::Ok(4), Told::Ok(0)]));
    // What comes back first makes room for what follows.
    let request = [back("user", "a", 3), hits("user", "a", 3)];
    assert_eq!(proxy.ask(request).await, (false, vec![Told::Ok(3), Told::Ok(0)]));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_only_watches_denies_nothing_and_is_charged_with_the_others() {
    let server = files().serve_with(ALL_OR_NOTHING, "").await;
    let mut proxy = Proxy::of(&server).await;
    let request = |of_user| [hits("user", "a", of_user), hits("seen", "b", 1)];
    assert_eq!(proxy.ask(request(11)).await, (true, vec![Told::Over(0), Told::Ok(2)]));
    assert_eq!(proxy.ask(request(1)).await, (false, vec![Told::Ok(9), Told::Ok(1)]));
    assert_eq!(proxy.ask(request(1)).await, (false, vec![Told::Ok(8), Told::Ok(0)]));
    assert_eq!(proxy.ask(request(1)).await, (false, vec![Told::Ok(7), Told::Ok(0)]));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_only_watches_takes_back_what_comes_back() {
    let server = files().serve().await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(hits("seen", "a", 2)).await, Told::Ok(0));
    assert_eq!(proxy.one(back("seen", "a", 1)).await, Told::Ok(1));
    assert_eq!(proxy.one(hits("seen", "a", 3)).await, Told::Ok(0), "over, and it only watches");
    assert_eq!(proxy.one(back("seen", "a", 4)).await, Told::Ok(2));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn quotas_deny_only_together() {
    for settings in ["", ALL_OR_NOTHING] {
        let server = files().serve_with(settings, "").await;
        let mut proxy = Proxy::of(&server).await;
        let both = || [hits("one", "a", 2), hits("two", "b", 1)];
        let ask = [both(), both(), both()];
        let [one, two, three] = ask;
        assert_eq!(proxy.ask(one).await, (false, vec![Told::Ok(0), Told::Ok(1)]));
        assert_eq!(proxy.ask(two).await, (false, vec![Told::Over(0), Told::Ok(0)]));
        assert_eq!(proxy.ask(three).await, (true, vec![Told::Over(0); 2]));
        // One that binds alone still does, and nothing of all of them is left to charge.
        let with_path = [hits("one", "c", 1), hits("two", "c", 1), hits("path", "c", 4)];
        let left = if settings.is_empty() { 1 } else { 2 };
        let told = vec![Told::Ok(left), Told::Ok(left), Told::Over(0)];
        assert_eq!(proxy.ask(with_path).await, (true, told));
        server.stop().await.unwrap();
    }
}

#[tokio::test]
async fn with_quotas_everywhere_what_nothing_limits_lets_all_through() {
    let server = files().serve_with("quota_mode: true", "").await;
    let mut proxy = Proxy::of(&server).await;
    let request = || [hits("path", "a", 4), hits("no", "b", 1)];
    assert_eq!(proxy.ask(request()).await, (false, vec![Told::Over(0), Told::Free]));
    let both = [hits("path", "a", 4), hits("user", "b", 11)];
    assert_eq!(proxy.ask(both).await, (true, vec![Told::Over(0); 2]));
    let one = [hits("path", "a", 4), hits("user", "c", 10)];
    assert_eq!(proxy.ask(one).await, (false, vec![Told::Over(0), Told::Ok(0)]));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn in_shadow_all_passes_and_each_descriptor_is_told_what_it_is() {
    let server = files().serve_with("shadow_mode: true", "").await;
    let mut proxy = Proxy::of(&server).await;
    let request = || [hits("path", "a", 4), hits("user", "b", 1)];
    assert_eq!(proxy.ask(request()).await, (false, vec![Told::Over(0), Told::Ok(9)]));
    let series = "fusebox_ratelimit_passed_in_shadow_total";
    assert_eq!(super::metric(&server, series).await, Some(1));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_request_that_passes_is_charged_also_where_it_looks_at_what_it_takes() {
    for algorithm in ["fixed_window", "token_bucket", "sliding_window"] {
        let own = format!("domains: {{rl: {{charge: all_or_nothing, algorithm: {algorithm}}}}}");
        let server = files().serve_with(&own, "").await;
        let mut proxy = Proxy::of(&server).await;
        let request = || [hits("path", "a", 3), peek("path", "a")];
        let first = proxy.ask(request()).await;
        let left = proxy.one(peek("path", "a")).await;
        let charged = matches!(left, Told::Ok(0) | Told::Over(0));
        assert_eq!(charged, !first.0, "{algorithm}: {first:?}, then {left:?}");
        // The same of limits that the request carries, which are always windows.
        let minute = super::RateLimitUnit::Minute;
        let request =
            [limited(hits("user", "a", 5), 100, minute), limited(peek("user", "a"), 3, minute)];
        let carried = proxy.ask(request).await;
        let left = proxy.one(limited(peek("user", "a"), 100, minute)).await;
        assert_eq!(left == Told::Ok(95), !carried.0, "{algorithm}: {carried:?}, then {left:?}");
        server.stop().await.unwrap();
    }
}
