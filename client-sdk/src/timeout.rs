//! An end to calls that take too long.

use std::time::Duration;

use thiserror::Error;

/// How long a call may take.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// use std::{future, time::Duration};
///
/// use fusebox_client::Timeout;
///
/// let timeout = Timeout::new(Duration::from_millis(5));
/// assert_eq!(timeout.call(async { "in time" }).await, Ok("in time"));
/// assert!(timeout.call(future::pending::<()>()).await.is_err());
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeout {
    after: Duration,
}

impl Timeout {
    /// Calls may take so long.
    #[must_use]
    pub const fn new(after: Duration) -> Self {
        Self { after }
    }

    /// How long that is.
    #[must_use]
    pub const fn after(self) -> Duration {
        self.after
    }

    /// Makes a call, and drops it when its time is over. One that is done at that moment is in time. Dropping the future
    /// drops the call.
    ///
    /// # Errors
    /// If its time was over.
    pub async fn call<F: Future>(self, call: F) -> Result<F::Output, TimedOut> {
        let timed = tokio::time::timeout(self.after, call).await;
        timed.map_err(|_| TimedOut { after: self.after })
    }
}

/// A call that took too long. Whether the target did what it was asked, nobody knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("timed out after {after:?}")]
pub struct TimedOut {
    /// How long it was given.
    pub after: Duration,
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_call_ends_when_its_time_is_over() {
        let timeout = Timeout::new(Duration::from_millis(100));
        assert_eq!(timeout.call(sleep(Duration::from_millis(99))).await, Ok(()));
        let late = timeout.call(sleep(Duration::from_millis(101))).await;
        assert_eq!(late, Err(TimedOut { after: Duration::from_millis(100) }));
        assert_eq!(late.unwrap_err().to_string(), "timed out after 100ms");
    }
}
