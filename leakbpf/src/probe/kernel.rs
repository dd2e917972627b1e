//! The kernel side, loaded: programs, maps and links.

use std::{
    collections::HashMap,
    io,
    num::NonZeroU32,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
    sync::Arc,
};

use aya::{
    Btf, Ebpf, include_bytes_aligned,
    maps::{Map, MapData, PerCpuArray, RingBuf},
    programs::{
        FEntry, FExit, RawTracePoint, TracePoint, UProbe, raw_trace_point::RawTracePointLink,
    },
};
use leakbpf_common::{
    abi::{
        Block, BlockKey, Control, Cost, Loss, Outcome, ProcessState, SiteCounters, SiteKey, Tally,
    },
    ledger::ThreadState,
    sampling::Sampling,
};

use super::{
    attach::{
        Link, Site, Use, attach, attach_multi, attach_tracepoint, multi_has_calls,
        multi_is_by_process,
    },
    fdinfo,
    program::{ProgramError, Programs},
    settings::{Links, Settings},
    tables::Table,
    unwind_maps::UnwindMaps,
};
use crate::{
    preflight::tracepoint::TracepointFormat,
    process::{preemption, tracefs},
};

static OBJECT: &[u8] = include_bytes_aligned!("../../bpf/leakbpf.bpf.o");

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("cannot load the kernel side: {0}")]
    Load(String),
    #[error("cannot load the program {program} into the kernel: {reason}")]
    Program { program: &'static str, reason: String },
    #[error("cannot attach {program} to {place}: {reason}")]
    Attach { program: &'static str, place: String, reason: String },
    #[error("cannot read the kernel side's map {map}")]
    Map { map: &'static str, source: io::Error },
}

/// Which program runs at a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Program {
    AllocEnter,
    AllocLeave,
    /// `AllocEnter` and `AllocLeave` in one, which can do without the latter for a call: see
    /// [`Kernel::has_sessions`].
    AllocCall,
    /// Like `AllocLeave`, at a return instruction.
    AllocExit,
    FreeEnter,
    LibrariesChanged,
    EmptyEnter,
    EmptyLeave,
}

impl Program {
    const ALL: [Self; 8] = [
        Self::AllocEnter,
        Self::AllocLeave,
        Self::AllocCall,
        Self::AllocExit,
        Self::FreeEnter,
        Self::LibrariesChanged,
        Self::EmptyEnter,
        Self::EmptyLeave,
    ];

    /// Runs when the function returns.
    const fn at_return(self) -> bool {
        matches!(self, Self::AllocLeave | Self::EmptyLeave)
    }

    const fn purpose(self) -> Use {
        match self {
            Self::AllocCall => Use::Call,
            _ => Use::Place,
        }
    }

    /// The programs that do the same, each with a perf event of its own.
    const fn single(&self) -> &[Self] {
        match self {
            Self::AllocCall => &[Self::AllocLeave, Self::AllocEnter],
            one => std::slice::from_ref(one),
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::AllocEnter => "alloc_enter",
            Self::AllocLeave => "alloc_leave",
            Self::AllocCall => "alloc_call",
            Self::AllocExit => "alloc_exit",
            Self::FreeEnter => "free_enter",
            Self::LibrariesChanged => "libraries_changed",
            Self::EmptyEnter => "empty_enter",
            Self::EmptyLeave => "empty_leave",
        }
    }
}

/// Programs on the kernel's functions for mapping system calls: begins, then ends. Releases come
/// first: what is seen to come must be seen to go.
const MAPPING_BEGINS: [(&str, &str); 2] =
    [("munmap_fentry", "__x64_sys_munmap"), ("mremap_fentry", "__x64_sys_mremap")];
const MAPPING_ENDS: [(&str, &str); 4] = [
    ("mremap_fexit", "__x64_sys_mremap"),
    ("munmap_fexit", "__x64_sys_munmap"),
    ("brk_fexit", "__x64_sys_brk"),
    ("mmap_fexit", "__x64_sys_mmap"),
];

/// The same through tracepoints.
const MAPPING_TRACEPOINTS: [(&str, &str); 6] = [
    ("munmap_entry", "syscalls/sys_enter_munmap"),
    ("mremap_entry", "syscalls/sys_enter_mremap"),
    ("mremap_exit", "syscalls/sys_exit_mremap"),
    ("munmap_exit", "syscalls/sys_exit_munmap"),
    ("brk_exit", "syscalls/sys_exit_brk"),
    ("mmap_exit", "syscalls/sys_exit_mmap"),
];

const PROCESS_TRACEPOINTS: [(&str, &str); 3] = [
    ("thread_exit", "sched/sched_process_exit"),
    ("process_exec", "sched/sched_process_exec"),
    ("task_new", "task/task_newtask"),
];

/// Programs on page faults, with their tracepoints (`exceptions`).
const PAGE_FAULTS: [&str; 2] = ["page_fault_user", "page_fault_kernel"];

/// How anonymous mappings are seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MappingEvents {
    /// On the kernel's functions (fentry, fexit).
    Functions,
    /// On the system calls' tracepoints: every system call of the machine takes the kernel's
    /// slower path while the session runs.
    Tracepoints,
}

/// Counters of the kernel side, summed over the CPUs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    pub losses: [u64; Loss::ALL.len()],
    pub unknown_frees: u64,
    pub abandoned_calls: u64,
    /// Stacks walked, by [`Outcome`].
    pub outcomes: [u64; Outcome::ALL.len()],
}

#[repr(transparent)]
#[derive(Clone, Copy)]
struct CostEntry(Cost);

// SAFETY: integers without padding.
unsafe impl aya::Pod for CostEntry {}

/// Probes that were to be placed together.
#[derive(Debug, Default)]
pub struct Placing {
    pub links: Vec<Link>,
    /// Which of them could not be placed.
    pub refused: Vec<(Site, KernelError)>,
}

pub struct Kernel {
    ebpf: Ebpf,
    /// Programs for links to many places; none where the kernel has no such links.
    multi: HashMap<Program, OwnedFd>,
    pub blocks: Table<BlockKey, Block>,
    pub sites: Table<SiteKey, SiteCounters>,
    pub threads: Table<u64, ThreadState>,
    pub processes: Arc<Table<u32, ProcessState>>,
    pub unwind: Arc<UnwindMaps>,
    /// Threads that a process's probes hang on.
    pub carriers: Table<u32, u32>,
    control: Table<u32, Control>,
    /// What the control map holds.
    switches: Control,
    counts: PerCpuArray<MapData, u64>,
    costs: PerCpuArray<MapData, CostEntry>,
    tracepoints: Vec<Link>,
    page_faults: Vec<RawTracePointLink>,
}

fn load_error(error: impl std::error::Error) -> KernelError {
    KernelError::Load(chain(&error))
}

/// An error with its causes on one line, without verifier logs.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = first_line(&error.to_string());
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = first_line(&cause.to_string());
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

impl Kernel {
    /// Loads the maps and the programs; nothing is attached yet and nothing counts.
    pub fn load(settings: &Settings) -> Result<Self, KernelError> {
        let mut ebpf = settings.load(OBJECT).map_err(load_error)?;
        let multi = match settings.links {
            Links::Many if settings.probes => load_multi(&ebpf),
            Links::Many | Links::Single => HashMap::new(),
        };
        let counts = PerCpuArray::try_from(take_map(&mut ebpf, "COUNTS")?).map_err(load_error)?;
        let costs = PerCpuArray::try_from(take_map(&mut ebpf, "COSTS")?).map_err(load_error)?;
        let blocks = table(&mut ebpf, "BLOCKS")?;
        let sites = table(&mut ebpf, "SITES")?;
        let threads = table(&mut ebpf, "THREADS")?;
        let processes = Arc::new(table(&mut ebpf, "PROCESSES")?);
        let carriers = table(&mut ebpf, "CARRIERS")?;
        let control = table(&mut ebpf, "CONTROL")?;
        let tables = map_data(take_map(&mut ebpf, "TABLES")?, "TABLES")?;
        let spaces = map_data(take_map(&mut ebpf, "SPACES")?, "SPACES")?;
        let unwind = UnwindMaps::new(tables, spaces)
            .map_err(|source| KernelError::Map { map: "TABLES", source })?;
        let unwind = Arc::new(unwind);
        let mut kernel = Self {
            ebpf,
            multi,
            blocks,
            sites,
            threads,
            processes,
            unwind,
            carriers,
            control,
            switches: Control::default(),
            counts,
            costs,
            tracepoints: Vec::new(),
            page_faults: Vec::new(),
        };
        let failed = |program| move |error| KernelError::Program { program, reason: chain(&error) };
        if settings.pages.is_some() {
            for name in PAGE_FAULTS {
                kernel.program::<RawTracePoint>(name)?.load().map_err(failed(name))?;
            }
        }
        if !settings.probes {
            return Ok(kernel);
        }
        if kernel.multi.is_empty() {
            for program in Program::ALL.into_iter().filter(|one| one.purpose() == Use::Place) {
                let name = program.name();
                kernel.program::<UProbe>(name)?.load().map_err(failed(name))?;
            }
        }
        Ok(kernel)
    }

    /// The ring buffer; can be taken once.
    pub fn take_records(&mut self) -> Result<RingBuf<MapData>, KernelError> {
        RingBuf::try_from(take_map(&mut self.ebpf, "RECORDS")?).map_err(load_error)
    }

    fn program<'a, P>(&'a mut self, name: &'static str) -> Result<&'a mut P, KernelError>
    where
        &'a mut P: TryFrom<&'a mut aya::programs::Program>,
    {
        self.ebpf
            .program_mut(name)
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| KernelError::Load(format!("the object has no program {name}")))
    }

    fn attach_tracepoint(
        &mut self,
        (program, event): (&'static str, &str),
    ) -> Result<(), KernelError> {
        let tracepoint: &mut TracePoint = self.program(program)?;
        tracepoint
            .load()
            .map_err(|error| KernelError::Program { program, reason: chain(&error) })?;
        let failed =
            |reason: String| KernelError::Attach { program, place: event.to_owned(), reason };
        let format = tracefs::tracepoint_format(event).map_err(|error| failed(chain(&error)))?;
        let format = TracepointFormat::parse(&format).map_err(|error| failed(chain(&error)))?;
        let fd = tracepoint.fd().map_err(|error| failed(chain(&error)))?;
        let link =
            attach_tracepoint(fd.as_fd(), format.id).map_err(|error| failed(error.to_string()))?;
        self.tracepoints.push(link);
        Ok(())
    }

    /// Attaches what tells of processes: fork, exec, exit.
    pub fn attach_process_events(&mut self) -> Result<(), KernelError> {
        PROCESS_TRACEPOINTS.into_iter().try_for_each(|event| self.attach_tracepoint(event))
    }

    /// Attaches what tells of page faults.
    pub fn attach_page_faults(&mut self) -> Result<(), KernelError> {
        for name in PAGE_FAULTS {
            let failed = |error| KernelError::Attach {
                program: name,
                place: format!("exceptions:{name}"),
                reason: chain(&error),
            };
            let program: &mut RawTracePoint = self.program(name)?;
            let link = program.attach(name).and_then(|id| program.take_link(id)).map_err(failed)?;
            self.page_faults.push(link);
        }
        Ok(())
    }

    /// Takes away what [`Kernel::attach_page_faults`] attached.
    pub fn detach_page_faults(&mut self) {
        self.page_faults.clear();
    }

    /// Attaches what tells of anonymous mappings: to the kernel's functions where it allows that
    /// (BTF, ftrace) and leaves none out, which costs other system calls nothing, else to tracepoints.
    pub fn attach_mapping_events(&mut self) -> Result<MappingEvents, KernelError> {
        if self.attach_mapping_functions().is_ok() {
            return Ok(MappingEvents::Functions);
        }
        self.switch(Control { mappings: 1, ..self.switches })?;
        MAPPING_TRACEPOINTS.into_iter().try_for_each(|event| self.attach_tracepoint(event))?;
        Ok(MappingEvents::Tracepoints)
    }

    /// As [`Self::attach_mapping_events`], by the kernel's functions only.
    ///
    /// A kernel that preempts itself leaves runs of programs on functions out: see
    /// [`Self::mappings_missed`]. Those on tracepoints it does not interrupt.
    pub fn attach_mapping_functions(&mut self) -> Result<(), KernelError> {
        if preemption::kernel_preempts() {
            return Err(KernelError::Load(
                "this kernel preempts itself, and leaves out runs of programs on its functions"
                    .to_owned(),
            ));
        }
        let btf = Btf::from_sys_fs().map_err(load_error)?;
        let failed = |program| {
            move |error: aya::programs::ProgramError| KernelError::Program {
                program,
                reason: chain(&error),
            }
        };
        // All are loaded before any is attached, so that a refusal leaves nothing behind.
        for (program, function) in MAPPING_BEGINS {
            self.program::<FEntry>(program)?.load(function, &btf).map_err(failed(program))?;
        }
        for (program, function) in MAPPING_ENDS {
            self.program::<FExit>(program)?.load(function, &btf).map_err(failed(program))?;
        }
        self.switch(Control { mappings: 1, ..self.switches })?;
        for (program, _) in MAPPING_BEGINS {
            self.program::<FEntry>(program)?.attach().map_err(failed(program))?;
        }
        for (program, _) in MAPPING_ENDS {
            self.program::<FExit>(program)?.attach().map_err(failed(program))?;
        }
        Ok(())
    }

    /// Runs of the programs on mapping calls that the kernel has left out: where it preempts, a call
    /// that begins while another one's program waits on the same CPU goes unseen
    /// (kernel/bpf/trampoline.c, `__bpf_prog_enter_recur`).
    pub fn mappings_missed(&self) -> u64 {
        let programs = MAPPING_BEGINS.iter().chain(&MAPPING_ENDS).map(|(program, _)| *program);
        programs.map(|name| self.ebpf.program(name).map_or(0, missed_runs)).sum()
    }

    /// Places probes in a file, with one link if the kernel can do that. `pid` limits them to one
    /// process, through one of its threads; without it, every process that maps the file gets them.
    pub fn place(
        &mut self,
        program: Program,
        file: &Path,
        sites: &[Site],
        pid: Option<NonZeroU32>,
    ) -> Placing {
        if let Some(fd) = self.multi.get(&program)
            && let Ok(link) =
                attach_multi(fd.as_fd(), (program.purpose(), program.at_return()), file, sites, pid)
        {
            return Placing { links: vec![link], refused: Vec::new() };
        }
        // One of them may be refused, or the process's first thread has ended.
        self.place_single(program, file, sites, pid)
    }

    /// Whether one program can be placed at a function's entry and return, and say at the entry
    /// whether it wants to see the return.
    pub fn has_sessions(&self) -> bool {
        self.multi.contains_key(&Program::AllocCall)
    }

    /// As [`Self::place`], with a link for each.
    pub fn place_single(
        &mut self,
        program: Program,
        file: &Path,
        sites: &[Site],
        pid: Option<NonZeroU32>,
    ) -> Placing {
        let mut placing = Placing::default();
        for &site in sites {
            let links = program.single().iter().map(|&one| self.place_one(one, file, site, pid));
            match links.collect::<Result<Vec<_>, _>>() {
                Ok(links) => placing.links.extend(links),
                Err(error) => placing.refused.push((site, error)),
            }
        }
        placing
    }

    fn place_one(
        &mut self,
        program: Program,
        file: &Path,
        site: Site,
        pid: Option<NonZeroU32>,
    ) -> Result<Link, KernelError> {
        let name = program.name();
        let failed = |reason: String| KernelError::Attach {
            program: name,
            place: format!("{}+{:#x}", file.display(), site.file_offset),
            reason,
        };
        let uprobe: &mut UProbe = self.program(name)?;
        if uprobe.fd().is_err() {
            uprobe.load().map_err(|error| failed(chain(&error)))?;
        }
        let fd = uprobe.fd().map_err(|error| failed(chain(&error)))?;
        attach(fd.as_fd(), program.at_return(), file, site, pid)
            .map_err(|error| failed(error.to_string()))
    }

    /// Begins or stops counting. After stopping, no program is in the middle of anything.
    pub fn enable(&mut self, on: bool) -> Result<(), KernelError> {
        self.switch(Control { enabled: on.into(), calls: on.into(), ..self.switches })?;
        if !on {
            // membarrier(2), MEMBARRIER_CMD_GLOBAL: waits for an RCU grace period, and programs
            // run inside RCU read sections.
            // SAFETY: no pointers are passed.
            let result = unsafe { libc::syscall(libc::SYS_membarrier, 1, 0, 0) };
            if result < 0 {
                // nohz_full kernels refuse; the programs take microseconds.
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
        Ok(())
    }

    /// Begins or stops counting calls of allocators; whatever else is seen goes on. After stopping,
    /// a program may be in the middle of a call.
    pub fn count_calls(&mut self, on: bool) -> Result<(), KernelError> {
        self.switch(Control { enabled: 1, calls: on.into(), ..self.switches })
    }

    /// From now on blocks are recorded in this way. Needs [`Settings::may_sample`].
    pub fn sample(&mut self, sampling: Sampling) -> Result<(), KernelError> {
        self.switch(Control { sampling, ..self.switches })
    }

    fn switch(&mut self, control: Control) -> Result<(), KernelError> {
        self.switches = control;
        self.control.set(&0, control).map_err(|source| KernelError::Map { map: "CONTROL", source })
    }

    /// What the programs have cost the processes so far.
    pub fn cost(&self) -> Result<Cost, KernelError> {
        let values = self
            .costs
            .get(&0, 0)
            .map_err(|error| KernelError::Map { map: "COSTS", source: io::Error::other(error) })?;
        let mut sum = Cost::default();
        for CostEntry(cost) in values.iter() {
            sum.optional_returns += cost.optional_returns;
            sum.returns_let_go += cost.returns_let_go;
            sum.faults += cost.faults;
            for (sum, runs) in [(&mut sum.hits, &cost.hits), (&mut sum.touches, &cost.touches)] {
                sum.count += runs.count;
                sum.timed += runs.timed;
                sum.timed_ns += runs.timed_ns;
            }
        }
        Ok(sum)
    }

    pub fn counts(&self) -> Result<Counts, KernelError> {
        let sum = |index: u32| -> Result<u64, KernelError> {
            let values = self.counts.get(&index, 0).map_err(|error| KernelError::Map {
                map: "COUNTS",
                source: io::Error::other(error),
            })?;
            Ok(values.iter().sum())
        };
        let mut counts = Counts {
            unknown_frees: sum(Tally::UnknownFrees as u32)?,
            abandoned_calls: sum(Tally::AbandonedCalls as u32)?,
            ..Counts::default()
        };
        for (slot, loss) in counts.losses.iter_mut().zip(Loss::ALL) {
            *slot = sum(loss as u32)?;
        }
        for (slot, outcome) in counts.outcomes.iter_mut().zip(Outcome::ALL) {
            *slot = sum(outcome.counter())?;
        }
        Ok(counts)
    }
}

/// The uprobe programs for links to many places. None when the kernel has no such links, or takes
/// them wrong: then each probe gets its own.
fn load_multi(ebpf: &Ebpf) -> HashMap<Program, OwnedFd> {
    let loaded = match try_load_multi(ebpf) {
        Ok(loaded) => loaded,
        Err(error) => {
            log::debug!("no links to many places: {}", chain(&error));
            return HashMap::new();
        }
    };
    let any = loaded.get(&Program::EmptyEnter);
    if !any.is_some_and(|program| multi_is_by_process(program.as_fd())) {
        log::debug!("no links to many places: the kernel limits them to threads");
        return HashMap::new();
    }
    loaded
}

fn try_load_multi(ebpf: &Ebpf) -> Result<HashMap<Program, OwnedFd>, ProgramError> {
    let programs = Programs::of(OBJECT, ebpf)?;
    let mut loaded = HashMap::new();
    for program in Program::ALL {
        match programs.load(program.name(), program.purpose()) {
            // Newer than the others.
            Ok(fd) if program.purpose() == Use::Call && !multi_has_calls(fd.as_fd()) => {
                log::debug!("no sessions of uprobes");
            }
            Ok(fd) => {
                loaded.insert(program, fd);
            }
            Err(error) if program.purpose() == Use::Call => {
                log::debug!("no sessions of uprobes: {}", chain(&error));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(loaded)
}

/// Runs of a program that the kernel has left out; none are known of one that is not loaded.
fn missed_runs(program: &aya::programs::Program) -> u64 {
    let fd = match program {
        aya::programs::Program::FEntry(program) => program.fd(),
        aya::programs::Program::FExit(program) => program.fd(),
        _ => return 0,
    };
    let Ok(fd) = fd else { return 0 };
    // `bpf_prog_show_fdinfo` in kernel/bpf/syscall.c
    fdinfo::number(fd.as_fd().as_raw_fd(), "recursion_misses").ok().flatten().unwrap_or(0)
}

fn take_map(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, KernelError> {
    ebpf.take_map(name).ok_or_else(|| KernelError::Load(format!("the object has no map {name}")))
}

fn map_data(map: Map, name: &'static str) -> Result<MapData, KernelError> {
    match map {
        Map::HashMap(data) | Map::Array(data) | Map::ArrayOfMaps(data) => Ok(data),
        _ => Err(KernelError::Load(format!("the map {name} is of another kind"))),
    }
}

fn table<K: super::tables::Wire, V: super::tables::Wire>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<Table<K, V>, KernelError> {
    let data = map_data(take_map(ebpf, name)?, name)?;
    Table::new(data).map_err(|source| KernelError::Map { map: name, source })
}

#[cfg(test)]
mod tests {
    use aya_obj::{Function, Object, ProgramSection};

    use super::{OBJECT, Program};

    /// Of the number in `enum bpf_func_id`.
    fn has_tail_call(function: &Function) -> bool {
        function.instructions.iter().any(|instruction| {
            instruction.code == 0x85 && instruction.src_reg() == 0 && instruction.imm == 12
        })
    }

    /// `r10`, through which a program reaches its stack.
    fn uses_stack(function: &Function) -> bool {
        function
            .instructions
            .iter()
            .any(|instruction| [instruction.dst_reg(), instruction.src_reg()].contains(&10))
    }

    #[test]
    fn no_program_on_a_uprobe_gets_a_private_stack() {
        let object = Object::parse(OBJECT).expect("the committed object");
        let mut checked = 0;
        for (name, program) in &object.programs {
            if !matches!(
                program.section,
                ProgramSection::UProbe { .. } | ProgramSection::URetProbe { .. }
            ) {
                continue;
            }
            let function = &object.functions[&program.function_key()];
            assert!(
                !uses_stack(function) || has_tail_call(function),
                "{name} must begin with kernel_stack::keep(): on a private stack, kernels crash"
            );
            checked += 1;
        }
        assert_eq!(checked, Program::ALL.len());
    }
}
