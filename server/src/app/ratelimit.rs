//! Envoy's rate limit service: which rules limit a request, and what becomes of it.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use arrayvec::ArrayVec;
use fusebox_core::{Admission, Ask, Limit, MAX_RULES, Moment, Purpose, Verdict, Wall};
use thiserror::Error;

use super::{App, Caller, Named, Priority, Resolved};
use crate::{
    catalogue::{
        Catalogue, Policy, PolicyName, Ratelimit,
        domains::{Domain, Hit, Judge, Key, Rule},
    },
    config::envoy::{Amount, EnvoyRatelimit, Metadata, ONLY_RATES, Unit},
    limits,
    storage::{Answer, CellAsk, Charge, Decided, StorageError},
};

/// A request that passes a proxy, well-formed.
#[derive(Clone, Debug)]
pub struct RatelimitRequest<'a, D> {
    /// Names a set of rules.
    pub domain: &'a str,
    /// 1 to 64 descriptors.
    pub descriptors: D,
}

/// What a request is subject to.
#[derive(Clone, Debug)]
pub struct Descriptor<E> {
    /// 1 to 32 keys and values.
    pub entries: E,
    /// A limit that judges instead of a rule.
    pub limit: Option<(u32, Unit)>,
    /// Hits to count; 0 is a peek.
    pub hits: u64,
    /// They come back.
    pub negative: bool,
}

/// What became of a request.
#[derive(Debug)]
pub struct Ratelimited<'c> {
    /// How it is to be told.
    pub settings: &'c EnvoyRatelimit,
    /// It is over a limit that binds, and not everything passes anyway.
    pub over: bool,
    /// One for each descriptor.
    pub statuses: ArrayVec<Status<'c>, { limits::DESCRIPTORS }>,
}

/// What became of a descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Status<'c> {
    /// It is over its limit.
    pub over: bool,
    /// It binds only together with others.
    pub quota: bool,
    /// Everything may pass.
    pub unlimited: bool,
    /// What limits it.
    pub limit: Option<CurrentLimit<'c>>,
    /// Hits left.
    pub remaining: u64,
    /// Time until all of the limit is left again.
    pub reset_after: Duration,
    /// What the rule that it meets has to tell.
    pub metadata: Option<&'c BTreeMap<String, Metadata>>,
}

/// A limit, as it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CurrentLimit<'c> {
    /// How many hits.
    pub per_unit: u64,
    /// In which time, if that has a name.
    pub unit: Option<Unit>,
    /// What the rule is called; empty if it has no name.
    pub name: &'c str,
}

/// Why nothing could be decided. Nothing was charged, unless the storage failed.
#[derive(Debug, Error)]
pub enum RatelimitError {
    /// It is not served. Said in the words of envoyproxy/ratelimit.
    #[error("no rate limit configuration loaded")]
    NotConfigured,
    /// A rule is to be judged by a policy that is not there.
    #[error("rule `{rule}` is to be judged by policy `{policy}`, and there is none of that name")]
    UnknownPolicy {
        /// The rule.
        rule: String,
        /// The policy.
        policy: PolicyName,
    },
    /// A rule is to be judged by a policy whose tokens nobody would give back.
    #[error(
        "rule `{rule}` is to be judged by policy `{policy}`, which counts {counts}: {ONLY_RATES}"
    )]
    NotARate {
        /// The rule.
        rule: String,
        /// The policy.
        policy: PolicyName,
        /// What it counts.
        counts: &'static str,
    },
    /// More limits than are decided together.
    #[error("the descriptors meet more than {MAX_RULES} limits, as many as are decided together")]
    TooManyLimits,
    /// The storage cannot.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// What a descriptor meets.
enum Meets<'c> {
    /// No rule, or one that another replaces.
    Nothing,
    /// A rule without a limit.
    Unlimited(&'c Rule),
    /// A limit.
    Limit(Met<'c>),
}

/// What is asked for all descriptors together: each that meets a limit, and the rules that judge it.
#[derive(Default)]
struct Asks<'c> {
    named: ArrayVec<Named<'c>, { limits::DESCRIPTORS }>,
    rules: ArrayVec<CellAsk<'c>, MAX_RULES>,
}

/// A limit that a descriptor meets.
#[derive(Clone, Copy)]
struct Met<'c> {
    /// Who judges.
    policy: &'c Arc<Policy>,
    /// The rule; `None` if the descriptor brings the limit along.
    rule: Option<&'c Rule>,
    /// What is told as the limit, where the rule says it.
    told: Option<(u32, Unit)>,
    shadow: bool,
    quota: bool,
}

impl App {
    /// Counts the hits of a request by the rules that it meets, and says whether it is over a limit; what is to be
    /// told of it is what `tell` makes.
    ///
    /// # Errors
    /// If nothing could be decided.
    pub fn should_rate_limit<'a, E, T>(
        &self,
        caller: Caller,
        request: RatelimitRequest<'a, impl Iterator<Item = Descriptor<E>> + Clone>,
        tell: impl FnOnce(&Ratelimited<'_>) -> T,
    ) -> Result<Answer<T>, RatelimitError>
    where
        E: Iterator<Item = (&'a str, &'a str)> + Clone,
    {
        let catalogue = self.catalogue.load();
        let ratelimit = catalogue.ratelimit.as_deref().ok_or(RatelimitError::NotConfigured)?;
        let settings = &*ratelimit.settings;
        let RatelimitRequest { domain: name, descriptors } = request;
        let domain = ratelimit.domains.domain(name);
        let mut meets = ArrayVec::<_, { limits::DESCRIPTORS }>::new();
        for descriptor in descriptors.clone() {
            meets.push(match domain {
                Some(domain) => meet(&catalogue, ratelimit, domain, &descriptor)?,
                None => Meets::Nothing,
            });
        }
        if domain.is_none() {
            ratelimit.domains.unknown_domains().fetch_add(1, Ordering::Relaxed);
        }
        replace(&mut meets);

        let mut keys = ArrayVec::<_, { limits::DESCRIPTORS }>::new();
        keys.extend(meets.iter().zip(descriptors.clone()).map(|(meets, descriptor)| match meets {
            Meets::Nothing | Meets::Unlimited(_) => Key::default(),
            Meets::Limit(Met { rule: Some(rule), .. }) => rule.key(descriptor.entries),
            Meets::Limit(Met { policy, .. }) => Key::of_all(name, descriptor.entries, policy),
        }));
        let mut asks = Asks::default();
        // A descriptor that nothing limits is as good as one whose quota is left.
        let is_free = settings.quota_mode && meets.iter().any(|met| matches!(met, Meets::Nothing));
        for ((meets, key), descriptor) in meets.iter().zip(&keys).zip(descriptors.clone()) {
            if let Meets::Limit(met) = meets {
                self.ask(met, key, &descriptor, is_free, caller.now, &mut asks)?;
            }
        }

        let Asks { named, rules } = &asks;
        let mut decided = Decided::default();
        let mut answer = Answer::Now(());
        if let Some(domain) = domain.filter(|_| !rules.is_empty()) {
            let charging = domain.charging;
            let charge = Charge { charging, asks: rules, catalogue: &catalogue };
            answer = self.storage.apply(&charge, None, caller.now, &mut decided)?;
            let resolved =
                Resolved { catalogue: &catalogue, asks: named, rules, circuits: &[], client: None };
            if named.len() < rules.len() {
                let ends: ArrayVec<usize, { limits::DESCRIPTORS }> = resolved.ends().collect();
                decided.decision.merge(&ends);
            }
            resolved.count(&decided, &[]);
            self.watch(&resolved, &decided.charged, caller.now.time);
        }

        let mut verdicts = decided.decision.verdicts.iter();
        // Filled where they lie: these are kilobytes, of which nearly all callers need a few bytes.
        let mut limited = Ratelimited { settings, over: false, statuses: ArrayVec::new() };
        for ((meets, key), descriptor) in meets.iter().zip(&keys).zip(descriptors) {
            limited.statuses.push(match (meets, domain) {
                (Meets::Unlimited(_), _) => Status { unlimited: true, ..Status::default() },
                (Meets::Limit(met), Some(domain)) => {
                    // There is one for each limit that is met.
                    let Some(verdict) = verdicts.next() else { break };
                    let (status, hit) = met.status(&descriptor, key, verdict, caller.now);
                    match met.rule {
                        Some(rule) => rule.count(descriptor.entries, hit),
                        None => domain.count_request_limit(descriptor.entries, hit),
                    }
                    status
                }
                (Meets::Nothing | Meets::Limit(_), _) => {
                    Status { quota: settings.quota_mode, ..Status::default() }
                }
            });
        }
        limited.over = is_over(&limited.statuses);
        if limited.over && settings.shadow_mode {
            self.passed_in_shadow.fetch_add(1, Ordering::Relaxed);
            limited.over = false;
        }
        Ok(answer.map(|()| tell(&limited)))
    }

    /// Asks what judges a descriptor for its hits.
    fn ask<'c, E>(
        &self,
        met: &Met<'c>,
        key: &'c str,
        descriptor: &Descriptor<E>,
        is_free: bool,
        now: Moment,
        asks: &mut Asks<'c>,
    ) -> Result<(), RatelimitError> {
        let Met { policy, rule, told, shadow, quota } = *met;
        // The limit of a rule is the policy's own.
        let limit = told.filter(|_| rule.is_none()).map(|(per_unit, _)| per_unit.into());
        let ask = Ask { limit, ..Ask::spend(descriptor.hits).to(descriptor.purpose()) };
        let held = self.is_held_for(policy, key, Priority::Normal);
        let rules = policy.asks(key, ask, Priority::Normal, now);
        let (count, weight) = (rules.len(), descriptor.hits);
        if count > asks.rules.remaining_capacity() {
            return Err(RatelimitError::TooManyLimits);
        }
        asks.rules.extend(rules.map(|one| {
            let shadow = one.shadow || shadow || quota && is_free;
            CellAsk { shadow, quota, held: held && !shadow, ..one }
        }));
        asks.named.push(Named { policy, rules: count, counts: weight > 0, key, weight });
        Ok(())
    }
}

impl<'c> Meets<'c> {
    fn rule(&self) -> Option<&'c Rule> {
        match self {
            Self::Unlimited(rule) => Some(rule),
            Self::Limit(met) => met.rule,
            Self::Nothing => None,
        }
    }
}

impl<E> Descriptor<E> {
    fn purpose(&self) -> Purpose {
        match (self.hits, self.negative) {
            (0, _) => Purpose::Peek,
            (_, true) => Purpose::Credit,
            (_, false) => Purpose::Spend,
        }
    }
}

impl<'c> Met<'c> {
    /// What became of a descriptor, and how its hits are counted.
    fn status<E>(
        &self,
        descriptor: &Descriptor<E>,
        key: &str,
        verdict: &Verdict,
        now: Moment,
    ) -> (Status<'c>, Hit) {
        let only = match &self.policy.rules_of(key).limiters[..] {
            [limiter] => Some(&limiter.settings.limit),
            _ => None,
        };
        let window = match only {
            Some(Limit::Window(window)) => Some(window.longest()),
            _ => None,
        };
        let over = verdict.admission != Admission::Allow;
        let reset_after = match window {
            // Also of one that nothing was counted in; one that a clock which was set back sees far ahead ends no
            // later than any.
            Some(longest) => {
                let end = Wall::from_nanos(verdict.slice);
                Duration::from_nanos(end.nanos_since(now.wall)).min(longest)
            }
            None => verdict.reset_after,
        };
        let (per_unit, unit) = match (self.told, only.and_then(rate)) {
            (Some((per_unit, unit)), _) => (per_unit.into(), Some(unit)),
            (None, Some((limit, per))) => (limit, Unit::of(per)),
            (None, None) => (verdict.limit, None),
        };
        let name = self.rule.map_or("", |rule| &rule.name);
        let status = Status {
            over: over && !self.shadow,
            quota: self.quota,
            unlimited: false,
            limit: Some(CurrentLimit { per_unit, unit, name }),
            // Whatever is left was not enough.
            remaining: if over { 0 } else { verdict.remaining },
            reset_after,
            metadata: self.rule.map(|rule| &rule.metadata),
        };
        let hit = Hit {
            hits: descriptor.hits,
            spent_before: verdict.spent,
            limit: verdict.limit,
            over,
            shadow: self.shadow,
            negative: descriptor.negative,
        };
        (status, hit)
    }
}

/// So many hits in such a time.
const fn rate(limit: &Limit) -> Option<(u64, Duration)> {
    match limit {
        Limit::TokenBucket(bucket) => Some((bucket.limit(), bucket.per())),
        Limit::Window(window) => Some((window.limit(), window.longest())),
        Limit::SlidingWindow(window) => Some((window.limit(), window.per())),
        Limit::Concurrency(_) | Limit::RetryBudget(_) => None,
    }
}

/// What a descriptor meets in a domain.
fn meet<'c, 'a, E>(
    catalogue: &'c Catalogue,
    ratelimit: &'c Ratelimit,
    domain: &'c Domain,
    descriptor: &Descriptor<E>,
) -> Result<Meets<'c>, RatelimitError>
where
    E: Iterator<Item = (&'a str, &'a str)> + Clone,
{
    if let Some((per_unit, unit)) = descriptor.limit {
        let Some(policy) = ratelimit.domains.of_requests(unit) else { return Ok(Meets::Nothing) };
        let quota = ratelimit.settings.quota_mode;
        let told = Some((per_unit, unit));
        return Ok(Meets::Limit(Met { policy, rule: None, told, shadow: false, quota }));
    }
    let Some(rule) = domain.rule(descriptor.entries.clone()) else { return Ok(Meets::Nothing) };
    let (policy, told) = match (&rule.judge, rule.amount) {
        (Judge::Nobody, _) => return Ok(Meets::Unlimited(rule)),
        (Judge::Own(policy), Amount::Requests { per_unit, unit }) => {
            (policy, Some((per_unit, unit)))
        }
        (Judge::Own(policy), Amount::Unlimited) => (policy, None),
        (Judge::Native(name), _) => (native(catalogue, rule, name)?, None),
    };
    let shadow = policy.shadow || rule.shadow_mode;
    Ok(Meets::Limit(Met { policy, rule: Some(rule), told, shadow, quota: rule.quota_mode }))
}

/// The policy of this server that judges instead of a rule.
fn native<'c>(
    catalogue: &'c Catalogue,
    rule: &Rule,
    name: &PolicyName,
) -> Result<&'c Arc<Policy>, RatelimitError> {
    let (rule, policy) = (|| rule.path.to_string(), || name.clone());
    let unknown = || RatelimitError::UnknownPolicy { rule: rule(), policy: policy() };
    let found = catalogue.policy(name).ok_or_else(unknown)?;
    match found.no_hits {
        Some(counts) => Err(RatelimitError::NotARate { rule: rule(), policy: policy(), counts }),
        None => Ok(found),
    }
}

/// Takes away the rules that others replace, also where those are replaced themselves.
fn replace(meets: &mut ArrayVec<Meets<'_>, { limits::DESCRIPTORS }>) {
    let replaces = |name: &str| {
        let mut rules = meets.iter().filter_map(Meets::rule);
        rules.any(|rule| rule.replaces.iter().any(|other| **other == *name))
    };
    let mut replaced = ArrayVec::<bool, { limits::DESCRIPTORS }>::new();
    replaced.extend(meets.iter().map(|meets| match meets {
        Meets::Limit(Met { rule: Some(rule), .. }) => !rule.name.is_empty() && replaces(&rule.name),
        _ => false,
    }));
    for (meets, _) in meets.iter_mut().zip(replaced).filter(|(_, replaced)| *replaced) {
        *meets = Meets::Nothing;
    }
}

/// Whether a request is over a limit: one that binds alone, or all that bind together.
fn is_over(statuses: &[Status<'_>]) -> bool {
    let mut bound = statuses.iter().filter(|status| !status.unlimited);
    let alone = bound.clone().any(|status| status.over && !status.quota);
    let quotas = bound.clone().any(|status| status.quota);
    alone || quotas && bound.all(|status| status.over || !status.quota)
}
