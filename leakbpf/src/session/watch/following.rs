//! Following the watched processes: through fork, exec, `dlopen` and exit.

use std::time::{Duration, Instant};

use leakbpf_common::abi::{
    ExecRecord, ForkRecord, LibrariesRecord, Owner, UnmappedRecord, process_flags,
};

use super::{Watch, epochs_and_maps_of, maps_of, probes::MAX_DETACHING};
use crate::{
    process::{Pid, cpu_time, status::Identity},
    profile::ProcessId,
    session::{
        inheritance::Untouched,
        life::{CpuTime, ENDED_BY_EXEC, Life},
    },
};

/// Children that are listed one by one when they were seen late; the rest are only counted.
pub(super) const LATE_CHILDREN_LISTED: u64 = 10;

/// How a child was seen late.
const ALLOCATED_EARLY: &str = "may have used its allocator before its probes were in place";
const PROBES_WAIT: &str = "has to wait for its probes: too many children come and go";

impl Watch {
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

    pub(super) fn forked(&mut self, fork: &ForkRecord) {
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
        // Only this thread has any closed: none begins to be until the child's are in place.
        let closing = self.detacher.pending() > 0;
        let parents = fork.head.owner.tgid();
        let untouched = self.placed.get(&parents).and_then(|placed| {
            Untouched::of(pid, placed, &maps, closing, || maps_of(&self.kernel, fork.child))
        });
        if self.detacher.pending() > MAX_DETACHING {
            self.seen_late(pid, PROBES_WAIT);
            self.unprobed.push((fork.child, Instant::now()));
            return;
        }
        let is_known = match (self.place(pid, &maps), untouched, self.placed.get(&pid.0)) {
            (Ok(_), Some(untouched), Some(own)) => {
                untouched.still(pid, own, || maps_of(&self.kernel, fork.child))
            }
            _ => false,
        };
        if !is_known {
            // Or it is gone already.
            self.seen_late(pid, ALLOCATED_EARLY);
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

    pub(super) fn executed(&mut self, exec: &ExecRecord) {
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
            self.seen_late(pid, PROBES_WAIT);
            self.unprobed.push((exec.head.owner, Instant::now()));
            return;
        }
        if self.probes_hang_on_threads() && !self.placed.contains_key(&pid.0) {
            // It was in its parent's memory until now.
            self.seen_late(pid, ALLOCATED_EARLY);
        }
        if exec.old_tid == exec.head.tid || !self.probes_hang_on_threads() {
            let _ = self.place(pid, &maps);
        } else {
            self.move_probes(pid, &maps);
        }
    }

    pub(super) fn libraries_changed(&mut self, change: &LibrariesRecord) {
        let Some(id) = self.life_of(change.head.owner) else { return };
        let (epochs, maps) = epochs_and_maps_of(&self.kernel, change.head.owner);
        self.lives[id.0].refresh(epochs, maps);
        self.changed.insert(change.head.owner);
    }

    pub(super) fn seen(&mut self, owner: Owner) -> Option<ProcessId> {
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
    pub(super) fn unmapped(&mut self, unmapped: &UnmappedRecord) {
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
