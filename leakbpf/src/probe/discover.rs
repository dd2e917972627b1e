//! The probes of one mapped file: which of its functions allocate, and where each is probed.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;

use leakbpf_common::abi::{Cookie, RegisterSlot, Role, SizeRule};
use regex::bytes::Regex;

use super::functions::{self, Family, Function};
use super::planner::x86_64::flow::{self, Destination, Onward};
use super::planner::x86_64::{self, FunctionCode};
use super::planner::{Plan, Refusal, Survey, TailJump};
use crate::elf::file::{Class, ElfFile, Machine};
use crate::elf::symbols::{FunctionSymbol, Table};

/// Most functions of one file that are planned; mimalloc, which has the most, has 80 addresses.
const MAX_FUNCTIONS: usize = 256;

/// Most parts that a compiler splits off one function, and longest of them in bytes.
const MAX_COLD_PARTS: usize = 4;
const MAX_COLD_BYTES: u64 = 16 << 10;

/// Functions that begin an exception.
const THROWING: [&str; 2] = ["__cxa_throw", "_ZSt17__throw_bad_allocv"];

/// Imports that never come back.
const NEVER_RETURNING: [&str; 7] = [
    "abort",
    "__stack_chk_fail",
    "__cxa_throw",
    "__cxa_rethrow",
    "_Unwind_Resume",
    "_ZSt9terminatev",
    "_ZSt17__throw_bad_allocv",
];

/// Most imports of a file that a function's end is looked for in.
const MAX_IMPORTS: usize = 1 << 16;

/// Allocators whose functions of these names call none of the others that are probed.
const CALLS_NO_OTHER: (&[Allocator], &[&str]) = (
    &[Allocator::Glibc, Allocator::Jemalloc, Allocator::Tcmalloc],
    &["malloc", "calloc", "mallocx"],
);

/// How much of a file is searched for the messages of a stripped allocator.
const MAX_SEARCHED_BYTES: usize = 256 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Allocator {
    Glibc,
    Musl,
    Jemalloc,
    Tcmalloc,
    Mimalloc,
    /// Functions with an allocator's names, of no allocator that is known by name.
    Unknown,
}

impl fmt::Display for Allocator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Glibc => "glibc",
            Self::Musl => "musl",
            Self::Jemalloc => "jemalloc",
            Self::Tcmalloc => "tcmalloc",
            Self::Mimalloc => "mimalloc",
            Self::Unknown => "unknown",
        })
    }
}

/// What a file offers to probes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FilePlan {
    pub allocators: BTreeSet<Allocator>,
    /// By file offset of the function.
    pub probes: Vec<PlannedProbe>,
    pub skipped: Vec<Skipped>,
    /// File offset of `_dl_debug_state`, which the loader calls when libraries came or went.
    pub library_event: Option<u64>,
    pub looked_at: LookedAt,
}

/// A function and its probes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedProbe {
    /// The best-known of its names.
    pub function: String,
    /// Its other names.
    pub aliases: Vec<String>,
    pub role: Role,
    pub entry_file_offset: u64,
    pub enter_file_offset: u64,
    pub enter_cookie: Cookie,
    /// No other function that is probed is called from it.
    pub calls_no_other: bool,
    /// Of the return probe.
    pub leave_file_offset: Option<u64>,
    /// Return instructions, each probed in place of a return probe: the function may throw, and
    /// the unwinder cannot pass a return probe.
    pub exit_file_offsets: Vec<u64>,
    /// How the sites were chosen; displays as one line for `doctor`.
    pub plan: Plan,
}

/// A function that is not probed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    pub function: String,
    pub reason: SkipReason,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SkipReason {
    #[error("only jumps to {0}, where it is counted")]
    JumpsTo(String),
    #[error("calls {0}, where it is counted")]
    Calls(String),
    #[error(
        "the file has no allocator of its own, so its operators are taken to call malloc and free"
    )]
    CallsMalloc,
    #[error("the symbol names a resolver (IFUNC), not the function")]
    Indirect,
    #[error("a local function of a program that is not static: the name may mean anything")]
    LocalName,
    #[error("the dynamic loader allocates for itself")]
    DynamicLoader,
    #[error("its names disagree about its arguments")]
    Ambiguous,
    #[error("Go moves its stacks, which a return probe does not survive")]
    GoText,
    #[error("sites can be planned on 64-bit x86 only")]
    Architecture,
    #[error("it may throw, which a return probe does not survive, and its end is not clear")]
    MayThrow,
    #[error("too many functions with an allocator's names in one file")]
    TooMany,
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// How much there was to look at: function symbols by table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LookedAt {
    pub dynamic_symbols: u64,
    pub static_symbols: u64,
    pub mini_debug_symbols: u64,
    /// In the separate debug file.
    pub separate_symbols: u64,
    /// The separate debug file was ignored: it has another build id.
    pub foreign_debug_file: bool,
}

/// Plans a file's probes. `debug` is its separate debug file, if one was found.
pub fn discover(file: &ElfFile<'_>, debug: Option<&ElfFile<'_>>) -> FilePlan {
    let mut names = Names::default();
    let mut looked_at = LookedAt::default();
    file.visit_functions(&mut |symbol| {
        match symbol.table {
            Table::Dynamic => looked_at.dynamic_symbols += 1,
            Table::Static => looked_at.static_symbols += 1,
            Table::MiniDebug => looked_at.mini_debug_symbols += 1,
        }
        names.note(symbol);
    });
    looked_at.foreign_debug_file = debug.is_some_and(|debug| debug.build_id() != file.build_id());
    if let Some(debug) = debug.filter(|_| !looked_at.foreign_debug_file) {
        debug.visit_functions(&mut |symbol| {
            looked_at.separate_symbols += 1;
            names.note(symbol);
        });
    }
    let mut plan = FilePlan {
        allocators: names.allocators(),
        library_event: names
            .library_event
            .filter(|&svma| x86_64::may_be_probed(file.code(svma, x86_64::LONGEST_INSTRUCTION)))
            .and_then(|svma| file.code_offset(svma)),
        looked_at,
        ..FilePlan::default()
    };
    Planning { file, imports: imports(file), all_imports: OnceCell::new(), names: &names }
        .run(&mut plan);
    plan
}

/// A function with an allocator's name.
#[derive(Debug, Clone, Default)]
struct Candidate {
    /// Best-known first.
    names: BTreeSet<(Family, usize, String)>,
    function: Option<Function>,
    size_bytes: u64,
    ambiguous: bool,
    indirect: bool,
    /// Each of the names is local and without a prefix that could only be an allocator's.
    local: bool,
}

impl Candidate {
    fn name(&self) -> String {
        self.names.first().map(|(_, _, name)| name.clone()).unwrap_or_default()
    }
}

/// What the symbol tables say.
#[derive(Debug, Default)]
struct Names {
    candidates: BTreeMap<u64, Candidate>,
    overflowed: bool,
    /// Parts that the compiler split off, by the name of the function.
    cold: BTreeMap<String, BTreeSet<(u64, u64)>>,
    never_return: BTreeSet<u64>,
    library_event: Option<u64>,
    go_text: (Option<u64>, Option<u64>),
    /// Defined here, or imported.
    throws: bool,
    glibc: bool,
    glibc_loader: bool,
    musl: bool,
}

impl Names {
    fn note(&mut self, symbol: FunctionSymbol<'_>) {
        if let Some(function) = functions::lookup(symbol.name) {
            self.add(symbol, function);
            return;
        }
        let Ok(name) = std::str::from_utf8(symbol.name) else {
            return;
        };
        let name = name.split('@').next().unwrap_or(name);
        if let Some((whole, _)) = name.split_once(".cold")
            && functions::lookup(whole.as_bytes()).is_some()
            && (self.cold.len() < MAX_FUNCTIONS || self.cold.contains_key(whole))
        {
            let parts = self.cold.entry(whole.to_owned()).or_default();
            if parts.len() < MAX_COLD_PARTS {
                parts.insert((symbol.svma, symbol.size_bytes));
            }
        }
        self.throws |= THROWING.contains(&name);
        match name {
            "_dl_debug_state" => self.library_event = Some(symbol.svma),
            "runtime.text" => self.go_text.0 = Some(symbol.svma),
            "runtime.etext" => self.go_text.1 = Some(symbol.svma),
            "gnu_get_libc_version" | "__libc_freeres" | "_int_malloc" => self.glibc = true,
            // Exported by glibc's loader alone, under GLIBC_PRIVATE.
            "_dl_allocate_tls" => self.glibc_loader = true,
            "__libc_malloc_impl" | "__malloc_donate" | "__init_libc" | "__dls2b" => {
                self.musl = true;
            }
            "abort"
            | "__cxa_throw"
            | "_ZSt9terminatev"
            | "_ZSt17__throw_bad_allocv"
            | "__clang_call_terminate"
                if self.never_return.len() < MAX_FUNCTIONS =>
            {
                self.never_return.insert(symbol.svma);
            }
            _ => {}
        }
    }

    fn add(&mut self, symbol: FunctionSymbol<'_>, function: Function) {
        let known = self.candidates.contains_key(&symbol.svma);
        if !known && self.candidates.len() >= MAX_FUNCTIONS {
            self.overflowed = true;
            return;
        }
        let name = String::from_utf8_lossy(symbol.name);
        let name = name.split('@').next().unwrap_or_default().to_owned();
        let may_be_anyones = symbol.local && function.family == Family::C;
        let candidate = self.candidates.entry(symbol.svma).or_default();
        candidate.local = may_be_anyones && (candidate.local || !known);
        candidate.indirect |= symbol.indirect;
        candidate.size_bytes = candidate.size_bytes.max(symbol.size_bytes);
        match candidate.function {
            None => candidate.function = Some(function),
            Some(first) if first == (Function { family: first.family, ..function }) => {}
            Some(_) => candidate.ambiguous = true,
        }
        candidate.names.insert((function.family, name.len(), name));
    }

    fn has(&self, name: &str) -> bool {
        self.candidates.values().any(|candidate| {
            candidate.names.iter().any(|(_, _, candidate_name)| candidate_name == name)
        })
    }

    fn defines(&self, family: Family) -> bool {
        self.candidates
            .values()
            .any(|candidate| candidate.names.iter().any(|&(of, _, _)| of == family))
    }

    fn allocators(&self) -> BTreeSet<Allocator> {
        let mut found = BTreeSet::new();
        // jemalloc without a prefix exports `mallocx`, which counts as its own.
        for (family, allocator) in [
            (Family::Jemalloc, Allocator::Jemalloc),
            (Family::Tcmalloc, Allocator::Tcmalloc),
            (Family::Mimalloc, Allocator::Mimalloc),
        ] {
            if self.defines(family) {
                found.insert(allocator);
            }
        }
        if self.has("malloc") {
            if self.glibc {
                found.insert(Allocator::Glibc);
            } else if self.musl {
                found.insert(Allocator::Musl);
            } else if found.is_empty() {
                found.insert(Allocator::Unknown);
            }
        }
        found
    }

    fn in_go_text(&self, file: &ElfFile<'_>, svma: u64) -> bool {
        file.is_go()
            && match self.go_text {
                (Some(start), Some(end)) => (start..end).contains(&svma),
                _ => true,
            }
    }
}

struct Planning<'a> {
    file: &'a ElfFile<'a>,
    names: &'a Names,
    /// By slot of the global offset table: the allocator function that it is filled with.
    imports: BTreeMap<u64, String>,
    /// The same for every function, with its address when this file defines it.
    all_imports: OnceCell<BTreeMap<u64, (String, Option<u64>)>>,
}

impl Planning<'_> {
    fn run(&self, plan: &mut FilePlan) {
        for (&svma, candidate) in &self.names.candidates {
            let Some(function) = candidate.function else {
                continue;
            };
            match self.probe(svma, candidate, function) {
                Ok(probe) => plan.probes.push(probe),
                Err(reason) => {
                    plan.skipped.push(Skipped { function: candidate.name(), reason });
                }
            }
        }
        plan.probes.sort_by_key(|probe| probe.entry_file_offset);
        if self.names.overflowed {
            plan.skipped
                .push(Skipped { function: "others".to_owned(), reason: SkipReason::TooMany });
        }
    }

    fn probe(
        &self,
        svma: u64,
        candidate: &Candidate,
        function: Function,
    ) -> Result<PlannedProbe, SkipReason> {
        self.check(svma, candidate, function)?;
        let entry_file_offset = self.file.code_offset(svma).ok_or(Refusal::NoCode)?;
        let survey = self.survey(svma, candidate)?;
        if let Some(name) = survey.tail_jump.and_then(|jump| self.forwards(svma, function, jump)) {
            return Err(SkipReason::JumpsTo(name));
        }
        if let Some(name) = self.wraps(svma, candidate, function) {
            return Err(SkipReason::Calls(name));
        }
        let arguments: Vec<u8> = function.arguments().collect();
        let exits = match self.throws(candidate, function) {
            true => self.exits(svma).ok_or(SkipReason::MayThrow)?,
            false => BTreeSet::new(),
        };
        let plan = survey.plan(&arguments, function.needs_return() && exits.is_empty());
        let offset_of = |offset: u64| {
            svma.checked_add(offset)
                .and_then(|svma| self.file.code_offset(svma))
                .ok_or(Refusal::NoCode)
        };
        let slot = |argument: Option<u8>| {
            argument
                .and_then(|argument| plan.enter.arguments.get(usize::from(argument)))
                .copied()
                .unwrap_or(RegisterSlot::NONE)
        };
        let mut names = candidate.names.iter().map(|(_, _, name)| name.clone());
        Ok(PlannedProbe {
            function: names.next().unwrap_or_default(),
            aliases: names.collect(),
            role: function.role,
            entry_file_offset,
            enter_file_offset: offset_of(plan.enter.offset)?,
            enter_cookie: Cookie {
                role: function.role,
                size_rule: function.size_rule,
                frees_on_failure: function.frees_on_failure,
                returns_unprobed: !exits.is_empty(),
                size: slot(function.size),
                second_size: slot(function.second_size),
                pointer: slot(function.pointer),
                stack_distance: plan.enter.stack_distance,
                return_optional: false,
            },
            calls_no_other: self.calls_no_other(candidate, function),
            leave_file_offset: plan.leave.map(|leave| offset_of(leave.offset)).transpose()?,
            exit_file_offsets: exits
                .into_iter()
                .map(|svma| self.file.code_offset(svma).ok_or(Refusal::NoCode))
                .collect::<Result<_, _>>()?,
            plan,
        })
    }

    fn check(
        &self,
        svma: u64,
        candidate: &Candidate,
        function: Function,
    ) -> Result<(), SkipReason> {
        if self.names.glibc_loader && !self.names.glibc {
            return Err(SkipReason::DynamicLoader);
        }
        if candidate.indirect {
            return Err(SkipReason::Indirect);
        }
        if candidate.ambiguous {
            return Err(SkipReason::Ambiguous);
        }
        if candidate.local && self.file.dynamic().is_some() {
            return Err(SkipReason::LocalName);
        }
        if function.family == Family::Operator
            && ![Family::C, Family::Jemalloc, Family::Tcmalloc, Family::Mimalloc]
                .into_iter()
                .any(|family| self.names.defines(family))
        {
            return Err(SkipReason::CallsMalloc);
        }
        if self.file.machine() != Machine::X86_64 || self.file.class() != Class::Bits64 {
            return Err(SkipReason::Architecture);
        }
        if self.names.in_go_text(self.file, svma) {
            return Err(SkipReason::GoText);
        }
        Ok(())
    }

    fn survey(&self, svma: u64, candidate: &Candidate) -> Result<Survey, Refusal> {
        let limit = |size: u64| size.clamp(64, x86_64::MAX_FUNCTION_BYTES) as usize;
        let cold: Vec<_> = candidate
            .names
            .iter()
            .filter_map(|(_, _, name)| self.names.cold.get(name))
            .flatten()
            .take(MAX_COLD_PARTS)
            .map(|&(svma, size)| (svma, self.file.code(svma, size.min(MAX_COLD_BYTES) as usize)))
            .collect();
        x86_64::survey(FunctionCode {
            svma,
            bytes: self.file.code(svma, limit(candidate.size_bytes)),
            size_bytes: candidate.size_bytes,
            cold: &cold,
        })
    }

    /// The function that this one only jumps to, if that one is probed and sees the same arguments.
    fn forwards(&self, svma: u64, function: Function, jump: TailJump) -> Option<String> {
        let (name, target) =
            self.allocator_at(jump.target_svma).filter(|_| jump.target_svma != svma)?;
        let same_meaning = target.role == function.role
            && target.size_rule == function.size_rule
            && target.frees_on_failure == function.frees_on_failure;
        let passed_on = [
            (function.size, target.size),
            (function.second_size, target.second_size),
            (function.pointer, target.pointer),
        ]
        .into_iter()
        .all(|(ours, theirs)| match (ours, theirs) {
            (None, None) => true,
            (Some(ours), Some(theirs)) => jump.passes.get(usize::from(theirs)) == Some(&Some(ours)),
            _ => false,
        });
        (same_meaning && passed_on).then_some(name)
    }

    /// The function that this one calls on every path that does not fail. Only operators and
    /// functions that multiply (`calloc`, `reallocarray`) are looked at: of these it is known that
    /// they hand out the block that they were given. A debugging `malloc` may add a header.
    fn wraps(&self, svma: u64, candidate: &Candidate, function: Function) -> Option<String> {
        let is_operator = candidate.names.iter().all(|&(family, _, _)| family == Family::Operator);
        if !is_operator && function.size_rule != SizeRule::Product {
            return None;
        }
        let goal = std::cell::RefCell::new(None);
        let reaches = flow::every_path_reaches(
            svma,
            &|svma| self.file.code(svma, 4096),
            &|target| match self.allocator_at(target) {
                Some((name, callee)) if callee.role == function.role && target != svma => {
                    goal.borrow_mut().get_or_insert(name);
                    Destination::Goal
                }
                _ if self.names.never_return.contains(&target) => Destination::End,
                _ => Destination::Other,
            },
            function.needs_return(),
        );
        goal.into_inner().filter(|_| reaches)
    }

    /// Whether no other function that is probed is called from this one. Known of a few functions of
    /// a few allocators, where it is theirs beyond doubt: nobody else has put one of that name around it.
    fn calls_no_other(&self, candidate: &Candidate, function: Function) -> bool {
        let mut allocators = self.names.allocators().into_iter().peekable();
        let known_allocators = allocators.peek().is_some()
            && allocators.all(|allocator| CALLS_NO_OTHER.0.contains(&allocator));
        let plain = |candidate: &Candidate| -> BTreeSet<&'static str> {
            let names = candidate.names.iter().map(|(_, _, name)| functions::plain(name));
            names
                .filter_map(|name| CALLS_NO_OTHER.1.iter().find(|known| **known == name))
                .copied()
                .collect()
        };
        let names = plain(candidate);
        let others = || {
            self.names.candidates.values().filter(|other| !plain(other).is_disjoint(&names)).count()
        };
        known_allocators && function.role == Role::Allocate && !names.is_empty() && others() == 1
    }

    /// Whether an exception may leave the function. An allocator that is built as C (Debian's
    /// mimalloc) has nothing to throw with.
    fn throws(&self, candidate: &Candidate, function: Function) -> bool {
        let by_name = candidate.names.iter().any(|(_, _, name)| functions::may_throw(name));
        let can = || {
            let mut imports = self.all_imports().values();
            self.names.throws || imports.any(|(name, _)| THROWING.contains(&name.as_str()))
        };
        function.role != Role::Free && by_name && can()
    }

    fn exits(&self, svma: u64) -> Option<BTreeSet<u64>> {
        flow::exits(svma, &|svma| self.file.code(svma, 4096), &|target| {
            if self.names.never_return.contains(&target) {
                return Onward::Nowhere;
            }
            // It has probes of its own.
            if target != svma && self.names.candidates.contains_key(&target) {
                return Onward::Elsewhere;
            }
            let stub = flow::import_slot(self.file.code(target, 32), target);
            match stub.map(|slot| self.all_imports().get(&slot)) {
                None => Onward::Code(target),
                Some(Some((name, _))) if NEVER_RETURNING.contains(&name.as_str()) => {
                    Onward::Nowhere
                }
                Some(Some((_, Some(defined)))) => Onward::Code(*defined),
                Some(_) => Onward::Unknown,
            }
        })
    }

    fn all_imports(&self) -> &BTreeMap<u64, (String, Option<u64>)> {
        self.all_imports.get_or_init(|| {
            let mut slots = BTreeMap::new();
            self.file.visit_import_slots(&mut |slot, name| {
                if slots.len() < MAX_IMPORTS {
                    slots.insert(slot, (String::from_utf8_lossy(name).into_owned(), None));
                }
            });
            let names: HashSet<&str> = slots.values().map(|(name, _)| name.as_str()).collect();
            let mut defined = HashMap::new();
            self.file.visit_functions(&mut |symbol| {
                if symbol.table == Table::Dynamic
                    && symbol.svma != 0
                    && let Ok(name) = std::str::from_utf8(symbol.name)
                    && let Some(&name) = names.get(name.split('@').next().unwrap_or(name))
                {
                    defined.insert(name.to_owned(), symbol.svma);
                }
            });
            for (name, svma) in slots.values_mut() {
                *svma = defined.get(name).copied();
            }
            slots
        })
    }

    fn is_probable(&self, svma: u64) -> bool {
        let bytes = self.file.code(svma, 64);
        let entry = FunctionCode { svma, bytes, size_bytes: 0, cold: &[] };
        self.file.code_offset(svma).is_some() && x86_64::survey(entry).is_ok()
    }

    /// The allocator function at an address, or behind the import stub there, where a call will be
    /// counted. An import is: whichever file defines it is planned, too.
    fn allocator_at(&self, svma: u64) -> Option<(String, Function)> {
        if let Some(candidate) = self.names.candidates.get(&svma) {
            let function = candidate.function?;
            let counted = self.check(svma, candidate, function).is_ok() && self.is_probable(svma);
            return counted.then(|| (candidate.name(), function));
        }
        let slot = flow::import_slot(self.file.code(svma, 32), svma)?;
        let name = self.imports.get(&slot)?;
        Some((name.clone(), functions::lookup(name.as_bytes())?))
    }
}

fn imports(file: &ElfFile<'_>) -> BTreeMap<u64, String> {
    let mut imports = BTreeMap::new();
    file.visit_import_slots(&mut |slot, name| {
        if imports.len() < MAX_FUNCTIONS && functions::lookup(name).is_some() {
            imports.insert(slot, String::from_utf8_lossy(name).into_owned());
        }
    });
    imports
}

/// Allocators whose messages are in the file, named or not: a stripped file keeps them. Reads the
/// whole file, so it is for a process in whose files [`discover`] found no allocator at all.
pub fn allocators_by_message(file: &ElfFile<'_>) -> BTreeSet<Allocator> {
    let data = file.data();
    let searched = data.get(..MAX_SEARCHED_BYTES).unwrap_or(data);
    [
        (r"<jemalloc>: ", Allocator::Jemalloc),
        (r"mimalloc: (?:warning|error|process)", Allocator::Mimalloc),
        (r"tcmalloc: large alloc|TCMALLOC_", Allocator::Tcmalloc),
        (r"malloc\(\): corrupted top size", Allocator::Glibc),
    ]
    .into_iter()
    .filter(|(message, _)| Regex::new(message).is_ok_and(|message| message.is_match(searched)))
    .map(|(_, allocator)| allocator)
    .collect()
}

#[cfg(test)]
#[path = "discover/tests/mod.rs"]
mod tests;
