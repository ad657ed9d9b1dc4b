//! Keys of buckets, made of the values that a rule leaves open.

use std::{fmt, ops::Deref};

use arrayvec::ArrayString;

use crate::{
    catalogue::{CellHasher, Policy},
    digest::{Content, Digest},
    limits,
};

/// Names the bucket of a rule, or of the policy that judges instead of it.
///
/// It is empty where the rule leaves nothing open, and the value itself where it leaves one. Several are joined
/// by `|`; in them a `%` or a `|` is `%25` or `%7C`, so no two lists of values make one key. What is too long is
/// cut, and ends with a `#` and a keyed hash of all of it.
pub struct Key<'e>(Text<'e>);

#[allow(clippy::large_enum_variant)] // a box would be an allocation
enum Text<'e> {
    Sent(&'e str),
    Made(ArrayString<{ limits::KEY_BYTES }>),
}

/// Bytes of a `#` and a hash.
const HASH_BYTES: usize = 33;

impl<'e> Key<'e> {
    /// The key of the bucket in which `policy` counts all that a descriptor says, in that domain.
    pub fn of_all(
        domain: &'e str,
        entries: impl Iterator<Item = (&'e str, &'e str)> + Clone,
        policy: &Policy,
    ) -> Self {
        let levels = entries.flat_map(|(key, value)| [key, value]);
        Self::new(std::iter::once(domain).chain(levels), &policy.cells)
    }

    pub(super) fn new(
        mut values: impl Iterator<Item = &'e str> + Clone,
        cells: &CellHasher,
    ) -> Self {
        let all = values.clone();
        let Some(first) = values.next() else { return Self(Text::Sent("")) };
        let mut text = ArrayString::new();
        let fits = match values.next() {
            None if first.len() <= limits::KEY_BYTES => return Self(Text::Sent(first)),
            None => push(&mut text, first),
            Some(second) => {
                push_escaped(&mut text, first)
                    && [second]
                        .into_iter()
                        .chain(values)
                        .all(|value| push(&mut text, "|") && push_escaped(&mut text, value))
            }
        };
        if !fits {
            end_with_hash(&mut text, all, cells);
        }
        Self(Text::Made(text))
    }
}

fn push_escaped<const BYTES: usize>(text: &mut ArrayString<BYTES>, mut value: &str) -> bool {
    while let Some(at) = value.find(['%', '|']) {
        let number = if value.as_bytes()[at] == b'%' { "%25" } else { "%7C" };
        if !(push(text, &value[..at]) && push(text, number)) {
            return false;
        }
        value = &value[at + 1..];
    }
    push(text, value)
}

/// Puts the hash of all values in the place of what did not fit.
fn end_with_hash<'e>(
    text: &mut ArrayString<{ limits::KEY_BYTES }>,
    values: impl Iterator<Item = &'e str>,
    cells: &CellHasher,
) {
    let CellHasher(content) = cells;
    let Digest([high, low]) = values.fold(*content, Content::text).digest();
    text.truncate(text.floor_char_boundary(limits::KEY_BYTES - HASH_BYTES));
    // There is room for it now.
    let _ = fmt::Write::write_fmt(text, format_args!("#{high:016x}{low:016x}"));
}

/// Adds as much of `piece` as there is room for, and tells whether that is all of it.
pub(super) fn push<const BYTES: usize>(text: &mut ArrayString<BYTES>, piece: &str) -> bool {
    let fitting = piece.floor_char_boundary(text.remaining_capacity());
    text.push_str(&piece[..fitting]);
    fitting == piece.len()
}

impl Default for Key<'_> {
    /// The empty one.
    fn default() -> Self {
        Self(Text::Sent(""))
    }
}

impl Deref for Key<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        match &self.0 {
            Text::Sent(text) => text,
            Text::Made(text) => text,
        }
    }
}

impl fmt::Debug for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(values: &[&str]) -> String {
        let cells = CellHasher::new(&[7; 16], "envoy", "basic|key1");
        Key::new(values.iter().copied(), &cells).to_string()
    }

    #[test]
    fn values_are_joined_so_that_no_two_lists_make_one_key() {
        assert_eq!(key(&[]), "");
        assert_eq!(key(&["alice"]), "alice");
        assert_eq!(key(&["50%|"]), "50%|");
        assert_eq!(key(&["a", "b"]), "a|b");
        assert_eq!(key(&["", ""]), "|");
        assert_eq!(key(&["", "", ""]), "||");
        assert_eq!(key(&["a|b", "c"]), "a%7Cb|c");
        assert_eq!(key(&["a", "b|c"]), "a|b%7Cc");
        assert_eq!(key(&["%7C", "||%"]), "%257C|%7C%7C%25");
    }

    #[test]
    fn what_is_too_long_ends_with_a_hash_of_all_of_it() {
        let long = |last: &str| "é".repeat(128) + last;
        assert_eq!(key(&[&long("")]), long(""));

        let cut = key(&[&long("a")]);
        assert_eq!((cut.len(), &cut[222..223]), (255, "#"));
        assert!(cut.starts_with(&"é".repeat(111)));
        assert!(cut[223..].bytes().all(|digit| digit.is_ascii_hexdigit()));

        let (a, b) = ("a".repeat(200), "b".repeat(200));
        let keys = [
            cut,
            key(&[&long("b")]),
            key(&[&a, &b]),
            key(&[&a, &b, ""]),
            key(&[&a, "", &b]),
            key(&[&format!("{a}b"), &b[1..]]),
            key(&[&"%".repeat(100), "a"]),
            key(&[&"%".repeat(100), "b"]),
        ];
        for (index, key) in keys.iter().enumerate() {
            assert!(key.len() <= limits::KEY_BYTES, "{key}");
            assert!(!keys[..index].contains(key), "{key}");
        }
    }

    #[test]
    fn a_cut_key_keeps_its_name_across_releases() {
        // Cells on disk are named by it.
        let cut = key(&[&"a".repeat(300)]);
        assert_eq!(cut.len(), limits::KEY_BYTES);
        assert!(cut.ends_with("a#5e065e01ce299bc099e6a8f0d08a7e6e"), "{cut}");
    }
}
