//! What metrics tell of requests, and that callers cannot make them many.

use fusebox_server::limits;
use fusebox_tests::{Server, eventually};

use super::{Files, Proxy, descriptor, flagged, hits, metric, request, rl, rule};

/// Every line of `/metrics`, which must all be what Prometheus reads.
async fn scraped(server: &Server) -> Vec<String> {
    let (status, text) = server.http("/metrics").await;
    assert_eq!(status, 200);
    assert!(text.ends_with('\n'));
    let lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines.iter().filter(|line| !line.starts_with('#')).for_each(|line| check(line));
    lines
}

/// A series is a name, labels in quotes with what is odd in them escaped, and a number.
fn check(line: &str) {
    let name = line.find(['{', ' ']).unwrap_or_else(|| panic!("{line}"));
    assert!(
        line[..name].bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'),
        "{line}"
    );
    let mut rest = &line[name..];
    if let Some(labels) = rest.strip_prefix('{') {
        let (mut quoted, mut escaped, mut end) = (false, false, None);
        for (at, letter) in labels.char_indices() {
            match letter {
                _ if escaped => {
                    assert!(matches!(letter, 'n' | '"' | '\\'), "{line}");
                    escaped = false;
                }
                '\\' if quoted => escaped = true,
                '"' => quoted = !quoted,
                '}' if !quoted => {
                    end = Some(at);
                    break;
                }
                _ => {}
            }
        }
        rest = &labels[end.unwrap_or_else(|| panic!("{line}")) + 1..];
    }
    assert!(rest.trim_start().parse::<f64>().is_ok(), "{line}");
}

fn count(lines: &[String], name: &str) -> usize {
    let name = format!("{name}{{");
    lines.iter().filter(|line| line.starts_with(&name)).count()
}

#[tokio::test]
async fn metrics_stay_text_that_prometheus_reads_whatever_is_in_names_and_values() {
    let odd = "a\"b\\c\\nd{e}=,#\u{1F980} \u{e9}";
    let escaped = odd.replace('\\', "\\\\").replace('"', "\\\"");
    let text = format!(
        "domain: \"{escaped}\"\ndescriptors: [{{key: \"{escaped}\", value_to_metric: true, \
         rate_limit: {{unit: hour, requests_per_unit: 9}}}}]"
    );
    let server = Files::of(&[("odd.yaml", &text)]).serve().await;
    let mut proxy = Proxy::of(&server).await;
    let value = "new\nline \" \\ \u{0} \u{7f}";
    let mut request = request([descriptor([(odd, value)])]);
    request.domain = odd.into();
    let answer = proxy.send(request).await;
    assert_eq!(super::told(&answer.statuses[0]), super::Told::Ok(8));
    let lines = scraped(&server).await;
    let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let series =
        format!(r#"fusebox_ratelimit_hits_total{{domain="{escaped}",key="{escaped}_{value}"}} 1"#);
    assert!(lines.contains(&series), "{series} is not in {lines:#?}");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn callers_cannot_make_more_series_than_there_may_be() {
    let rules = [flagged("user", 9, "hour", "detailed_metric: true"), rule("plain", 9, "hour")];
    let server = Files::of(&[("rl.yaml", &rl(&rules))]).serve().await;
    let mut proxy = Proxy::of(&server).await;
    for from in (0..20_000).step_by(64) {
        let values: Vec<_> = (from..from + 64).map(|value| value.to_string()).collect();
        proxy.ask(values.iter().map(|value| hits("user", value, 1))).await;
        if from == 0 {
            proxy.ask(values.iter().map(|value| hits("plain", value, 1))).await;
            // Nothing of what no rule knows, nor of domains that no file has.
            proxy.ask(values.iter().map(|value| hits(value, value, 1))).await;
            let mut unknown = request([hits("user", "a", 1)]);
            unknown.domain = "made up".into();
            proxy.send(unknown).await;
        }
    }
    let lines = scraped(&server).await;
    assert_eq!(count(&lines, "fusebox_ratelimit_hits_total"), limits::DETAILED_METRICS + 2);
    assert!(!lines.iter().any(|line| line.contains("made up") || line.contains("overflow=")));
    let of = |key: &str| format!(r#"fusebox_ratelimit_hits_total{{domain="rl",key="{key}"}}"#);
    let others = 313 * 64 - limits::DETAILED_METRICS as u64;
    assert_eq!(metric(&server, &of("user")).await, Some(others), "by their rule");
    assert_eq!(metric(&server, &of("user_7")).await, Some(1));
    assert_eq!(metric(&server, &of("plain")).await, Some(64));
    assert_eq!(metric(&server, "fusebox_ratelimit_unknown_domain_total").await, Some(1));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn limits_that_requests_carry_make_no_more_series_either() {
    let server = Files::of(&[("rl.yaml", &rl(&[rule("plain", 9, "hour")]))]).serve().await;
    let mut proxy = Proxy::of(&server).await;
    for from in (0..12_000).step_by(64) {
        let values: Vec<_> = (from..from + 64).map(|value| value.to_string()).collect();
        let carried = |value| super::limited(hits("user", value, 1), 9, super::RateLimitUnit::Hour);
        proxy.ask(values.iter().map(|value| carried(value))).await;
    }
    let lines = scraped(&server).await;
    assert_eq!(count(&lines, "fusebox_ratelimit_hits_total"), limits::DETAILED_METRICS + 1);
    let others = r#"fusebox_ratelimit_hits_total{domain="rl",key=""}"#;
    let expected = 188 * 64 - limits::DETAILED_METRICS as u64;
    assert_eq!(metric(&server, others).await, Some(expected));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn calls_are_timed_by_method_and_status_and_hits_by_what_became_of_them() {
    let server = Files::of(&[("rl.yaml", &rl(&[rule("user", 10, "hour")]))]).serve().await;
    let mut proxy = Proxy::of(&server).await;
    proxy.one(hits("user", "a", 7)).await;
    proxy.one(hits("user", "a", 5)).await;
    proxy.one(hits("user", "a", 0)).await;
    proxy.try_send(request([])).await.unwrap_err();
    let of = |what: &str| format!(r#"fusebox_ratelimit_{what}_total{{domain="rl",key="user"}}"#);
    for (what, count) in [
        ("hits", 12),
        ("over_limit_hits", 2),
        ("near_limit_hits", 2),
        ("within_limit_hits", 7),
        ("shadow_mode_hits", 0),
    ] {
        assert_eq!(metric(&server, &of(what)).await, Some(count), "{what}");
    }
    for (status, count) in [("OK", 3), ("INVALID_ARGUMENT", 1)] {
        let method = "envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit";
        let series = format!(
            r#"rpc_server_call_duration_seconds_count{{rpc_method="{method}",rpc_response_status_code="{status}",rpc_system_name="grpc"}}"#
        );
        // The client has its answer a moment before the server has counted it.
        eventually("it is counted", async || metric(&server, &series).await == Some(count)).await;
    }
    server.stop().await.unwrap();
}
