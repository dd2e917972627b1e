//! What a session found, as plain data: the input of every report.
//!
//! A [`Profile`] is one snapshot (the final one, unless asked otherwise) of everything that was
//! recorded. Reports are pure functions of it; a recording is its stored form.

use std::collections::BTreeMap;
use std::sync::Arc;

use estimate::{Estimate, Interval, Spread};

use leakbpf_common::sampling;

pub mod estimate;
#[cfg(test)]
pub(crate) mod samples;

/// How the numbers were obtained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Every block is counted.
    Exact,
    /// Resident memory by who touched it first, from one page in `one_in`.
    Pages { one_in: u32 },
    /// Blocks, of which one is recorded every `interval_bytes` on average, since so long after the
    /// session's begin; before, every one was.
    Sample { interval_bytes: u32, since_ns: u64 },
    /// What outlives the windows of time in which every block is counted.
    Windows,
}

impl Mode {
    /// As recordings and reports write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Pages { .. } => "pages",
            Self::Sample { .. } => "sample",
            Self::Windows => "windows",
        }
    }

    /// How much is chosen, as recordings call it and as numbers.
    pub fn choice(self) -> Vec<(&'static str, u64)> {
        match self {
            Self::Exact | Self::Windows => Vec::new(),
            Self::Pages { one_in } => vec![(Self::ONE_IN, one_in.into())],
            Self::Sample { interval_bytes, since_ns } => vec![
                (Self::SAMPLE_INTERVAL, interval_bytes.into()),
                (Self::SAMPLED_SINCE, since_ns),
            ],
        }
    }

    pub const ONE_IN: &'static str = "one_in";
    pub const SAMPLE_INTERVAL: &'static str = "sample_interval_bytes";
    pub const SAMPLED_SINCE: &'static str = "sampled_since_ns";

    /// From [`Self::name`] and what [`Self::choice`] named.
    pub fn from_name(name: &str, choice: impl Fn(&str) -> Option<u64>) -> Option<Self> {
        let up_to = |most: u32, key| {
            let number = u32::try_from(choice(key)?).ok()?;
            (1..=most).contains(&number).then_some(number)
        };
        match name {
            "exact" => Some(Self::Exact),
            "windows" => Some(Self::Windows),
            "pages" => Some(Self::Pages { one_in: up_to(Self::MAX_ONE_IN, Self::ONE_IN)? }),
            "sample" => {
                let most = sampling::MAX_INTERVAL_BYTES as u32;
                Some(Self::Sample {
                    interval_bytes: up_to(most, Self::SAMPLE_INTERVAL)?,
                    since_ns: choice(Self::SAMPLED_SINCE)?,
                })
            }
            _ => None,
        }
    }

    /// Most pages of which one is looked at.
    pub const MAX_ONE_IN: u32 = 1 << 20;

    /// What is counted.
    pub const fn noun(self) -> &'static str {
        match self {
            Self::Exact | Self::Sample { .. } | Self::Windows => "block",
            Self::Pages { .. } => "page",
        }
    }

    /// Whether a profile of this mode has sites of a kind.
    pub const fn shows(self, kind: SiteKind) -> bool {
        let beside = match kind {
            SiteKind::Survivor => true,
            SiteKind::Resident => !matches!(self, Self::Pages { .. }),
            _ => false,
        };
        beside || self.lists(kind)
    }

    /// Whether what is live at sites of a kind is listed block by block.
    pub const fn lists(self, kind: SiteKind) -> bool {
        match (self, kind) {
            (Self::Windows, _) | (_, SiteKind::Survivor) => false,
            (Self::Pages { .. }, kind) => matches!(kind, SiteKind::Resident),
            (Self::Exact | Self::Sample { .. }, kind) => !matches!(kind, SiteKind::Resident),
        }
    }

    /// Whether sites of a kind add up to what the mode tells of. The rest stands beside it.
    pub const fn counts(self, kind: SiteKind) -> bool {
        match (self, kind) {
            (Self::Windows, SiteKind::Survivor) => true,
            (_, SiteKind::AllocatorMapping) => false,
            _ => self.lists(kind),
        }
    }

    /// Whether there are numbers that are estimates.
    pub const fn estimates(self) -> bool {
        !matches!(self, Self::Exact)
    }

    /// What one thing of a kind that was seen adds to what is live; it is there since so long after
    /// the session's begin.
    pub fn estimate(self, kind: SiteKind, size_bytes: u64, born_ns: u64) -> Estimate {
        match (self, kind) {
            (Self::Pages { one_in }, SiteKind::Resident) => Estimate::times(size_bytes, one_in),
            (Self::Sample { interval_bytes, since_ns }, SiteKind::Heap) if born_ns >= since_ns => {
                Estimate::sampled(size_bytes, interval_bytes)
            }
            _ => Estimate::times(size_bytes, 1),
        }
    }
}

/// What kind of memory a site holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SiteKind {
    /// Blocks handed out by an allocator (`malloc`, `operator new`, …).
    Heap,
    /// Anonymous mappings that the program made itself (`mmap`, `brk`).
    Mapping,
    /// Stacks of threads (`mmap` with `MAP_STACK`).
    ThreadStack,
    /// Anonymous memory that an allocator fetched from the kernel to serve [`SiteKind::Heap`].
    /// Never added to the totals: its use is already counted there, block by block. See
    /// [`Mode::counts`].
    AllocatorMapping,
    /// Pages that were touched and are resident, whatever they were asked for as.
    Resident,
    /// Blocks that outlive the windows in which they are made: see [`Windows`].
    Survivor,
}

impl SiteKind {
    pub const ALL: [Self; 6] = [
        Self::Heap,
        Self::Mapping,
        Self::ThreadStack,
        Self::AllocatorMapping,
        Self::Resident,
        Self::Survivor,
    ];

    /// As recordings and reports write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Heap => "heap",
            Self::Mapping => "mapping",
            Self::ThreadStack => "thread_stack",
            Self::AllocatorMapping => "allocator_mapping",
            Self::Resident => "resident",
            Self::Survivor => "survivor",
        }
    }
}

/// Why a stack ends where it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StackOutcome {
    /// Walked to the thread's first frame.
    Complete,
    /// Deeper than the frame limit.
    Truncated,
    /// Code without unwind rows whose frame pointer is none.
    NoFramePointer,
    /// Stack memory could not be read.
    Unreadable,
    /// A frame points to no executable mapping.
    BadAddress,
    /// A return probe hides the frames above.
    Trampoline,
    /// The stack was not captured (no scratch memory was free).
    Lost,
    /// No unwind rows are loaded for a frame's module.
    NoRow,
    /// A frame's caller would not lie above it.
    StackNotGrowing,
    /// The unwind rows need a register or an expression that is not followed.
    UnsupportedRule,
}

impl StackOutcome {
    pub const ALL: [Self; 10] = [
        Self::Complete,
        Self::Truncated,
        Self::NoFramePointer,
        Self::Unreadable,
        Self::BadAddress,
        Self::Trampoline,
        Self::Lost,
        Self::NoRow,
        Self::StackNotGrowing,
        Self::UnsupportedRule,
    ];

    /// As recordings and reports write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Truncated => "truncated",
            Self::NoFramePointer => "no_frame_pointer",
            Self::Unreadable => "unreadable",
            Self::BadAddress => "bad_address",
            Self::Trampoline => "trampoline",
            Self::Lost => "lost",
            Self::NoRow => "no_row",
            Self::StackNotGrowing => "stack_not_growing",
            Self::UnsupportedRule => "unsupported_rule",
        }
    }

    /// Why the callers further out are missing; `None` when none is.
    pub const fn gap(self) -> Option<&'static str> {
        match self {
            Self::Complete => None,
            Self::Truncated => Some("deeper than the frame limit"),
            Self::NoFramePointer => Some("code without frame pointers"),
            Self::Unreadable => Some("stack memory could not be read"),
            Self::BadAddress => Some("a return address points to no executable mapping"),
            Self::Trampoline => Some("a return probe hides the callers"),
            Self::Lost => Some("the stack was not captured"),
            Self::NoRow => Some("no unwind rows are loaded for the module"),
            Self::StackNotGrowing => Some("the caller's frame would not lie above this one"),
            Self::UnsupportedRule => Some("unwind information of a kind that is not followed"),
        }
    }
}

/// Index into [`Profile::processes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessId(pub usize);

/// Index into [`Profile::modules`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModuleId(pub usize);

/// Index into [`Profile::sites`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SiteId(pub usize);

/// One life of a process between two `execve` calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    pub parent_pid: Option<u32>,
    /// Field 22 of `/proc/PID/stat`: clock ticks after boot. With `pid` it names one process ever.
    pub start_time: u64,
    pub comm: String,
    pub exe: String,
    pub cmdline: String,
    pub cgroup: String,
    /// How it ended, when it did while it was watched ("exited", "exec", "forked away").
    pub end: Option<String>,
}

/// A file (or the vDSO) that code was loaded from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// As the target's own mount namespace names it; `[vdso]`, `[anon]` and the like for the rest.
    pub path: String,
    /// GNU build id, lower-case hexadecimal.
    pub build_id: Option<String>,
    /// Lowest executable mapping seen: start address, end address, file offset (for pprof).
    pub mapping: Option<(u64, u64, u64)>,
}

/// One source-level function at a program counter.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Symbol {
    /// Demangled.
    pub function: String,
    pub file: Option<String>,
    pub line: Option<u32>,
    /// Inlined into the next symbol of the same frame.
    pub inlined: bool,
}

/// One program counter of a stack.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Frame {
    /// Address in the process (a return address, except where a frame is interrupted).
    pub address: u64,
    pub module: Option<ModuleId>,
    /// Offset in the module: address as the file itself states it (SVMA, base 0).
    pub offset: u64,
    /// Innermost (most inlined) first; empty when nothing names the address. Shared, because the
    /// same address occurs in many stacks.
    pub symbols: Arc<[Symbol]>,
}

/// Bytes and blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    pub live_bytes: u64,
    pub live_count: u64,
    /// Since the session began, as are the rest.
    pub allocated_bytes: u64,
    pub allocated_count: u64,
    pub freed_bytes: u64,
    pub freed_count: u64,
    /// Of what is live.
    pub spread: Spread,
}

impl Counters {
    /// Adds something live.
    pub fn hold(&mut self, estimate: Estimate) {
        self.live_bytes = self.live_bytes.saturating_add(estimate.bytes);
        self.live_count = self.live_count.saturating_add(estimate.count);
        let carry = self.spread.add(&estimate.spread);
        self.live_count = self.live_count.saturating_add(carry);
    }

    /// Nothing is live.
    pub fn clear_live(&mut self) {
        (self.live_bytes, self.live_count, self.spread) = (0, 0, Spread::default());
    }

    /// Sums saturate: a wrapped number would be a small, believable lie.
    pub fn add(&mut self, other: &Self) {
        self.live_bytes = self.live_bytes.saturating_add(other.live_bytes);
        self.live_count = self.live_count.saturating_add(other.live_count);
        self.allocated_bytes = self.allocated_bytes.saturating_add(other.allocated_bytes);
        self.allocated_count = self.allocated_count.saturating_add(other.allocated_count);
        self.freed_bytes = self.freed_bytes.saturating_add(other.freed_bytes);
        self.freed_count = self.freed_count.saturating_add(other.freed_count);
        let carry = self.spread.add(&other.spread);
        self.live_count = self.live_count.saturating_add(carry);
    }

    /// What so many of these hold.
    pub fn times(&self, factor: u32) -> Self {
        let factor = u64::from(factor);
        Self {
            live_bytes: self.live_bytes.saturating_mul(factor),
            live_count: self.live_count.saturating_mul(factor),
            allocated_bytes: self.allocated_bytes.saturating_mul(factor),
            allocated_count: self.allocated_count.saturating_mul(factor),
            freed_bytes: self.freed_bytes.saturating_mul(factor),
            freed_count: self.freed_count.saturating_mul(factor),
            spread: self.spread,
        }
    }
}

/// One stack of one process, with what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    pub process: ProcessId,
    pub kind: SiteKind,
    pub counters: Counters,
    /// Of the live blocks, at the moment of the snapshot; `None` when nothing is live.
    pub oldest_age_ns: Option<u64>,
    pub youngest_age_ns: Option<u64>,
    pub outcome: StackOutcome,
    /// Innermost first. Shared, so that every snapshot can list every site.
    pub frames: Arc<[Frame]>,
}

/// One outstanding block or mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    pub process: ProcessId,
    pub site: SiteId,
    pub address: u64,
    pub size_bytes: u64,
    pub age_ns: u64,
}

/// Which blocks count as live in a report (`--min-age`, `--min-size`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockFilter {
    pub min_age_ns: u64,
    pub min_size_bytes: u64,
}

impl BlockFilter {
    pub const fn keeps(&self, size_bytes: u64, age_ns: u64) -> bool {
        size_bytes >= self.min_size_bytes && age_ns >= self.min_age_ns
    }

    /// Whether every block passes, so that the counters of the sites hold as they are.
    pub const fn keeps_all(&self) -> bool {
        self.min_age_ns == 0 && self.min_size_bytes == 0
    }
}

/// The windows of time in which every call of an allocator was counted. What was allocated in the
/// first half of one and was not released in the second has *survived*. [`SiteKind::Survivor`] holds
/// what survived and is still there at the end, for the whole session: as if all of it had been like the windows.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Windows {
    pub count: u32,
    /// How long they were open, together.
    pub open_ns: u64,
    /// Their first halves, together.
    pub early_ns: u64,
    /// Of what survived at all sites together.
    pub bytes_variance: f64,
    pub count_variance: f64,
}

/// The variances are sums of numbers.
impl Eq for Windows {}

impl Windows {
    /// How long a block lives, at the least, that survives; on average over the windows.
    pub fn survival_ns(&self) -> u64 {
        (self.open_ns - self.early_ns.min(self.open_ns)) / u64::from(self.count.max(1))
    }
}

/// What the session cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Most of the watched processes' own time that it was to cost, in millionths.
    pub limit_ppm: Option<u32>,
    /// Processor time of the watched processes while they were watched, this cost included.
    pub target_cpu_ns: u64,
    /// Runs of programs at allocator functions.
    pub hits: u64,
    /// What these and the page faults that were looked at took of it, estimated.
    pub spent_ns: u64,
    /// Processor time of leakbpf itself.
    pub agent_cpu_ns: u64,
    /// Its largest resident set.
    pub agent_peak_rss_bytes: u64,
}

impl Cost {
    /// Cost as a share of the processes' own time.
    pub fn share(&self) -> Option<f64> {
        let own = self.target_cpu_ns.saturating_sub(self.spent_ns);
        (own > 0).then(|| self.spent_ns as f64 / own as f64)
    }
}

/// Something worth knowing that happened during the session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Nanoseconds after the session began.
    pub at_ns: u64,
    pub pid: Option<u32>,
    pub text: String,
}

/// Processes, modules and sites keep their order from one snapshot of a session to the next; new
/// ones are appended. Of two entries with the same pid and start time, the earlier life comes first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    pub mode: Mode,
    /// The session's last snapshot; false for those at the intervals, and in a recording whose
    /// session was killed.
    pub finished: bool,
    /// Nanoseconds after the Unix epoch.
    pub started_unix_ns: u64,
    pub duration_ns: u64,
    /// `uname -r` of the recorded host.
    pub kernel: String,
    pub hostname: String,
    pub processes: Vec<Process>,
    pub modules: Vec<Module>,
    pub sites: Vec<Site>,
    /// Only when they were asked for.
    pub blocks: Vec<Block>,
    /// What could not be seen, by name; every known name is present, zero when all is well.
    pub losses: BTreeMap<String, u64>,
    pub events: Vec<Event>,
    /// Where there were any.
    pub windows: Option<Windows>,
    /// One page in so many was looked at, where pages were.
    pub page_interval: Option<u32>,
    pub cost: Cost,
}

impl Profile {
    /// Sum over the sites that [`Mode::counts`].
    pub fn totals(&self) -> Counters {
        self.sum(|kind| self.mode.counts(kind))
    }

    /// Sum over what allocators hold from the kernel to serve the heap.
    pub fn allocator_totals(&self) -> Counters {
        self.sum(|kind| kind == SiteKind::AllocatorMapping)
    }

    /// Sum over the pages that are resident, where they stand beside blocks.
    pub fn resident_totals(&self) -> Counters {
        self.sum(|kind| kind == SiteKind::Resident)
    }

    /// Sum over what survived windows.
    pub fn survivor_totals(&self) -> Counters {
        self.sum(|kind| kind == SiteKind::Survivor)
    }

    /// Where the sum of a kind's sites really lies.
    pub fn totals_interval(&self) -> Option<Interval> {
        match self.mode {
            Mode::Windows => self.survivors_interval(),
            _ => self.interval(&self.totals()),
        }
    }

    /// Where the sum of the survivors really lies: what survives at one site and at another does so
    /// in the same windows.
    pub fn survivors_interval(&self) -> Option<Interval> {
        let windows = self.windows?;
        let mut totals = self.survivor_totals();
        totals.spread.bytes_variance = windows.bytes_variance;
        totals.spread.count_variance = windows.count_variance;
        Interval::of_windows(&totals, windows.count)
    }

    /// How many allocations and mappings had a stack that ended so; every outcome is present.
    pub fn stacks(&self) -> BTreeMap<StackOutcome, u64> {
        let mut stacks: BTreeMap<_, _> =
            StackOutcome::ALL.into_iter().map(|outcome| (outcome, 0)).collect();
        for site in &self.sites {
            let count: &mut u64 = stacks.entry(site.outcome).or_default();
            *count = count.saturating_add(site.counters.allocated_count);
        }
        stacks
    }

    /// Where the live memory of a site really lies; `None` when it is known.
    pub fn site_interval(&self, site: &Site) -> Option<Interval> {
        match (site.kind, self.page_interval) {
            (SiteKind::Survivor, _) => {
                return Interval::of_windows(&site.counters, self.windows?.count);
            }
            (SiteKind::Resident, Some(one_in)) => {
                return Some(Interval::of_pages(&site.counters, one_in));
            }
            _ => {}
        }
        let counted = matches!(self.mode, Mode::Sample { .. }) && site.kind != SiteKind::Heap;
        if counted { None } else { self.interval(&site.counters) }
    }

    /// Where the live memory really lies of which `counters`, a sum over sites, tells.
    pub fn interval(&self, counters: &Counters) -> Option<Interval> {
        match self.mode {
            Mode::Exact | Mode::Windows => None,
            Mode::Pages { one_in } => Some(Interval::of_pages(counters, one_in)),
            Mode::Sample { interval_bytes, .. } => {
                Some(Interval::of_samples(counters, interval_bytes))
            }
        }
    }

    fn sum(&self, wanted: impl Fn(SiteKind) -> bool) -> Counters {
        let mut sum = Counters::default();
        for site in self.sites.iter().filter(|site| wanted(site.kind)) {
            sum.add(&site.counters);
        }
        sum
    }

    pub fn process(&self, id: ProcessId) -> Option<&Process> {
        self.processes.get(id.0)
    }

    pub fn module(&self, id: ModuleId) -> Option<&Module> {
        self.modules.get(id.0)
    }

    /// Counts as live only the blocks that `filter` keeps. Every live block must be passed.
    /// What was allocated and freed stays as it is.
    pub fn restrict(&mut self, filter: BlockFilter, blocks: impl IntoIterator<Item = Block>) {
        for site in self.sites.iter_mut().filter(|site| self.mode.lists(site.kind)) {
            site.clear_live();
        }
        let (mode, duration_ns) = (self.mode, self.duration_ns);
        for block in blocks {
            if filter.keeps(block.size_bytes, block.age_ns)
                && let Some(site) = self.sites.get_mut(block.site.0)
            {
                site.count_live(block.size_bytes, block.age_ns, mode, duration_ns);
            }
        }
    }
}

impl Site {
    /// Forgets what is live, so that it can be counted anew.
    pub fn clear_live(&mut self) {
        self.counters.clear_live();
        self.oldest_age_ns = None;
        self.youngest_age_ns = None;
    }

    /// Counts one more live block, in a session of this length.
    pub fn count_live(&mut self, size_bytes: u64, age_ns: u64, mode: Mode, duration_ns: u64) {
        let born_ns = duration_ns.saturating_sub(age_ns);
        self.hold(mode.estimate(self.kind, size_bytes, born_ns), age_ns);
    }

    /// Adds what a live block of this age stands for.
    pub fn hold(&mut self, estimate: Estimate, age_ns: u64) {
        self.counters.hold(estimate);
        self.oldest_age_ns = Some(self.oldest_age_ns.map_or(age_ns, |age| age.max(age_ns)));
        self.youngest_age_ns = Some(self.youngest_age_ns.map_or(age_ns, |age| age.min(age_ns)));
    }
}
