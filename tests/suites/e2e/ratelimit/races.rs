//! Rules that are loaded while requests come.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use fusebox_server::{
    app::{App, Descriptor, Principal, RatelimitRequest},
    catalogue::PolicyName,
    config::envoy::Ruleset,
    storage::Writer,
};
use fusebox_tests::{ManualClock, Simulated, eventually, panel};

use super::{Files, Machine, Proxy, Told, hits, loaded, peek, rl, rule};

const RELOADS: u32 = 200;

/// Rules that are different each time, of which one comes and goes.
fn rules(round: u32) -> Ruleset {
    // Also from what is never written while it lives to what is, and back; at the end it is.
    let unit = ["hour", "day", "second", "minute"][round as usize % 4];
    let mut rules = vec![rule("user", 1_000_000 + round, unit)];
    if round.is_multiple_of(2) {
        rules.push(rule("path", 1_000_000, "hour"));
    }
    panel::ruleset("", &rl(&rules))
}

/// One hit of each rule; whether there is the one that comes and goes.
async fn hit(app: &App, user: &str) -> bool {
    let descriptors = [("user", user), ("path", "a")].into_iter().map(|entry| Descriptor {
        entries: std::iter::once(entry),
        limit: None,
        hits: 1,
        negative: false,
    });
    let request = RatelimitRequest { domain: "rl", descriptors };
    let caller = app.caller(Principal::Anonymous);
    let answer = app.should_rate_limit(caller, request, |limited| {
        let [user, path] = limited.statuses[..] else { panic!("{limited:?}") };
        assert!(!limited.over && user.limit.is_some());
        path.limit.is_some()
    });
    answer.expect("an answer").told().await.expect("it is written")
}

/// Writes until it is told to end.
fn write(mut writer: Writer, ends: &Arc<AtomicBool>) -> thread::JoinHandle<()> {
    let ends = Arc::clone(ends);
    thread::spawn(move || {
        while !ends.load(Ordering::Relaxed) {
            writer.round().expect("the journal writes");
            writer.wait();
        }
    })
}

fn spent(app: &App, policy: &str, key: &str) -> u64 {
    app.inspect(&PolicyName::new("envoy", policy), key).expect("a bucket").limits[0].spent
}

/// Hits that metrics tell of a rule.
fn told(app: &App, wanted: &str) -> u64 {
    let mut told = 0;
    let catalogue = app.catalogue();
    catalogue.ratelimit.as_ref().unwrap().domains.visit_hits(|_, key, hits| {
        told += if key == wanted { hits.total.load(Ordering::Relaxed) } else { 0 };
    });
    told
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_hit_is_lost_or_counted_twice_however_often_rules_are_loaded() {
    let (journal, clock) = (Simulated::default(), Arc::<ManualClock>::default());
    let (app, writer) = panel::app_of_rules(journal.open(), &rules(0), &clock).unwrap();
    let (app, ends) = (Arc::new(app), Arc::new(AtomicBool::new(false)));
    // It writes for as long as anybody waits for it.
    let all_told = Arc::new(AtomicBool::new(false));
    let writing = write(writer, &all_told);
    let users = ["a", "b", "c", "d"];
    let callers = users.map(|user| {
        let (app, ends) = (Arc::clone(&app), Arc::clone(&ends));
        tokio::spawn(async move {
            let (mut of_user, mut of_path) = (0, 0);
            while !ends.load(Ordering::Relaxed) {
                of_path += u64::from(hit(&app, user).await);
                of_user += 1;
                tokio::task::yield_now().await;
            }
            (of_user, of_path)
        })
    });
    for round in 1..=RELOADS {
        let different = app.reload_rules(&rules(round)).await.expect("it is written");
        assert_eq!(different, 2, "one is changed, and one comes or goes");
    }
    ends.store(true, Ordering::Relaxed);
    let (mut of_users, mut of_path) = (0, 0);
    for (user, caller) in users.into_iter().zip(callers) {
        let (user_hits, path_hits) = caller.await.unwrap();
        assert!(user_hits > u64::from(RELOADS), "it is hardly called: {user_hits}");
        assert_eq!(spent(&app, "rl|user", user), user_hits, "{user}");
        of_users += user_hits;
        of_path += path_hits;
    }
    assert_eq!(spent(&app, "rl|path", "a"), of_path);
    assert_eq!(told(&app, "user"), of_users);
    all_told.store(true, Ordering::Relaxed);
    writing.join().unwrap();

    // All of it survives, or a little more.
    journal.lose_power();
    let users = users.map(|user| (user, spent(&app, "rl|user", user)));
    let (app, _writer) = panel::app_of_rules(journal.open(), &rules(RELOADS), &clock).unwrap();
    for (user, before) in users {
        let after = spent(&app, "rl|user", user);
        assert!((before..before + 20_000).contains(&after), "{user}: {before}, then {after}");
    }
}

#[tokio::test]
async fn proxies_are_answered_by_these_rules_or_those_while_files_change() {
    let of = |limit| rl(&[rule("user", limit, "hour")]);
    let files = Files::of(&[("rl.yaml", &of(100_000))]);
    let server = files.serve().await;
    let ends = Arc::new(AtomicBool::new(false));
    let mut callers = Vec::new();
    for _ in 0..3 {
        let (mut proxy, ends) = (Proxy::of(&server).await, Arc::clone(&ends));
        callers.push(tokio::spawn(async move {
            let mut count = 0;
            while !ends.load(Ordering::Relaxed) {
                assert!(matches!(proxy.hit("user", "a").await, Told::Ok(_)));
                count += 1;
            }
            count
        }));
    }
    for load in 2..10 {
        server.files.write("rl.yaml", &of(100_000 + load));
        loaded(&server, load.into(), 0).await;
    }
    ends.store(true, Ordering::Relaxed);
    let mut count = 0;
    for caller in callers {
        count += caller.await.unwrap();
    }
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(peek("user", "a")).await, Told::Ok(100_009 - count));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn while_the_disk_hangs_the_rules_stay_as_they_were_and_answer() {
    let of = |limit| rl(&[rule("user", limit, "hour")]);
    let (machine, files) = (Machine::default(), Files::of(&[("rl.yaml", &of(10))]));
    let server = machine.start(&files.config("durability: relaxed", "")).await;
    let mut proxy = Proxy::of(&server).await;
    machine.journal.hang();
    files.write("rl.yaml", &of(20));
    eventually("it is to be written", async || machine.journal.hangs()).await;
    assert_eq!(proxy.one(hits("user", "a", 6)).await, Told::Ok(4));
    // Whatever else is written by the files meanwhile waits for its turn.
    files.write("rl.yaml", &of(30));
    assert_eq!(super::loads(&server).await, (1, 0));
    assert_eq!(proxy.one(peek("user", "a")).await, Told::Ok(4));

    machine.journal.go_on();
    let last = async || proxy.one(peek("user", "a")).await == Told::Ok(24);
    eventually("the last ones are in force", last).await;
    machine.crash(server).await;
    // What had not been written by then is forgotten, and nothing else.
    let server = machine.start(&files.config("durability: relaxed", "")).await;
    let left = Proxy::of(&server).await.one(peek("user", "a")).await;
    assert!(matches!(left, Told::Ok(24..=30)), "{left:?}");
    server.stop().await.unwrap();
}
