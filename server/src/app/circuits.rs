//! Circuits, as callers meet them: they ask before a call, and tell after it.

use std::{fmt, hash::Hasher, str::FromStr, sync::Arc};

use arrayvec::ArrayVec;
use fusebox_core::{
    Time,
    circuit::{
        Admitted, Call, Circuit, Delta, Generation, Mode, Outcome, Passage, ProbeId, Reported,
        Reporter, State, Turn, View,
    },
};
use siphasher::sip::SipHasher24;

use super::{
    App, GrantName, Held, Principal,
    grants::{NotAGrantId, Owner},
};
use crate::{
    catalogue::CellId,
    limits,
    storage::{Answer, CircuitName, Circuits, Durable, Locked, Place, StorageError},
};

/// A call that was let through a circuit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// What names the circuit.
    pub cell: CellId,
    /// The generation that it was let through in.
    pub generation: Generation,
    /// The probe that it is, if it is one.
    pub probe: Option<ProbeId>,
}

/// Those of one Acquire.
pub type Passes = ArrayVec<Pass, { limits::CIRCUIT_ASKS }>;

/// What a caller names by the id of a grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Granted {
    /// A grant that the server keeps.
    Kept(GrantName),
    /// Calls that were let through circuits, of which the id itself says all.
    Passed(PassName),
}

/// Calls that were let through circuits, as the id of their grant says. The server keeps nothing of them: a closed
/// circuit counts what is told of it, and a half-open one knows its probes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassName {
    /// The calls.
    pub passes: Passes,
    /// Says that this server has written it.
    seal: u64,
}

impl PassName {
    /// What the owner of these calls names them by.
    pub(super) fn new(passes: Passes, owner: &Owner, secret: &[u8; 16]) -> Self {
        let seal = Self::sealed(&passes, owner, secret);
        Self { passes, seal }
    }

    /// Whether this server, or one before it in the data directory, has given it to its owner.
    pub(super) fn is_true(&self, owner: &Owner, secret: &[u8; 16]) -> bool {
        self.seal == Self::sealed(&self.passes, owner, secret)
    }

    fn sealed(passes: &Passes, owner: &Owner, secret: &[u8; 16]) -> u64 {
        let mut hasher = SipHasher24::new_with_key(secret);
        // Apart from the seals of permits.
        hasher.write(MARK.as_bytes());
        for Pass { cell, generation, probe } in passes {
            hasher.write(&cell.to_bytes());
            hasher.write_u64(generation.0);
            hasher.write_u64(probe.map_or(u64::MAX, |ProbeId(probe)| probe.into()));
        }
        let Principal::Anonymous = owner.principal;
        hasher.write(owner.namespace.as_bytes());
        hasher.finish()
    }
}

/// What ids of calls through circuits begin with; those of grants begin with a number.
const MARK: &str = "c";

/// An id in the making. It is written by hand, as each call through a circuit has one: formatting takes longer than
/// all that is decided.
struct Text(ArrayVec<u8, LONGEST>);

/// Longest id that anybody can name, also one that nobody has: the mark, the parts of each call, and the seal.
const LONGEST: usize = MARK.len() + limits::CIRCUIT_ASKS * (33 + 17 + 9) + 17;

impl Text {
    /// Adds a part of at least so many hexadecimal digits.
    fn put(&mut self, number: u64, digits: u32) {
        self.0.push(b'-');
        let digits = digits.max((u64::BITS - number.leading_zeros()).div_ceil(4));
        self.put_digits(number, digits);
    }

    fn put_digits(&mut self, number: u64, digits: u32) {
        for digit in (0..digits).rev() {
            let [digit, ..] = (number >> (4 * digit)).to_le_bytes();
            self.0.push(b"0123456789abcdef"[usize::from(digit & 0xf)]);
        }
    }

    fn as_str(&self) -> &str {
        // Of letters, digits and dashes.
        str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl PassName {
    fn text(&self) -> Text {
        let mut text = Text(ArrayVec::new());
        text.0.extend(MARK.bytes());
        for Pass { cell, generation, probe } in &self.passes {
            text.put(cell.0[0], 16);
            text.put_digits(cell.0[1], 16);
            text.put(generation.0, 1);
            match probe {
                Some(ProbeId(probe)) => text.put(u64::from(*probe), 1),
                None => text.0.push(b'-'),
            }
        }
        text.put(self.seal, 16);
        text
    }
}

impl fmt::Display for PassName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text().as_str())
    }
}

impl FromStr for PassName {
    type Err = NotAGrantId;

    fn from_str(text: &str) -> Result<Self, NotAGrantId> {
        let (marked, seal) = text.rsplit_once('-').ok_or(NotAGrantId)?;
        let mut parts = marked.split('-');
        let number = |text: &str| u64::from_str_radix(text, 16).map_err(|_| NotAGrantId);
        if parts.next() != Some(MARK) {
            return Err(NotAGrantId);
        }
        let mut passes = Passes::new();
        while let Some(cell) = parts.next() {
            let cell = u128::from_str_radix(cell, 16).map_err(|_| NotAGrantId)?;
            let (generation, probe) = (parts.next(), parts.next().ok_or(NotAGrantId)?);
            let probe = (!probe.is_empty()).then(|| u32::from_str_radix(probe, 16)).transpose();
            let pass = Pass {
                cell: CellId::from_bytes(&cell.to_be_bytes()).ok_or(NotAGrantId)?,
                generation: Generation(number(generation.ok_or(NotAGrantId)?)?),
                probe: probe.map_err(|_| NotAGrantId)?.map(ProbeId),
            };
            passes.try_push(pass).map_err(|_| NotAGrantId)?;
        }
        // One spelling only: `+1` and `01` parse as well.
        let name = Self { passes, seal: number(seal)? };
        if name.text().as_str() == text { Ok(name) } else { Err(NotAGrantId) }
    }
}

impl Granted {
    /// The name of a grant that the server keeps.
    pub fn kept(self) -> Option<GrantName> {
        match self {
            Self::Kept(name) => Some(name),
            Self::Passed(_) => None,
        }
    }
}

impl fmt::Display for Granted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kept(name) => name.fmt(f),
            Self::Passed(name) => name.fmt(f),
        }
    }
}

impl FromStr for Granted {
    type Err = NotAGrantId;

    fn from_str(text: &str) -> Result<Self, NotAGrantId> {
        let passed = text.parse().map(Self::Passed);
        passed.or_else(|_| text.parse().map(Self::Kept))
    }
}

/// A call that would go through a circuit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crossing<'a> {
    /// The ask.
    pub(super) ask: usize,
    /// The circuit.
    pub(super) place: Place<'a>,
    /// It only wants to know.
    pub(super) peeks: bool,
}

/// What became of the ask of a circuit.
#[derive(Clone, Debug)]
pub struct Crossed {
    /// The ask.
    pub ask: usize,
    /// What becomes of the call.
    pub passage: Passage,
    /// What the circuit is; `None` if there is no room for it, and nobody shares it.
    pub view: Option<View>,
    /// What was let through.
    pub admitted: Option<Admitted>,
}

impl Crossed {
    /// What its part of a grant lives.
    pub(super) fn held(&self) -> Option<Held> {
        let (_, expires_in) = self.admitted?.probe?;
        Some(Held { ask: self.ask, leased: 0, permits: true, expires_in })
    }
}

/// Circuits that are asked together, locked until it is known what becomes of the call.
pub(super) struct Crossings<'a> {
    locked: Locked<'a>,
    asked: ArrayVec<Option<(Passage, View)>, { limits::CIRCUIT_ASKS }>,
}

impl<'a> Crossings<'a> {
    fn new(
        circuits: &'a Circuits,
        crossings: &[Crossing<'_>],
        now: Time,
    ) -> Result<Self, StorageError> {
        let cells: ArrayVec<_, { limits::CIRCUIT_ASKS }> =
            crossings.iter().map(|crossing| crossing.place.cell).collect();
        let mut locked = circuits.lock(&cells)?;
        let asked = crossings.iter().map(|crossing| match &crossing.place {
            // It would be closed: nothing comes to be there for a look.
            place if crossing.peeks && !locked.has(place) => {
                let absent = Circuit::new(circuits.absent(), place.breaker, now);
                let view =
                    circuits.turn((place.cell, place.breaker), now, |turn| absent.view(turn));
                Some((Passage::Free, view))
            }
            place => locked.ask(place, now),
        });
        let asked = asked.collect();
        Ok(Self { locked, asked })
    }

    /// Whether a circuit refuses the call.
    pub(super) fn is_refused(&self) -> bool {
        let mut refused = self.asked.iter().flatten();
        refused.any(|(passage, _)| matches!(passage, Passage::Refused { .. }))
    }

    /// Lets the call through all of them, or none.
    pub(super) fn conclude(
        &mut self,
        crossings: &[Crossing<'_>],
        allowed: bool,
        now: Time,
    ) -> (ArrayVec<Crossed, { limits::CIRCUIT_ASKS }>, Passes) {
        let mut passes = Passes::new();
        let asked = std::mem::take(&mut self.asked);
        let crossed = crossings.iter().zip(asked).map(|(crossing, asked)| {
            let Crossing { ask, place, peeks } = *crossing;
            let Some((passage, mut view)) = asked else {
                return Crossed { ask, passage: Passage::Free, view: None, admitted: None };
            };
            let admitted = match peeks {
                true => None,
                false => self.locked.conclude(&place, passage, allowed, now),
            };
            if let Some((admitted, now_is)) = admitted.as_ref() {
                let Admitted { generation, probe } = *admitted;
                let probe = probe.map(|(probe, _)| probe);
                passes.push(Pass { cell: place.cell, generation, probe });
                view.clone_from(now_is);
            }
            let admitted = admitted.map(|(admitted, _)| admitted);
            Crossed { ask, passage, view: Some(view), admitted }
        });
        (crossed.collect(), passes)
    }

    /// When all that was seen of them is on disk; `None` if it is already.
    pub(super) fn durable(self) -> Option<Durable> {
        self.locked.durable()
    }
}

/// Who tells of what never reached a caller.
const NOBODY: Reporter<'static> = Reporter { id: "", zone: "" };

/// A circuit as who tells of it is told of it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its names.
    pub name: Arc<CircuitName>,
    /// What it is.
    pub view: View,
    /// Who tells fails alone.
    pub outlier: bool,
}

/// A state, as people and metrics are told.
pub(crate) const fn state_name(state: State) -> &'static str {
    match state {
        State::Closed => "closed",
        State::Open => "open",
        State::HalfOpen => "half_open",
    }
}

/// A mode, as people and metrics are told.
pub(crate) const fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Normal => "normal",
        Mode::ForcedOpen => "forced_open",
        Mode::Disabled => "disabled",
        Mode::MetricsOnly => "metrics_only",
    }
}

/// What a circuit made of what it was told, unless that was nothing new, and what it is then.
pub(super) type Heard = Answer<(Option<Reported>, Seen)>;

impl App {
    /// Asks circuits, if any are asked for.
    ///
    /// # Errors
    /// If nothing is decided any more.
    pub(super) fn cross(
        &self,
        crossings: &[Crossing<'_>],
        now: Time,
    ) -> Result<Option<Crossings<'_>>, StorageError> {
        let some = !crossings.is_empty();
        some.then(|| Crossings::new(&self.circuits, crossings, now)).transpose()
    }

    /// Gives probes back whose caller could not be told of them.
    pub(super) fn abandon(&self, passes: &[Pass], now: Time) {
        let call = Call { outcome: Outcome::Abandoned, latency: None, kind: "" };
        for pass in passes.iter().filter(|pass| pass.probe.is_some()) {
            let name = self.circuits.look(pass.cell, |name, _, _| Arc::clone(name));
            if let Some(name) = name {
                let namespace = &name.breaker.namespace;
                // Where nothing is decided any more, nobody needs them either.
                let _ = self.report_pass(namespace, (*pass, Some(call)), NOBODY, now);
            }
        }
    }

    /// Tells a circuit how a call went, if `call` is not told already, and what the circuit is then. `None` if
    /// there is no such circuit in the namespace.
    ///
    /// # Errors
    /// If nothing is decided any more.
    pub(super) fn report_pass(
        &self,
        namespace: &str,
        (pass, call): (Pass, Option<Call<'_>>),
        by: Reporter<'_>,
        now: Time,
    ) -> Result<Option<Heard>, StorageError> {
        let Some(name) = self.circuits.look(pass.cell, |name, _, _| Arc::clone(name)) else {
            return Ok(None);
        };
        let catalogue = self.catalogue.load();
        let place = catalogue.policy(&name.breaker).and_then(|policy| policy.place_of(&name));
        let Some(place) = place.filter(|_| *name.breaker.namespace == *namespace) else {
            return Ok(None);
        };
        self.tell(&place, by, now, |circuit, turn| {
            let call = call?;
            Some(match pass.probe {
                Some(probe) => circuit.report_probe((pass.generation, probe), call, by, turn),
                None => circuit.report_call(pass.generation, call, by, turn),
            })
        })
    }

    /// Tells a circuit how many calls went, if `delta` is not told already, and what the circuit is then. `None`
    /// if there is no room for it.
    ///
    /// # Errors
    /// If nothing is decided any more.
    pub(super) fn report_delta(
        &self,
        place: &Place<'_>,
        delta: Option<(Generation, Delta<'_>)>,
        by: Reporter<'_>,
        now: Time,
    ) -> Result<Option<Heard>, StorageError> {
        self.tell(place, by, now, |circuit, turn| {
            let (said, delta) = delta?;
            let generation = self.circuits.meant(circuit, said);
            Some(circuit.report(generation, delta, by, turn))
        })
    }

    fn tell(
        &self,
        place: &Place<'_>,
        by: Reporter<'_>,
        now: Time,
        tell: impl FnOnce(&mut Circuit, Turn<'_>) -> Option<Reported>,
    ) -> Result<Option<Heard>, StorageError> {
        self.circuits.change_named(place, now, |name, circuit, turn| {
            circuit.touch(turn);
            let reported = tell(circuit, turn);
            let (view, outlier) = (circuit.view(turn), circuit.is_outlier(by.id, turn));
            ((reported, Seen { name: Arc::clone(name), view, outlier }), false)
        })
    }

    /// A reporter leaves all circuits of a namespace, and takes what it told along.
    pub(super) fn leave(&self, namespace: &str, reporter: &str, now: Time) {
        let catalogue = self.catalogue.load();
        let mut names = Vec::new();
        self.circuits.visit(namespace, |name, _, _| names.push(Arc::clone(name)));
        for name in names {
            let policy = catalogue.policy(&name.breaker);
            let Some(place) = policy.and_then(|policy| policy.place_of(&name)) else { continue };
            let leave = |circuit: &mut Circuit, turn: Turn<'_>| {
                circuit.leave(reporter, turn);
                ((), false)
            };
            // Where nothing is decided any more, nothing is told either.
            let _ = self.circuits.change_present(&place, now, leave);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner() -> Owner {
        Owner { principal: Principal::Anonymous, namespace: "demo".into() }
    }

    #[test]
    fn the_longest_id_fits_is_read_again_and_cannot_be_made_up() {
        let pass = |number, probe| Pass {
            cell: CellId([u64::MAX, number]),
            generation: Generation(u64::MAX),
            probe,
        };
        let longest = Some(ProbeId(2 * fusebox_core::circuit::MAX_PROBES + 1));
        for passes in [vec![pass(1, None)], vec![pass(1, longest), pass(2, longest)]] {
            let passes: Passes = passes.into_iter().collect();
            let name = PassName::new(passes, &owner(), &[7; 16]);
            let text = name.to_string();
            assert!(text.len() <= limits::GRANT_ID_BYTES, "{} bytes", text.len());
            assert_eq!(text.parse(), Ok(Granted::Passed(name.clone())));
            assert!(name.is_true(&owner(), &[7; 16]));
            assert!(!name.is_true(&owner(), &[8; 16]));
            let other = Owner { namespace: "other".into(), ..owner() };
            assert!(!name.is_true(&other, &[7; 16]));
            for other in ["c-0-0-0-0", "c-0-0-ffffffff-0-0-ffffffff-0"] {
                assert_eq!(other.parse::<Granted>(), Err(NotAGrantId), "{other}");
            }
            for other in [format!("{text}0"), text.to_uppercase(), text.replacen('-', "--", 1)] {
                assert_eq!(other.parse::<Granted>(), Err(NotAGrantId), "{other}");
            }
        }
    }
}
