//! Few calls: how a circuit of a target that is well closes again, as `tests/suites/models/circuits/recovery.rs`
//! has proved of the rules.

use super::*;

const MINUTE: u64 = 60;
/// Calls after which it is taken to never close.
const NEVER: u64 = 50;

/// What an operator might choose, in seconds.
fn all_settings() -> impl Iterator<Item = Settings> {
    let times = [5, 10, 59, 60, 61, 150].map(Duration::from_secs);
    let waits = [(1, 1), (5, 60), (50, 50), (60, 60)];
    let halves = (1..=4).flat_map(move |probes| {
        let timeouts = times.into_iter();
        timeouts.flat_map(move |probe_timeout| {
            let durations = times.into_iter().filter(move |time| *time >= probe_timeout);
            durations.map(move |max_duration| HalfOpen {
                probes,
                max_in_flight: probes,
                probe_timeout,
                max_duration,
            })
        })
    });
    halves.flat_map(move |half_open| {
        (1..=half_open.probes).flat_map(move |min_calls| {
            waits.into_iter().map(move |(first, max)| Settings {
                min_calls,
                min_reporters: 1,
                open_for: OpenFor {
                    first: Duration::from_secs(first),
                    factor_hundredths: 200,
                    max: Duration::from_secs(max),
                    jitter: Share::NONE,
                },
                half_open,
                ramp: Ramp { steps: [].into_iter().collect(), each: millis(1) },
                ..Settings::default()
            })
        })
    })
}

/// The calls that were refused after it had to be open, and those that were let through until it was closed.
fn recovery(settings: Settings, first: u64, take: u64) -> Option<(u64, u64)> {
    let open_for = settings.open_for.first;
    let mut world = World::new(Breaker::new(settings).unwrap(), true);
    let opened = world.newest;
    let counts = Counts { calls: 20, failures: 20, slow: 0 };
    let (generation, delta) = (world.circuit.generation(), Delta { counts, ..Delta::default() });
    world.turn(opened, |circuit, turn| circuit.report(generation, delta, by("a"), turn));
    assert_eq!(world.circuit.phase(), Phase::Open);
    let (mut refused, mut let_through) = (0, 0);
    for call in 0..NEVER {
        let now = opened.after(Duration::from_secs(first + call * MINUTE));
        let over = now.after(Duration::from_secs(take));
        let passage = world.turn(now, Circuit::ask);
        if let Passage::Refused { .. } = passage {
            refused += u64::from(now >= opened.after(open_for));
        } else {
            let_through += 1;
            let admitted = world.turn(now, |circuit, turn| circuit.admit(passage, turn));
            if let Admitted { generation, probe: Some((id, _)) } = admitted {
                let call = Call { outcome: Outcome::Success, latency: None, kind: "" };
                let probe = (generation, id);
                world.turn(over, |circuit, turn| circuit.report_probe(probe, call, by("a"), turn));
            }
        }
        if world.circuit.phase() == Phase::Closed {
            return Some((refused, let_through));
        }
    }
    None
}

/// Those that came while it had to be open aside, no call is refused, and it is closed by the last that it
/// takes: when enough were let through, or when it has been half-open for too long.
#[test]
fn a_target_with_one_call_a_minute_recovers_if_a_call_is_over_in_time() {
    for settings in all_settings() {
        let HalfOpen { probes, probe_timeout, max_duration, .. } = settings.half_open;
        let enough = u64::from(probes.min(settings.min_calls));
        for first in [0, 1, 7, 49, 50, 59] {
            for take in [0, 4, 5, 9, 10, 59] {
                let in_time = Duration::from_secs(take) < probe_timeout;
                let expected = in_time.then(|| {
                    let by_time = 1 + (max_duration.as_secs() - take).div_ceil(MINUTE);
                    (0, by_time.min(enough))
                });
                let found = recovery(settings.clone(), first, take);
                assert_eq!(found, expected, "first at {first}, takes {take}, {settings:?}");
            }
        }
    }
}
