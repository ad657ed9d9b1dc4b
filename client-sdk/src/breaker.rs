//! Circuits: the fleet's, and this process's own.
//!
//! Every circuit has a full local breaker, which sees the calls of this process. What the server tells of the circuit
//! that the fleet shares stands above it, while it is fresh:
//! - not closed: calls are refused, but for the probes that the server grants, which pass the local breaker too;
//! - closed: the local breaker decides, and begins anew when the shared circuit is seen to close;
//! - an operator's order binds both for its own time, also when the server is gone.
//!
//! Losing the server is no evidence about the target: calls that were refused, and asks without an answer, are never
//! failures.
//!
//! A closed circuit costs a call two readings of the clock, and nothing is allocated, also for a refusal. The server
//! is told of sums some times a second, and of failures sooner.
//!
//! A client shares at most 10,000 circuits at a time; further ones, up to as many again, have the local breaker alone.
//! A circuit that no handle is held of and no call came for in five minutes leaves. Past both, what [`Breaker::key`]
//! gives is a circuit of that handle alone.

mod circuit;
#[cfg(test)]
mod fake;
mod home;
mod local;
mod news;
mod permit;
mod probe;
mod registry;
mod shared;
mod tally;
#[cfg(test)]
mod tests;

use std::{pin::Pin, sync::Arc};

use fusebox_core::Time;
use thiserror::Error;

pub(crate) use self::registry::Breakers;
use self::{
    circuit::{Circuit, Decided},
    permit::{Crossing, Free, Pass},
    registry::Policy,
};
pub use self::{
    local::{InvalidLocal, Local},
    permit::Permit,
};
use crate::Rejected;

/// How a call went, as a classifier says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// The target did what it was asked.
    Success,
    /// The target failed; the kind of failure, at most 64 bytes, may be empty.
    Failure(&'static str),
    /// The call failed before it reached the target.
    LocalFailure,
    /// It says nothing about the target.
    Ignored,
}

/// Says how a call went by the whole of its result.
pub trait Classify<T, E> {
    /// How it went.
    fn classify(&self, result: &Result<T, E>) -> Verdict;
}

impl<T, E, F: Fn(&Result<T, E>) -> Verdict> Classify<T, E> for F {
    fn classify(&self, result: &Result<T, E>) -> Verdict {
        self(result)
    }
}

/// Every error is a failure of the target.
#[derive(Clone, Copy, Debug, Default)]
pub struct ErrorsAreFailures;

impl<T, E> Classify<T, E> for ErrorsAreFailures {
    fn classify(&self, result: &Result<T, E>) -> Verdict {
        if result.is_ok() { Verdict::Success } else { Verdict::Failure("") }
    }
}

/// Why [`Breaker::call`] has no result.
#[derive(Debug, Error)]
pub enum CallError<E> {
    /// The call was not made.
    #[error("{0}")]
    Rejected(#[from] Rejected),
    /// It was, and this is its error.
    #[error("{0}")]
    Call(#[source] E),
}

/// Whether a call was let through.
type Admitted = Result<Permit, Rejected>;

/// Waits until that is known.
type Asking = Pin<Box<dyn Future<Output = Admitted> + Send>>;

/// The circuit of one key. Clones are the same.
#[derive(Clone)]
pub struct Breaker {
    policy: Arc<Policy>,
    circuit: Arc<Circuit>,
}

impl Breaker {
    /// The same policy for another key, at most 256 bytes of UTF-8.
    ///
    /// It allocates only if the circuit is not there yet.
    #[must_use]
    pub fn key(&self, key: &str) -> Self {
        Self { policy: Arc::clone(&self.policy), circuit: self.policy.circuit(key) }
    }

    /// Settings of this process's own breakers of this policy, of all keys and all handles: from now on, and instead of
    /// those of the policy.
    ///
    /// # Errors
    /// If they make no sense.
    pub fn local(self, local: Local) -> Result<Self, InvalidLocal> {
        self.policy.is_set(local)?;
        self.circuit.is_set();
        Ok(self)
    }

    /// Lets a call through, or does not; asks the server where the circuit may be half-open.
    ///
    /// Nearly always it answers at once. Else it waits for the server, for as long as the client may wait for a
    /// decision; dropped meanwhile it leaves the probe, if it was one, to the next call.
    ///
    /// # Errors
    /// If the circuit is open, is half-open and has no probe left, lets through only a share of the calls yet, or was
    /// forced open. That the client is closed, or the server gone, is none.
    pub async fn admit(&self) -> Result<Permit, Rejected> {
        admit(&self.circuit).await
    }

    /// As [`admit`](Self::admit), for another key of the policy, which allocates nothing if its circuit is there.
    ///
    /// # Errors
    /// As [`admit`](Self::admit).
    pub async fn admit_for(&self, key: &str) -> Result<Permit, Rejected> {
        admit(&self.policy.circuit(key)).await
    }

    /// As [`admit`](Self::admit), from memory alone.
    ///
    /// Where the server would be asked the call is refused, and the server is asked all the same: a probe that it
    /// grants is had by the next call.
    ///
    /// # Errors
    /// As [`admit`](Self::admit); and with [`Reason::Undecided`](crate::Reason::Undecided) where the server would be asked.
    #[inline]
    pub fn try_admit(&self) -> Result<Permit, Rejected> {
        try_admit(&self.circuit)
    }

    /// As [`try_admit`](Self::try_admit), for another key of the policy, which allocates nothing if its circuit is
    /// there.
    ///
    /// # Errors
    /// As [`try_admit`](Self::try_admit).
    pub fn try_admit_for(&self, key: &str) -> Result<Permit, Rejected> {
        try_admit(&self.policy.circuit(key))
    }

    /// As [`admit`](Self::admit), for this key or another, or what to wait for where memory has no answer. For layers,
    /// whose futures have a name and so cannot hold one that waits.
    #[inline]
    pub(crate) fn admit_now(&self, key: Option<&str>) -> Result<Admitted, Asking> {
        match key {
            None => admit_now(&self.circuit),
            Some(key) => admit_now(&self.policy.circuit(key)),
        }
    }

    /// Makes a call if it is let through; every error is a failure of the target. Dropped meanwhile the call is
    /// abandoned.
    ///
    /// # Errors
    /// If it is not let through, as by [`admit`](Self::admit), or the call failed.
    pub async fn call<T, E>(
        &self,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, CallError<E>> {
        self.call_with(&ErrorsAreFailures, call).await
    }

    /// As [`call`](Self::call), where `classifier` says how the call went.
    ///
    /// ```
    /// # use {fusebox_client::{Breaker, breaker::{CallError, Verdict}}, std::io};
    /// # async fn read(breaker: &Breaker) -> Result<String, CallError<io::Error>> {
    /// let classifier = |result: &io::Result<String>| match result {
    ///     Err(error) if error.kind() == io::ErrorKind::NotFound => Verdict::Success,
    ///     Err(_) => Verdict::Failure("io"),
    ///     Ok(_) => Verdict::Success,
    /// };
    /// # async fn get() -> io::Result<String> { Ok(String::new()) }
    /// breaker.call_with(&classifier, get()).await
    /// # }
    /// ```
    ///
    /// # Errors
    /// If it is not let through, as by [`admit`](Self::admit), or the call failed.
    pub async fn call_with<T, E>(
        &self,
        classifier: &impl Classify<T, E>,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, CallError<E>> {
        let crossing = match self.circuit.cross() {
            Ok((word, began)) => Crossing::Free(Free::new(&self.circuit, word, began)),
            Err(now) => Crossing::Held(match decide(&self.circuit, now) {
                Ok(decided) => decided?,
                Err(asking) => asking.await?,
            }),
        };
        let result = call.await;
        crossing.record(classifier.classify(&result));
        result.map_err(CallError::Call)
    }
}

#[inline]
async fn admit(circuit: &Arc<Circuit>) -> Result<Permit, Rejected> {
    match admit_now(circuit) {
        Ok(decided) => decided,
        Err(asking) => asking.await,
    }
}

#[inline]
fn admit_now(circuit: &Arc<Circuit>) -> Result<Admitted, Asking> {
    match circuit.cross() {
        Ok((word, now)) => Ok(Ok(Permit::new(Arc::clone(circuit), Pass::Free, word, now))),
        Err(now) => decide(circuit, now),
    }
}

/// What is waited for is boxed, so that a caller who need not wait carries nothing of it along.
fn decide(circuit: &Arc<Circuit>, now: Time) -> Result<Admitted, Asking> {
    match circuit.decide(now, true) {
        Decided::Now(decided) => Ok(decided),
        Decided::Asked(offer) => {
            let circuit = Arc::clone(circuit);
            Err(Box::pin(async move { circuit.offered(offer).await }))
        }
    }
}

#[inline]
fn try_admit(circuit: &Arc<Circuit>) -> Result<Permit, Rejected> {
    match circuit.cross() {
        Ok((word, now)) => Ok(Permit::new(Arc::clone(circuit), Pass::Free, word, now)),
        Err(now) => match circuit.refused(now) {
            Some(rejected) => Err(rejected),
            None => try_decide(circuit, now),
        },
    }
}

#[cold]
fn try_decide(circuit: &Arc<Circuit>, now: Time) -> Admitted {
    match circuit.decide(now, false) {
        Decided::Now(decided) => decided,
        // Only who waits is asked for.
        Decided::Asked(_) => Err(circuit.is_undecided()),
    }
}

impl std::fmt::Debug for Breaker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let binding = &self.circuit.binding;
        f.debug_struct("Breaker")
            .field("policy", &binding.policy)
            .field("key", &binding.key)
            .finish()
    }
}
