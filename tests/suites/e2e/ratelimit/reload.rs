//! Files of rules that change while the server runs.

use fusebox_proto::v1::{Event, EventAction, ListEventsRequest, admin_client::AdminClient};
use fusebox_tests::Server;

use super::{Files, Machine, Proxy, Told, flagged, hits, loaded, loads, metric, peek, rl, rule};
use crate::caller::seconds;

/// Events of the audit trail, newest first.
async fn events(server: &Server) -> Vec<Event> {
    let mut operator = AdminClient::new(server.channel().await);
    operator.list_events(ListEventsRequest::default()).await.unwrap().into_inner().events
}

#[tokio::test]
async fn a_changed_limit_goes_on_with_what_was_counted() {
    let files = Files::of(&[("rl.yaml", &rl(&[rule("user", 10, "minute")]))]);
    let server = files.serve().await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(hits("user", "a", 6)).await, Told::Ok(4));
    for (load, (limit, unit, expected)) in (2..).zip([
        (20, "minute", Told::Ok(14)),
        (3, "minute", Told::Over(0)),
        (6, "minute", Told::Ok(0)),
        (9, "hour", Told::Ok(3)),
        (9, "day", Told::Ok(3)),
        (10, "minute", Told::Ok(4)),
    ]) {
        server.files.write("rl.yaml", &rl(&[rule("user", limit, unit)]));
        loaded(&server, load, 0).await;
        assert_eq!(proxy.one(peek("user", "a")).await, expected, "{limit} per {unit}");
        let event = &events(&server).await[0];
        assert_eq!(event.action(), EventAction::RulesChanged);
        assert_eq!((&*event.actor, &*event.namespace), ("rule files", "envoy"));
        assert_eq!((&*event.reason, &*event.after), ("0 added, 1 changed, 0 removed", "~ rl|user"));
    }
    assert_eq!(events(&server).await.len(), 6, "one for each");
    // The window that was counted in ends when it did.
    server.advance(seconds(40));
    assert_eq!(proxy.hit("user", "a").await, Told::Ok(9));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn rules_come_and_go_and_keep_their_counts() {
    let user = || rule("user", 10, "hour");
    let files = Files::of(&[("rl.yaml", &rl(&[user()]))]);
    let server = files.serve().await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(hits("user", "a", 6)).await, Told::Ok(4));
    assert_eq!(proxy.hit("path", "a").await, Told::Free);

    server.files.write("rl.yaml", &rl(&[user(), rule("path", 5, "minute")]));
    loaded(&server, 2, 0).await;
    assert_eq!(proxy.hit("path", "a").await, Told::Ok(4));
    assert_eq!(proxy.hit("user", "a").await, Told::Ok(3));

    server.files.write("rl.yaml", &rl(&[rule("path", 5, "minute")]));
    loaded(&server, 3, 0).await;
    assert_eq!(proxy.hit("user", "a").await, Told::Free);
    assert_eq!(proxy.hit("path", "a").await, Told::Ok(3));

    // Into another file, and nothing is different.
    server.files.remove("rl.yaml");
    server.files.write("other.yml", &rl(&[rule("path", 5, "minute"), user()]));
    loaded(&server, 4, 0).await;
    assert_eq!(proxy.hit("user", "a").await, Told::Ok(2));
    assert_eq!(proxy.hit("path", "a").await, Told::Ok(2));

    let told: Vec<_> = events(&server).await.into_iter().map(|event| event.after).collect();
    assert_eq!(told, ["+ rl|user", "- rl|user", "+ rl|path"]);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_changes_no_policy_makes_no_event_and_is_in_force() {
    let files = Files::of(&[("rl.yaml", &rl(&[flagged("user", 1, "hour", "quota_mode: true")]))]);
    let server = files.serve().await;
    let mut proxy = Proxy::of(&server).await;
    let both = || [hits("user", "a", 2), hits("no", "a", 1)];
    assert_eq!(proxy.ask(both()).await, (true, vec![Told::Over(0), Told::Free]));
    let unlimited = "{key: 'no', rate_limit: {unlimited: true}}".to_owned();
    server.files.write("rl.yaml", &rl(&[rule("user", 1, "hour"), unlimited]));
    loaded(&server, 2, 0).await;
    let answer = proxy.send(super::request(both())).await;
    assert_eq!(answer.statuses[1].limit_remaining, u32::MAX);
    assert_eq!(events(&server).await, []);
    // Written again as it is, there is nothing to load.
    server.files.write("rl.yaml", &rl(&[rule("user", 2, "hour")]));
    loaded(&server, 3, 0).await;
    server.files.write("rl.yaml", &rl(&[rule("user", 2, "hour")]));
    server.files.write("more.yaml", "domain: more");
    loaded(&server, 4, 0).await;
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_broken_file_leaves_the_last_good_rules_in_force_and_is_counted_once() {
    let good = rl(&[rule("user", 10, "hour")]);
    let files = Files::of(&[("rl.yaml", &good)]);
    let server = files.serve().await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(loads(&server).await, (1, 0));
    assert_eq!(proxy.hit("user", "a").await, Told::Ok(9));

    server.files.write("rl.yaml", "domain: rl\ndescriptors: [{key: user, rate_limits: 3}]");
    loaded(&server, 1, 1).await;
    assert_eq!(proxy.hit("user", "a").await, Told::Ok(8));
    // What else changes meanwhile is not taken either, and another mistake is another one.
    server.files.write("more.yaml", "domain: more\ndescriptors: [{key: user, rate_limit: 3}]");
    loaded(&server, 1, 2).await;
    assert_eq!(proxy.hit("user", "a").await, Told::Ok(7));

    server.files.remove("more.yaml");
    server.files.write("rl.yaml", &good);
    loaded(&server, 2, 2).await;
    assert_eq!(proxy.hit("user", "a").await, Told::Ok(6));
    assert_eq!(events(&server).await, []);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn metrics_go_on_where_rules_are_loaded_again() {
    let told = |limit| flagged("user", limit, "hour", "value_to_metric: true");
    let files = Files::of(&[("rl.yaml", &rl(&[told(3), rule("path", 9, "hour")]))]);
    let server = files.serve().await;
    let mut proxy = Proxy::of(&server).await;
    let counts = async |key: &str| {
        let of =
            |what: &str| format!(r#"fusebox_ratelimit_{what}_total{{domain="rl",key="{key}"}}"#);
        let over = metric(&server, &of("over_limit_hits")).await;
        (metric(&server, &of("hits")).await, over)
    };
    proxy.one(hits("user", "a", 2)).await;
    proxy.one(hits("user", "a", 2)).await;
    proxy.one(hits("path", "a", 4)).await;
    for (load, limit) in (2..).zip([9, 2]) {
        server.files.write("rl.yaml", &rl(&[told(limit), rule("path", 9, "hour")]));
        loaded(&server, load, 0).await;
        proxy.hit("user", "a").await;
    }
    assert_eq!(counts("user_a").await, (Some(6), Some(2)));
    assert_eq!(counts("path").await, (Some(4), Some(0)));
    let decisions =
        r#"fusebox_decisions_total{decision="allow",namespace="envoy",policy="rl|user",reason=""}"#;
    assert_eq!(metric(&server, decisions).await, Some(2));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_rule_that_is_written_from_now_on_is_on_disk_once_it_is_in_force() {
    // Of a second it is never written; of an hour it is.
    let (machine, files) =
        (Machine::default(), Files::of(&[("rl.yaml", &rl(&[rule("user", 10, "second")]))]));
    let config = files.config("", "");
    let server = machine.start(&config).await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(hits("user", "a", 6)).await, Told::Ok(4));
    files.write("rl.yaml", &rl(&[rule("user", 10, "hour")]));
    loaded(&server, 2, 0).await;
    server.advance(seconds(1));
    assert_eq!(proxy.one(hits("user", "a", 7)).await, Told::Ok(3));
    machine.crash(server).await;
    let server = machine.start(&config).await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(peek("user", "a")).await, Told::Ok(3));
    assert_eq!(proxy.one(peek("user", "b")).await, Told::Ok(10));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_the_disk_refuses_leaves_the_server_as_any_failure_does() {
    let files = Files::of(&[("rl.yaml", &rl(&[rule("user", 10, "second")]))]);
    let machine = Machine::default();
    let server = machine.start(&files.config("", "")).await;
    machine.journal.fail();
    files.write("rl.yaml", &rl(&[rule("user", 1, "second")]));
    fusebox_tests::eventually("it is not ready any more", async || {
        server.http("/readyz").await.0 == 503
    })
    .await;
    let refused = Proxy::of(&server).await.try_send(super::request([hits("user", "a", 2)])).await;
    assert_eq!(refused.unwrap_err().code(), tonic::Code::Unavailable);
    server.stop().await.unwrap_err();
}
