//! What leases, permits and circuits need of the server, whoever carries it there.
//!
//! The session implements it over the wire; the tests of each part have a server of a few lines behind it.

use std::{pin::Pin, sync::Arc, time::Duration};

use fusebox_core::Time;
use fusebox_proto::v1;
use tonic::Code;

use crate::binding::Binding;

/// A future of an answer; asking is off the hot path, so it may be boxed.
pub(crate) type Asked = Pin<Box<dyn Future<Output = Result<Answers, Unanswered>> + Send>>;

/// The way to the server.
pub(crate) trait Exchange: Send + Sync + 'static {
    /// Asks about 1 to 1,000 things, each decided by itself, in one message; all are of one binding.
    ///
    /// It resolves as soon as there is an answer, or it is known that there will be none: at once where no session
    /// is up. It sets no time of its own: who waits decides for how long. Dropping it asks nothing back.
    fn ask(&self, questions: Vec<Question>) -> Asked;

    /// There is something urgent for the next report: makes it now rather than at the next beat.
    fn hurry(&self);

    /// Whether a session is up.
    fn is_up(&self) -> bool;

    /// The binding of a policy and key; the same one for the same names.
    fn bind(&self, policy: &str, key: &str) -> Arc<Binding>;
}

/// One ask, decided by itself.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    pub(crate) binding: Arc<Binding>,
    /// As `Ask.cost`; 0 is a peek, or a refill where `lease` is set.
    pub(crate) cost: u64,
    /// As `Ask.lease`.
    pub(crate) lease: u64,
    /// As `Ask.estimated`.
    pub(crate) estimated: bool,
    /// As `AcquireRequest.attempt`.
    pub(crate) attempt: u32,
    /// As `AcquireRequest.priority`.
    pub(crate) priority: v1::Priority,
    /// As `AcquireRequest.max_wait`; only of a question that is asked alone.
    pub(crate) max_wait: Option<Duration>,
    /// As `AcquireRequest.request_id`, so that it can be asked again when a session broke; empty is none.
    pub(crate) request_id: String,
}

impl Question {
    /// One token, permit, retry or call.
    pub(crate) fn of(binding: &Arc<Binding>) -> Self {
        Self {
            binding: Arc::clone(binding),
            cost: 1,
            lease: 0,
            estimated: false,
            attempt: 0,
            priority: v1::Priority::Normal,
            max_wait: None,
            request_id: String::new(),
        }
    }
}

/// The answers to the questions of one message, in their order.
#[derive(Clone, Debug)]
pub(crate) struct Answers {
    /// When the questions were sent: lifetimes count from here, see [`lasts_until`].
    pub(crate) sent: Time,
    pub(crate) answers: Vec<Answer>,
}

/// The answer to one question.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) allowed: bool,
    /// Empty where nothing is owed.
    pub(crate) grant_id: String,
    /// How long it stood in line, of an answer that repeats another one as that did.
    pub(crate) waited: Duration,
    pub(crate) verdict: v1::Verdict,
}

/// Why there is no answer. Never a denial: that is one.
#[derive(Clone, Debug)]
pub(crate) enum Unanswered {
    /// No session is up, or it broke meanwhile: perhaps charged, not admitted.
    Unreachable,
    /// The server could not decide: no such policy, a cost that is never possible, overloaded.
    Refused { code: Code, message: Arc<str> },
}

/// Whether asking again would be refused alike: somebody has to mend something first.
pub(crate) const fn is_mistake(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::NotFound
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::Unauthenticated
    )
}

/// When something ends that was sent for at `sent` and lives for so long: 1% and 10 ms early, so that no client
/// believes in it for longer than the server, whatever their clocks and the way between them do. Not after `sent`
/// if nothing is left.
pub(crate) fn lasts_until(sent: Time, life: Duration) -> Time {
    let life = life.saturating_sub(life / 100).saturating_sub(Duration::from_millis(10));
    sent.after(life)
}

/// A duration of the wire; nothing of one that is negative.
pub(crate) fn duration(wire: Option<prost_types::Duration>) -> Option<Duration> {
    wire.map(|wire| wire.try_into().unwrap_or_default())
}
