//! What is different between two policies, in the words of a configuration file.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, SeqAccess, Visitor},
};

use super::Policy;

/// One setting that is different.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The setting, from the top of the policy: `token_bucket.limit`.
    pub field: String,
    /// What one policy says; empty if nothing.
    pub before: String,
    /// What the other says; empty if nothing.
    pub after: String,
}

/// Every setting that is different, in the order of their names; where one policy is not there, all of the
/// other.
pub fn difference(before: Option<&Policy>, after: Option<&Policy>) -> Vec<Difference> {
    let before = before.map(settings).unwrap_or_default();
    let mut after = after.map(settings).unwrap_or_default();
    let mut different = Vec::new();
    for (field, before) in before {
        let after = after.remove(&field);
        if after.as_ref() != Some(&before) {
            let after = after.unwrap_or_default();
            different.push(Difference { field, before, after });
        }
    }
    let added = after.into_iter();
    different.extend(added.map(|(field, after)| Difference {
        field,
        before: String::new(),
        after,
    }));
    different.sort_by(|one, other| one.field.cmp(&other.field));
    different
}

/// Settings by their path.
fn settings(policy: &Policy) -> BTreeMap<String, String> {
    let mut settings = BTreeMap::new();
    // A policy is written as what parses: its tests say so.
    if let Ok(written) = serde_saphyr::from_str::<Written>(&policy.to_string()) {
        written.flatten(String::new(), &mut settings);
    }
    settings
}

/// What YAML can say of a policy.
enum Written {
    Nothing,
    Fields(BTreeMap<String, Written>),
    List(Vec<Written>),
    One(String),
}

impl Written {
    fn flatten(self, path: String, settings: &mut BTreeMap<String, String>) {
        match self {
            Self::Nothing => {}
            Self::One(value) => drop(settings.insert(path, value)),
            Self::List(list) => {
                for (index, one) in list.into_iter().enumerate() {
                    one.flatten(format!("{path}[{index}]"), settings);
                }
            }
            Self::Fields(fields) => {
                for (field, one) in fields {
                    let dot = if path.is_empty() { "" } else { "." };
                    one.flatten(format!("{path}{dot}{field}"), settings);
                }
            }
        }
    }
}

impl<'de> Deserialize<'de> for Written {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader)
    }
}

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Written;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a setting")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Written, E> {
        Ok(Written::One(value.to_string()))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Written, E> {
        Ok(Written::One(value.to_string()))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Written, E> {
        Ok(Written::One(value.to_string()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Written, E> {
        Ok(Written::One(value.to_string()))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Written, E> {
        Ok(Written::One(value.to_owned()))
    }

    fn visit_unit<E: Error>(self) -> Result<Written, E> {
        Ok(Written::Nothing)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Written, A::Error> {
        let mut all = Vec::new();
        while let Some(one) = list.next_element()? {
            all.push(one);
        }
        Ok(Written::List(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Written, A::Error> {
        let mut all = BTreeMap::new();
        while let Some((field, one)) = fields.next_entry()? {
            all.insert(field, one);
        }
        Ok(Written::Fields(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> Policy {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_different_is_told_by_field() {
        let before = policy("{token_bucket: {limit: 5, per: 60s}, shadow: true}");
        let after = policy("{token_bucket: {limit: 7, per: 1m, burst: 5}}");
        let different = difference(Some(&before), Some(&after));
        let different: Vec<_> = different
            .iter()
            .map(|one| (one.field.as_str(), one.before.as_str(), one.after.as_str()))
            .collect();
        assert_eq!(different, [("shadow", "true", ""), ("token_bucket.limit", "5", "7")]);
        assert_eq!(difference(Some(&after), Some(&after)), []);
    }

    #[test]
    fn what_is_different_of_a_breaker_is_told_by_field() {
        let before = policy("{breaker: {backoff: {factor: 1.5}, ramp: {steps: []}}}");
        let after = policy(
            "{breaker: {half_open: {probes: 1}, ramp: {steps: [50%]}}, max_cells: 9,
              overrides: [{key: vip, breaker: {count: 5}}]}",
        );
        let different = difference(Some(&before), Some(&after));
        let of = |field: &str| {
            let found = different.iter().find(|one| one.field == field);
            found.map(|one| (one.before.as_str(), one.after.as_str()))
        };
        assert_eq!(of("breaker.half_open.probes"), Some(("3", "1")));
        assert_eq!(of("breaker.half_open.max_in_flight"), Some(("3", "1")));
        assert_eq!(of("breaker.backoff.factor"), Some(("1.5", "2")));
        assert_eq!(of("breaker.ramp.steps[0]"), Some(("", "50%")));
        assert_eq!(of("max_cells"), Some(("10000", "9")));
        assert_eq!(of("overrides[0].breaker.count"), Some(("", "5")));
        assert_eq!(of("breaker.min_calls"), None);
        let limiter = policy("{token_bucket: {limit: 5, per: 1s}}");
        let different = difference(Some(&limiter), Some(&after));
        assert!(different.iter().any(|one| one.field == "token_bucket.limit"));
        assert!(different.iter().any(|one| one.field == "breaker.window"));
    }

    #[test]
    fn of_a_policy_that_was_not_there_everything_is() {
        let after = policy(
            "{limits: [{token_bucket: {limit: 5, per: 1s}}, {fixed_window: {limit: 9, per: 1h}}],
              overrides: [{key: '1', token_bucket: {limit: 9, per: 1s}}]}",
        );
        let different = difference(None, Some(&after));
        let of = |field: &str| {
            let found = different.iter().find(|one| one.field == field);
            found.map(|one| (one.before.as_str(), one.after.as_str()))
        };
        assert_eq!(of("limits[1].fixed_window.per"), Some(("", "1h")));
        assert_eq!(of("overrides[0].key"), Some(("", "1")));
        assert_eq!(of("lease_time"), Some(("", "1s")));
        assert_eq!(of("max_debt"), None);
        assert_eq!(difference(Some(&after), None).len(), different.len());
    }
}
