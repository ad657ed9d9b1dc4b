//! What a decision costs: leased, through a circuit, refused, and by a layer.

use std::{
    cell::Cell,
    future::{Future, Ready, ready},
    num::NonZeroU32,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use failsafe::CircuitBreaker;
use fusebox_client::{
    Breaker, Limiter, Timeout,
    breaker::Local,
    layer::{BreakerLayer, RateLimitLayer, ResilienceLayer, TimeoutLayer},
};
use governor::{
    Quota, RateLimiter,
    clock::{Clock, DefaultClock},
};
use recloser::Recloser;
use tower::{BoxError, Layer, Service, service_fn};

use super::{
    Site,
    contest::{Contestant, Took, hold},
};
use crate::{
    Options, Result, print,
    process::Server,
    table::{Table, figure},
};

/// Keys in turn, as many as fit the caches.
const KEYS: usize = 1_000;

/// The limit of the policy `fast`, by the second: more than is ever asked for.
const LIMIT: NonZeroU32 = NonZeroU32::new(1_000_000_000).unwrap();

/// What a breaker may cost beside its readings of the clock, in nanoseconds.
const BESIDE_CLOCK: f64 = 20.0;

/// Part of `--seconds` that one row takes.
const PART: f64 = 0.2;

pub(super) async fn measure(options: &Options, server: &Server) -> Result<()> {
    let site = Site::new(server).await?;
    let each = Duration::from_secs_f64(options.seconds * PART);
    eprintln!("the client: decisions of leases");
    leases(&site, each)?;
    eprintln!("the client: circuits");
    circuits(&site, each)?;
    eprintln!("the client: layers");
    layers(&site, each)?;
    site.end().await;
    Ok(())
}

/// A table of what each took, beside the rival of each.
struct Outcome {
    rows: Vec<(&'static str, Took)>,
}

impl Outcome {
    fn of(contestants: &[Contestant], each: Duration) -> Result<Self> {
        let took = hold(contestants, each)?;
        let rows = contestants.iter().map(|contestant| contestant.name).zip(took).collect();
        Ok(Self { rows })
    }

    fn took(&self, name: &str) -> Took {
        self.rows.iter().find(|(row, _)| *row == name).map(|(_, took)| *took).unwrap_or_default()
    }

    fn table(&self, title: &str, rival: impl Fn(&str) -> Option<(&'static str, f64)>) -> Table {
        let columns = [
            "ns for each",
            "1 thread",
            "to its rival",
            "2 threads, each",
            "to its rival",
            "wanted",
            "kept",
        ];
        let mut table = Table::new(title, &columns);
        for (name, took) in &self.rows {
            let rival = rival(name).map(|(rival, most)| (rival, self.took(rival), most));
            let ratio = |value: fn(&Took) -> f64| match &rival {
                Some((_, rival, _)) => format!("{:.2}", value(took) / value(rival)),
                None => "–".into(),
            };
            let wanted = match &rival {
                Some((rival, _, most)) if most.is_finite() => format!("<= {most} × {rival}"),
                _ => "–".into(),
            };
            let kept = match &rival {
                Some((_, rival, most)) if most.is_finite() => {
                    is_kept(took.alone <= most * rival.alone).into()
                }
                _ => String::from("–"),
            };
            let short = if took.share < 0.999 {
                format!("{name} ({:.1}% as wanted)", 100.0 * took.share)
            } else {
                (*name).to_owned()
            };
            table.row([
                short,
                figure(took.alone),
                ratio(|took| took.alone),
                figure(took.together),
                ratio(|took| took.together),
                wanted,
                kept,
            ]);
        }
        table
    }
}

fn is_kept(kept: bool) -> &'static str {
    if kept { "yes" } else { "**no**" }
}

/// What a future says that is ready at once.
fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

fn names() -> Arc<[String]> {
    (0..KEYS).map(|key| format!("tenant-{key:07}")).collect()
}

/// A key after the other.
fn in_turn(names: &Arc<[String]>) -> impl FnMut() -> usize + Send + use<> {
    let (mut next, count) = (0, names.len());
    move || {
        next = if next + 1 == count { 0 } else { next + 1 };
        next
    }
}

fn leases(site: &Site, each: Duration) -> Result<()> {
    const DIRECT: &str = "`governor`: `check`";
    const KEYED: &str = "`governor`: `check_key`";
    const TRY: &str = "leased: `try_acquire`";
    const TRY_SHARED: &str = "the same, one handle for all threads";
    const ACQUIRE: &str = "leased: `acquire`, polled once";
    const TRY_FOR: &str = "leased: `try_acquire_for`";

    let limiter = site.client.limiter("fast");
    let names = names();
    warm(&limiter, &names, site)?;
    let direct = Arc::new(RateLimiter::direct(Quota::per_second(LIMIT)));
    let keyed = Arc::new(RateLimiter::keyed(Quota::per_second(LIMIT)));
    let shared = Arc::new(limiter.clone());
    let own = move || {
        let limiter = limiter.clone();
        move || limiter.try_acquire(1).is_ok()
    };
    let (acquiring, leased) = (Limiter::clone(&shared), Limiter::clone(&shared));
    let (names_of_governor, names_of_lease) = (Arc::clone(&names), names);
    let contestants = [
        Contestant::new(DIRECT, move || {
            let direct = Arc::clone(&direct);
            move || direct.check().is_ok()
        }),
        Contestant::new(TRY, own),
        Contestant::new(TRY_SHARED, move || {
            let limiter = Arc::clone(&shared);
            move || limiter.try_acquire(1).is_ok()
        }),
        Contestant::new(ACQUIRE, move || {
            let limiter = acquiring.clone();
            move || matches!(now(limiter.acquire(1)), Some(Ok(())))
        }),
        Contestant::new(KEYED, move || {
            let (keyed, names) = (Arc::clone(&keyed), Arc::clone(&names_of_governor));
            let mut next = in_turn(&names);
            move || keyed.check_key(&names[next()]).is_ok()
        }),
        Contestant::new(TRY_FOR, move || {
            let (limiter, names) = (leased.clone(), Arc::clone(&names_of_lease));
            let mut next = in_turn(&names);
            move || limiter.try_acquire_for(&names[next()], 1).is_ok()
        }),
    ];
    let outcome = Outcome::of(&contestants, each)?;
    let mut table = outcome.table("A leased decision, beside `governor`", |name| match name {
        DIRECT | KEYED => None,
        TRY_FOR => Some((KEYED, 1.5)),
        _ => Some((DIRECT, 1.5)),
    });
    table.note(&format!(
        "{NOTE} `governor`'s limit is as high; it decides for one process, a lease is a part of what the server debited. \
         Keyed: {KEYS} keys in turn, each with a lease of its own."
    ));
    print(&table.take_text())
}

const NOTE: &str = "In ns. One thread: the best of turns of 2 ms in which all took part; two: of each, the turn in the \
                    middle, at which both began together.";

/// Has leases of all keys, that last for as many decisions as will be made.
fn warm(limiter: &Limiter, names: &[String], site: &Site) -> Result<()> {
    let handle = site.handle()?;
    let limiter = limiter.clone().max_wait(Duration::from_secs(5));
    let names = names.to_vec();
    let done = handle.spawn(async move {
        limiter.acquire(1).await?;
        for name in &names {
            limiter.acquire_for(name, 1).await?;
        }
        Ok::<_, fusebox_client::Rejected>(())
    });
    // The runtime is another one, so this thread may wait.
    let (tell, told) = std::sync::mpsc::channel();
    handle.spawn(async move {
        let _ = tell.send(done.await);
    });
    told.recv()???;
    Ok(())
}

fn circuits(site: &Site, each: Duration) -> Result<()> {
    const CLOCK: &str = "two readings of the clock";
    const RECLOSER: &str = "`recloser`: `call`, closed";
    const FAILSAFE: &str = "`failsafe`: `call`, closed";
    const CLOSED: &str = "closed: `try_admit`, `success`";
    const SHARED: &str = "the same, one handle for all threads";
    const CALL: &str = "closed: `call`, polled once";
    const OPEN: &str = "open: `try_admit`, refused";
    const OPEN_RECLOSER: &str = "`recloser`: `call`, refused";

    let breaker = site.client.breaker("target");
    let refusing = open(site)?;
    let recloser = Arc::new(Recloser::custom().build());
    let opened =
        Arc::new(Recloser::custom().closed_len(10).open_wait(Duration::from_secs(3_600)).build());
    for _ in 0..1_000 {
        let _ = opened.call(|| Err::<(), ()>(()));
    }
    let safe = failsafe::Config::new().build();
    let shared = Arc::new(breaker.clone());
    let calling = breaker.clone();
    let contestants = [
        Contestant::new(CLOCK, || {
            let clock = DefaultClock::default();
            move || clock.now() <= clock.now()
        }),
        Contestant::new(RECLOSER, move || {
            let recloser = Arc::clone(&recloser);
            move || recloser.call(|| Ok::<(), ()>(())).is_ok()
        }),
        Contestant::new(FAILSAFE, move || {
            let safe = safe.clone();
            move || safe.call(|| Ok::<(), ()>(())).is_ok()
        }),
        Contestant::new(CLOSED, move || {
            let breaker = breaker.clone();
            move || passes(&breaker)
        }),
        Contestant::new(SHARED, move || {
            let breaker = Arc::clone(&shared);
            move || passes(&breaker)
        }),
        Contestant::new(CALL, move || {
            let breaker = calling.clone();
            move || matches!(now(breaker.call(ready(Ok::<(), ()>(())))), Some(Ok(())))
        }),
        Contestant::new(OPEN_RECLOSER, move || {
            let opened = Arc::clone(&opened);
            move || opened.call(|| Ok::<(), ()>(())).is_err()
        }),
        Contestant::new(OPEN, move || {
            let breaker = refusing.clone();
            move || breaker.try_admit().is_err()
        }),
    ];
    let outcome = Outcome::of(&contestants, each)?;
    let took = |name| outcome.took(name).alone;
    let faster = if took(RECLOSER) < took(FAILSAFE) { RECLOSER } else { FAILSAFE };
    let mut table =
        outcome.table("A call through a circuit, beside other breakers", |name| match name {
            CLOCK | RECLOSER | FAILSAFE | OPEN_RECLOSER => None,
            OPEN => Some((CLOSED, 0.5)),
            _ => Some((faster, 1.0)),
        });
    let most = took(CLOCK) + BESIDE_CLOCK;
    table.note(&format!(
        "{NOTE} Wanted too: at most two readings of the clock and {BESIDE_CLOCK} ns, which is {}; {}: kept: {}. \
         `recloser` and `failsafe` read no clock for a call that goes well, and so neither know how long it took nor \
         forget what is long past; ours counts by time, and tells operators of latencies. A refusal reads the clock once, \
         since it ends by itself, counts itself, and holds names and evidence by two counts.",
        figure(most),
        figure(took(CLOSED)),
        is_kept(took(CLOSED) <= most),
    ));
    print(&table.take_text())
}

#[inline]
fn passes(breaker: &Breaker) -> bool {
    match breaker.try_admit() {
        Ok(permit) => {
            permit.success();
            true
        }
        Err(_) => false,
    }
}

/// A circuit that this process has seen fail, and that stays open for as long as this takes.
fn open(site: &Site) -> Result<Breaker> {
    let hour = Duration::from_secs(3_600);
    let local = Local::default().consecutive_failures(1).open_for(hour);
    let breaker = site.client.breaker("target").key("down").local(local)?;
    while let Ok(permit) = breaker.try_admit() {
        permit.failure("down");
    }
    Ok(breaker)
}

/// What is called, which does nothing.
type Bare = Ready<Result<u64, BoxError>>;

fn layers(site: &Site, each: Duration) -> Result<()> {
    const BARE: &str = "a service that does nothing";
    const LIMITED: &str = "rate limit";
    const BROKEN: &str = "breaker";
    const BOTH: &str = "resilience: breaker, rate limit";
    const TIMED: &str = "timeout alone, whose timer is tokio's";
    const ALL: &str = "resilience: breaker, rate limit, timeout";

    fn bare(request: u64) -> Bare {
        ready(Ok(request))
    }

    fn calling<S>(mut service: S) -> impl FnMut() -> bool + Send
    where
        S: Service<u64, Response = u64> + Send,
    {
        let request = Cell::new(0);
        move || {
            request.set(request.get() + 1);
            let mut cx = Context::from_waker(Waker::noop());
            let is_ready = service.poll_ready(&mut cx).is_ready();
            is_ready && matches!(now(service.call(request.get())), Some(Ok(_)))
        }
    }

    let limit = RateLimitLayer::new(site.client.limiter("fast"));
    // Its own circuit: that of the other table has a breaker of this process's own settings in one key.
    let breaker =
        BreakerLayer::new(site.client.breaker("target").key("layer").local(Local::default())?);
    let timeout = TimeoutLayer::new(Timeout::new(Duration::from_secs(60)));
    let both = ResilienceLayer::new().rate_limit(limit.clone()).breaker(breaker.clone());
    let (alone, all, handle) = (timeout, both.clone().timeout(timeout), site.handle()?);
    let timers = handle.clone();
    let contestants = [
        Contestant::new(BARE, || calling(service_fn(bare))),
        Contestant::new(LIMITED, move || calling(limit.layer(service_fn(bare)))),
        Contestant::new(BROKEN, move || calling(breaker.layer(service_fn(bare)))),
        Contestant::new(BOTH, move || calling(both.layer(service_fn(bare)))),
        Contestant::new(TIMED, move || {
            let (timers, mut call) = (timers.clone(), calling(alone.layer(service_fn(bare))));
            move || {
                let _entered = timers.enter();
                call()
            }
        }),
        Contestant::new(ALL, move || {
            let (handle, mut call) = (handle.clone(), calling(all.layer(service_fn(bare))));
            move || {
                let _entered = handle.enter();
                call()
            }
        }),
    ];
    let outcome = Outcome::of(&contestants, each)?;
    let bare = outcome.took(BARE).alone;
    let over = |name| figure((outcome.took(name).alone - bare).max(0.0));
    let mut table = outcome
        .table("A call through layers of tower, beside the service alone", |name| {
            (name != BARE).then_some((BARE, f64::INFINITY))
        });
    table.note(&format!(
        "{NOTE} Over the service alone: {} ns by the rate limit, {} by the breaker, {} by both; the timeout alone {}, of \
         which entering the runtime is a part.",
        over(LIMITED),
        over(BROKEN),
        over(BOTH),
        over(TIMED),
    ));
    print(&table.take_text())
}
