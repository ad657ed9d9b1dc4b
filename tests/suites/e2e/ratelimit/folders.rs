//! Folders of rules that are swapped, as tools and orchestrators do.

use std::{fs, os::unix::fs::symlink, path::Path};

use fusebox_tests::Server;
use tempfile::TempDir;

use super::{Files, Proxy, Told, loaded, loads, peek, rl, rule};

/// A file of one rule of so many.
fn of(limit: u32) -> String {
    rl(&[rule("user", limit, "hour")])
}

/// Puts a link in the place of another, at once.
fn swap(target: &Path, link: &Path) {
    let new = link.with_file_name(".swapped");
    symlink(target, &new).unwrap();
    fs::rename(new, link).unwrap();
}

/// A folder of that name with a file of one rule.
fn folder(path: &Path, limit: u32) {
    fs::create_dir_all(path).unwrap();
    fs::write(path.join("rl.yaml"), of(limit)).unwrap();
}

async fn serve(folder: &Path) -> Server {
    Server::start(&format!("envoy_ratelimit: {{config_dir: '{}'}}", folder.display())).await
}

/// How much the rule in force has.
async fn limit(server: &Server) -> Told {
    Proxy::of(server).await.one(peek("user", "a")).await
}

#[tokio::test]
async fn what_kubernetes_mounts_is_followed_through_its_links() {
    let above = TempDir::new().unwrap();
    let mounted = above.path().join("config");
    fs::create_dir(&mounted).unwrap();
    folder(&mounted.join("..1"), 1);
    symlink("..1", mounted.join("..data")).unwrap();
    symlink("..data/rl.yaml", mounted.join("rl.yaml")).unwrap();
    let server = serve(&mounted).await;
    assert_eq!(limit(&server).await, Told::Ok(1));
    for load in 2..5_u32 {
        let next = format!("..{load}");
        folder(&mounted.join(&next), load);
        swap(Path::new(&next), &mounted.join("..data"));
        fs::remove_dir_all(mounted.join(format!("..{}", load - 1))).unwrap();
        loaded(&server, load.into(), 0).await;
        assert_eq!(limit(&server).await, Told::Ok(load));
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_folder_that_is_a_link_is_followed_where_it_is_swapped() {
    let above = TempDir::new().unwrap();
    let config = above.path().join("config");
    folder(&above.path().join("v1"), 1);
    symlink("v1", &config).unwrap();
    let server = serve(&config).await;
    folder(&above.path().join("v2"), 2);
    swap(Path::new("v2"), &config);
    loaded(&server, 2, 0).await;
    assert_eq!(limit(&server).await, Told::Ok(2));
    // And what is in the other one is watched from now on.
    fs::write(above.path().join("v2/rl.yaml"), of(3)).unwrap();
    loaded(&server, 3, 0).await;
    swap(Path::new("v1"), &config);
    loaded(&server, 4, 0).await;
    assert_eq!(limit(&server).await, Told::Ok(1));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_link_far_above_the_folder_is_followed_where_it_is_swapped() {
    // As envoyproxy/ratelimit has it: RUNTIME_ROOT is a link, in which are a subdirectory and `config`.
    let above = TempDir::new().unwrap();
    let inner = "ratelimit/config";
    folder(&above.path().join("v1").join(inner), 1);
    folder(&above.path().join("v2").join(inner), 2);
    let current = above.path().join("current");
    symlink("v1", &current).unwrap();
    let server = serve(&current.join(inner)).await;
    assert_eq!(limit(&server).await, Told::Ok(1));
    swap(Path::new("v2"), &current);
    loaded(&server, 2, 0).await;
    assert_eq!(limit(&server).await, Told::Ok(2));
    fs::write(current.join(inner).join("rl.yaml"), of(3)).unwrap();
    loaded(&server, 3, 0).await;
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_folder_that_is_away_for_a_while_is_a_mistake_until_it_is_back() {
    let files = Files::of(&[("rl.yaml", &of(1))]);
    let server = files.serve().await;
    fs::remove_dir_all(server.files.folder()).unwrap();
    fusebox_tests::eventually("it is missed", async || loads(&server).await.1 > 0).await;
    assert_eq!(limit(&server).await, Told::Ok(1), "the last good rules");
    fs::create_dir(server.files.folder()).unwrap();
    server.files.write("rl.yaml", &of(2));
    fusebox_tests::eventually("it is back", async || limit(&server).await == Told::Ok(2)).await;
    server.files.write("rl.yaml", &of(3));
    fusebox_tests::eventually("it is watched", async || limit(&server).await == Told::Ok(3)).await;
    server.stop().await.unwrap();
}

#[tokio::test]
async fn folders_in_the_folder_are_followed_and_hidden_ones_are_not() {
    let files = Files::of(&[("rl.yaml", &of(1))]);
    let server = files.serve().await;
    fs::create_dir(server.files.folder().join(".git")).unwrap();
    server.files.write(".git/rl.yaml", "nonsense");
    server.files.remove("rl.yaml");
    fs::create_dir(server.files.folder().join("team")).unwrap();
    server.files.write("team/rl.yaml", &of(2));
    fusebox_tests::eventually("it is found", async || limit(&server).await == Told::Ok(2)).await;
    server.files.write("team/rl.yaml", &of(3));
    fusebox_tests::eventually("it is watched", async || limit(&server).await == Told::Ok(3)).await;
    assert_eq!(loads(&server).await.1, 0);
    server.stop().await.unwrap();
}
