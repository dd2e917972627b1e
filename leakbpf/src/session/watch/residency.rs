//! Which of the pages that processes touched are still there (`--mode pages`).

use leakbpf_common::abi::PageRecord;

use super::{Watch, maps_of};
use crate::{
    process::{
        Pid, ProcessError,
        pagemap::{Pagemap, PagemapError},
        status::Status,
    },
    profile::{Counters, ProcessId, estimate::Interval},
    session::space::Space,
};

/// By so much the sites may fall short of the kernel's account without a word.
const MOST_UNCOUNTED_BYTES: u64 = 4 << 20;

impl Watch {
    /// Opens the page tables of a life. Those of another one, which the process has begun by `execve`
    /// meanwhile, are of no use.
    pub(super) fn open_pagemap(&mut self, id: ProcessId) {
        let Some(life) = self.lives.get_mut(id.0).filter(|_| self.scope.max_pages.is_some()) else {
            return;
        };
        let pid = life.pid();
        let opened = Pagemap::open(pid);
        let state = self.kernel.processes.get(&life.process.pid).ok().flatten();
        life.anonymous_bytes_before = anonymous_bytes(pid);
        let same_life = state.is_none_or(|state| state.owner == life.owner);
        match opened {
            Ok(pagemap) => life.pagemap = same_life.then_some(pagemap),
            Err(error) => {
                // Once: what keeps it from one keeps it from all that come after.
                if let Some(text) = pages_unseen(error, same_life).filter(|_| !self.pages_unseen) {
                    self.pages_unseen = true;
                    self.note(Some(pid), text);
                }
            }
        }
    }

    pub(super) fn touched(&mut self, page: &PageRecord) {
        let Some(id) = self.life_or_stranger(page.head.owner) else { return };
        let Some(life) = self.lives.get_mut(id.0).filter(|life| !life.folded) else { return };
        let known = life.pages.knows(page.address);
        if !known && self.scope.max_pages.is_none_or(|most| self.pages >= most) {
            self.pages_full += 1;
            return;
        }
        self.pages += usize::from(!known);
        life.pages.touch(page.address, page.stack, page.head.time_ns);
        if life.ended() {
            life.end_pages();
        }
    }

    /// Looks which of the pages are still there: of those touched since the last look, or of all.
    pub fn look_at_pages(&mut self, all: bool) {
        if self.scope.max_pages.is_none() {
            return;
        }
        let mut unreadable = Vec::new();
        for life in self.lives.iter_mut().filter(|life| all || life.pages.has_fresh()) {
            let Some(pagemap) = life.pagemap.as_mut() else {
                life.end_pages();
                continue;
            };
            match life.pages.look(all, |pages, unsettled| pagemap.scan(pages, unsettled)) {
                Ok(()) => {}
                // Its end will be told. What it held is known as of the last look.
                Err(PagemapError::Gone) => life.end_pages(),
                Err(PagemapError::Unreadable(error)) => {
                    life.pagemap = None;
                    let text = format!("what it gives back is not seen any more: {error}");
                    unreadable.push((life.pid(), text));
                }
            }
        }
        unreadable.into_iter().for_each(|(pid, text)| self.note(Some(pid), text));
        self.pages = self.lives.iter().map(|life| life.pages.len()).sum();
    }

    /// Notes where the kernel's own account says that the sites leave much unexplained.
    pub fn compare_with_the_kernels_account(&mut self, one_in: u32) {
        let mut unexplained = Vec::new();
        for life in self.lives.iter().filter(|life| life.pagemap.is_some() && !life.ended()) {
            let (Some(before), Some(now)) =
                (life.anonymous_bytes_before, anonymous_bytes(life.pid()))
            else {
                continue;
            };
            let grown = now.saturating_sub(before);
            let mut sum = Counters::default();
            life.pages.counters().values().for_each(|counters| sum.add(counters));
            let (_, high) = Interval::of_pages(&sum.times(one_in), one_in).bytes;
            // The kernel counts in steps on each CPU.
            if grown > high.saturating_add(grown / 10).saturating_add(MOST_UNCOUNTED_BYTES) {
                unexplained.push((life.pid(), grown, sum.times(one_in).live_bytes));
            }
        }
        for (pid, grown, explained) in unexplained {
            self.note(Some(pid), unexplained_text(grown, explained));
        }
    }

    /// Nothing tells of libraries where nothing is probed: looks for those that came or went.
    pub fn look_for_code(&mut self) {
        if self.probing {
            return;
        }
        for life in self.lives.iter_mut().filter(|life| !life.ended()) {
            let maps = maps_of(&self.kernel, life.owner);
            let known = life.space.maps();
            if !maps.is_empty() && known.is_none_or(|known| !known.same_code(&maps)) {
                // What is at an address from now on is all that counts.
                life.space = Space::new(life.space.epoch().unwrap_or(0), maps);
                self.changed.insert(life.owner);
                self.unwinding.refresh(life.owner);
            }
        }
        self.take_in_mappings();
    }
}

/// Anonymous memory of a process that is resident, by the kernel's account.
fn anonymous_bytes(pid: Pid) -> Option<u64> {
    Status::of(pid).ok()?.anonymous_resident_bytes
}

/// What to tell when page tables can't be opened; nothing of memory that is gone.
fn pages_unseen(error: ProcessError, same_life: bool) -> Option<String> {
    let errno = match &error {
        ProcessError::Gone(_) => return None,
        ProcessError::Unreadable { source, .. } => source.raw_os_error(),
        ProcessError::Denied { .. } | ProcessError::Malformed { .. } => None,
    };
    // It has ended, and nobody has asked for its status yet.
    if !same_life || errno == Some(libc::ESRCH) {
        return None;
    }
    let remedy = match errno {
        Some(libc::EMFILE | libc::ENFILE) => ": raise the limit of open files (ulimit -n)",
        _ => "",
    };
    Some(format!(
        "what it gives back is not seen, and all that it touches counts as resident (others may \
         be so, too, and are not listed): {:#}{remedy}",
        anyhow::Error::new(error)
    ))
}

fn unexplained_text(grown_bytes: u64, explained_bytes: u64) -> String {
    format!(
        "anonymous memory grew by {} MiB in all, of which the sites explain {} MiB: what was moved \
         by mremap or brought in without a fault (MAP_POPULATE, mlock) is not followed",
        grown_bytes >> 20,
        explained_bytes >> 20
    )
}

#[cfg(test)]
#[path = "residency_tests.rs"]
mod tests;
