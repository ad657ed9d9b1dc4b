//! Files of rules, as an operator puts them there.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

/// A folder of files that all change at once, as where Kubernetes mounts one: it is a link that is swapped.
pub struct Folder {
    around: TempDir,
    /// Elsewhere, so that whoever watches the link is told of nothing but the swap.
    versions: TempDir,
    count: usize,
}

impl Default for Folder {
    fn default() -> Self {
        let folder = || tempfile::tempdir().expect("a folder");
        Self { around: folder(), versions: folder(), count: 0 }
    }
}

impl Folder {
    pub fn path(&self) -> PathBuf {
        self.around.path().join("rules")
    }

    /// Replaces all files; what is before the first `@ NAME` is `rules.yaml`.
    pub fn write(&mut self, input: &str) {
        self.count += 1;
        let folder = self.versions.path().join(self.count.to_string());
        fs::create_dir(&folder).expect("a folder");
        let mut files: Vec<(&str, String)> = Vec::new();
        for line in input.lines() {
            if let Some(name) = line.strip_prefix("@ ") {
                files.push((name, String::new()));
                continue;
            }
            if files.is_empty() {
                files.push(("rules.yaml", String::new()));
            }
            let (_, text) = files.last_mut().expect("one");
            text.push_str(line);
            text.push('\n');
        }
        for (name, text) in files {
            fs::write(folder.join(name), text).expect("a file");
        }
        let next = self.versions.path().join("next");
        symlink(&folder, &next).expect("a link");
        fs::rename(next, self.path()).expect("the link is swapped");
    }

    /// Where something is wrong, if it is told in these words; else all that is told.
    pub fn shown(&self, mistake: &str, words: &str) -> String {
        let mistake = mistake.replace(&format!("{}/", self.path().display()), "");
        let first = mistake.lines().next().unwrap_or_default();
        let mut place = first.splitn(3, ':');
        match (place.next(), place.next()) {
            (Some(file), Some(line)) if is_place(file, line) && first.contains(words) => {
                format!("refused at {file}:{line}\n")
            }
            _ => format!("refused: {mistake}\n"),
        }
    }
}

fn is_place(file: &str, line: &str) -> bool {
    Path::new(file).extension().is_some_and(|extension| extension == "yaml")
        && line.parse::<u64>().is_ok()
}
