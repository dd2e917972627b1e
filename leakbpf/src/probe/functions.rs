//! The allocator functions that are probed, by symbol name, and how each uses its arguments.
//!
//! Not in the table, on purpose:
//! - Rust's `__rust_alloc`, `__rdl_alloc` and `__rg_alloc`: they are shims in front of whatever the
//!   program's `#[global_allocator]` calls (`malloc` for `System`, `_rjem_mallocx` for
//!   tikv-jemallocator, `mi_malloc_aligned` for mimalloc), and those are probed.
//! - `strdup`, `getline` and others of libc that return a block of `malloc`: the nested call counts.
//! - jemalloc's `_rjem_je_…` and `je_…_default`: internals that the public functions call.
//! - `mi_heap_destroy` and jemalloc's `arena.N.reset`: they release many blocks at once and name
//!   none of them, so the blocks stay in the ledger.

use leakbpf_common::abi::{Role, SizeRule};

/// Whose name it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// `malloc` and its relatives, under C's, POSIX's and glibc's names.
    C,
    /// `operator new` and `operator delete`.
    Operator,
    Jemalloc,
    Tcmalloc,
    Mimalloc,
}

/// How a function allocates or releases. Arguments are counted from 0, in the order of the
/// System V calling convention; all of them are integers or pointers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Function {
    pub family: Family,
    pub role: Role,
    pub size_rule: SizeRule,
    pub size: Option<u8>,
    pub second_size: Option<u8>,
    /// The old block, the block to free, or where the new address is written.
    pub pointer: Option<u8>,
    /// The call releases the old block even when it fails (`reallocf`).
    pub frees_on_failure: bool,
}

impl Function {
    /// The arguments that a probe reads.
    pub fn arguments(&self) -> impl Iterator<Item = u8> {
        [self.size, self.second_size, self.pointer].into_iter().flatten()
    }

    /// Whether the block that it works on is known only when it returns.
    pub fn needs_return(&self) -> bool {
        self.role != Role::Free
    }

    const fn new(family: Family, role: Role) -> Self {
        Self {
            family,
            role,
            size_rule: SizeRule::First,
            size: None,
            second_size: None,
            pointer: None,
            frees_on_failure: false,
        }
    }

    const fn allocate(family: Family, size: u8) -> Self {
        Self { size: Some(size), ..Self::new(family, Role::Allocate) }
    }

    const fn allocate_product(family: Family, count: u8) -> Self {
        Self {
            size_rule: SizeRule::Product,
            size: Some(count),
            second_size: Some(count + 1),
            ..Self::new(family, Role::Allocate)
        }
    }

    const fn allocate_out(family: Family) -> Self {
        Self { size: Some(2), pointer: Some(0), ..Self::new(family, Role::AllocateOut) }
    }

    const fn reallocate(family: Family, pointer: u8) -> Self {
        Self {
            size: Some(pointer + 1),
            pointer: Some(pointer),
            ..Self::new(family, Role::Reallocate)
        }
    }

    const fn reallocate_product(family: Family, pointer: u8) -> Self {
        Self {
            size_rule: SizeRule::Product,
            size: Some(pointer + 1),
            second_size: Some(pointer + 2),
            pointer: Some(pointer),
            ..Self::new(family, Role::Reallocate)
        }
    }

    const fn free(family: Family) -> Self {
        Self { pointer: Some(0), ..Self::new(family, Role::Free) }
    }

    const fn freeing_on_failure(self) -> Self {
        Self { frees_on_failure: true, ..self }
    }
}

/// The prefixes of Redis and FreeBSD ports, of tikv-jemalloc-sys, and of Android's and jemallocator's
/// other builds.
const JEMALLOC_PREFIXES: [&str; 4] = ["je_", "_rjem_", "rjem_", "jemalloc_"];

/// What the function of that symbol does, if it is an allocator's. A symbol version
/// (`malloc@@GLIBC_2.2.5`) is ignored.
pub fn lookup(symbol: &[u8]) -> Option<Function> {
    let symbol = std::str::from_utf8(symbol).ok()?;
    let name = symbol.split('@').next().unwrap_or(symbol);
    if let Some(function) = c(Family::C, name).or_else(|| operator(name)) {
        return Some(function);
    }
    if let Some(name) = name.strip_prefix("__libc_") {
        return c(Family::C, name);
    }
    if let Some(name) = name.strip_prefix("tc_") {
        return tcmalloc(name);
    }
    if let Some(name) = name.strip_prefix("mi_") {
        return mimalloc(name);
    }
    match name {
        "__posix_memalign" => return Some(Function::allocate_out(Family::C)),
        "mallocx" | "rallocx" | "xallocx" | "dallocx" | "sdallocx" => return jemalloc(name),
        _ => {}
    }
    JEMALLOC_PREFIXES.into_iter().find_map(|prefix| name.strip_prefix(prefix)).and_then(jemalloc)
}

/// A name without what the allocator that it belongs to was built to put before it.
pub fn plain(name: &str) -> &str {
    ["__libc_", "tc_", "mi_"]
        .into_iter()
        .chain(JEMALLOC_PREFIXES)
        .find_map(|prefix| name.strip_prefix(prefix))
        .unwrap_or(name)
}

/// Whether the function of that symbol reports failure by an exception.
pub fn may_throw(name: &str) -> bool {
    let of_allocator = name.strip_prefix("tc_new").or_else(|| name.strip_prefix("mi_new"));
    let throws = operator(name).is_some_and(|function| function.role == Role::Allocate)
        || of_allocator.is_some()
        || name.starts_with("mi_heap_alloc_new");
    throws && !name.contains("nothrow")
}

fn c(family: Family, name: &str) -> Option<Function> {
    Some(match name {
        "malloc" | "valloc" | "pvalloc" => Function::allocate(family, 0),
        "calloc" => Function::allocate_product(family, 0),
        "memalign" | "aligned_alloc" => Function::allocate(family, 1),
        "posix_memalign" => Function::allocate_out(family),
        "realloc" => Function::reallocate(family, 0),
        "reallocf" => Function::reallocate(family, 0).freeing_on_failure(),
        "reallocarray" => Function::reallocate_product(family, 0),
        // C23's; glibc has them from 2.43 on.
        "free" | "cfree" | "free_sized" | "free_aligned_sized" => Function::free(family),
        _ => return None,
    })
}

/// Itanium mangling, with `size_t` as `m`. An alignment or `nothrow` follows the size or pointer
/// and changes nothing for the ledger.
fn operator(name: &str) -> Option<Function> {
    let (function, rest) =
        if let Some(rest) = name.strip_prefix("_Znwm").or_else(|| name.strip_prefix("_Znam")) {
            (Function::allocate(Family::Operator, 0), rest)
        } else {
            let rest = name.strip_prefix("_ZdlPv").or_else(|| name.strip_prefix("_ZdaPv"))?;
            (Function::free(Family::Operator), rest.strip_prefix('m').unwrap_or(rest))
        };
    let rest = rest.strip_prefix("St11align_val_t").unwrap_or(rest);
    let rest = rest.strip_prefix("RKSt9nothrow_t").unwrap_or(rest);
    // Google's tcmalloc only.
    let rest = rest.strip_prefix("12__hot_cold_t").unwrap_or(rest);
    rest.is_empty().then_some(function)
}

/// jemalloc(3), without the prefix that it was configured with.
fn jemalloc(name: &str) -> Option<Function> {
    let family = Family::Jemalloc;
    Some(match name {
        "mallocx" => Function::allocate(family, 0),
        "rallocx" => Function::reallocate(family, 0),
        "xallocx" => Function {
            size_rule: SizeRule::Sum,
            size: Some(1),
            second_size: Some(2),
            pointer: Some(0),
            ..Function::new(family, Role::ResizeInPlace)
        },
        "dallocx" | "sdallocx" => Function::free(family),
        name => return c(family, name),
    })
}

/// gperftools' `tcmalloc.h`, without `tc_`.
fn tcmalloc(name: &str) -> Option<Function> {
    let family = Family::Tcmalloc;
    if name == "malloc_skip_new_handler" {
        return Some(Function::allocate(family, 0));
    }
    if let Some(function) = c(family, name) {
        return Some(function);
    }
    let (function, rest) = if let Some(rest) = name.strip_prefix("new") {
        (Function::allocate(family, 0), rest)
    } else {
        (Function::free(family), name.strip_prefix("delete")?)
    };
    let rest = rest.strip_prefix("array").unwrap_or(rest);
    matches!(rest, "" | "_nothrow" | "_sized" | "_aligned" | "_sized_aligned" | "_aligned_nothrow")
        .then_some(function)
}

/// `mimalloc.h` of 1.8 to 3, without `mi_`. Functions on an explicit heap take it first.
fn mimalloc(name: &str) -> Option<Function> {
    let family = Family::Mimalloc;
    let heap = name.strip_prefix("heap_").or_else(|| name.strip_prefix("theap_"));
    let (name, first) = heap.map_or((name, 0), |name| (name, 1));
    // An alignment and an offset follow the arguments that matter.
    let plain = name
        .strip_suffix("_aligned_at")
        .or_else(|| name.strip_suffix("_aligned"))
        .filter(|plain| !plain.starts_with("free"));
    Some(match plain.unwrap_or(name) {
        "malloc" | "malloc_small" | "zalloc" | "zalloc_small" => Function::allocate(family, first),
        "calloc" | "mallocn" => Function::allocate_product(family, first),
        // `mi_expand` returns the same block or NULL: a `realloc` that may only stay.
        "realloc" | "rezalloc" | "new_realloc" | "expand" => Function::reallocate(family, first),
        "reallocn" | "recalloc" | "new_reallocn" => Function::reallocate_product(family, first),
        "reallocf" => Function::reallocate(family, first).freeing_on_failure(),
        "alloc_new" if first == 1 => Function::allocate(family, first),
        "alloc_new_n" if first == 1 => Function::allocate_product(family, first),
        _ if first == 1 => return None,
        "new" | "new_nothrow" | "new_aligned_nothrow" => Function::allocate(family, 0),
        "new_n" => Function::allocate_product(family, 0),
        "free_size" | "free_aligned" | "free_size_aligned" | "free_small" => Function::free(family),
        name => return c(family, name),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(name: &str) -> (Role, Option<u8>, Option<u8>, Option<u8>) {
        let function = lookup(name.as_bytes()).unwrap_or_else(|| panic!("{name} is not known"));
        (function.role, function.size, function.second_size, function.pointer)
    }

    #[test]
    fn each_function_takes_its_size_and_pointer_where_its_prototype_has_them() {
        use Role::*;
        for (names, expected) in [
            (
                "malloc valloc __libc_malloc je_malloc _rjem_mallocx mi_zalloc mi_malloc_aligned_at \
              tc_newarray_aligned_nothrow _Znwm _ZnamSt11align_val_tRKSt9nothrow_t mi_new_aligned \
              mi_new_aligned_nothrow mi_zalloc_aligned tc_malloc_skip_new_handler malloc@@GLIBC_2.2.5",
                (Allocate, Some(0), None, None),
            ),
            (
                "calloc mi_mallocn mi_calloc_aligned mi_new_n jemalloc_calloc",
                (Allocate, Some(0), Some(1), None),
            ),
            (
                "memalign aligned_alloc mi_memalign mi_aligned_alloc tc_memalign mi_heap_malloc \
              mi_heap_zalloc_aligned_at mi_heap_alloc_new mi_theap_malloc",
                (Allocate, Some(1), None, None),
            ),
            ("mi_heap_calloc mi_heap_alloc_new_n", (Allocate, Some(1), Some(2), None)),
            (
                "posix_memalign __posix_memalign _rjem_posix_memalign mi_posix_memalign",
                (AllocateOut, Some(2), None, Some(0)),
            ),
            (
                "realloc reallocf rallocx mi_realloc_aligned mi_rezalloc_aligned_at mi_new_realloc mi_expand",
                (Reallocate, Some(1), None, Some(0)),
            ),
            (
                "reallocarray mi_reallocn mi_recalloc_aligned mi_new_reallocn",
                (Reallocate, Some(1), Some(2), Some(0)),
            ),
            ("mi_heap_realloc mi_heap_reallocf", (Reallocate, Some(2), None, Some(1))),
            (
                "mi_heap_reallocn mi_heap_recalloc_aligned_at",
                (Reallocate, Some(2), Some(3), Some(1)),
            ),
            ("je_xallocx", (ResizeInPlace, Some(1), Some(2), Some(0))),
            (
                "free cfree sdallocx _rjem_sdallocx mi_free_size_aligned mi_free_aligned mi_cfree \
              tc_delete_sized_aligned tc_deletearray _ZdlPv _ZdaPvm _ZdlPvmSt11align_val_t \
              _ZdlPvRKSt9nothrow_t _ZdaPvSt11align_val_tRKSt9nothrow_t",
                (Free, None, None, Some(0)),
            ),
        ] {
            for name in names.split_whitespace() {
                assert_eq!(arguments(name), expected, "{name}");
            }
        }
    }

    #[test]
    fn operators_throw_unless_they_say_otherwise() {
        for (name, expected) in [
            ("_Znwm", true),
            ("_ZnamSt11align_val_t", true),
            ("_ZnwmRKSt9nothrow_t", false),
            ("_ZnamSt11align_val_tRKSt9nothrow_t", false),
            ("_ZdlPv", false),
            ("tc_newarray_aligned", true),
            ("tc_new_nothrow", false),
            ("mi_new_n", true),
            ("mi_new_aligned_nothrow", false),
            ("malloc", false),
        ] {
            assert_eq!(may_throw(name), expected, "{name}");
        }
    }

    #[test]
    fn internals_and_strangers_are_left_alone() {
        for name in [
            "",
            "mallocs",
            "xmalloc",
            "_rjem_je_malloc",
            "_rjem_je_malloc_default",
            "je_free_default",
            "__rust_alloc",
            "__rdl_alloc",
            "mi_heap_new",
            "mi_heap_free",
            "mi_heap_destroy",
            "mi_malloc_size",
            "tc_newx",
            "tc_malloc_size",
            "_Znwmx",
            "_ZdlPvb",
            "_ZnwmPv",
            "malloc_usable_size",
            "main.malloc",
            "mi_free_at",
        ] {
            assert_eq!(lookup(name.as_bytes()), None, "{name}");
        }
        assert_eq!(lookup(b"\xff\xfe"), None);
    }

    #[test]
    fn only_reallocf_frees_on_failure() {
        for (name, expected) in [("reallocf", true), ("mi_heap_reallocf", true), ("realloc", false)]
        {
            assert_eq!(lookup(name.as_bytes()).map(|f| f.frees_on_failure), Some(expected));
        }
    }
}
