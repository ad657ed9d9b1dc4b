//! The decisions of Fusebox, and nothing else: no I/O, no clock, no lock, no log line.
//!
//! [`apply`] decides over 1 to [`MAX_RULES`] cells in two phases, plan and commit; [`settle`] corrects a
//! charge once the true cost is known. Both are functions of their arguments: time comes in as a [`Time`].
//! What a limiter must know is the trait [`Kind`]; [`Limit`] and [`State`] are the sum of the kinds. A
//! [`circuit`] is apart from them: it remembers more, and is asked before them.
//!
//! The crate is `no_std`, so that a clock read, a lock, a log line or a socket in it does not compile.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod apply;
pub mod circuit;
pub mod concurrency;
mod kind;
mod limit;
mod policy;
pub mod retry_budget;
pub mod slices;
pub mod sliding_window;
mod time;
pub mod token_bucket;
pub mod window;

pub use self::{
    apply::{
        Cells, Charging, Decision, MAX_RULES, Rule, Rules, Verdict, Verdicts, apply, apply_to,
        settle,
    },
    concurrency::Concurrency,
    kind::{Admission, Ask, Kind, Level, Mark, Plan, Purpose, Reason, Settled, Settlement},
    limit::{Limit, State},
    policy::{Cell, Former, Formers, MAX_FORMERS, Policy},
    retry_budget::RetryBudget,
    sliding_window::SlidingWindow,
    time::{Moment, Time, Wall, saturating_nanos},
    token_bucket::TokenBucket,
    window::{Window, WindowLimit},
};
