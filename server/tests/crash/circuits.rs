//! Circuits of a server that is killed again and again: what was told of them must hold ever after.

use std::{
    collections::HashMap,
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use fusebox_proto::v1::{
    AcquireRequest, Ask, CircuitMode, CircuitState, Client, Decision, GrantOutcome, Outcome,
    ReportRequest, SetCircuitModeRequest, Verdict, admin_client::AdminClient,
    resilience_client::ResilienceClient,
};
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tonic::{Status, transport::Channel};

use crate::{chance::Chance, process::Process};

/// One breaker whose circuits come and go, and one whose circuits stay open for longer than the test lasts.
const CONFIGURATION: &str = "
namespaces:
  test:
    policies:
      short:
        breaker: {min_calls: 2, open_for: 20ms, backoff: {factor: 1}, ramp: {steps: []}, min_reporters: 1,
                  half_open: {probes: 2, probe_timeout: 50ms, max_duration: 100ms}}
      long:
        breaker: {min_calls: 2, open_for: 1h, min_reporters: 1}
";

const LIVES: u64 = 25;

/// All that was told, in the order of the answers.
#[derive(Default)]
struct Told {
    /// What each generation of a circuit was.
    generations: HashMap<(String, u64), CircuitState>,
    /// The latest generation of each circuit that was told before the last kill.
    latest: HashMap<String, u64>,
    /// Circuits that are open for good, and when that was first told.
    open: HashMap<String, Instant>,
    /// What operators were answered last of each circuit, unless they asked for something since.
    forced: HashMap<String, Option<CircuitMode>>,
}

impl Told {
    /// A circuit was told of, to somebody who asked when `known` was its latest generation.
    fn see(&mut self, circuit: &str, known: u64, verdict: &Verdict) {
        let (generation, state) = (verdict.generation, verdict.circuit_state());
        assert!(generation >= known, "{circuit}: {generation:x} after {known:x}");
        let before = self.generations.insert((circuit.to_owned(), generation), state);
        assert!(
            before.is_none_or(|before| before == state),
            "{circuit}: generation {generation:x} was {before:?} and is {state:?}"
        );
        let latest = self.latest.entry(circuit.to_owned()).or_default();
        *latest = generation.max(*latest);
        if circuit.starts_with("long") {
            if state == CircuitState::Open {
                self.open.entry(circuit.to_owned()).or_insert_with(Instant::now);
            }
            let was_open = self.open.contains_key(circuit);
            assert!(!was_open || state == CircuitState::Open, "{circuit} closed: {verdict:?}");
        }
    }
}

/// One who calls, and writes down what it is told.
struct Caller {
    channel: Channel,
    told: Arc<Mutex<Told>>,
    chance: Chance,
    name: String,
}

impl Caller {
    /// Calls until there is no answer.
    async fn calls(mut self, life: u64) -> Result<(), Status> {
        let mut client = ResilienceClient::new(self.channel.clone());
        loop {
            let (policy, key) = match self.chance.once_in(4) {
                // Each life opens a few more of them.
                true => ("long", format!("{}", life * 3 + self.chance.within(0..3))),
                false => ("short", format!("{}", self.chance.within(0..4))),
            };
            let verdict = self.call(&mut client, policy, &key).await?;
            if policy == "short" && verdict.decision() == Decision::Deny {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }

    async fn call(
        &mut self,
        client: &mut ResilienceClient<Channel>,
        policy: &str,
        key: &str,
    ) -> Result<Verdict, Status> {
        let circuit = format!("{policy}/{key}");
        let known = self.told.lock().latest.get(&circuit).copied().unwrap_or_default();
        let asked = self.acquire(client, policy, key, 1).await?;
        let (grant_id, verdict) = asked;
        self.told.lock().see(&circuit, known, &verdict);
        if !grant_id.is_empty() {
            let fails = policy == "long" || self.chance.once_in(2);
            let outcome = if fails { Outcome::Failure } else { Outcome::Success };
            let outcome = GrantOutcome { grant_id, outcome: outcome.into(), ..Default::default() };
            let report = ReportRequest {
                namespace: "test".into(),
                client: Some(Client { id: self.name.clone(), ..Default::default() }),
                outcomes: vec![outcome],
                ..Default::default()
            };
            client.report(report).await?;
        }
        Ok(verdict)
    }

    async fn acquire(
        &self,
        client: &mut ResilienceClient<Channel>,
        policy: &str,
        key: &str,
        cost: u64,
    ) -> Result<(String, Verdict), Status> {
        let ask =
            Ask { policy: policy.into(), key: key.into(), cost: Some(cost), ..Default::default() };
        let request =
            AcquireRequest { namespace: "test".into(), asks: vec![ask], ..Default::default() };
        let mut answer = client.acquire(request).await?.into_inner();
        Ok((answer.grant_id, answer.verdicts.remove(0)))
    }

    /// Forces circuits, until there is no answer.
    async fn operates(mut self) -> Result<(), Status> {
        let mut admin = AdminClient::new(self.channel.clone());
        let modes = [CircuitMode::ForcedOpen, CircuitMode::Disabled, CircuitMode::MetricsOnly];
        loop {
            let key = format!("forced-{}", self.chance.within(0..3));
            let mode = self.chance.one_of(&modes);
            self.told.lock().forced.insert(key.clone(), None);
            let request = SetCircuitModeRequest {
                namespace: "test".into(),
                policy: "short".into(),
                key: key.clone(),
                mode: mode.into(),
                reason: "a drill".into(),
                ttl: Some(Duration::from_secs(3_600).try_into().unwrap()),
                expected_generation: None,
            };
            admin.set_circuit_mode(request).await?;
            self.told.lock().forced.insert(key, Some(mode));
        }
    }

    /// Looks at all that was told to be so.
    async fn looks(&self) {
        let mut client = ResilienceClient::new(self.channel.clone());
        let (known, forced) = {
            let told = self.told.lock();
            (told.latest.clone(), told.forced.clone())
        };
        for (circuit, known) in known {
            let (policy, key) = circuit.split_once('/').unwrap();
            let (_, verdict) = self.acquire(&mut client, policy, key, 0).await.unwrap();
            self.told.lock().see(&circuit, known, &verdict);
            if policy == "long" && verdict.circuit_state() == CircuitState::Open {
                let evidence = verdict.evidence.expect("why it is open");
                assert_eq!(evidence.failure_rate_basis_points, 10_000, "{circuit}");
                let since: Duration = evidence.open_since.unwrap().try_into().unwrap();
                let told = self.told.lock().open[&circuit].elapsed();
                let apart = since.abs_diff(told);
                assert!(apart < Duration::from_secs(5), "{circuit}: {since:?}, not {told:?}");
            }
        }
        for (key, mode) in forced {
            let Some(mode) = mode else { continue };
            let (_, verdict) = self.acquire(&mut client, "short", &key, 0).await.unwrap();
            let refuses = verdict.decision() == Decision::Deny;
            assert_eq!(refuses, mode == CircuitMode::ForcedOpen, "{key}: {verdict:?}");
        }
    }
}

pub async fn run(seed: u64) {
    let mut chance = Chance::new(seed);
    let home = tempfile::tempdir().unwrap();
    let (data, configuration) = (home.path().join("data"), home.path().join("fusebox.yaml"));
    fs::write(&configuration, CONFIGURATION).unwrap();
    let told = Arc::<Mutex<Told>>::default();
    for life in 0..LIVES {
        let mut process = Process::start(&data, &configuration);
        let channel = process.connected().await;
        let mut caller = |name: &str| Caller {
            channel: channel.clone(),
            told: Arc::clone(&told),
            chance: chance.fork(),
            name: name.to_owned(),
        };
        caller("looker").looks().await;
        let mut tasks = JoinSet::new();
        for name in ["a", "b", "c"] {
            tasks.spawn(caller(name).calls(life));
        }
        tasks.spawn(caller("operator").operates());
        let lives = chance.within(20..200);
        tokio::time::sleep(Duration::from_millis(lives)).await;
        assert!(process.kill().await.killed);
        while let Some(ended) = tasks.join_next().await {
            crate::clients::no_answer(ended.unwrap().unwrap_err());
        }
    }
    let told = told.lock();
    println!(
        "seed {seed}: {LIVES} kills, {} generations told, {} circuits open for good",
        told.generations.len(),
        told.open.len()
    );
    assert!(told.generations.len() > 100, "something happened");
    assert!(told.open.len() as u64 > LIVES, "also to those that stay open");
}
