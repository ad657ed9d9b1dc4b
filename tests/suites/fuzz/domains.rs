//! The lookup of rules finds what a walk over all of them finds.

use std::{
    collections::{BTreeMap, HashMap},
    sync::atomic::Ordering,
};

use fusebox_server::{
    catalogue::domains::{Domains, Hit},
    config::envoy::{Amount, EnvoyRatelimit, Node, Path, RateLimit, Rules, Unit, Value},
    limits,
};

use crate::{Random, rounds};

/// Few, so that they meet; and those that a key of a bucket or a path must write otherwise.
const LETTERS: [char; 6] = ['a', 'b', '_', '|', '%', 'é'];

const KEYS: [&str; 4] = ["a", "b", "a_b", "a=b"];

const DOMAIN: &str = "domain";

type Entries = Vec<(String, String)>;

fn each(entries: &Entries) -> impl Iterator<Item = (&str, &str)> + Clone {
    entries.iter().map(|(key, value)| (key.as_str(), value.as_str()))
}

fn nodes(random: &mut Random, depth: usize) -> Vec<Node> {
    let mut nodes = Vec::<Node>::new();
    for index in 0..random.below(8) {
        let key = String::from(*random.pick(&KEYS));
        let value = match random.below(4) {
            0 => Value::Any,
            1 => Value::Exactly(format!("{}a", random.text(&LETTERS[..2], 2))),
            _ => Value::Pattern(pattern(random)),
        };
        // As a file has them: no two of one key and value.
        if nodes.iter().any(|node| node.key == key && node.value == value) {
            continue;
        }
        let amount = Amount::Requests { per_unit: index as u32, unit: Unit::Hour };
        let rate_limit = RateLimit { amount, name: String::new(), replaces: Vec::new() };
        nodes.push(Node {
            key,
            value,
            rate_limit: (!random.one_in(4)).then_some(rate_limit),
            shadow_mode: false,
            quota_mode: false,
            detailed_metric: random.one_in(3),
            value_to_metric: random.one_in(3),
            share_threshold: random.one_in(3),
            metadata: BTreeMap::new(),
            nodes: if depth == 0 { Vec::new() } else { self::nodes(random, depth - 1) },
        });
    }
    nodes
}

fn pattern(random: &mut Random) -> String {
    let (prefix, rest) =
        (random.text(&LETTERS[..3], 2), random.text(&['a', 'b', '*', '*', 'é'], 5));
    format!("{prefix}*{rest}")
}

/// Entries that often are those of some rule.
fn entries(random: &mut Random, nodes: &[Node]) -> Entries {
    let (mut entries, mut below) = (Entries::new(), nodes);
    while !below.is_empty() && !random.one_in(6) {
        let node = random.pick(below);
        let value = match &node.value {
            Value::Exactly(value) => value.clone(),
            Value::Pattern(pattern) => {
                let pieces: Vec<_> = pattern.split('*').map(String::from).collect();
                let with = random.text(&LETTERS[..2], 2);
                pieces.join(&with)
            }
            // Too long for a key now and then, so that it is cut.
            Value::Any if random.one_in(20) => {
                "é".repeat(random.below(4) + limits::KEY_BYTES / 2 - 2) + &random.text(&LETTERS, 3)
            }
            Value::Any => random.text(&LETTERS, 3),
        };
        entries.push((node.key.clone(), value));
        below = &node.nodes;
    }
    if entries.is_empty() || random.one_in(8) {
        entries.push((String::from(*random.pick(&KEYS)), random.text(&LETTERS, 3)));
    }
    entries
}

/// What a reader of the file would say: the path of the rule, and the values that it leaves open.
fn read<'e>(nodes: &[Node], entries: &'e Entries) -> Option<(Path, Vec<&'e str>)> {
    let (mut nodes, mut path, mut open) = (nodes, Path::of_domain(DOMAIN), Vec::new());
    let mut is_limited = false;
    for (key, value) in entries {
        let of_key = || nodes.iter().filter(|node| node.key == *key);
        let exact = |node: &&Node| matches!(&node.value, Value::Exactly(text) if text == value);
        let pattern =
            |node: &&Node| matches!(&node.value, Value::Pattern(text) if matches(text, value));
        let any = |node: &&Node| node.value == Value::Any;
        let node = of_key().find(exact).or_else(|| of_key().find(pattern));
        let node = node.or_else(|| of_key().find(any))?;
        let is_shared = matches!(node.value, Value::Pattern(_)) && node.share_threshold;
        if !(is_shared || matches!(node.value, Value::Exactly(_))) {
            open.push(value.as_str());
        }
        (path, is_limited, nodes) = (path.then(node), node.rate_limit.is_some(), &node.nodes);
    }
    is_limited.then_some((path, open))
}

/// Whether the pattern matches, by looking at every pair of their beginnings.
fn matches(pattern: &str, value: &str) -> bool {
    let value: Vec<char> = value.chars().collect();
    let mut ends = vec![false; value.len() + 1];
    ends[0] = true;
    for letter in pattern.chars() {
        let mut next = vec![false; ends.len()];
        for end in 0..ends.len() {
            next[end] = match letter {
                '*' => ends[end] || (end > 0 && next[end - 1]),
                letter => end > 0 && ends[end - 1] && value[end - 1] == letter,
            };
        }
        ends = next;
    }
    ends[value.len()]
}

/// The key of a bucket, as its doc has it, if it is not too long.
fn key(open: &[&str]) -> String {
    match open {
        [one] => String::from(*one),
        several => {
            let escaped = |value: &&str| value.replace('%', "%25").replace('|', "%7C");
            several.iter().map(escaped).collect::<Vec<_>>().join("|")
        }
    }
}

fn domains(nodes: &[Node], former: &Domains) -> Domains {
    let settings = EnvoyRatelimit {
        config_dir: "rules".into(),
        durability: None,
        shadow_mode: false,
        quota_mode: false,
        merge_domains: false,
        response_headers: None,
        response_dynamic_metadata: false,
        domains: BTreeMap::new(),
    };
    let rules = Rules { domains: [(DOMAIN.to_owned(), nodes.to_vec())].into() };
    Domains::new(&settings, &rules, |_| None, former)
}

#[test]
fn a_descriptor_finds_the_rule_that_a_reader_of_the_file_would() {
    rounds(1_500, |mut random| {
        let nodes = nodes(&mut random, 2);
        let domains = domains(&nodes, &Domains::default());
        let domain = domains.domain(DOMAIN).unwrap();
        let (mut keys, mut opens) = (HashMap::new(), HashMap::new());
        for _ in 0..40 {
            let entries = entries(&mut random, &nodes);
            let found = domain.rule(each(&entries));
            let read = read(&nodes, &entries);
            assert_eq!(
                found.map(|rule| &rule.path),
                read.as_ref().map(|(path, _)| path),
                "{entries:?} in {nodes:#?}"
            );
            let Some((rule, (path, open))) = found.zip(read) else { continue };

            let found = rule.key(each(&entries)).to_string();
            let whole = key(&open);
            if whole.len() <= limits::KEY_BYTES {
                assert_eq!(found, whole, "{entries:?} in {path}");
            }
            assert!(found.len() <= limits::KEY_BYTES, "{found}");
            let open = open.into_iter().map(String::from).collect::<Vec<_>>();
            let bucket = (path.clone(), found);
            let of_bucket = opens.entry(bucket.clone()).or_insert_with(|| open.clone());
            assert_eq!(*of_bucket, open, "two lists of values in {bucket:?}");
            let of_open = keys.entry((path, open)).or_insert_with(|| bucket.clone());
            assert_eq!(*of_open, bucket, "one list of values in two buckets");
        }
    });
}

#[test]
fn every_hit_is_in_one_series_also_over_a_reload() {
    rounds(300, |mut random| {
        let nodes = nodes(&mut random, 2);
        let mut domains = self::domains(&nodes, &Domains::default());
        let mut counted = 0;
        for _ in 0..40 {
            let entries = entries(&mut random, &nodes);
            let domain = domains.domain(DOMAIN).unwrap();
            let hit = Hit { hits: 1 + random.below(3) as u64, limit: 9, ..Hit::default() };
            match domain.rule(each(&entries)) {
                _ if random.one_in(8) => domain.count_request_limit(each(&entries), hit),
                Some(rule) => rule.count(each(&entries), hit),
                None => continue,
            }
            counted += hit.hits;
            if random.one_in(20) {
                domains = self::domains(&nodes, &domains);
            }
        }
        let (mut total, mut keys) = (0, Vec::new());
        domains.visit_hits(|domain, key, hits| {
            assert_eq!(domain, DOMAIN);
            total += hits.total.load(Ordering::Relaxed);
            keys.push(key.to_owned());
        });
        assert_eq!(total, counted, "{keys:?}");
        let count = keys.len();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), count, "a key is told once");
    });
}
