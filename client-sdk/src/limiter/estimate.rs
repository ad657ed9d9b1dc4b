//! Tokens that were taken before it was known how many they would be.

use std::sync::Arc;

use fusebox_proto::v1;

use super::key::Shell;

/// Tokens taken as an estimate.
///
/// Dropped without a word it stands as estimated. Neither way waits: the server is told with the next report, and the
/// estimate stands also if that never comes.
#[must_use = "an estimate that is dropped stands as it is"]
pub struct Estimate {
    /// `None` if nothing is owed, or it was told what.
    owed: Option<Owing>,
}

struct Owing {
    shell: Arc<Shell>,
    truth: u64,
    grant_id: String,
    cost: u64,
}

impl Estimate {
    pub(super) const fn none() -> Self {
        Self { owed: None }
    }

    pub(super) fn of(shell: &Arc<Shell>, truth: u64, grant_id: String, cost: u64) -> Self {
        let shell = Arc::clone(shell);
        Self { owed: Some(Owing { shell, truth, grant_id, cost }) }
    }

    /// The call did cost `actual` tokens: fewer are given back, and more are owed, up to the policy's `max_debt`.
    pub fn settle(mut self, actual: u64) {
        self.tell(|_| actual);
    }

    fn tell(&mut self, actual: impl FnOnce(u64) -> u64) {
        let Some(Owing { shell, truth, grant_id, cost }) = self.owed.take() else { return };
        let actual_cost = Some(actual(cost));
        let outcome = v1::GrantOutcome { grant_id, actual_cost, ..v1::GrantOutcome::default() };
        shell.settle(truth, outcome);
    }
}

impl Drop for Estimate {
    fn drop(&mut self) {
        self.tell(|cost| cost);
    }
}

impl std::fmt::Debug for Estimate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let cost = self.owed.as_ref().map(|owing| owing.cost);
        f.debug_struct("Estimate").field("cost", &cost).finish_non_exhaustive()
    }
}
