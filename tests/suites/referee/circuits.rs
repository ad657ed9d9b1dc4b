//! The language of the scripts about circuits: what callers and operators do, and what becomes of it.

use std::{cell::Cell, collections::BTreeMap, path::Path, time::Duration};

use datadriven::TestCase;
use fusebox_core::{
    Time,
    circuit::{
        Admitted, Breaker, Call, Circuit, Counts, Delta, Evidence, Exceeded, Generation, HalfOpen,
        Mode, OpenFor, Order, Outcome, Passage, Phase, Ramp, Refusal, Reported, Reporter, Settings,
        Share, SlowCall, Turn, WindowSettings,
    },
};

use crate::words::{Arguments, Line, duration};

/// Whether a script is written in this language.
pub fn is_script(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("circuits"))
}

/// A script being run against one circuit after another.
///
/// `circuit [as=NAME] [like=NAME]`, then lines of its settings, is a new one, closed: `window D`, `count N` or
/// `consecutive N`; `rate P`, `slow D P`, `min_calls N`, `open_for D [FACTOR MAX]`, `probes N`, `probe_timeout D`,
/// `max_duration D`. What is not said is as by default, but for jitter, ramp and longer waits, of which there are
/// none, and for reporters, of which one is enough; or as those were that have the name.
///
/// `run`, then lines of what happens, each of which is told with what came of it:
/// - `call CALLS`: each is asked for, and told of at once, as `S`, `F`, `X` (ignored) or `A` (abandoned), as often
///   as `x5` says; `S(5s)` took so long. What it is after each word.
/// - `ask [N]`: calls that go on
/// - `end CALL [latest]`: the oldest of those has gone so, or the latest
/// - `tell R CALLS FAILURES`: how many calls of a reporter went how
/// - `opened`: so many calls fail that it opens
/// - `force MODE [D]`: an operator's order
/// - `+5s`: time goes by
/// - `state`: what it is, and what it has counted; `why`: what opened it; `exceeded`: what would have;
///   `transitions`: how many there were
pub struct Script {
    circuit: Circuit,
    breaker: Breaker,
    now: Time,
    begun: Cell<u64>,
    /// Calls that go on, the oldest first.
    out: Vec<Admitted>,
    /// Lines of settings that have a name.
    named: BTreeMap<String, String>,
}

impl Script {
    pub fn new() -> Self {
        let breaker = Breaker::new(Settings::default()).expect("the default");
        let (now, begun) = (Time::ZERO.after(Duration::from_secs(1_000)), Cell::new(0));
        let circuit = Circuit::new(Generation(0), &breaker, now);
        Self { circuit, breaker, now, begun, out: Vec::new(), named: BTreeMap::new() }
    }

    pub fn run(&mut self, case: &TestCase) -> String {
        match case.directive.as_str() {
            "circuit" => self.begin(case),
            "run" => case.input.lines().map(|line| self.line(line)).collect(),
            other => panic!("no command `{other}`"),
        }
    }

    fn begin(&mut self, case: &TestCase) -> String {
        let arguments = Arguments(&case.args);
        let like = arguments.text("like").map_or("", |name| &self.named[name]);
        let text = format!("{like}{}", case.input);
        match breaker(&text) {
            Ok(breaker) => {
                let mut named = std::mem::take(&mut self.named);
                named.extend(arguments.text("as").map(|name| (name.to_owned(), text)));
                *self = Self { named, ..Self::new() };
                self.circuit = Circuit::new(Generation(0), &breaker, self.now);
                self.breaker = breaker;
                String::new()
            }
            Err(error) => format!("error: {error}\n"),
        }
    }

    fn line(&mut self, text: &str) -> String {
        let line = Line::new(text);
        let happened = match line.word(0) {
            "call" => grouped(text.split(' ').skip(1).map(|word| self.call(word))),
            "ask" => {
                let words = text.split(' ').collect::<Vec<_>>();
                let times = words.get(1).and_then(|times| times.parse().ok()).unwrap_or(1);
                grouped((0..times).map(|_| self.ask().unwrap_or_else(|refused| refused)))
            }
            "end" => {
                let place = if line.has("latest") { self.out.len() - 1 } else { 0 };
                let admitted = self.out.remove(place);
                match self.end(admitted, outcome(line.word(1))) {
                    Reported::Applied => self.named(),
                    Reported::Stale => format!("too late, {}", self.named()),
                }
            }
            "tell" => {
                let count = |index| line.word(index).parse().expect("a number");
                let counts = Counts { calls: count(2), failures: count(3), slow: 0 };
                self.tell(line.word(1), counts)
            }
            "opened" => {
                let counts = Counts { calls: 10_000, failures: 10_000, slow: 0 };
                self.tell("a", counts)
            }
            "force" => {
                let mode = match line.word(1) {
                    "open" => Mode::ForcedOpen,
                    "disabled" => Mode::Disabled,
                    "metrics-only" => Mode::MetricsOnly,
                    "normal" => Mode::Normal,
                    other => panic!("no mode `{other}`"),
                };
                let ttl = text.split(' ').nth(2).map_or(Duration::ZERO, duration);
                let order = Order { mode, ttl, reason: "".into(), actor: "".into() };
                let changes = self.turn(|circuit, turn| circuit.set(&order, turn));
                if changes { self.named() } else { format!("{} as before", self.named()) }
            }
            "state" => self.state(),
            "why" => {
                let view = self.turn(|circuit, turn| circuit.view(turn));
                view.evidence.map_or_else(|| "nobody knows".to_owned(), |evidence| seen(&evidence))
            }
            "exceeded" => {
                let Exceeded { failures, slow } = self.circuit.exceeded();
                let noted = [(failures, "failures"), (slow, "slow")];
                let noted =
                    noted.into_iter().filter_map(|(is_noted, name)| is_noted.then_some(name));
                let noted = noted.collect::<Vec<_>>();
                if noted.is_empty() { "nothing".to_owned() } else { noted.join(", ") }
            }
            "transitions" => self.circuit.history().len().to_string(),
            time => {
                let by = duration(time.strip_prefix('+').expect("a command"));
                self.now = self.now.after(by);
                return format!("{text}\n");
            }
        };
        format!("{text}: {happened}\n")
    }

    fn turn<T>(&mut self, act: impl FnOnce(&mut Circuit, Turn<'_>) -> T) -> T {
        let generations = || {
            self.begun.set(self.begun.get() + 1);
            Generation(self.begun.get())
        };
        let (breaker, now) = (&self.breaker, self.now);
        act(&mut self.circuit, Turn { breaker, now, draw: 0, generations: &generations })
    }

    fn call(&mut self, word: &str) -> String {
        let (word, times) = word.split_once('x').unwrap_or((word, "1"));
        let called = (0..times.parse().expect("a number")).map(|_| match self.ask() {
            Ok(_) => {
                let admitted = self.out.pop().expect("the latest");
                self.end(admitted, outcome(word));
                self.named()
            }
            Err(refused) => refused,
        });
        called.last().expect("a call")
    }

    /// How a call is let through, or why not.
    fn ask(&mut self) -> Result<String, String> {
        let asked = self.turn(|circuit, turn| match circuit.ask(turn) {
            passage @ Passage::Refused { refusal, retry_after } => {
                circuit.refuse(passage, turn);
                Err((refusal, retry_after))
            }
            passage => Ok(circuit.admit(passage, turn)),
        });
        match asked {
            Ok(admitted) => {
                self.out.push(admitted);
                Ok(if admitted.probe.is_some() { "a probe" } else { "passes" }.to_owned())
            }
            Err((refusal, retry_after)) => {
                let why = match refusal {
                    Refusal::Open => "open",
                    Refusal::ForcedOpen => "forced open",
                    Refusal::ProbesInUse => "probes in use",
                    Refusal::Ramping => "ramping up",
                };
                let retry = retry_after.map(|wait| format!(", retry in {wait:?}"));
                Err(format!("refused ({why}{})", retry.unwrap_or_default()))
            }
        }
    }

    fn end(&mut self, admitted: Admitted, call: Call<'_>) -> Reported {
        let by = Reporter { id: "a", zone: "" };
        let Admitted { generation, probe } = admitted;
        self.turn(|circuit, turn| match probe {
            Some((id, _)) => circuit.report_probe((generation, id), call, by, turn),
            None => circuit.report_call(generation, call, by, turn),
        })
    }

    fn tell(&mut self, reporter: &str, counts: Counts) -> String {
        let (generation, by) = (self.circuit.generation(), Reporter { id: reporter, zone: "" });
        let delta = Delta { counts, ..Delta::default() };
        self.turn(|circuit, turn| circuit.report(generation, delta, by, turn));
        self.named()
    }

    fn named(&self) -> String {
        let named = match self.circuit.phase() {
            Phase::Closed => "closed",
            Phase::Open => "open",
            Phase::HalfOpen => "half-open",
            Phase::ForcedOpen => "forced open",
            Phase::Disabled => "disabled",
            Phase::MetricsOnly => "metrics only",
        };
        named.to_owned()
    }

    fn state(&mut self) -> String {
        self.turn(Circuit::touch);
        let (evidence, view) =
            self.turn(|circuit, turn| (circuit.evidence(turn), circuit.view(turn)));
        let ignored = self.circuit.aside().ignored;
        let mut text = self.named();
        match view.half_open_at {
            Some(at) => {
                let left = Duration::from_nanos(at.nanos_since(self.now));
                text += &format!(", probes in {left:?}");
            }
            None => text += &format!(", {}", seen(&evidence)),
        }
        if ignored > 0 {
            text += &format!(", {ignored} ignored");
        }
        text
    }
}

fn breaker(text: &str) -> Result<Breaker, String> {
    let mut settings = Settings { min_reporters: 1, ..Settings::default() };
    settings.ramp = Ramp { steps: [].into_iter().collect(), ..settings.ramp };
    let OpenFor { first, .. } = settings.open_for;
    settings.open_for = OpenFor { first, factor_hundredths: 100, max: first, jitter: Share::NONE };
    for line in text.lines() {
        let words: Vec<_> = line.split(' ').collect();
        let number = |index: usize| words[index].parse().expect("a number");
        let rate = |index: usize| {
            percent(words[index]).ok_or_else(|| format!("`{}` is no share", words[index]))
        };
        let HalfOpen { probe_timeout, max_duration, .. } = &mut settings.half_open;
        match words[0] {
            "window" => settings.window = WindowSettings::Time(duration(words[1])),
            "count" => settings.window = WindowSettings::Calls(number(1)),
            "consecutive" => settings.window = WindowSettings::Consecutive(number(1)),
            "rate" => settings.failure_rate = rate(1)?,
            "slow" => {
                settings.slow_call = Some(SlowCall { over: duration(words[1]), rate: rate(2)? });
            }
            "min_calls" => settings.min_calls = number(1),
            "open_for" => {
                let OpenFor { first, factor_hundredths, max, .. } = &mut settings.open_for;
                *first = duration(words[1]);
                *max = words.get(3).map_or(*first, |max| duration(max));
                let factor = words.get(2).map_or(1, |factor| factor.parse().expect("a number"));
                *factor_hundredths = 100_u16 * factor;
            }
            "probes" => {
                settings.half_open.probes = number(1);
                settings.half_open.max_in_flight = number(1);
            }
            "probe_timeout" => *probe_timeout = duration(words[1]),
            "max_duration" => *max_duration = duration(words[1]),
            other => panic!("no setting `{other}`"),
        }
    }
    Breaker::new(settings).map_err(|error| error.to_string())
}

/// `50%`, `66.66%`.
fn percent(text: &str) -> Option<Share> {
    let number = text.strip_suffix('%').expect("P%");
    let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
    let parse = |text: &str| text.parse::<u16>().expect("a number");
    Share::new(parse(whole) * 100 + parse(&format!("{part:0<2}")))
}

/// `S`, `F(5s)`.
fn outcome(word: &str) -> Call<'static> {
    let (word, latency) = word.split_once('(').unwrap_or((word, ""));
    let outcome = match word {
        "S" => Outcome::Success,
        "F" => Outcome::Failure,
        "X" => Outcome::Ignored,
        "A" => Outcome::Abandoned,
        other => panic!("no outcome `{other}`"),
    };
    Call { outcome, latency: latency.strip_suffix(')').map(duration), kind: "" }
}

fn seen(evidence: &Evidence) -> String {
    let share = |share: Share| f64::from(share.basis_points()) / 100.0;
    let Evidence { calls, failure_rate, slow_rate, .. } = evidence;
    format!("{calls} counted, {}% failed, {}% slow", share(*failure_rate), share(*slow_rate))
}

/// One after another, and how often.
fn grouped(all: impl Iterator<Item = String>) -> String {
    let all = all.collect::<Vec<_>>();
    let groups = all.chunk_by(|one, other| one == other).map(|group| match group.len() {
        1 => group[0].clone(),
        times => format!("{times} x {}", group[0]),
    });
    groups.collect::<Vec<_>>().join(", ")
}
