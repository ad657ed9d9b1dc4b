use super::*;
use crate::config::envoy::{
    Algorithm, Amount, DomainSettings, Metadata, NativePolicy, Node, RateLimit, Unit, Value,
};

fn settings() -> EnvoyRatelimit {
    serde_saphyr::from_str("config_dir: ./config").unwrap()
}

fn named(files: &[(&str, &str)]) -> Vec<(String, String)> {
    files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
}

fn loaded(text: &str) -> Loaded {
    parse(&named(&[("a.yaml", text)]), &settings()).unwrap_or_else(|error| panic!("{error}"))
}

/// The nodes of domain `d` with these descriptors.
fn nodes(descriptors: &str) -> Vec<Node> {
    let text = format!("domain: d\ndescriptors:\n{descriptors}");
    loaded(&text).rules.domains.remove("d").unwrap()
}

fn mistakes(text: &str) -> Vec<String> {
    parse(&named(&[("a.yaml", text)]), &settings()).unwrap_err().mistakes
}

fn requests(per_unit: u32, unit: Unit) -> RateLimit {
    let amount = Amount::Requests { per_unit, unit };
    RateLimit { amount, name: String::new(), replaces: Vec::new() }
}

/// A node of this key and value that says nothing else.
fn node(key: &str, value: Value, rate_limit: Option<RateLimit>) -> Node {
    Node {
        key: key.to_owned(),
        value,
        rate_limit,
        shadow_mode: false,
        quota_mode: false,
        detailed_metric: false,
        value_to_metric: false,
        share_threshold: false,
        metadata: std::collections::BTreeMap::new(),
        nodes: Vec::new(),
    }
}

fn exactly(value: &str) -> Value {
    Value::Exactly(value.to_owned())
}

#[test]
fn a_file_is_the_tree_that_it_shows() {
    let mut rules = loaded(include_str!("testdata/basic.yaml")).rules;
    assert_eq!(rules.count(), 11);
    let found = rules.domains.remove("test-domain").unwrap();
    assert!(rules.domains.is_empty());
    let expected = [
        Node {
            nodes: vec![
                node("subkey1", Value::Any, Some(requests(5, Unit::Second))),
                Node {
                    shadow_mode: true,
                    ..node("subkey1", exactly("subvalue1"), Some(requests(10, Unit::Second)))
                },
            ],
            ..node("key1", exactly("value1"), None)
        },
        node("key2", Value::Any, Some(requests(20, Unit::Minute))),
        node("key2", exactly("value2"), Some(requests(30, Unit::Minute))),
        node("key2", exactly("value3"), None),
        node("key3", Value::Any, Some(requests(1, Unit::Hour))),
        node(
            "key4",
            Value::Any,
            Some(RateLimit { name: "key4_rate_limit".into(), ..requests(1, Unit::Day) }),
        ),
        Node {
            nodes: vec![node("subkey5", exactly("subvalue5"), Some(requests(25, Unit::Day)))],
            ..node("key5", exactly("value5"), Some(requests(15, Unit::Day)))
        },
        node(
            "key6",
            Value::Any,
            Some(RateLimit { amount: Amount::Unlimited, ..requests(0, Unit::Day) }),
        ),
        Node {
            detailed_metric: true,
            ..node("key7", Value::Any, Some(requests(70, Unit::Minute)))
        },
        Node {
            share_threshold: true,
            value_to_metric: true,
            quota_mode: true,
            ..node("files", Value::Pattern("files/*".into()), Some(requests(7, Unit::Week)))
        },
    ];
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found, expected);
    }
    assert_eq!(found.len(), expected.len());
}

#[test]
fn a_scalar_is_text_where_text_is_wanted() {
    for (written, value) in [
        ("1", exactly("1")),
        ("007", exactly("007")),
        ("1.50", exactly("1.50")),
        ("true", exactly("true")),
        ("yes", exactly("yes")),
        ("2020-01-01", exactly("2020-01-01")),
        ("'quoted # text'", exactly("quoted # text")),
        ("''", Value::Any),
        ("", Value::Any),
        ("null", Value::Any),
        ("'null'", exactly("null")),
        ("foo*", Value::Pattern("foo*".into())),
        ("bar*b", Value::Pattern("bar*b".into())),
        ("foo*bar*baz", Value::Pattern("foo*bar*baz".into())),
        ("'*'", Value::Pattern("*".into())),
    ] {
        assert_eq!(nodes(&format!("- {{key: 5, value: {written} }}")), [node("5", value, None)]);
    }
    let numbers = loaded("domain: 12\ndescriptors: [{key: a}]").rules;
    assert_eq!(numbers.domains.keys().collect::<Vec<_>>(), ["12"]);
}

#[test]
fn a_limit_is_what_it_says() {
    for (limit, amount, count) in [
        ("{unit: second, requests_per_unit: 3}", Some((3, Unit::Second)), 1),
        ("{unit: SECOND, requests_per_unit: 0}", Some((0, Unit::Second)), 1),
        ("{unit: day, requests_per_unit: 1_000}", Some((1_000, Unit::Day)), 1),
        ("{unit: Minute}", Some((0, Unit::Minute)), 1),
        ("{unit: hour, requests_per_unit: null}", Some((0, Unit::Hour)), 1),
        ("{unit: week, requests_per_unit: 4294967295}", Some((u32::MAX, Unit::Week)), 1),
        ("{unit: month, requests_per_unit: 0x10}", Some((16, Unit::Month)), 1),
        ("{unit: yEaR, requests_per_unit: 1, unlimited: false}", Some((1, Unit::Year)), 1),
        ("{unlimited: true}", None, 1),
        ("{unlimited: yes, requests_per_unit: 5}", None, 1),
        ("{unlimited: true, unit: ''}", None, 1),
        ("null", None, 0),
    ] {
        let found = nodes(&format!("- {{key: a, rate_limit: {limit}}}"));
        let amount = amount
            .map_or(Amount::Unlimited, |(per_unit, unit)| Amount::Requests { per_unit, unit });
        let expected = (count == 1).then(|| RateLimit { amount, ..requests(0, Unit::Day) });
        assert_eq!(found[0].rate_limit, expected, "{limit}");
    }
    let found =
        nodes("- {key: a, rate_limit: {unit: day, name: one, replaces: [{name: two}, {name: 3}]}}");
    let limit = found[0].rate_limit.as_ref().unwrap();
    assert_eq!(
        (limit.name.as_str(), &limit.replaces[..]),
        ("one", &["two".into(), "3".into()][..])
    );
}

#[test]
fn metadata_is_free() {
    let found = nodes(
        "- key: a\n  metadata: {unknown: x, 5: [1, -2.5, true, null, {a*: '1'}], '': {}, domain: 1}\n\
         - {key: b, metadata: null}\n",
    );
    let text = |text: &str| Metadata::Text(text.into());
    let list = vec![
        Metadata::Number(1.0),
        Metadata::Number(-2.5),
        Metadata::Bool(true),
        Metadata::Null,
        Metadata::Map([("a*".to_owned(), text("1"))].into()),
    ];
    let expected = [
        ("unknown".to_owned(), text("x")),
        ("5".to_owned(), Metadata::List(list)),
        (String::new(), Metadata::Map([].into())),
        ("domain".to_owned(), Metadata::Number(1.0)),
    ];
    assert_eq!(found[0].metadata, expected.into());
    assert!(found[1].metadata.is_empty());
}

#[test]
fn anchors_and_merges_are_what_they_stand_for() {
    let found = nodes(
        "- {key: a, rate_limit: &limit {unit: day, requests_per_unit: 1}}\n\
         - {key: b, rate_limit: *limit}\n\
         - {key: c, rate_limit: {<<: *limit, requests_per_unit: 2}}\n",
    );
    let limits: Vec<_> = found.into_iter().map(|node| node.rate_limit.unwrap()).collect();
    assert_eq!(limits, [1, 1, 2].map(|per_unit| requests(per_unit, Unit::Day)));
}

/// Each text has this mistake at this line and column, and no other.
fn assert_wrong(mistaken: &[(&str, &str, &str)]) {
    for (text, place, words) in mistaken {
        let mistakes = mistakes(text);
        assert_eq!(mistakes.len(), 1, "{text}: {mistakes:#?}");
        let (first, shown) = mistakes[0].split_once('\n').unwrap_or((&mistakes[0], ""));
        assert!(first.starts_with(&format!("a.yaml:{place}: ")), "{text}: {first}");
        assert!(first.contains(words), "{text}, {words}: {first}");
        let line = place.split(':').next().unwrap();
        assert!(text.is_empty() || shown.starts_with(&format!("{line} | ")), "{text}: {shown}");
    }
}

#[test]
fn what_envoyproxy_refuses_is_refused_in_its_words() {
    assert_wrong(&[
        ("", "1:1", "config file cannot have empty domain"),
        ("# nothing\n", "1:1", "config file cannot have empty domain"),
        ("descriptors: []\n", "1:1", "config file cannot have empty domain"),
        ("domain: ''\n", "1:9", "config file cannot have empty domain"),
        ("domain: d\ndescriptors: [{value: a}]", "2:15", "descriptor has empty key"),
        ("domain: d\ndescriptors: [{key: '', value: a}]", "2:21", "descriptor has empty key"),
        (
            "domain: d\ndescriptors:\n- {key: a, value: b}\n- {key: a, value: b}\n",
            "4:9",
            "duplicate descriptor composite key 'd.a_b'; the first is at a.yaml:3:9",
        ),
        (
            "domain: d\ndescriptors: [{key: a, value: b, descriptors: [{key: c}, {key: c}]}]",
            "2:64",
            "duplicate descriptor composite key 'd.a_b.c'",
        ),
        (
            "domain: d\ndescriptors:\n- key: a\n  rate_limit:\n    unit: foo\n",
            "5:11",
            "invalid rate limit unit 'foo'",
        ),
        (
            "domain: d\ndescriptors:\n- key: a\n  rate_limit:\n    requests_per_unit: 2\n",
            "5:5",
            "invalid rate limit unit ''",
        ),
        (
            "domain: d\ndescriptors: [{key: a, rate_limit: {unit: unknown}}]",
            "2:43",
            "invalid rate limit unit 'unknown'",
        ),
        (
            "domain: d\ndescriptors: [{key: a, rate_limit: {unlimited: true, unit: day}}]",
            "2:60",
            "should not specify rate limit unit when unlimited",
        ),
        (
            "domain: d\ndescriptors: [{key: a, rate_limit: {unit: day, name: n, replaces: [{name: n}]}}]",
            "2:68",
            "replaces should not contain name of same descriptor",
        ),
        (
            "domain: d\ndescriptors: [{key: a, rate_limit: {unit: day, replaces: [{name: ''}]}}]",
            "2:59",
            "should not have an empty replaces entry",
        ),
        (
            "domain: d\ndescriptors:\n- key: a\n  rate_limit:\n    unit: day\n    replaces:\n    - name:\n",
            "7:7",
            "should not have an empty replaces entry",
        ),
        (
            "domain: d\ndescriptors: [{key: a, value: b, share_threshold: true}]",
            "2:51",
            "share_threshold can only be used with wildcard values (containing '*'), but found key 'a_b'",
        ),
        (
            "domain: d\ndescriptors:\n- key: a\n  ratelimit:\n    unit: day\n",
            "4:3",
            "config error, unknown key 'ratelimit'",
        ),
        (
            "domain: d\ndescriptors:\n- key: a\n  rate_limit:\n    requestsperunit: 1\n",
            "5:5",
            "config error, unknown key 'requestsperunit'",
        ),
        ("0.25: d\ndomain: d\n", "1:1", "config error, key is not of type string: 0.25"),
        ("domain: d\n0: a\n", "2:1", "config error, key is not of type string: 0"),
        ("domain: d\non: a\n", "2:1", "config error, key is not of type string: on"),
        ("domain: d\n? [a]\n: b\n", "2:3", "config error, key is not of type string: a list"),
        (
            "domain: d\ndescriptors:\n- a\n",
            "3:3",
            "config error, yaml file contains list of type other than map: a",
        ),
        (
            "domain: d\ndescriptors:\n- [a]\n",
            "3:3",
            "config error, yaml file contains list of type other than map: a list",
        ),
    ]);
}

#[test]
fn what_has_the_wrong_form_is_refused() {
    let long =
        |key: &str, length| format!("domain: d\ndescriptors: [{{{key}: {}}}]", "x".repeat(length));
    assert_wrong(&[
        ("- domain: d\n", "1:1", "a map is wanted, not a list"),
        ("domain\n", "1:1", "a map is wanted, not a text"),
        ("domain: {key: a}\n", "1:9", "`domain` is a text, not a map"),
        ("domain: d\ndescriptors: {key: a}\n", "2:14", "`descriptors` is a list, not a map"),
        ("domain: d\ndescriptors: a\n", "2:14", "`descriptors` is a list, not a text"),
        ("domain: d\ndescriptors: [{key: a, rate_limit: 5}]", "2:36", "a map, not a number"),
        ("domain: d\ndescriptors: [{key: a, shadow_mode: 'true'}]", "2:37", "true or false, not a"),
        ("domain: d\ndescriptors: [{key: a, metadata: [b]}]", "2:34", "`metadata` is a map"),
        ("domain: d\ndescriptors: [{key: a, metadata: {b: .nan}}]", "2:38", "neither infinite nor"),
        ("domain: d\ndescriptors: [{key: 'a*'}]", "2:21", "a `*` is for the value"),
        (&long("key", 257), "2:21", "`key` is longer than 256 bytes"),
        (&long("key: a, value", 4_097), "2:31", "`value` is longer than 4096 bytes"),
        (&format!("domain: {}", "d".repeat(257)), "1:9", "`domain` is longer than 256 bytes"),
        (
            &long("rate_limit: {unit: day}, key: a, value", 1_021),
            "2:46",
            "the rule's path is 1025 bytes long, above 1024",
        ),
    ]);
    for number in ["-1", "1.5", "4294967296", "'50'", "0100", "many", "[]", "1e3"] {
        let limit = format!("{{unit: day, requests_per_unit: {number}}}");
        let text = format!("domain: d\ndescriptors: [{{key: a, rate_limit: {limit}}}]");
        assert_wrong(&[(
            &text,
            "2:67",
            "`requests_per_unit` is a whole number of 0 to 4294967295",
        )]);
    }
    // Where nothing is limited nothing is named by its path.
    loaded(&long("key: a, value", 4_096));
    loaded(&long("rate_limit: {unit: day}, key: a, value", 1_020));
}

#[test]
fn levels_end_with_the_entries_that_a_descriptor_may_have() {
    let nested = |levels: usize| {
        let descriptors = "descriptors: [{key: a, ".repeat(levels);
        let limit = "rate_limit: {unit: day, replaces: [{name: a}]}, metadata: {a: {b: [1]}}";
        format!("domain: d\n{descriptors}{limit}{}", "}]".repeat(levels))
    };
    assert_eq!(loaded(&nested(limits::DESCRIPTOR_ENTRIES)).rules.count(), 1);
    let mistakes = mistakes(&nested(limits::DESCRIPTOR_ENTRIES + 1));
    assert!(mistakes[0].contains("more than 32 levels of descriptors"), "{mistakes:?}");
    assert!(mistakes[0].lines().all(|line| line.len() < 200), "{}", mistakes[0]);
}

#[test]
fn keys_and_values_are_compared_and_not_their_joined_text() {
    let found = nodes("- {key: a_b, value: c}\n- {key: a, value: b_c}\n- {key: a_b_c}\n");
    assert_eq!(found.len(), 3);
}

#[test]
fn a_key_that_means_nothing_where_it_is_is_left_out_and_noted() {
    let found = loaded(
        "domain: d\nname: n\ndescriptors:\n- key: a\n  unit: day\n  rate_limit: {unit: day, shadow_mode: true}\n",
    );
    let expected = node("a", Value::Any, Some(requests(0, Unit::Day)));
    assert_eq!(found.rules.domains["d"], [expected]);
    let notes: Vec<_> = found.notes.iter().map(|note| note.lines().next().unwrap()).collect();
    assert_eq!(
        notes,
        [
            "a.yaml:2:1: `name` means nothing in a file, and is left out",
            "a.yaml:5:3: `unit` means nothing in a descriptor, and is left out",
            "a.yaml:6:27: `shadow_mode` means nothing in a rate limit, and is left out",
        ]
    );
}

#[test]
fn files_of_one_domain_add_up_only_where_it_is_allowed() {
    let one = "domain: d\ndescriptors: [{key: a, value: 1}, {key: b}]";
    let two = "domain: d\ndescriptors: [{key: a}]";
    let again = "domain: d\ndescriptors: [{key: c}, {key: b, descriptors: [{key: c}]}]";
    let merging = EnvoyRatelimit { merge_domains: true, ..settings() };

    let files = named(&[("1.yaml", one), ("2.yaml", two)]);
    let error = parse(&files, &settings()).unwrap_err();
    assert_eq!(error.mistakes.len(), 1, "{error}");
    assert!(error.mistakes[0].starts_with("2.yaml:1:9: duplicate domain 'd' in config file"));
    let rules = parse(&files, &merging).unwrap().rules;
    let expected = [("a", exactly("1")), ("b", Value::Any), ("a", Value::Any)];
    assert_eq!(rules.domains["d"], expected.map(|(key, value)| node(key, value, None)));

    let files = named(&[("1.yaml", one), ("3.yaml", again)]);
    let error = parse(&files, &merging).unwrap_err();
    assert_eq!(error.mistakes.len(), 1, "{error}");
    let words =
        "3.yaml:2:31: duplicate descriptor composite key 'd.b'; the first is at 1.yaml:2:41";
    assert!(error.mistakes[0].starts_with(words), "{error}");
    let error = parse(&files, &settings()).unwrap_err();
    assert_eq!(error.mistakes.len(), 1, "its keys are no mistake of their own: {error}");
}

#[test]
fn all_wrong_files_are_told_at_once() {
    let files = named(&[
        ("1.yaml", "domain: d\ndescriptors: [{key: a, rate_limit: {unit: eon}}, {value: b}]"),
        ("2.yaml", "domain: e\n"),
        ("3.yaml", "domain: [\n"),
        ("4.yaml", "limits: 3\nlimit: 4\n"),
    ]);
    let error = parse(&files, &settings()).unwrap_err();
    let places: Vec<_> =
        error.mistakes.iter().map(|mistake| mistake.split(": ").next().unwrap()).collect();
    assert_eq!(places[..2], ["1.yaml:2:43", "1.yaml:2:50"]);
    assert!(places[2].starts_with("3.yaml:"), "{error}");
    assert_eq!(places[3..], ["4.yaml:1:1", "4.yaml:2:1"]);
}

#[test]
fn what_is_told_ends_somewhere() {
    let descriptors = "- {value: a}\n".repeat(limits::RULE_MISTAKES + 5);
    let mistakes = mistakes(&format!("domain: d\ndescriptors:\n{descriptors}"));
    assert_eq!(mistakes.len(), limits::RULE_MISTAKES + 1);
    assert!(
        mistakes[limits::RULE_MISTAKES].starts_with("and "),
        "{}",
        mistakes[limits::RULE_MISTAKES]
    );
    let long = format!("domain: d\n{}: 1", "x".repeat(100_000));
    assert!(self::mistakes(&long)[0].len() < 1_000);
}

#[test]
fn more_rules_than_a_server_holds_are_refused() {
    // One limit, of all of them: what is repeated by its anchor counts, not how often.
    let rule = |index| format!("- {{key: a, value: {index}, rate_limit: *day}}\n");
    let rules: String = (1..limits::RULES).map(rule).collect();
    let first = "- {key: a, rate_limit: &day {unit: day}}\n";
    let many = format!("domain: d\ndescriptors:\n{first}{rules}");
    let mut domains = Domains::new(false, Messages::default());
    domains.add(File { name: "a.yaml", source: &many });
    let (rules, mistakes, _) = domains.clone().end();
    assert_eq!((rules.count(), mistakes.into_vec()), (limits::RULES, Vec::new()));
    let one = "domain: e\ndescriptors: [{key: a, rate_limit: {unlimited: true}}]";
    domains.add(File { name: "b.yaml", source: one });
    let (_, mistakes, _) = domains.end();
    let expected = ["20001 rules in all files, and at most 20000 are held"];
    assert_eq!(mistakes.into_vec(), expected);
}

#[test]
fn our_own_settings_are_about_rules_that_there_are() {
    let text = "domain: d\ndescriptors:\n- key: a\n  value: /x|y\n  rate_limit: {unit: day}\n- key: b\n  \
                descriptors: [{key: c, rate_limit: {unlimited: true}}]\n";
    let with = |domain: &str, path: &str| {
        let native = NativePolicy::try_from("demo/api".to_owned()).unwrap();
        let policies = [(path.to_owned(), native)].into_iter().filter(|(path, _)| !path.is_empty());
        let different = DomainSettings {
            policies: policies.collect(),
            algorithm: Algorithm::TokenBucket,
            ..DomainSettings::default()
        };
        let domains = [(domain.to_owned(), different)].into();
        parse(&named(&[("a.yaml", text)]), &EnvoyRatelimit { domains, ..settings() })
    };
    for path in ["", "a=/x%7Cy", "b|c"] {
        with("d", path).unwrap();
    }
    for (domain, path, mistake) in [
        ("e", "", "`envoy_ratelimit.domains.e`: no file has this domain; there are `d`"),
        (
            "d",
            "b",
            "`envoy_ratelimit.domains.d.policies`: no rule is at `b`; there are `a=/x%7Cy`, `b|c`",
        ),
        (
            "d",
            "d|b|c",
            "`envoy_ratelimit.domains.d.policies`: no rule is at `d|b|c`; there are `a=/x%7Cy`, `b|c`",
        ),
    ] {
        assert_eq!(with(domain, path).unwrap_err().mistakes, [mistake]);
    }
}

/// A folder with these files, by their paths.
fn folder(files: &[(&str, &str)]) -> (tempfile::TempDir, EnvoyRatelimit) {
    let folder = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let settings = EnvoyRatelimit { config_dir: folder.path().to_owned(), ..settings() };
    (folder, settings)
}

#[test]
fn all_files_are_read_in_the_order_of_their_paths() {
    let domain = |key: &str| format!("domain: d\ndescriptors: [{{key: {key}}}]");
    let (_folder, settings) = folder(&[
        ("b.yaml", &domain("b")),
        ("a/z.yml", &domain("z")),
        ("a/deeper/c", &domain("c")),
        ("A.txt", &domain("A")),
        (".hidden.yaml", "not: [rules"),
        (".git/config", "[core]"),
    ]);
    let settings = EnvoyRatelimit { merge_domains: true, ..settings };
    let rules = read(&settings).unwrap().rules;
    let keys: Vec<_> = rules.domains["d"].iter().map(|node| node.key.as_str()).collect();
    assert_eq!(keys, ["A", "c", "z", "b"]);
    assert_eq!(read(&settings).unwrap().rules, rules, "nothing has changed");
    let (_folder, empty) = folder(&[]);
    assert_eq!(read(&empty).unwrap().rules, Rules::default());
}

#[test]
fn links_are_followed_and_those_that_go_round_are_told() {
    use std::os::unix::fs::symlink;
    let (folder, settings) = folder(&[
        ("..2026_01_01/rules.yaml", "domain: d\n"),
        ("..2026_01_01/more/rules.yaml", "domain: e\n"),
    ]);
    let at = |path: &str| folder.path().join(path);
    symlink("..2026_01_01", at("..data")).unwrap();
    symlink("..data/rules.yaml", at("rules.yaml")).unwrap();
    symlink("..data/more", at("more")).unwrap();
    let names = |settings: &EnvoyRatelimit| {
        read(settings).unwrap().rules.domains.into_keys().collect::<Vec<_>>()
    };
    assert_eq!(names(&settings), ["d", "e"]);

    let elsewhere = tempfile::tempdir().unwrap();
    let link = elsewhere.path().join("link");
    symlink(folder.path(), &link).unwrap();
    assert_eq!(names(&EnvoyRatelimit { config_dir: link, ..settings.clone() }), ["d", "e"]);

    symlink("nowhere", at("lost.yaml")).unwrap();
    symlink(".", at("round")).unwrap();
    let error = read(&settings).unwrap_err();
    assert_eq!(error.mistakes.len(), 2, "{error}");
    assert!(error.mistakes[0].starts_with(&format!("cannot read {}", at("lost.yaml").display())));
    assert!(error.mistakes[1].contains("a link to a folder around it"), "{error}");
}

#[test]
fn what_cannot_be_read_is_told_beside_what_is_wrong() {
    let (folder, settings) = folder(&[("a.yaml", "domain: d\n"), ("c.yaml", "domain: ''\n")]);
    let at = |path: &str| folder.path().join(path).display().to_string();
    fs::write(at("b.yaml"), b"domain: \xff\n").unwrap();
    let _pipe = std::os::unix::net::UnixListener::bind(at("d")).unwrap();
    let error = read(&settings).unwrap_err();
    let expected = [
        format!("cannot read {}: it is not text in UTF-8", at("b.yaml")),
        format!("{}: neither a file nor a folder", at("d")),
        format!(
            "{}:1:9: config file cannot have empty domain\n1 | domain: ''\n  |         ^",
            at("c.yaml")
        ),
    ];
    assert_eq!(error.mistakes, expected);

    let missing = EnvoyRatelimit { config_dir: at("none").into(), ..settings };
    let error = read(&missing).unwrap_err().to_string();
    assert!(error.starts_with(&format!("cannot read the folder {}", at("none"))), "{error}");
    assert!(error.contains("`envoy_ratelimit.config_dir`"), "{error}");
}

#[test]
fn a_folder_that_is_too_large_is_refused() {
    let (large, settings) = folder(&[]);
    let file = fs::File::create(large.path().join("a.yaml")).unwrap();
    file.set_len(limits::RULE_FILES_BYTES + 1).unwrap();
    let error = read(&settings).unwrap_err();
    assert!(error.mistakes[0].contains("more than 16777216 bytes in all files"), "{error}");

    let (many, settings) = folder(&[]);
    let add = |count: usize, prefix: &str| {
        for index in 0..count {
            let text = format!("domain: d{prefix}{index}\n");
            fs::write(many.path().join(format!("{prefix}{index}.yaml")), text).unwrap();
        }
    };
    add(limits::RULE_FILES + 5, ".");
    add(limits::RULE_FILES, "");
    assert_eq!(read(&settings).unwrap().rules.domains.len(), limits::RULE_FILES);
    add(5, "z");
    let error = read(&settings).unwrap_err();
    assert_eq!(error.mistakes.len(), 1, "{error}");
    assert!(error.mistakes[0].contains("more than 1000 files and folders"), "{error}");
}
