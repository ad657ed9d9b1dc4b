//! The language of the scripts.

use std::{collections::BTreeMap, fmt::Write, time::Duration};

use datadriven::TestCase;
use fusebox_core::{Admission, Charging, Cost, Reason, TokenBucket, Verdict};

use crate::engine::{Engine, Named};

/// A script being run against an engine.
///
/// - `policy name=N limit=L per=D [burst=B] [max_debt=M]`: makes or changes a policy
/// - `acquire [charging=each-alone|always]`, then lines of `POLICY KEY COST [estimated]`
/// - `settle`, then a line of `POLICY KEY charged=C actual=A`
/// - `advance by=D`: time goes by
/// - `restart`: a clean stop and a start
/// - `cells`: how many are remembered after housekeeping
pub struct Script {
    engine: Box<dyn Engine>,
    policies: BTreeMap<String, (TokenBucket, u64)>,
}

impl Script {
    pub fn new(engine: Box<dyn Engine>) -> Self {
        Self { engine, policies: BTreeMap::new() }
    }

    pub fn run(&mut self, case: &TestCase) -> String {
        let arguments = Arguments(&case.args);
        let input = case.input.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        match case.directive.as_str() {
            "policy" => self.policy(&arguments),
            "acquire" => self.acquire(&arguments, &input.collect::<Vec<_>>()),
            "settle" => input.map(|line| self.settle(&line)).collect(),
            "advance" => {
                self.engine.advance(arguments.duration("by").expect("advance by=DURATION"));
                String::new()
            }
            "restart" => {
                self.engine.restart();
                String::new()
            }
            "cells" => format!("{}\n", self.engine.cells()),
            other => panic!("no command `{other}`"),
        }
    }

    fn policy(&mut self, arguments: &Arguments<'_>) -> String {
        let limit = arguments.number("limit").expect("limit=NUMBER");
        let per = arguments.duration("per").expect("per=DURATION");
        let burst = arguments.number("burst").unwrap_or(limit);
        match TokenBucket::new(limit, per, burst) {
            Ok(bucket) => {
                let name = arguments.text("name").expect("name=NAME").to_owned();
                let max_debt = arguments.number("max_debt").unwrap_or(burst);
                self.policies.insert(name, (bucket, max_debt));
                self.engine.policies(&self.policies);
                String::new()
            }
            Err(error) => format!("{error}\n"),
        }
    }

    fn acquire(&mut self, arguments: &Arguments<'_>, lines: &[Vec<&str>]) -> String {
        let charging = match arguments.text("charging") {
            None => Charging::AllOrNothing,
            Some("each-alone") => Charging::EachAlone,
            Some("always") => Charging::Always,
            Some(other) => panic!("no charging `{other}`"),
        };
        let asks: Vec<_> = lines
            .iter()
            .map(|line| {
                let (named, rest) = named(line);
                let cost = rest[0].parse().expect("a cost");
                (named, Cost { tokens: cost, estimated: rest.get(1) == Some(&"estimated") })
            })
            .collect();
        let decision = self.engine.acquire(&asks, charging);
        let mut text = if decision.allowed { "allow\n" } else { "deny\n" }.to_owned();
        for ((named, _), verdict) in asks.iter().zip(&decision.verdicts) {
            writeln!(text, "{} {}: {}", named.policy, named.key, shown(verdict)).unwrap();
        }
        text
    }

    fn settle(&mut self, line: &[&str]) -> String {
        let (named, rest) = named(line);
        let number = |prefix| {
            let value = rest.iter().find_map(|word| word.strip_prefix(prefix));
            value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{prefix}NUMBER"))
        };
        let settled = self.engine.settle(&named, number("charged="), number("actual="));
        let (refunded, owed, dropped) = settled;
        format!("refunded {refunded}, owed {owed}, dropped {dropped}\n")
    }
}

fn named<'a, 'b>(line: &'b [&'a str]) -> (Named<'a>, &'b [&'a str]) {
    let [policy, key, rest @ ..] = line else { panic!("POLICY KEY …, not {line:?}") };
    (Named { policy, key }, rest)
}

fn shown(verdict: &Verdict) -> String {
    let left = format!("{} of {} left", verdict.remaining, verdict.limit);
    let full = match verdict.reset_after {
        Duration::ZERO => "full".to_owned(),
        wait => format!("full in {wait:?}"),
    };
    match verdict.admission {
        Admission::Allow => format!("allow, {left}, {full}"),
        Admission::Deny { reason, retry_after } => {
            let reason = match reason {
                Reason::RateLimited => "rate limited",
                Reason::Blocked => "blocked",
            };
            let retry = match retry_after {
                Some(wait) => format!("retry in {wait:?}"),
                None => "no retry".to_owned(),
            };
            format!("deny ({reason}), {left}, {retry}, {full}")
        }
    }
}

struct Arguments<'a>(&'a std::collections::HashMap<String, Vec<String>>);

impl Arguments<'_> {
    fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.first().map(String::as_str)
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.text(name).map(|text| text.parse().expect("a number"))
    }

    fn duration(&self, name: &str) -> Option<Duration> {
        let text = self.text(name)?;
        let split = text.find(|c: char| !c.is_ascii_digit()).expect("a unit");
        let (amount, unit) = text.split_at(split);
        let amount = amount.parse().expect("a number");
        Some(match unit {
            "ns" => Duration::from_nanos(amount),
            "us" => Duration::from_micros(amount),
            "ms" => Duration::from_millis(amount),
            "s" => Duration::from_secs(amount),
            "m" => Duration::from_secs(amount * 60),
            "h" => Duration::from_secs(amount * 3_600),
            "d" => Duration::from_secs(amount * 86_400),
            other => panic!("no unit `{other}`"),
        })
    }
}
