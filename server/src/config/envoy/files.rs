//! Files of envoyproxy/ratelimit, as they are.

mod descriptors;
mod tree;

use std::{
    fs,
    io::{self, Read as _},
    panic,
    path::{Path as FilePath, PathBuf},
    thread,
};

use thiserror::Error;

use self::{descriptors::Domains, tree::File};
use super::{EnvoyRatelimit, Path, Rules};
use crate::limits;

/// What the files of a folder say.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// The rules. If they are equal, nothing has changed.
    pub rules: Rules,
    /// What is probably not meant, though it is no mistake.
    pub notes: Vec<String>,
}

/// Why files are not rules.
#[derive(Debug, Error)]
#[error("{}", .mistakes.join("\n"))]
pub struct RulesError {
    /// All that is wrong, up to [`limits::RULE_MISTAKES`]: each names its file and line, and shows it.
    pub mistakes: Vec<String>,
}

/// The rules of all files in the folder, and in those within. Names that begin with a dot are left out: where
/// Kubernetes mounts a folder, what they hold is linked to by others.
///
/// # Errors
/// If a file cannot be read, or is wrong; all that are wrong are told.
pub fn read(settings: &EnvoyRatelimit) -> Result<Loaded, RulesError> {
    let mut folder = Folder::default();
    folder.add(&settings.config_dir);
    rules_of(&folder.files, settings, folder.mistakes)
}

/// The rules of these files, each a name and a text, in their order.
///
/// # Errors
/// If one is wrong; all that are wrong are told.
pub fn parse(files: &[(String, String)], settings: &EnvoyRatelimit) -> Result<Loaded, RulesError> {
    rules_of(files, settings, Messages::default())
}

fn rules_of(
    files: &[(String, String)],
    settings: &EnvoyRatelimit,
    mistakes: Messages,
) -> Result<Loaded, RulesError> {
    let merge = settings.merge_domains;
    let parsed = on_a_deep_stack(|| {
        let mut domains = Domains::new(merge, mistakes);
        for (name, source) in files {
            domains.add(File { name, source });
        }
        domains.end()
    });
    let (rules, mut mistakes, notes) = parsed.map_err(|error| RulesError {
        mistakes: vec![format!("cannot start a thread to read rules: {error}")],
    })?;
    // What a wrong file defines is not known.
    if mistakes.is_empty() {
        check_settings(settings, &rules, &mut mistakes);
    }
    if mistakes.is_empty() {
        Ok(Loaded { rules, notes: notes.into_vec() })
    } else {
        Err(RulesError { mistakes: mistakes.into_vec() })
    }
}

/// Does it where there is room for [`limits::RULE_FILE_DEPTH`] calls of the parser in each other, whoever asks.
fn on_a_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread =
            thread::Builder::new().stack_size(limits::RULE_FILE_STACK).spawn_scoped(scope, work)?;
        Ok(thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic)))
    })
}

/// That what our own file says of rules is about some that there are.
fn check_settings(settings: &EnvoyRatelimit, rules: &Rules, mistakes: &mut Messages) {
    for (domain, different) in &settings.domains {
        let field = format!("envoy_ratelimit.domains.{}", shortened(domain));
        let Some(nodes) = rules.domains.get(domain) else {
            let there = some_of(rules.domains.keys().map(String::as_str));
            mistakes.push(format!("`{field}`: no file has this domain; there are {there}"));
            continue;
        };
        let mut paths = Vec::new();
        add_paths(&Path::of_domain(domain), nodes, &mut paths);
        for path in different.policies.keys().filter(|path| !paths.contains(path)) {
            let (path, there) = (shortened(path), some_of(paths.iter().map(String::as_str)));
            mistakes.push(format!("`{field}.policies`: no rule is at `{path}`; there are {there}"));
        }
    }
}

/// The paths of all rules, without their domain.
fn add_paths(path: &Path, nodes: &[super::Node], paths: &mut Vec<String>) {
    for node in nodes {
        let path = path.then(node);
        if let (Some(_), Some((_, rule))) = (&node.rate_limit, path.as_str().split_once('|')) {
            paths.push(rule.to_owned());
        }
        add_paths(&path, &node.nodes, paths);
    }
}

fn some_of<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const SHOWN: usize = 5;
    let mut names: Vec<_> =
        names.take(SHOWN + 1).map(|name| format!("`{}`", shortened(name))).collect();
    match names.len() {
        0 => "none".into(),
        count if count > SHOWN => {
            names[SHOWN] = "others".into();
            names.join(", ")
        }
        _ => names.join(", "),
    }
}

/// At most [`limits::SHOWN_LETTERS`] bytes of what somebody wrote.
fn shortened(text: &str) -> String {
    let end = text.floor_char_boundary(limits::SHOWN_LETTERS);
    let more = if end < text.len() { "\u{2026}" } else { "" };
    format!("{}{more}", &text[..end])
}

/// What people are told, up to a number.
#[derive(Clone, Debug, Default)]
struct Messages {
    told: Vec<String>,
    more: usize,
}

impl Messages {
    fn push(&mut self, message: String) {
        if self.told.len() < limits::RULE_MISTAKES {
            self.told.push(message);
        } else {
            self.more += 1;
        }
    }

    fn append(&mut self, other: Self) {
        other.told.into_iter().for_each(|message| self.push(message));
        self.more += other.more;
    }

    fn is_empty(&self) -> bool {
        self.told.is_empty()
    }

    fn into_vec(self) -> Vec<String> {
        let more = (self.more > 0).then(|| format!("and {} more", self.more));
        self.told.into_iter().chain(more).collect()
    }
}

/// The files of a folder, in the order of their paths.
#[derive(Debug, Default)]
struct Folder {
    files: Vec<(String, String)>,
    bytes: u64,
    /// Paths that were looked at.
    paths: usize,
    /// The folders that the one at hand is in, without links.
    around: Vec<PathBuf>,
    mistakes: Messages,
}

impl Folder {
    fn add(&mut self, folder: &FilePath) {
        let shown = folder.display();
        let found = folder.canonicalize().and_then(|real| {
            let paths = fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path()));
            let paths = paths.filter(|path| !path.as_ref().is_ok_and(|path| is_hidden(path)));
            // No more than are looked at: nobody waits for a folder that is not the one that was meant.
            let paths = paths.take(limits::RULE_FILES + 1).collect::<Result<Vec<_>, _>>()?;
            Ok((real, paths))
        });
        let (real, mut paths) = match found {
            Ok(found) => found,
            Err(error) => {
                return self.mistakes.push(format!(
                    "cannot read the folder {shown}: {error}; `envoy_ratelimit.config_dir` is a folder that \
                     this user can read, and may be empty"
                ));
            }
        };
        if self.around.contains(&real) || self.around.len() == limits::RULE_FOLDERS {
            let most = limits::RULE_FOLDERS;
            return self.mistakes.push(format!(
                "{shown}: a link to a folder around it, or more than {most} folders in each other"
            ));
        }
        paths.sort();
        self.around.push(real);
        for path in paths {
            self.add_path(&path);
        }
        self.around.pop();
    }

    fn add_path(&mut self, path: &FilePath) {
        let shown = path.display();
        self.paths += 1;
        if self.paths > limits::RULE_FILES {
            // Once is enough.
            if self.paths == limits::RULE_FILES + 1 {
                let most = limits::RULE_FILES;
                self.mistakes.push(format!("{shown}: more than {most} files and folders"));
            }
            return;
        }
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => self.add(path),
            Ok(found) if found.is_file() => match self.text(path) {
                Ok(text) => self.files.push((shown.to_string(), text)),
                Err(error) => self.mistakes.push(format!("cannot read {shown}: {error}")),
            },
            // A pipe would keep who reads it waiting.
            Ok(_) => self.mistakes.push(format!("{shown}: neither a file nor a folder")),
            Err(error) => self.mistakes.push(format!("cannot read {shown}: {error}")),
        }
    }

    /// The text of a file, as long as all together are not too long.
    fn text(&mut self, path: &FilePath) -> io::Result<String> {
        let left = limits::RULE_FILES_BYTES - self.bytes;
        let mut bytes = Vec::new();
        let length = fs::File::open(path)?.take(left + 1).read_to_end(&mut bytes)? as u64;
        if length > left {
            let message = format!("more than {} bytes in all files", limits::RULE_FILES_BYTES);
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
        }
        self.bytes += length;
        String::from_utf8(bytes)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not text in UTF-8"))
    }
}

fn is_hidden(path: &FilePath) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

#[cfg(test)]
mod tests;
