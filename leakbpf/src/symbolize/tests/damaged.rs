//! Files that are broken, by accident or to break their reader.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::fixture::Fixture;
use super::*;

fn intact() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let fixture = Fixture::new();
        fixture.compile_c("/lib/fixture.so");
        fs::read(fixture.real("/lib/fixture.so")).expect("fixture")
    })
}

/// Asks for names all over a file; what they are does not matter.
fn name_everywhere(bytes: Vec<u8>) {
    let mut symbolizer = Symbolizer::new(Limits::default(), Vec::new());
    let module = symbolizer.add(ModuleSource {
        path: PathBuf::from("/nowhere/damaged"),
        image: Source::Memory(Arc::from(bytes)),
        root: PathBuf::from("/nowhere"),
    });
    for svma in (0x1000..0x1200).step_by(13).chain([0, 1, u64::MAX]) {
        let _ = symbolizer.name(module, svma, true);
    }
    for problem in symbolizer.problems(module) {
        assert!(!problem.to_string().is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_truncated_file_never_panics(keep in 0.0f64..1.0) {
        let keep = (intact().len() as f64 * keep) as usize;
        name_everywhere(intact()[..keep].to_vec());
    }

    #[test]
    fn a_mutated_file_never_panics(
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..40),
    ) {
        let mut bytes = intact().to_vec();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        name_everywhere(bytes);
    }

    /// The headers are a small part of the file, and steer everything.
    #[test]
    fn mutated_debug_sections_and_headers_never_panic(
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..20),
    ) {
        static RANGES: OnceLock<Vec<usize>> = OnceLock::new();
        let positions = RANGES.get_or_init(|| {
            use object::{Object, ObjectSection};
            let file = object::File::parse(intact()).expect("ELF");
            let table = intact().len() - file.sections().count() * 64;
            let debug = file.sections()
                .filter(|section| section.name().is_ok_and(|name| name.starts_with(".debug")))
                .filter_map(|section| section.file_range())
                .flat_map(|(offset, size)| offset as usize..(offset + size) as usize);
            (0..64).chain(table..intact().len()).chain(debug).collect()
        });
        let mut bytes = intact().to_vec();
        for (at, byte) in changes {
            bytes[positions[at.index(positions.len())]] = byte;
        }
        name_everywhere(bytes);
    }
}

#[test]
fn a_section_that_claims_to_unpack_to_a_terabyte_is_refused() {
    let fixture = Fixture::new();
    fixture.compile("/src/fixture.c", fixture::C_SOURCE, "/lib/fixture.so", &["-gz=zlib"]);
    let path = fixture.real("/lib/fixture.so");
    let (outer, _) = fixture.symbol("/lib/fixture.so", "outer");
    let mut bytes = fs::read(&path).expect("fixture");
    let offset = {
        use object::{Object, ObjectSection};
        let file = object::File::parse(&*bytes).expect("ELF");
        let section = file.section_by_name(".debug_info").expect("debug information");
        section.file_range().expect("contents").0 as usize
    };
    bytes[offset + 8..offset + 16].copy_from_slice(&(1u64 << 40).to_le_bytes());
    fs::write(&path, bytes).expect("changed");

    let (mut symbolizer, module) = fixture.symbolizer("/lib/fixture.so");
    assert_eq!(functions(&symbolizer.name(module, outer, false)), ["outer"]);
    let problem = symbolizer.problems(module)[0].to_string();
    assert!(problem.contains("1099511627776"), "{problem}");
}

/// Inlined calls that are inlined into each other without end, as no compiler writes them.
#[test]
fn calls_inlined_a_million_deep_are_cut_and_do_not_exhaust_the_stack() {
    let fixture = Fixture::new();
    let source = r#"
        .text
    low: .fill 64, 1, 0x90
        .section .debug_abbrev, "", @progbits
        .byte 1, 0x11, 1, 0x11, 0x01, 0x12, 0x06, 0, 0
        .byte 2, 0x2e, 1, 0x03, 0x08, 0x11, 0x01, 0x12, 0x06, 0, 0
        .byte 3, 0x1d, 1, 0x11, 0x01, 0x12, 0x0b, 0, 0
        .byte 0
        .section .debug_info, "", @progbits
        .long 2f - 1f
    1:  .short 4
        .long 0
        .byte 8
        .byte 1
        .quad low
        .long 64
        .byte 2
        .asciz "abyss"
        .quad low
        .long 64
        .rept 1000000
        .byte 3
        .quad low
        .byte 64
        .endr
    2:
    "#;
    fixture.compile("/src/abyss.s", source, "/lib/abyss.so", &["-g0", "-nostdlib"]);
    let (low, _) = fixture.symbol("/lib/abyss.so", "low");
    // It is the depth that cuts them, on a slow machine as well.
    let hour = Duration::from_secs(3600);
    let time = WorkTime { index: hour, lookup: hour, ..WorkTime::default() };
    let mut symbolizer = Symbolizer::new(Limits { time, ..Limits::default() }, Vec::new());
    let module = symbolizer.add(fixture.module("/lib/abyss.so"));
    let symbols = symbolizer.name(module, low + 1, false);
    assert_eq!(symbols.len(), 257);
    assert_eq!(functions(&symbols).last(), Some(&"abyss"));
}

/// The time for one name is bounded whatever the assembler made of `source`, which defines `low`.
fn named_in_time(source: &str) {
    let fixture = Fixture::new();
    fixture.compile("/src/slow.s", source, "/lib/slow.so", &["-g0", "-nostdlib"]);
    let (low, _) = fixture.symbol("/lib/slow.so", "low");
    let (mut symbolizer, module) = fixture.symbolizer("/lib/slow.so");
    let start = Instant::now();
    let symbols = symbolizer.name(module, low + 1, false);
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    assert_eq!(functions(&symbols), ["low"], "the symbol table is asked then");
    let problem = symbolizer.problems(module)[0].to_string();
    assert!(problem.contains("more work than an honest file needs"), "{problem}");
}

#[test]
fn a_list_of_ranges_that_says_nothing_is_not_read_for_each_function() {
    // 0x05 is DW_RLE_base_address, and here also the address.
    named_in_time(
        r#"
        .text
        .globl low
        .type low, @function
    low: .fill 64, 1, 0x90
        .size low, 64
        .section .debug_abbrev, "", @progbits
        .byte 1, 0x11, 1, 0x11, 0x01, 0x12, 0x06, 0, 0
        .byte 2, 0x2e, 0, 0x55, 0x17, 0, 0
        .byte 0
        .section .debug_info, "", @progbits
        .long 2f - 1f
    1:  .short 5
        .byte 1, 8
        .long 0
        .byte 1
        .quad low
        .long 64
        .rept 5000
        .byte 2
        .long 12
        .endr
    2:
        .section .debug_rnglists, "", @progbits
        .long 4f - 3f
    3:  .short 5
        .byte 8, 0
        .long 0
        .fill 27000000, 1, 5
        .byte 0
    4:
        "#,
    );
}

#[test]
fn attributes_that_take_no_room_are_not_read_without_end() {
    named_in_time(
        r#"
        .text
        .globl low
        .type low, @function
    low: .fill 64, 1, 0x90
        .size low, 64
        .section .debug_abbrev, "", @progbits
        .byte 1, 0x11, 1, 0x11, 0x01, 0x12, 0x06, 0, 0
        .byte 2, 0x2e, 0
        .fill 500000, 2, 0x193f # DW_AT_external, DW_FORM_flag_present
        .byte 0, 0
        .byte 0
        .section .debug_info, "", @progbits
        .long 2f - 1f
    1:  .short 4
        .long 0
        .byte 8
        .byte 1
        .quad low
        .long 64
        .fill 100000, 1, 2
    2:
        "#,
    );
}

#[test]
fn a_long_list_of_files_is_not_read_for_each_inlined_call() {
    named_in_time(
        r#"
        .text
        .globl low
        .type low, @function
    low: .fill 64, 1, 0x90
        .size low, 64
        .section .debug_abbrev, "", @progbits
        .byte 1, 0x11, 1, 0x11, 0x01, 0x12, 0x06, 0x10, 0x17, 0, 0
        .byte 2, 0x2e, 1, 0x03, 0x08, 0x11, 0x01, 0x12, 0x06, 0, 0
        .byte 3, 0x1d, 1, 0x11, 0x01, 0x12, 0x0b, 0x58, 0x05, 0, 0
        .byte 0
        .section .debug_info, "", @progbits
        .long 2f - 1f
    1:  .short 4
        .long 0
        .byte 8
        .byte 1
        .quad low
        .long 64
        .long 0
        .byte 2
        .asciz "outermost"
        .quad low
        .long 64
        .set number, 1
        .rept 256
        .byte 3
        .quad low
        .byte 64
        .short number
        .set number, number + 1
        .endr
    2:
        .section .debug_line, "", @progbits
        .long 6f - 3f
    3:  .short 4
        .long 5f - 4f
    4:  .byte 1, 1, 1, 0xfb, 14, 13
        .byte 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1
        .byte 0
        .rept 1000000
        .asciz "f"
        .byte 0, 0, 0
        .endr
        .byte 0
    5:
    6:
        "#,
    );
}

#[test]
fn large_tables_of_abbreviations_do_not_pile_up() {
    let fixture = Fixture::new();
    let source = r#"
        .text
        .globl low
        .type low, @function
    low: .fill 4096, 1, 0x90
        .size low, 4096
        .section .debug_abbrev, "", @progbits
    tables:
        .set unit, 0
        .rept 16
    1:  .byte 1, 0x11, 0, 0x11, 0x01, 0x12, 0x06, 0, 0
        .set code, 2
        .rept 30000
        .uleb128 code
        .byte 0x2e, 0, 0, 0
        .set code, code + 1
        .endr
        .byte 0
        .pushsection .debug_info, "", @progbits
        .long 3f - 2f
    2:  .short 4
        .long 1b - tables
        .byte 8
        .byte 1
        .quad low + unit
        .long 16
    3:
        .popsection
        .set unit, unit + 16
        .endr
    "#;
    fixture.compile("/src/tables.s", source, "/lib/tables.so", &["-g0", "-nostdlib"]);
    let (low, _) = fixture.symbol("/lib/tables.so", "low");
    let (mut symbolizer, module) = fixture.symbolizer("/lib/tables.so");
    let mut sizes = Vec::new();
    for unit in 0..16 {
        assert_eq!(functions(&symbolizer.name(module, low + unit * 16, false)), ["low"]);
        sizes.push(symbolizer.modules[module.0].size_bytes());
    }
    assert!(symbolizer.problems(module).is_empty(), "{:?}", symbolizer.problems(module));
    // A table takes 190 kB in the file and 3 MB in memory: five are kept.
    let kept = sizes.iter().max().unwrap() - sizes[0];
    assert!((8 << 20..24 << 20).contains(&kept), "{sizes:?}");
}

#[test]
fn a_file_that_is_no_elf_file_has_a_problem_and_no_names() {
    for bytes in [&b""[..], b"#!/bin/sh\n", &[0x7f; 4096]] {
        let mut symbolizer = Symbolizer::new(Limits::default(), Vec::new());
        let module = symbolizer.add(ModuleSource {
            path: PathBuf::from("/bin/script"),
            image: Source::Memory(Arc::from(bytes)),
            root: PathBuf::from("/"),
        });
        assert!(symbolizer.name(module, 0x1000, false).is_empty());
        let problem = symbolizer.problems(module)[0].to_string();
        assert!(problem.contains("/bin/script is not"), "{problem}");
    }
}
