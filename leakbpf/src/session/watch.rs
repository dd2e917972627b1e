//! The processes of a session, and everything that is known of them.
//!
//! [`following`] goes with them from fork to exit, [`probes`] places what they need, [`residency`] looks
//! which of their pages are still there.

use std::{
    collections::{HashMap, HashSet},
    ops::RangeInclusive,
    sync::Arc,
    time::{Duration, Instant},
};

use leakbpf_common::abi::{Owner, ProcessState, process_flags};

use super::{
    SessionError,
    clock::monotonic_ns,
    detacher::Detacher,
    life::{CpuTime, Life},
    modules::Modules,
    placement::{Placed, Plans},
    space::Space,
    unwinding::Unwinding,
};
use crate::{
    ledger::ranges::{MappingLosses, Mappings},
    probe::{kernel::Kernel, records::Record},
    process::{
        Pid, cpu_time,
        exit::{ExitWatch, ExitWatchError},
        maps::{Backing, Maps},
        status::Identity,
    },
    profile::{Event, Process, ProcessId},
};

mod following;
mod probes;
mod residency;

pub use probes::Attached;

/// Most events that are listed: a session of days must not fill the agent's memory.
const MAX_EVENTS: usize = 4096;

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
    /// Children that may have used an allocator before their own probes were in place.
    pub children_seen_late: u64,
    /// Processes that went on without the thread that their probes hung on.
    pub probes_moved: u64,
    pub mapping_losses: u64,
    pub unwinding: Arc<Unwinding>,
    /// Lives whose mappings were read again: see [`Watch::take_in_mappings`].
    changed: HashSet<Owner>,
    /// Lives whose probes hung on a thread that has ended, and since when.
    headless: Vec<(Owner, Instant)>,
    /// Lives that got no probes because too many links wait to be closed, and when it was last looked.
    unprobed: Vec<(Owner, Instant)>,
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
            unprobed: Vec::new(),
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
