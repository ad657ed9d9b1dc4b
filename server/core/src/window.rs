//! Windows of the wall clock: fixed ones, which begin at multiples of their length, and those of a calendar.

use core::{num::NonZeroU64, time::Duration};

use thiserror::Error;

use crate::{
    Admission, Ask, Kind, Level, Mark, Moment, Plan, Purpose, Reason, Settled, Settlement, Time,
    Wall,
    kind::admit,
    time::saturating_nanos,
    token_bucket::{MAX_PER, MAX_TOKENS},
};

/// A stretch of the wall clock, from its start up to and without its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The first moment in it.
    pub start: Wall,
    /// The first moment after it.
    pub end: Wall,
}

/// `limit` tokens in each window of a row of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowLimit {
    limit: u64,
    period: Period,
}

/// How long windows are, and where they begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Period {
    /// All of one length, each begins at a multiple of it since the Unix epoch.
    Fixed(NonZeroU64),
    /// Those of a calendar, none longer than so many nanoseconds; the one at hand comes with the
    /// [ask](Ask::window).
    Calendar(NonZeroU64),
}

/// Settings that no window can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum InvalidWindow {
    /// Too many tokens a window.
    #[error("`limit` is {0}, above 10^12")]
    Limit(u64),
    /// No window, or too long a one.
    #[error("`per` is {0:?}, outside 1ns to 366 days")]
    Per(Duration),
}

/// Longest window of a calendar: a year, and what a time zone may add to it.
const LONGEST: Duration = Duration::from_secs(400 * 24 * 60 * 60);

impl WindowLimit {
    /// `limit` tokens, at most 10^12, in each `per` of 1 ns to 366 days. `limit: 0` denies all.
    ///
    /// # Errors
    /// If a setting is out of range.
    pub fn fixed(limit: u64, per: Duration) -> Result<Self, InvalidWindow> {
        Ok(Self { limit, period: Period::Fixed(checked(limit, per, MAX_PER)?) })
    }

    /// `limit` tokens, at most 10^12, in each window of a calendar that has none longer than `longest`, at
    /// most 400 days. `limit: 0` denies all.
    ///
    /// # Errors
    /// If a setting is out of range.
    pub fn calendar(limit: u64, longest: Duration) -> Result<Self, InvalidWindow> {
        Ok(Self { limit, period: Period::Calendar(checked(limit, longest, LONGEST)?) })
    }

    /// Tokens of one window.
    #[must_use]
    pub const fn limit(&self) -> u64 {
        self.limit
    }

    /// How long the windows are, and where they begin.
    #[must_use]
    pub const fn period(&self) -> Period {
        self.period
    }

    /// No window is longer.
    #[must_use]
    pub const fn longest(&self) -> Duration {
        let (Period::Fixed(nanos) | Period::Calendar(nanos)) = self.period;
        Duration::from_nanos(nanos.get())
    }
}

fn checked(limit: u64, per: Duration, longest: Duration) -> Result<NonZeroU64, InvalidWindow> {
    if limit > MAX_TOKENS {
        return Err(InvalidWindow::Limit(limit));
    }
    match NonZeroU64::new(saturating_nanos(per)) {
        Some(nanos) if per <= longest => Ok(nanos),
        _ => Err(InvalidWindow::Per(per)),
    }
}

/// What one cell remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Tokens spent in the window; more than the limit is debt.
    pub spent: u64,
    /// The first moment of the window.
    pub start: Wall,
    /// The end of the window: until then it is the current one, whatever clock and settings say meanwhile.
    /// [`Wall::default`] if the cell was counted by no window before: then it is the one that `start` is in.
    pub end: Wall,
    /// When it was first charged. A window that has yet to begin was charged under a clock that was ahead: it
    /// is the current one for as long as one lasts from here.
    pub since: Time,
}

impl State {
    pub(crate) const fn kept(&self, mark: Mark) -> Self {
        Self { spent: mark.spent, ..*self }
    }

    pub(crate) const fn lowest_mark(&self, at: Time) -> Mark {
        Mark { spent: self.spent, at }
    }

    pub(crate) fn reset(self, held: impl Fn(u64) -> u64) -> Self {
        Self { spent: self.spent.min(held(self.end.as_nanos())), ..self }
    }

    const fn is_adopted(&self) -> bool {
        self.end.as_nanos() == 0
    }
}

impl Kind for WindowLimit {
    type State = State;

    fn capacity(&self) -> u64 {
        self.limit
    }

    fn plan(&self, state: Option<State>, ask: Ask, now: Moment) -> Plan<State> {
        let reserved = ask.reserved;
        let limit = ask.limit.unwrap_or(self.limit);
        let before = self.current(state, ask.window, now);
        let left = limit.saturating_sub(before.spent);
        let tokens = ask.granted_of(left);
        let until_end = self.until_end(before, now);
        let looks = matches!(ask.purpose, Purpose::Peek | Purpose::Credit);
        let admission = if looks && before.spent.saturating_sub(ask.credited()) > limit {
            Admission::Deny { reason: Reason::RateLimited, retry_after: Some(until_end) }
        } else if limit == 0 && !looks {
            Admission::Deny { reason: Reason::Blocked, retry_after: None }
        } else {
            let ever = tokens <= limit.saturating_sub(reserved);
            admit(tokens, left, reserved, Reason::RateLimited, || ever.then_some(until_end))
        };
        // Also what is denied counts, where it is charged at all: who gives it back, or looks, must find it.
        let spent = before.spent.saturating_add(tokens).saturating_sub(ask.credited());
        let after = State { spent, ..before };
        let level = |state: State| Level {
            remaining: limit.saturating_sub(state.spent).saturating_sub(reserved),
            reset_after: if state.spent == 0 { Duration::ZERO } else { until_end },
        };
        Plan {
            admission,
            spent: before.spent,
            limit: limit.saturating_sub(reserved),
            before: level(before),
            after: level(after),
            charged: if after.spent == before.spent { state } else { Some(after) },
            granted: tokens,
            slice: before.end.as_nanos(),
        }
    }

    fn settle(&self, state: Option<State>, settlement: Settlement, now: Moment) -> Settled<State> {
        let before = self.current(state, settlement.window, now);
        let same = settlement.slice == Some(before.end.as_nanos());
        let refunded = if same { settlement.refund().min(before.spent) } else { 0 };
        let most = self.limit.saturating_add(settlement.max_debt);
        let owed = settlement.excess().min(most.saturating_sub(before.spent));
        let after = State { spent: before.spent - refunded + owed, ..before };
        Settled {
            state: if after.spent == before.spent { state } else { Some(after) },
            refunded,
            owed,
            dropped: settlement.excess() - owed,
        }
    }

    fn mark(&self, state: State, step: u64, now: Moment) -> Mark {
        let State { spent, .. } = state;
        let ahead = if spent <= self.limit {
            // A mark alone never makes debt.
            spent.saturating_add(step).min(self.limit)
        } else if step > 0 {
            // Where there is some, nothing is admitted anyway: as much again, or a flood of what is denied would be
            // written hit by hit.
            spent.saturating_add(step.max(spent))
        } else {
            spent
        };
        Mark { spent: ahead, at: now.time }
    }

    fn max_step(&self) -> u64 {
        (self.limit / 100).max(1)
    }

    fn covers(&self, mark: Mark, before: State, after: State) -> bool {
        let same_window = after == State { spent: after.spent, ..before };
        same_window && mark.spent >= after.spent
    }

    fn revive(&self, state: State, _: u64, now: Moment) -> State {
        State { since: state.since.min(now.time), ..state }
    }

    fn spent(&self, state: State, now: Moment) -> u64 {
        if self.is_over(state, now) { 0 } else { state.spent }
    }

    fn having_spent(&self, tokens: u64, at: Moment) -> State {
        State { spent: tokens, start: at.wall, end: Wall::default(), since: at.time }
    }

    fn fills_in(&self) -> Option<Duration> {
        (self.limit > 0).then(|| self.longest())
    }

    fn full_at(&self, state: State, now: Moment) -> Option<Time> {
        Some(if self.is_over(state, now) {
            now.time_at(self.end(state).min(now.wall)).min(self.held_until(state))
        } else if state.spent == 0 {
            // Until it has begun it keeps those before it from being granted again.
            let until_begun = now.time_at(state.start.max(now.wall));
            until_begun.min(self.held_until(state))
        } else {
            now.time.after(self.until_end(state, now))
        })
    }

    fn rebase(&self, state: State, _: Option<&Self>, at: Moment) -> State {
        // It goes on to its end, but no longer than one of the new ones would.
        State { end: state.end.min(at.wall.after(self.longest())), ..state }
    }
}

impl WindowLimit {
    /// The cell as it is now.
    fn current(&self, state: Option<State>, offered: Option<Window>, now: Moment) -> State {
        let window = self.window(offered, now.wall);
        let fresh = State { spent: 0, start: window.start, end: window.end, since: now.time };
        match state.filter(|state| !self.is_over(*state, now)) {
            Some(state) if !state.is_adopted() => state,
            Some(State { spent, start, since, .. }) if window.start <= start => {
                State { spent, since, ..fresh }
            }
            _ => fresh,
        }
    }

    /// The window that the clock is in.
    fn window(&self, offered: Option<Window>, wall: Wall) -> Window {
        let start = match (self.period, offered) {
            (_, Some(window)) => return window,
            (Period::Fixed(per), None) => wall.as_nanos() - wall.as_nanos() % per,
            (Period::Calendar(_), None) => wall.as_nanos(),
        };
        let start = Wall::from_nanos(start);
        Window { start, end: start.after(self.longest()) }
    }

    /// Whether the window of `state` is over. One that the clock says has yet to begin is not, until it would
    /// be if the clock had been right: a clock that steps back grants nothing twice, and one that was wrong
    /// locks nobody out for longer than a window.
    fn is_over(&self, state: State, now: Moment) -> bool {
        now.wall >= self.end(state) || now.wall < state.start && now.time >= self.held_until(state)
    }

    fn end(&self, state: State) -> Wall {
        if state.is_adopted() { state.start.after(self.longest()) } else { state.end }
    }

    /// Until when the window is the current one although it has yet to begin.
    fn held_until(&self, state: State) -> Time {
        state.since.after(self.longest())
    }

    /// Time until the window of `state` is over, if no clock steps.
    fn until_end(&self, state: State, now: Moment) -> Duration {
        let until_begun = state.start.nanos_since(now.wall);
        let held = self.held_until(state).nanos_since(now.time);
        let until_end = self.end(state).nanos_since(now.wall);
        Duration::from_nanos(if held < until_begun { held } else { until_end })
    }
}
