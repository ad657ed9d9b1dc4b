//! A call that was let through.

use std::{fmt, sync::Arc, time::Duration};

use fusebox_core::{Time, circuit::ProbeId};

use super::{
    Verdict,
    circuit::{Circuit, End},
    probe::Grant,
};

/// By what a call was let through, which says who is told how it went.
#[derive(Debug)]
pub(super) enum Pass {
    /// A closed circuit: the local breaker, and the server.
    Free,
    /// A half-open local breaker: it, and the server.
    OwnProbe(ProbeId),
    /// A circuit that only counts: the server.
    Watched,
    /// One that is disabled: nobody.
    Uncounted,
    /// A half-open shared circuit: the server, at once.
    Probe(Box<Grant>),
}

/// A call that is made by who has the handle: most go through a closed circuit, and need no hold of it.
pub(super) enum Crossing<'a> {
    Free(Free<'a>),
    Held(Permit),
}

impl Crossing<'_> {
    #[inline]
    pub(super) fn record(self, verdict: Verdict) {
        match self {
            Self::Free(mut free) => free.end(End::Told(verdict)),
            Self::Held(permit) => permit.record(verdict),
        }
    }
}

/// A call through a closed circuit. Dropped without a word it is abandoned.
pub(super) struct Free<'a> {
    circuit: &'a Arc<Circuit>,
    word: u64,
    began: Time,
    is_over: bool,
}

impl<'a> Free<'a> {
    #[inline]
    pub(super) fn new(circuit: &'a Arc<Circuit>, word: u64, began: Time) -> Self {
        Self { circuit, word, began, is_over: false }
    }

    #[inline]
    fn end(&mut self, end: End) {
        if !self.is_over {
            self.is_over = true;
            self.circuit.end(&mut Pass::Free, self.word, self.began, end);
        }
    }
}

impl Drop for Free<'_> {
    #[inline]
    fn drop(&mut self) {
        self.end(End::Abandoned);
    }
}

/// A call that was let through, to be told how it went.
///
/// Dropped without a word it is abandoned: that says nothing about the target, and a probe is given back. So it is if
/// the future that holds it is dropped.
#[must_use = "a permit that is dropped is a call that was abandoned"]
pub struct Permit {
    circuit: Arc<Circuit>,
    pass: Pass,
    word: u64,
    began: Time,
    is_over: bool,
}

impl Permit {
    #[inline]
    pub(super) fn new(circuit: Arc<Circuit>, pass: Pass, word: u64, began: Time) -> Self {
        Self { circuit, pass, word, began, is_over: false }
    }

    /// The target did what it was asked.
    #[inline]
    pub fn success(self) {
        self.record(Verdict::Success);
    }

    /// The target failed; `kind` says how, in at most 64 bytes, and may be empty.
    pub fn failure(self, kind: &'static str) {
        self.record(Verdict::Failure(kind));
    }

    /// The call says nothing about the target.
    pub fn ignore(self) {
        self.record(Verdict::Ignored);
    }

    /// The call is over; how long it took is measured from when it was let through.
    #[inline]
    pub fn record(mut self, verdict: Verdict) {
        self.end(End::Told(verdict));
    }

    /// How long the call has been under way.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.circuit.elapsed(self.began)
    }

    /// Whether it is a probe of a half-open circuit, the fleet's or this process's own: what it says is waited for.
    #[must_use]
    pub fn is_probe(&self) -> bool {
        matches!(self.pass, Pass::Probe(_) | Pass::OwnProbe(_))
    }

    #[inline]
    fn end(&mut self, end: End) {
        if !self.is_over {
            self.is_over = true;
            self.circuit.end(&mut self.pass, self.word, self.began, end);
        }
    }
}

impl Drop for Permit {
    #[inline]
    fn drop(&mut self) {
        self.end(End::Abandoned);
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit").field("pass", &self.pass).field("began", &self.began).finish()
    }
}
