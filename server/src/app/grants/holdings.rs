//! What is told of open grants.

use std::collections::HashMap;

use super::{Grant, GrantId, GrantName, Grants, Holds, Owner, Part};
use crate::catalogue::{CellId, Limiter};

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

    /// Tokens of a cell that open grants hold of those that a limiter charged in one slice.
    pub(in crate::app) fn held_of(&self, cell: CellId, limiter: &Limiter) -> HashMap<u64, u64> {
        let mut held = HashMap::new();
        self.visit(|_, grant| {
            for Part { open, .. } in &grant.parts {
                let charged = (open.cell, open.number, open.revision);
                if charged == (cell, limiter.number, limiter.settings.revision) {
                    *held.entry(open.slice).or_default() += open.out();
                }
            }
        });
        held
    }

    /// Whether a grant of that owner is open.
    pub(in crate::app) fn is_open(&self, id: GrantId, owner: &Owner) -> bool {
        self.shard(id).lock().open.get(&id).is_some_and(|grant| grant.owner == *owner)
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
        ends.max().unwrap_or_default().max(self.probes_until)
    }
}
