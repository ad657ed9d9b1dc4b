//! Follows the files of Envoy's rules while the server runs.

use std::{path::Path, sync::Arc};

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher, event::AccessKind};
use tokio::sync::mpsc::{Receiver, channel};
use tokio_util::sync::CancellationToken;

use crate::{
    app::App,
    config::envoy::{self, Ruleset},
    limits,
};

/// Has the app go on with the rules as their files say from now on, until the end begins. What cannot be read leaves
/// the last rules in force.
pub async fn follow(app: Arc<App>, rules: Ruleset, draining: CancellationToken) {
    let folder = rules.settings.config_dir.clone();
    let mut in_force = Ok(rules);
    let (mut changes, mut watcher) = watch();
    loop {
        // Anew each time, since the folder may be another one by now, under the same name; and before it is looked
        // at, so that what is changed meanwhile is told.
        if let Some(watcher) = &mut watcher {
            watch_folder(watcher, &folder);
        }
        in_force = look(&app, in_force).await;
        tokio::select! {
            () = draining.cancelled() => return,
            // Some file systems tell nothing.
            () = tokio::time::sleep(limits::RULES_LOOKED_AT) => {}
            Some(()) = changes.recv() => {
                // Whoever writes several files has a moment to finish.
                tokio::time::sleep(limits::RULES_SETTLE).await;
                while changes.try_recv().is_ok() {}
            }
        }
    }
}

/// The rules in force, and what was wrong with the files when they were last looked at.
type Looked = Result<Ruleset, (Ruleset, String)>;

/// Looks at the files, and makes what is different in them.
async fn look(app: &App, last: Looked) -> Looked {
    let (in_force, last_error) = match last {
        Ok(rules) => (rules, None),
        Err((rules, error)) => (rules, Some(error)),
    };
    let settings = Arc::clone(&in_force.settings);
    let read = tokio::task::spawn_blocking(move || envoy::read(settings)).await;
    let error = match read {
        Ok(Ok(rules)) if rules == in_force && last_error.is_none() => return Ok(in_force),
        Ok(Ok(rules)) => match app.reload_rules(&rules).await {
            Ok(different) => {
                rules
                    .notes
                    .iter()
                    .for_each(|note| tracing::warn!(note, "a rule, maybe not as meant"));
                app.rule_loads().succeeded();
                tracing::info!(different, "the rules of Envoy's rate limit service are loaded");
                return Ok(rules);
            }
            Err(error) => error.to_string(),
        },
        Ok(Err(error)) => error.to_string(),
        Err(panic) => panic.to_string(),
    };
    // Once, and not each time that they are looked at.
    if last_error.as_ref() != Some(&error) {
        app.rule_loads().failed();
        tracing::error!(
            "the last good rules of Envoy's rate limit service stay in force:\n{error}"
        );
    }
    Err((in_force, error))
}

/// What tells of changes, and what is to watch for them; without it the files are only looked at now and then.
fn watch() -> (Receiver<()>, Option<RecommendedWatcher>) {
    let (told, changes) = channel(1);
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        let is_read = |kind| matches!(kind, EventKind::Access(access) if !matches!(access, AccessKind::Close(_)));
        if !event.is_ok_and(|event| is_read(event.kind)) {
            // One waiting word is enough.
            let _ = told.try_send(());
        }
    });
    let watcher = watcher.inspect_err(|error| {
        let every = limits::RULES_LOOKED_AT;
        tracing::warn!(%error, "rules are not watched, and looked at every {every:?} instead");
    });
    (changes, watcher.ok())
}

/// Watches the folder with all that is in it, and those that it and the links on the way to it are in: that is where
/// a link is swapped.
fn watch_folder(watcher: &mut RecommendedWatcher, folder: &Path) {
    let swapped = folder.ancestors().filter(|path| *path == folder || path.is_symlink());
    let here = |above: &Path| above.as_os_str().is_empty();
    let above = swapped.filter_map(Path::parent);
    let above = above.map(|above| if here(above) { Path::new(".") } else { above });
    let above = above.map(|above| (above, RecursiveMode::NonRecursive));
    for (folder, mode) in above.chain([(folder, RecursiveMode::Recursive)]) {
        // Of one that is not watched yet, or not there any more.
        let _ = watcher.unwatch(folder);
        if let Err(error) = watcher.watch(folder, mode) {
            tracing::debug!(%error, folder = %folder.display(), "a folder of rules is not watched");
        }
    }
}
