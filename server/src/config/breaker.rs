//! A breaker as operators write it.

use std::time::Duration;

use arrayvec::ArrayVec;
use fusebox_core::circuit::{
    Breaker, HalfOpen, MAX_STEPS, OpenFor, Ramp, Settings, Share, SlowCall, WindowSettings,
};
use serde::{Deserialize, Serialize};

use super::{
    duration,
    hundredths::{Factor, Percent},
};

/// The share of slow calls that opens a circuit, if nobody says.
pub(crate) const DEFAULT_SLOW_RATE: Percent = Percent(5_000);

/// What an operator says of a breaker; what is left out has its default.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct BreakerFields {
    #[serde(with = "duration::optional", skip_serializing_if = "Option::is_none")]
    pub(crate) window: Option<Duration>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) count: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) consecutive_failures: Option<u32>,
    pub(crate) failure_rate: Option<Percent>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) slow_call: Option<SlowCallFields>,
    pub(crate) min_calls: Option<u32>,
    #[serde(with = "duration::optional")]
    pub(crate) open_for: Option<Duration>,
    pub(crate) backoff: BackoffFields,
    pub(crate) half_open: HalfOpenFields,
    pub(crate) ramp: RampFields,
    pub(crate) min_reporters: Option<u32>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SlowCallFields {
    #[serde(with = "duration")]
    pub(crate) over: Duration,
    #[serde(default = "default_slow_rate")]
    pub(crate) rate: Percent,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct BackoffFields {
    pub(crate) factor: Option<Factor>,
    #[serde(with = "duration::optional")]
    pub(crate) max: Option<Duration>,
    pub(crate) jitter: Option<Percent>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct HalfOpenFields {
    pub(crate) probes: Option<u32>,
    pub(crate) max_in_flight: Option<u32>,
    #[serde(with = "duration::optional")]
    pub(crate) probe_timeout: Option<Duration>,
    #[serde(with = "duration::optional")]
    pub(crate) max_duration: Option<Duration>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RampFields {
    /// None at all is no ramp.
    pub(crate) steps: Option<Vec<Percent>>,
    #[serde(with = "duration::optional")]
    pub(crate) each: Option<Duration>,
}

const fn default_slow_rate() -> Percent {
    DEFAULT_SLOW_RATE
}

impl BreakerFields {
    /// The breaker that they say, or why it is none: a message that names the field first.
    pub(crate) fn breaker(self) -> Result<Breaker, String> {
        let default = Settings::default();
        let window = match (self.window, self.count, self.consecutive_failures) {
            (None, None, None) => default.window,
            (Some(time), None, None) => WindowSettings::Time(time),
            (None, Some(count), None) => WindowSettings::Calls(count),
            (None, None, Some(count)) => WindowSettings::Consecutive(count),
            _ => {
                return Err(
                    "`window`, `count`, `consecutive_failures`: a circuit is judged by one of \
                            them; write at most one of the three"
                        .into(),
                );
            }
        };
        let min_reporters = match window {
            WindowSettings::Time(_) => default.min_reporters,
            // Those that need an order of calls have one reporter.
            WindowSettings::Calls(_) | WindowSettings::Consecutive(_) => 1,
        };
        let first = self.open_for.unwrap_or(default.open_for.first);
        let BackoffFields { factor, max, jitter } = self.backoff;
        let HalfOpenFields { probes, max_in_flight, probe_timeout, max_duration } = self.half_open;
        let probes = probes.unwrap_or(default.half_open.probes);
        let probe_timeout = probe_timeout.unwrap_or(default.half_open.probe_timeout);
        let RampFields { steps, each } = self.ramp;
        let steps = steps.map_or(Ok(default.ramp.steps), ramp_of)?;
        let settings = Settings {
            window,
            failure_rate: self.failure_rate.map_or(default.failure_rate, Share::from),
            slow_call: self
                .slow_call
                .map(|slow| SlowCall { over: slow.over, rate: slow.rate.into() }),
            min_calls: self.min_calls.unwrap_or(default.min_calls),
            open_for: OpenFor {
                first,
                factor_hundredths: factor
                    .map_or(default.open_for.factor_hundredths, |factor| factor.0),
                max: max.unwrap_or(default.open_for.max.max(first)),
                jitter: jitter.map_or(default.open_for.jitter, Share::from),
            },
            half_open: HalfOpen {
                probes,
                max_in_flight: max_in_flight.unwrap_or(probes),
                probe_timeout,
                max_duration: max_duration
                    .unwrap_or(default.half_open.max_duration.max(probe_timeout)),
            },
            ramp: Ramp { steps, each: each.unwrap_or(default.ramp.each) },
            min_reporters: self.min_reporters.unwrap_or(min_reporters),
        };
        Breaker::new(settings).map_err(|error| error.to_string())
    }
}

fn ramp_of(steps: Vec<Percent>) -> Result<ArrayVec<Share, MAX_STEPS>, String> {
    if steps.len() > MAX_STEPS {
        return Err(format!("`ramp.steps` are {}; at most {MAX_STEPS} are possible", steps.len()));
    }
    Ok(steps.into_iter().map(Share::from).collect())
}

impl From<&Breaker> for BreakerFields {
    fn from(breaker: &Breaker) -> Self {
        let Settings {
            window,
            failure_rate,
            slow_call,
            min_calls,
            open_for,
            half_open,
            ramp,
            min_reporters,
        } = &**breaker;
        let (window, count, consecutive_failures) = match *window {
            WindowSettings::Time(time) => (Some(time), None, None),
            WindowSettings::Calls(count) => (None, Some(count), None),
            WindowSettings::Consecutive(count) => (None, None, Some(count)),
        };
        let share = |share: Share| Some(Percent::from(share));
        Self {
            window,
            count,
            consecutive_failures,
            failure_rate: share(*failure_rate),
            slow_call: slow_call
                .map(|slow| SlowCallFields { over: slow.over, rate: slow.rate.into() }),
            min_calls: Some(*min_calls),
            open_for: Some(open_for.first),
            backoff: BackoffFields {
                factor: Some(Factor(open_for.factor_hundredths)),
                max: Some(open_for.max),
                jitter: share(open_for.jitter),
            },
            half_open: HalfOpenFields {
                probes: Some(half_open.probes),
                max_in_flight: Some(half_open.max_in_flight),
                probe_timeout: Some(half_open.probe_timeout),
                max_duration: Some(half_open.max_duration),
            },
            ramp: RampFields {
                steps: Some(ramp.steps.iter().map(|&step| step.into()).collect()),
                each: Some(ramp.each),
            },
            min_reporters: Some(*min_reporters),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{BreakerPolicy, Keys, Override, Policy},
        limits,
    };

    fn policy(text: &str) -> BreakerPolicy {
        match text.parse() {
            Ok(Policy::Breaker(policy)) => policy,
            other => panic!("{text}: {other:?}"),
        }
    }

    fn breaker(fields: &str) -> Breaker {
        policy(&format!("{{breaker: {{{fields}}}}}")).breaker
    }

    fn basis_points(share: u16) -> Share {
        Share::new(share).unwrap()
    }

    const ALL: &str = "window: 30s, failure_rate: 12.5%, slow_call: {over: 2s, rate: 80%}, min_calls: 7, \
                       open_for: 2s, backoff: {factor: 1.25, max: 3m, jitter: 0%}, half_open: {probes: 5, \
                       max_in_flight: 2, probe_timeout: 1s, max_duration: 90s}, \
                       ramp: {steps: [1%, 100%], each: 500ms}, min_reporters: 3";

    #[test]
    fn a_breaker_that_says_nothing_has_the_defaults_of_the_core() {
        assert_eq!(breaker(""), Breaker::new(Settings::default()).unwrap());
        let nothing = "backoff: {}, half_open: {}, ramp: {}";
        assert_eq!(breaker(nothing), breaker(""));
        assert_eq!(policy("{breaker: {}}").max_circuits, limits::POLICY_CIRCUITS);
    }

    #[test]
    fn what_a_breaker_says_is_what_it_is() {
        let settings = Settings {
            window: WindowSettings::Time(Duration::from_secs(30)),
            failure_rate: basis_points(1_250),
            slow_call: Some(SlowCall { over: Duration::from_secs(2), rate: basis_points(8_000) }),
            min_calls: 7,
            open_for: OpenFor {
                first: Duration::from_secs(2),
                factor_hundredths: 125,
                max: Duration::from_secs(180),
                jitter: Share::NONE,
            },
            half_open: HalfOpen {
                probes: 5,
                max_in_flight: 2,
                probe_timeout: Duration::from_secs(1),
                max_duration: Duration::from_secs(90),
            },
            ramp: Ramp {
                steps: [basis_points(100), Share::ALL].into_iter().collect(),
                each: Duration::from_millis(500),
            },
            min_reporters: 3,
        };
        assert_eq!(*breaker(ALL), settings);
    }

    #[test]
    fn what_is_left_out_fits_what_is_said() {
        for (window, settings) in [
            ("count: 100", WindowSettings::Calls(100)),
            ("consecutive_failures: 5", WindowSettings::Consecutive(5)),
        ] {
            let breaker = breaker(window);
            assert_eq!((breaker.window, breaker.min_reporters), (settings, 1));
        }
        assert_eq!(breaker("slow_call: {over: 1s}").slow_call.unwrap().rate, basis_points(5_000));
        for (said, max_in_flight) in [("probes: 1", 1), ("probes: 9", 9), ("max_in_flight: 2", 2)] {
            let breaker = breaker(&format!("half_open: {{{said}}}"));
            assert_eq!(breaker.half_open.max_in_flight, max_in_flight, "{said}");
        }
        for (open_for, max) in [("1s", 60), ("60s", 60), ("2m", 120)] {
            let breaker = breaker(&format!("open_for: {open_for}"));
            assert_eq!(breaker.open_for.max, Duration::from_secs(max), "{open_for}");
        }
        for (probe_timeout, max) in [("1s", 60), ("2m", 120)] {
            let breaker = breaker(&format!("half_open: {{probe_timeout: {probe_timeout}}}"));
            assert_eq!(breaker.half_open.max_duration, Duration::from_secs(max), "{probe_timeout}");
        }
        assert!(breaker("ramp: {steps: []}").ramp.steps.is_empty());
        let slower = breaker("ramp: {each: 1s}");
        assert_eq!((slower.ramp.steps.len(), slower.ramp.each), (4, Duration::from_secs(1)));
    }

    #[test]
    fn overrides_of_a_breaker_are_breakers() {
        let policy = policy(
            "{breaker: {}, max_cells: 7, overrides: [{key: vip, breaker: {count: 9}}, \
             {prefix: batch/, breaker: {open_for: 1s}}]}",
        );
        let (vip, batch) = (breaker("count: 9"), breaker("open_for: 1s"));
        let overrides = [
            Override { keys: Keys::Exactly("vip".into()), judge: vip },
            Override { keys: Keys::Prefixed("batch/".into()), judge: batch },
        ];
        assert_eq!(policy.overrides, overrides);
        assert_eq!(policy.max_circuits, 7);
    }

    #[test]
    fn a_breaker_is_printed_as_it_is_read() {
        for text in [
            "{breaker: {}}",
            &format!("{{breaker: {{{ALL}}}, max_cells: 100000}}"),
            "{breaker: {count: 3, ramp: {steps: [], each: 1s}}}",
            "{breaker: {consecutive_failures: 5, backoff: {factor: 10}}}",
            "{breaker: {backoff: {factor: 1.5}}, overrides: [{key: '', breaker: {}}, \
             {prefix: b, breaker: {backoff: {factor: 2.07}}}]}",
        ] {
            let policy: Policy = text.parse().unwrap();
            let printed = policy.to_string();
            assert_eq!(printed.parse(), Ok(policy), "{printed}");
        }
        let printed = Policy::Breaker(policy("{breaker: {backoff: {factor: 1.50}}}")).to_string();
        for (line, there) in [("factor: 1.5\n", true), ("lease_time", false), ("null", false)] {
            assert_eq!(printed.contains(line), there, "{line}: {printed}");
        }
    }

    #[test]
    fn every_factor_is_printed_as_it_is_read() {
        for hundredths in 100..=1_000 {
            let text = format!("{}.{:02}", hundredths / 100, hundredths % 100);
            let breaker = breaker(&format!("backoff: {{factor: {text}}}"));
            assert_eq!(breaker.open_for.factor_hundredths, hundredths);
            let policy = BreakerPolicy { breaker, ..policy("{breaker: {}}") };
            let policy = Policy::Breaker(policy);
            assert_eq!(policy.to_string().parse(), Ok(policy), "{text}");
        }
    }

    #[test]
    fn a_mistake_in_a_breaker_is_told() {
        for (fields, words) in [
            ("window: 99ms", "`breaker`: `window` is 99ms, outside 100ms to 1 hour"),
            ("window: 61m", "`breaker`: `window` is 3660s"),
            ("window: 10", "`10` is not a duration"),
            ("window: 10s, count: 5", "write at most one of the three"),
            ("window: 10s, consecutive_failures: 5", "write at most one of the three"),
            (
                "count: 5, consecutive_failures: 5",
                "`window`, `count`, `consecutive_failures`: a circuit",
            ),
            ("count: 0", "`count` is 0, outside 1 to 1000 calls"),
            ("count: 1001", "`count` is 1001"),
            ("count: -1", "count"),
            ("consecutive_failures: 0", "`consecutive_failures` is 0, outside 1 to 1000"),
            ("count: 5, min_reporters: 2", "`count` needs `min_reporters: 1`"),
            ("consecutive_failures: 5, min_reporters: 2", "`consecutive_failures` needs"),
            ("failure_rate: 0%", "`failure_rate` is 0%"),
            ("failure_rate: 101%", "`101%` is not a share"),
            ("failure_rate: 50", "`50` is not a share of 0% to 100%"),
            ("slow_call: {}", "missing field `over`"),
            ("slow_call: {over: 1s, rate: 0%}", "`slow_call.rate` is 0%"),
            ("slow_call: {over: 0s}", "`slow_call.over` is 0ns, outside 1ms to 24 hours"),
            ("slow_call: {over: 1s, after: 1}", "unknown field `after`"),
            ("consecutive_failures: 5, slow_call: {over: 1s}", "`slow_call` beside"),
            ("min_calls: 0", "`min_calls` is 0, outside 1 to 1000000"),
            ("min_calls: 1000001", "`min_calls` is 1000001"),
            ("open_for: 0s", "`open_for` is 0ns"),
            ("open_for: 25h", "`open_for` is 90000s"),
            ("backoff: {factor: 0.99}", "`backoff.factor` is 0.99, outside 1 to 10"),
            ("backoff: {factor: 10.01}", "`backoff.factor` is 10.01"),
            ("backoff: {factor: 1.505}", "`1.505` is not a factor such as 2, 1.5 or 1.25"),
            ("backoff: {factor: -2}", "`-2` is not a factor"),
            ("backoff: {factor: twice}", "`twice` is not a factor"),
            ("backoff: {max: 4s}", "`backoff.max` is 4s, shorter than `open_for`, 5s"),
            ("backoff: {jitter: 101%}", "`101%` is not a share"),
            ("backoff: {times: 2}", "unknown field `times`"),
            ("half_open: {probes: 0}", "`half_open.probes` is 0, outside 1 to 1000"),
            (
                "half_open: {max_in_flight: 4}",
                "`half_open.max_in_flight` is 4, outside 1 to `probes`, 3",
            ),
            ("half_open: {max_in_flight: 0}", "`half_open.max_in_flight` is 0"),
            ("half_open: {probe_timeout: 0s}", "`half_open.probe_timeout` is 0ns"),
            ("half_open: {max_duration: 9s}", "`half_open.max_duration` is 9s, shorter than"),
            ("half_open: {calls: 3}", "unknown field `calls`"),
            ("ramp: {steps: [50%, 50%]}", "`ramp.steps` must ascend"),
            ("ramp: {steps: [0%, 50%]}", "`ramp.steps` must ascend, above 0%"),
            (
                "ramp: {steps: [1%, 2%, 3%, 4%, 5%, 6%, 7%, 8%, 9%]}",
                "`ramp.steps` are 9; at most 8",
            ),
            ("ramp: {each: 0s}", "`ramp.each` is 0ns"),
            ("min_reporters: 0", "`min_reporters` is 0, outside 1 to 32"),
            ("min_reporters: 33", "`min_reporters` is 33"),
            ("threshold: 50%", "unknown field `threshold`"),
        ] {
            let refused = format!("{{breaker: {{{fields}}}}}").parse::<Policy>().unwrap_err();
            assert!(refused.contains(words), "{fields}: {words}: {refused}");
        }
    }

    #[test]
    fn what_does_not_go_with_a_breaker_is_told_with_the_reason() {
        for (setting, words) in [
            (
                "shadow: true",
                "`shadow` beside a breaker: circuits have CIRCUIT_MODE_METRICS_ONLY for that, set by \
                 SetCircuitMode",
            ),
            (
                "reserves: {critical: 20%}",
                "`reserves` beside a breaker: a circuit has nothing that",
            ),
            ("durability: strict", "`durability` beside a breaker: transitions are always durable"),
            ("max_debt: 0", "`max_debt` beside a breaker: a circuit charges nothing"),
            ("lease_time: 1s", "`lease_time` beside a breaker: a circuit is not leased"),
            ("max_waiting: 0", "`max_waiting` beside a breaker: nobody waits for a circuit"),
            ("max_cells: 0", "`max_cells` is 0, outside 1 to 100000 of a breaker"),
            ("max_cells: 100001", "`max_cells` is 100001"),
            ("concurrency: {limit: 1}", "`breaker` beside a limiter: a policy is one of both"),
            ("limits: [{concurrency: {limit: 1}}]", "`breaker` beside a limiter"),
            (
                "overrides: [{key: vip, concurrency: {limit: 1}}]",
                "`overrides`: key `vip`: a limiter, and the policy is a breaker; both must be the same",
            ),
            ("overrides: [{key: vip}]", "`overrides`: key `vip`: a policy needs its limiter"),
            (
                "overrides: [{key: vip, breaker: {min_calls: 0}}]",
                "`overrides`: key `vip`: `breaker`: `min_calls` is 0",
            ),
            (
                "overrides: [{key: a, breaker: {}}, {key: a, breaker: {}}]",
                "`overrides`: key `a` is there twice",
            ),
        ] {
            let refused = format!("{{breaker: {{}}, {setting}}}").parse::<Policy>().unwrap_err();
            assert!(refused.contains(words), "{setting}: {words}: {refused}");
        }
        let mixed = "{concurrency: {limit: 1}, overrides: [{prefix: b, breaker: {}}]}";
        let refused = mixed.parse::<Policy>().unwrap_err();
        let words = "`overrides`: prefix `b`: a breaker, and the policy is a limiter";
        assert!(refused.contains(words), "{refused}");
        // It says what is so.
        policy("{breaker: {}, shadow: false}");
    }
}
