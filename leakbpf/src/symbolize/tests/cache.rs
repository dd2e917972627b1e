//! Names from an earlier session.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::fixture::{Fixture, build_id_of, run};
use super::*;

/// A session with the cache in `/cache` of the fixture: names of `addresses` in `path`. Tells
/// whether debug information was read.
fn session(fixture: &Fixture, path: &str, addresses: &[u64]) -> (Vec<Vec<Symbol>>, bool) {
    let mut symbolizer = Symbolizer::new(Limits::default(), Vec::new());
    let caches = fixture.root().join("cache");
    let variable = |name: &str| (name == "XDG_CACHE_HOME").then(|| caches.clone());
    symbolizer.use_cache(Cache::open(variable).expect("cache"));
    let module = symbolizer.add(fixture.module(path));
    let symbols = addresses.iter().map(|&svma| symbolizer.name(module, svma, false)).collect();
    let has_read = symbolizer.modules[module.0].is_loaded();
    symbolizer.save();
    (symbols, has_read)
}

fn kept_files(fixture: &Fixture) -> Vec<PathBuf> {
    let list = |path: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(path).expect("list");
        entries.map(|entry| entry.expect("entry").path()).collect()
    };
    let names = fixture.root().join("cache/leakbpf/names");
    list(&names).iter().flat_map(|directory| list(directory)).collect()
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("mode");
}

/// A stripped library, its functions, and the path of its debug file, which is elsewhere.
fn stripped() -> (Fixture, Vec<u64>, PathBuf) {
    let fixture = Fixture::new();
    fixture.compile_c("/lib/fixture.so");
    let addresses =
        ["outer", "hidden", "entry"].map(|name| fixture.symbol("/lib/fixture.so", name).0);
    fixture.split("/lib/fixture.so", "/elsewhere/fixture.debug", false);
    let id = build_id_of(&fixture.real("/lib/fixture.so"));
    let place = format!("/usr/lib/debug/.build-id/{}/{}.debug", &id[..2], &id[2..]);
    let place = fixture.real(&place);
    (fixture, addresses.into(), place)
}

#[test]
fn the_second_session_reads_no_debug_information_and_has_the_same_names() {
    let fixture = Fixture::new();
    fixture.compile_c("/lib/fixture.so");
    let (outer, size) = fixture.symbol("/lib/fixture.so", "outer");
    let addresses: Vec<u64> = (outer..outer + size).chain([0, 0x10_0000]).collect();
    let (cold, has_read) = session(&fixture, "/lib/fixture.so", &addresses);
    assert!(has_read);
    assert!(cold.iter().any(|symbols| symbols.len() == 3));
    let (warm, has_read) = session(&fixture, "/lib/fixture.so", &addresses);
    assert!(!has_read);
    assert_eq!(warm, cold);
    assert_eq!(kept_files(&fixture).len(), 1);

    // What is new is added.
    let (entry, _) = fixture.symbol("/lib/fixture.so", "entry");
    assert!(session(&fixture, "/lib/fixture.so", &[entry]).1);
    let (_, has_read) = session(&fixture, "/lib/fixture.so", &[&addresses[..], &[entry]].concat());
    assert!(!has_read);
}

#[test]
fn names_made_without_a_debug_file_do_not_hide_it_and_those_made_with_it_stay() {
    let (fixture, addresses, place) = stripped();
    let (poor, _) = session(&fixture, "/lib/fixture.so", &addresses);
    assert_eq!(functions(&poor[0]), ["outer"]);
    assert!(poor[0][0].line.is_none() && poor[1].is_empty());
    // Kept, but only until there is something better.
    assert_eq!(session(&fixture, "/lib/fixture.so", &addresses).0, poor);

    // Only a symbol table at first, then all of it.
    let debug = fixture.real("/elsewhere/fixture.debug");
    run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&place).arg(&debug));
    let (better, _) = session(&fixture, "/lib/fixture.so", &addresses);
    assert_eq!(functions(&better[1]), ["hidden"]);
    assert!(better[1][0].line.is_none());
    fs::rename(&debug, &place).expect("moved");
    let (best, _) = session(&fixture, "/lib/fixture.so", &addresses);
    assert_eq!(functions(&best[1]), ["hidden"]);
    assert!(best.iter().all(|symbols| symbols.iter().all(|symbol| symbol.line.is_some())));

    // The package is removed again; what is known stays known.
    fs::remove_file(&place).expect("removed");
    let (kept, has_read) = session(&fixture, "/lib/fixture.so", &addresses);
    assert_eq!(kept, best);
    assert!(!has_read);
    // And is not replaced by what is found now for other addresses.
    session(&fixture, "/lib/fixture.so", &[addresses[0] + 1]);
    assert_eq!(session(&fixture, "/lib/fixture.so", &addresses).0, best);
}

#[test]
fn a_broken_cache_costs_nothing_but_time() {
    let fixture = Fixture::new();
    fixture.compile_c("/lib/fixture.so");
    let (hidden, _) = fixture.symbol("/lib/fixture.so", "hidden");
    let expected = session(&fixture, "/lib/fixture.so", &[hidden]).0;
    let file = kept_files(&fixture).remove(0);
    let intact = fs::read(&file).expect("file");
    let mut flipped = intact.clone();
    flipped[intact.len() / 2] ^= 1;
    for bytes in [&b""[..], b"x", &intact[..intact.len() - 1], &flipped] {
        fs::write(&file, bytes).expect("damaged");
        assert_eq!(session(&fixture, "/lib/fixture.so", &[hidden]).0, expected);
        assert_eq!(fs::read(&file).expect("file"), intact, "it is written anew");
    }
    // Not even a place to write to.
    fs::remove_file(&file).expect("removed");
    fs::create_dir(&file).expect("directory");
    assert_eq!(session(&fixture, "/lib/fixture.so", &[hidden]).0, expected);
}

#[test]
fn nothing_is_kept_for_what_others_could_have_written() {
    let fixture = Fixture::new();
    fixture.compile_c("/lib/fixture.so");
    let (hidden, _) = fixture.symbol("/lib/fixture.so", "hidden");
    set_mode(&fixture.real("/lib/fixture.so"), 0o777);
    session(&fixture, "/lib/fixture.so", &[hidden]);
    assert!(kept_files(&fixture).is_empty());

    let (fixture, addresses, place) = stripped();
    fs::rename(fixture.real("/elsewhere/fixture.debug"), &place).expect("moved");
    set_mode(&place, 0o666);
    let (symbols, _) = session(&fixture, "/lib/fixture.so", &addresses);
    assert_eq!(functions(&symbols[1]), ["hidden"]);
    assert!(kept_files(&fixture).is_empty());
    set_mode(&place, 0o644);
    session(&fixture, "/lib/fixture.so", &addresses);
    assert_eq!(kept_files(&fixture).len(), 1);
}

#[test]
fn a_forged_build_id_gives_no_names_to_another_target() {
    let honest = Fixture::new();
    honest.compile_c("/lib/fixture.so");
    let (hidden, _) = honest.symbol("/lib/fixture.so", "hidden");
    let id = build_id_of(&honest.real("/lib/fixture.so"));
    let forger = Fixture::new();
    let source = fixture::C_SOURCE.replace("hidden", "forged");
    let flag = format!("-Wl,--build-id=0x{id}");
    forger.compile("/src/fixture.c", &source, "/lib/fixture.so", &[&flag]);
    // Both sessions use the same cache.
    std::os::unix::fs::symlink(honest.root().join("cache"), forger.root().join("cache"))
        .expect("link");
    fs::create_dir(honest.root().join("cache")).expect("directory");
    let (symbols, _) = session(&forger, "/lib/fixture.so", &[hidden]);
    assert_eq!(functions(&symbols[0]), ["forged"]);
    let (symbols, _) = session(&honest, "/lib/fixture.so", &[hidden]);
    assert_eq!(functions(&symbols[0]), ["hidden"]);
    assert_eq!(kept_files(&honest).len(), 2);
}

#[test]
fn a_module_without_a_build_id_is_not_kept() {
    let fixture = Fixture::new();
    let flags = ["-Wl,--build-id=none"];
    fixture.compile("/src/fixture.c", fixture::C_SOURCE, "/lib/fixture.so", &flags);
    let (hidden, _) = fixture.symbol("/lib/fixture.so", "hidden");
    session(&fixture, "/lib/fixture.so", &[hidden]);
    assert!(kept_files(&fixture).is_empty());
}

#[test]
fn names_that_are_new_survive_when_memory_is_short() {
    let fixture = Fixture::new();
    fixture.compile_c("/lib/fixture.so");
    let (hidden, _) = fixture.symbol("/lib/fixture.so", "hidden");
    let limits = Limits { retained_bytes: 0, ..Limits::default() };
    for is_warm in [false, true] {
        let mut symbolizer = Symbolizer::new(limits.clone(), Vec::new());
        let caches = fixture.root().join("cache");
        let variable = |name: &str| (name == "XDG_CACHE_HOME").then(|| caches.clone());
        symbolizer.use_cache(Cache::open(variable).expect("cache"));
        let module = symbolizer.add(fixture.module("/lib/fixture.so"));
        for _ in 0..2 {
            assert_eq!(functions(&symbolizer.name(module, hidden, false)), ["hidden"]);
            symbolizer.rest();
        }
        symbolizer.name(module, hidden, false);
        assert!(!symbolizer.modules[module.0].is_loaded(), "{is_warm}");
        symbolizer.save();
        symbolizer.close(module);
        assert!(symbolizer.name(module, hidden, false).is_empty());
        assert_eq!(kept_files(&fixture).len(), 1);
    }
}
