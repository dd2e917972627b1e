//! The processes of a session: taking them in, following them through fork, exec and `dlopen`,
//! letting them go.

use std::{
    collections::{HashMap, HashSet},
    num::NonZeroU32,
    ops::RangeInclusive,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use leakbpf_common::abi::{
    ExecRecord, ForkRecord, LibrariesRecord, Owner, ProcessState, UnmappedRecord, process_flags,
};

use super::{
    SessionError,
    detacher::Detacher,
    life::{CpuTime, ENDED_BY_EXEC, Life},
    modules::Modules,
    placement::{LookedAt, Placed, Plans},
    space::Space,
    unwinding::Unwinding,
};
use crate::{
    ledger::ranges::{MappingLosses, Mappings},
    probe::{attach::Link, kernel::Kernel, records::Record},
    process::{
        Pid, cpu_time,
        exit::{ExitWatch, ExitWatchError},
        maps::{Backing, Maps},
        status::{Identity, Stat, memory_owner},
    },
    profile::{Event, Process, ProcessId},
};

mod residency;

/// Most events that are listed: a session of days must not fill the agent's memory.
const MAX_EVENTS: usize = 4096;

/// Children that are listed one by one when they were seen late; the rest are only counted.
const LATE_CHILDREN_LISTED: u64 = 10;

/// Links that may be waiting to be closed before children that come get none. The kernel takes some
/// 70 ms for each of a perf event, one after the other, and making one waits for the same lock.
const MAX_DETACHING: usize = 32;

/// When the thread that a process's probes hang on has ended, its others have so long to
/// follow: most often the process is about to end.
const OTHERS_FOLLOW: Duration = Duration::from_millis(100);

/// A process that was taken in.
pub struct Attached {
    pub pid: Pid,
    pub functions: usize,
    pub probes: usize,
    pub looked_at: Vec<LookedAt>,
}

/// What is watched, and how.
#[derive(Debug, Clone, Copy)]
pub struct Scope {
    /// Probes are not for single processes.
    pub shared_probes: bool,
    /// There is always another process.
    pub endless: bool,
    /// Anonymous mappings are seen.
    pub mappings: bool,
    /// Allocator functions are probed.
    pub probes: bool,
    /// The probes come and go, and going must not take long.
    pub short: bool,
    /// How many pages are kept, where pages are looked at.
    pub max_pages: Option<usize>,
}

/// Everything that is known of the watched processes.
pub struct Watch {
    pub kernel: Kernel,
    pub lives: Vec<Life>,
    pub by_owner: HashMap<Owner, ProcessId>,
    pub modules: Modules,
    pub events: Vec<Event>,
    /// Children that had used an allocator before their own probes were in place.
    pub children_seen_late: u64,
    /// Processes that went on without the thread that their probes hung on.
    pub probes_moved: u64,
    pub mapping_losses: u64,
    pub unwinding: Arc<Unwinding>,
    /// Lives whose mappings were read again: see [`Watch::take_in_mappings`].
    changed: HashSet<Owner>,
    /// Lives whose probes hung on a thread that has ended, and since when.
    headless: Vec<(Owner, Instant)>,
    plans: Plans,
    /// By process id; system-wide probes are under 0.
    placed: HashMap<u32, Placed>,
    /// Probes are in place, and processes that come get theirs.
    probing: bool,
    exits: tokio::sync::mpsc::UnboundedSender<(Pid, Owner)>,
    scope: Scope,
    /// Pages of all lives.
    pages: usize,
    /// Touches that were not recorded.
    pub pages_full: u64,
    /// It was told that page tables can't be opened.
    pages_unseen: bool,
    detacher: Detacher,
    /// How many of `lives` a profile has listed; their places in the list are fixed.
    pub listed: usize,
    /// Of lives that are folded.
    pub folded_losses: MappingLosses,
    pub folded_cpu_time: Duration,
    /// `CLOCK_MONOTONIC` when counting began.
    pub began_ns: u64,
}

impl Watch {
    pub fn new(
        kernel: Kernel,
        plans: Plans,
        scope: Scope,
        max_table_bytes: u64,
        exits: tokio::sync::mpsc::UnboundedSender<(Pid, Owner)>,
    ) -> Self {
        let (maps, processes) = (Arc::clone(&kernel.unwind), Arc::clone(&kernel.processes));
        let unwinding = Unwinding::new(maps, processes, max_table_bytes);
        Self {
            kernel,
            lives: Vec::new(),
            by_owner: HashMap::new(),
            modules: Modules::new(unwinding.numbers()),
            events: Vec::new(),
            children_seen_late: 0,
            probes_moved: 0,
            mapping_losses: 0,
            unwinding: Arc::new(unwinding),
            changed: HashSet::new(),
            headless: Vec::new(),
            plans,
            placed: HashMap::new(),
            probing: scope.probes,
            exits,
            scope,
            pages: 0,
            pages_full: 0,
            pages_unseen: false,
            detacher: Detacher::default(),
            listed: 0,
            folded_losses: MappingLosses::default(),
            folded_cpu_time: Duration::ZERO,
            began_ns: monotonic_ns(),
        }
    }

    /// Counts from now on.
    pub fn begin(&mut self) -> Result<(), SessionError> {
        self.began_ns = monotonic_ns();
        self.kernel.enable(true)?;
        Ok(())
    }

    pub fn probes(&self) -> usize {
        self.placed.values().map(Placed::len).sum()
    }

    /// Whether processes have probes of their own in the same libraries: the kernel then asks those of all
    /// at each hit, and one of another process never does without the return.
    pub fn probes_side_by_side(&self) -> bool {
        let mut files = HashSet::new();
        self.placed.values().flat_map(Placed::files).any(|file| !files.insert(file))
    }

    /// Takes a running process in. Its memory is new to the session: only what it allocates from
    /// now on is known.
    pub fn attach(&mut self, pid: Pid) -> Result<Attached, SessionError> {
        let identity = Identity::of(pid)?;
        let maps = Maps::of(pid)?;
        let owner = Owner::new(pid.0, generation());
        let flags = if self.scope.mappings { process_flags::MAPPINGS } else { 0 };
        self.unwinding.begin(owner, pid, &maps);
        self.kernel
            .processes
            .set(&pid.0, ProcessState { owner, flags, ..ProcessState::default() })
            .map_err(|source| SessionError::Watch { pid, source })?;
        let cpu_time = CpuTime::since(cpu_time::of(pid));
        self.add_life(owner, identity, maps.clone(), program_break(&maps), cpu_time);
        self.place(pid, &maps)
    }

    /// Without its `initial_break`, the first `brk` of the process tells it.
    fn add_life(
        &mut self,
        owner: Owner,
        identity: Identity,
        maps: Maps,
        initial_break: Option<u64>,
        cpu_time: CpuTime,
    ) -> ProcessId {
        let start_time = identity.start_time;
        let pid = identity.pid;
        let process = Process {
            pid: identity.pid.0,
            parent_pid: Some(identity.parent.0),
            start_time,
            comm: identity.comm,
            exe: identity.exe,
            cmdline: identity.cmdline,
            cgroup: identity.cgroup,
            end: None,
        };
        let id = ProcessId(self.lives.len());
        let space = Space::new(0, maps);
        let life = Life::new(owner, process, space, Mappings::new(initial_break));
        self.lives.push(Life { cpu_time, ..life });
        self.by_owner.insert(owner, id);
        self.open_pagemap(id);
        self.watch_exit(pid, start_time, owner);
        id
    }

    fn watch_exit(&self, pid: Pid, start_time: u64, owner: Owner) {
        let exits = self.exits.clone();
        match ExitWatch::open(pid, start_time) {
            Ok(mut watch) => {
                tokio::task::spawn_local(async move {
                    // An error would only mean that the end is noticed at the next interval.
                    let _ = watch.exited().await;
                    let _ = exits.send((pid, owner));
                });
            }
            Err(ExitWatchError::Watch { .. }) if pid.proc_path("stat").exists() => {
                // Out of descriptors: it lives, and its end will be seen when its id is used anew.
            }
            Err(_) => {
                let _ = exits.send((pid, owner));
            }
        }
    }

    /// Places what a process lacks, and what it maps meanwhile: the loader tells of libraries only
    /// once its own probe is in place.
    fn place(&mut self, pid: Pid, maps: &Maps) -> Result<Attached, SessionError> {
        const MOST_TURNS: usize = 4;
        let mut attached = self.place_mapped(pid, maps)?;
        let mut known = maps.clone();
        let mut placed = attached.probes;
        for _ in 0..MOST_TURNS {
            let now = Maps::of(pid).unwrap_or_default();
            if placed == 0 || now.is_empty() || now.same_code(&known) {
                break;
            }
            let more = self.place_mapped(pid, &now)?;
            placed = more.probes;
            attached.functions += more.functions;
            attached.probes += more.probes;
            attached.looked_at = more.looked_at;
            known = now;
            if let Some(owner) = self.owner_of(pid) {
                self.unwinding.refresh(owner);
            }
        }
        Ok(attached)
    }

    fn place_mapped(&mut self, pid: Pid, maps: &Maps) -> Result<Attached, SessionError> {
        // A process that dies right after its first block takes its mapped files along, and with
        // them the names of its functions.
        for file in maps.executable_files() {
            self.modules.of_file(pid, file.id, Some(maps));
        }
        if !self.probing {
            return Ok(Attached { pid, functions: 0, probes: 0, looked_at: Vec::new() });
        }
        let looked_at = self.plans.of(pid, maps);
        let (key, scope) = match self.scope.shared_probes {
            true => (0, None),
            false => (pid.0, NonZeroU32::new(memory_owner(pid).0)),
        };
        let placed = self.placed.entry(key).or_default();
        placed.together = self.scope.short;
        if let Some(carrier) = scope.filter(|_| placed.carrier.is_none()) {
            placed.carrier = scope;
            // Without it, its end goes unnoticed.
            let _ = self.kernel.carriers.set(&carrier.get(), pid.0);
        }
        let probes_before = placed.len();
        let functions = placed.place(&mut self.kernel, pid, scope, maps, &looked_at);
        let probes = placed.len() - probes_before;
        let failed = std::mem::take(&mut placed.failed);
        // Whatever fails on a process that is gone (or a zombie, which has no memory) says nothing.
        if !failed.is_empty() && Maps::of(pid).is_ok_and(|maps| !maps.is_empty()) {
            for (function, reason) in failed {
                self.note(Some(pid), format!("no probe on {function}: {reason}"));
            }
        }
        Ok(Attached { pid, functions, probes, looked_at })
    }

    fn owner_of(&self, pid: Pid) -> Option<Owner> {
        let state = self.kernel.processes.get(&pid.0).ok().flatten()?;
        self.life_of(state.owner).map(|_| state.owner)
    }

    pub fn note(&mut self, pid: Option<Pid>, text: String) {
        let text = match self.events.len().cmp(&(MAX_EVENTS - 1)) {
            std::cmp::Ordering::Less => text,
            std::cmp::Ordering::Equal => "more happened than is listed".to_owned(),
            std::cmp::Ordering::Greater => return,
        };
        let at_ns = monotonic_ns().saturating_sub(self.began_ns);
        self.events.push(Event { at_ns, pid: pid.map(|pid| pid.0), text });
    }

    /// Takes in one record of the kernel side.
    pub fn take(&mut self, record: Record) {
        match record {
            Record::Stack(stack) => {
                self.take_in_lists();
                if let Some(id) = self.life_or_stranger(stack.head.owner) {
                    let Self { lives, modules, kernel, .. } = self;
                    lives[id.0].learn(&stack, modules, |owner| epochs_and_maps_of(kernel, owner));
                }
            }
            Record::Mapping(record) => {
                if let Some(id) = self.life_or_stranger(record.head.owner) {
                    let refused = self.lives[id.0].mappings.apply(&record).is_err();
                    self.mapping_losses += u64::from(refused);
                }
            }
            Record::Fork(fork) => self.forked(&fork),
            Record::Exec(exec) => self.executed(&exec),
            Record::Libraries(change) => {
                self.take_in_lists();
                self.libraries_changed(&change);
            }
            Record::Seen(seen) => {
                self.seen(seen.head.owner);
            }
            Record::Unmapped(unmapped) => self.unmapped(&unmapped),
            Record::Ended(ended) => {
                if let Some(id) = self.life_of(ended.head.owner) {
                    self.lives[id.0].cpu_time.at_least(Duration::from_nanos(ended.cpu_ns));
                }
            }
            Record::CarrierEnded(head) => {
                if self.probes_hang_on_threads() {
                    self.headless.push((head.owner, Instant::now()));
                }
            }
            Record::Page(page) => self.touched(&page),
        }
    }

    /// What the thread that reads the records has read and opened meanwhile.
    fn take_in_lists(&mut self) {
        self.modules.take_opened();
        for list in self.unwinding.numbers().take_lists() {
            if let Some(id) = self.life_of(list.owner) {
                self.lives[id.0].refresh(list.epochs, list.maps);
            }
        }
    }

    fn life_of(&self, owner: Owner) -> Option<ProcessId> {
        self.by_owner.get(&owner).copied().filter(|id| id.0 < self.lives.len())
    }

    /// The life of an owner; one that nobody has announced is taken in when the kernel side counts
    /// for it. Another thread's record can overtake the announcement, and a full ring buffer can
    /// swallow it.
    fn life_or_stranger(&mut self, owner: Owner) -> Option<ProcessId> {
        if let Some(id) = self.life_of(owner) {
            return Some(id);
        }
        let state = self.kernel.processes.get(&owner.tgid()).ok().flatten()?;
        let own = state.owner == owner && state.flags & process_flags::BORROWS_MEMORY == 0;
        own.then(|| self.seen(owner)).flatten()
    }

    /// A process id that begins a new life has ended its former one, whether or not that was seen.
    fn end_former_life(&mut self, pid: Pid, successor: Owner, how: &str) {
        let former = self
            .lives
            .iter()
            .rev()
            .find(|life| life.pid() == pid && life.owner != successor && !life.ended());
        if let Some(owner) = former.map(|life| life.owner) {
            self.end(pid, owner, how);
        }
    }

    fn forked(&mut self, fork: &ForkRecord) {
        // A vfork child uses its parent's memory until its exec.
        if fork.flags & process_flags::BORROWS_MEMORY != 0
            || self.by_owner.contains_key(&fork.child)
        {
            return;
        }
        let pid = Pid(fork.child_tgid);
        self.end_former_life(pid, fork.child, "exited");
        let parent = self.life_of(fork.head.owner);
        let maps = match parent.and_then(|id| self.lives[id.0].space.maps()) {
            Some(maps) => maps.clone(),
            None => maps_of(&self.kernel, fork.child),
        };
        let identity =
            Identity::of(pid).unwrap_or_else(|_| gone(pid, parent.map(|id| &self.lives[id.0])));
        let initial_break = parent.and_then(|id| self.lives[id.0].mappings.program_break());
        let cpu_time = CpuTime::since(Some(Duration::ZERO));
        self.add_life(fork.child, identity, maps.clone(), initial_break, cpu_time);
        if self.scope.shared_probes || !self.probing {
            return;
        }
        let inherited = self.placed.get(&fork.head.owner.tgid());
        let untouched = inherited.is_some_and(|placed| placed.untouched(pid, &maps));
        if self.detacher.pending() > MAX_DETACHING {
            self.seen_late(pid, "got no probes: too many children come and go");
            return;
        }
        match self.place(pid, &maps) {
            Ok(_) if untouched => {}
            // A child that is gone already, or that ran before its probes were in place.
            _ => self.seen_late(pid, "used its allocator before its probes were in place"),
        }
    }

    fn seen_late(&mut self, pid: Pid, how: &str) {
        self.children_seen_late += 1;
        match self.children_seen_late.cmp(&LATE_CHILDREN_LISTED) {
            std::cmp::Ordering::Less => self.note(Some(pid), format!("this child {how}")),
            std::cmp::Ordering::Equal => {
                self.note(None, "more children were seen late: the losses count them".to_owned());
            }
            std::cmp::Ordering::Greater => {}
        }
    }

    fn executed(&mut self, exec: &ExecRecord) {
        let pid = Pid(exec.head.owner.tgid());
        let mut former = None;
        let mut used = cpu_time::of(pid);
        if exec.old_flags & process_flags::BORROWS_MEMORY != 0 {
            used = Some(Duration::ZERO);
        }
        if exec.old_flags & process_flags::BORROWS_MEMORY == 0
            && let Some(id) = self.life_of(exec.old)
        {
            former = Some(id);
            let before = &mut self.lives[id.0].cpu_time;
            before.at_least(used.unwrap_or_default());
            used = before.last().or(used);
            self.lives[id.0].process.end.get_or_insert_with(|| ENDED_BY_EXEC.to_owned());
            self.lives[id.0].end_pages();
        }
        let maps = maps_of(&self.kernel, exec.head.owner);
        let former = former.map(|id| &self.lives[id.0]);
        let identity = Identity::of(pid).unwrap_or_else(|_| gone(pid, former));
        self.add_life(exec.head.owner, identity, maps.clone(), None, CpuTime::since(used));
        if self.detacher.pending() > MAX_DETACHING && !self.placed.contains_key(&pid.0) {
            self.seen_late(pid, "got no probes: too many children come and go");
            return;
        }
        if exec.old_tid == exec.head.tid || !self.probes_hang_on_threads() {
            let _ = self.place(pid, &maps);
        } else {
            self.move_probes(pid, &maps);
        }
    }

    /// Places the probes of a process anew: the kernel looks for its memory through the thread that
    /// they were placed for (`uprobe_perf_filter` in kernel/trace/trace_uprobe.c), and that is gone.
    fn move_probes(&mut self, pid: Pid, maps: &Maps) {
        self.probes_moved += 1;
        let former = self.placed.remove(&pid.0);
        let placed = match self.detacher.pending() > MAX_DETACHING {
            true => Err("too many probes wait to be taken away".to_owned()),
            false => self.place(pid, maps).map_err(|error| error.to_string()),
        };
        if let Some(former) = former {
            self.detacher.detach(former.into_links());
        }
        const ENDED: &str = "the thread that the probes hung on ended: ";
        let text = match placed {
            Ok(_) => format!("{ENDED}they were placed anew, what it did meanwhile is not known"),
            Err(reason) => format!("{ENDED}nothing is seen of it any more: {reason}"),
        };
        if self.probes_moved < LATE_CHILDREN_LISTED {
            eprintln!("leakbpf: PID {pid}: {text}");
        }
        self.note(Some(pid), text);
    }

    fn probes_hang_on_threads(&self) -> bool {
        !self.scope.shared_probes && self.probing
    }

    /// When [`Self::attend_headless`] has something to do.
    pub fn headless_due(&self) -> Option<Instant> {
        self.headless.iter().map(|(_, since)| *since + OTHERS_FOLLOW).min()
    }

    /// Looks after the processes whose probes hung on a thread that has ended.
    pub fn attend_headless(&mut self) {
        let now = Instant::now();
        let (due, waiting) = std::mem::take(&mut self.headless)
            .into_iter()
            .partition(|(_, since)| *since + OTHERS_FOLLOW <= now);
        self.headless = waiting;
        for (owner, _) in due {
            let Some(id) = self.life_of(owner).filter(|id| !self.lives[id.0].ended()) else {
                continue;
            };
            let pid = self.lives[id.0].pid();
            let carrier = self.placed.get(&pid.0).and_then(|placed| placed.carrier);
            if carrier
                .is_some_and(|carrier| Stat::of(Pid(carrier.get())).is_ok_and(|it| it.lives()))
            {
                continue;
            }
            let maps = maps_of(&self.kernel, owner);
            if !maps.is_empty() {
                self.move_probes(pid, &maps);
            }
        }
    }

    fn libraries_changed(&mut self, change: &LibrariesRecord) {
        let Some(id) = self.life_of(change.head.owner) else { return };
        let (epochs, maps) = epochs_and_maps_of(&self.kernel, change.head.owner);
        self.lives[id.0].refresh(epochs, maps);
        self.changed.insert(change.head.owner);
    }

    fn seen(&mut self, owner: Owner) -> Option<ProcessId> {
        let pid = Pid(owner.tgid());
        if self.by_owner.contains_key(&owner) {
            return None;
        }
        self.end_former_life(pid, owner, "exited");
        let maps = maps_of(&self.kernel, owner);
        self.unwinding.refresh(owner);
        let identity = Identity::of(pid).unwrap_or_else(|_| gone(pid, None));
        let cpu_time = CpuTime::since(cpu_time::of(pid));
        let id = self.add_life(owner, identity, maps.clone(), None, cpu_time);
        let _ = self.place(pid, &maps);
        Some(id)
    }

    /// Does what changed mappings ask for, once for all records of it: libraries that come and go
    /// fast must be seen while they are there, and that is all that their records do at first.
    pub fn take_in_mappings(&mut self) {
        let changed: Vec<_> = std::mem::take(&mut self.changed)
            .into_iter()
            .filter_map(|owner| {
                let id = self.life_of(owner).filter(|id| !self.lives[id.0].ended())?;
                let life = &self.lives[id.0];
                Some((life.pid(), life.space.maps()?.clone()))
            })
            .collect();
        for (pid, maps) in changed {
            if let Ok(attached) = self.place(pid, &maps)
                && attached.functions > 0
            {
                self.note(Some(pid), format!("{} more allocator functions", attached.functions));
            }
        }
    }

    /// Stacks lead to code that the kernel side does not know: made at run time, mapped without
    /// the dynamic loader, or not code at all.
    fn unmapped(&mut self, unmapped: &UnmappedRecord) {
        let owner = unmapped.head.owner;
        let Some(id) = self.life_of(owner).filter(|id| !self.lives[id.0].ended()) else { return };
        let (epochs, maps) = epochs_and_maps_of(&self.kernel, owner);
        let life = &mut self.lives[id.0];
        life.refresh(epochs, maps);
        let mapping = life.space.maps().and_then(|maps| maps.find(unmapped.address));
        if mapping.is_some_and(|mapping| mapping.permissions.execute) {
            self.changed.insert(owner);
        }
    }

    /// A process has ended. What it had outstanding stays in the books: that is its final state.
    pub fn exited(&mut self, pid: Pid, owner: Owner) {
        self.end(pid, owner, "exited");
    }

    fn end(&mut self, pid: Pid, owner: Owner, how: &str) {
        let Some(id) = self.life_of(owner) else { return };
        let life = &mut self.lives[id.0];
        let replaced = life.process.end.is_some();
        life.process.end.get_or_insert_with(|| how.to_owned());
        life.end_pages();
        if !replaced {
            if let Some(placed) = self.placed.remove(&pid.0) {
                self.detacher.detach(placed.into_links());
            }
            if let Ok(Some(state)) = self.kernel.processes.get(&pid.0)
                && state.owner == owner
            {
                let _ = self.kernel.processes.delete(&pid.0);
            }
            self.unwinding.forget(owner);
        }
    }

    /// Whether every process of the session has ended.
    pub fn all_ended(&self) -> bool {
        !self.scope.endless && self.lives.iter().all(Life::ended)
    }

    /// Takes every probe away, in the background: the kernel waits for a grace period with each link
    /// (some 70 ms), and for those of perf events one after the other (`perf_uprobe_destroy` in
    /// kernel/trace/trace_event_perf.c).
    pub fn detach(&mut self) {
        let links: Vec<_> =
            std::mem::take(&mut self.placed).into_values().flat_map(Placed::into_links).collect();
        self.detacher.detach(links);
    }

    /// Processor time that the processes have used while they were watched. Where the kernel does not tell
    /// of it, what one used between the last look at it and its end is not known.
    pub fn cpu_time(&mut self) -> Duration {
        let mut sum = self.folded_cpu_time;
        for life in &mut self.lives {
            if life.process.end.is_none()
                && let Some(now) = cpu_time::of(Pid(life.process.pid))
            {
                life.cpu_time.at_least(now);
            }
            sum += life.cpu_time.used();
        }
        sum
    }

    /// Places the probes of all processes again.
    pub fn place_all(&mut self) {
        self.probing = true;
        let living: Vec<Pid> =
            self.lives.iter().filter(|life| !life.ended()).map(Life::pid).collect();
        for pid in living {
            let Ok(maps) = Maps::of(pid) else { continue };
            if let Err(error) = self.place(pid, &maps) {
                self.note(Some(pid), format!("no probes: {error}"));
            }
        }
    }

    /// Takes all probes away, until [`Self::place_all`].
    pub fn take_all_away(&mut self) {
        self.probing = false;
        self.headless.clear();
        self.detach();
    }

    /// Closes links without waiting for it.
    pub fn let_go(&mut self, links: Vec<Link>) {
        self.detacher.detach(links);
    }

    /// Links that are still being closed.
    pub fn detaching(&self) -> usize {
        self.detacher.pending()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.detach();
    }
}

/// Generation of a life that the agent begins; those of the kernel side count time, too.
fn generation() -> u32 {
    (monotonic_ns() >> 14) as u32
}

/// Nanoseconds after the Unix epoch.
pub fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// `CLOCK_MONOTONIC`, which is the clock of the kernel side.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let time = Duration::new(now.tv_sec as u64, now.tv_nsec as u32);
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The mappings of a life. Empty when they can't be read, or when the process has begun another life
/// by `execve`, which the kernel side knows before its new program runs.
fn maps_of(kernel: &Kernel, owner: Owner) -> Maps {
    epochs_and_maps_of(kernel, owner).1
}

/// With the library epochs before and after they were read.
fn epochs_and_maps_of(kernel: &Kernel, owner: Owner) -> (RangeInclusive<u32>, Maps) {
    let pid = owner.tgid();
    let state = || kernel.processes.get(&pid).ok().flatten();
    let before = state();
    let maps = Maps::of(Pid(pid)).unwrap_or_default();
    match (before, state()) {
        (_, Some(after)) if after.owner != owner => (0..=0, Maps::default()),
        (Some(before), Some(after)) if before.owner == owner => {
            (before.library_epoch..=after.library_epoch, maps)
        }
        (_, after) => (0..=after.map_or(0, |after| after.library_epoch), maps),
    }
}

/// End of the `[heap]` mapping, which is the program break rounded up to a page.
fn program_break(maps: &Maps) -> Option<u64> {
    maps.iter()
        .find(|mapping| matches!(&mapping.backing, Backing::Special(name) if name == "[heap]"))
        .map(|mapping| mapping.end_avma)
}

/// Stands in for a process that ended before it could be looked at.
fn gone(pid: Pid, parent: Option<&Life>) -> Identity {
    Identity {
        pid,
        parent: parent.map_or(Pid(0), Life::pid),
        start_time: 0,
        comm: parent.map_or_else(|| "?".to_owned(), |life| life.process.comm.clone()),
        exe: parent.map(|life| life.process.exe.clone()).unwrap_or_default(),
        cmdline: String::new(),
        cgroup: parent.map(|life| life.process.cgroup.clone()).unwrap_or_default(),
    }
}
