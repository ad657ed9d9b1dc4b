//! What a circuit is, and what it becomes: a table.

/// What a circuit is: its state under [`Mode::Normal`], or what an operator made of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Calls go through, and are counted.
    #[default]
    Closed,
    /// Calls are refused.
    Open,
    /// A few probes go through.
    HalfOpen,
    /// Calls are refused, whatever is told.
    ForcedOpen,
    /// Calls go through, and nothing is counted.
    Disabled,
    /// Calls go through, and are counted; what would open it is noted.
    MetricsOnly,
}

/// Whether calls go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// They do.
    Closed,
    /// They are refused.
    Open,
    /// A few do.
    HalfOpen,
}

/// What an operator made of a circuit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// It acts on what it sees.
    Normal,
    /// It refuses calls.
    ForcedOpen,
    /// It lets calls through, and counts nothing.
    Disabled,
    /// It lets calls through, and counts.
    MetricsOnly,
}

/// What happens to a circuit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// What is counted is over a threshold.
    Tripped,
    /// A call comes after the wait is over.
    Asked,
    /// The probes say that the target works.
    Passed,
    /// They say that it does not, or nothing.
    Failed,
    /// The server starts again.
    Restarted,
    /// An operator says so, or the time of what one said before is over.
    Set(Mode),
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Closed,
        Self::Open,
        Self::HalfOpen,
        Self::ForcedOpen,
        Self::Disabled,
        Self::MetricsOnly,
    ];

    /// Whether calls go through.
    #[must_use]
    pub const fn state(self) -> State {
        match self {
            Self::Closed | Self::Disabled | Self::MetricsOnly => State::Closed,
            Self::Open | Self::ForcedOpen => State::Open,
            Self::HalfOpen => State::HalfOpen,
        }
    }

    /// What an operator made of it.
    #[must_use]
    pub const fn mode(self) -> Mode {
        match self {
            Self::Closed | Self::Open | Self::HalfOpen => Mode::Normal,
            Self::ForcedOpen => Mode::ForcedOpen,
            Self::Disabled => Mode::Disabled,
            Self::MetricsOnly => Mode::MetricsOnly,
        }
    }

    /// What becomes of it; `None` if it stays as it is, and no generation begins.
    #[must_use]
    pub fn after(self, event: Event) -> Option<Self> {
        use Phase::{Closed, Disabled, ForcedOpen, HalfOpen, MetricsOnly, Open};
        match (self, event) {
            (Closed, Event::Tripped) => Some(Open),
            (Open, Event::Asked) => Some(HalfOpen),
            (HalfOpen, Event::Passed) => Some(Closed),
            (HalfOpen, Event::Failed) => Some(Open),
            // It may have been half-open since it was written, with probes that still run.
            (Open | HalfOpen, Event::Restarted) => Some(Open),
            (_, Event::Set(mode)) => {
                let set = match mode {
                    // Back to normal is closed, with nothing counted.
                    Mode::Normal => Closed,
                    Mode::ForcedOpen => ForcedOpen,
                    Mode::Disabled => Disabled,
                    Mode::MetricsOnly => MetricsOnly,
                };
                (set != self).then_some(set)
            }
            (Closed, Event::Asked | Event::Passed | Event::Failed | Event::Restarted)
            | (Open, Event::Tripped | Event::Passed | Event::Failed)
            | (HalfOpen, Event::Tripped | Event::Asked)
            | (
                ForcedOpen | Disabled | MetricsOnly,
                Event::Tripped | Event::Asked | Event::Passed | Event::Failed | Event::Restarted,
            ) => None,
        }
    }
}

impl Event {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Tripped,
        Self::Asked,
        Self::Passed,
        Self::Failed,
        Self::Restarted,
        Self::Set(Mode::Normal),
        Self::Set(Mode::ForcedOpen),
        Self::Set(Mode::Disabled),
        Self::Set(Mode::MetricsOnly),
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_and_event_has_its_cell() {
        use Phase::{Closed, Disabled, ForcedOpen, HalfOpen, MetricsOnly, Open};
        let stays = None;
        #[rustfmt::skip]
        let table = [
            // tripped, asked, passed, failed, restarted; set to normal, forced open, disabled, metrics only
            (Closed, [Some(Open), stays, stays, stays, stays,
                      stays, Some(ForcedOpen), Some(Disabled), Some(MetricsOnly)]),
            (Open, [stays, Some(HalfOpen), stays, stays, Some(Open),
                    Some(Closed), Some(ForcedOpen), Some(Disabled), Some(MetricsOnly)]),
            (HalfOpen, [stays, stays, Some(Closed), Some(Open), Some(Open),
                        Some(Closed), Some(ForcedOpen), Some(Disabled), Some(MetricsOnly)]),
            (ForcedOpen, [stays, stays, stays, stays, stays,
                          Some(Closed), stays, Some(Disabled), Some(MetricsOnly)]),
            (Disabled, [stays, stays, stays, stays, stays,
                        Some(Closed), Some(ForcedOpen), stays, Some(MetricsOnly)]),
            (MetricsOnly, [stays, stays, stays, stays, stays,
                           Some(Closed), Some(ForcedOpen), Some(Disabled), stays]),
        ];
        assert_eq!(table.map(|(phase, _)| phase), Phase::ALL);
        for (phase, row) in table {
            for (event, expected) in Event::ALL.into_iter().zip(row) {
                assert_eq!(phase.after(event), expected, "{phase:?}, {event:?}");
            }
        }
    }

    #[test]
    fn only_what_is_normal_has_every_state() {
        for phase in Phase::ALL {
            let (state, mode) = (phase.state(), phase.mode());
            let same = Phase::ALL
                .into_iter()
                .filter(|other| (other.state(), other.mode()) == (state, mode));
            assert_eq!(same.count(), 1, "{phase:?}");
        }
    }
}
