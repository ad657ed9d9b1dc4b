//! Circuits, as operators look at them and force them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use fusebox_core::{
    Moment, Time,
    circuit::{
        Aside, Circuit, Counts, Evidence, Exceeded, Generation, Mode, Order, Share, State,
        Transition, Turn, View,
    },
};

use super::{Action, AdminError, App, Principal, about, events};
use crate::{
    app::{mode_name, state_name},
    catalogue::{Catalogue, PolicyName},
    config::shown_duration,
    storage::{CircuitName, Place},
};

/// What operators are told of one circuit.
#[derive(Clone, Debug)]
pub struct CircuitTold {
    /// Its breaker.
    pub policy: Arc<str>,
    /// Which of it.
    pub key: Box<str>,
    /// What it is.
    pub view: View,
    /// What its calls say now, if it is closed.
    pub says: Option<Evidence>,
    /// It is remembered.
    pub live: bool,
    /// When this was so.
    pub now: Moment,
}

/// All that is known of one circuit.
#[derive(Clone, Debug)]
pub struct CircuitInspected {
    /// What it is.
    pub circuit: CircuitTold,
    /// The calls that it is judged by.
    pub calls: Evidence,
    /// Calls that it is not judged by.
    pub aside: Aside,
    /// Latency that half of the calls did not exceed, and 99 in a hundred.
    pub latencies: [Option<Duration>; 2],
    /// Which rates would have opened it while it only counts.
    pub exceeded: Exceeded,
    /// Who reports.
    pub reporters: Vec<ReporterSeen>,
    /// For how long each of its probes runs, and how long it still may.
    pub probes: Vec<(Duration, Duration)>,
    /// Its latest transitions, the newest first.
    pub history: Vec<Transition>,
}

/// What one reporter told of a circuit.
#[derive(Clone, Debug)]
pub struct ReporterSeen {
    /// Who; empty of all that are not told apart.
    pub id: String,
    /// Where it runs.
    pub zone: String,
    /// Its calls in the window.
    pub counts: Counts,
    /// It sees the target failing.
    pub unhealthy: bool,
}

/// Which circuits are wanted.
#[derive(Clone, Copy, Debug)]
pub struct CircuitFilter<'a> {
    /// Of this namespace.
    pub namespace: &'a str,
    /// Only of this breaker.
    pub policy: Option<&'a str>,
    /// Only in this state.
    pub state: Option<State>,
    /// Only in this mode.
    pub mode: Option<Mode>,
    /// Only those after this one: its breaker, and its key.
    pub after: Option<(&'a str, &'a str)>,
}

/// What a circuit is to be.
#[derive(Clone, Debug)]
pub struct SetMode {
    /// Its breaker.
    pub name: PolicyName,
    /// Which of it.
    pub key: String,
    /// What it is to be.
    pub mode: Mode,
    /// For how long; of [`Mode::Normal`] it means nothing.
    pub ttl: Duration,
    /// Why.
    pub reason: String,
    /// Only if this is its generation; whatever it is if `None`.
    pub expected: Option<Generation>,
}

/// A circuit whose mode was set.
#[derive(Debug)]
pub struct ModeSet {
    /// What it is now.
    pub circuit: CircuitTold,
    /// Whether it is anything else than it was.
    pub changed: bool,
}

impl App {
    /// Some circuits, by breaker and key.
    ///
    /// # Errors
    /// If there is no such namespace, or no such breaker.
    pub fn list_circuits(
        &self,
        filter: CircuitFilter<'_>,
        count: usize,
    ) -> Result<Vec<CircuitTold>, AdminError> {
        let CircuitFilter { namespace: name, policy, .. } = filter;
        let catalogue = self.catalogue.load();
        let unknown = || AdminError::UnknownNamespace(name.to_owned());
        let namespace = catalogue.namespace(name).ok_or_else(unknown)?;
        if let Some(policy) = policy {
            self.place(&catalogue, &PolicyName::new(name, policy), "")?;
        }
        let mut page = BTreeMap::new();
        self.circuits.visit(name, |name, view, _| {
            let CircuitName { breaker: PolicyName { policy, .. }, key, .. } = &**name;
            // Those of a breaker that is gone are about to leave.
            let breakers = namespace.policy(policy).and_then(|policy| policy.breakers.as_ref());
            if breakers.is_some() && filter.wants((policy, key), view) {
                page.insert((Arc::clone(policy), key.clone()), view.clone());
                if page.len() > count {
                    page.pop_last();
                }
            }
        });
        // Only of those on the page what their calls say.
        let now = self.clock.now();
        let told = page.into_iter().filter_map(|((policy, key), view)| {
            let place = namespace.policy(&policy)?.place(&key)?;
            let look =
                |_: &_, view: &View, circuit: &Circuit| self.told(&place, view, circuit, now);
            let told = self.circuits.look(place.cell, look);
            // One that has just left is on the page all the same: the next one begins after it.
            Some(told.unwrap_or_else(|| CircuitTold { view, ..self.not_there(&place, now).0 }))
        });
        Ok(told.collect())
    }

    /// All about one circuit, also about one that is not there.
    ///
    /// # Errors
    /// If there is no such breaker.
    pub fn inspect_circuit(
        &self,
        name: &PolicyName,
        key: &str,
    ) -> Result<CircuitInspected, AdminError> {
        let catalogue = self.catalogue.load();
        let place = self.place(&catalogue, name, key)?;
        let now = self.clock.now();
        let looked = self.circuits.look(place.cell, |_, view, circuit| {
            (self.told(&place, view, circuit, now), circuit.clone())
        });
        let (circuit, seen) = looked.unwrap_or_else(|| self.not_there(&place, now));
        let told = circuit.view.generation;
        let history = seen.history().rev().filter(|one| one.generation <= told);
        let history = history.cloned().collect();
        // It has gone on, and nobody is told of that yet: what it was has seen nothing any more.
        let new = || Circuit::new(told, place.breaker, now.time);
        let seen = if seen.generation() == told { seen } else { new() };
        let (mut calls, mut reporters) = (Evidence::default(), Vec::new());
        self.circuits.turn((place.cell, place.breaker), now.time, |turn| {
            calls = seen.evidence(turn);
            seen.visit_reporters(turn, |by, counts, unhealthy| {
                let (id, zone) = (by.id.to_owned(), by.zone.to_owned());
                reporters.push(ReporterSeen { id, zone, counts, unhealthy });
            });
        });
        let timeout = place.breaker.half_open.probe_timeout;
        let probes = seen.probes().map(|(_, at)| {
            let age = Duration::from_nanos(now.time.nanos_since(at));
            (age, timeout.saturating_sub(age))
        });
        Ok(CircuitInspected {
            circuit,
            calls,
            aside: seen.aside(),
            latencies: [5_000, 9_900].map(|share| seen.latency(Share::new(share)?)),
            exceeded: seen.exceeded(),
            reporters,
            probes: probes.collect(),
            history,
        })
    }

    /// Makes a circuit what an operator wants it to be. It is so, and on disk, when this returns.
    ///
    /// # Errors
    /// If there is no such breaker, no room for another circuit of it, the circuit is of another generation than
    /// was expected, or it cannot be written.
    pub async fn set_circuit_mode(
        &self,
        principal: Principal,
        set: SetMode,
    ) -> Result<ModeSet, AdminError> {
        let SetMode { name, key, mode, ttl, reason, expected } = set;
        let _alone = self.desk.changing.lock().await;
        let now = self.clock.now();
        let catalogue = self.catalogue.load_full();
        let place = self.place(&catalogue, &name, &key)?;
        let event = events::Change {
            key: key.clone(),
            ..about(principal, Action::CircuitModeSet, &name, reason)
        };
        let (reason, actor) = (event.reason.as_str().into(), event.actor.as_str().into());
        let order = Order { mode, ttl, reason, actor };
        let may_be = |found: Generation| match expected {
            Some(expected) if expected != found => Err(AdminError::Moved { expected, found }),
            _ => Ok(()),
        };
        let make = |circuit: &mut Circuit, turn: Turn<'_>| {
            circuit.touch(turn);
            let before = circuit.view(turn);
            if let Err(moved) = may_be(before.generation) {
                return (Err(moved), false);
            }
            let changed = circuit.set(&order, turn);
            let circuit = self.told(&place, &circuit.view(turn), circuit, now);
            (Ok((before, ModeSet { circuit, changed })), changed)
        };
        let made = match mode {
            // None need come to be there for that.
            Mode::Normal => self.circuits.change_present(&place, now.time, make)?,
            _ => {
                let made = self
                    .circuits
                    .change_named(&place, now.time, |_, circuit, turn| make(circuit, turn))?;
                Some(made.ok_or_else(|| AdminError::TooManyCircuits(name.clone()))?)
            }
        };
        let Some(made) = made else {
            let (circuit, _) = self.not_there(&place, now);
            may_be(circuit.view.generation)?;
            return Ok(ModeSet { circuit, changed: false });
        };
        let (made, written) = made.split();
        let (before, set) = made?;
        if set.changed {
            let (before, after) = (said(&before, now.time), said(&set.circuit.view, now.time));
            let event = events::Change { before, after, ..event };
            self.note(Vec::new(), event, now)?.told().await?;
        }
        // Also where nothing changed: what it is already may not be on disk yet.
        written.told().await?;
        Ok(set)
    }

    /// Where the circuit of that key is, or would be.
    fn place<'a>(
        &self,
        catalogue: &'a Catalogue,
        name: &PolicyName,
        key: &'a str,
    ) -> Result<Place<'a>, AdminError> {
        let place = self.asked(catalogue, name)?.place(key);
        place.ok_or_else(|| AdminError::IsLimiter(name.clone()))
    }

    fn told(&self, place: &Place<'_>, view: &View, circuit: &Circuit, now: Moment) -> CircuitTold {
        let is_closed = view.phase.state() == State::Closed;
        let says = (is_closed && circuit.generation() == view.generation).then(|| {
            let breaker = (place.cell, place.breaker);
            self.circuits.turn(breaker, now.time, |turn| circuit.evidence(turn))
        });
        CircuitTold {
            policy: Arc::clone(place.policy),
            key: place.key.into(),
            view: view.clone(),
            says,
            live: true,
            now,
        }
    }

    /// What is told of a circuit that is not there.
    fn not_there(&self, place: &Place<'_>, now: Moment) -> (CircuitTold, Circuit) {
        let circuit = Circuit::new(self.circuits.absent(), place.breaker, now.time);
        let breaker = (place.cell, place.breaker);
        let view = self.circuits.turn(breaker, now.time, |turn| circuit.view(turn));
        let told = self.told(place, &view, &circuit, now);
        (CircuitTold { live: false, ..told }, circuit)
    }
}

impl CircuitFilter<'_> {
    fn wants(&self, (policy, key): (&str, &str), view: &View) -> bool {
        self.policy.is_none_or(|wanted| wanted == policy)
            && self.state.is_none_or(|wanted| wanted == view.phase.state())
            && self.mode.is_none_or(|wanted| wanted == view.phase.mode())
            && self.after.is_none_or(|after| after < (policy, key))
    }
}

/// A circuit in the words of an event.
fn said(view: &View, now: Time) -> String {
    let (state, mode) = (state_name(view.phase.state()), mode_name(view.phase.mode()));
    let left = view.forced.as_ref().map(|forced| {
        let seconds = Duration::from_nanos(forced.until.nanos_since(now)).as_secs_f64().ceil();
        format!(" for {}", shown_duration(Duration::from_secs_f64(seconds)))
    });
    format!("{state}, {mode}{}", left.unwrap_or_default())
}
