//! What a restart keeps of what proxies were counted, and what it must not.

use fusebox_proto::v1::{AcquireRequest, ListEventsRequest, admin_client::AdminClient};
use fusebox_server::storage::journal::Keyspace;
use fusebox_tests::Server;

use super::{Files, Machine, Proxy, Told, hits, limited, metric, peek, rl, rule};
use crate::{
    ask,
    caller::{said, seconds},
};

fn files() -> Files {
    let rules = [rule("user", 10, "hour"), rule("fast", 10, "second"), rule("day", 10, "day")];
    Files::of(&[("rl.yaml", &rl(&rules))])
}

/// What the audit trail tells of rules, newest first.
async fn told(server: &Server) -> Vec<String> {
    let mut operator = AdminClient::new(server.channel().await);
    let events = operator.list_events(ListEventsRequest::default()).await.unwrap().into_inner();
    events.events.into_iter().map(|event| event.after).collect()
}

#[tokio::test]
async fn a_clean_stop_keeps_every_count() {
    let (files, machine) = (files(), Machine::default());
    let server = machine.start(&files.config("", "")).await;
    let mut proxy = Proxy::of(&server).await;
    for key in ["user", "fast", "day"] {
        assert_eq!(proxy.one(hits(key, "a", 6)).await, Told::Ok(4));
        assert_eq!(proxy.one(hits(key, "b", 60)).await, Told::Over(0));
    }
    server.stop().await.unwrap();
    machine.journal.lose_power();

    let server = machine.start(&files.config("", "")).await;
    let mut proxy = Proxy::of(&server).await;
    for key in ["user", "fast", "day"] {
        assert_eq!(proxy.one(peek(key, "a")).await, Told::Ok(4), "{key}");
        assert_eq!(proxy.one(peek(key, "b")).await, Told::Over(0), "{key}");
    }
    assert_eq!(told(&server).await, [""; 0], "nothing is different");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_crash_keeps_counts_of_hours_and_empties_those_of_seconds() {
    let (files, machine) = (files(), Machine::default());
    let server = machine.start(&files.config("", "")).await;
    let mut proxy = Proxy::of(&server).await;
    for key in ["user", "fast", "day"] {
        assert_eq!(proxy.one(hits(key, "a", 6)).await, Told::Ok(4));
    }
    machine.crash(server).await;

    let server = machine.start(&files.config("", "")).await;
    let mut proxy = Proxy::of(&server).await;
    for key in ["user", "day"] {
        assert_eq!(proxy.one(peek(key, "a")).await, Told::Ok(4), "{key}");
        assert_eq!(proxy.one(peek(key, "b")).await, Told::Ok(10), "{key}");
    }
    for value in ["a", "never seen"] {
        assert_eq!(proxy.one(peek("fast", value)).await, Told::Ok(0));
    }
    server.advance(seconds(1));
    for value in ["a", "never seen"] {
        assert_eq!(proxy.one(peek("fast", value)).await, Told::Ok(10));
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_flood_of_what_is_denied_is_hardly_written() {
    for limit in [0, 10, 1_000] {
        let (machine, files) =
            (Machine::default(), Files::of(&[("rl.yaml", &rl(&[rule("user", limit, "hour")]))]));
        let server = machine.start(&files.config("", "")).await;
        let mut proxy = Proxy::of(&server).await;
        let written = async || metric(&server, "fusebox_journal_commits_total").await.unwrap();
        assert_eq!(proxy.one(hits("user", "a", u64::from(limit) + 1)).await, Told::Over(0));
        let before = written().await;
        for _ in 0..500 {
            assert_eq!(proxy.hit("user", "a").await, Told::Over(0));
        }
        let written = written().await - before;
        assert!(written < 30, "{limit}: 500 hits, written in {written} commits");
        machine.crash(server).await;

        // A crash may take some more, of a window in which nothing is left anyway.
        let server = machine.start(&files.config("", "")).await;
        let mut proxy = Proxy::of(&server).await;
        assert_eq!(proxy.one(peek("user", "a")).await, Told::Over(0));
        server.advance(seconds(2_800));
        assert_eq!(proxy.one(peek("user", "a")).await, Told::Ok(limit));
        server.stop().await.unwrap();
    }
}

#[tokio::test]
async fn strict_rules_survive_a_crash_and_relaxed_ones_are_written_soon() {
    for (durability, of_all) in [("strict", "relaxed"), ("relaxed", "strict")] {
        let (files, machine) = (files(), Machine::default());
        let others = format!("storage: {{durability: {of_all}}}");
        let config = files.config(&format!("durability: {durability}"), &others);
        let server = machine.start(&config).await;
        assert_eq!(Proxy::of(&server).await.one(hits("user", "a", 6)).await, Told::Ok(4));
        if durability == "relaxed" {
            let written = async || machine.journal.records(Keyspace::Cells) == 1;
            fusebox_tests::eventually("it is written", written).await;
            machine.journal.kill();
            server.stop().await.unwrap_err();
        } else {
            machine.crash(server).await;
        }
        let server = machine.start(&config).await;
        assert_eq!(Proxy::of(&server).await.one(peek("user", "a")).await, Told::Ok(4));
        server.stop().await.unwrap();
    }
}

#[tokio::test]
async fn rules_that_changed_while_the_server_was_down_go_on_with_their_counts() {
    let (files, machine) = (files(), Machine::default());
    let config = files.config("", "");
    let server = machine.start(&config).await;
    assert_eq!(Proxy::of(&server).await.one(hits("user", "a", 6)).await, Told::Ok(4));
    machine.crash(server).await;

    for (text, expected, event) in [
        (rl(&[rule("user", 20, "hour")]), Told::Ok(14), "- rl|day\n- rl|fast\n~ rl|user"),
        (rl(&[rule("user", 5, "day")]), Told::Over(0), "~ rl|user"),
        // Gone, and back.
        (rl(&[rule("path", 5, "day")]), Told::Free, "+ rl|path\n- rl|user"),
        (rl(&[rule("user", 10, "hour")]), Told::Ok(4), "+ rl|user\n- rl|path"),
    ] {
        files.write("rl.yaml", &text);
        let server = machine.start(&config).await;
        assert_eq!(Proxy::of(&server).await.one(peek("user", "a")).await, expected, "{text}");
        let first = told(&server).await.remove(0);
        let mut lines: Vec<_> = first.lines().collect();
        let mut expected: Vec<_> = event.lines().collect();
        lines.sort_unstable();
        expected.sort_unstable();
        assert_eq!(lines, expected);
        machine.crash(server).await;
    }
}

#[tokio::test]
async fn a_server_without_rules_for_a_while_forgets_no_count() {
    let (files, machine) = (files(), Machine::default());
    let server = machine.start(&files.config("", "")).await;
    let carried = |count| limited(hits("user", "b", count), 10, super::RateLimitUnit::Hour);
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(hits("user", "a", 6)).await, Told::Ok(4));
    assert_eq!(proxy.one(carried(7)).await, Told::Ok(3));
    server.stop().await.unwrap();

    let server = machine.start("namespaces: {}").await;
    let refused = Proxy::of(&server).await.try_send(super::request([peek("user", "a")])).await;
    assert_eq!(refused.unwrap_err().code(), tonic::Code::FailedPrecondition);
    assert_eq!(told(&server).await[0].lines().filter(|line| line.starts_with('-')).count(), 10);
    server.stop().await.unwrap();

    let server = machine.start(&files.config("", "")).await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(peek("user", "a")).await, Told::Ok(4));
    assert_eq!(proxy.one(carried(0)).await, Told::Ok(3));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn policies_of_ones_own_beside_rules_of_like_names_count_apart() {
    // As a key of the journal a dot of one could be a dot of another.
    let odd = "domain: basic.0\ndescriptors: [{key: '=a', rate_limit: {unit: hour, requests_per_unit: 7}}]";
    let plain = "domain: basic\ndescriptors: [{key: '0.=a', rate_limit: {unit: hour, requests_per_unit: 8}}]";
    let files = Files::of(&[("odd.yaml", odd), ("plain.yaml", plain)]);
    let own = "namespaces: {envoy: {policies: {
        basic: {fixed_window: {limit: 9, per: 1h}, overrides: [{key: a, fixed_window: {limit: 6, per: 1h}},
            {key: '|0', fixed_window: {limit: 5, per: 1h}}]},
        per: {fixed_window: {limit: 4, per: 1h}}}}}";
    let machine = Machine::default();
    let config = files.config("", own);
    let server = machine.start(&config).await;
    let check = async |server: &Server, cost: u64, spent: u64| {
        let acquire = async |policy: &str, key: &str| {
            let asks = vec![ask(policy, key, cost)];
            let request = AcquireRequest { namespace: "envoy".into(), asks, ..Default::default() };
            let answer = server.raw().await.acquire(request).await.unwrap().into_inner();
            said(&answer.verdicts[0]).remaining
        };
        for (policy, key, limit) in [
            ("basic", "", 9),
            ("basic", "a", 6),
            ("basic", "|0", 5),
            ("per", "", 4),
            ("basic.0|%3Da", "a", 7),
            ("basic|0.%3Da", "a", 8),
        ] {
            assert_eq!(acquire(policy, key).await, limit - spent, "{policy} {key}");
        }
    };
    check(&server, 2, 2).await;
    machine.crash(server).await;
    let server = machine.start(&config).await;
    check(&server, 0, 2).await;
    server.stop().await.unwrap();
    // Also where one side was away.
    machine.start(&files.config("", "")).await.stop().await.unwrap();
    machine.start(own).await.stop().await.unwrap();
    let server = machine.start(&config).await;
    check(&server, 0, 2).await;
    server.stop().await.unwrap();
}
