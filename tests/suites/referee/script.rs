//! The language of the scripts: what callers say, and what they are told.

use std::{collections::BTreeMap, fmt::Write};

use datadriven::TestCase;
use fusebox_server::app::{Acquire, Ask, Client, Entry, GrantName, Priority, Reported, Told};

use crate::{
    panel::{Answered, Panel},
    policies::Policies,
    words::{Arguments, Line, shown, wall},
};

/// A script being run against a server.
///
/// - `policy [namespace=N]`, then policies as a configuration has them: a restart with these
/// - `drop policy=NAME [namespace=N]`: a restart without it
/// - `acquire [namespace=N] [client=C] [retry] [grant=NAME]`, then lines of
///   `POLICY KEY COST [estimated] [lease=WANTED]`; of `namespace=none` the name is empty
/// - `batch`, the same, but each line is an Acquire of its own
/// - `report`, then lines of `GRANT [actual=TOTAL] [returned=R] [partial]`
/// - `renew`, then lines of `GRANT`
/// - `advance by=D`: time goes by, and housekeeping with it
/// - `wall`, then a time: the wall clock is set
/// - `restart [crash]`
pub struct Script {
    panel: Panel,
    policies: Policies,
    grants: BTreeMap<String, GrantName>,
}

/// Where nothing else is said.
const NAMESPACE: &str = "test";

impl Script {
    pub fn new() -> Self {
        let (policies, grants) = (Policies::default(), BTreeMap::new());
        Self { panel: Panel::default(), policies, grants }
    }

    pub fn run(&mut self, case: &TestCase) -> String {
        let arguments = Arguments(&case.args);
        let namespace = arguments.text("namespace").unwrap_or(NAMESPACE);
        let lines = case.input.lines().map(Line::new);
        match case.directive.as_str() {
            "policy" => {
                self.policies.write(namespace, &case.input);
                self.configure()
            }
            "drop" => {
                self.policies.drop(namespace, arguments.text("policy").expect("policy=NAME"));
                self.configure()
            }
            "acquire" => self.acquire(&arguments, &lines.collect::<Vec<_>>()),
            "batch" => self.batch(&lines.collect::<Vec<_>>()),
            "report" => lines.map(|line| self.report(&line)).collect(),
            "renew" => lines.map(|line| self.renew(&line)).collect(),
            "advance" => {
                self.panel.advance(arguments.duration("by").expect("advance by=DURATION"));
                String::new()
            }
            "wall" => {
                self.panel.clock.set_wall(wall(case.input.trim()));
                String::new()
            }
            "restart" if arguments.has("crash") => {
                self.panel.crash();
                String::new()
            }
            "restart" => {
                self.panel.restart();
                String::new()
            }
            other => panic!("no command `{other}`"),
        }
    }

    fn configure(&mut self) -> String {
        self.panel.configure(self.policies.config().expect("a configuration"));
        String::new()
    }

    fn acquire(&mut self, arguments: &Arguments<'_>, lines: &[Line<'_>]) -> String {
        let namespace = arguments.text("namespace").unwrap_or(NAMESPACE);
        let namespace = if namespace == "none" { "" } else { namespace };
        let client = arguments.text("client").map(|id| Client { id, service: "", zone: "" });
        let retry = arguments.has("retry");
        let asks = lines.iter().map(ask).collect();
        let entry = Entry { asks, priority: Priority::Normal, retry };
        match self.panel.acquire(Acquire { namespace, client, entry }) {
            Ok(answered) => {
                if let Some((name, grant)) = arguments.text("grant").zip(answered.grant) {
                    self.grants.insert(name.to_owned(), grant);
                }
                told(lines, &answered)
            }
            Err(error) => format!("error: {error}\n"),
        }
    }

    fn batch(&mut self, lines: &[Line<'_>]) -> String {
        let entry =
            |line| Entry { asks: vec![ask(line)], priority: Priority::Normal, retry: false };
        let entries = lines.iter().map(entry).collect();
        match self.panel.acquire_batch(NAMESPACE, entries) {
            Ok(all) => {
                lines.chunks(1).zip(&all).map(|(line, answered)| told(line, answered)).collect()
            }
            Err(error) => format!("error: {}\n", error.error),
        }
    }

    fn report(&mut self, line: &Line<'_>) -> String {
        let grant = self.grants.get(line.word(0)).copied();
        let told = Told {
            actual_cost: line.number("actual"),
            lease_returned: line.number("returned").unwrap_or(0),
            partial: line.has("partial"),
            ..Told::default()
        };
        let receipt = self.panel.report(NAMESPACE, vec![(grant, told)], Vec::new());
        let text = match receipt.results[0] {
            Reported::Applied => "applied\n",
            Reported::Duplicate => "duplicate\n",
            Reported::UnknownGrant => "unknown grant\n",
            other => panic!("{other:?} of a grant that is kept"),
        };
        text.to_owned()
    }

    fn renew(&mut self, line: &Line<'_>) -> String {
        let grant = self.grants.get(line.word(0)).copied();
        let renewed = self.panel.report(NAMESPACE, Vec::new(), vec![grant]).renewals[0];
        if renewed.is_zero() { "not renewed\n".to_owned() } else { format!("lives {renewed:?}\n") }
    }
}

fn ask<'a>(line: &Line<'a>) -> Ask<'a> {
    Ask {
        policy: line.word(0),
        key: line.word(1),
        cost: line.word(2).parse().expect("a cost"),
        estimated: line.has("estimated"),
        lease: line.number("lease").unwrap_or(0),
    }
}

fn told(lines: &[Line<'_>], answered: &Answered) -> String {
    let decision = &answered.decision;
    let mut text = if decision.allowed { "allow\n" } else { "deny\n" }.to_owned();
    for (index, (line, verdict)) in lines.iter().zip(&decision.verdicts).enumerate() {
        write!(text, "{} {}: {}", line.word(0), line.word(1), shown(verdict)).unwrap();
        if let Some(held) = answered.held.iter().find(|held| held.ask == index && held.leased > 0) {
            write!(text, ", {} leased for {:?}", held.leased, held.expires_in).unwrap();
        }
        text.push('\n');
    }
    text
}
