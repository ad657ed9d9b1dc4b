//! Follows the files of Envoy's rules while the server runs.

use std::{
    path::{self, Path},
    sync::Arc,
};

use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher, event::AccessKind};
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
    let (mut changes, mut watcher) = watch(&folder);
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
                if rules.rules.count() == 0 && in_force.rules.count() > 0 {
                    tracing::warn!(
                        "no rule of Envoy's rate limit service is left: it limits nothing"
                    );
                }
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

/// What tells of changes of the folder, and what is to watch for them; without it the files are only looked at now and
/// then.
fn watch(folder: &Path) -> (Receiver<()>, Option<RecommendedWatcher>) {
    let (told, changes) = channel(1);
    // As events name it.
    let folder = path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
    let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        if event.is_ok_and(|event| is_of_others(&folder, &event)) {
            return;
        }
        // One waiting word is enough.
        let _ = told.try_send(());
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

/// Whether the files say the same after it: they were only read, or it is about what is beside the folder or a folder
/// that it is in. Others may write there all the time, as a log.
fn is_of_others(folder: &Path, Event { kind, paths, .. }: &Event) -> bool {
    let is_read =
        matches!(kind, EventKind::Access(access) if !matches!(access, AccessKind::Close(_)));
    let is_beside = |path: &Path| {
        let is_around = path.parent().is_some_and(|above| folder.starts_with(above));
        is_around && !folder.starts_with(path) && !path.starts_with(folder)
    };
    // One without paths tells that some were lost.
    is_read || !paths.is_empty() && paths.iter().all(|path| is_beside(path))
}

#[cfg(test)]
mod tests {
    use notify::event::{CreateKind, ModifyKind, RenameMode};

    use super::*;

    #[test]
    fn what_is_beside_the_folder_is_of_others() {
        let folder = Path::new("/etc/fusebox/current/rules");
        let told = |kind, paths: &[&str]| {
            let event = Event::new(kind);
            !is_of_others(
                folder,
                &paths.iter().fold(event, |event, path| event.add_path(path.into())),
            )
        };
        let created = EventKind::Create(CreateKind::File);
        for (path, is_told) in [
            ("/etc/fusebox/current/rules", true),
            ("/etc/fusebox/current/./rules", true),
            ("/etc/fusebox/current/rules/a.yaml", true),
            ("/etc/fusebox/current/rules/..data/a.yaml", true),
            ("/etc/fusebox/current", true),
            ("/etc/fusebox/server.log", false),
            ("/etc/fusebox/current/rules.log", false),
            // By a name that the folder is not known by.
            ("/private/etc/fusebox/current/server.log", true),
        ] {
            assert_eq!(told(created, &[path]), is_told, "{path}");
        }
        let renamed = EventKind::Modify(ModifyKind::Name(RenameMode::Both));
        assert!(told(renamed, &["/etc/fusebox/next", "/etc/fusebox/current"]), "a link is swapped");
        assert!(!told(renamed, &["/etc/fusebox/a.log", "/etc/fusebox/b.log"]));
        assert!(told(EventKind::Other, &[]), "some were lost");
    }

    #[test]
    fn what_is_only_read_is_of_others() {
        let folder = Path::new("/rules");
        let is_read = |kind| {
            is_of_others(folder, &Event::new(EventKind::Access(kind)).add_path("/rules/a".into()))
        };
        assert!(is_read(AccessKind::Open(notify::event::AccessMode::Any)));
        assert!(!is_read(AccessKind::Close(notify::event::AccessMode::Write)));
    }
}
