//! What the handles of a session stand for, and what is told of it.

use std::collections::BTreeMap;

use fusebox_proto::v1;
use tonic::Status;

use crate::{
    app::{
        App,
        sessions::{Bound, Since, Told},
    },
    grpc::{respond, status},
};

/// What the handles of a session stand for.
#[derive(Debug, Default)]
pub(super) struct Bindings {
    /// The number of the Bind, and what it bound, by handle.
    bound: BTreeMap<u32, (u64, Bound)>,
    told: Told,
    /// The handle that is looked at next, while all are.
    looking: Option<u32>,
}

impl Bindings {
    pub(super) fn is_empty(&self) -> bool {
        self.bound.is_empty()
    }

    /// What a handle stands for.
    pub(super) fn of(&self, handle: u32) -> Option<&Bound> {
        self.bound.get(&handle).map(|(_, bound)| bound)
    }

    /// Binds a handle; gives the number of the Bind that bound it before.
    pub(super) fn bind(&mut self, handle: u32, id: u64, bound: Bound) -> Option<u64> {
        self.bound.insert(handle, (id, bound)).map(|(former, _)| former)
    }

    /// Ends what a handle stands for; gives the number of its Bind.
    pub(super) fn unbind(&mut self, handle: u32) -> Option<u64> {
        self.bound.remove(&handle).map(|(id, _)| id)
    }

    /// Begins to look at what changed, if something has.
    pub(super) fn look(&mut self, app: &App) {
        let told = app.told_up_to();
        if told != self.told {
            self.told = told;
            self.looking = Some(0);
        }
    }

    /// What changed of the next that has, with the number of its Bind; a policy that is gone unbinds its handles.
    pub(super) fn next(&mut self, app: &App) -> Option<(u64, Result<v1::Bound, Status>)> {
        let from = self.looking?;
        for (handle, (id, bound)) in self.bound.range_mut(from..) {
            let (handle, id) = (*handle, *id);
            let told = match app.since_told(bound) {
                Since::Same => continue,
                Since::Changed(terms) => Ok(respond::bound(handle, *terms)),
                Since::Gone => Err(status::not_found("policy", &bound.policy, None)),
            };
            self.looking = Some(handle + 1);
            if told.is_err() {
                self.bound.remove(&handle);
            }
            return Some((id, told));
        }
        self.looking = None;
        None
    }
}
