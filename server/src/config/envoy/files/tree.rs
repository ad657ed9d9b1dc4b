//! A YAML document as it was written, each part with its place.
//!
//! What a file means is found out later, and what is wrong with it is told by line. Text that looks like a
//! number is text where text is wanted, so the source is kept beside what YAML takes it for.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::{Location, Spanned, options::NonFiniteFloatPolicy};

use crate::{
    config::{Place, what_is_wrong},
    limits,
};

/// A part of a document, and where it is.
pub(super) type Tree = Spanned<Content>;

/// What YAML takes a part of a document for.
#[derive(Clone, Debug)]
pub(super) enum Content {
    Null,
    Bool(bool),
    Whole(u64),
    Number(f64),
    Text(String),
    List(Vec<Tree>),
    Map(Vec<(Tree, Tree)>),
}

/// A file, and what messages call it.
#[derive(Clone, Copy, Debug)]
pub(super) struct File<'a> {
    pub(super) name: &'a str,
    pub(super) source: &'a str,
}

impl<'a> File<'a> {
    /// What is in it; an empty file holds nothing.
    ///
    /// # Errors
    /// If it is not YAML; the message names file and line.
    pub(super) fn tree(self) -> Result<Tree, String> {
        let most = limits::RULE_FILE_NODES;
        let options = serde_saphyr::options! {
            budget: serde_saphyr::budget! {
                max_nodes: most,
                // A list or a map has a begin and an end.
                max_events: 2 * most,
                max_depth: limits::RULE_FILE_DEPTH,
                // One limit may be that of many rules: what is repeated is bounded, not how often.
                max_aliases: most,
                max_merge_keys: most,
                enforce_alias_anchor_ratio: false,
            },
            alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 2 * most },
            // As the text that it may be meant as.
            non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        };
        let parsed = serde_saphyr::from_str_with_options(self.source, options);
        // Nothing is found at the end of a file, where nobody looks for what is missing.
        let parsed = parsed.map(|tree: Tree| match tree.value {
            Content::Null => Tree::new(Content::Null, Location::UNKNOWN, Location::UNKNOWN),
            _ => tree,
        });
        parsed.map_err(|error| {
            let place = Place(error.location().map(|place| (place.line(), place.column())));
            self.told(place, &format!("error loading config file: {}", what_is_wrong(&error)))
        })
    }

    /// That this is wrong with `tree`.
    pub(super) fn wrong(self, tree: &Tree, message: &str) -> String {
        self.told(place_of(tree), message)
    }

    /// Where `tree` is.
    pub(super) fn place(self, tree: &Tree) -> String {
        format!("{}{}", self.name, place_of(tree))
    }

    fn told(self, place: Place, message: &str) -> String {
        format!("{}{place}: {message}{}", self.name, place.shown_in(self.source))
    }

    /// A scalar as it was written; `None` for a list or a map. Nothing is an empty text.
    pub(super) fn text(self, tree: &'a Tree) -> Option<&'a str> {
        match &tree.value {
            Content::Null => Some(""),
            Content::Text(text) => Some(text),
            Content::Bool(_) | Content::Whole(_) | Content::Number(_) => {
                let span = tree.defined.span();
                let from = usize::try_from(span.byte_offset()?).ok()?;
                let to = from.checked_add(usize::try_from(span.byte_len()?).ok()?)?;
                // Quoted it is a number only if its tag says so.
                Some(self.source.get(from..to)?.trim_matches(['"', '\'']))
            }
            Content::List(_) | Content::Map(_) => None,
        }
    }
}

/// What has no place is at the begin.
fn place_of(tree: &Tree) -> Place {
    Place(Some((tree.referenced.line().max(1), tree.referenced.column().max(1))))
}

impl Content {
    /// What it is called in messages.
    pub(super) const fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "a yes or no",
            Self::Whole(_) | Self::Number(_) => "a number",
            Self::Text(_) => "a text",
            Self::List(_) => "a list",
            Self::Map(_) => "a map",
        }
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("YAML")
    }

    fn visit_unit<E>(self) -> Result<Content, E> {
        Ok(Content::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Content, E> {
        Ok(Content::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Content, E> {
        Ok(Content::Whole(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Content, E> {
        Ok(Content::Number(value as f64))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Content, E> {
        Ok(Content::Number(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Content, E> {
        Ok(Content::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Content, E> {
        Ok(Content::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Content, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = list.next_element()? {
            elements.push(element);
        }
        Ok(Content::List(elements))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Content, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Content::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(source: &str) -> File<'_> {
        File { name: "a.yaml", source }
    }

    fn of(tree: &Tree, field: usize) -> &Tree {
        let Content::Map(entries) = &tree.value else { panic!("{tree:?}") };
        &entries[field].1
    }

    #[test]
    fn text_is_what_was_written_whatever_yaml_takes_it_for() {
        for (written, text) in [
            ("1", "1"),
            ("007", "007"),
            ("0x1F", "0x1F"),
            ("-5", "-5"),
            ("1.50", "1.50"),
            (".inf", ".inf"),
            ("1e999", "1e999"),
            ("true", "true"),
            ("yes", "yes"),
            ("'1'", "1"),
            ("\"a\\tb\"", "a\tb"),
            ("2020-01-01", "2020-01-01"),
            ("/a b", "/a b"),
            ("!!str 12", "12"),
            ("!!int \"5\"", "5"),
            ("!!int 5", "5"),
            ("!!bool 'true'", "true"),
            ("!!float '1.0'", "1.0"),
            ("!mine 5", "5"),
            ("null", ""),
            ("~", ""),
            ("", ""),
            ("''", ""),
            ("é1", "é1"),
        ] {
            for source in [
                format!("é: {written}\n"),
                format!("é: {written}"),
                format!("{{é: {written} }}"),
                format!("é: {written}  # why\n"),
            ] {
                let tree = file(&source).tree().unwrap();
                assert_eq!(file(&source).text(of(&tree, 0)), Some(text), "{source}");
            }
        }
        let source = "a: &one 10\nb: *one\n";
        let tree = file(source).tree().unwrap();
        assert_eq!(file(source).text(of(&tree, 1)), Some("10"), "by its other name");
        assert_eq!(file(source).place(of(&tree, 1)), "a.yaml:2:4", "where it is used");
    }

    #[test]
    fn what_is_not_yaml_is_told_by_line() {
        for (source, place, words) in [
            ("a: [1, 2\n", ":1:4: ", "error loading config file"),
            ("a: 1\n b: 2\n", ":2:3: ", "error loading config file"),
            ("a: 1\na: 2\n", ":2:1", "duplicate"),
            ("a: *nothing\n", ":1:4: ", "unknown anchor"),
            ("a: 1\n---\nb: 2\n", ":3:1: ", "multiple YAML documents detected\n"),
        ] {
            let error = file(source).tree().unwrap_err();
            assert!(error.starts_with(&format!("a.yaml{place}")), "{source}: {error}");
            assert!(error.contains(words), "{source}: {error}");
        }
    }

    #[test]
    fn a_document_has_an_end() {
        let deep = |depth| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        let told = super::super::on_a_deep_stack(|| {
            file(&deep(limits::RULE_FILE_DEPTH)).tree().unwrap();
            file(&deep(limits::RULE_FILE_DEPTH + 1)).tree().unwrap_err()
        });
        assert!(told.unwrap().starts_with("a.yaml:1:"));
        let laughs = (1..9).fold("a0: &a0 [ha, ha]\n".to_owned(), |laughs, level| {
            let last = format!("*a{}, ", level - 1).repeat(9);
            format!("{laughs}a{level}: &a{level} [{last}]\n")
        });
        let error = file(&laughs).tree().unwrap_err();
        assert!(error.starts_with("a.yaml:"), "{error}");
    }
}
