//! Rules of Envoy's rate limit service: a file of as many as wanted, and what many of them cost to hold.

use std::{fmt::Write, time::Instant};

use fusebox_proto::{
    Entry,
    envoy::{
        extensions::common::ratelimit::v3::RateLimitDescriptor,
        service::ratelimit::v3::rate_limit_response::rate_limit::Unit,
    },
};
use tokio::time::sleep;

use crate::{
    Options, Result,
    machine::Memory,
    print,
    process::{Engine, Home, LOOK, PATIENCE},
    table::{Table, count, figure},
};

/// The domain of all of them.
pub(crate) const DOMAIN: &str = "bench";

/// What each allows: never less than is asked.
pub(crate) const PER_UNIT: u32 = 1_000_000_000;

/// How many the part `rules` loads, one after another.
const COUNTS: [u32; 3] = [10, 1_000, 10_000];

/// The rules that descriptors meet, the first by the first.
const MET: [&str; 8] = [
    "key: remote_address",
    "key: path, value: /api/v1/orders, descriptors: [{key: user",
    "key: user",
    "key: method, value: POST",
    "key: tenant",
    "key: path, value: /api/v1/*",
    "key: api_key",
    "key: user_agent, value: mobile/*",
];

/// The rules beside these: all of the key that the first descriptor has.
#[derive(Clone, Copy)]
pub(crate) enum Others {
    /// Each of a value that is never asked.
    Exact,
    /// Each of a prefix, which the keys of [`decide`](crate::decide) have one of.
    Prefixes,
}

/// A file of so many rules.
pub(crate) fn file(rules: u32, others: Others) -> String {
    let mut file = format!("domain: {DOMAIN}\ndescriptors:\n");
    let (host, star) = match others {
        Others::Exact => ("host", ""),
        Others::Prefixes => ("tenant", "*"),
    };
    for index in 0..rules {
        let (unit, _) = unit(index);
        let limit = format!("rate_limit: {{unit: {unit}, requests_per_unit: {PER_UNIT}}}");
        let rule = match MET.get(index as usize) {
            Some(rule) => format!("{rule}, {limit}{}", if rule.contains('[') { "}]" } else { "" }),
            None => format!("key: remote_address, value: \"{host}-{index:07}{star}\", {limit}"),
        };
        // Writing to a string does not fail.
        let _ = writeln!(file, "  - {{{rule}}}");
    }
    file
}

/// The unit of the rule of that descriptor, as files call it and as answers do: long enough that what is counted
/// in it is written.
pub(crate) fn unit(descriptor: u32) -> (&'static str, Unit) {
    if descriptor.is_multiple_of(2) { ("minute", Unit::Minute) } else { ("hour", Unit::Hour) }
}

/// A descriptor of the request of that value: as an Envoy makes it of a call's headers.
pub(crate) fn descriptor(descriptor: u32, value: u32) -> RateLimitDescriptor {
    let of = |key: &str, value: String| Entry { key: key.into(), value };
    let path = || of("path", "/api/v1/orders".into());
    let user = || of("user", format!("user-{value:07}"));
    let entries = match descriptor {
        0 => vec![of("remote_address", format!("10.0.{:03}.{:03}", value / 256, value % 256))],
        1 => vec![path(), user()],
        2 => vec![user()],
        3 => vec![of("method", "POST".into())],
        4 => vec![of("tenant", format!("tenant-{:02}", value % 100))],
        5 => vec![of("path", "/api/v1/baskets".into())],
        6 => vec![of("api_key", format!("key-{value:07}"))],
        _ => vec![of("user_agent", "mobile/7.41".into())],
    };
    RateLimitDescriptor { entries, ..RateLimitDescriptor::default() }
}

const COLUMNS: [&str; 6] =
    ["rules", "start to ready", "a changed file in force after", "RSS", "`/metrics`", "in"];

pub(crate) async fn measure(options: &Options) -> Result<()> {
    let mut table = Table::new("Files of rules of Envoy's rate limit service", &COLUMNS);
    for rules in COUNTS {
        eprintln!("{rules} rules");
        table.row(measure_count(options, rules).await?);
        print(&table.take_text())?;
    }
    table.note(
        "In memory. One rule of the file is changed; what the server takes to settle after the write is part of it. RSS \
         after that, in MB. `/metrics` in kB, and the time until all of it was read.",
    );
    print(&table.take_text())
}

async fn measure_count(options: &Options, rules: u32) -> Result<Vec<String>> {
    let home = Home::new(options, Engine::Memory, rules)?;
    let server = home.start().await.map_err(|error| format!("not started: {error}"))?;
    let loads = async || -> Result<usize> {
        let metrics = server.get("/metrics").await?;
        let line = "fusebox_ratelimit_config_loads_total{result=\"ok\"} ";
        let count = metrics.lines().find_map(|told| told.strip_prefix(line));
        Ok(count.ok_or("the server does not tell how often it loaded rules")?.parse()?)
    };
    let before = loads().await?;
    home.write_rules(&file(rules, Others::Exact).replacen("minute", "day", 1))?;
    let begin = Instant::now();
    while loads().await? == before {
        if begin.elapsed() > PATIENCE {
            return Err("a changed file is never in force".into());
        }
        sleep(LOOK).await;
    }
    let reload = begin.elapsed();
    let memory = Memory::of(server.pid())?;
    let begin = Instant::now();
    let metrics = server.get("/metrics").await?.len();
    let scrape = begin.elapsed();
    let start = server.start;
    server.stop().await?;
    Ok(vec![
        count(rules),
        figure(start.as_secs_f64()) + " s",
        figure(reload.as_secs_f64()) + " s",
        figure(memory.resident as f64 / 1e6),
        figure(metrics as f64 / 1e3),
        figure(scrape.as_secs_f64() * 1e3) + " ms",
    ])
}
