//! The program itself: what it prints, how it ends, what it leaves behind.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::unix::fs::symlink,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

/// Longer than anything here takes; only a test that fails ever waits for it.
const PATIENCE: Duration = Duration::from_secs(30);

fn fusebox() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fusebox"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("FUSEBOX_")) {
        command.env_remove(name);
    }
    command
}

fn ended(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// A server that runs, and is killed when a test fails.
struct Running {
    process: Child,
    greeting: String,
}

impl Running {
    fn start(command: &mut Command) -> Self {
        let ports = ["--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"];
        let command = command.args(ports).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.as_mut().unwrap()).lines();
        let greeting: Vec<_> = lines.by_ref().take(3).map(Result::unwrap).collect();
        let running = Self { process, greeting: greeting.join("\n") };
        let begun = Instant::now();
        while !running.http("/readyz").starts_with("HTTP/1.1 200") {
            assert!(begun.elapsed() < PATIENCE, "it is never ready");
        }
        running
    }

    fn http(&self, path: &str) -> String {
        let (_, address) = self.greeting.split_once("http://").expect("the address is told");
        let mut stream = TcpStream::connect(address.trim()).expect("operations are served");
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn stop(mut self, signal: &str) -> (i32, String) {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        let code = self.process.wait().unwrap().code().unwrap();
        let mut log = String::new();
        self.process.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        (code, log)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn write(directory: &Path, text: &str) -> String {
    let file = directory.join("fusebox.yaml");
    fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

#[test]
fn it_says_what_it_is_and_what_it_can_do() {
    let (code, version, _) = ended(fusebox().arg("--version"));
    assert_eq!((code, version), (0, format!("fusebox {}\n", env!("CARGO_PKG_VERSION"))));
    for arguments in [&["--help"][..], &["serve", "--help"]] {
        let (code, help, _) = ended(fusebox().args(arguments));
        assert_eq!(code, 0);
        for word in
            ["--config", "FUSEBOX_CONFIG", "--listen", "--ops-listen", "--data", "--insecure"]
        {
            assert!(help.contains(word), "{word} is not in {help}");
        }
    }
    let (code, _, error) = ended(fusebox().arg("--lisen"));
    assert_eq!(code, 2);
    assert!(error.contains("--listen"), "it suggests what was meant: {error}");
}

#[test]
fn check_prints_what_is_in_effect_or_says_what_is_wrong() {
    let directory = tempfile::tempdir().unwrap();
    let good = "namespaces: {demo: {policies: {api: {token_bucket: {limit: 7, per: 90s}}}}}";
    let (code, effective, error) = ended(fusebox().arg("check").arg(write(directory.path(), good)));
    assert_eq!((code, error.as_str()), (0, ""));
    for line in ["listen: 127.0.0.1:3873", "burst: 7", "per: 1m 30s", "durability: strict"] {
        assert!(effective.contains(line), "{line} is not in {effective}");
    }

    let file = write(directory.path(), "listen: 127.0.0.1:1\nlimits: 3\n");
    let (code, effective, error) = ended(fusebox().arg("check").arg(&file));
    assert_eq!((code, effective.as_str()), (2, ""));
    assert!(error.starts_with(&format!("fusebox: {file}:2:1: `limits`: unknown field")), "{error}");

    let (code, _, error) = ended(fusebox().args(["check", "/nowhere/fusebox.yaml"]));
    assert_eq!(code, 2);
    assert!(error.starts_with("fusebox: cannot read /nowhere/fusebox.yaml"), "{error}");
}

/// A configuration whose rules are in a folder beside it, with these files.
fn with_rules(directory: &Path, files: &[(&str, &str)]) -> String {
    let folder = directory.join("rules");
    fs::create_dir_all(&folder).unwrap();
    for (name, text) in files {
        fs::write(folder.join(name), text).unwrap();
    }
    write(directory, &format!("envoy_ratelimit: {{config_dir: {}}}\n", folder.display()))
}

#[test]
fn check_reads_the_rules_of_envoy_too() {
    let directory = tempfile::tempdir().unwrap();
    let limit = "{unit: day, requests_per_unit: 5}";
    let one = format!("domain: one\ndescriptors:\n- {{key: a, rate_limit: {limit}}}\n- key: b\n");
    let file = with_rules(directory.path(), &[("one.yaml", &one), ("two", "domain: two\n")]);
    let folder = directory.path().join("rules");
    let (code, effective, error) = ended(fusebox().arg("check").arg(&file));
    let note = "2 domains with 1 rule of Envoy's rate limit service in";
    assert_eq!(error, format!("note: {note} {}\n", folder.display()));
    assert_eq!(code, 0);
    assert!(effective.contains("merge_domains: false"), "with its defaults: {effective}");

    // From where it is started, as the data directory.
    write(directory.path(), "envoy_ratelimit: {config_dir: rules}\n");
    let (code, _, error) = ended(fusebox().arg("check").arg(&file).current_dir(&directory));
    assert_eq!((code, error), (0, format!("note: {note} rules\n")));

    let misplaced = "domain: one\ndescriptors:\n- {key: a, unit: day}\n";
    fs::write(folder.join("one.yaml"), misplaced).unwrap();
    let (code, _, error) = ended(fusebox().arg("check").arg(&file).current_dir(&directory));
    assert_eq!(code, 0);
    assert!(error.starts_with("note: rules/one.yaml:3:12: `unit` means nothing in"), "{error}");
}

#[test]
fn check_tells_all_wrong_files_of_rules() {
    let directory = tempfile::tempdir().unwrap();
    let bad_unit = "domain: a\ndescriptors:\n- {key: a, rate_limit: {unit: eon}}\n";
    let bad_key = "domain: b\ndescriptors:\n- key: a\n  ratelimit: {}\n";
    let files = [("a.yaml", bad_unit), ("b.yaml", bad_key), ("c.yaml", "domain: c\n")];
    let file = with_rules(directory.path(), &files);
    let (code, effective, error) = ended(fusebox().arg("check").arg(&file));
    assert_eq!((code, effective.as_str()), (2, ""));
    let told: Vec<_> = error.lines().filter(|line| line.starts_with("fusebox: ")).collect();
    let folder = directory.path().join("rules").display().to_string();
    let expected =
        ["a.yaml:3:31: invalid rate limit unit 'eon'", "b.yaml:4:3: config error, unknown key"];
    assert_eq!(told.len(), expected.len(), "{error}");
    for (told, expected) in told.iter().zip(expected) {
        assert!(told.starts_with(&format!("fusebox: {folder}/{expected}")), "{expected}: {error}");
    }
    assert!(error.contains("\n3 | - {key: a, rate_limit: {unit: eon}}\n"), "it is shown: {error}");
}

#[test]
fn check_names_a_folder_of_rules_that_is_not_there() {
    let directory = tempfile::tempdir().unwrap();
    let file = write(directory.path(), "envoy_ratelimit: {config_dir: /nowhere/rules}\n");
    let (code, effective, error) = ended(fusebox().arg("check").arg(&file));
    assert_eq!((code, effective.as_str()), (2, ""));
    assert!(error.starts_with("fusebox: cannot read the folder /nowhere/rules: "), "{error}");
    assert!(error.contains("`envoy_ratelimit.config_dir`"), "it says what to do: {error}");
}

#[test]
fn check_reads_rules_where_kubernetes_mounts_them() {
    let directory = tempfile::tempdir().unwrap();
    let file = with_rules(directory.path(), &[]);
    let folder = directory.path().join("rules");
    let version = folder.join("..2026_01_01_00_00_00.1");
    fs::create_dir(&version).unwrap();
    fs::write(version.join("rules.yaml"), "domain: d\n").unwrap();
    symlink("..2026_01_01_00_00_00.1", folder.join("..data")).unwrap();
    symlink("..data/rules.yaml", folder.join("rules.yaml")).unwrap();
    let (code, _, error) = ended(fusebox().arg("check").arg(&file));
    assert_eq!(code, 0, "{error}");
    assert!(error.starts_with("note: 1 domain with 0 rules of Envoy's"), "{error}");
}

#[test]
fn it_does_not_start_where_others_could_reach_it() {
    for arguments in [["--listen", "0.0.0.0:0"], ["--ops-listen", "[::]:0"]] {
        let (code, _, error) = ended(fusebox().args(arguments));
        assert_eq!(code, 2);
        assert!(error.contains("--insecure"), "{error}");
    }
}

#[test]
fn it_does_not_start_with_a_wrong_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let file = write(directory.path(), "storage: {durability: lax}\n");
    let (code, _, error) = ended(fusebox().args(["serve", "--config", &file]));
    assert_eq!(code, 2);
    assert!(error.contains("unknown variant `lax`"), "{error}");
}

#[test]
fn an_address_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, _, error) = ended(fusebox().args(["--listen", &address]));
    assert_eq!(code, 1);
    assert!(error.contains(&address) && error.contains("`listen`"), "{error}");
}

#[test]
fn a_signal_drains_and_ends_well() {
    for signal in ["-TERM", "-INT"] {
        let directory = tempfile::tempdir().unwrap();
        let server = Running::start(fusebox().arg("--data").arg(directory.path()));
        let (code, log) = server.stop(signal);
        assert_eq!(code, 0, "{log}");
        let messages = log.lines().filter(|line| line.contains(r#""message""#)).count();
        assert!(messages >= 3, "ready, draining, stopped, as JSON: {log}");
        assert!(log.contains(r#""message":"stopped""#), "{log}");
    }
}

#[test]
fn two_servers_do_not_share_a_data_directory() {
    let directory = tempfile::tempdir().unwrap();
    let first = Running::start(fusebox().arg("--data").arg(directory.path()));
    let ports = ["--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"];
    let (code, _, error) = ended(fusebox().args(ports).arg("--data").arg(directory.path()));
    assert_eq!(code, 1);
    assert!(error.contains("is in use: another fusebox serves from it"), "{error}");
    assert_eq!(first.stop("-TERM").0, 0);
}

#[test]
fn a_data_directory_that_lost_its_state_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let server = Running::start(fusebox().arg("--data").arg(directory.path()));
    assert_eq!(server.stop("-HUP").0, 0);
    fs::remove_file(directory.path().join("store-1/db")).unwrap();
    let ports = ["--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"];
    let (code, _, error) = ended(fusebox().args(ports).arg("--data").arg(directory.path()));
    assert_eq!(code, 1);
    assert!(error.contains("has lost its last commits: it ends at 0"), "{error}");
    assert!(error.contains("Restore a copy"), "it says what to do: {error}");
}

#[test]
fn a_data_directory_that_is_a_file_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = write(directory.path(), "");
    let ports = ["--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"];
    let (code, _, error) = ended(fusebox().args(ports).args(["--data", &file]));
    assert_eq!(code, 1);
    assert!(error.contains("it must be a directory that this user can write"), "{error}");
}

#[test]
fn a_flag_counts_more_than_the_environment_and_that_more_than_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let file = format!("storage: {{path: {}}}\n", path("file").display());
    let file = write(directory.path(), &file);

    let by_file = Running::start(fusebox().env("FUSEBOX_CONFIG", &file));
    assert!(path("file").exists());
    drop(by_file);
    let environment = |command: &mut Command| {
        command.env("FUSEBOX_CONFIG", &file).env("FUSEBOX_DATA", path("environment"));
    };
    let mut command = fusebox();
    environment(&mut command);
    drop(Running::start(&mut command));
    assert!(path("environment").exists());
    let mut command = fusebox();
    environment(&mut command);
    drop(Running::start(command.arg("--data").arg(path("flag"))));
    assert!(path("flag").exists());
}
