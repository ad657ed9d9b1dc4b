//! What callers can do: the server without its transport.

pub mod admin;
mod bindings;
#[cfg(test)]
mod by_hand;
mod circuits;
mod clients;
mod deltas;
pub mod events;
mod grants;
mod lessees;
mod line;
mod priority;
mod ratelimit;
mod report;
mod requests;
mod sequences;
pub mod sessions;
pub mod top_keys;
mod waiting;
mod watch;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use arrayvec::ArrayVec;
use fusebox_core::{
    Admission, Charging, Decision, Kind, Limit, MAX_RULES, Moment, Purpose, Reason, Time, Wall,
};
use parking_lot::Mutex;
use thiserror::Error;
use tokio_util::sync::CancellationToken;

pub(crate) use self::circuits::{mode_name, state_name};
use self::{
    admin::Desk,
    bindings::Bindings,
    circuits::{Crossing, Crossings},
    grants::{Due, Grant, Owner, Part},
    lessees::Lessees,
    sequences::Sequences,
};
pub use self::{
    circuits::{Crossed, Granted, Pass, PassName, Passes, Seen},
    deltas::Delta,
    grants::{GrantId, GrantName, Grants, Told},
    line::{Attempt, Lines, Place, Stood},
    priority::Priority,
    ratelimit::{CurrentLimit, Descriptor, RatelimitError, RatelimitRequest, Ratelimited, Status},
    report::{Receipt, Renewed, Report, ReportError, Reported, Reports},
    requests::{Begun, InProgress, Joined, RequestKey, Requests, Share},
    waiting::Waiting,
    watch::{News, Watch, WatchError, Watched},
};
use crate::{
    catalogue::{Catalogue, Namespace, Policy},
    clock::ServerClock,
    counters::RuleLoads,
    entropy::Entropy,
    limits,
    reservation::Reservation,
    storage::{
        Answer, CellAsk, Charge, Charged, Circuits, Decided, Holds, Judge, OpenGrant, OpenPart,
        Operations, Room, Storage, StorageError,
    },
};

/// Who calls. There is no authentication yet, so everybody is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Principal {
    /// Nobody in particular.
    Anonymous,
}

/// Who calls, and the one moment at which the whole call is decided.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// Who.
    pub principal: Principal,
    /// When.
    pub now: Moment,
}

/// The process that calls, as it names itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Client<'a> {
    /// New for each process.
    pub id: &'a str,
    /// The service that it is one of.
    pub service: &'a str,
    /// Where it runs.
    pub zone: &'a str,
}

/// An Acquire that is well-formed.
#[derive(Clone, Debug)]
pub struct Acquire<'a, A> {
    /// Namespace of the policies.
    pub namespace: &'a str,
    /// Who calls, if it says so.
    pub client: Option<Client<'a>>,
    /// What is asked.
    pub entry: Entry<A>,
}

/// What an Acquire asks, alone or in a batch.
#[derive(Clone, Debug)]
pub struct Entry<A> {
    /// 1 to 16 asks; at most one is estimated, and at most one wants a lease.
    pub asks: A,
    /// How much it matters.
    pub priority: Priority,
    /// The call is a retry of an earlier one.
    pub retry: bool,
}

/// Acquires that are well-formed, to be decided one after another.
#[derive(Clone, Debug)]
pub struct Batch<'a, E> {
    /// Namespace of all the policies.
    pub namespace: &'a str,
    /// Who calls, if it says so.
    pub client: Option<Client<'a>>,
    /// What each asks.
    pub entries: E,
}

/// An ask that is well-formed.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Name of the policy.
    pub policy: &'a str,
    /// Which bucket.
    pub key: &'a str,
    /// Tokens to charge; 0 is a peek.
    pub cost: u64,
    /// The cost is an estimate.
    pub estimated: bool,
    /// Tokens wanted ahead.
    pub lease: u64,
}

/// What became of an Acquire.
#[derive(Debug, Default)]
pub struct Acquired {
    /// What was decided, with a verdict for each ask.
    pub decided: Decided,
    /// What became of the asks of breakers; what was decided has no verdict of them.
    pub circuits: ArrayVec<Crossed, { limits::CIRCUIT_ASKS }>,
    /// When that was.
    pub at: Time,
    /// What names the grant, if there is one.
    pub grant: Option<Granted>,
    /// What the grant holds, by ask.
    pub held: ArrayVec<Held, { limits::ASKS }>,
}

/// What a grant holds of one ask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// The ask.
    pub ask: usize,
    /// Tokens leased.
    pub leased: u64,
    /// Whether there are permits in it.
    pub permits: bool,
    /// How long until it settles by itself.
    pub expires_in: Duration,
}

/// Why nothing could be decided. Nothing was charged, unless the storage failed.
#[derive(Debug, Error)]
pub enum AcquireError {
    /// No such namespace.
    #[error("unknown namespace `{0}`")]
    UnknownNamespace(String),
    /// No such policy.
    #[error("unknown policy `{policy}`")]
    UnknownPolicy {
        /// Index of the ask.
        ask: usize,
        /// The policy.
        policy: String,
    },
    /// An ask that no wait would ever make possible.
    #[error("a cost of {cost} is never possible: policy `{policy}` grants at most {most} at once")]
    NeverPossible {
        /// Index of the ask.
        ask: usize,
        /// The policy.
        policy: String,
        /// What was asked.
        cost: u64,
        /// Most that the policy grants.
        most: u64,
    },
    /// An estimate of what is not estimated.
    #[error("policy `{policy}` counts {counts}, which are not estimated; leave `estimated` unset")]
    NotEstimable {
        /// Index of the ask.
        ask: usize,
        /// The policy.
        policy: String,
        /// What it counts.
        counts: &'static str,
    },
    /// More than one call through a circuit.
    #[error(
        "a cost of {cost}: policy `{policy}` is a breaker, which lets one call through, or is asked for 0"
    )]
    OneCall {
        /// Index of the ask.
        ask: usize,
        /// The policy.
        policy: String,
        /// What was asked.
        cost: u64,
    },
    /// More circuits than are asked together.
    #[error("a third breaker, `{policy}`; at most {} are asked together", limits::CIRCUIT_ASKS)]
    TooManyCircuits {
        /// Index of the ask.
        ask: usize,
        /// The policy.
        policy: String,
    },
    /// Nobody waits for a circuit.
    #[error(
        "policy `{policy}` is a breaker: nobody waits in line for a circuit, which may stay open; leave it out"
    )]
    NoLine {
        /// The policy.
        policy: String,
    },
    /// More limits than are decided together.
    #[error(
        "the policies of the asks have {count} limits in all; at most {} are decided together",
        limits::BATCH_ASKS
    )]
    TooManyLimits {
        /// How many.
        count: usize,
    },
    /// The end of the server has begun.
    #[error("draining: nobody waits any longer; connect again")]
    Draining,
    /// Too many open grants.
    #[error(
        "{} grants are open, as many as this server holds; report those that ended",
        limits::OPEN_GRANTS
    )]
    GrantsFull,
    /// The storage cannot.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// Why a batch was not decided: the first entry that could not be.
#[derive(Debug)]
pub struct BatchError {
    /// The entry, if it was one.
    pub entry: Option<usize>,
    /// Why.
    pub error: AcquireError,
}

/// Decides: policies, cells and grants together.
pub struct App {
    catalogue: ArcSwap<Catalogue>,
    storage: Arc<dyn Storage>,
    circuits: Arc<Circuits>,
    grants: Grants,
    /// Held while a grant that a crash forgot is taken over.
    attesting: Mutex<()>,
    sequences: Sequences,
    lessees: Lessees,
    lines: Lines,
    clock: ServerClock,
    entropy: Arc<dyn Entropy>,
    reports: Reports,
    rule_loads: RuleLoads,
    passed_in_shadow: AtomicU64,
    /// Streams that watch circuits.
    watchers: Arc<AtomicUsize>,
    /// Sessions that there are.
    sessions: Arc<AtomicUsize>,
    bindings: Arc<Bindings>,
    desk: Desk,
}

/// What tells one life of an app from others.
pub struct Life {
    /// Number of this start.
    pub boot: u64,
    /// Drawn once for the data directory.
    pub secret: [u8; 16],
    /// The circuits.
    pub circuits: Arc<Circuits>,
    /// Grants that a clean stop left open.
    pub open: Vec<OpenGrant>,
    /// Cancelled when its end begins: nobody waits in line any longer.
    pub draining: CancellationToken,
    /// What operators wrote and did.
    pub operations: Operations,
}

impl App {
    /// An app that goes on with the grants that a clean stop left open.
    pub fn new(
        catalogue: Catalogue,
        storage: Arc<dyn Storage>,
        clock: ServerClock,
        entropy: Arc<dyn Entropy>,
        life: Life,
    ) -> Self {
        let grants = Grants::new(life.boot, life.secret, limits::OPEN_GRANTS);
        for OpenGrant { id, client, parts } in life.open {
            // Only of limiters that are there: recovery sees to that.
            let part = |open: OpenPart| {
                let limiter = Arc::clone(catalogue.numbered(open.number)?);
                Some(Part { limiter, open })
            };
            let parts: Vec<_> = parts.into_iter().filter_map(part).collect();
            let Some(first) = parts.first() else { continue };
            let namespace = Arc::clone(&first.limiter.name.namespace);
            let owner = Owner { principal: Principal::Anonymous, namespace };
            let (passes, probes_until) = (Passes::new(), Time::ZERO);
            grants.restore(id, Grant { owner, client: client.into(), parts, passes, probes_until });
        }
        let desk = Desk::new(life.operations, life.boot, clock.time());
        let rule_loads = RuleLoads::default();
        if catalogue.ratelimit.is_some() {
            rule_loads.succeeded();
        }
        Self {
            catalogue: ArcSwap::from_pointee(catalogue),
            storage,
            circuits: life.circuits,
            grants,
            attesting: Mutex::default(),
            sequences: Sequences::new(life.secret),
            lessees: Lessees::default(),
            lines: Lines::new(life.draining),
            clock,
            entropy,
            reports: Reports::default(),
            rule_loads,
            passed_in_shadow: AtomicU64::new(0),
            watchers: Arc::default(),
            sessions: Arc::default(),
            bindings: Arc::new(Bindings::new()),
            desk,
        }
    }

    /// The circuits.
    pub fn circuits(&self) -> &Arc<Circuits> {
        &self.circuits
    }

    /// The policies in force.
    pub fn catalogue(&self) -> Arc<Catalogue> {
        self.catalogue.load_full()
    }

    /// The grants that are open.
    pub fn grants(&self) -> &Grants {
        &self.grants
    }

    /// Callers that stand in line.
    pub fn waiting(&self) -> usize {
        self.lines.standing()
    }

    /// What became of reports.
    pub fn reports(&self) -> &Reports {
        &self.reports
    }

    /// How often files of rules were loaded.
    pub fn rule_loads(&self) -> &RuleLoads {
        &self.rule_loads
    }

    /// Proxies' requests that passed although they were over a limit, since all do.
    pub fn passed_in_shadow(&self) -> u64 {
        self.passed_in_shadow.load(Ordering::Relaxed)
    }

    /// Keys that are remembered.
    pub fn live_cells(&self) -> usize {
        self.storage.live()
    }

    /// Server time now.
    pub fn time(&self) -> Time {
        self.clock.time()
    }

    /// A caller at this moment.
    pub fn caller(&self, principal: Principal) -> Caller {
        Caller { principal, now: self.clock.now() }
    }

    /// Decides one Acquire; what is to be told of it is what `tell` makes.
    ///
    /// # Errors
    /// If nothing could be decided.
    pub fn acquire<'a, T>(
        &self,
        caller: Caller,
        acquire: Acquire<'a, impl IntoIterator<Item = Ask<'a>>>,
        tell: impl FnOnce(&Acquired) -> T,
    ) -> Result<Answer<T>, AcquireError> {
        let mut acquired = Acquired::default();
        let (stands, counts) = (Stands::NotAtAll, Counts::This);
        let answer = self.attempt(caller, acquire, (stands, counts), &mut acquired)?;
        Ok(answer.map(|()| tell(&acquired)))
    }

    /// Decides one Acquire into `acquired`.
    fn attempt<'a>(
        &self,
        caller: Caller,
        acquire: Acquire<'a, impl IntoIterator<Item = Ask<'a>>>,
        (stands, counts): (Stands, Counts),
        acquired: &mut Acquired,
    ) -> Result<Answer<()>, AcquireError> {
        let catalogue = self.catalogue.load();
        let mut named = ArrayVec::<_, { limits::ASKS }>::new();
        let mut rules = ArrayVec::<_, MAX_RULES>::new();
        let mut circuits = ArrayVec::<_, { limits::CIRCUIT_ASKS }>::new();
        let Acquire { namespace: name, client, entry } = acquire;
        let namespace = namespace(&catalogue, name)?;
        let asker = Asker { app: self, namespace, caller, client, stands };
        let circuit = |circuit| circuits.push(circuit);
        asker.resolve(entry, |ask| named.push(ask), |rule| rules.push(rule), circuit)?;
        let mut grants = needs_grant(&rules).then(|| self.reserve_grants(1)).transpose()?;
        let resolved = Resolved {
            catalogue: &catalogue,
            asks: &named,
            rules: &rules,
            circuits: &circuits,
            client,
        };
        let answer = self.decide(caller, resolved, None, grants.as_mut(), acquired)?;
        if stands == Stands::Outside {
            tell_line_full(&mut acquired.decided.decision);
        }
        if counts == Counts::This
            || counts == Counts::IfAllowed && acquired.decided.decision.allowed
        {
            resolved.count(&acquired.decided, &acquired.circuits);
            self.watch(&resolved, &acquired.decided.charged, caller.now.time);
        }
        Ok(answer)
    }

    /// Decides each Acquire of a batch, in order, against one snapshot of the policies; what is to be told of
    /// each is what `tell` makes.
    ///
    /// # Errors
    /// If one of them could not be decided; then nothing was charged, unless the storage failed.
    pub fn acquire_batch<'a, A: IntoIterator<Item = Ask<'a>>, T>(
        &self,
        caller: Caller,
        batch: Batch<'a, impl ExactSizeIterator<Item = Entry<A>>>,
        tell: impl Fn(&Acquired) -> T,
    ) -> Result<Vec<Answer<T>>, BatchError> {
        let catalogue = self.catalogue.load();
        let in_entry = |index, error| BatchError { entry: Some(index), error };
        let in_all = |error| BatchError { entry: None, error };
        let Batch { namespace: name, client, entries } = batch;
        // An unknown namespace is told of the first entry, which is the first that is looked at.
        let namespace = namespace(&catalogue, name).map_err(|error| in_entry(0, error))?;
        let stands = Stands::NotAtAll;
        let asker = Asker { app: self, namespace, caller, client, stands };

        // Those of all entries in one row, and where each entry ends in it.
        let count = entries.len();
        let (mut named, mut rules) = (Vec::with_capacity(count), Vec::with_capacity(count));
        let mut circuits = Vec::new();
        let mut ends = Vec::with_capacity(count);
        let mut wanted = 0;
        for (index, entry) in entries.enumerate() {
            let start = rules.len();
            let circuit = |circuit| circuits.push(circuit);
            let resolved =
                asker.resolve(entry, |ask| named.push(ask), |rule| rules.push(rule), circuit);
            resolved.map_err(|error| in_entry(index, error))?;
            wanted += usize::from(needs_grant(&rules[start..]));
            ends.push((named.len(), rules.len(), circuits.len()));
        }
        if rules.len() > limits::BATCH_ASKS {
            return Err(in_all(AcquireError::TooManyLimits { count: rules.len() }));
        }

        // All the room that any entry may need, so that none fails after another was charged.
        let mut room = self.storage.reserve(&rules).map_err(|error| in_all(error.into()))?;
        let mut grants = self.reserve_grants(wanted).map_err(in_all)?;

        let mut answers = Vec::with_capacity(count);
        let mut start = (0, 0, 0);
        // One for all of them: it is some kilobytes, which would have to be moved for each.
        let mut acquired = Acquired::default();
        for (entry, end) in ends.into_iter().enumerate() {
            let (asks, rules) = (&named[start.0..end.0], &rules[start.1..end.1]);
            let circuits = &circuits[start.2..end.2];
            let resolved = Resolved { catalogue: &catalogue, asks, rules, circuits, client };
            start = end;
            let room = Some(&mut room);
            let answer = self.decide(caller, resolved, room, Some(&mut grants), &mut acquired);
            let answer = answer.map_err(|error| in_entry(entry, error.into()))?;
            resolved.count(&acquired.decided, &acquired.circuits);
            self.watch(&resolved, &acquired.decided.charged, caller.now.time);
            answers.push(answer.map(|()| tell(&acquired)));
        }
        Ok(answers)
    }

    /// One bounded round of housekeeping: full cells leave, and what expired is settled as charged.
    ///
    /// # Errors
    /// If the storage failed.
    pub fn tend(&self) -> Result<(), StorageError> {
        let now = self.clock.now();
        let catalogue = self.catalogue.load();
        self.storage.tend(&catalogue, now);
        self.circuits.tend(&catalogue, now.time);
        drop(catalogue);
        for due in self.grants.expire(now.time) {
            // Nobody waits for it: the writer sees to it that it reaches the disk.
            self.settle(&due, now)?;
        }
        self.lessees.tend(now.time);
        self.sequences.tend(now.time);
        self.tend_desk(now);
        Ok(())
    }

    /// Whether others wait for that key, before whom nobody of that priority goes who does not.
    fn is_held_for(&self, policy: &Policy, key: &str, priority: Priority) -> bool {
        let lines = &self.lines;
        lines.standing() > 0 && lines.is_held_for(policy.cells.cell(key), priority)
    }

    /// Room for so many grants.
    fn reserve_grants(&self, amount: usize) -> Result<Reservation, AcquireError> {
        self.grants.reserve(amount).ok_or(AcquireError::GrantsFull)
    }

    /// Charges and concludes; when it may be told is in the answer.
    fn decide(
        &self,
        caller: Caller,
        resolved: Resolved<'_>,
        room: Option<&mut Room>,
        grants: Option<&mut Reservation>,
        acquired: &mut Acquired,
    ) -> Result<Answer<()>, StorageError> {
        let now = caller.now.time;
        let mut crossing = self.cross(resolved.circuits, now)?;
        let refused = crossing.as_ref().is_some_and(Crossings::is_refused);
        let charging = if refused { Charging::Nothing } else { Charging::AllOrNothing };
        let charge = Charge { charging, asks: resolved.rules, catalogue: resolved.catalogue };
        let decided = &mut acquired.decided;
        let mut answer = if resolved.rules.is_empty() {
            decided.clear(!refused);
            Answer::Now(())
        } else {
            self.storage.apply(&charge, room, caller.now, decided)?
        };
        acquired.circuits.clear();
        acquired.at = now;
        let mut passes = Passes::new();
        if let Some(crossing) = &mut crossing {
            let allowed = decided.decision.allowed;
            (acquired.circuits, passes) = crossing.conclude(resolved.circuits, allowed, now);
        }
        // Asked for after the charge: the round that it is of has the marks of the cells as well.
        if let Some(durable) = crossing.and_then(Crossings::durable) {
            answer = Answer::Later((), durable);
        }
        // Concluded at once: a caller that goes away while the disk is at it must not leave a grant out that
        // nobody can settle.
        self.conclude(caller, resolved, passes, grants, acquired);
        Ok(answer)
    }

    /// Opens the grant that a decision owes in the room that is there for it, and leaves one verdict for each
    /// ask.
    fn conclude(
        &self,
        caller: Caller,
        resolved: Resolved<'_>,
        passes: Passes,
        grants: Option<&mut Reservation>,
        acquired: &mut Acquired,
    ) {
        let Acquired { decided, circuits, grant, held, .. } = acquired;
        *grant = None;
        held.clear();
        let owner = || {
            let namespace = Arc::clone(&resolved.asks[0].policy.namespace);
            Owner { principal: caller.principal, namespace }
        };
        let room = grants.filter(|_| decided.decision.allowed);
        let parts = match room.is_some() {
            true => resolved.parts(decided, held, caller.now),
            false => Vec::new(),
        };
        if let Some(room) = room.filter(|_| !parts.is_empty()) {
            let client = resolved.client.map_or("", |client| client.id).into();
            let probes = circuits.iter().filter_map(Crossed::held).map(|held| held.expires_in);
            let probes_until =
                probes.max().map_or(Time::ZERO, |longest| caller.now.time.after(longest));
            let owed = Grant { owner: owner(), client, parts, passes, probes_until };
            *grant = self.grants.open_grant(owed, room, &*self.entropy).map(Granted::Kept);
        } else if !passes.is_empty() {
            let name = PassName::new(passes, &owner(), self.grants.secret());
            *grant = Some(Granted::Passed(name));
        }
        held.extend(circuits.iter().filter_map(Crossed::held));
        let decision = &mut decided.decision;
        let limiters = resolved.asks.len() - resolved.circuits.len();
        if limiters < resolved.rules.len() {
            tell_leases(decision, resolved.rules);
            let ends = resolved.asks.iter().zip(resolved.ends());
            let ends = ends.filter(|(ask, _)| ask.rules > 0).map(|(_, end)| end);
            let ends: ArrayVec<usize, { limits::ASKS }> = ends.collect();
            decision.merge(&ends);
        }
    }

    /// Gives back the permits and probes of a grant whose caller could not be told of it. What else it holds
    /// stands until it expires: the caller may know of it after all.
    pub fn take_back(&self, grant: &Granted) {
        let now = self.clock.now();
        let passes = match grant {
            Granted::Kept(name) => {
                let (dues, passes) = self.grants.take_permits(name.id);
                for due in dues {
                    // Where nothing is written any more, nothing is admitted either.
                    let _ = self.settle(&due, now);
                }
                passes
            }
            Granted::Passed(name) => name.passes.clone(),
        };
        self.abandon(&passes, now.time);
    }

    /// Notes what operators want to see: who asks, for which keys, and the names of new ones.
    fn watch(&self, resolved: &Resolved<'_>, charged: &[Charged], now: Time) {
        let mut start = 0;
        for (ask, end) in resolved.asks.iter().zip(resolved.ends()) {
            let first = (resolved.rules.get(start), charged.get(start));
            if let (Some(rule), Some(charged)) = first
                && ask.rules > 0
            {
                ask.policy.top_keys.record(ask.key, ask.weight, top_keys::draw(rule.cell, now));
                if charged.is_new && charged.cell == rule.cell {
                    ask.policy.names.add(ask.key, rule.cell);
                }
            }
            start = end;
        }
        if let (Some(client), Some(ask)) = (resolved.client, resolved.asks.first()) {
            self.desk.clients.see(&ask.policy.namespace, client, now);
        }
    }

    /// Tells a cell what is known now of what was charged.
    fn settle(&self, due: &Due, now: Moment) -> Result<Answer<()>, StorageError> {
        // The limiter as it is now: its settings may have changed since the grant.
        let catalogue = self.catalogue.load();
        let limiter = catalogue.numbered(due.limiter.number).unwrap_or(&due.limiter);
        let settlement = crate::storage::Settlement {
            cell: due.cell,
            judge: Judge { limiter, catalogue: &catalogue },
            revision: due.revision,
            known: fusebox_core::Settlement { window: limiter.window(now), ..due.known },
        };
        let answer = self.storage.settle(&settlement, now)?;
        self.lines.wake(due.cell);
        Ok(answer.map(|settled| {
            if settled.dropped > 0
                && let Some(policy) = catalogue.policy(&limiter.name)
            {
                policy.decisions.count_dropped_debt(settled.dropped);
            }
        }))
    }
}

/// Whether a grant may be owed for one of these.
fn needs_grant(rules: &[CellAsk<'_>]) -> bool {
    rules.iter().any(|rule| holds(rule, rule.ask.tokens).is_some())
}

/// What a grant holds of a rule that charged so many tokens.
fn holds(rule: &CellAsk<'_>, granted: u64) -> Option<Holds> {
    if granted == 0 || rule.shadow {
        return None;
    }
    match rule.ask.purpose {
        Purpose::Lease { .. } => Some(Holds::Lease),
        Purpose::Estimate => Some(Holds::Estimate),
        Purpose::Spend => rule.limiter.is_concurrency().then_some(Holds::Permit),
        Purpose::Peek | Purpose::Credit => None,
    }
}

/// An ask whose policy is found.
struct Named<'a> {
    policy: &'a Arc<Policy>,
    /// How many rules judge it; none of a breaker's.
    rules: usize,
    /// It is no peek, so it counts.
    counts: bool,
    /// Which bucket.
    key: &'a str,
    /// Tokens asked for.
    weight: u64,
}

/// An Acquire whose names are found: its asks, and the rules that judge them in a row.
#[derive(Clone, Copy)]
struct Resolved<'a> {
    catalogue: &'a Catalogue,
    asks: &'a [Named<'a>],
    rules: &'a [CellAsk<'a>],
    circuits: &'a [Crossing<'a>],
    client: Option<Client<'a>>,
}

impl Resolved<'_> {
    /// Counts what became of each ask.
    fn count(&self, Decided { decision, .. }: &Decided, circuits: &[Crossed]) {
        let limiters = self.asks.iter().filter(|ask| ask.rules > 0);
        for (ask, verdict) in limiters.zip(&decision.verdicts) {
            if ask.counts {
                ask.policy.decisions.count(decision.allowed, verdict);
            }
        }
        for crossed in circuits {
            let ask = &self.asks[crossed.ask];
            if ask.counts {
                ask.policy.decisions.count_crossing(decision.allowed, crossed);
            }
        }
    }

    /// Where the rules of each ask end.
    fn ends(&self) -> impl Iterator<Item = usize> {
        self.asks.iter().scan(0, |end, ask| {
            *end += ask.rules;
            Some(*end)
        })
    }

    /// What a grant holds of what was charged; what of it is to be told of each ask.
    fn parts(
        &self,
        decided: &Decided,
        held: &mut ArrayVec<Held, { limits::ASKS }>,
        now: Moment,
    ) -> Vec<Part> {
        let mut parts = Vec::new();
        let mut start = 0;
        for (ask, (named, end)) in self.asks.iter().zip(self.ends()).enumerate() {
            let mut of_ask = None::<Held>;
            for index in start..end {
                let (rule, charged) = (&self.rules[index], decided.charged[index]);
                let granted = decided.decision.verdicts[index].granted;
                let Some(holds) = holds(rule, granted) else { continue };
                let life = life(holds, rule, named.policy, charged.slice, now);
                let open = OpenPart {
                    holds,
                    number: rule.limiter.number,
                    revision: rule.limiter.settings.revision,
                    cell: charged.cell,
                    slice: charged.slice,
                    charged: granted,
                    told: 0,
                    expires_at: now.time.after(life),
                };
                let limiter = self.catalogue.numbered(rule.limiter.number).map(Arc::clone);
                parts.extend(limiter.map(|limiter| Part { limiter, open }));
                let leased = if holds == Holds::Lease { granted } else { 0 };
                let none = Held { ask, leased: 0, permits: false, expires_in: life };
                let before = of_ask.unwrap_or(none);
                of_ask = Some(Held {
                    // Of several limits each leases as much.
                    leased: before.leased.max(leased),
                    permits: before.permits || holds == Holds::Permit,
                    expires_in: before.expires_in.min(life),
                    ..before
                });
            }
            held.extend(of_ask);
            start = end;
        }
        parts
    }
}

/// Has the verdict of each lease be that of the ask that it belongs to: what is left is told to who asks, at
/// its own priority, and not at that of leases.
fn tell_leases(decision: &mut Decision, rules: &[CellAsk<'_>]) {
    let allowed = decision.allowed;
    let is_lease = |rule: &CellAsk<'_>| matches!(rule.ask.purpose, Purpose::Lease { .. });
    // One ask may want a lease. Its rules come first, and as many for the lease follow them.
    let limits = rules.iter().filter(|rule| is_lease(rule)).count();
    for (index, _) in rules.iter().enumerate().filter(|(_, rule)| is_lease(rule)) {
        let (lease, mut asked) = (decision.verdicts[index], decision.verdicts[index - limits]);
        if allowed {
            asked.remaining = asked.remaining.saturating_sub(lease.granted);
            asked.reset_after = lease.reset_after;
        }
        decision.verdicts[index - limits] = asked;
        decision.verdicts[index] = asked;
    }
}

/// Has every denial say that there is no room in the line.
fn tell_line_full(decision: &mut Decision) {
    for verdict in &mut decision.verdicts {
        if let Admission::Deny { reason, .. } = &mut verdict.admission {
            *reason = Reason::LineFull;
        }
    }
}

/// How long what a grant holds lives.
fn life(holds: Holds, rule: &CellAsk<'_>, policy: &Policy, slice: u64, now: Moment) -> Duration {
    match (holds, &rule.limiter.settings.limit) {
        (Holds::Permit, Limit::Concurrency(permits)) => permits.ttl(),
        // A lease ends with its window.
        (Holds::Lease, Limit::Window(_)) => {
            let left = Wall::from_nanos(slice).nanos_since(now.wall);
            policy.lease_time.min(Duration::from_nanos(left))
        }
        (Holds::Lease, _) => policy.lease_time,
        (Holds::Estimate | Holds::Permit, _) => limits::ESTIMATE_LIFE,
    }
}

/// Whose asks are resolved, and against what.
struct Asker<'a, 'n> {
    app: &'n App,
    namespace: &'n Namespace,
    caller: Caller,
    client: Option<Client<'a>>,
    stands: Stands,
}

/// Where a caller stands in the line of what it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stands {
    /// It does not wait: whoever does goes first.
    NotAtAll,
    /// It is its turn.
    AtTheHead,
    /// It is not.
    Behind,
    /// There is no room in it.
    Outside,
}

/// Which attempt to decide an Acquire is counted: one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counts {
    /// This one.
    This,
    /// This one, if it is the last.
    IfAllowed,
}

impl<'n> Asker<'_, 'n> {
    /// The asks of an entry and the rules that judge them.
    fn resolve<'a: 'n>(
        &self,
        entry: Entry<impl IntoIterator<Item = Ask<'a>>>,
        mut named: impl FnMut(Named<'n>),
        mut rule: impl FnMut(CellAsk<'n>),
        mut circuit: impl FnMut(Crossing<'n>),
    ) -> Result<(), AcquireError> {
        let Entry { asks, priority, retry } = entry;
        let mut circuits = 0;
        for (index, ask) in asks.into_iter().enumerate() {
            let policy = self.namespace.policy(ask.policy).ok_or_else(|| {
                AcquireError::UnknownPolicy { ask: index, policy: ask.policy.to_owned() }
            })?;
            if let Some(place) = policy.place(ask.key) {
                circuits += 1;
                check_crossing(index, circuits, policy, &ask)?;
                circuit(Crossing { ask: index, place, peeks: ask.cost == 0 });
                let (counts, weight) = (ask.cost > 0, ask.cost);
                named(Named { policy, rules: 0, counts, key: ask.key, weight });
                continue;
            }
            let purpose = if ask.estimated { Purpose::Estimate } else { Purpose::Spend };
            let core_ask =
                fusebox_core::Ask { retry, ..fusebox_core::Ask::spend(ask.cost).to(purpose) };
            let mut rules = 0;
            let held = self.is_held(policy, ask.key, priority);
            for one in policy.asks(ask.key, core_ask, priority, self.caller.now) {
                check(index, policy, &ask, &one)?;
                rule(CellAsk { held: held && !one.shadow, ..one });
                rules += 1;
            }
            if ask.lease > 0
                && !self.is_held(policy, ask.key, Priority::Bulk)
                && let Some(clients) = self.lessees(policy, &ask)
            {
                let purpose = Purpose::Lease { clients };
                let lease = fusebox_core::Ask::spend(ask.lease).to(purpose);
                // Leases leave what the lowest priority does.
                for one in policy.asks(ask.key, lease, Priority::Bulk, self.caller.now) {
                    rule(one);
                    rules += 1;
                }
            }
            let weight = ask.cost.saturating_add(ask.lease);
            named(Named { policy, rules, counts: weight > 0, key: ask.key, weight });
        }
        Ok(())
    }

    /// Whether others wait for that key who go first.
    fn is_held(&self, policy: &Policy, key: &str, priority: Priority) -> bool {
        match self.stands {
            Stands::NotAtAll => self.app.is_held_for(policy, key, priority),
            Stands::AtTheHead => false,
            Stands::Behind | Stands::Outside => true,
        }
    }

    /// How many clients share what can be leased of the key, this one among them; `None` if nothing is leased.
    fn lessees(&self, policy: &Policy, ask: &Ask<'_>) -> Option<u32> {
        let client = self.client.filter(|_| !policy.shadow)?;
        let (cell, time) = (policy.cells.cell(ask.key), policy.lease_time);
        let now = self.caller.now.time;
        let clients = self.app.lessees.count(cell, client.id, time, now)?;
        let limiters = &policy.rules_of(ask.key).limiters;
        let is_leasable = |limit| is_leasable(limit, time, clients);
        limiters.iter().all(|limiter| is_leasable(&limiter.settings.limit)).then_some(clients)
    }
}

/// Whether so many clients can lease from a limit: what flows in one lease time must do for two tokens each.
/// Windows are leased from where they are long, since a lease ends with its window.
fn is_leasable(limit: &Limit, lease_time: Duration, clients: u32) -> bool {
    let (limit, per) = match limit {
        Limit::TokenBucket(bucket) => (bucket.limit(), bucket.per()),
        Limit::Window(window) if window.longest() >= limits::LEASED_WINDOW => {
            (window.limit(), window.longest())
        }
        _ => return false,
    };
    let flows = u128::from(limit) * lease_time.as_nanos();
    flows >= 2 * u128::from(clients) * per.as_nanos()
}

/// Refuses what no circuit is asked for.
fn check_crossing(
    index: usize,
    circuits: usize,
    policy: &Policy,
    ask: &Ask<'_>,
) -> Result<(), AcquireError> {
    let policy = || policy.name.to_string();
    if circuits > limits::CIRCUIT_ASKS {
        return Err(AcquireError::TooManyCircuits { ask: index, policy: policy() });
    }
    if ask.estimated {
        let counts = "calls through a circuit";
        return Err(AcquireError::NotEstimable { ask: index, policy: policy(), counts });
    }
    if ask.cost > 1 {
        return Err(AcquireError::OneCall { ask: index, policy: policy(), cost: ask.cost });
    }
    Ok(())
}

fn namespace<'a>(catalogue: &'a Catalogue, name: &str) -> Result<&'a Namespace, AcquireError> {
    let found = catalogue.namespace(name);
    found.ok_or_else(|| AcquireError::UnknownNamespace(name.to_owned()))
}

/// Refuses what no wait would ever make possible. What only watches refuses nothing.
fn check(
    index: usize,
    policy: &Policy,
    ask: &Ask<'_>,
    rule: &CellAsk<'_>,
) -> Result<(), AcquireError> {
    if rule.shadow {
        return Ok(());
    }
    let limit = &rule.limiter.settings.limit;
    let counts = match limit {
        Limit::Concurrency(_) => Some("permits"),
        Limit::RetryBudget(_) => Some("retries"),
        _ => None,
    };
    if let Some(counts) = counts.filter(|_| ask.estimated) {
        let policy = policy.name.to_string();
        return Err(AcquireError::NotEstimable { ask: index, policy, counts });
    }
    // A limit of 0 denies all, which is an answer; above another limit there is none.
    let (capacity, reserved) = (limit.capacity(), rule.ask.reserved);
    let most = capacity.saturating_sub(reserved);
    if capacity > 0 && ask.cost > most {
        return Err(AcquireError::NeverPossible {
            ask: index,
            policy: policy.name.to_string(),
            cost: ask.cost,
            most,
        });
    }
    Ok(())
}
