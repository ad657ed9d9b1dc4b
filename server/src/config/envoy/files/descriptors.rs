//! What the files mean, in the words of envoyproxy/ratelimit where it has them.

use std::collections::{BTreeMap, HashMap, hash_map::Entry};

use super::{
    super::{Amount, Metadata, Node, Path, RateLimit, Rules, Unit, Value},
    Messages, shortened,
    tree::{Content, File, Tree},
};
use crate::limits;

/// All keys; others are refused, wherever they are.
const KEYS: [&str; 16] = [
    "domain",
    "key",
    "value",
    "descriptors",
    "rate_limit",
    "unit",
    "requests_per_unit",
    "unlimited",
    "shadow_mode",
    "quota_mode",
    "name",
    "replaces",
    "detailed_metric",
    "value_to_metric",
    "share_threshold",
    "metadata",
];

/// Keys of a file, of a descriptor, of its limit, and of what that replaces.
const FILE_KEYS: &[&str] = &["domain", "descriptors"];
const DESCRIPTOR_KEYS: &[&str] = &[
    "key",
    "value",
    "rate_limit",
    "descriptors",
    "shadow_mode",
    "quota_mode",
    "detailed_metric",
    "value_to_metric",
    "share_threshold",
    "metadata",
];
const LIMIT_KEYS: &[&str] = &["unit", "requests_per_unit", "unlimited", "name", "replaces"];
const REPLACED_KEYS: &[&str] = &["name"];

/// The domains of the files so far.
#[derive(Clone)]
pub(super) struct Domains {
    merge: bool,
    rules: Rules,
    /// What each domain begins with, by key and value, and where.
    seen: BTreeMap<String, Seen>,
    mistakes: Messages,
    notes: Messages,
}

/// Keys and values of one level, and where the first of them is.
type Seen = HashMap<(String, String), String>;

impl Domains {
    pub(super) fn new(merge: bool, mistakes: Messages) -> Self {
        let (rules, seen, notes) = (Rules::default(), BTreeMap::new(), Messages::default());
        Self { merge, rules, seen, mistakes, notes }
    }

    /// Rules, what is wrong, and what is worth a note.
    pub(super) fn end(mut self) -> (Rules, Messages, Messages) {
        let count = self.rules.count();
        if count > limits::RULES {
            let most = limits::RULES;
            self.mistakes.push(format!("{count} rules in all files, and at most {most} are held"));
        }
        (self.rules, self.mistakes, self.notes)
    }

    pub(super) fn add(&mut self, file: File<'_>) {
        let root = match file.tree() {
            Ok(root) => root,
            Err(mistake) => return self.mistakes.push(mistake),
        };
        let mut keys = Reader { file, mistakes: Messages::default(), notes: &mut self.notes };
        keys.check_keys(&root);
        // What a wrong key was meant to be is not known, so no more is said about its file.
        if keys.mistakes.is_empty() {
            self.add_root(file, &root);
        } else {
            self.mistakes.append(keys.mistakes);
        }
    }

    fn add_root(&mut self, file: File<'_>, root: &Tree) {
        let mistakes = std::mem::take(&mut self.mistakes);
        let mut reader = Reader { file, mistakes, notes: &mut self.notes };
        let fields = reader.fields(root, "a file", FILE_KEYS);
        let named = reader.text(&fields, "domain", limits::RULE_TEXT_BYTES);
        let at = fields.get("domain").copied().unwrap_or(root);
        match named {
            Some("") => reader.wrong(at, "config file cannot have empty domain"),
            Some(domain) if self.seen.contains_key(domain) && !self.merge => {
                let message = format!(
                    "duplicate domain '{domain}' in config file; with `envoy_ratelimit.merge_domains` files of \
                     one domain add up"
                );
                reader.wrong(at, &message);
            }
            _ => {}
        }
        let domain = named.unwrap_or_default().to_owned();
        // Files that do not add up share no keys, and one mistake is told once.
        let mut own = Seen::new();
        let seen = self.seen.entry(domain.clone()).or_default();
        let seen = if self.merge { seen } else { &mut own };
        let path = Path::of_domain(&domain);
        let nodes =
            reader.nodes(&fields, seen, &Level { composite: &domain, path: &path, depth: 1 });
        self.mistakes = reader.mistakes;
        self.rules.domains.entry(domain).or_default().extend(nodes);
    }
}

/// Where in a domain nodes are.
struct Level<'a> {
    /// The domain, and what is above, as envoyproxy/ratelimit names it.
    composite: &'a str,
    path: &'a Path,
    depth: usize,
}

/// The fields of a map, each of a known name.
type Fields<'a> = HashMap<&'a str, &'a Tree>;

struct Reader<'a, 'n> {
    file: File<'a>,
    mistakes: Messages,
    notes: &'n mut Messages,
}

impl<'a> Reader<'a, '_> {
    fn wrong(&mut self, tree: &Tree, message: &str) {
        self.mistakes.push(self.file.wrong(tree, message));
    }

    /// That all keys, wherever they are, are some that there are.
    fn check_keys(&mut self, tree: &'a Tree) {
        match &tree.value {
            Content::Map(entries) => {
                for (key, value) in entries {
                    self.check_key(key, value);
                }
            }
            Content::Null => {}
            other => {
                let kind = other.kind();
                self.wrong(
                    tree,
                    &format!("error loading config file: a map is wanted, not {kind}"),
                );
            }
        }
    }

    fn check_key(&mut self, key: &'a Tree, value: &'a Tree) {
        let text = shortened(self.file.text(key).unwrap_or(key.value.kind()));
        let Content::Text(name) = &key.value else {
            return self.wrong(key, &format!("config error, key is not of type string: {text}"));
        };
        if !KEYS.contains(&name.as_str()) {
            return self.wrong(key, &format!("config error, unknown key '{text}'"));
        }
        // Whatever somebody wants to be told.
        if name == "metadata" {
            return;
        }
        match &value.value {
            Content::Map(_) => self.check_keys(value),
            Content::List(elements) => {
                for element in elements {
                    if let Content::Map(_) = element.value {
                        self.check_keys(element);
                    } else {
                        let text = self.file.text(element).unwrap_or(element.value.kind());
                        let text = shortened(text);
                        self.wrong(
                            element,
                            &format!(
                                "config error, yaml file contains list of type other than map: {text}"
                            ),
                        );
                    }
                }
            }
            _ => {}
        }
    }

    /// The fields of a map; those that mean nothing there are left out, as envoyproxy/ratelimit does.
    fn fields(&mut self, tree: &'a Tree, what: &str, known: &[&str]) -> Fields<'a> {
        let Content::Map(entries) = &tree.value else { return Fields::new() };
        let mut fields = Fields::new();
        for (key, value) in entries {
            let Content::Text(name) = &key.value else { continue };
            if known.contains(&name.as_str()) {
                fields.insert(name, value);
            } else {
                let message = format!("`{name}` means nothing in {what}, and is left out");
                self.notes.push(self.file.wrong(key, &message));
            }
        }
        fields
    }

    /// A text of at most so many bytes; empty if it is left out, and `None` if it is wrong.
    fn text(&mut self, fields: &Fields<'a>, name: &str, most: usize) -> Option<&'a str> {
        let Some(tree) = fields.get(name) else { return Some("") };
        let text = self.file.text(tree);
        if text.is_none() {
            let kind = tree.value.kind();
            self.wrong(tree, &format!("`{name}` is a text, not {kind}"));
        } else if text.is_some_and(|text| text.len() > most) {
            self.wrong(tree, &format!("`{name}` is longer than {most} bytes"));
            return None;
        }
        text
    }

    fn flag(&mut self, fields: &Fields<'a>, name: &str) -> bool {
        match fields.get(name).map(|tree| (tree, &tree.value)) {
            None | Some((_, Content::Null)) => false,
            Some((_, Content::Bool(flag))) => *flag,
            Some((tree, other)) => {
                let kind = other.kind();
                self.wrong(tree, &format!("`{name}` is true or false, not {kind}"));
                false
            }
        }
    }

    fn list(&mut self, fields: &Fields<'a>, name: &str) -> &'a [Tree] {
        match fields.get(name).map(|tree| (tree, &tree.value)) {
            None | Some((_, Content::Null)) => &[],
            Some((_, Content::List(elements))) => elements,
            Some((tree, other)) => {
                let kind = other.kind();
                self.wrong(tree, &format!("`{name}` is a list, not {kind}"));
                &[]
            }
        }
    }

    fn nodes(&mut self, fields: &Fields<'a>, seen: &mut Seen, level: &Level<'_>) -> Vec<Node> {
        let descriptors = self.list(fields, "descriptors");
        if level.depth > limits::DESCRIPTOR_ENTRIES && !descriptors.is_empty() {
            let most = limits::DESCRIPTOR_ENTRIES;
            self.wrong(&descriptors[0], &format!("more than {most} levels of descriptors"));
            return Vec::new();
        }
        descriptors.iter().map(|descriptor| self.node(descriptor, seen, level)).collect()
    }

    fn node(&mut self, tree: &'a Tree, seen: &mut Seen, level: &Level<'_>) -> Node {
        let fields = self.fields(tree, "a descriptor", DESCRIPTOR_KEYS);
        let named = self.text(&fields, "key", limits::RULE_TEXT_BYTES);
        let at = fields.get("key").copied().unwrap_or(tree);
        if named == Some("") {
            self.wrong(at, "descriptor has empty key");
        }
        let key = named.unwrap_or_default();
        let value = self.text(&fields, "value", limits::DESCRIPTOR_VALUE_BYTES).unwrap_or_default();
        let joined = if value.is_empty() { key.to_owned() } else { format!("{key}_{value}") };
        let composite = format!("{}.{joined}", level.composite);
        if key.contains('*') {
            let message = format!(
                "key '{}' has a `*`: keys are compared as they are, a `*` is for the value",
                shortened(key)
            );
            self.wrong(at, &message);
        }
        let share_threshold = self.flag(&fields, "share_threshold");
        if share_threshold && !value.contains('*') {
            let message = format!(
                "share_threshold can only be used with wildcard values (containing '*'), but found key '{}'",
                shortened(&joined)
            );
            self.wrong(fields["share_threshold"], &message);
        }
        match seen.entry((key.to_owned(), value.to_owned())) {
            // What is told already need not be told as this, too.
            Entry::Occupied(_) if key.is_empty() => {}
            Entry::Occupied(first) => {
                let (composite, first) = (shortened(&composite), first.get());
                let message = format!(
                    "duplicate descriptor composite key '{composite}'; the first is at {first}"
                );
                self.wrong(at, &message);
            }
            Entry::Vacant(here) => {
                here.insert(self.file.place(at));
            }
        }
        let mut node = Node {
            key: key.to_owned(),
            value: match value {
                "" => Value::Any,
                value if value.contains('*') => Value::Pattern(value.to_owned()),
                value => Value::Exactly(value.to_owned()),
            },
            rate_limit: self.rate_limit(&fields),
            shadow_mode: self.flag(&fields, "shadow_mode"),
            quota_mode: self.flag(&fields, "quota_mode"),
            detailed_metric: self.flag(&fields, "detailed_metric"),
            value_to_metric: self.flag(&fields, "value_to_metric"),
            share_threshold,
            metadata: self.metadata(&fields),
            nodes: Vec::new(),
        };
        let path = level.path.then(&node);
        let length = path.as_str().len();
        if node.rate_limit.is_some() && length > limits::RULE_PATH_BYTES {
            let most = limits::RULE_PATH_BYTES;
            self.wrong(at, &format!("the rule's path is {length} bytes long, above {most}"));
        }
        let below = Level { composite: &composite, path: &path, depth: level.depth + 1 };
        node.nodes = self.nodes(&fields, &mut Seen::new(), &below);
        node
    }

    fn rate_limit(&mut self, fields: &Fields<'a>) -> Option<RateLimit> {
        let tree = *fields.get("rate_limit")?;
        if !matches!(tree.value, Content::Map(_)) {
            if !matches!(tree.value, Content::Null) {
                let kind = tree.value.kind();
                self.wrong(tree, &format!("`rate_limit` is a map, not {kind}"));
            }
            return None;
        }
        let fields = self.fields(tree, "a rate limit", LIMIT_KEYS);
        let per_unit = self.requests_per_unit(&fields);
        let unlimited = self.flag(&fields, "unlimited");
        let named = self.text(&fields, "unit", limits::RULE_TEXT_BYTES)?;
        let at = fields.get("unit").copied().unwrap_or(tree);
        let amount = match Unit::named(named) {
            _ if unlimited => {
                if !named.is_empty() {
                    self.wrong(at, "should not specify rate limit unit when unlimited");
                }
                Amount::Unlimited
            }
            Some(unit) => Amount::Requests { per_unit, unit },
            None => {
                let (named, names) = (shortened(named), Unit::ALL.map(Unit::name).join(", "));
                self.wrong(at, &format!("invalid rate limit unit '{named}', not one of {names}"));
                return None;
            }
        };
        let name = self.text(&fields, "name", limits::RULE_TEXT_BYTES).unwrap_or_default();
        let replaces = self.replaces(&fields, name);
        Some(RateLimit { amount, name: name.to_owned(), replaces })
    }

    fn requests_per_unit(&mut self, fields: &Fields<'a>) -> u32 {
        let Some(tree) = fields.get("requests_per_unit") else { return 0 };
        let number = match &tree.value {
            Content::Null => Some(0),
            Content::Whole(number) => u32::try_from(*number).ok(),
            _ => None,
        };
        number.unwrap_or_else(|| {
            let most = u32::MAX;
            self.wrong(tree, &format!("`requests_per_unit` is a whole number of 0 to {most}"));
            0
        })
    }

    fn replaces(&mut self, fields: &Fields<'a>, own: &str) -> Vec<String> {
        let mut names = Vec::new();
        for replaced in self.list(fields, "replaces") {
            let fields = self.fields(replaced, "an entry of `replaces`", REPLACED_KEYS);
            let Some(name) = self.text(&fields, "name", limits::RULE_TEXT_BYTES) else { continue };
            if name.is_empty() {
                self.wrong(replaced, "should not have an empty replaces entry");
            } else if name == own {
                self.wrong(replaced, "replaces should not contain name of same descriptor");
            }
            names.push(name.to_owned());
        }
        names
    }

    fn metadata(&mut self, fields: &Fields<'a>) -> BTreeMap<String, Metadata> {
        let Some(tree) = fields.get("metadata") else { return BTreeMap::new() };
        match self.metadata_of(tree) {
            Metadata::Map(metadata) => metadata,
            Metadata::Null => BTreeMap::new(),
            _ => {
                let kind = tree.value.kind();
                self.wrong(tree, &format!("`metadata` is a map, not {kind}"));
                BTreeMap::new()
            }
        }
    }

    fn metadata_of(&mut self, tree: &'a Tree) -> Metadata {
        match &tree.value {
            Content::Null => Metadata::Null,
            Content::Bool(value) => Metadata::Bool(*value),
            // As JSON has them, which is what an answer carries: exact up to 2^53.
            Content::Whole(number) => Metadata::Number(*number as f64),
            Content::Number(number) if number.is_finite() => Metadata::Number(*number),
            Content::Number(_) => {
                self.wrong(tree, "a number in `metadata` is neither infinite nor `.nan`");
                Metadata::Null
            }
            Content::Text(text) => Metadata::Text(text.clone()),
            Content::List(elements) => {
                Metadata::List(elements.iter().map(|element| self.metadata_of(element)).collect())
            }
            Content::Map(entries) => {
                let mut metadata = BTreeMap::new();
                for (key, value) in entries {
                    match self.file.text(key) {
                        Some(name) => {
                            metadata.insert(name.to_owned(), self.metadata_of(value));
                        }
                        None => self.wrong(key, "a key in `metadata` is a text"),
                    }
                }
                Metadata::Map(metadata)
            }
        }
    }
}
