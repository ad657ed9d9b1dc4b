//! Clients that have a session: whom they talk to, what they are told of policies, and how they end.

use std::sync::{Arc, atomic::Ordering};

use thiserror::Error;

use super::{App, Caller, Client, bindings::Binding, grants::Owner};
use crate::{
    catalogue,
    config::{self, Durability},
    limits,
    reservation::Reservation,
    storage::{Answer, Durable, StorageError},
};

/// What a session is with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Truth {
    /// Names the data directory; where nothing is kept, this life of the server.
    pub id: String,
    /// Number of the start.
    pub boot: u64,
}

/// Why a policy and key cannot be bound.
#[derive(Debug, Error)]
pub enum BindError {
    /// No such policy.
    #[error("unknown policy `{0}`")]
    UnknownPolicy(String),
    /// As much as there may be.
    #[error("{} policies and keys are bound, as many as this server holds", limits::BINDINGS)]
    TooMany,
}

/// A policy and key that a session has bound, and what was told of it.
#[derive(Debug)]
pub struct Bound {
    namespace: Arc<str>,
    /// The policy.
    pub policy: String,
    /// The key.
    pub key: String,
    settings: Arc<config::Policy>,
    clients: u32,
    binding: Binding,
}

/// What holds for a policy and key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The settings that judge the key, without overrides.
    pub settings: config::Policy,
    /// What a crash may forget of it.
    pub durability: Durability,
    /// Clients that have it bound.
    pub clients: u32,
}

/// What became of something bound since it was told of.
#[derive(Debug, PartialEq, Eq)]
pub enum Since {
    /// It is as it was.
    Same,
    /// Something changed.
    Changed(Box<Terms>),
    /// The policy is there no more.
    Gone,
}

/// Versions of all that is told of what is bound: where they are as they were, nothing changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    catalogue: u64,
    bindings: u64,
}

impl App {
    /// Room for one more session, until it is dropped; `None` if there is none.
    pub fn begin_session(&self) -> Option<Reservation> {
        Reservation::of(&self.sessions, 1, limits::SESSIONS)
    }

    /// Sessions that there are.
    pub fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }

    /// Whether a client may have a session in a namespace: whether there is one of that name.
    pub fn greet(&self, caller: Caller, namespace: &str, client: Client<'_>) -> Option<Truth> {
        self.catalogue.load().namespace(namespace)?;
        self.see(namespace, client, caller);
        let (id, boot) = self.truth();
        Some(Truth { id, boot })
    }

    /// Notes that a client is there.
    pub fn see(&self, namespace: &str, client: Client<'_>, caller: Caller) {
        self.desk.clients.see(namespace, client, caller.now.time);
    }

    /// Binds a policy and key for a client.
    ///
    /// # Errors
    /// If there is no such policy, or too much is bound already.
    pub fn bind(
        &self,
        namespace: &str,
        client: &Arc<str>,
        (policy, key): (String, String),
    ) -> Result<(Bound, Terms), BindError> {
        let catalogue = self.catalogue.load();
        let found = catalogue.namespace(namespace).and_then(|found| found.policy(&policy));
        let Some(found) = found else { return Err(BindError::UnknownPolicy(policy)) };
        let cell = found.cells.cell(&key);
        let binding = self.bindings.bind(cell, client).ok_or(BindError::TooMany)?;
        let terms = self.terms(found, &key, binding.clients());
        let bound = Bound {
            namespace: Arc::clone(&found.namespace),
            policy,
            key,
            settings: Arc::clone(&found.settings),
            clients: terms.clients,
            binding,
        };
        Ok((bound, terms))
    }

    /// What all that is bound is told up to, if it is looked at now.
    pub fn told_up_to(&self) -> Told {
        let bindings = self.bindings.version();
        Told { catalogue: self.catalogue.load().revision, bindings }
    }

    /// What became of something bound since it was told of, which it is now.
    pub fn since_told(&self, bound: &mut Bound) -> Since {
        let catalogue = self.catalogue.load();
        let found = catalogue.namespace(&bound.namespace);
        let Some(found) = found.and_then(|found| found.policy(&bound.policy)) else {
            return Since::Gone;
        };
        let clients = bound.binding.clients();
        let is_same = Arc::ptr_eq(&found.settings, &bound.settings);
        if is_same && clients == bound.clients {
            return Since::Same;
        }
        let before = (bound.settings.judging(&bound.key), bound.clients);
        let terms = self.terms(found, &bound.key, clients);
        bound.settings = Arc::clone(&found.settings);
        bound.clients = clients;
        if before == (terms.settings.clone(), clients) {
            Since::Same
        } else {
            Since::Changed(Box::new(terms))
        }
    }

    /// Ends all that a client holds: permits and probes are free, all else stands as charged. It walks the table of
    /// grants, shard by shard, which takes a few milliseconds where a hundred thousand are open: clients end seldom.
    ///
    /// Gives what has to be durable before it is told.
    ///
    /// # Errors
    /// If the storage failed.
    pub fn end_client(
        &self,
        caller: Caller,
        namespace: &str,
        client: &str,
    ) -> Result<Vec<Durable>, StorageError> {
        let owner = Owner { principal: caller.principal, namespace: namespace.into() };
        let mut waits = Vec::new();
        for (dues, passes) in self.grants.end_all_of(&owner, client) {
            for due in dues {
                if let Answer::Later((), durable) = self.settle(&due, caller.now)? {
                    waits.push(durable);
                }
            }
            self.abandon(&passes, caller.now.time);
        }
        Ok(waits)
    }

    fn terms(&self, policy: &catalogue::Policy, key: &str, clients: u32) -> Terms {
        let settings = policy.settings.judging(key);
        let own = settings.limiter().and_then(|limiter| limiter.durability);
        Terms { settings, durability: own.unwrap_or_else(|| self.durability()), clients }
    }
}
