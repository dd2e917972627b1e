//! Lives that have ended, put together: their totals are kept, their blocks, sites and stacks are
//! not. Without it, a session over a machine or a shell that forks all day fills the kernel's maps
//! with the blocks of processes that are gone, and the agent's memory with their address spaces.

use std::collections::{BTreeMap, HashMap};

use leakbpf_common::abi::{Owner, StackId};

use super::{
    counting::Counting,
    life::{Life, Stack},
    snapshot::Sites,
    space::Space,
    watch::Watch,
};
use crate::{
    ledger::{pages::Pages, ranges::Mappings},
    probe::kernel::KernelError,
    profile::{Counters, Process, ProcessId, SiteKind, estimate::Estimate},
};

/// Ended lives that are kept block by block.
pub const KEPT_WHOLE: usize = 64;

/// Different programs that ended lives are listed under; the rest share one entry.
const MAX_GROUPS: usize = 256;

/// What a site of ended lives holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Folded {
    pub counters: Counters,
    /// `CLOCK_MONOTONIC`, of the blocks that were outstanding at the end.
    pub born_ns: Option<(u64, u64)>,
}

impl Folded {
    /// Counts one outstanding block.
    pub fn hold(&mut self, estimate: Estimate, born_ns: u64) {
        self.counters.hold(estimate);
        let (oldest, youngest) = self.born_ns.unwrap_or((born_ns, born_ns));
        self.born_ns = Some((oldest.min(born_ns), youngest.max(born_ns)));
    }

    pub fn add(&mut self, other: &Self) {
        self.counters.add(&other.counters);
        self.born_ns = match (self.born_ns, other.born_ns) {
            (Some(mine), Some(others)) => Some((mine.0.min(others.0), mine.1.max(others.1))),
            (mine, others) => mine.or(others),
        };
    }

    /// The memory itself is gone, by `execve`.
    fn release(&mut self) {
        let counters = &mut self.counters;
        (counters.freed_bytes, counters.freed_count) =
            (counters.allocated_bytes, counters.allocated_count);
        counters.clear_live();
        self.born_ns = None;
    }
}

/// Entries of ended lives by program: those that no profile has listed one by one.
#[derive(Default)]
pub struct Groups {
    by_program: HashMap<(String, String), Group>,
}

struct Group {
    process: ProcessId,
    lives: u64,
}

/// Lives that have ended and still have their blocks in the kernel's maps.
pub fn foldable(lives: &[Life]) -> usize {
    lives.iter().filter(|life| life.ended() && !life.folded).count()
}

/// Folds every life that has ended. One walk over the kernel's maps, however many there are. `counts`
/// says what is counted as live, by kind and size: an ended process's memory has no age that matters.
pub fn fold(
    watch: &mut Watch,
    sites: &mut Sites,
    groups: &mut Groups,
    counting: Counting,
    counts: impl Fn(SiteKind, u64) -> bool,
) -> Result<(), KernelError> {
    let ended: HashMap<Owner, ProcessId> = watch
        .lives
        .iter()
        .enumerate()
        .filter(|(_, life)| life.ended() && !life.folded)
        .map(|(index, life)| (life.owner, ProcessId(index)))
        .collect();
    let mut held = take_out(watch, &ended, counting, counts)?;
    sites.forget(|owner| ended.contains_key(owner));
    let listed = watch.listed;
    for (process, left) in let_go(watch, &ended) {
        let process = match process.0 < listed {
            true => process,
            false => groups.of(&left.process, watch),
        };
        for ((stack, kind), mut folded) in held.remove(&left.owner).unwrap_or_default() {
            if left.replaced {
                folded.release();
            }
            let stack = left.stacks.get(&stack).cloned().unwrap_or_else(Stack::lost);
            sites.keep(process, kind, stack, &folded);
        }
    }
    watch.by_owner = watch
        .lives
        .iter()
        .enumerate()
        .filter(|(_, life)| !life.folded)
        .map(|(index, life)| (life.owner, ProcessId(index)))
        .collect();
    Ok(())
}

/// By life, what each of its sites holds.
type Held = HashMap<Owner, BTreeMap<(StackId, SiteKind), Folded>>;

/// Takes what ended lives hold out of the kernel's maps and out of their books.
fn take_out(
    watch: &Watch,
    ended: &HashMap<Owner, ProcessId>,
    counting: Counting,
    counts: impl Fn(SiteKind, u64) -> bool,
) -> Result<Held, KernelError> {
    let failed = |map| move |source| KernelError::Map { map, source };
    let mut held = Held::new();
    let mut hold = |owner, key: (StackId, SiteKind), size_bytes, born_ns: u64| {
        if counts(key.1, size_bytes) {
            let estimate = counting.estimate(key.1, size_bytes, born_ns);
            held.entry(owner).or_default().entry(key).or_default().hold(estimate, born_ns);
        }
    };
    watch
        .kernel
        .blocks
        .take(|key, block| {
            let taken = ended.contains_key(&key.owner);
            if taken {
                hold(key.owner, (block.stack, SiteKind::Heap), block.size_bytes, block.born_ns);
            }
            taken
        })
        .map_err(failed("BLOCKS"))?;
    let mut add = |owner, key, counters| {
        let folded = Folded { counters, born_ns: None };
        held.entry(owner).or_default().entry(key).or_default().add(&folded);
    };
    watch
        .kernel
        .sites
        .take(|key, value| {
            let taken = ended.contains_key(&key.owner);
            if taken && value.allocated_count > 0 {
                let counters = counting.heap_counters(value);
                add(key.owner, (key.stack, SiteKind::Heap), counters);
            }
            taken
        })
        .map_err(failed("SITES"))?;
    for life in watch.lives.iter().filter(|life| ended.contains_key(&life.owner)) {
        for (key, value) in life.mappings.counters() {
            let counters = Counters { live_bytes: 0, live_count: 0, ..value };
            let folded = Folded { counters, born_ns: None };
            held.entry(life.owner).or_default().entry(key).or_default().add(&folded);
        }
        for range in life.mappings.live() {
            if counts(range.kind, range.length_bytes) {
                let sites = held.entry(life.owner).or_default();
                let site = sites.entry((range.stack, range.kind)).or_default();
                let estimate = counting.estimate(range.kind, range.length_bytes, range.born_ns);
                site.hold(estimate, range.born_ns);
            }
        }
        for (stack, value) in life.pages.counters() {
            let folded = Folded { counters: counting.page_counters(value), born_ns: None };
            let sites = held.entry(life.owner).or_default();
            sites.entry((stack, SiteKind::Resident)).or_default().add(&folded);
        }
        for page in life.pages.live() {
            if counts(SiteKind::Resident, page.length_bytes) {
                let sites = held.entry(life.owner).or_default();
                let site = sites.entry((page.stack, SiteKind::Resident)).or_default();
                let estimate =
                    counting.estimate(SiteKind::Resident, page.length_bytes, page.born_ns);
                site.hold(estimate, page.born_ns);
            }
        }
    }
    Ok(held)
}

/// What is left of a life, for its sites.
struct Left {
    owner: Owner,
    process: Process,
    stacks: HashMap<StackId, Stack>,
    replaced: bool,
}

/// Lets go of what is known of ended lives. Those that no profile has listed leave the list, and
/// all that follow move up.
fn let_go(watch: &mut Watch, ended: &HashMap<Owner, ProcessId>) -> Vec<(ProcessId, Left)> {
    let listed = watch.listed;
    let losses = &mut watch.folded_losses;
    let cpu_time = &mut watch.folded_cpu_time;
    let mut left = Vec::new();
    let mut index = 0;
    watch.lives.retain_mut(|life| {
        let process = ProcessId(index);
        index += 1;
        if !ended.contains_key(&life.owner) || life.folded {
            return true;
        }
        *cpu_time += std::mem::take(&mut life.cpu_time).used();
        let lost = life.mappings.losses();
        losses.frees_missed = losses.frees_missed.saturating_add(lost.frees_missed);
        losses.ranges_full = losses.ranges_full.saturating_add(lost.ranges_full);
        left.push((
            process,
            Left {
                owner: life.owner,
                process: life.process.clone(),
                stacks: std::mem::take(&mut life.stacks),
                replaced: life.replaced(),
            },
        ));
        life.folded = true;
        life.space = Space::default();
        life.perf_map = None;
        life.mappings = Mappings::new(None);
        life.pages = Pages::default();
        process.0 < listed
    });
    left
}

impl Groups {
    /// The entry that stands for an ended life, which it counts.
    fn of(&mut self, process: &Process, watch: &mut Watch) -> ProcessId {
        let mut program = (process.comm.clone(), process.exe.clone());
        if self.by_program.len() >= MAX_GROUPS && !self.by_program.contains_key(&program) {
            program = ("[others]".to_owned(), String::new());
        }
        let group = self.by_program.entry(program).or_insert_with_key(|(comm, exe)| {
            // Among the listed ones, so that it keeps its place.
            let place = watch.listed;
            let process = Process {
                pid: 0,
                parent_pid: None,
                start_time: place as u64,
                comm: comm.clone(),
                exe: exe.clone(),
                cmdline: String::new(),
                cgroup: String::new(),
                end: None,
            };
            let mut life =
                Life::new(Owner::default(), process, Space::default(), Mappings::new(None));
            life.folded = true;
            watch.lives.insert(place, life);
            watch.listed += 1;
            Group { process: ProcessId(place), lives: 0 }
        });
        group.lives += 1;
        if let Some(life) = watch.lives.get_mut(group.process.0) {
            life.process.end = Some(format!("{} of them", group.lives));
        }
        group.process
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folded(sizes: &[(u64, u64)]) -> Folded {
        let mut folded = Folded::default();
        for &(size_bytes, born_ns) in sizes {
            folded.counters.allocated_bytes += size_bytes;
            folded.counters.allocated_count += 1;
            folded.hold(Estimate::times(size_bytes, 1), born_ns);
        }
        folded
    }

    #[test]
    fn totals_of_two_lives_are_those_of_all_their_blocks() {
        let mut sum = folded(&[(10, 5), (20, 3)]);
        sum.add(&folded(&[(30, 9)]));
        sum.add(&Folded::default());
        assert_eq!(sum, folded(&[(10, 5), (20, 3), (30, 9)]));
        assert_eq!(sum.born_ns, Some((3, 9)));
    }

    #[test]
    fn memory_that_an_exec_replaced_is_free() {
        let mut gone = folded(&[(10, 5), (20, 3)]);
        gone.release();
        assert_eq!((gone.counters.live_bytes, gone.counters.live_count), (0, 0));
        assert_eq!((gone.counters.freed_bytes, gone.counters.freed_count), (30, 2));
        assert_eq!(gone.born_ns, None);
    }
}
