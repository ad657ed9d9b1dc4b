//! The referee: what other limiters are known to do, replayed against ours.
//!
//! `tests/referee/README.md` has a row for each fact, and says where it is replayed, and where we differ and
//! why. `REWRITE=1 cargo test -p fusebox-tests --test referee` writes what we do into the scripts; read the
//! difference before you keep it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod circuits;
mod panel;
#[path = "../specs/policies.rs"]
mod policies;
mod races;
mod ratelimit;
mod script;
mod table;
#[path = "../specs/words.rs"]
mod words;

use std::path::PathBuf;

#[test]
fn every_script_is_answered_as_written() {
    let scripts = table::scripts();
    assert!(!scripts.is_empty(), "no scripts in {}", table::folder().display());
    let others = |script: &PathBuf| !ratelimit::is_script(script) && !circuits::is_script(script);
    for script in scripts.into_iter().filter(others) {
        datadriven::walk(script.to_str().unwrap(), |file| {
            let mut script = script::Script::new();
            file.run(|case| script.run(case));
        });
    }
}

#[test]
fn every_script_about_circuits_is_answered_as_written() {
    let scripts = table::scripts().into_iter().filter(|script| circuits::is_script(script));
    let scripts: Vec<_> = scripts.collect();
    assert!(!scripts.is_empty(), "no scripts in {}", table::folder().display());
    for script in scripts {
        datadriven::walk(script.to_str().unwrap(), |file| {
            let mut script = circuits::Script::new();
            file.run(|case| script.run(case));
        });
    }
}

#[test]
fn every_script_of_envoys_service_is_answered_over_the_wire_as_written() {
    let scripts = ratelimit::scripts();
    assert!(!scripts.is_empty(), "no scripts in {}", table::folder().display());
    for script in scripts {
        datadriven::walk(script.to_str().unwrap(), |file| {
            let mut script = ratelimit::Script::new();
            file.run(|case| script.run(case));
        });
    }
}
