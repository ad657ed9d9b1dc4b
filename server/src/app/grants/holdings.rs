//! What is told of open grants.

use super::{Grant, GrantId, GrantName, Grants, Holds};

impl Grants {
    /// Looks at every open grant.
    pub(in crate::app) fn visit(&self, mut visit: impl FnMut(GrantId, &Grant)) {
        for shard in &self.shards {
            for (id, grant) in &shard.lock().open {
                visit(*id, grant);
            }
        }
    }

    /// The open grant of that id.
    pub(in crate::app) fn look(&self, id: GrantId) -> Option<Grant> {
        self.shard(id).lock().open.get(&id).cloned()
    }

    /// The grant as its holder was told.
    pub(in crate::app) fn name(&self, id: GrantId, grant: &Grant) -> GrantName {
        GrantName { id, claim: grant.claim(id, &self.secret) }
    }
}

impl Grant {
    /// Tokens that it holds in that way.
    pub(in crate::app) fn held(&self, how: Holds) -> u64 {
        let parts = self.parts.iter().filter(|part| part.open.holds == how);
        parts.map(|part| part.open.out()).sum()
    }

    /// The time when all of it has ended by itself.
    pub(in crate::app) fn ends_at(&self) -> fusebox_core::Time {
        let ends = self.parts.iter().map(|part| part.open.expires_at);
        ends.max().unwrap_or_default()
    }
}
