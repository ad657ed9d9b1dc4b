//! What a process of a client does, and how it tells the observer.

use std::{
    env,
    future::poll_fn,
    path::Path,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use fusebox_client::{
    Bulkhead, Client, ClientBuilder, Fallback, Limiter,
    layer::{BoxError, BreakerLayer, BulkheadLayer, RateLimitLayer, ResilienceLayer},
    telemetry::Event,
};
use tokio::time::{MissedTickBehavior, interval, sleep};
use tower::{Service, ServiceBuilder, ServiceExt};

use crate::{
    chance::Chance,
    client::{NUMBER, OBSERVER, ROLE, SERVER},
    millis, now,
    observer::{Pen, Said},
};

/// Namespace of all policies.
const NAMESPACE: &str = "test";

/// How often a permit is looked at that is held.
const LOOK: Duration = millis(5);

/// Plays the role that the environment names; does nothing if it names none.
pub fn play() {
    let Ok(role) = env::var(ROLE) else { return };
    let told = |name| env::var(name).unwrap();
    let number = told(NUMBER).parse().unwrap();
    let pen = Pen::of(Path::new(&told(OBSERVER)), number);
    let builder = Client::connect(told(SERVER)).namespace(NAMESPACE);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        match &*role {
            "moody" => moody(builder, number, pen).await,
            "steady" => steady(builder, pen).await,
            "survivor" => survivor(builder, pen).await,
            _ => panic!("there is no role `{role}`"),
        }
    });
}

/// Spends in every way, and holds permits. For a while it wants less than its share, so that it has leases to be stopped
/// with; then as much as it can have, so that it spends at once what the others did not see.
async fn moody(builder: ClientBuilder, number: u64, pen: Pen) {
    let client = builder.fallback(Fallback::Deny).build().unwrap();
    let mut chance = Chance::new(number);
    let (limiter, bulkhead) = (client.limiter("tokens"), client.bulkhead("permits"));
    let greedy = Arc::new(AtomicBool::new(false));
    for max_wait in [millis(0), millis(200), millis(1_500)] {
        let limiter = limiter.clone().max_wait(max_wait);
        tokio::spawn(spend(limiter, Arc::clone(&greedy), chance.fork(), pen.clone()));
    }
    tokio::spawn(spend_of_memory(limiter, Arc::clone(&greedy), chance.fork(), pen.clone()));
    let permits = Arc::new(AtomicU64::new(number << 32));
    for max_wait in [millis(0), millis(300), millis(300)] {
        let bulkhead = bulkhead.clone().max_wait(max_wait);
        tokio::spawn(hold(bulkhead, chance.fork(), Arc::clone(&permits), pen.clone()));
    }
    loop {
        sleep(millis(500) + chance.below(millis(2_500))).await;
        greedy.store(true, Ordering::Relaxed);
        sleep(chance.below(millis(1_000))).await;
        greedy.store(false, Ordering::Relaxed);
    }
}

async fn spend(limiter: Limiter, greedy: Arc<AtomicBool>, mut chance: Chance, pen: Pen) {
    loop {
        let tokens = chance.within(1..5);
        let (decided, (from, to)) = timed(limiter.acquire(tokens)).await;
        if decided.is_ok() {
            pen.says(&Said::Spent { tokens, from, to });
        }
        match (greedy.load(Ordering::Relaxed), decided) {
            (true, Ok(())) => {}
            (true, Err(_)) => sleep(chance.below(millis(20))).await,
            (false, _) => sleep(chance.below(millis(200))).await,
        }
    }
}

async fn spend_of_memory(limiter: Limiter, greedy: Arc<AtomicBool>, mut chance: Chance, pen: Pen) {
    loop {
        let from = now();
        let decided = limiter.try_acquire(1);
        if decided.is_ok() {
            pen.says(&Said::Spent { tokens: 1, from, to: now() });
        }
        if decided.is_err() || !greedy.load(Ordering::Relaxed) {
            sleep(chance.below(millis(50))).await;
        }
    }
}

/// What comes of a future, and when that was had: since its last poll began, and until that ended.
async fn timed<F: Future>(future: F) -> (F::Output, (u64, u64)) {
    let mut future = pin!(future);
    poll_fn(|context| {
        let from = now();
        future.as_mut().poll(context).map(|output| (output, (from, now())))
    })
    .await
}

async fn hold(bulkhead: Bulkhead, mut chance: Chance, permits: Arc<AtomicU64>, pen: Pen) {
    loop {
        let Ok(held) = bulkhead.acquire().await else {
            sleep(chance.below(millis(20))).await;
            continue;
        };
        let permit = permits.fetch_add(1, Ordering::Relaxed);
        let until = tokio::time::Instant::now() + chance.below(millis(1_500));
        loop {
            // What is held after this moment was held at it.
            let at = now();
            if held.is_expired() {
                break;
            }
            pen.says(&Said::Held { permit, at });
            if tokio::time::Instant::now() >= until {
                break;
            }
            sleep(LOOK).await;
        }
        drop(held);
    }
}

/// Wants 200 tokens a second, one at a time, and waits for none.
async fn steady(builder: ClientBuilder, pen: Pen) {
    let client = builder.fallback(Fallback::Deny).build().unwrap();
    let limiter = client.limiter("tokens");
    let mut beat = interval(millis(5));
    // Who is late catches up: the demand is so many a second.
    beat.set_missed_tick_behavior(MissedTickBehavior::Burst);
    pen.says(&Said::Began { at: now() });
    loop {
        beat.tick().await;
        let (limiter, pen) = (limiter.clone(), pen.clone());
        tokio::spawn(async move {
            if let (Ok(()), (from, to)) = timed(limiter.acquire(1)).await {
                pen.says(&Said::Spent { tokens: 1, from, to });
            }
        });
    }
}

/// Makes calls through a stack of layers, as a developer has it who added two lines.
async fn survivor(builder: ClientBuilder, pen: Pen) {
    let events = pen.clone();
    let client = builder.observer(move |event: &Event<'_>| tell(&events, event)).build().unwrap();
    let resilience = ResilienceLayer::new()
        .breaker(BreakerLayer::new(client.breaker("payments")))
        .rate_limit(RateLimitLayer::new(client.limiter("tokens")))
        .bulkhead(BulkheadLayer::new(client.bulkhead("permits")));
    let service = ServiceBuilder::new().layer(resilience).service_fn(async |request: u32| {
        sleep(millis(1)).await;
        Ok::<_, BoxError>(request + 1)
    });

    pen.says(&Said::Began { at: now() });
    for _ in 0..4 {
        tokio::spawn(call(service.clone(), pen.clone()));
    }
    loop {
        let counts = client.counts();
        let (memory, server, fallback) = (counts.memory, counts.server, counts.fallback);
        pen.says(&Said::Counted { memory, server, fallback });
        sleep(millis(20)).await;
    }
}

async fn call(mut service: impl Service<u32, Response = u32, Error = BoxError>, pen: Pen) {
    let mut beat = interval(millis(5));
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beat.tick().await;
        let since = now();
        let called = match service.ready().await {
            Ok(service) => service.call(1).await,
            Err(error) => Err(error),
        };
        pen.says(&match called {
            Ok(_) => Said::Called { took: Duration::from_nanos(now() - since) },
            Err(error) => Said::Failed { error: error.to_string() },
        });
    }
}

fn tell(pen: &Pen, event: &Event<'_>) {
    let name = match event {
        Event::Connected { .. } => "connected".to_owned(),
        Event::Disconnected { .. } => "disconnected".to_owned(),
        Event::Degraded { policy, begins: true, .. } => format!("{policy} degraded"),
        Event::Degraded { policy, begins: false, .. } => format!("{policy} recovered"),
        other => format!("{other:?}"),
    };
    pen.says(&Said::Event { name });
}
