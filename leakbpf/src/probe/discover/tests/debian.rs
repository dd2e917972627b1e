use std::sync::OnceLock;

use proptest::prelude::*;

use super::*;
use crate::probe::planner::{Cost, Fallback};

const JEMALLOC: &str = "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2";
const TCMALLOC: &str = "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4";
const MIMALLOC: &str = "/usr/lib/x86_64-linux-gnu/libmimalloc.so.2.0";
const GLIBC: &str = "/usr/lib/x86_64-linux-gnu/libc.so.6";
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
const LIBSTDCXX: &str = "/usr/lib/x86_64-linux-gnu/libstdc++.so.6";
const MUSL: &str = "/lib/ld-musl-x86_64.so.1";

/// Instructions that the kernel emulates, told by their first bytes and apart from the planner's
/// own decoding.
fn is_emulated(bytes: &[u8]) -> bool {
    matches!(
        bytes,
        [0x50..=0x57 | 0x70..=0x7f | 0x90 | 0xe8 | 0xe9 | 0xeb, ..]
            | [0x41, 0x50..=0x57, ..]
            | [0x0f, 0x80..=0x8f, ..]
    )
}

/// Asserts what holds for each plan, and that only `single_stepped` are dear.
fn assert_cheap(data: &[u8], plan: &FilePlan, single_stepped: &[(&str, Fallback)]) {
    assert!(!plan.probes.is_empty());
    for probe in &plan.probes {
        let name = &probe.function;
        let expected = single_stepped.iter().find(|(dear, _)| dear == name);
        assert_eq!(probe.plan.fallback, expected.map(|&(_, fallback)| fallback), "{name}");
        let cost = if expected.is_some() { Cost::SingleStepped } else { Cost::Emulated };
        assert_eq!(probe.plan.cost(), cost, "{name}");
        let at = usize::try_from(probe.enter_file_offset).expect("a file offset");
        assert_eq!(is_emulated(&data[at..]), expected.is_none(), "{name}");
        let ends = probe.leave_file_offset.is_some() || !probe.exit_file_offsets.is_empty();
        assert_eq!(ends, probe.role != Role::Free, "{name}");
        if probe.leave_file_offset.is_some() {
            // One trap for both.
            assert_eq!(probe.leave_file_offset, Some(probe.enter_file_offset), "{name}");
            assert_eq!(probe.enter_cookie.stack_distance, 0, "{name}");
        }
        let cookie = probe.enter_cookie;
        assert_eq!(Cookie::unpack(cookie.pack()), Some(cookie), "{name}");
        let needs_size = probe.role != Role::Free;
        assert_eq!(cookie.size != RegisterSlot::NONE, needs_size, "{name}");
        let needs_pointer = probe.role != Role::Allocate;
        assert_eq!(cookie.pointer != RegisterSlot::NONE, needs_pointer, "{name}");
    }
}

#[test]
fn what_may_throw_has_no_return_probe_and_is_probed_at_its_own_returns() {
    for library in [JEMALLOC, TCMALLOC] {
        let data = read(library);
        let plan = plan_of(&data);
        let mut throwing = 0;
        for probe in &plan.probes {
            let name = &probe.function;
            let is_new = name.starts_with("_Znwm") || name.starts_with("_Znam");
            let throws = is_new && !name.contains("nothrow");
            throwing += usize::from(throws);
            assert_eq!(probe.exit_file_offsets.is_empty(), !throws, "{library} {name}");
            assert!(!throws || probe.leave_file_offset.is_none(), "{library} {name}");
            for &exit in &probe.exit_file_offsets {
                let at = usize::try_from(exit).expect("a file offset");
                assert!(
                    matches!(data[at..], [0xc3, ..] | [0xf3, 0xc3, ..]),
                    "{library} {name}: no return instruction at {exit:#x}"
                );
            }
        }
        assert!(throwing >= 1, "{library}");
    }
}

#[test]
fn an_allocator_that_cannot_throw_has_return_probes_throughout() {
    let plan = plan_of(&read(MIMALLOC));
    assert!(plan.probes.iter().all(|probe| probe.exit_file_offsets.is_empty()));
}

#[test]
fn glibc_is_probed_without_a_single_step() {
    let data = read(GLIBC);
    let plan = plan_of(&data);
    assert_eq!(plan.allocators, BTreeSet::from([Allocator::Glibc]));
    assert_cheap(&data, &plan, &[]);
    for name in ["malloc", "calloc", "realloc", "posix_memalign", "memalign", "valloc", "pvalloc"] {
        probe(&plan, name);
    }
    // Several names, one probe.
    assert_eq!(probe(&plan, "cfree"), probe(&plan, "free"));
    assert_eq!(probe(&plan, "__libc_malloc"), probe(&plan, "malloc"));
    assert_eq!(probe(&plan, "aligned_alloc"), probe(&plan, "memalign"));
    // Multiplies, which overwrites its arguments before the first branch, and calls `realloc`.
    assert_eq!(reason(&plan, "reallocarray"), Some(&SkipReason::Calls("realloc".to_owned())));
}

#[test]
fn only_functions_that_are_known_to_call_no_other_are_marked_so() {
    let marked = |library| {
        let plan = plan_of(&read(library));
        let probes = plan.probes.into_iter().filter(|probe| probe.calls_no_other);
        probes.map(|probe| probe.function).collect::<BTreeSet<_>>()
    };
    let set = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(marked(GLIBC), set(&["malloc", "calloc"]));
    assert_eq!(marked(JEMALLOC), set(&["malloc", "calloc", "mallocx"]));
    assert_eq!(marked(TCMALLOC), set(&["malloc", "calloc"]));
    // Its functions call each other by many names.
    assert_eq!(marked(MIMALLOC), set(&[]));
}

#[test]
fn jemalloc_is_probed_without_a_single_step() {
    let data = read(JEMALLOC);
    let plan = plan_of(&data);
    assert_eq!(plan.allocators, BTreeSet::from([Allocator::Jemalloc]));
    assert_cheap(&data, &plan, &[]);
    for name in [
        "malloc",
        "calloc",
        "realloc",
        "free",
        "posix_memalign",
        "aligned_alloc",
        "mallocx",
        "rallocx",
        "xallocx",
        "dallocx",
        "sdallocx",
        "_Znwm",
        "_ZnwmRKSt9nothrow_t",
        "_ZdlPvm",
    ] {
        probe(&plan, name);
    }
    assert_eq!(probe(&plan, "xallocx").role, Role::ResizeInPlace);
    // These go to another function through the procedure linkage table.
    assert_eq!(reason(&plan, "_ZdlPv"), Some(&SkipReason::JumpsTo("free".to_owned())));
    assert_eq!(
        reason(&plan, "_ZnwmSt11align_val_t"),
        Some(&SkipReason::Calls("aligned_alloc".to_owned()))
    );
}

#[test]
fn tcmalloc_is_probed_without_a_single_step() {
    let data = read(TCMALLOC);
    let plan = plan_of(&data);
    assert_eq!(plan.allocators, BTreeSet::from([Allocator::Tcmalloc]));
    assert_cheap(&data, &plan, &[]);
    for name in ["malloc", "calloc", "realloc", "free", "_Znwm", "_ZdlPvm", "posix_memalign"] {
        probe(&plan, name);
    }
    assert_eq!(probe(&plan, "tc_malloc"), probe(&plan, "malloc"));
    assert_eq!(probe(&plan, "_ZdlPv"), probe(&plan, "free"));
}

#[test]
fn mimalloc_is_probed_with_a_single_step_in_one_rare_function() {
    let data = read(MIMALLOC);
    let plan = plan_of(&data);
    assert_eq!(plan.allocators, BTreeSet::from([Allocator::Mimalloc]));
    // It moves the stack pointer first, and a return probe cannot come later.
    assert_cheap(&data, &plan, &[("mi_heap_alloc_new", Fallback::StackMoved)]);
    for name in ["malloc", "calloc", "free", "mi_zalloc", "mi_heap_realloc", "_Znwm"] {
        probe(&plan, name);
    }
    // `mov %rdi,%rsi` comes before the site.
    assert_eq!(probe(&plan, "malloc").enter_cookie.size, RegisterSlot(13));
    assert_eq!(reason(&plan, "realloc"), Some(&SkipReason::JumpsTo("mi_heap_realloc".to_owned())));
    assert!(probe(&plan, "mi_heap_reallocf").enter_cookie.frees_on_failure);
}

#[test]
fn musl_is_probed_although_it_is_the_loader() {
    let data = read(MUSL);
    let plan = plan_of(&data);
    assert_eq!(plan.allocators, BTreeSet::from([Allocator::Musl]));
    assert_cheap(&data, &plan, &[]);
    for name in ["malloc", "calloc", "realloc", "free", "aligned_alloc", "posix_memalign"] {
        probe(&plan, name);
    }
    assert!(plan.library_event.is_some());
}

#[test]
fn the_loader_of_glibc_gives_the_library_event_and_no_probe() {
    let data = read(LOADER);
    let plan = plan_of(&data);
    assert_eq!(plan.probes, []);
    let at = usize::try_from(plan.library_event.expect("_dl_debug_state")).expect("an offset");
    // ret, or endbr64; ret
    assert!(data[at] == 0xc3 || data[at..].starts_with(&[0xf3, 0x0f, 0x1e, 0xfa, 0xc3]));
}

#[test]
fn the_operators_of_libstdcxx_are_left_to_malloc() {
    let plan = plan_of(&read(LIBSTDCXX));
    assert_eq!(plan.probes, []);
    assert_eq!(reason(&plan, "_Znwm"), Some(&SkipReason::CallsMalloc));
    assert!(plan.looked_at.dynamic_symbols > 1000);
}

#[test]
fn a_library_without_a_section_table_is_read_as_the_loader_reads_it() {
    let mut data = read(JEMALLOC);
    let whole = plan_of(&data);
    // e_shoff, e_shnum, e_shstrndx
    data[0x28..0x30].fill(0);
    data[0x3c..0x40].fill(0);
    let bare = plan_of(&data);
    assert_eq!(bare.probes, whole.probes);
    assert_eq!(bare.skipped, whole.skipped);
}

#[test]
fn a_debug_file_of_another_build_is_ignored() {
    let (glibc, jemalloc) = (read(GLIBC), read(JEMALLOC));
    let glibc = ElfFile::parse(&glibc).expect("glibc");
    let jemalloc = ElfFile::parse(&jemalloc).expect("jemalloc");
    let plan = discover(&glibc, Some(&jemalloc));
    assert!(plan.looked_at.foreign_debug_file);
    assert_eq!(plan.looked_at.separate_symbols, 0);
    let same = discover(&glibc, Some(&glibc));
    assert!(same.looked_at.separate_symbols > 1000);
    assert_eq!(same.probes, plan.probes);
}

#[test]
fn a_stripped_allocator_is_known_by_its_messages() {
    let data = read(JEMALLOC);
    let mut stripped = data.clone();
    // No section table and no PT_DYNAMIC: no names.
    stripped[0x28..0x30].fill(0);
    stripped[0x3c..0x40].fill(0);
    let phoff = 0x40;
    for header in 0..usize::from(stripped[0x38]) {
        let at = phoff + header * 56;
        if stripped[at] == 2 {
            stripped[at] = 0;
        }
    }
    let plan = plan_of(&stripped);
    assert_eq!((plan.probes.len(), plan.allocators.len()), (0, 0));
    let file = ElfFile::parse(&stripped).expect("still an ELF file");
    assert_eq!(allocators_by_message(&file), BTreeSet::from([Allocator::Jemalloc]));
}

#[test]
fn another_machine_is_refused_by_name() {
    let mut data = read(JEMALLOC);
    data[0x12] = 183; // EM_AARCH64
    let plan = plan_of(&data);
    assert_eq!(plan.probes, []);
    assert_eq!(reason(&plan, "malloc"), Some(&SkipReason::Architecture));
}

fn musl() -> &'static [u8] {
    static DATA: OnceLock<Vec<u8>> = OnceLock::new();
    DATA.get_or_init(|| read(MUSL))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_damaged_library_is_never_a_panic(
        // Most damage goes where the structure is: headers, hash tables, symbols, relocations.
        head in prop::collection::vec((0usize..0x400, any::<u8>()), 0..6),
        tables in prop::collection::vec((0usize..0x14000, any::<u8>()), 0..400),
        anywhere in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..400),
        end in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut data = musl().to_vec();
        for (at, byte) in head.into_iter().chain(tables) {
            data[at] = byte;
        }
        for (at, byte) in anywhere {
            let at = at.index(data.len());
            data[at] = byte;
        }
        if let Some(end) = end {
            data.truncate(end.index(data.len()));
        }
        if let Ok(file) = ElfFile::parse(&data) {
            discover(&file, Some(&file));
        }
    }

    #[test]
    fn random_bytes_behind_an_elf_header_are_never_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..2000),
        class in 1u8..=2,
        endian in 1u8..=2,
    ) {
        let data = [&[0x7f, b'E', b'L', b'F', class, endian, 1][..], &bytes].concat();
        if let Ok(file) = ElfFile::parse(&data) {
            discover(&file, Some(&file));
        }
        let _ = ElfFile::parse(&bytes).map(|file| discover(&file, None));
    }
}
