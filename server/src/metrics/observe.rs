//! Counters and gauges, observed at each scrape.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use fusebox_core::circuit::{Mode, Phase};
use opentelemetry::{
    KeyValue,
    metrics::{AsyncInstrument, Meter, MeterProvider},
};
use opentelemetry_sdk::metrics::SdkMeterProvider;

use crate::{
    app::{App, mode_name, state_name},
    catalogue::{Budget, Policy, PolicyName, domains::Hits},
    counters::{Connections, DECISION_LABELS, Disk},
    lifecycle::Lifecycle,
    storage::Tally,
};

/// Where what is counted is registered, to be observed at each scrape.
struct Observed {
    meter: Meter,
    lifecycle: Arc<Lifecycle>,
}

/// Takes what is observed.
type Observer<'a> = &'a dyn AsyncInstrument<u64>;

impl Observed {
    /// A counter that the app tells, once there is one.
    fn counter(
        &self,
        name: &'static str,
        description: &'static str,
        tell: impl Fn(&App, Observer<'_>) + Send + Sync + 'static,
    ) {
        let counter = self.meter.u64_observable_counter(name).with_description(description);
        counter.with_callback(self.once_there(tell)).build();
    }

    /// A gauge that the app tells, once there is one.
    fn gauge(
        &self,
        name: &'static str,
        description: &'static str,
        tell: impl Fn(&App, Observer<'_>) + Send + Sync + 'static,
    ) {
        let gauge = self.meter.u64_observable_gauge(name).with_description(description);
        gauge.with_callback(self.once_there(tell)).build();
    }

    fn once_there(
        &self,
        tell: impl Fn(&App, Observer<'_>) + Send + Sync + 'static,
    ) -> impl Fn(Observer<'_>) + Send + Sync + 'static {
        let lifecycle = Arc::clone(&self.lifecycle);
        move |observer| lifecycle.app().into_iter().for_each(|app| tell(app, observer))
    }
}

/// Registers every counter and gauge; `connections` are those of each port, by its name.
pub(super) fn observe(
    provider: &SdkMeterProvider,
    lifecycle: &Arc<Lifecycle>,
    connections: &[(&'static str, Arc<Connections>)],
) {
    let observed = Observed { meter: provider.meter("fusebox"), lifecycle: Arc::clone(lifecycle) };
    observe_decisions(&observed);
    observe_reports(&observed);
    observe_app(&observed);
    observe_cells(&observed);
    observe_circuits(&observed);
    observe_rules(&observed);
    observe_disk(&observed);
    observe_connections(&observed.meter, connections);
}

/// The labels that name a policy.
fn named(policy: &Policy) -> [KeyValue; 2] {
    [
        KeyValue::new("namespace", Arc::clone(&policy.namespace)),
        KeyValue::new("policy", Arc::clone(&policy.name)),
    ]
}

/// What each policy decided.
fn observe_decisions(observed: &Observed) {
    observed.counter(
        "fusebox_decisions",
        "Asks by what became of their Acquire. `reason` is the ask's own: empty on a deny, it was another ask's. Peeks are not counted",
        |app, observer| {
            for policy in app.catalogue().policies() {
                let counts = policy.decisions.counts().into_iter().zip(DECISION_LABELS);
                // What can happen anywhere is told from the start, all else once it has.
                let is_rule = policy.is_rule();
                let anywhere = |reason: &str| reason.is_empty() && !is_rule;
                let told = counts.filter(|(count, (_, reason))| *count > 0 || anywhere(reason));
                for (count, (decision, reason)) in told {
                    let [namespace, policy] = named(policy);
                    let decision = KeyValue::new("decision", decision);
                    let reason = KeyValue::new("reason", reason);
                    observer.observe(count, &[namespace, policy, decision, reason]);
                }
            }
        },
    );
    observed.counter(
        "fusebox_debt_dropped_tokens",
        "Tokens above `max_debt` that estimates cost and nobody was charged for",
        |app, observer| {
            for policy in app.catalogue().policies().filter(|policy| !policy.is_rule()) {
                observer.observe(policy.decisions.debt_dropped(), &named(policy));
            }
        },
    );
}

fn observe_reports(observed: &Observed) {
    observed.counter("fusebox_reports", "Outcomes reported, by their result", |app, observer| {
        let reports = app.reports();
        for (result, count) in [
            ("applied", &reports.applied),
            ("duplicate", &reports.duplicate),
            ("unknown_grant", &reports.unknown_grant),
            ("stale_generation", &reports.stale_generation),
        ] {
            let label = [KeyValue::new("result", result)];
            observer.observe(count.load(Ordering::Relaxed), &label);
        }
    });
}

/// How much the server holds.
fn observe_app(observed: &Observed) {
    type Read = fn(&App) -> usize;
    let gauges: [(_, _, Read); 6] = [
        (
            "fusebox_live_cells",
            "Cells that are remembered, one for each limit of a key: not full, or not a minute ago",
            App::live_cells,
        ),
        ("fusebox_open_grants", "Grants that are neither settled nor expired", |app| {
            app.grants().open()
        }),
        ("fusebox_waiting", "Callers that stand in a line", App::waiting),
        ("fusebox_circuit_watchers", "Streams that watch circuits", App::watchers),
        ("fusebox_sessions", "Sessions, each of them a stream", App::sessions),
        ("fusebox_events", "Events of the audit trail that are remembered", App::event_count),
    ];
    for (name, description, read) in gauges {
        observed.gauge(name, description, move |app, observer| {
            observer.observe(read(app) as u64, &[]);
        });
    }
}

fn observe_connections(meter: &Meter, connections: &[(&'static str, Arc<Connections>)]) {
    let ports = connections.to_vec();
    meter
        .u64_observable_gauge("fusebox_connections")
        .with_description("Connections that are open")
        .with_callback(move |observer| {
            for (port, connections) in &ports {
                let open = connections.open.load(Ordering::Relaxed) as u64;
                observer.observe(open, &[KeyValue::new("port", *port)]);
            }
        })
        .build();

    let ports = connections.to_vec();
    meter
        .u64_observable_counter("fusebox_refused_connections")
        .with_description("Connections closed at once, because as many were open as may be")
        .with_callback(move |observer| {
            for (port, connections) in &ports {
                let refused = connections.refused.load(Ordering::Relaxed);
                observer.observe(refused, &[KeyValue::new("port", *port)]);
            }
        })
        .build();
}

/// The cells of each policy.
fn observe_cells(observed: &Observed) {
    type Read = fn(&Budget) -> usize;
    let gauges: [(_, _, Read); 2] = [
        ("fusebox_policy_cells", "Cells of a policy that live", Budget::live),
        (
            "fusebox_policy_overflow_cells",
            "Of those, shared by keys past `max_cells`: above 0, some keys are not told apart",
            Budget::overflow_cells,
        ),
    ];
    for (name, description, read) in gauges {
        observed.gauge(name, description, move |app, observer| {
            for policy in app.catalogue().policies() {
                let cells = read(&policy.budget) as u64;
                if cells > 0 || !policy.is_rule() {
                    observer.observe(cells, &named(policy));
                }
            }
        });
    }
}

/// The circuits of each breaker.
fn observe_circuits(observed: &Observed) {
    observed.gauge(
        "fusebox_circuits",
        "Circuits of a breaker that are remembered, by whether calls go through and what operators made of them",
        |app, observer| {
            visit_breakers(app, |policy, tally| {
                for (phase, count) in Phase::ALL.into_iter().zip(tally.circuits()) {
                    let [namespace, policy] = named(policy);
                    let state = KeyValue::new("state", state_name(phase.state()));
                    let mode = KeyValue::new("mode", mode_name(phase.mode()));
                    observer.observe(count as u64, &[namespace, policy, state, mode]);
                }
            });
        },
    );
    observed.counter(
        "fusebox_circuit_transitions",
        "Changes of circuits by what they became: a state, or the mode that an operator set",
        |app, observer| {
            visit_breakers(app, |policy, tally| {
                for (phase, count) in Phase::ALL.into_iter().zip(tally.transitions()) {
                    let [namespace, policy] = named(policy);
                    let to = match phase.mode() {
                        Mode::Normal => state_name(phase.state()),
                        mode => mode_name(mode),
                    };
                    observer.observe(count, &[namespace, policy, KeyValue::new("to", to)]);
                }
            });
        },
    );
}

/// Every breaker, with what became of its circuits.
fn visit_breakers(app: &App, mut visit: impl FnMut(&Policy, &Tally)) {
    for policy in app.catalogue().policies().filter(|policy| policy.breakers.is_some()) {
        visit(policy, &app.circuits().tally(&PolicyName::new(&policy.namespace, &policy.name)));
    }
}

/// Hits of Envoy's requests, as envoyproxy/ratelimit counts them.
fn observe_rules(observed: &Observed) {
    type Read = fn(&Hits) -> &AtomicU64;
    let hits: [(_, _, Read); 5] = [
        ("fusebox_ratelimit_hits", "Hits that met a limit", |hits| &hits.total),
        ("fusebox_ratelimit_over_limit_hits", "Of those, over the limit", |hits| &hits.over_limit),
        (
            "fusebox_ratelimit_near_limit_hits",
            "Of those, within the limit and past four fifths of it",
            |hits| &hits.near_limit,
        ),
        (
            "fusebox_ratelimit_within_limit_hits",
            "Of those, of descriptors that were not over the limit",
            |hits| &hits.within_limit,
        ),
        (
            "fusebox_ratelimit_shadow_mode_hits",
            "Of those over the limit, where the rule only watches",
            |hits| &hits.shadow_mode,
        ),
    ];
    for (name, description, read) in hits {
        observed.counter(name, description, move |app, observer| {
            let catalogue = app.catalogue();
            let Some(ratelimit) = &catalogue.ratelimit else { return };
            ratelimit.domains.visit_hits(|domain, key, hits| {
                let domain = KeyValue::new("domain", domain.to_owned());
                let key = KeyValue::new("key", key.to_owned());
                observer.observe(read(hits).load(Ordering::Relaxed), &[domain, key]);
            });
        });
    }
    observed.counter(
        "fusebox_ratelimit_unknown_domain",
        "Requests of a domain that no file defines",
        |app, observer| {
            if let Some(ratelimit) = &app.catalogue().ratelimit {
                let unknown = ratelimit.domains.unknown_domains();
                observer.observe(unknown.load(Ordering::Relaxed), &[]);
            }
        },
    );
    observed.counter(
        "fusebox_ratelimit_passed_in_shadow",
        "Requests over a limit that passed, because nothing is denied overall",
        |app, observer| {
            if app.catalogue().ratelimit.is_some() {
                observer.observe(app.passed_in_shadow(), &[]);
            }
        },
    );
    observed.counter(
        "fusebox_ratelimit_config_loads",
        "Times that the files of rules were loaded, or could not be",
        |app, observer| {
            if app.catalogue().ratelimit.is_some() {
                for (result, count) in app.rule_loads().counts() {
                    observer.observe(count, &[KeyValue::new("result", result)]);
                }
            }
        },
    );
}

fn observe_disk(Observed { meter, lifecycle }: &Observed) {
    type Read = fn(&Disk) -> u64;
    let counters: [(_, _, Read); 4] = [
        ("fusebox_journal_records", "Records written to the journal, or deleted", |disk| {
            disk.records.load(Ordering::Relaxed)
        }),
        (
            "fusebox_journal_commits",
            "Commits of such records, each for all that came meanwhile",
            |disk| disk.commits.load(Ordering::Relaxed),
        ),
        (
            "fusebox_journal_syncs",
            "Times that the disk was asked to keep what it was given",
            |disk| disk.syncs.load(Ordering::Relaxed),
        ),
        (
            "fusebox_journal_rotations",
            "Times that what is alive was moved to a fresh store",
            |disk| disk.rotations.load(Ordering::Relaxed),
        ),
    ];
    let gauges: [(_, _, Read); 2] = [
        ("fusebox_journal_queued_marks", "Marks that wait to be written", |disk| {
            disk.queued.load(Ordering::Relaxed) as u64
        }),
        ("fusebox_journal_bytes", "Size of the journal's store", |disk| {
            disk.bytes.load(Ordering::Relaxed)
        }),
    ];
    let tell = |read: Read| {
        let lifecycle = Arc::clone(lifecycle);
        move |observer: Observer<'_>| {
            lifecycle.disk().into_iter().for_each(|disk| observer.observe(read(disk), &[]));
        }
    };
    for (name, description, read) in counters {
        let counter = meter.u64_observable_counter(name).with_description(description);
        counter.with_callback(tell(read)).build();
    }
    for (name, description, read) in gauges {
        let gauge = meter.u64_observable_gauge(name).with_description(description);
        gauge.with_callback(tell(read)).build();
    }
}
