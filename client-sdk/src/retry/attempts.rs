//! The tries of one call.

use std::time::Duration;

use super::{Again, GaveUp, Retry, pacing::Pacing};

/// The tries of one call, for loops of your own: [`Retry::call`] and the layer are made of it.
///
/// ```no_run
/// # use fusebox_client::{Retry, retry::Again};
/// # async fn send() -> Result<(), std::io::Error> { Ok(()) }
/// # async fn example(retry: Retry) -> Result<(), std::io::Error> {
/// let mut attempts = retry.attempts();
/// let result = loop {
///     let result = send().await;
///     if attempts.again(Again::on_error(&result)).await.is_err() {
///         break result;
///     }
/// };
/// # result
/// # }
/// ```
#[derive(Debug)]
pub struct Attempts {
    retry: Retry,
    pacing: Pacing,
}

impl Attempts {
    pub(super) fn new(retry: &Retry) -> Self {
        let pacing = Pacing::new(retry.terms, retry.now());
        Self { retry: retry.clone(), pacing }
    }

    /// The number of the try under way, counted from 0.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.pacing.attempt()
    }

    /// Time left until the deadline, if there is one: no try should last longer.
    #[must_use]
    pub fn left(&self) -> Option<Duration> {
        self.pacing.left(self.retry.now())
    }

    /// Returns when the next try may be made, after the pause before it, if `again` wants one.
    ///
    /// The budget is asked before the pause, so who is denied is not kept. Dropping the future makes no try; a retry
    /// that the budget has granted by then is lost to the fleet, and so is never one too many.
    ///
    /// # Errors
    /// If there is to be no other try.
    pub async fn again(&mut self, again: Again) -> Result<(), GaveUp> {
        let paid = self.pay(again).await;
        let tally = self.retry.tally();
        match paid {
            Ok(pause) => {
                self.pacing.retry(pause);
                tally.retry();
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
                Ok(())
            }
            Err(why) => {
                tally.gave_up(why);
                Err(why)
            }
        }
    }

    async fn pay(&self, again: Again) -> Result<Duration, GaveUp> {
        let up_to = |most| self.retry.random().up_to(most);
        let pause = self.pacing.pause(again, self.retry.now(), up_to)?;
        let spare = self.left().map(|left| left.saturating_sub(pause));
        self.retry.withdraw(self.attempt().saturating_add(1), spare).await?;
        Ok(pause)
    }
}
