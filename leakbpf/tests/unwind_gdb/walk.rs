//! A walk over the stack of a stopped process: the same step and tables as the kernel side's.

use std::{
    collections::HashMap,
    fs::File,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use leakbpf::{
    elf::{
        image::{Image, Source},
        layout::Layout,
    },
    process::{
        Pid,
        maps::{Backing, Maps},
    },
    symbolize::vdso,
    unwind::Table,
};
use leakbpf_common::{
    abi::Outcome,
    unwind::{Registers, Rule, Step, cfa, step},
};

/// Deeper than any stack of the targets.
const FRAMES_MAX: usize = 1000;

struct Module {
    layout: Layout,
    table: Table,
}

/// The modules met so far; unchanged files need to be compiled only once.
#[derive(Default)]
pub struct Modules {
    by_path: HashMap<PathBuf, Module>,
}

impl Modules {
    fn file(&mut self, path: &Path) -> &Module {
        self.by_path.entry(path.to_owned()).or_insert_with(|| {
            let open = || File::open(path).expect("mapped files of our own children are there");
            let layout = Layout::of_file(&open()).expect("executable mappings are of ELF files");
            let image = Image::open(Source::File(open())).expect("64-bit ELF file");
            Module { layout, table: Table::of_image(&image).expect("x86-64 code") }
        })
    }

    fn vdso(&mut self) -> &Module {
        self.by_path.entry(PathBuf::from("[vdso]")).or_insert_with(|| {
            let bytes = vdso::image_bytes().expect("the kernel maps a vDSO");
            let layout = Layout::of_bytes(&bytes).expect("the vDSO is an ELF file");
            Module { layout, table: Table::of_bytes(&bytes).expect("x86-64 code") }
        })
    }
}

/// A stack as we see it.
#[derive(Debug)]
pub struct Stack {
    /// Innermost first.
    pub addresses: Vec<u64>,
    pub outcome: Outcome,
    /// The address that lies in no executable mapping, when that is why the walk stopped.
    pub bad_address: Option<u64>,
    /// How many frames were found by rows, from the innermost on.
    pub by_rows: usize,
    /// The last of these is in code without rows.
    pub met_rowless: bool,
}

pub fn walk(pid: Pid, modules: &mut Modules, registers: Registers) -> Stack {
    let maps = Maps::of(pid).expect("the process is stopped");
    let memory = File::open(pid.proc_path("mem")).expect("our own child's memory");
    let read = |address| {
        let mut word = [0; 8];
        memory.read_exact_at(&mut word, address).ok()?;
        Some(u64::from_ne_bytes(word))
    };
    let mut stack = Stack {
        addresses: Vec::new(),
        outcome: Outcome::Truncated,
        bad_address: None,
        by_rows: 0,
        met_rowless: false,
    };
    let mut registers = registers;
    while stack.addresses.len() < FRAMES_MAX {
        let Some(rule) = rule_at(&maps, modules, registers.lookup_ip()) else {
            stack.outcome = Outcome::BadAddress;
            stack.bad_address = Some(registers.ip);
            break;
        };
        stack.addresses.push(registers.ip);
        stack.by_rows += usize::from(!stack.met_rowless);
        stack.met_rowless |= rule.cfa == cfa::FRAME_POINTER;
        match step(&rule, &registers, read) {
            Step::Frame(caller) => registers = caller,
            Step::End => {
                stack.outcome = Outcome::Complete;
                break;
            }
            Step::Stop(outcome) => {
                stack.outcome = outcome;
                break;
            }
        }
    }
    stack
}

/// `None` outside of executable mappings.
fn rule_at(maps: &Maps, modules: &mut Modules, avma: u64) -> Option<Rule> {
    let mapping = maps.find(avma).filter(|mapping| mapping.permissions.execute)?;
    let into = avma - mapping.start_avma;
    let (module, file_offset) = match &mapping.backing {
        Backing::File { path, .. } => (modules.file(path), mapping.file_offset + into),
        Backing::Special(name) if name == "[vdso]" => (modules.vdso(), into),
        _ => return Some(Rule::FRAME_POINTER),
    };
    Some(
        module.layout.svma(file_offset).map_or(Rule::FRAME_POINTER, |svma| module.table.rule(svma)),
    )
}
