//! From the kernel side's maps to a [`Profile`].

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{Hash, Hasher},
    io,
    sync::Arc,
};

use leakbpf_common::abi::{BlockKey, Loss, Owner, StackId};

use super::{
    counting::Counting,
    fold::Folded,
    jit,
    life::{Life, PlacedFrame, Stack},
    modules::Modules,
};
use crate::{
    probe::{
        kernel::{Kernel, KernelError},
        tables::Walk,
    },
    profile::{
        Block, BlockFilter, Counters, Frame, Mode, ModuleId, ProcessId, Site, SiteId, SiteKind,
        StackOutcome,
    },
    symbolize::perf_map::PerfMap,
};

/// Stack of a site as it is told apart from others: by code, not by address.
struct Code(Arc<[PlacedFrame]>);

impl Code {
    fn places(&self) -> impl Iterator<Item = (Option<ModuleId>, u64)> {
        self.0.iter().map(|frame| (frame.module, frame.svma))
    }
}

impl PartialEq for Code {
    fn eq(&self, other: &Self) -> bool {
        self.places().eq(other.places())
    }
}

impl Eq for Code {}

impl Hash for Code {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.len().hash(state);
        self.places().for_each(|place| place.hash(state));
    }
}

/// The sites of a session, in the order in which they were met.
#[derive(Default)]
pub struct Sites {
    sites: Vec<Known>,
    by_code: HashMap<(ProcessId, SiteKind, StackOutcome, Code), SiteId>,
    by_stack: HashMap<(Owner, StackId, SiteKind), SiteId>,
    jit: HashMap<ProcessId, Option<PerfMap>>,
    /// What ended lives hold, whose blocks are listed no more.
    folded: BTreeMap<SiteId, Folded>,
}

struct Known {
    process: ProcessId,
    kind: SiteKind,
    outcome: StackOutcome,
    placed: Arc<[PlacedFrame]>,
    /// Named at the first snapshot that shows it.
    named: Option<Arc<[Frame]>>,
}

/// What of a session is shown.
pub struct View<'a> {
    pub mode: Mode,
    pub counting: Counting,
    pub filter: BlockFilter,
    /// Of the whole session, by site.
    pub survivors: &'a [(SiteId, Counters)],
}

/// What the maps hold at one moment, by site.
pub struct Census {
    pub sites: Vec<Site>,
    /// Sites that hold or held memory and whose stack never came.
    pub stacks_missing: u64,
}

impl Sites {
    pub fn of(
        &mut self,
        lives: &[Life],
        life: ProcessId,
        stack: StackId,
        kind: SiteKind,
    ) -> (SiteId, bool) {
        let Some(owner) = lives.get(life.0).map(|life| life.owner) else {
            return (SiteId(0), false);
        };
        if let Some(&site) = self.by_stack.get(&(owner, stack, kind)) {
            return (site, true);
        }
        let known = lives.get(life.0).and_then(|life| life.stacks.get(&stack));
        let site = self.of_code(life, kind, known.cloned().unwrap_or_else(Stack::lost));
        // A stack that has not come yet is asked for again at the next snapshot.
        let expected = stack != StackId::LOST;
        if known.is_some() || !expected {
            self.by_stack.insert((owner, stack, kind), site);
        }
        (site, known.is_some() || !expected)
    }

    fn of_code(&mut self, process: ProcessId, kind: SiteKind, placed: Stack) -> SiteId {
        let code = Code(placed.frames.clone());
        let next = SiteId(self.sites.len());
        let site = *self.by_code.entry((process, kind, placed.outcome, code)).or_insert(next);
        if site == next {
            self.sites.push(Known {
                process,
                kind,
                outcome: placed.outcome,
                placed: placed.frames,
                named: None,
            });
        }
        site
    }

    /// Adds what a site of an ended life holds, once and for all.
    pub fn keep(&mut self, process: ProcessId, kind: SiteKind, stack: Stack, folded: &Folded) {
        let site = self.of_code(process, kind, stack);
        self.folded.entry(site).or_default().add(folded);
    }

    /// Lets go of the stacks of lives that are over.
    pub fn forget(&mut self, over: impl Fn(&Owner) -> bool) {
        self.by_stack.retain(|(owner, _, _), _| !over(owner));
    }

    /// Counts everything that is outstanding. `now_ns` is `CLOCK_MONOTONIC`.
    pub fn census(
        &mut self,
        view: View<'_>,
        kernel: &Kernel,
        lives: &[Life],
        by_owner: &HashMap<Owner, ProcessId>,
        now_ns: u64,
    ) -> Result<Census, KernelError> {
        let View { mode, counting, filter, survivors } = view;
        let failed = |map| move |source: io::Error| KernelError::Map { map, source };
        let mut stacks_missing = 0;
        let mut counters: BTreeMap<SiteId, Site> = BTreeMap::new();

        let heap = kernel.sites.walk().take_while(|_| mode.shows(SiteKind::Heap));
        for entry in heap {
            let (key, value) = entry.map_err(failed("SITES"))?;
            let Some(&life) = by_owner.get(&key.owner) else { continue };
            if value.allocated_count == 0 {
                continue;
            }
            let (id, complete) = self.of(lives, life, key.stack, SiteKind::Heap);
            stacks_missing += u64::from(!complete);
            let replaced = lives.get(life.0).is_some_and(Life::replaced);
            let mut value = counting.heap_counters(&value);
            if replaced {
                value.freed_bytes = value.allocated_bytes;
                value.freed_count = value.allocated_count;
            }
            self.entry(&mut counters, id).counters.add(&value);
        }
        for (index, life) in lives.iter().enumerate() {
            let mappings = life.mappings.counters().into_iter();
            for ((stack, kind), value) in mappings.filter(|((_, kind), _)| mode.shows(*kind)) {
                let (id, complete) = self.of(lives, ProcessId(index), stack, kind);
                stacks_missing += u64::from(!complete);
                let mut value = value;
                value.live_bytes = 0;
                value.live_count = 0;
                if life.replaced() {
                    value.freed_bytes = value.allocated_bytes;
                    value.freed_count = value.allocated_count;
                }
                self.entry(&mut counters, id).counters.add(&value);
            }
        }
        let resident = lives.iter().enumerate().filter(|_| mode.shows(SiteKind::Resident));
        for (index, life) in resident {
            for (stack, value) in life.pages.counters() {
                let process = ProcessId(index);
                let (id, complete) = self.of(lives, process, stack, SiteKind::Resident);
                stacks_missing += u64::from(!complete);
                let mut value = counting.page_counters(value);
                if life.replaced() {
                    value.freed_bytes = value.allocated_bytes;
                    value.freed_count = value.allocated_count;
                }
                self.entry(&mut counters, id).counters.add(&value);
            }
        }
        for (id, survived) in survivors {
            self.entry(&mut counters, *id).counters.add(survived);
        }
        let is_shown = |id: &SiteId| self.sites.get(id.0).is_some_and(|site| mode.shows(site.kind));
        for (&id, folded) in self.folded.iter().filter(|(id, _)| is_shown(id)) {
            let site = self.entry(&mut counters, id);
            site.counters.add(&folded.counters);
            if let Some((oldest, youngest)) = folded.born_ns {
                site.oldest_age_ns = Some(now_ns.saturating_sub(oldest));
                site.youngest_age_ns = Some(now_ns.saturating_sub(youngest));
            }
        }
        let shown = |kind| mode.shows(kind);
        let mut outstanding = self.outstanding(&shown, kernel, lives, by_owner, now_ns)?;
        while let Some(entry) = outstanding.next() {
            let block = entry?;
            let site = outstanding.sites.entry(&mut counters, block.site);
            if !mode.lists(site.kind) || filter.keeps(block.size_bytes, block.age_ns) {
                let born_ns = now_ns.saturating_sub(block.age_ns);
                site.hold(counting.estimate(site.kind, block.size_bytes, born_ns), block.age_ns);
            }
        }
        let sites = (0..self.sites.len())
            .filter_map(|index| {
                counters.remove(&SiteId(index)).or_else(|| self.blank(SiteId(index)))
            })
            .collect();
        Ok(Census { sites, stacks_missing })
    }

    pub fn process(&self, id: SiteId) -> Option<ProcessId> {
        self.sites.get(id.0).map(|site| site.process)
    }

    fn blank(&self, id: SiteId) -> Option<Site> {
        let known = self.sites.get(id.0)?;
        Some(Site {
            process: known.process,
            kind: known.kind,
            counters: Counters::default(),
            oldest_age_ns: None,
            youngest_age_ns: None,
            outcome: known.outcome,
            frames: known.named.clone().unwrap_or_else(|| Arc::from([])),
        })
    }

    fn entry<'a>(&self, counters: &'a mut BTreeMap<SiteId, Site>, id: SiteId) -> &'a mut Site {
        counters.entry(id).or_insert_with(|| {
            self.blank(id).unwrap_or_else(|| Site {
                process: ProcessId(0),
                kind: SiteKind::Heap,
                counters: Counters::default(),
                oldest_age_ns: None,
                youngest_age_ns: None,
                outcome: StackOutcome::Lost,
                frames: Arc::from([]),
            })
        })
    }

    /// Every outstanding block and mapping of the wanted kinds, one after the other. Also finds blocks that a
    /// `realloc` in flight holds aside.
    pub fn outstanding<'a>(
        &'a mut self,
        wanted: &dyn Fn(SiteKind) -> bool,
        kernel: &'a Kernel,
        lives: &'a [Life],
        by_owner: &'a HashMap<Owner, ProcessId>,
        now_ns: u64,
    ) -> Result<Outstanding<'a>, KernelError> {
        let mut few = Vec::new();
        let heap = wanted(SiteKind::Heap);
        for entry in kernel.threads.walk().take_while(|_| heap) {
            let (_, thread) =
                entry.map_err(|source| KernelError::Map { map: "THREADS", source })?;
            let depth = (thread.depth as usize).min(thread.calls.len());
            for call in thread.calls.iter().take(depth).filter(|call| call.aside != 0) {
                if let Some(&process) = by_owner.get(&thread.owner) {
                    few.push(Block {
                        process,
                        site: self.of(lives, process, call.old.stack, SiteKind::Heap).0,
                        address: call.pointer,
                        size_bytes: call.old.size_bytes,
                        age_ns: now_ns.saturating_sub(call.old.born_ns),
                    });
                }
            }
        }
        for (index, life) in lives.iter().enumerate().filter(|(_, life)| !life.replaced()) {
            let process = ProcessId(index);
            for range in life.mappings.live().filter(|range| wanted(range.kind)) {
                few.push(Block {
                    process,
                    site: self.of(lives, process, range.stack, range.kind).0,
                    address: range.start,
                    size_bytes: range.length_bytes,
                    age_ns: now_ns.saturating_sub(range.born_ns),
                });
            }
            for page in life.pages.live().filter(|_| wanted(SiteKind::Resident)) {
                few.push(Block {
                    process,
                    site: self.of(lives, process, page.stack, SiteKind::Resident).0,
                    address: page.address,
                    size_bytes: page.length_bytes,
                    age_ns: now_ns.saturating_sub(page.born_ns),
                });
            }
        }
        Ok(Outstanding {
            sites: self,
            lives,
            by_owner,
            now_ns,
            few: few.into_iter(),
            blocks: heap.then(|| kernel.blocks.walk()),
        })
    }

    /// Gives the frames of `sites` their names; those that `wanted` picks, or all.
    pub fn name(&mut self, sites: &mut [Site], lives: &[Life], modules: &mut Modules) {
        for (known, site) in self.sites.iter_mut().zip(sites) {
            let frames = known.named.get_or_insert_with(|| {
                let life = lives.get(known.process.0);
                known
                    .placed
                    .iter()
                    .map(|frame| {
                        let symbols = match frame.module {
                            Some(module) => modules.name(module, frame.svma, !frame.interrupted),
                            None => {
                                let map = self.jit.entry(known.process).or_insert_with(|| {
                                    life.and_then(|life| life.perf_map.as_ref()?.read())
                                });
                                jit::symbols(map.as_ref(), frame.avma)
                            }
                        };
                        Frame {
                            address: frame.avma,
                            module: frame.module,
                            offset: frame.svma,
                            symbols,
                        }
                    })
                    .collect()
            });
            site.frames = frames.clone();
        }
    }

    /// Names the frames in some modules once more.
    pub fn rename(
        &mut self,
        sites: &mut [Site],
        renamed: &BTreeSet<ModuleId>,
        modules: &mut Modules,
    ) {
        for (known, site) in self.sites.iter_mut().zip(sites) {
            let Some(named) = &mut known.named else { continue };
            let is_renamed =
                |frame: &Frame| frame.module.is_some_and(|module| renamed.contains(&module));
            if !named.iter().any(is_renamed) {
                continue;
            }
            let frames =
                named.iter().zip(known.placed.iter()).map(|(frame, placed)| match frame.module {
                    Some(module) if renamed.contains(&module) => Frame {
                        symbols: modules.name(module, placed.svma, !placed.interrupted),
                        ..frame.clone()
                    },
                    _ => frame.clone(),
                });
            *named = frames.collect();
            site.frames = named.clone();
        }
    }

    /// JIT code has new names at every snapshot.
    pub fn forget_jit(&mut self) {
        self.jit.clear();
    }
}

/// See [`Sites::outstanding`].
pub struct Outstanding<'a> {
    sites: &'a mut Sites,
    lives: &'a [Life],
    by_owner: &'a HashMap<Owner, ProcessId>,
    now_ns: u64,
    few: std::vec::IntoIter<Block>,
    blocks: Option<Walk<'a, BlockKey, leakbpf_common::abi::Block>>,
}

impl Iterator for Outstanding<'_> {
    type Item = Result<Block, KernelError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(block) = self.few.next() {
            return Some(Ok(block));
        }
        loop {
            let (key, block) = match self.blocks.as_mut()?.next()? {
                Ok(entry) => entry,
                Err(source) => return Some(Err(KernelError::Map { map: "BLOCKS", source })),
            };
            // Blocks of a life that the session does not list: gone by exec, or not followed.
            let Some(&process) = self.by_owner.get(&key.owner) else { continue };
            if self.lives.get(process.0).is_none_or(Life::replaced) {
                continue;
            }
            let (site, _) = self.sites.of(self.lives, process, block.stack, SiteKind::Heap);
            return Some(Ok(Block {
                process,
                site,
                address: key.address,
                size_bytes: block.size_bytes,
                age_ns: self.now_ns.saturating_sub(block.born_ns),
            }));
        }
    }
}

/// Losses by name, all present.
pub fn loss_names(losses: &[u64; Loss::ALL.len()]) -> BTreeMap<String, u64> {
    Loss::ALL.iter().zip(losses).map(|(loss, &count)| (loss.name().to_owned(), count)).collect()
}
