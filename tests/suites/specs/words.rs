//! The words that scripts are written in.

use std::{collections::HashMap, fmt::Write, time::Duration};

use fusebox_core::{Admission, Reason, Verdict};

/// What stands beside a command: `by=10s`.
pub struct Arguments<'a>(pub &'a HashMap<String, Vec<String>>);

impl Arguments<'_> {
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.first().map(String::as_str)
    }

    pub fn duration(&self, name: &str) -> Option<Duration> {
        self.text(name).map(duration)
    }
}

/// A line of words: `alice 3 estimated`, `read actual=7 partial`.
pub struct Line<'a>(Vec<&'a str>);

impl<'a> Line<'a> {
    pub fn new(line: &'a str) -> Self {
        Self(line.split(' ').collect())
    }

    /// The word at that place; `""` is the empty one.
    pub fn word(&self, index: usize) -> &'a str {
        let word = self.0.get(index).unwrap_or_else(|| panic!("no word {index} in {:?}", self.0));
        if *word == "\"\"" { "" } else { word }
    }

    pub fn has(&self, word: &str) -> bool {
        self.0.contains(&word)
    }

    /// The number after `NAME=`.
    pub fn number(&self, name: &str) -> Option<u64> {
        let value = self.0.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))?;
        Some(value.parse().unwrap_or_else(|_| panic!("{name}=NUMBER, not `{value}`")))
    }
}

/// `10s`, `250ms`, `1d`.
pub fn duration(text: &str) -> Duration {
    let split = text.find(|c: char| !c.is_ascii_digit()).expect("a unit");
    let (amount, unit) = text.split_at(split);
    let amount = amount.parse().expect("a number");
    match unit {
        "ns" => Duration::from_nanos(amount),
        "us" => Duration::from_micros(amount),
        "ms" => Duration::from_millis(amount),
        "s" => Duration::from_secs(amount),
        "m" => Duration::from_secs(amount * 60),
        "h" => Duration::from_secs(amount * 3_600),
        "d" => Duration::from_secs(amount * 86_400),
        other => panic!("no unit `{other}`"),
    }
}

/// `2026-03-29T00:30:00+01:00`, as time since the Unix epoch.
pub fn wall(text: &str) -> Duration {
    let time: prost_types::Timestamp = text.parse().expect("a time as RFC 3339 writes it");
    let seconds = time.seconds.try_into().expect("a time after 1970");
    Duration::new(seconds, time.nanos.try_into().expect("nanoseconds"))
}

/// A verdict in a sentence.
pub fn shown(verdict: &Verdict) -> String {
    let mut text = match verdict.admission {
        Admission::Allow => "allow".to_owned(),
        Admission::Deny { reason, .. } => format!("deny ({})", named(reason)),
    };
    if verdict.shadow {
        text.insert_str(0, "shadow: ");
    }
    write!(text, ", {} of {} left", verdict.remaining, verdict.limit).expect("a string grows");
    if let Admission::Deny { retry_after, .. } = verdict.admission {
        match retry_after {
            Some(wait) => write!(text, ", retry in {wait:?}").expect("a string grows"),
            None => text.push_str(", no retry"),
        }
    }
    match verdict.reset_after {
        Duration::ZERO => text.push_str(", full"),
        wait => write!(text, ", full in {wait:?}").expect("a string grows"),
    }
    text
}

fn named(reason: Reason) -> &'static str {
    match reason {
        Reason::RateLimited => "rate limited",
        Reason::ConcurrencyLimited => "concurrency limited",
        Reason::RetryBudgetExhausted => "retry budget exhausted",
        Reason::ReservedForPriority => "reserved for priority",
        Reason::OverflowBucket => "overflow bucket",
        Reason::LineFull => "line full",
        Reason::Blocked => "blocked",
    }
}
