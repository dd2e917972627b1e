//! The probes of the watched processes: placing them, moving them, taking them away.

use std::{
    collections::HashSet,
    num::NonZeroU32,
    time::{Duration, Instant},
};

use leakbpf_common::abi::Owner;

use super::{Watch, following::LATE_CHILDREN_LISTED, maps_of};
use crate::{
    probe::attach::Link,
    process::{
        Pid,
        maps::Maps,
        status::{Stat, memory_owner},
    },
    session::{
        SessionError,
        life::Life,
        placement::{LookedAt, Placed},
    },
};

/// What may be waiting to be closed before children that come have to wait. The kernel takes some 70 ms for
/// each link of a perf event, one after the other, and making one waits for the same lock.
pub(super) const MAX_DETACHING: usize = 32;

/// When the thread that a process's probes hang on has ended, its others have so long to
/// follow: most often the process is about to end.
const OTHERS_FOLLOW: Duration = Duration::from_millis(100);

/// How often it is looked whether processes can get their probes that had to wait.
const LOOK_FOR_ROOM: Duration = Duration::from_millis(50);

/// A process that was taken in.
pub struct Attached {
    pub pid: Pid,
    pub functions: usize,
    pub probes: usize,
    pub looked_at: Vec<LookedAt>,
}

impl Watch {
    pub fn probes(&self) -> usize {
        self.placed.values().map(Placed::len).sum()
    }

    /// Whether processes have probes of their own in the same libraries: the kernel then asks those of all
    /// at each hit, and one of another process never does without the return.
    pub fn probes_side_by_side(&self) -> bool {
        let mut files = HashSet::new();
        self.placed.values().flat_map(Placed::files).any(|file| !files.insert(file))
    }

    /// Places what a process lacks, and what it maps meanwhile: the loader tells of libraries only
    /// once its own probe is in place.
    pub(super) fn place(&mut self, pid: Pid, maps: &Maps) -> Result<Attached, SessionError> {
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

    /// Places the probes of a process anew: the kernel looks for its memory through the thread that
    /// they were placed for (`uprobe_perf_filter` in kernel/trace/trace_uprobe.c), and that is gone.
    pub(super) fn move_probes(&mut self, pid: Pid, maps: &Maps) {
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

    pub(super) fn probes_hang_on_threads(&self) -> bool {
        !self.scope.shared_probes && self.probing
    }

    /// When [`Self::attend`] has something to do.
    pub fn due(&self) -> Option<Instant> {
        let headless = self.headless.iter().map(|(_, since)| *since + OTHERS_FOLLOW).min();
        let unprobed = self.unprobed.iter().map(|(_, since)| *since + LOOK_FOR_ROOM).min();
        headless.into_iter().chain(unprobed).min()
    }

    /// Looks after the processes that have no probes, or soon will have none that work.
    pub fn attend(&mut self) {
        self.attend_headless();
        self.attend_unprobed();
    }

    /// Those that had to wait for theirs.
    fn attend_unprobed(&mut self) {
        let now = Instant::now();
        for (owner, since) in std::mem::take(&mut self.unprobed) {
            let Some(life) = self.life_of(owner).map(|id| &self.lives[id.0]) else { continue };
            let pid = life.pid();
            if life.ended() || self.placed.contains_key(&pid.0) {
                continue;
            }
            if since + LOOK_FOR_ROOM > now {
                self.unprobed.push((owner, since));
                continue;
            }
            if self.detacher.pending() > MAX_DETACHING {
                self.unprobed.push((owner, now));
                continue;
            }
            let maps = maps_of(&self.kernel, owner);
            let _ = self.place(pid, &maps);
        }
    }

    /// Those whose probes hung on a thread that has ended.
    fn attend_headless(&mut self) {
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

    /// Takes every probe away, in the background: the kernel waits for a grace period with each link
    /// (some 70 ms), and for those of perf events one after the other (`perf_uprobe_destroy` in
    /// kernel/trace/trace_event_perf.c).
    pub fn detach(&mut self) {
        let links: Vec<_> =
            std::mem::take(&mut self.placed).into_values().flat_map(Placed::into_links).collect();
        self.detacher.detach(links);
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
        self.unprobed.clear();
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

    fn owner_of(&self, pid: Pid) -> Option<Owner> {
        let state = self.kernel.processes.get(&pid.0).ok().flatten()?;
        self.life_of(state.owner).map(|_| state.owner)
    }
}
