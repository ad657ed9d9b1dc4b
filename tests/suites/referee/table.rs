//! Whether the table of facts is true of the scripts and tests that it names.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// Where the table and the scripts are.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("referee")
}

/// The scripts beside the table.
pub fn scripts() -> Vec<PathBuf> {
    let files = std::fs::read_dir(folder()).expect("the folder");
    let paths = files.map(|file| file.expect("a file").path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "txt")).collect()
}

/// What became of a fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    Replayed,
    /// Replayed, where we answer otherwise on purpose.
    Boundary,
    NotExpressible,
    OfTheSdk,
    /// Of what stands behind envoyproxy/ratelimit, and not behind ours.
    Backend,
}

/// What stands behind envoyproxy/ratelimit.
const BACKENDS: [&str; 4] = ["Redis", "memcached", "xDS", "local cache"];

#[derive(Debug)]
struct Row {
    id: String,
    fate: Fate,
    /// The script, or the test as `path::name`.
    place: String,
}

fn rows() -> Vec<Row> {
    let table = std::fs::read_to_string(folder().join("README.md")).expect("the table");
    let rows = table.lines().filter(|line| is_id(line.trim_start_matches("| ")));
    let rows = rows.map(|line| {
        let columns: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [id, fact, fate, why, place] = columns[..] else { panic!("five columns, not {line}") };
        let fate = match fate {
            "replayed" => Fate::Replayed,
            "boundary" => Fate::Boundary,
            "not expressible" => Fate::NotExpressible,
            "SDK" => Fate::OfTheSdk,
            "backend" => {
                let of_one = BACKENDS.iter().any(|name| fact.contains(name) || why.contains(name));
                assert!(of_one, "{id} is of no backend");
                Fate::Backend
            }
            other => panic!("{id}: no fate `{other}`"),
        };
        assert!(fate == Fate::Replayed || !why.is_empty(), "{id} must say why");
        Row { id: id.to_owned(), fate, place: place.trim_matches('`').to_owned() }
    });
    rows.collect()
}

/// Whether it begins with the id of a fact.
fn is_id(text: &str) -> bool {
    let envoys = ["E-4-", "E-A-", "E-B-", "E-C-", "E-D-", "E-E-", "E-F-"];
    let others = ["L-LIB-", "L-SRV-", "L-KUA-", "G-", "OURS-"];
    let is_numbered = envoys.iter().chain(&others).any(|family| {
        let number = text.strip_prefix(family);
        number.is_some_and(|number| number.starts_with(|c: char| c.is_ascii_digit()))
    });
    is_numbered || is_of_circuits(text.split(' ').next().unwrap_or_default())
}

/// The facts about circuits. Their numbers have gaps.
const CIRCUITS: &str = "
    R01 R02 R03 R04 R05 R06 R08 R09 R10 R11 R13 R14 R15 R16 R17 R18 R19 R21 R22 R23 R25 R26 R27 R28 R29 R30 R31
    G01 G02 G03 G04 G05 G06 G07 G08 G09 G10 G12 G14 G15 G16
    F01 F02 F03 F04 F05 F06 F07 F08 F09 F10 F11 F12 F13 F14 F15 F16 F17 F18 F19 F20 F21 F23
    P01 P02 P03 P04 P06 P07 H01 H02 H03 SE1 SE2 L02 L03 T01 T02 I01 I02 I04 I06 I07 I08 I09
";

fn is_of_circuits(id: &str) -> bool {
    CIRCUITS.split_whitespace().any(|known| known == id)
}

/// Every id in the comments of the scripts, and the scripts that it is in.
fn replayed() -> BTreeMap<String, Vec<String>> {
    let mut ids = BTreeMap::<String, Vec<String>>::new();
    for path in scripts() {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&path).expect("a script");
        for line in text.lines().filter(|line| line.starts_with('#')) {
            let words = line.split([' ', ',', ':', '(', ')', '.']);
            for id in words.filter(|word| is_id(word)) {
                ids.entry(id.to_owned()).or_default().push(name.clone());
            }
        }
    }
    ids
}

#[test]
fn a_fact_has_one_row_and_the_rows_are_numbered_without_a_gap() {
    let mut last = BTreeMap::<String, u32>::new();
    for Row { id, .. } in rows().into_iter().filter(|row| !is_of_circuits(&row.id)) {
        let (family, number) = id.rsplit_once('-').unwrap();
        let last = last.entry(family.to_owned()).or_default();
        *last += 1;
        assert_eq!(number.parse(), Ok(*last), "{id}");
    }
}

#[test]
fn every_row_that_is_replayed_is_where_it_says() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ids = replayed();
    for Row { id, fate, place } in rows() {
        let scripts = ids.get(&id).map_or(&[][..], Vec::as_slice);
        match (fate, place.rsplit_once("::")) {
            (Fate::NotExpressible | Fate::OfTheSdk | Fate::Backend, _) => {
                assert!(scripts.is_empty() && place.is_empty(), "{id} is not replayed");
            }
            (Fate::Replayed | Fate::Boundary, None) => {
                assert_eq!(scripts, [place], "{id} is in one script, once");
            }
            (Fate::Replayed | Fate::Boundary, Some((path, name))) => {
                assert!(scripts.is_empty(), "{id} is in a script, too");
                let source = std::fs::read_to_string(tests.join(path));
                let source = source.unwrap_or_else(|error| panic!("{id}: {path}: {error}"));
                assert!(source.contains(&format!("fn {name}(")), "{id}: no {name} in {path}");
            }
        }
    }
}

#[test]
fn every_id_of_a_script_has_a_row() {
    let rows: BTreeSet<_> = rows().into_iter().map(|row| row.id).collect();
    for id in replayed().keys() {
        assert!(rows.contains(id), "{id} has no row");
    }
}

#[test]
fn every_fact_about_circuits_has_one_row() {
    let rows = rows().into_iter().map(|row| row.id).filter(|id| is_of_circuits(id));
    assert_eq!(rows.collect::<Vec<_>>(), CIRCUITS.split_whitespace().collect::<Vec<_>>());
}

/// How many of these rows have which fate.
fn count(is_counted: impl Fn(&str) -> bool) -> BTreeMap<Fate, usize> {
    let mut count = BTreeMap::new();
    for Row { fate, .. } in rows().iter().filter(|row| is_counted(&row.id)) {
        *count.entry(*fate).or_default() += 1;
    }
    println!("{count:?}");
    count
}

/// Whether the table says it so, in whatever lines.
fn assert_told(told: &str) {
    let table = std::fs::read_to_string(folder().join("README.md")).expect("the table");
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words(&table).contains(&words(told)), "the table says: {told}");
}

#[test]
fn all_of_ours_and_nine_in_ten_of_what_we_can_express_are_replayed() {
    for Row { id, fate, .. } in rows() {
        let is_replayed = matches!(fate, Fate::Replayed | Fate::Boundary);
        assert!(is_replayed || !id.starts_with("OURS-"), "{id} is our own");
    }
    let count = count(|id| !id.starts_with("E-") && !is_of_circuits(id));
    let of = |fate| count.get(&fate).copied().unwrap_or(0);
    let (replayed, all) = (of(Fate::Replayed) + of(Fate::Boundary), count.values().sum::<usize>());
    let expressible = all - of(Fate::NotExpressible) - of(Fate::OfTheSdk);
    assert!(10 * replayed >= 9 * expressible, "{replayed} of {expressible}");
    // Else "not expressible" would be a way out.
    assert!(3 * replayed >= 2 * all, "{replayed} of {all}");
}

#[test]
fn nineteen_in_twenty_of_envoys_service_are_replayed_but_for_its_backends() {
    let count = count(|id| id.starts_with("E-"));
    let of = |fate| count.get(&fate).copied().unwrap_or(0);
    let (all, backends) = (count.values().sum::<usize>(), of(Fate::Backend));
    let (replayed, boundaries) = (of(Fate::Replayed), of(Fate::Boundary));
    let others = all - backends;
    assert!(20 * (replayed + boundaries) >= 19 * others, "{replayed} + {boundaries} of {others}");
    // Else to differ, or to have no backend, would be a way out.
    assert!(10 * boundaries <= replayed, "{boundaries} boundaries");
    assert!(7 * backends <= all, "{backends} of backends");

    let told = format!(
        "Of {all} rows of envoyproxy/ratelimit {backends} are of its backends. Of the other {others}, {replayed} \
         are replayed, {boundaries} are boundaries, and {} cannot be expressed.",
        of(Fate::NotExpressible)
    );
    assert_told(&told);
}

#[test]
fn nine_in_ten_of_what_we_can_express_of_circuits_are_replayed() {
    let count = count(is_of_circuits);
    let of = |fate| count.get(&fate).copied().unwrap_or(0);
    let (all, of_the_sdk) = (count.values().sum::<usize>(), of(Fate::OfTheSdk));
    let (replayed, boundaries) = (of(Fate::Replayed), of(Fate::Boundary));
    let mute = of(Fate::NotExpressible);
    let others = all - of_the_sdk - mute;
    assert!(10 * (replayed + boundaries) >= 9 * others, "{replayed} + {boundaries} of {others}");
    // Else each of these would be a way out.
    assert!(3 * boundaries <= replayed, "{boundaries} boundaries");
    assert!(6 * (of_the_sdk + mute) <= all, "{of_the_sdk} of the SDK, {mute} not expressible");

    assert_told(&format!(
        "Of {all} rows of circuits {of_the_sdk} are the SDK's, and {mute} cannot be expressed. Of the other \
         {others}, {replayed} are replayed, and {boundaries} are boundaries."
    ));
}
