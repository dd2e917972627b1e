//! One life of a process: from fork, exec or attach to its exit or next exec.

use std::{collections::HashMap, ops::RangeInclusive, sync::Arc, time::Duration};

use leakbpf_common::abi::{Owner, StackId};

use super::{
    jit::PerfMapPlace,
    modules::Modules,
    space::{Place, Space},
};
use crate::{
    ledger::{pages::Pages, ranges::Mappings},
    probe::records::NewStack,
    process::{
        Pid,
        maps::{Backing, Maps},
        pagemap::Pagemap,
    },
    profile::{self, ModuleId, StackOutcome},
};

/// A frame whose code is known, not yet named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PlacedFrame {
    pub avma: u64,
    pub module: Option<ModuleId>,
    pub svma: u64,
    /// The address is not one that a call returns to, but the next to run.
    pub interrupted: bool,
}

/// A stack in terms of modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stack {
    pub outcome: StackOutcome,
    pub frames: Arc<[PlacedFrame]>,
}

impl Stack {
    /// Stands in for a stack that was not captured or not received.
    pub fn lost() -> Self {
        Self { outcome: StackOutcome::Lost, frames: Arc::from([]) }
    }
}

/// [`profile::Process::end`] of a life whose memory an `execve` has replaced.
pub const ENDED_BY_EXEC: &str = "exec";

pub struct Life {
    pub owner: Owner,
    pub process: profile::Process,
    pub space: Space,
    pub mappings: Mappings,
    pub pages: Pages,
    /// Open while the process lives, where pages are looked at.
    pub pagemap: Option<Pagemap>,
    /// As the kernel counted it when the life was taken in, where pages are looked at.
    pub anonymous_bytes_before: Option<u64>,
    pub stacks: HashMap<StackId, Stack>,
    pub cpu_time: CpuTime,
    /// Known once a stack leads through code made at run time.
    pub perf_map: Option<PerfMapPlace>,
    /// Its totals are kept elsewhere, and the kernel side knows it no more.
    pub folded: bool,
}

/// Processor time of a process, since it has been watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuTime {
    /// At the beginning, and at the last look.
    known: Option<(Duration, Duration)>,
}

impl CpuTime {
    /// `now` is what the process has used already; none of one that is gone.
    pub fn since(now: Option<Duration>) -> Self {
        Self { known: now.map(|now| (now, now)) }
    }

    /// It has used so much by now.
    pub fn at_least(&mut self, now: Duration) {
        if let Some((_, last)) = &mut self.known {
            *last = now.max(*last);
        }
    }

    pub fn last(&self) -> Option<Duration> {
        self.known.map(|(_, last)| last)
    }

    pub fn used(&self) -> Duration {
        self.known.map_or(Duration::ZERO, |(first, last)| last.saturating_sub(first))
    }
}

impl Life {
    pub fn new(owner: Owner, process: profile::Process, space: Space, mappings: Mappings) -> Self {
        Self {
            owner,
            process,
            space,
            mappings,
            pages: Pages::default(),
            pagemap: None,
            anonymous_bytes_before: None,
            stacks: HashMap::new(),
            cpu_time: CpuTime::default(),
            perf_map: None,
            folded: false,
        }
    }

    pub fn pid(&self) -> Pid {
        Pid(self.process.pid)
    }

    pub fn ended(&self) -> bool {
        self.process.end.is_some()
    }

    /// Whether its memory is gone although its process lives on.
    pub fn replaced(&self) -> bool {
        self.process.end.as_deref() == Some(ENDED_BY_EXEC)
    }

    /// The pages that it touched last can't be looked at any more.
    pub fn end_pages(&mut self) {
        self.pagemap = None;
        let maps = self.space.maps();
        self.pages.end(|address| {
            let mapping = maps.and_then(|maps| maps.find(address));
            mapping.is_some_and(|mapping| matches!(mapping.backing, Backing::File { .. }))
        });
    }

    /// Takes in the address space as it is now. What was known stays when it can't be read any more.
    pub fn refresh(&mut self, epochs: RangeInclusive<u32>, maps: Maps) {
        self.space.learn(epochs, maps);
    }

    /// Takes in a stack that the kernel side has announced. `read` gives the mappings of this life.
    pub fn learn(
        &mut self,
        stack: &NewStack,
        modules: &mut Modules,
        read: impl FnOnce(Owner) -> (RangeInclusive<u32>, Maps),
    ) {
        let caller = stack.frames.get(..1).unwrap_or_default();
        if !self.ended() && !self.space.covers(stack.library_epoch, caller) {
            let (epochs, maps) = read(self.owner);
            self.refresh(epochs, maps);
        }
        let placed = self.place(stack, modules);
        if self.perf_map.is_none() && placed.frames.iter().any(|frame| frame.module.is_none()) {
            self.perf_map = PerfMapPlace::find(self.pid());
        }
        self.stacks.insert(stack.stack, placed);
    }

    fn place(&self, stack: &NewStack, modules: &mut Modules) -> Stack {
        let (pid, maps) = (self.pid(), self.space.maps());
        let placed = self.space.place_stack(stack.library_epoch, stack.outcome, &stack.frames);
        let frames = placed
            .frames
            .into_iter()
            .zip(&stack.frames)
            .map(|((avma, place), word)| {
                let (module, svma) = match place {
                    Place::File { id, file_offset } => {
                        let module = modules.of_file(pid, id, maps);
                        (Some(module), modules.svma(module, file_offset))
                    }
                    Place::Vdso { offset } => {
                        let module = modules.vdso();
                        (Some(module), modules.svma(module, offset))
                    }
                    Place::Module { number, offset } => {
                        let (module, svma) = modules.of_number(number, offset, pid, maps);
                        (Some(module), svma)
                    }
                    Place::Anonymous => (None, avma.unwrap_or(0)),
                };
                let lay = || {
                    let (file, offset) = modules.in_file(module?, svma)?;
                    self.space.avma(stack.library_epoch, file, offset)
                };
                let avma = avma.or_else(lay).unwrap_or(svma);
                PlacedFrame { avma, module, svma, interrupted: word.is_interrupted() }
            })
            .collect();
        Stack { outcome: placed.outcome, frames }
    }
}
