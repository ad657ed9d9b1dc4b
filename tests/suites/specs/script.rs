//! The language of the scripts.

use std::{collections::BTreeMap, fmt::Write, sync::Arc, time::Duration};

use datadriven::TestCase;
use fusebox_core::{Ask, Charging, Purpose, Time};
use fusebox_server::{
    app::{GrantId, Priority},
    catalogue::{Catalogue, Limiter},
    storage::{CellAsk, Charge, Decided, Holds, Judge, OpenGrant, OpenPart, Settlement},
};

use crate::{
    engine::Engine,
    policies::Policies,
    words::{Arguments, Line, shown, wall},
};

/// Of all policies.
const NAMESPACE: &str = "spec";

/// A script being run against an engine.
///
/// - `without ENGINE..`: first in a script, with a comment that says why
/// - `policy`, then policies as a configuration has them below `policies`: makes or changes them
/// - `drop policy=NAME`: the configuration has it no more
/// - `acquire [charging=each-alone|always] [priority=critical|bulk] [retry] [grant=NAME]`, then lines of
///   `POLICY KEY COST [estimated|peek] [limit=L] [quota]`, `POLICY KEY -CREDIT` or
///   `POLICY KEY lease=WANTED clients=C`; with `grant`, what was charged can be settled
/// - `settle`, then lines of `GRANT [actual=TOTAL] [returned=R] [partial]`: an estimate tells its cost so far,
///   a lease what was not spent, a permit nothing
/// - `attest`, then lines of `GRANT`: a holder tells of permits that a crash forgot
/// - `advance by=D`: time goes by
/// - `wall [on=D] [back=D]`, or then a line of a time: the wall clock is set
/// - `restart [crash]`: a clean stop, or none, and a start
/// - `cells`: how many are not full, after housekeeping
pub struct Script {
    engine: Box<dyn Engine>,
    policies: Policies,
    grants: BTreeMap<String, Grant>,
}

struct Grant {
    parts: Vec<OpenPart>,
    is_open: bool,
}

impl Script {
    pub fn new(engine: Box<dyn Engine>) -> Self {
        Self { engine, policies: Policies::default(), grants: BTreeMap::new() }
    }

    pub fn run(&mut self, case: &TestCase) -> String {
        let arguments = Arguments(&case.args);
        let lines = case.input.lines().map(Line::new);
        match case.directive.as_str() {
            "without" => String::new(),
            "policy" => self.policy(&case.input),
            "drop" => {
                let name = arguments.text("policy").expect("policy=NAME");
                self.policies.drop(NAMESPACE, name);
                self.configure().expect("what was one stays one");
                String::new()
            }
            "acquire" => self.acquire(&arguments, &lines.collect::<Vec<_>>()),
            "settle" => lines.map(|line| self.settle(&line)).collect(),
            "attest" => lines.map(|line| self.attest(&line)).collect(),
            "advance" => {
                self.engine.clock().advance(arguments.duration("by").expect("advance by=DURATION"));
                String::new()
            }
            "wall" => {
                self.set_wall(&arguments, case.input.trim());
                String::new()
            }
            "restart" => {
                self.restart(arguments.has("crash"));
                String::new()
            }
            "cells" => format!("{}\n", self.engine.cells()),
            other => panic!("no command `{other}`"),
        }
    }

    fn policy(&mut self, text: &str) -> String {
        let before = self.policies.clone();
        self.policies.write(NAMESPACE, text);
        match self.configure() {
            Ok(()) => String::new(),
            Err(message) => {
                self.policies = before;
                message
            }
        }
    }

    fn configure(&mut self) -> Result<(), String> {
        self.engine.configure(&self.policies.config()?, &self.open());
        Ok(())
    }

    fn acquire(&mut self, arguments: &Arguments<'_>, lines: &[Line<'_>]) -> String {
        let charging = match arguments.text("charging") {
            None => Charging::AllOrNothing,
            Some("each-alone") => Charging::EachAlone,
            Some("always") => Charging::Always,
            Some(other) => panic!("no charging `{other}`"),
        };
        let priority = match arguments.text("priority") {
            None => Priority::Normal,
            Some("critical") => Priority::Critical,
            Some("bulk") => Priority::Bulk,
            Some(other) => panic!("no priority `{other}`"),
        };
        let (catalogue, now) = (self.engine.catalogue(), self.engine.now());
        let (mut asks, mut ends) = (Vec::new(), Vec::new());
        for line in lines {
            let policy =
                catalogue.namespace(NAMESPACE).and_then(|known| known.policy(line.word(0)));
            let policy = policy.unwrap_or_else(|| panic!("no policy `{}`", line.word(0)));
            let ask = Ask { retry: arguments.has("retry"), ..ask(line) };
            // Leases leave what the lowest priority does.
            let is_lease = matches!(ask.purpose, Purpose::Lease { .. });
            let priority = if is_lease { Priority::Bulk } else { priority };
            let rules = policy.asks(line.word(1), ask, priority, now);
            asks.extend(rules.map(|rule| CellAsk { quota: line.has("quota"), ..rule }));
            ends.push(asks.len());
        }
        let mut decided =
            self.engine.apply(&Charge { charging, asks: &asks, catalogue: &catalogue });
        if let Some(name) = arguments.text("grant") {
            let allowed = decided.decision.allowed;
            let parts = if allowed { parts(&asks, &decided) } else { Vec::new() };
            self.grants.insert(name.to_owned(), Grant { parts, is_open: allowed });
        }
        let decision = &mut decided.decision;
        decision.merge(&ends);
        let mut text = if decision.allowed { "allow\n" } else { "deny\n" }.to_owned();
        for (line, verdict) in lines.iter().zip(&decision.verdicts) {
            write!(text, "{} {}: {}", line.word(0), line.word(1), shown(verdict)).unwrap();
            if line.number("lease").is_some() {
                write!(text, ", {} leased", verdict.granted).unwrap();
            }
            text.push('\n');
        }
        text
    }

    fn settle(&mut self, line: &Line<'_>) -> String {
        let partial = line.has("partial");
        let (catalogue, now) = (self.engine.catalogue(), self.engine.now());
        let Some(grant) = self.grants.get_mut(line.word(0)).filter(|grant| grant.is_open) else {
            return "unknown grant\n".to_owned();
        };
        grant.is_open = partial;
        let mut text = String::new();
        for part in &mut grant.parts {
            let actual = match part.holds {
                Holds::Estimate => line.number("actual").unwrap_or(part.charged),
                Holds::Lease => part.charged - line.number("returned").unwrap_or(0),
                Holds::Permit => 0,
            };
            let actual = actual.max(part.told);
            let limiter = limiter(&catalogue, part);
            let known = fusebox_core::Settlement {
                charged: part.charged,
                told: part.told,
                actual,
                partial,
                slice: Some(part.slice),
                window: limiter.window(now),
                max_debt: limiter.settings.max_debt,
            };
            part.told = actual;
            let judge = Judge { limiter, catalogue: &catalogue };
            let OpenPart { cell, revision, .. } = *part;
            let settled = self.engine.settle(&Settlement { cell, judge, revision, known });
            let (refunded, owed, dropped) = (settled.refunded, settled.owed, settled.dropped);
            writeln!(text, "refunded {refunded}, owed {owed}, dropped {dropped}").unwrap();
        }
        text
    }

    fn attest(&mut self, line: &Line<'_>) -> String {
        let (catalogue, now) = (self.engine.catalogue(), self.engine.now());
        let grant = self.grants.get_mut(line.word(0)).expect("a grant");
        assert!(!grant.is_open, "a grant that a crash forgot");
        for part in &grant.parts {
            let limiter = limiter(&catalogue, part);
            let judge = Judge { limiter, catalogue: &catalogue };
            let mut attest = |cell| limiter.settings.attested(cell, part.charged, now);
            grant.is_open = self.engine.change(part.cell, judge, &mut attest);
        }
        if grant.is_open { "held again\n" } else { "unknown grant\n" }.to_owned()
    }

    fn set_wall(&self, arguments: &Arguments<'_>, time: &str) {
        let clock = self.engine.clock();
        if let Some(by) = arguments.duration("on") {
            clock.turn_wall_on(by);
        } else if let Some(by) = arguments.duration("back") {
            clock.turn_wall_back(by);
        } else {
            clock.set_wall(wall(time));
        }
    }

    fn restart(&mut self, crash: bool) {
        if crash {
            self.engine.crash();
            for grant in self.grants.values_mut() {
                grant.is_open = false;
            }
        } else {
            self.engine.restart(&self.open());
        }
    }

    fn open(&self) -> Vec<OpenGrant> {
        let open = (0..).zip(self.grants.values()).filter(|(_, grant)| grant.is_open);
        let open = open.map(|(secret, Grant { parts, .. })| OpenGrant {
            id: GrantId { boot: 1, secret },
            client: String::new(),
            parts: parts.clone(),
        });
        open.collect()
    }
}

fn limiter<'a>(catalogue: &'a Catalogue, part: &OpenPart) -> &'a Arc<Limiter> {
    catalogue.numbered(part.number).expect("a limiter that was known")
}

fn ask(line: &Line<'_>) -> Ask {
    if let Some(wanted) = line.number("lease") {
        let clients = line.number("clients").and_then(|clients| clients.try_into().ok());
        return Ask::spend(wanted).to(Purpose::Lease { clients: clients.expect("clients=C") });
    }
    let (cost, limit) = (line.word(2), line.number("limit"));
    let (cost, purpose) = match cost.strip_prefix('-') {
        Some(credit) => (credit, Purpose::Credit),
        None if line.has("estimated") => (cost, Purpose::Estimate),
        None if line.has("peek") => (cost, Purpose::Peek),
        None => (cost, Purpose::Spend),
    };
    Ask { limit, ..Ask::spend(cost.parse().expect("a cost")).to(purpose) }
}

/// What a grant holds of what was charged.
fn parts(asks: &[CellAsk<'_>], decided: &Decided) -> Vec<OpenPart> {
    let verdicts = decided.charged.iter().zip(&decided.decision.verdicts);
    let held = asks.iter().zip(verdicts).filter(|(ask, _)| !ask.shadow);
    let parts = held.map(|(ask, (charged, verdict))| OpenPart {
        holds: match ask.ask.purpose {
            Purpose::Lease { .. } => Holds::Lease,
            _ if ask.limiter.is_concurrency() => Holds::Permit,
            _ => Holds::Estimate,
        },
        number: ask.limiter.number,
        revision: ask.limiter.settings.revision,
        cell: charged.cell,
        slice: charged.slice,
        charged: verdict.granted,
        told: 0,
        // Scripts say when: nothing expires by itself.
        expires_at: Time::ZERO.after(Duration::MAX),
    });
    parts.collect()
}
