use super::*;

/// `st_info` of a global function, a local one, and a global resolver.
const GLOBAL: u8 = 0x12;
const LOCAL: u8 = 0x02;
const IFUNC: u8 = 0x1a;

const BASE: u64 = 0x40_0000;

/// A static executable with this code at [`BASE`] and a symbol (name, `st_info`, offset, size) for
/// each function.
struct Executable<'a> {
    code: &'a [u8],
    symbols: &'a [(&'a str, u8, u64, u64)],
    /// An empty `PT_DYNAMIC`.
    dynamic: bool,
    extra_section: Option<(&'a str, &'a [u8])>,
}

impl Executable<'_> {
    fn build(&self) -> Vec<u8> {
        let mut strings = vec![0];
        let mut intern = |name: &str| {
            let at = strings.len() as u32;
            strings.extend(name.as_bytes());
            strings.push(0);
            at
        };
        let mut symbols = vec![0; 24];
        for &(name, info, offset, size) in self.symbols {
            symbols.extend(intern(name).to_le_bytes());
            symbols.extend([info, 0, 1, 0]);
            symbols.extend((BASE + 0x1000 + offset).to_le_bytes());
            symbols.extend(size.to_le_bytes());
        }
        let (extra_name, extra) = self.extra_section.unwrap_or((".comment", b""));
        let extra_name = intern(extra_name);

        let mut file = vec![0; 0x1000];
        // (sh_name, sh_type, sh_link, sh_info, sh_entsize, contents)
        let sections = [
            (0u32, 1u32, 0u32, 0u32, 0u64, self.code),
            (0, 2, 3, 1, 24, &symbols),
            (0, 3, 0, 0, 0, &strings),
            (extra_name, 1, 0, 0, 0, extra),
        ];
        let mut headers = vec![0; 64];
        for (name, kind, link, info, entry_size, contents) in sections {
            headers.extend([name.to_le_bytes(), kind.to_le_bytes()].concat());
            headers.extend([0; 16]);
            headers.extend((file.len() as u64).to_le_bytes());
            headers.extend((contents.len() as u64).to_le_bytes());
            headers.extend([link.to_le_bytes(), info.to_le_bytes()].concat());
            headers.extend([1u64.to_le_bytes(), entry_size.to_le_bytes()].concat());
            file.extend(contents);
            file.resize(file.len().next_multiple_of(8), 0);
        }
        let section_table = file.len() as u64;
        file.extend(headers);

        let mut head = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
        for word in [BASE + 0x1000, 64, section_table] {
            head.extend(word.to_le_bytes());
        }
        head.extend([0, 0, 0, 0, 64, 0, 56, 0, 1 + u8::from(self.dynamic), 0, 64, 0, 5, 0, 3, 0]);
        head.extend([1, 0, 0, 0, 5, 0, 0, 0]); // PT_LOAD, R E
        let code_bytes = self.code.len() as u64;
        for word in [0x1000, BASE + 0x1000, BASE + 0x1000, code_bytes, code_bytes, 0x1000] {
            head.extend(word.to_le_bytes());
        }
        if self.dynamic {
            head.extend([2, 0, 0, 0, 4, 0, 0, 0]);
            head.extend([0; 48]);
        }
        file[..head.len()].copy_from_slice(&head);
        file
    }
}

/// `push %rbx; ret` at 0, 16, 32, …
fn pushes(count: usize) -> Vec<u8> {
    let mut code = vec![0x90; count * 16];
    for function in code.chunks_mut(16) {
        function[..2].copy_from_slice(&[0x53, 0xc3]);
    }
    code
}

fn small(symbols: &[(&str, u8, u64, u64)], dynamic: bool) -> FilePlan {
    plan_of(&Executable { code: &pushes(8), symbols, dynamic, extra_section: None }.build())
}

#[test]
fn a_static_executable_is_probed_by_its_symbol_table() {
    let plan = small(&[("malloc", GLOBAL, 0, 2), ("free", GLOBAL, 16, 2)], false);
    assert_eq!(probe(&plan, "malloc").entry_file_offset, 0x1000);
    assert_eq!(probe(&plan, "free").enter_file_offset, 0x1010);
    assert_eq!(probe(&plan, "free").leave_file_offset, None);
    assert_eq!(plan.allocators, BTreeSet::from([Allocator::Unknown]));
    assert_eq!(plan.looked_at.static_symbols, 2);
}

#[test]
fn what_is_no_function_of_that_meaning_is_skipped_with_the_reason() {
    let symbols = [
        ("malloc", IFUNC, 0, 2),
        // The same address, and another meaning.
        ("realloc", GLOBAL, 16, 2),
        ("free", GLOBAL, 16, 2),
        ("calloc", GLOBAL, 0x5000, 2),
        ("valloc", LOCAL, 32, 2),
        ("je_malloc", LOCAL, 48, 2),
    ];
    let plan = small(&symbols, true);
    assert_eq!(reason(&plan, "malloc"), Some(&SkipReason::Indirect));
    assert_eq!(reason(&plan, "free"), Some(&SkipReason::Ambiguous));
    assert_eq!(reason(&plan, "calloc"), Some(&SkipReason::Refused(Refusal::NoCode)));
    assert_eq!(reason(&plan, "valloc"), Some(&SkipReason::LocalName));
    // With its prefix it can only be jemalloc's, hidden by the linker.
    probe(&plan, "je_malloc");
    // And in a static program, link-time optimisation makes libc's own functions local.
    probe(&small(&symbols, false), "valloc");
}

#[test]
fn an_operator_next_to_the_malloc_that_it_calls_is_left_out() {
    let mut code = pushes(4);
    // push %rbx; call 0; pop %rbx; ret
    code[16..24].copy_from_slice(&[0x53, 0xe8, 0xea, 0xff, 0xff, 0xff, 0x5b, 0xc3]);
    let symbols = [("malloc", GLOBAL, 0, 2), ("_Znwm", GLOBAL, 16, 8), ("_Znam", GLOBAL, 32, 2)];
    let file = Executable { code: &code, symbols: &symbols, dynamic: false, extra_section: None };
    let plan = plan_of(&file.build());
    assert_eq!(reason(&plan, "_Znwm"), Some(&SkipReason::Calls("malloc".to_owned())));
    // This one has an allocator of its own.
    probe(&plan, "_Znam");
}

#[test]
fn a_jump_with_other_arguments_is_no_forwarding() {
    let mut code = pushes(4);
    // jmp 0
    code[16..21].copy_from_slice(&[0xe9, 0xeb, 0xff, 0xff, 0xff]);
    // mov %rsi,%rdi; jmp 0
    code[32..40].copy_from_slice(&[0x48, 0x89, 0xf7, 0xe9, 0xd8, 0xff, 0xff, 0xff]);
    let symbols = [
        ("malloc", GLOBAL, 0, 2),
        ("valloc", GLOBAL, 16, 5),
        ("memalign", GLOBAL, 32, 8),
        ("free", GLOBAL, 48, 2),
    ];
    let file = Executable { code: &code, symbols: &symbols, dynamic: false, extra_section: None };
    let plan = plan_of(&file.build());
    assert_eq!(reason(&plan, "valloc"), Some(&SkipReason::JumpsTo("malloc".to_owned())));
    assert_eq!(reason(&plan, "memalign"), Some(&SkipReason::JumpsTo("malloc".to_owned())));
    // A `malloc` that is not probed itself counts nothing.
    let symbols = [("malloc", IFUNC, 0, 2), ("valloc", GLOBAL, 16, 5)];
    let file = Executable { code: &code, symbols: &symbols, dynamic: false, extra_section: None };
    probe(&plan_of(&file.build()), "valloc");
    // `free` in place of `malloc` means another thing.
    let symbols = [("free", GLOBAL, 0, 2), ("valloc", GLOBAL, 16, 5)];
    let file = Executable { code: &code, symbols: &symbols, dynamic: false, extra_section: None };
    probe(&plan_of(&file.build()), "valloc");
    // An alignment in place of the size does, too.
    let symbols = [("malloc", GLOBAL, 0, 2), ("memalign", GLOBAL, 16, 5)];
    let file = Executable { code: &code, symbols: &symbols, dynamic: false, extra_section: None };
    probe(&plan_of(&file.build()), "memalign");
}

#[test]
fn in_a_go_program_only_what_is_outside_of_go_text_is_probed() {
    let build = |symbols| {
        let extra_section = Some((".gopclntab", &b""[..]));
        plan_of(&Executable { code: &pushes(8), symbols, dynamic: false, extra_section }.build())
    };
    let with_cgo = build(&[
        ("runtime.text", GLOBAL, 0, 2),
        ("runtime.etext", GLOBAL, 32, 2),
        ("calloc", GLOBAL, 16, 2),
        ("malloc", GLOBAL, 48, 2),
    ]);
    assert_eq!(reason(&with_cgo, "calloc"), Some(&SkipReason::GoText));
    probe(&with_cgo, "malloc");
    let bounds_unknown = build(&[("malloc", GLOBAL, 48, 2)]);
    assert_eq!(reason(&bounds_unknown, "malloc"), Some(&SkipReason::GoText));
}

#[test]
fn a_stripped_executable_is_probed_by_its_mini_debug_info() {
    let code = pushes(4);
    let inner = Executable {
        code: &code,
        symbols: &[("malloc", GLOBAL, 0, 2), ("free", GLOBAL, 16, 2)],
        dynamic: false,
        extra_section: None,
    };
    let mut packed = Vec::new();
    lzma_rs::xz_compress(&mut &*inner.build(), &mut packed).expect("compresses to memory");
    let extra_section = Some((".gnu_debugdata", &*packed));
    let plan =
        plan_of(&Executable { code: &code, symbols: &[], dynamic: false, extra_section }.build());
    assert_eq!(plan.looked_at.mini_debug_symbols, 2);
    assert_eq!(probe(&plan, "free").entry_file_offset, 0x1010);
}

#[test]
fn a_flood_of_functions_is_cut_off_and_said() {
    let code = pushes(1000);
    let symbols: Vec<_> = (0..1000).map(|i| ("malloc", GLOBAL, i * 16, 2)).collect();
    let file = Executable { code: &code, symbols: &symbols, dynamic: false, extra_section: None };
    let plan = plan_of(&file.build());
    assert_eq!(plan.probes.len(), MAX_FUNCTIONS);
    assert_eq!(reason(&plan, "others"), Some(&SkipReason::TooMany));
}
