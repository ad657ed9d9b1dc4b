//! Rules that something else than a fixed window counts.

use super::{Files, Machine, Proxy, Served, Told, back, hits, peek, rl, rule};
use crate::caller::seconds;

const ALGORITHMS: [&str; 3] = ["fixed_window", "token_bucket", "sliding_window"];

fn files() -> Files {
    Files::of(&[("rl.yaml", &rl(&[rule("user", 60, "minute"), rule("none", 0, "minute")]))])
}

fn counted_by(algorithm: &str) -> String {
    format!("domains: {{rl: {{algorithm: {algorithm}}}}}")
}

async fn serve(algorithm: &str) -> Served {
    files().serve_with(&counted_by(algorithm), "").await
}

/// Hits of two bursts of 60, on either side of the end of a window, that are not over the limit.
async fn passed_around_a_boundary(algorithm: &str) -> u32 {
    let server = serve(algorithm).await;
    let mut proxy = Proxy::of(&server).await;
    let mut passed = 0;
    for _ in 0..2 {
        // A minute of the clock ends in 40 s.
        server.advance(seconds(39));
        for _ in 0..60 {
            passed += u32::from(matches!(proxy.hit("user", "a").await, Told::Ok(_)));
        }
        server.advance(seconds(1));
    }
    server.stop().await.unwrap();
    passed
}

#[tokio::test]
async fn only_a_fixed_window_lets_twice_the_limit_through_where_it_ends() {
    assert_eq!(passed_around_a_boundary("fixed_window").await, 120);
    // The rate of 40 s flows in between.
    assert_eq!(passed_around_a_boundary("token_bucket").await, 100);
    assert_eq!(passed_around_a_boundary("sliding_window").await, 60);
}

#[tokio::test]
async fn whatever_counts_a_denial_keeps_no_debt_and_what_comes_back_is_no_more_than_there_is() {
    for algorithm in ["token_bucket", "sliding_window"] {
        let server = serve(algorithm).await;
        let mut proxy = Proxy::of(&server).await;
        assert_eq!(proxy.one(back("user", "a", 5)).await, Told::Ok(60), "{algorithm}");
        assert_eq!(proxy.one(hits("user", "a", 50)).await, Told::Ok(10), "{algorithm}");
        assert_eq!(proxy.one(peek("user", "a")).await, Told::Ok(10), "{algorithm}");
        assert_eq!(proxy.one(hits("user", "a", u64::MAX)).await, Told::Over(0), "{algorithm}");
        assert_eq!(proxy.one(peek("user", "a")).await, Told::Over(0), "{algorithm}");
        assert_eq!(proxy.one(back("user", "a", 5)).await, Told::Ok(5), "{algorithm}");
        assert_eq!(proxy.one(back("user", "a", u64::MAX)).await, Told::Ok(60), "{algorithm}");
        assert_eq!(proxy.one(hits("user", "a", 60)).await, Told::Ok(0), "{algorithm}");
        server.advance(seconds(70));
        assert_eq!(proxy.one(peek("user", "a")).await, Told::Ok(60), "{algorithm}");
        server.stop().await.unwrap();
    }
}

#[tokio::test]
async fn a_rule_of_nothing_denies_whatever_counts() {
    for algorithm in ALGORITHMS {
        let server = serve(algorithm).await;
        let mut proxy = Proxy::of(&server).await;
        assert_eq!(proxy.hit("none", "a").await, Told::Over(0), "{algorithm}");
        server.advance(seconds(600));
        assert_eq!(proxy.hit("none", "a").await, Told::Over(0), "{algorithm}");
        server.stop().await.unwrap();
    }
}

#[tokio::test]
async fn what_is_told_as_the_limit_is_what_the_file_says_whatever_counts() {
    for algorithm in ALGORITHMS {
        let server = serve(algorithm).await;
        let mut proxy = Proxy::of(&server).await;
        let answer = proxy.send(super::request([hits("user", "a", 6)])).await;
        let status = &answer.statuses[0];
        let limit = status.current_limit.as_ref().unwrap();
        assert_eq!((limit.requests_per_unit, limit.unit), (60, 2), "{algorithm}: per minute");
        let reset = status.duration_until_reset.unwrap().seconds;
        // To the end of the minute; to be full again; until the slice that it is in counts no more.
        let expected = match algorithm {
            "fixed_window" => 40..=40,
            "token_bucket" => 6..=6,
            _ => 60..=70,
        };
        assert!(expected.contains(&reset), "{algorithm}: {reset}");
        server.stop().await.unwrap();
    }
}

#[tokio::test]
async fn rules_of_every_size_can_be_read_again_whatever_counts() {
    let units = ["second", "minute", "hour", "day", "week", "month", "year"];
    let rules = units.iter().flat_map(|unit| {
        [0, 1, u32::MAX].map(|limit| rule(&format!("{unit}-{limit}"), limit, unit))
    });
    let files = Files::of(&[("rl.yaml", &rl(&rules.collect::<Vec<_>>()))]);
    let machine = Machine::default();
    // Each goes on with what another had counted, through clean stops and crashes.
    for (start, algorithm) in ALGORITHMS.iter().chain(&ALGORITHMS).enumerate() {
        let server = machine.start(&files.config(&counted_by(algorithm), "")).await;
        let mut proxy = Proxy::of(&server).await;
        for unit in units {
            for (limit, count) in [(0, 1), (1, 2), (u32::MAX, u64::MAX)] {
                let key = format!("{unit}-{limit}");
                assert_eq!(proxy.one(hits(&key, "a", count)).await, Told::Over(0), "{key}");
            }
        }
        if start % 2 == 0 {
            server.stop().await.unwrap();
        } else {
            machine.crash(server).await;
        }
    }
}

#[tokio::test]
async fn a_rule_that_another_algorithm_counts_from_now_on_owes_no_more_than_its_limit() {
    let (files, machine) = (files(), Machine::default());
    let server = machine.start(&files.config(&counted_by("fixed_window"), "")).await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(hits("user", "a", 1_000_000)).await, Told::Over(0));
    assert_eq!(proxy.one(hits("user", "b", 20)).await, Told::Ok(40));
    server.stop().await.unwrap();

    let server = machine.start(&files.config(&counted_by("token_bucket"), "")).await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(peek("user", "a")).await, Told::Over(0));
    assert_eq!(proxy.one(peek("user", "b")).await, Told::Ok(40));
    server.advance(seconds(10));
    assert_eq!(proxy.one(peek("user", "a")).await, Told::Ok(10));
    server.stop().await.unwrap();
}
