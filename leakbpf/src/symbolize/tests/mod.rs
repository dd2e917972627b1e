//! Whole modules: compiled here, or what the machine has.

mod cache;
mod damaged;
mod debuginfod;
mod fixture;
mod oracle;
mod separate;
mod split;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use fixture::{CPP_SOURCE, Fixture, symbol_of};

use super::*;

pub(super) fn functions(symbols: &[Symbol]) -> Vec<&str> {
    symbols.iter().map(|symbol| symbol.function.as_str()).collect()
}

/// Opens a file of this machine.
fn installed(path: &Path) -> (Symbolizer, ModuleHandle) {
    let mut symbolizer = Symbolizer::new(Limits::default(), Vec::new());
    let module = symbolizer.add(ModuleSource {
        path: fs::canonicalize(path).expect("path"),
        image: Source::File(File::open(path).expect("file")),
        root: PathBuf::from("/"),
    });
    (symbolizer, module)
}

/// The C library that this very test runs with.
fn libc_path() -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").expect("maps");
    let line = maps.lines().find(|line| line.contains("/libc.so") || line.contains("/libc-2"));
    let path = line.and_then(|line| line.split_whitespace().last());
    PathBuf::from(path.expect("a dynamically linked C library"))
}

#[test]
fn inlined_calls_are_named_innermost_first_with_their_lines() {
    let fixture = Fixture::new();
    fixture.compile_c("/lib/fixture.so");
    let (mut symbolizer, module) = fixture.symbolizer("/lib/fixture.so");
    let (outer, size) = fixture.symbol("/lib/fixture.so", "outer");

    let chains: Vec<Vec<Symbol>> =
        (outer..outer + size).map(|svma| symbolizer.name(module, svma, false)).collect();
    let deepest =
        chains.iter().find(|symbols| symbols.len() == 3).expect("an address in innermost");
    assert_eq!(functions(deepest), ["innermost", "middle", "outer"]);
    let inlined: Vec<bool> = deepest.iter().map(|symbol| symbol.inlined).collect();
    assert_eq!(inlined, [true, true, false]);
    // The lines of the calls are certain; which line of innermost comes first is not.
    assert!((4..=6).contains(&deepest[0].line.expect("a line")));
    assert_eq!(deepest[1].line, Some(9));
    assert_eq!(deepest[2].line, Some(13));
    for symbol in deepest {
        let file = symbol.file.as_deref().expect("a file");
        assert!(file.ends_with("/src/fixture.c"), "{file}");
    }
    assert!(chains.iter().all(|symbols| functions(symbols).last() == Some(&"outer")));
    assert!(symbolizer.problems(module).is_empty());
}

#[test]
fn a_return_address_behind_the_last_call_still_names_the_caller() {
    let fixture = Fixture::new();
    fixture.compile_c("/lib/fixture.so");
    let (mut symbolizer, module) = fixture.symbolizer("/lib/fixture.so");
    let (hidden, size) = fixture.symbol("/lib/fixture.so", "hidden");
    let end = hidden + size;
    assert_eq!(functions(&symbolizer.name(module, end, true)), ["hidden"]);
    assert_ne!(functions(&symbolizer.name(module, end, false)), ["hidden"]);
}

#[test]
fn cpp_functions_are_demangled_with_and_without_debug_information() {
    for flags in [&[][..], &["-g0"]] {
        let fixture = Fixture::new();
        fixture.compile("/src/shop.cpp", CPP_SOURCE, "/lib/shop.so", flags);
        let (mut symbolizer, module) = fixture.symbolizer("/lib/shop.so");
        let (add, _) = fixture.symbol("/lib/shop.so", "_ZN4shop6BasketIiE3addEi");
        let symbols = symbolizer.name(module, add, false);
        assert_eq!(functions(&symbols), ["shop::Basket<int>::add(int)"]);
        assert_eq!(symbols[0].line.is_some(), flags.is_empty());
    }
}

#[test]
fn every_dwarf_version_and_compression_gives_the_same_names() {
    let variants: [&[&str]; 6] = [
        &["-gdwarf-4"],
        &["-gdwarf-5"],
        &["-gdwarf-5", "-gz=zlib"],
        &["-gdwarf-4", "-gz=zlib-gnu"],
        &["-gdwarf-5", "-ffunction-sections"],
        &["-gdwarf-5", "-flto"],
    ];
    for flags in variants {
        let fixture = Fixture::new();
        fixture.compile("/src/fixture.c", fixture::C_SOURCE, "/lib/fixture.so", flags);
        let (mut symbolizer, module) = fixture.symbolizer("/lib/fixture.so");
        let (outer, size) = fixture.symbol("/lib/fixture.so", "outer");
        let deepest = (outer..outer + size)
            .map(|svma| symbolizer.name(module, svma, false))
            .max_by_key(Vec::len)
            .expect("addresses");
        assert_eq!(functions(&deepest), ["innermost", "middle", "outer"], "{flags:?}");
        assert_eq!(deepest[2].line, Some(13), "{flags:?}");
        assert!(symbolizer.problems(module).is_empty(), "{flags:?}");
    }
}

#[test]
fn nothing_is_named_beyond_the_end_of_a_symbol() {
    let fixture = Fixture::new();
    let source = r#"
        .globl sized
        .type sized, @function
        sized: nop
        nop
        .size sized, . - sized
        .fill 14, 1, 0x90
        .globl label
        label: nop
        .fill 15, 1, 0x90
        .section .text.other, "ax", @progbits
        .fill 16, 1, 0x90
    "#;
    fixture.compile("/src/gap.s", source, "/lib/gap.so", &["-g0", "-nostdlib"]);
    let (mut symbolizer, module) = fixture.symbolizer("/lib/gap.so");
    let (sized, _) = fixture.symbol("/lib/gap.so", "sized");
    let mut name = |offset| symbolizer.name(module, sized + offset, false);
    assert_eq!(functions(&name(1)), ["sized"]);
    assert!(name(2).is_empty());
    assert_eq!(functions(&name(16)), ["label"]);
    assert_eq!(functions(&name(20)), ["label"]);
    assert!(name(0x1000).is_empty());
}

#[test]
fn of_several_names_for_a_function_the_one_in_use_is_shown() {
    let path = libc_path();
    let (mut symbolizer, module) = installed(&path);
    for name in ["malloc", "calloc", "free", "posix_memalign", "realloc"] {
        let (svma, _) = symbol_of(&path, name);
        let symbols = symbolizer.name(module, svma + 4, false);
        assert_eq!(functions(&symbols).last(), Some(&name), "{symbols:?}");
    }
}

#[test]
fn a_stripped_library_is_named_by_its_dynamic_symbols() {
    let fixture = Fixture::new();
    fixture.compile_c("/lib/fixture.so");
    let (outer, size) = fixture.symbol("/lib/fixture.so", "outer");
    let (hidden, _) = fixture.symbol("/lib/fixture.so", "hidden");
    fixture.split("/lib/fixture.so", "/elsewhere/fixture.debug", false);
    let (mut symbolizer, module) = fixture.symbolizer("/lib/fixture.so");
    for svma in outer..outer + size {
        assert_eq!(functions(&symbolizer.name(module, svma, false)), ["outer"]);
    }
    assert!(symbolizer.name(module, hidden, false).is_empty());
}

#[test]
fn a_packed_symbol_table_names_what_stripping_removed() {
    let fixture = Fixture::new();
    fixture.compile_c("/lib/fixture.so");
    let (hidden, _) = fixture.symbol("/lib/fixture.so", "hidden");
    fixture.split("/lib/fixture.so", "/elsewhere/fixture.debug", false);
    let debug = fixture.real("/elsewhere/fixture.debug");
    fixture::run(std::process::Command::new("strip").arg("--strip-debug").arg(&debug));
    let plain = fs::read(&debug).expect("debug file");
    let mut packed = Vec::new();
    lzma_rs::xz_compress(&mut plain.as_slice(), &mut packed).expect("packed");
    let packed_path = fixture.real("/elsewhere/packed.xz");
    fs::write(&packed_path, packed).expect("packed file");
    fixture::run(
        std::process::Command::new("objcopy")
            .arg(format!("--add-section=.gnu_debugdata={}", packed_path.display()))
            .arg(fixture.real("/lib/fixture.so")),
    );
    let (mut symbolizer, module) = fixture.symbolizer("/lib/fixture.so");
    assert_eq!(functions(&symbolizer.name(module, hidden, false)), ["hidden"]);
}

#[test]
fn the_vdso_is_named() {
    let bytes = vdso::image_bytes().expect("this kernel maps a vDSO");
    let path = Fixture::new();
    let file = path.real("/vdso.so");
    fs::write(&file, &bytes).expect("copy");
    let (svma, _) = symbol_of(&file, "__vdso_clock_gettime");
    let mut symbolizer = Symbolizer::new(Limits::default(), Vec::new());
    let module = symbolizer.add(ModuleSource {
        path: PathBuf::from("[vdso]"),
        image: Source::Memory(bytes),
        root: PathBuf::from("/"),
    });
    let symbols = symbolizer.name(module, svma, false);
    let name = functions(&symbols)[0];
    assert!(name.ends_with("clock_gettime"), "{name}");
    assert!(symbolizer.build_id(module).is_some());
}

#[inline(never)]
fn a_rust_function(n: usize) -> Vec<usize> {
    std::hint::black_box((0..n).collect())
}

#[test]
fn rust_functions_are_named_without_hash() {
    assert_eq!(a_rust_function(3).len(), 3);
    let path = std::env::current_exe().expect("path");
    let (mut symbolizer, module) = installed(&path);
    // The linker's own statement of where the file is in memory.
    unsafe extern "C" {
        static __ehdr_start: u8;
    }
    let avma = a_rust_function as fn(usize) -> Vec<usize> as usize as u64;
    let base = &raw const __ehdr_start as u64;
    let symbols = symbolizer.name(module, avma - base + 1, false);
    let outermost = symbols.last().expect("a name");
    assert_eq!(outermost.function, "leakbpf::symbolize::tests::a_rust_function");
    let file = outermost.file.as_deref().expect("a file");
    assert!(file.ends_with("symbolize/tests/mod.rs"), "{file}");
}

#[test]
fn what_was_read_is_given_up_when_memory_is_short_and_read_again() {
    let fixture = Fixture::new();
    fixture.compile_c("/lib/a.so");
    fixture.compile_c("/lib/b.so");
    let (outer, _) = fixture.symbol("/lib/a.so", "outer");
    let limits = Limits { retained_bytes: 0, ..Limits::default() };
    let mut symbolizer = Symbolizer::new(limits, Vec::new());
    let a = symbolizer.add(fixture.module("/lib/a.so"));
    let b = symbolizer.add(fixture.module("/lib/b.so"));
    for module in [a, b, a, b] {
        assert_eq!(functions(&symbolizer.name(module, outer, false)).last(), Some(&"outer"));
        let loaded = symbolizer.modules.iter().filter(|module| module.is_loaded());
        assert_eq!(loaded.count(), 1);
    }
    symbolizer.rest();
    assert_eq!(functions(&symbolizer.name(a, outer, false)).last(), Some(&"outer"));
    symbolizer.close(a);
    assert!(symbolizer.name(a, outer, false).is_empty());
}

#[test]
fn debug_information_that_is_too_large_leaves_the_symbol_table() {
    let fixture = Fixture::new();
    fixture.compile_c("/lib/fixture.so");
    let (outer, _) = fixture.symbol("/lib/fixture.so", "outer");
    let limits = Limits { debug_info_bytes: 100, ..Limits::default() };
    let mut symbolizer = Symbolizer::new(limits, Vec::new());
    let module = symbolizer.add(fixture.module("/lib/fixture.so"));
    let symbols = symbolizer.name(module, outer, false);
    assert_eq!(functions(&symbols), ["outer"]);
    assert_eq!(symbols[0].line, None);
    let problem = symbolizer.problems(module)[0].to_string();
    assert!(problem.contains("/lib/fixture.so"), "{problem}");
}

#[test]
fn a_symbolizer_can_move_to_another_thread() {
    fn is_send<T: Send>() {}
    is_send::<Symbolizer>();
}
