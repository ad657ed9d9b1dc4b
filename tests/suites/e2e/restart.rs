//! What a restart keeps, and what it must not.

use std::{sync::Arc, time::Duration};

use fusebox_client::unary::{Ask, Outcome, Reported};
use fusebox_core::{Ask as Charge, Purpose, Settlement as Known};
use fusebox_server::{
    config::Config,
    run::RunError,
    storage::{Answer, Judge, Recovered, Settlement, Storage, journal::Keyspace},
};
use fusebox_tests::{
    ManualClock, Server, Simulated, eventually,
    panel::{acquire, recover, told, write_all},
};

use crate::{CONFIG, remaining};

#[tokio::test]
async fn a_clean_stop_keeps_what_was_spent_and_time_goes_on() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), CONFIG).await;
    let client = server.client("test").await;
    assert!(client.acquire([Ask::new("three", "a").cost(3)]).await.unwrap().allowed);
    server.stop().await.unwrap();
    journal.lose_power(); // what a clean stop wrote is on the disk

    clock.advance(Duration::from_secs(20));
    let server = Server::start_on(journal.open(), Arc::clone(&clock), CONFIG).await;
    assert_eq!(remaining(&server, "three", "a").await, 1);
    server.stop().await.unwrap();
}

/// Three of three tokens of a cell are charged; how many are left after the power came back?
fn left_after_a_loss_of_power(durability: &str, written: bool) -> u64 {
    let journal = Simulated::default();
    let config = format!("storage: {{durability: {durability}}}\n{CONFIG}");
    let config = Config::parse("test.yaml", &config).unwrap();
    let clock = Arc::<ManualClock>::default();
    let charge =
        |panel: &Recovered, tokens| acquire(panel, "three", "a", Charge::spend(tokens)).unwrap();
    let mut panel = recover(journal.open(), &config, &clock).unwrap();
    let answer = charge(&panel, 3);
    assert_eq!(matches!(answer, Answer::Later(..)), durability == "strict");
    if written {
        panel.writer.catch_up();
        told(answer, &mut panel.writer);
        write_all(&mut panel.writer).unwrap();
    }
    journal.lose_power();
    let Answer::Now(peek) = charge(&recover(journal.open(), &config, &clock).unwrap(), 0) else {
        panic!("a peek waits for nothing")
    };
    peek.decision.verdicts[0].remaining
}

#[test]
fn strict_forgets_only_what_nobody_was_told() {
    assert_eq!(left_after_a_loss_of_power("strict", true), 0);
    assert_eq!(left_after_a_loss_of_power("strict", false), 3);
}

#[test]
fn relaxed_forgets_at_a_loss_of_power_what_was_charged_since_the_last_round() {
    assert_eq!(left_after_a_loss_of_power("relaxed", true), 0);
    assert_eq!(left_after_a_loss_of_power("relaxed", false), 3);
}

#[tokio::test]
async fn a_clean_stop_keeps_open_grants() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), CONFIG).await;
    let client = server.client("test").await;
    let ask = Ask::new("tokens", "a").cost(60).estimated();
    let grant = client.acquire([ask]).await.unwrap().grant_id.unwrap();
    server.stop().await.unwrap();

    // For longer than the bucket takes to fill: what is out does not refill.
    clock.advance(Duration::from_secs(300));
    let server = Server::start_on(journal.open(), Arc::clone(&clock), CONFIG).await;
    assert_eq!(remaining(&server, "tokens", "a").await, 40);
    let client = server.client("test").await;
    let outcomes = || [Outcome::cost(&grant, 10)];
    assert_eq!(client.report(outcomes()).await.unwrap(), [Reported::Applied]);
    assert_eq!(client.report(outcomes()).await.unwrap(), [Reported::Duplicate]);
    assert_eq!(remaining(&server, "tokens", "a").await, 90);
    server.stop().await.unwrap();

    let server = Server::start_on(journal.open(), clock, CONFIG).await;
    let client = server.client("test").await;
    assert_eq!(client.report(outcomes()).await.unwrap(), [Reported::UnknownGrant]);
    assert_eq!(remaining(&server, "tokens", "a").await, 90);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_grant_of_a_life_that_ended_in_a_crash_gives_nothing_back() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), CONFIG).await;
    let client = server.client("test").await;
    let ask = Ask::new("hundred", "a").cost(60).estimated();
    let grant = client.acquire([ask]).await.unwrap().grant_id.unwrap();
    journal.lose_power();
    server.stop().await.unwrap_err();

    let server = Server::start_on(journal.open(), clock, CONFIG).await;
    let client = server.client("test").await;
    let reported = client.report([Outcome::cost(&grant, 0)]).await.unwrap();
    assert_eq!(reported, [Reported::UnknownGrant]);
    assert_eq!(remaining(&server, "hundred", "a").await, 40);

    // Not even if this life draws the same secret: these draws are counted, and begin anew.
    let (_, secret) = grant.split_once('-').unwrap();
    let again = loop {
        let ask = Ask::new("hundred", "b").cost(1).estimated();
        let again = client.acquire([ask]).await.unwrap().grant_id.unwrap();
        if again.ends_with(secret) {
            break again;
        }
    };
    let outcomes = [Outcome::cost(grant, 0), Outcome::cost(again, 0)];
    let reported = client.report(outcomes).await.unwrap();
    assert_eq!(reported, [Reported::UnknownGrant, Reported::Applied]);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_wall_clock_that_went_back_admits_nothing_and_blocks_nobody_for_long() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), CONFIG).await;
    let client = server.client("test").await;
    assert!(client.acquire([Ask::new("three", "a").cost(3)]).await.unwrap().allowed);
    server.stop().await.unwrap();

    clock.set_wall(Duration::from_secs(1));
    let server = Server::start_on(journal.open(), Arc::clone(&clock), CONFIG).await;
    assert_eq!(remaining(&server, "three", "a").await, 0);
    server.advance(Duration::from_secs(60));
    assert_eq!(remaining(&server, "three", "a").await, 3);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_changed_limit_keeps_what_was_spent() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), CONFIG).await;
    let client = server.client("test").await;
    assert!(client.acquire([Ask::new("hundred", "a").cost(80)]).await.unwrap().allowed);
    server.stop().await.unwrap();

    for (limit, left) in [("50", 0), ("200", 120)] {
        let config = CONFIG.replace("limit: 100,", &format!("limit: {limit},"));
        let server = Server::start_on(journal.open(), Arc::clone(&clock), &config).await;
        assert_eq!(remaining(&server, "hundred", "a").await, left);
        server.stop().await.unwrap();
    }
    // A policy that is not configured for a while has forgotten nothing either.
    let without = "namespaces: {test: {policies: {other: {token_bucket: {limit: 1, per: 1s}}}}}";
    Server::start_on(journal.open(), Arc::clone(&clock), without).await.stop().await.unwrap();
    let server = Server::start_on(journal.open(), clock, CONFIG).await;
    assert_eq!(remaining(&server, "hundred", "a").await, 20);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn full_cells_leave_the_disk() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), CONFIG).await;
    let client = server.client("test").await;
    assert!(client.acquire([Ask::new("three", "a").cost(3)]).await.unwrap().allowed);
    server.stop().await.unwrap();
    assert_eq!(journal.records(Keyspace::Cells), 1);

    clock.advance(Duration::from_secs(60));
    Server::start_on(journal.open(), clock, CONFIG).await.stop().await.unwrap();
    assert_eq!(journal.records(Keyspace::Cells), 0);
}

#[tokio::test]
async fn an_idle_key_loses_nothing_by_many_changes() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let start = async |burst: u32| {
        let policy = format!("{{token_bucket: {{limit: 100, per: 100s, burst: {burst}}}}}");
        let config = format!("namespaces: {{test: {{policies: {{slow: {policy}}}}}}}");
        Server::start_on(journal.open(), Arc::clone(&clock), &config).await
    };
    let server = start(100).await;
    let client = server.client("test").await;
    assert!(client.acquire([Ask::new("slow", "a").cost(100)]).await.unwrap().allowed);
    server.stop().await.unwrap();
    // One token a second, and one more of burst at each of more changes than a policy remembers.
    for change in 1..=12 {
        clock.advance(Duration::from_secs(2));
        let server = start(100 + change).await;
        assert_eq!(remaining(&server, "slow", "a").await, u64::from(3 * change));
        server.stop().await.unwrap();
    }
}

#[tokio::test]
async fn a_cell_that_never_fills_leaves_with_its_policy() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), CONFIG).await;
    let client = server.client("test").await;
    assert!(client.acquire([Ask::new("three", "a").cost(3)]).await.unwrap().allowed);
    server.stop().await.unwrap();

    let closed = "namespaces: {test: {policies: {three: {token_bucket: {limit: 0, per: 1m}}}}}";
    for (config, cells) in [(closed, 1), (closed, 1), ("namespaces: {}", 0)] {
        let server = Server::start_on(journal.open(), Arc::clone(&clock), config).await;
        server.stop().await.unwrap();
        assert_eq!(journal.records(Keyspace::Cells), cells, "{config}");
        clock.advance(Duration::from_secs(3_600));
    }
}

#[tokio::test]
async fn a_policy_that_is_neither_configured_nor_in_use_is_forgotten() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), CONFIG).await;
    let client = server.client("test").await;
    assert!(client.acquire([Ask::new("three", "a").cost(3)]).await.unwrap().allowed);
    server.stop().await.unwrap();

    // `three` has a cell that is not full yet; when it is, its record goes, and then the policy.
    for policies in [1, 1, 0] {
        let server = Server::start_on(journal.open(), Arc::clone(&clock), "namespaces: {}").await;
        server.stop().await.unwrap();
        assert_eq!(journal.records(Keyspace::Policies), policies);
        clock.advance(Duration::from_secs(60));
    }
    // Its number is not given to another: cells of both would be mixed up.
    let server = Server::start_on(journal.open(), clock, CONFIG).await;
    assert_eq!(remaining(&server, "three", "a").await, 3);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn records_that_make_no_sense_stop_the_start() {
    for keyspace in [Keyspace::Meta, Keyspace::Policies, Keyspace::Cells] {
        let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
        let server = Server::start_on(journal.open(), Arc::clone(&clock), CONFIG).await;
        let client = server.client("test").await;
        assert!(client.acquire([Ask::new("three", "a")]).await.unwrap().allowed);
        server.stop().await.unwrap();

        journal.corrupt(keyspace);
        let server = Server::begin(journal.open(), clock, CONFIG).await;
        let refused = server.ended().await.unwrap_err();
        assert!(matches!(refused, RunError::Recovery(_)), "{refused}");
        assert!(refused.to_string().contains("makes no sense"), "{refused}");
    }
}

#[tokio::test]
async fn a_data_directory_that_lost_commits_is_refused() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), CONFIG).await;
    let copy = journal.copy();
    let client = server.client("test").await;
    assert!(client.acquire([Ask::new("three", "a").cost(3)]).await.unwrap().allowed);
    server.stop().await.unwrap();

    // As if an old copy of the store had been put back, without its witness.
    journal.restore(&copy);
    let server = Server::begin(journal.open(), Arc::clone(&clock), CONFIG).await;
    let refused = server.ended().await.unwrap_err().to_string();
    assert!(refused.contains("lost its last commits"), "{refused}");
    assert!(refused.contains("--accept-loss"), "it says what to do: {refused}");

    let accepting = Server::begin_accepting_loss(journal.open(), Arc::clone(&clock), CONFIG).await;
    eventually("it is ready", async || accepting.http("/readyz").await.0 == 200).await;
    assert_eq!(remaining(&accepting, "three", "a").await, 3, "what was lost may be spent again");
    accepting.stop().await.unwrap();
    Server::start_on(journal.open(), clock, CONFIG).await.stop().await.unwrap();
}

#[tokio::test]
async fn another_format_is_refused() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), CONFIG).await;
    server.stop().await.unwrap();
    // The first field of the record of the directory: format 3.
    journal.edit(Keyspace::Meta, b"directory", |record| record[1] = 3);
    let server = Server::begin(journal.open(), clock, CONFIG).await;
    let refused = server.ended().await.unwrap_err().to_string();
    assert!(refused.contains("has format 3, and this version reads 2"), "{refused}");
}

#[test]
fn a_busy_key_is_written_seldom_and_loses_one_step() {
    const CHARGES: u64 = 20_000;
    let config =
        "namespaces: {test: {policies: {million: {token_bucket: {limit: 1000000, per: 1d}}}}}";
    let config = Config::parse("test.yaml", config).unwrap();
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let mut panel = recover(journal.open(), &config, &clock).unwrap();
    let charge =
        |panel: &Recovered, tokens| acquire(panel, "million", "a", Charge::spend(tokens)).unwrap();
    let mut waits = 0;
    for _ in 0..CHARGES {
        let answer = charge(&panel, 1);
        waits += u64::from(matches!(answer, Answer::Later(..)));
        assert!(told(answer, &mut panel.writer).decision.allowed);
    }
    assert!(waits < 30, "{waits} of {CHARGES} waited for the disk");

    journal.lose_power();
    let panel = recover(journal.open(), &config, &clock).unwrap();
    let Answer::Now(peek) = charge(&panel, 0) else { panic!("a peek waits for nothing") };
    let spent = 1_000_000 - peek.decision.verdicts[0].remaining;
    // A hundredth of the limit, at most.
    assert!((CHARGES..=CHARGES + 10_000).contains(&spent), "{spent} of {CHARGES}");
}

#[test]
fn a_crash_does_not_take_what_came_back() {
    let config = Config::parse("test.yaml", CONFIG).unwrap();
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let mut panel = recover(journal.open(), &config, &clock).unwrap();
    let policy = Arc::clone(panel.catalogue.namespace("test").unwrap().policy("hundred").unwrap());
    let estimate = Charge::spend(60).to(Purpose::Estimate);
    let answer = acquire(&panel, "hundred", "a", estimate).unwrap();
    assert!(told(answer, &mut panel.writer).decision.allowed);
    let limiter = &policy.rules.limiters[0];
    let settlement = Settlement {
        cell: policy.cells.cell("a"),
        judge: Judge { limiter, catalogue: &panel.catalogue },
        revision: limiter.settings.revision,
        known: Known {
            charged: 60,
            told: 0,
            actual: 10,
            partial: false,
            slice: None,
            window: None,
            max_debt: 0,
        },
    };
    let settled = panel.cells.settle(&settlement, panel.clock.now()).unwrap();
    assert_eq!(told(settled, &mut panel.writer).refunded, 50);
    panel.writer.catch_up();
    write_all(&mut panel.writer).unwrap();

    journal.lose_power();
    let panel = recover(journal.open(), &config, &clock).unwrap();
    let Answer::Now(peek) = acquire(&panel, "hundred", "a", Charge::spend(0)).unwrap() else {
        panic!("a peek waits for nothing")
    };
    assert_eq!(peek.decision.verdicts[0].remaining, 90);
}

#[tokio::test]
async fn what_is_never_written_starts_empty_after_a_crash_and_fills_in_its_own_time() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let server = Server::start_on(journal.open(), Arc::clone(&clock), CONFIG).await;
    journal.kill();
    server.stop().await.unwrap_err();

    let server = Server::start_on(journal.open(), Arc::clone(&clock), CONFIG).await;
    assert_eq!(remaining(&server, "tokens", "never seen").await, 0);
    server.advance(Duration::from_secs(3));
    assert_eq!(remaining(&server, "tokens", "never seen").await, 30);
    server.advance(Duration::from_secs(7));
    assert_eq!(remaining(&server, "tokens", "never seen").await, 100);
    // What is written starts as it was: full, if nobody asked for it.
    assert_eq!(remaining(&server, "hundred", "never seen").await, 100);
    server.stop().await.unwrap();
}
