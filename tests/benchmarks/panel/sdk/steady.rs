//! One process end to end: how much of a limit it uses, and what it says to the server for that.

use std::{
    process,
    time::{Duration, Instant},
};

use fusebox_client::Limiter;
use tokio::time::sleep;

use super::{Site, cores};
use crate::{
    Options, Result,
    machine::Meter,
    print,
    process::Server,
    table::{Table, figure},
};

/// The limit of the policy `steady`, by the second, and its burst.
const LIMIT: f64 = 10_000.0;

/// Before it counts: until the burst is spent, and again until demand is known.
const WARM_UP: Duration = Duration::from_secs(3);

/// So many times faster the burst is spent.
const WARMER: f64 = 3.0;

/// A message for at least so many decisions.
const DECISIONS: f64 = 100.0;

/// Pause of who asks at a rate: what is due is asked for at once then.
const PAUSE: Duration = Duration::from_millis(1);

/// What one run did.
struct Run {
    took: Duration,
    asked: u64,
    allowed: u64,
    messages: u64,
    client: Duration,
    server: Duration,
}

pub(super) async fn measure(options: &Options, server: &Server) -> Result<()> {
    let columns = [
        "`acquire`",
        "decisions/s",
        "allowed/s",
        "of the limit",
        "messages/s",
        "messages/decision",
        "CPU of the process, µs/decision",
        "of the server",
        "messages <= 1/100",
    ];
    let mut table = Table::new("One process end to end", &columns);
    for (name, policy, rate) in [
        ("10,000/s asked of 10,000/s", "steady", LIMIT),
        ("11,000/s asked of 10,000/s", "steady", 1.1 * LIMIT),
        ("as fast as one thread can, of 1,000,000,000/s", "fast", f64::INFINITY),
    ] {
        eprintln!("the client: {name}");
        let site = Site::new(server).await?;
        let limiter = site.client.limiter(policy);
        // The burst is spent before, so that what is had is what refills.
        ask(&limiter, rate * WARMER, WARM_UP).await;
        ask(&limiter, rate, WARM_UP).await;
        let before = site.client.counts().messages_sent;
        let (own, other) = (Meter::start(process::id())?, Meter::start(server.pid())?);
        let begin = Instant::now();
        let (asked, allowed) = ask(&limiter, rate, Duration::from_secs_f64(options.seconds)).await;
        let took = begin.elapsed();
        let run = Run {
            took,
            asked,
            allowed,
            messages: site.client.counts().messages_sent - before,
            client: own.stop()?,
            server: other.stop()?,
        };
        site.end().await;
        table.row(run.fields(name, (policy == "steady").then_some(LIMIT)));
        print(&table.take_text())?;
    }
    table.note(&format!(
        "One process, whose client has a thread of its own, and a server in memory, on {} cores. Messages: all that the \
         client sent in the {} s that were measured, heartbeats not among them. CPU: of all threads of the process, who \
         paces the asks among them.",
        cores(),
        options.seconds,
    ));
    print(&table.take_text())
}

impl Run {
    fn fields(&self, name: &str, limit: Option<f64>) -> [String; 9] {
        let Self { took, asked, allowed, messages, client, server } = self;
        let (asked, allowed, messages) = (*asked as f64, *allowed as f64, *messages as f64);
        let each = |cpu: &Duration| figure(cpu.as_secs_f64() * 1e6 / asked);
        let seconds = took.as_secs_f64();
        [
            name.to_owned(),
            figure(asked / seconds),
            figure(allowed / seconds),
            limit.map_or_else(
                || "–".into(),
                |limit| format!("{:.2}%", 100.0 * allowed / seconds / limit),
            ),
            figure(messages / seconds),
            format!("1/{}", figure(asked / messages)),
            each(client),
            each(server),
            (if messages * DECISIONS <= asked { "yes" } else { "**no**" }).into(),
        ]
    }
}

/// Asks at a rate for so long; how often, and how often it was allowed.
async fn ask(limiter: &Limiter, rate: f64, length: Duration) -> (u64, u64) {
    let begin = Instant::now();
    let (mut asked, mut allowed) = (0, 0);
    loop {
        let passed = begin.elapsed();
        if passed >= length {
            return (asked, allowed);
        }
        // At no rate: as many as take a millisecond or so.
        let due =
            if rate.is_finite() { (passed.as_secs_f64() * rate) as u64 } else { asked + 20_000 };
        while asked < due {
            asked += 1;
            allowed += u64::from(limiter.acquire(1).await.is_ok());
        }
        if rate.is_finite() {
            sleep(PAUSE).await;
        }
    }
}
