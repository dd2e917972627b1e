//! Files that nobody made for this test.

use std::{path::PathBuf, process::Command};

use leakbpf_common::unwind::{Rule, bp, cfa};

use super::assert_sound;
use super::fixture::compile;
use crate::{
    process::{Pid, maps::Maps},
    symbolize::vdso,
    unwind::{Origin, Table},
};

/// The C library of this very process, whatever the distribution calls it.
fn libc() -> PathBuf {
    let maps = Maps::of(Pid::current()).unwrap();
    let (mapping, _) = maps.locate(libc::getpid as *const () as u64).unwrap();
    match &mapping.backing {
        crate::process::maps::Backing::File { path, .. } => path.clone(),
        other => panic!("getpid is in {other:?}"),
    }
}

/// A rule as readelf's columns for CFA, rbp and ra, as far as those tell.
fn columns(rule: Rule) -> (String, &'static str) {
    let frame = match rule.cfa {
        cfa::SP => format!("rsp+{}", rule.a),
        cfa::BP => format!("rbp+{}", rule.a),
        cfa::AT_SP | cfa::AT_BP | cfa::PLT => "exp".to_owned(),
        other => format!("kind {other}"),
    };
    let saved = match rule.bp {
        bp::SAME => "u",
        bp::AT_CFA => "c",
        bp::AT_BP => "exp",
        _ => "lost",
    };
    (frame, saved)
}

#[test]
fn every_row_of_the_c_library_is_as_readelf_interprets_it() {
    let path = libc();
    let table = Table::of_bytes(&std::fs::read(&path).unwrap()).unwrap();
    assert_sound(&table);
    assert_eq!(table.stats.damaged_entries, 0);
    let output = Command::new("readelf")
        .arg("--debug-dump=frames-interp")
        .arg(&path)
        .output()
        .expect("readelf runs; to install it: apt-get install binutils");
    let text = String::from_utf8_lossy(&output.stdout);
    let mut names = Vec::new();
    let (mut compared, mut special) = (0, 0);
    for line in text.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        if words.first() == Some(&"LOC") {
            names = words;
            continue;
        }
        // A row has as many words as the heading, and begins with an address.
        let Some(svma) = words.first().and_then(|word| u64::from_str_radix(word, 16).ok()) else {
            continue;
        };
        // Offsets have half as many digits; the common rows that functions begin with stand at 0.
        if words[0].len() != 16 || words.len() != names.len() || svma == 0 {
            continue;
        }
        let column = |name| names.iter().position(|n| *n == name).map_or("u", |index| words[index]);
        let rule = table.rule(svma);
        match (words[1], column("ra")) {
            (_, "u") => assert_eq!(rule, Rule::END, "{line}"),
            (_, "exp") => assert_eq!(rule, Rule::SIGNAL, "{line}"),
            (frame, "c-8") if frame.starts_with("rsp+") || frame.starts_with("rbp+") => {
                let (ours, saved) = columns(rule);
                assert_eq!(ours, frame, "{line}");
                let theirs = match column("rbp") {
                    "s" => "u",
                    other if other.starts_with('c') => {
                        assert_eq!(format!("c{:+}", rule.bp_offset), other, "{line}");
                        "c"
                    }
                    other => other,
                };
                assert_eq!(saved, theirs, "{line}");
                compared += 1;
                continue;
            }
            ("exp", "c-8") => assert!(matches!(rule.cfa, cfa::PLT | cfa::AT_BP), "{line}"),
            _ => assert_eq!(rule, Rule::UNSUPPORTED, "{line}"),
        }
        special += 1;
    }
    assert!(compared > 10_000 && special >= 4, "{compared} rows, {special} special");
}

#[test]
fn a_file_whose_section_headers_are_gone_gives_the_same_table() {
    let mut bytes = std::fs::read(libc()).unwrap();
    let whole = Table::of_bytes(&bytes).unwrap();
    assert_eq!(whole.stats.origins, [Origin::EhFrame]);
    bytes[0x28..0x30].fill(0);
    bytes[0x3c..0x40].fill(0);
    let bare = Table::of_bytes(&bytes).unwrap();
    assert_eq!(bare.stats.origins, [Origin::EhFrameSegment]);
    assert_eq!((bare.rows, bare.rules, bare.pages), (whole.rows, whole.rules, whole.pages));
}

const TWO_FUNCTIONS: &str = "
    void callee(char *);
    void alone(void) { char block[100]; callee(block); }
    void callee(char *block) { __asm__ volatile(\"\" :: \"r\"(block)); }
";

#[test]
fn debug_frame_serves_where_that_is_all_there_is() {
    let rows = |options: &[&str]| {
        let bytes = compile(TWO_FUNCTIONS, "two.c", &[&["-O1", "-g"], options].concat());
        Table::of_bytes(&bytes).unwrap()
    };
    let eh = rows(&["-fasynchronous-unwind-tables"]);
    for compression in ["-gz=none", "-gz=zlib"] {
        let debug = rows(&["-fno-asynchronous-unwind-tables", compression]);
        assert_sound(&debug);
        assert_eq!(debug.stats.origins.last(), Some(&Origin::DebugFrame));
        assert_eq!(debug.stats.functions, 2);
        let shapes = |table: &Table| {
            let rules = table.rows.iter().map(|row| table.rules[row.rule as usize]);
            // The linker describes its PLT in .eh_frame whatever the compiler does.
            rules.filter(|rule| rule.cfa == cfa::SP && rule.a > 24).collect::<Vec<_>>()
        };
        assert_eq!(shapes(&debug), shapes(&eh));
        assert!(!shapes(&debug).is_empty());
    }
}

#[test]
fn the_vdso_is_a_file_like_others() {
    let table = Table::of_bytes(&vdso::image_bytes().expect("the kernel maps a vDSO")).unwrap();
    assert_sound(&table);
    assert!(table.stats.functions > 3, "{:?}", table.stats);
}
