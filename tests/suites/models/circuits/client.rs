//! A client of a shared circuit: what it was told last, and its own breaker.
//!
//! A call is over in the tick in which it was made.

use super::rules::State;

/// Ticks for which a client believes what it was told.
pub const VALID: u8 = 2;

/// A rule that is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Broken {
    Nothing,
    /// A shared circuit that was open is so until somebody says otherwise.
    StaleBinds,
    /// What is told is believed from when it arrived, not from when it was told.
    CountsFromArrival,
    /// A client that was told of an open circuit waits to be told that it is half-open.
    WaitsForHalfOpen,
    /// A probe passes only if the local breaker lets it.
    LocalBarsProbes,
    /// The local breaker is asked before the shared one refuses, and waits for a call that never was.
    LocalIsAskedFirst,
    /// If the server does not answer who asks for a probe, the local breaker decides.
    UnansweredIsStale,
    /// The local breaker stays as it is when the shared one closes.
    NoReset,
    /// The local breaker is reset whenever a client is told that the shared one is closed.
    AlwaysReset,
    /// Calls that the local breaker lets through pass, also if the shared one is open.
    LocalIsEnough,
    /// Calls that the shared breaker lets through pass, also if the local one is open.
    SharedIsEnough,
    /// A call that the local breaker refused is reported like one that failed.
    RefusedIsFailure,
    /// To the local breaker a server that does not answer is a target that fails.
    UnreachableIsFailure,
    /// A forced mode is as stale as the rest.
    ForcedIsStale,
    /// A forced mode is for ever.
    ForcedForEver,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalSettings {
    /// Failures in a row.
    pub opens_at: u8,
    pub open_for: u8,
    pub open_for_max: u8,
}

/// A client's own breaker. Once it has been open for long enough a call decides, and others wait for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Local {
    Closed { failures: u8 },
    Open { left: u8, attempt: u8 },
    Waits { attempt: u8 },
}

impl Local {
    pub const NEW: Self = Self::Closed { failures: 0 };

    pub fn tick(self) -> Self {
        match self {
            Self::Open { left, attempt } => Self::Open { left: left.saturating_sub(1), attempt },
            Self::Closed { .. } | Self::Waits { .. } => self,
        }
    }

    pub fn lets_through(self) -> bool {
        !matches!(self, Self::Open { left: 1.., .. } | Self::Waits { .. })
    }

    pub fn after(self, success: bool, settings: LocalSettings) -> Self {
        let LocalSettings { opens_at, open_for, open_for_max } = settings;
        match self {
            _ if success => Self::NEW,
            Self::Closed { failures } if failures + 1 < opens_at => {
                Self::Closed { failures: failures + 1 }
            }
            Self::Closed { .. } => Self::Open { left: open_for, attempt: 0 },
            Self::Open { attempt, .. } | Self::Waits { attempt } => {
                let longer = open_for << attempt < open_for_max;
                let attempt = attempt + u8::from(longer);
                Self::Open { left: (open_for << attempt).min(open_for_max), attempt }
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Forced {
    Open,
    Disabled,
}

/// What the server tells of a circuit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Status {
    /// Not closed.
    pub open: bool,
    /// Until an ask may get a probe.
    pub left: u8,
    pub forced: Option<(Forced, u8)>,
}

impl Status {
    pub fn of(state: State, left: u16, forced: Option<(Forced, u8)>) -> Self {
        Self { open: state != State::Closed, left: u8::try_from(left).unwrap(), forced }
    }

    pub fn tick(self) -> Self {
        let forced = self.forced.map(|(mode, left)| (mode, left.saturating_sub(1)));
        Self { left: self.left.saturating_sub(1), forced, ..self }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Client {
    pub broken: Broken,
    pub settings: LocalSettings,
    pub local: Local,
    pub status: Status,
    /// Since when that is so, and since when the client takes it to be so.
    pub told_ago: u8,
    pub believed_ago: u8,
    /// It was told of the present generation.
    pub current: bool,
    /// Reports on their way: how its probe went, and that calls failed.
    pub probe: Option<bool>,
    pub failed: bool,
    /// In ticks' worth, for the judge: calls that a target that does not work got all the same.
    pub outrun: u8,
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    LetThrough,
    RefusedByLocal,
    RefusedByShared,
    RefusedByForce,
    /// The server is to be asked for a probe.
    Ask,
}

impl Client {
    pub fn new(broken: Broken, settings: LocalSettings) -> Self {
        Self {
            broken,
            settings,
            local: Local::NEW,
            status: Status { open: false, left: 0, forced: None },
            told_ago: VALID,
            believed_ago: VALID,
            current: false,
            probe: None,
            failed: false,
            outrun: 0,
        }
    }

    pub fn is_told(&mut self, status: Status, ago: u8, current: bool) {
        let closes = self.status.open || self.broken == Broken::AlwaysReset;
        if closes && !status.open && self.broken != Broken::NoReset {
            self.local = Local::NEW;
        }
        let arrival = self.broken == Broken::CountsFromArrival;
        (self.status, self.told_ago, self.current) = (status, ago, current);
        self.believed_ago = if arrival { 0 } else { ago };
    }

    pub fn is_fresh(&self) -> bool {
        self.believed_ago < VALID
    }

    /// What binds it by force, which is for a time of its own.
    pub fn forced(&self) -> Option<Forced> {
        let stale = self.broken == Broken::ForcedIsStale && !self.is_fresh();
        let for_ever = self.broken == Broken::ForcedForEver;
        let in_force = |(_, left): &(Forced, u8)| (*left > 0 || for_ever) && !stale;
        self.status.forced.filter(in_force).map(|(mode, _)| mode)
    }

    pub fn gate(&self) -> Gate {
        match self.forced() {
            Some(Forced::Open) => return Gate::RefusedByForce,
            Some(Forced::Disabled) => return Gate::LetThrough,
            None => {}
        }
        let believed = self.is_fresh() || self.broken == Broken::StaleBinds;
        let own = self.local.lets_through();
        match self.status {
            Status { open: true, .. }
                if believed && own && self.broken == Broken::LocalIsEnough =>
            {
                Gate::LetThrough
            }
            Status { open: true, left, .. } if believed => {
                let waits = left > 0 || self.broken == Broken::WaitsForHalfOpen;
                if waits { Gate::RefusedByShared } else { Gate::Ask }
            }
            _ if own || (believed && self.broken == Broken::SharedIsEnough) => Gate::LetThrough,
            _ => Gate::RefusedByLocal,
        }
    }

    pub fn refused_by_shared(&mut self) {
        if let (Local::Open { left: 0, attempt }, Broken::LocalIsAskedFirst) =
            (self.local, self.broken)
        {
            self.local = Local::Waits { attempt };
        }
    }

    /// A call that was let through, and was no probe, is over.
    pub fn called(&mut self, success: bool) {
        self.local = self.local.after(success, self.settings);
        self.failed |= !success && !self.status.open && self.current;
    }

    pub fn tick(&mut self) {
        self.local = self.local.tick();
        self.status = self.status.tick();
        self.told_ago = (self.told_ago + 1).min(VALID);
        self.believed_ago = (self.believed_ago + 1).min(VALID);
        self.outrun = self.outrun.saturating_sub(1);
    }

    /// The server has begun another generation: what is on its way comes to nothing.
    pub fn falls_behind(&mut self) {
        (self.current, self.probe, self.failed) = (false, None, false);
    }
}
