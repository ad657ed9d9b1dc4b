//! The specification: scripts of command, `----` and result, which every engine must answer alike.
//!
//! `REWRITE=1 cargo test -p fusebox-tests --test specs` writes the results of the core into the scripts;
//! read the difference before you keep it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod engine;
mod script;

use std::path::Path;

use engine::{Core, Engine, Memory, OnSled};

#[test]
fn the_core_answers_as_specified() {
    replay(&["cells", "untouched", "restart"], || Box::new(Core::default()));
}

#[test]
fn memory_answers_as_specified() {
    replay(&["cells", "untouched"], || Box::new(Memory::default()));
}

#[test]
fn sled_answers_as_specified() {
    // Not `untouched`: a change of policies is a restart, and a start touches every cell.
    replay(&["cells", "restart"], || Box::new(OnSled::default()));
}

fn replay(folders: &[&str], engine: impl Fn() -> Box<dyn Engine>) {
    for folder in folders {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("specs").join(folder);
        let mut scripts = 0;
        datadriven::walk(folder.to_str().unwrap(), |file| {
            scripts += 1;
            let mut script = script::Script::new(engine());
            file.run(|case| script.run(case));
        });
        assert!(scripts > 0, "no scripts in {}", folder.display());
    }
}
