//! Debug files apart from their modules.

use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom, Write};

use super::fixture::{
    DWZ_MAIN_SOURCE, DWZ_SHARED_BUILD_ID, DWZ_SHARED_SOURCE, Fixture, build_id_of,
};
use super::*;

/// A stripped module whose debug file lies at `debug_path`; the address of its static function,
/// which only the debug file names.
fn split(debug_path: &str, with_link: bool) -> (Fixture, u64) {
    let fixture = Fixture::new();
    fixture.compile_c("/usr/lib/fixture.so");
    let (hidden, _) = fixture.symbol("/usr/lib/fixture.so", "hidden");
    fixture.split("/usr/lib/fixture.so", debug_path, with_link);
    (fixture, hidden)
}

fn expect_found(fixture: &Fixture, hidden: u64) {
    let (mut symbolizer, module) = fixture.symbolizer("/usr/lib/fixture.so");
    let symbols = symbolizer.name(module, hidden, false);
    assert_eq!(functions(&symbols), ["hidden"]);
    assert!(symbols[0].line.is_some());
    assert!(symbolizer.problems(module).is_empty());
}

#[test]
fn a_linked_debug_file_is_found_in_each_of_its_places() {
    for place in [
        "/usr/lib/fixture.debug",
        "/usr/lib/.debug/fixture.debug",
        "/usr/lib/debug/usr/lib/fixture.debug",
        "/usr/lib/debug/lib/fixture.debug",
    ] {
        let (fixture, hidden) = split(place, true);
        expect_found(&fixture, hidden);
    }
}

#[test]
fn a_debug_file_is_found_by_build_id() {
    let (fixture, hidden) = split("/elsewhere/fixture.debug", false);
    let id = build_id_of(&fixture.real("/usr/lib/fixture.so"));
    let place = format!("/usr/lib/debug/.build-id/{}/{}.debug", &id[..2], &id[2..]);
    fs::rename(fixture.real("/elsewhere/fixture.debug"), fixture.real(&place)).expect("moved");
    expect_found(&fixture, hidden);
}

#[test]
fn a_debug_file_is_found_in_the_debuginfod_cache() {
    let (fixture, hidden) = split("/elsewhere/fixture.debug", false);
    let id = build_id_of(&fixture.real("/usr/lib/fixture.so"));
    let cached = fixture.real(&format!("/home/.cache/debuginfod_client/{id}/debuginfo"));
    fs::rename(fixture.real("/elsewhere/fixture.debug"), cached).expect("moved");

    let home = fixture.root().join("home");
    let caches = debuginfod_caches(|name| (name == "HOME").then(|| home.clone()));
    let mut symbolizer = Symbolizer::new(Limits::default(), caches);
    let module = symbolizer.add(fixture.module("/usr/lib/fixture.so"));
    assert_eq!(functions(&symbolizer.name(module, hidden, false)), ["hidden"]);
}

/// What debuginfod clients leave when no server has the file.
#[test]
fn an_empty_file_in_the_debuginfod_cache_is_none() {
    let (fixture, hidden) = split("/elsewhere/fixture.debug", false);
    let id = build_id_of(&fixture.real("/usr/lib/fixture.so"));
    let caches = vec![fixture.root().join("cache")];
    fs::write(fixture.real(&format!("/cache/{id}/debuginfo")), "").expect("empty file");
    let mut symbolizer = Symbolizer::new(Limits::default(), caches);
    let module = symbolizer.add(fixture.module("/usr/lib/fixture.so"));
    assert!(symbolizer.name(module, hidden, false).is_empty());
    assert!(symbolizer.problems(module).is_empty(), "{:?}", symbolizer.problems(module));
}

#[test]
fn a_debug_file_with_another_checksum_is_refused() {
    let (fixture, hidden) = split("/usr/lib/fixture.debug", true);
    let mut file = OpenOptions::new()
        .append(true)
        .open(fixture.real("/usr/lib/fixture.debug"))
        .expect("debug file");
    file.write_all(b"x").expect("changed");
    let (mut symbolizer, module) = fixture.symbolizer("/usr/lib/fixture.so");
    assert!(symbolizer.name(module, hidden, false).is_empty());
    let problem = symbolizer.problems(module)[0].to_string();
    assert!(problem.contains("CRC-32"), "{problem}");
}

#[test]
fn a_debug_file_with_another_build_id_is_refused() {
    let (fixture, hidden) = split("/elsewhere/fixture.debug", false);
    let id = build_id_of(&fixture.real("/usr/lib/fixture.so"));
    let other = fixture.real("/elsewhere/fixture.debug");
    let mut bytes = fs::read(&other).expect("debug file");
    let raw: Vec<u8> = (0..id.len() / 2)
        .map(|at| u8::from_str_radix(&id[2 * at..2 * at + 2], 16).expect("hexadecimal"))
        .collect();
    let at = bytes.windows(raw.len()).position(|window| window == raw).expect("build id");
    bytes[at] ^= 1;
    let place = format!("/usr/lib/debug/.build-id/{}/{}.debug", &id[..2], &id[2..]);
    fs::write(fixture.real(&place), bytes).expect("written");

    let (mut symbolizer, module) = fixture.symbolizer("/usr/lib/fixture.so");
    assert!(symbolizer.name(module, hidden, false).is_empty());
    let problem = symbolizer.problems(module)[0].to_string();
    assert!(problem.contains("build id"), "{problem}");
}

#[test]
fn links_of_the_target_do_not_lead_out_of_its_root() {
    let (fixture, hidden) = split("/elsewhere/fixture.debug", true);
    // Absolute: only below the target's root is there such a file.
    std::os::unix::fs::symlink("/elsewhere/fixture.debug", fixture.real("/usr/lib/fixture.debug"))
        .expect("link");
    expect_found(&fixture, hidden);
}

#[test]
fn a_debug_file_that_shrinks_while_it_is_read_costs_names_only() {
    let (fixture, hidden) = split("/usr/lib/fixture.debug", true);
    let (mut symbolizer, module) = fixture.symbolizer("/usr/lib/fixture.so");
    assert_eq!(functions(&symbolizer.name(module, hidden, false)), ["hidden"]);
    for path in ["/usr/lib/fixture.debug", "/usr/lib/fixture.so"] {
        let mut file = OpenOptions::new().write(true).open(fixture.real(path)).expect("file");
        file.set_len(100).expect("truncated");
        file.seek(SeekFrom::Start(0)).expect("seek");
    }
    symbolizer.rest();
    assert!(symbolizer.name(module, hidden, false).is_empty());
}

#[test]
fn names_that_dwz_moved_to_a_shared_file_are_found() {
    let fixture = Fixture::new();
    let flags = ["-g0", "-nostdlib", "-Wl,--build-id=none"];
    let shared_flags = ["-g0", "-nostdlib", DWZ_SHARED_BUILD_ID];
    fixture.compile("/src/shared.s", DWZ_SHARED_SOURCE, "/shared/common.dwz", &shared_flags);
    fixture.compile("/src/main.s", DWZ_MAIN_SOURCE, "/lib/main.so", &flags);
    let low = fixture.text("/lib/main.so");
    let (mut symbolizer, module) = fixture.symbolizer("/lib/main.so");
    let mut name = |offset| symbolizer.name(module, low + offset, false);
    assert_eq!(functions(&name(3)), ["from_the_shared_file"]);
    assert_eq!(functions(&name(19)), ["also_from_the_shared_file"]);
    assert!(symbolizer.problems(module).is_empty(), "{:?}", symbolizer.problems(module));

    fs::remove_file(fixture.real("/shared/common.dwz")).expect("removed");
    let (mut symbolizer, module) = fixture.symbolizer("/lib/main.so");
    assert!(symbolizer.name(module, low, false).is_empty());
    let problem = symbolizer.problems(module)[0].to_string();
    assert!(problem.contains("dwz"), "{problem}");
}
