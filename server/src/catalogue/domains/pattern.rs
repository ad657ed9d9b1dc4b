//! Patterns of one key, found by the text around their stars.

use hashbrown::{Equivalent, HashMap};

/// Patterns in the order of the file, and what each stands for.
///
/// A value is looked up once for each pair of lengths that texts before the first star and after the last one
/// have, not once for each pattern. Only patterns with the same text before and after are held against it one
/// by one, and they differ in what is between their stars. So ten thousand prefixes of ten lengths are ten
/// lookups; of ten thousand lengths they would be ten thousand.
#[derive(Debug)]
pub(super) struct Patterns<T> {
    /// In the order of their first patterns.
    shapes: Vec<Shape>,
    by_ends: HashMap<Ends<Box<str>>, Vec<Pattern<T>>>,
    count: usize,
}

/// How much of a value patterns fix at its ends.
#[derive(Debug)]
struct Shape {
    prefix_bytes: usize,
    suffix_bytes: usize,
    /// The order of the first pattern that is like this.
    first: usize,
}

#[derive(Debug)]
struct Pattern<T> {
    order: usize,
    /// Texts between the first star and the last one.
    between: Box<[Box<str>]>,
    of: T,
}

/// The texts before the first star and after the last one, or where they would be in a value.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Ends<S> {
    prefix: S,
    suffix: S,
}

impl Equivalent<Ends<Box<str>>> for Ends<&str> {
    fn equivalent(&self, Ends { prefix, suffix }: &Ends<Box<str>>) -> bool {
        *self.prefix == **prefix && *self.suffix == **suffix
    }
}

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self { shapes: Vec::new(), by_ends: HashMap::new(), count: 0 }
    }
}

impl<T> Patterns<T> {
    /// Adds one after all others.
    pub fn add(&mut self, pattern: &str, of: T) {
        let (prefix, rest) = pattern.split_once('*').unwrap_or((pattern, ""));
        let (between, suffix) = rest.rsplit_once('*').unwrap_or(("", rest));
        let between = between.split('*').filter(|text| !text.is_empty()).map(Box::from).collect();
        let order = self.count;
        self.count += 1;

        let (prefix_bytes, suffix_bytes) = (prefix.len(), suffix.len());
        let ends = Ends { prefix: prefix.into(), suffix: suffix.into() };
        let alike = self.by_ends.entry(ends).or_default();
        let is_like = |shape: &Shape| {
            (shape.prefix_bytes, shape.suffix_bytes) == (prefix_bytes, suffix_bytes)
        };
        if alike.is_empty() && !self.shapes.iter().any(is_like) {
            self.shapes.push(Shape { prefix_bytes, suffix_bytes, first: order });
        }
        alike.push(Pattern { order, between, of });
    }

    /// What the first pattern stands for that matches the value.
    pub fn find(&self, value: &str) -> Option<&T> {
        let mut best: Option<&Pattern<T>> = None;
        for shape in &self.shapes {
            if best.is_some_and(|best| best.order < shape.first) {
                break;
            }
            let Some((ends, rest)) = shape.cut(value) else { continue };
            super::probed();
            let Some(alike) = self.by_ends.get(&ends) else { continue };
            let earlier =
                |pattern: &&Pattern<T>| best.is_none_or(|best| pattern.order < best.order);
            let matching = alike.iter().take_while(earlier).find(|pattern| pattern.matches(rest));
            best = matching.or(best);
        }
        best.map(|best| &best.of)
    }
}

impl Shape {
    /// The ends of a value, and what is between them; `None` if no pattern of this shape can match it.
    fn cut<'v>(&self, value: &'v str) -> Option<(Ends<&'v str>, &'v str)> {
        let (prefix, rest) = value.split_at_checked(self.prefix_bytes)?;
        let (rest, suffix) = rest.split_at_checked(rest.len().checked_sub(self.suffix_bytes)?)?;
        Some((Ends { prefix, suffix }, rest))
    }
}

impl<T> Pattern<T> {
    /// Whether what is between the ends matches: each text at its first place is as good as at any other.
    fn matches(&self, mut rest: &str) -> bool {
        super::probed();
        self.between.iter().all(|text| match rest.find(&**text) {
            Some(at) => {
                rest = &rest[at + text.len()..];
                true
            }
            None => false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(patterns: &[&str], value: &str) -> Option<usize> {
        let mut all = Patterns::default();
        for (index, pattern) in patterns.iter().enumerate() {
            all.add(pattern, index);
        }
        all.find(value).copied()
    }

    #[test]
    fn a_star_is_any_text_also_none() {
        for (pattern, matching, others) in [
            ("*", &["", "a", "*", "é"][..], &[][..]),
            ("foo*", &["foo", "foo1", "foo2", "foo*"], &["bar", "fo", "xfoo"]),
            ("*foo", &["foo", "1foo"], &["foo1"]),
            ("bar*b", &["barab", "bar123b", "barb"], &["bara", "xbarb", "bar"]),
            ("foo*bar*baz", &["foo123bar456baz", "foobarbaz"], &["foo123baz", "bar456baz"]),
            ("a*a", &["aa", "aba"], &["a", ""]),
            ("ab*ba", &["abba", "abxba"], &["aba"]),
            ("*a*a*", &["aa", "xaxax"], &["a", "xax"]),
            ("a**b", &["ab", "axb"], &["a", "b"]),
            ("é*é", &["éé", "éxé"], &["é", "\u{301}"]),
            ("a*\u{a9}", &["a\u{a9}"], &["aé", "a\u{1a9}"]),
        ] {
            for value in matching {
                assert_eq!(found(&[pattern], value), Some(0), "{pattern} and {value}");
            }
            for value in others {
                assert_eq!(found(&[pattern], value), None, "{pattern} and {value}");
            }
        }
    }

    #[test]
    fn the_first_in_the_file_counts_however_long_it_is() {
        assert_eq!(found(&["a*", "ab*", "abc*"], "abcd"), Some(0));
        assert_eq!(found(&["abc*", "ab*", "a*"], "abcd"), Some(0));
        assert_eq!(found(&["abc*", "ab*", "a*"], "abd"), Some(1));
        assert_eq!(found(&["x*", "*d", "a*", "*"], "abcd"), Some(1));
        assert_eq!(found(&["x*", "*y", "a*z*", "*", "a*"], "abcd"), Some(3));
    }

    #[test]
    fn a_pattern_of_many_stars_ends_soon() {
        // It would take 10^29 steps to try every place of every star.
        let pattern = "a*".repeat(100) + "b";
        assert_eq!(found(&[&pattern], &"a".repeat(4_096)), None);
    }
}
