//! The specification: scripts of command, `----` and result, which every engine must answer alike.
//!
//! A script that an engine cannot run says so in its first lines: `without memory`.
//!
//! `REWRITE=1 cargo test -p fusebox-tests --test specs` writes the results of the first engine that runs a
//! script into it; read the difference before you keep it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod engine;
mod policies;
mod script;
mod words;

use std::path::Path;

use engine::{Core, Engine, Memory, OnSled};

const ENGINES: [&str; 3] = ["core", "memory", "sled"];

#[test]
fn the_core_answers_as_specified() {
    replay("core", || Box::new(Core::default()));
}

#[test]
fn memory_answers_as_specified() {
    replay("memory", || Box::new(Memory::default()));
}

#[test]
fn sled_answers_as_specified() {
    replay("sled", || Box::new(OnSled::default()));
}

fn replay(name: &str, engine: impl Fn() -> Box<dyn Engine>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("specs");
    let rewrites = std::env::var_os("REWRITE").is_some();
    let mut scripts = 0;
    datadriven::walk(folder.to_str().unwrap(), |file| {
        let without = without(&file.filename);
        let first = ENGINES.iter().find(|engine| !without.iter().any(|other| other == *engine));
        if without.iter().any(|other| other == name) {
            return;
        }
        scripts += 1;
        if rewrites && first != Some(&name) {
            return;
        }
        let mut script = script::Script::new(engine());
        file.run(|case| script.run(case));
    });
    assert!(scripts > 0, "no scripts in {}", folder.display());
}

/// The engines that a script says it cannot be run by.
fn without(script: &str) -> Vec<String> {
    let text = std::fs::read_to_string(script).expect("a script");
    let line = text.lines().find_map(|line| line.strip_prefix("without "));
    let engines: Vec<_> = line.into_iter().flat_map(str::split_whitespace).collect();
    for engine in &engines {
        assert!(ENGINES.contains(engine), "{script}: no engine `{engine}`");
    }
    engines.into_iter().map(str::to_owned).collect()
}
