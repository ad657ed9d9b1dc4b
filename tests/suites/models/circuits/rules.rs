//! One circuit as the server keeps it: modes, generations, probes, and what time alone does to it.
//!
//! It knows no clock: all times are ages, which [`Circuit::pass`] lets grow. Nothing happens by time itself:
//! whoever touches or reads it [settles](Circuit::settle) it first, and what was due by then happened when
//! it was due.

/// A rule that is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Broken {
    Nothing,
    /// Each ask on a half-open circuit gets a probe.
    NoBudget,
    /// A probe's result makes room for another probe.
    ResultsMakeRoom,
    /// A probe that is given back makes room, however many were.
    GivesBackForEver,
    /// A circuit opens once too many probes were given back, whatever was counted.
    OpensWhenGivenBack,
    /// An expired probe is no failure, and keeps its slot.
    ExpiredIsNothing,
    /// An expired probe is no failure, and makes room.
    ExpiredMakesRoom,
    /// A report that comes after its probe's time counts if nobody touched the circuit between.
    LateIsInTime,
    /// A half-open circuit waits for results as long as it takes.
    NoMaxDuration,
    /// A half-open circuit closes by time, though nothing was counted.
    NothingCloses,
    /// A half-open circuit opens by time, unless enough was counted.
    TooFewOpen,
    /// Whether it was half-open for too long is looked at before the probes that had expired by then.
    MaxDurationFirst,
    /// A circuit opens when somebody notices that it is due to.
    OpensWhenNoticed,
    /// Counters of calls that were no probes count in a half-open circuit.
    DeltasCountInHalfOpen,
    /// A report counts, whatever generation it tells of.
    ForeignCounts,
    /// A probe's report counts each time that it comes.
    RepeatsCount,
    /// A circuit may be half-open again while probes from before still run.
    ForgetsStragglers,
    /// So it may after a restart.
    RestartForgetsStragglers,
    /// A restart finds a half-open circuit half-open, with a new budget.
    RestartKeepsHalfOpen,
    /// A restart makes an open circuit of a half-open one, in the same generation.
    RestartKeepsGeneration,
    /// Generations after a restart go on from the one on disk.
    NoBootNumber,
    /// What changed is told before it is written.
    ToldBeforeWritten,
    /// A circuit becomes half-open by time, not by an ask.
    HalfOpenByTime,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    Closed,
    Open,
    HalfOpen,
}

/// The boot that began it, and how many it had begun.
pub type Generation = (u8, u16);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Success,
    Failure,
    /// Ignored, abandoned or undelivered.
    GivenBack,
}

/// Times in ticks of whatever length a world has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Settings {
    pub probes: u8,
    /// Results that are enough: as many as there are probes, or the least calls that any verdict takes.
    pub enough: u8,
    pub probe_timeout: u16,
    pub max_duration: u16,
    /// After that a circuit may be half-open, doubled each time that it was in vain.
    pub open_for: u16,
    pub open_for_max: u16,
}

impl Settings {
    /// How long a circuit stays open.
    fn wait(self, attempt: u8) -> u16 {
        (self.open_for << attempt).min(self.open_for_max)
    }

    /// Ages beyond this all mean the same.
    fn longest(self) -> u16 {
        self.max_duration.max(self.probe_timeout) + self.open_for_max
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Circuit {
    pub broken: Broken,
    pub settings: Settings,
    boot: u8,
    pub state: State,
    pub generation: Generation,
    /// Of this state.
    pub age: u16,
    /// How often it was half-open in vain since it was closed.
    attempt: u8,
    /// Until the last probe of a generation before this ends.
    stragglers: u16,
    /// The ages of the probes that are out, oldest first. A probe is known by its generation and age: those of
    /// one age are alike.
    pub out: Vec<u16>,
    successes: u8,
    failures: u8,
    given_back: u8,
}

impl Circuit {
    /// One that has just opened.
    pub fn open(broken: Broken, settings: Settings) -> Self {
        Self {
            broken,
            settings,
            boot: 1,
            state: State::Open,
            generation: (1, 0),
            age: 0,
            attempt: 0,
            stragglers: 0,
            out: Vec::new(),
            successes: 0,
            failures: 0,
            given_back: 0,
        }
    }

    pub fn pass(&mut self, ticks: u16) {
        let longest = self.settings.longest();
        let grow = |age: &mut u16| *age = (*age + ticks).min(longest);
        grow(&mut self.age);
        self.out.iter_mut().for_each(grow);
        self.stragglers = self.stragglers.saturating_sub(ticks);
        match self.state {
            State::Closed => self.age = 0,
            State::Open if self.broken != Broken::HalfOpenByTime => {
                self.age = self.age.min(self.settings.open_for_max);
            }
            State::Open | State::HalfOpen => {}
        }
    }

    /// What whoever looks at it is told.
    pub fn read(&self) -> (State, Generation) {
        let mut settled = self.clone();
        settled.settle();
        (settled.state, settled.generation)
    }

    /// Lets all that was due happen, in the order in which it was.
    pub fn settle(&mut self) {
        while self.settle_next() {}
    }

    fn settle_next(&mut self) -> bool {
        let Settings { probe_timeout, max_duration, .. } = self.settings;
        let over = match self.state {
            State::HalfOpen => self.age.checked_sub(max_duration),
            State::Open if self.broken == Broken::HalfOpenByTime => {
                let over = self.age.checked_sub(self.settings.wait(self.attempt));
                over.inspect(|ago| self.become_in(State::HalfOpen, *ago));
                return over.is_some();
            }
            _ => return false,
        };
        let over = over.filter(|_| self.broken != Broken::NoMaxDuration);
        let expired = self.out.first().and_then(|age| age.checked_sub(probe_timeout));
        let expired = expired.filter(|_| self.broken != Broken::ExpiredIsNothing);
        let over_first = match self.broken {
            Broken::MaxDurationFirst => over.is_some(),
            _ => over > expired,
        };
        match (expired, over) {
            (None, None) => return false,
            (Some(ago), _) if !over_first => {
                self.out.remove(0);
                if self.broken != Broken::ExpiredMakesRoom {
                    self.count(Outcome::Failure, ago);
                }
            }
            (_, ago) => self.judge(ago.unwrap_or(0)),
        }
        true
    }

    /// Until it may be half-open.
    pub fn left(&self) -> u16 {
        match self.state {
            State::Open => {
                let left = self.settings.wait(self.attempt).saturating_sub(self.age);
                left.max(self.stragglers)
            }
            State::Closed | State::HalfOpen => 0,
        }
    }

    /// A call that would pass. Tells whether it may, and as a probe.
    pub fn ask(&mut self) -> Option<State> {
        self.settle();
        let Settings { probes, .. } = self.settings;
        if self.state == State::Open && self.left() == 0 {
            self.become_in(State::HalfOpen, 0);
        }
        let counted = match self.broken {
            Broken::ResultsMakeRoom => 0,
            _ => self.successes + self.failures,
        };
        let out = u8::try_from(self.out.len()).unwrap();
        let probe_left = out + counted < probes || self.broken == Broken::NoBudget;
        match self.state {
            State::HalfOpen if probe_left => {
                self.out.push(0);
                Some(State::HalfOpen)
            }
            State::Closed => Some(State::Closed),
            _ => None,
        }
    }

    /// How a probe went, that was out for as long as `age`.
    pub fn report(&mut self, generation: Generation, age: u16, outcome: Outcome) {
        if self.broken != Broken::LateIsInTime {
            self.settle();
        }
        let known = self.out.iter().position(|out| *out == age);
        let foreign = generation != self.generation || self.state != State::HalfOpen;
        match known.filter(|_| !foreign) {
            Some(index) => {
                self.out.remove(index);
                self.count(outcome, 0);
            }
            None if foreign && self.broken == Broken::ForeignCounts => self.count(outcome, 0),
            None if !foreign && self.broken == Broken::RepeatsCount => self.count(outcome, 0),
            None => {}
        }
        self.settle();
    }

    /// Calls that were no probes failed, as many as it takes.
    pub fn report_failures(&mut self, generation: Generation) {
        self.settle();
        if generation != self.generation && self.broken != Broken::ForeignCounts {
            return;
        }
        match self.state {
            State::Closed => self.become_in(State::Open, 0),
            State::HalfOpen if self.broken == Broken::DeltasCountInHalfOpen => {
                self.count(Outcome::Failure, 0);
            }
            State::Open | State::HalfOpen => {}
        }
    }

    fn count(&mut self, outcome: Outcome, ago: u16) {
        match outcome {
            Outcome::Success => self.successes += 1,
            Outcome::Failure => self.failures += 1,
            Outcome::GivenBack => self.given_back += 1,
        }
        let enough = self.successes + self.failures >= self.settings.enough;
        let endless = self.broken == Broken::GivesBackForEver;
        let too_many_given_back = self.given_back > self.settings.probes && !endless;
        if too_many_given_back && self.broken == Broken::OpensWhenGivenBack {
            self.become_in(State::Open, ago);
        } else if enough || too_many_given_back {
            self.judge(ago);
        }
    }

    /// By what is counted, however little it is; nothing opens.
    fn judge(&mut self, ago: u16) {
        let counted = self.successes + self.failures;
        let too_few = match self.broken {
            Broken::NothingCloses => false,
            Broken::TooFewOpen => counted < self.settings.enough,
            _ => counted == 0,
        };
        let failing = counted > 0 && self.failures * 2 >= counted;
        let state = if too_few || failing { State::Open } else { State::Closed };
        self.become_in(state, if self.broken == Broken::OpensWhenNoticed { 0 } else { ago });
    }

    /// A transition, so long ago: a generation begins.
    fn become_in(&mut self, state: State, ago: u16) {
        let longer = self.settings.wait(self.attempt) < self.settings.open_for_max;
        self.attempt = match (self.state, state) {
            (_, State::Closed) => 0,
            (State::HalfOpen, State::Open) => self.attempt + u8::from(longer),
            _ => self.attempt,
        };
        self.begin(state, ago);
    }

    fn begin(&mut self, state: State, age: u16) {
        let (boot, count) = self.generation;
        let goes_on = boot == self.boot || self.broken == Broken::NoBootNumber;
        self.generation = if goes_on { (boot, count + 1) } else { (self.boot, 0) };
        let left = self.out.iter().map(|age| self.settings.probe_timeout.saturating_sub(*age));
        if self.broken != Broken::ForgetsStragglers {
            self.stragglers = left.max().unwrap_or(0).max(self.stragglers);
        }
        self.out.clear();
        (self.successes, self.failures, self.given_back) = (0, 0, 0);
        (self.state, self.age) = (state, age);
    }

    /// What of it is written.
    pub fn record(&self) -> Self {
        let mut record = Self { out: Vec::new(), stragglers: 0, ..self.clone() };
        (record.successes, record.failures, record.given_back) = (0, 0, 0);
        record
    }

    /// The circuit that a later boot finds written.
    pub fn recovered(mut self, boot: u8, half_open_is_written: bool) -> Self {
        self.boot = boot;
        if self.broken != Broken::RestartForgetsStragglers {
            self.stragglers = self.settings.probe_timeout;
        }
        let keeps = self.broken == Broken::RestartKeepsGeneration;
        match self.state {
            State::HalfOpen if self.broken == Broken::RestartKeepsHalfOpen => {}
            State::HalfOpen if keeps => self.state = State::Open,
            State::HalfOpen => self.begin(State::Open, 0),
            // It may have been half-open since.
            State::Open if !half_open_is_written && !keeps => self.begin(State::Open, self.age),
            State::Open | State::Closed => {}
        }
        self
    }
}
