//! Books of the pages of one address space that are looked at: who touched them first, and which of
//! them are still there.
//!
//! The kernel side tells of touches; that a page was given back is only seen by looking, which
//! [`Pages::look`] does through whatever reads the page tables.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
};

use leakbpf_common::{
    abi::StackId,
    pages::{HUGE_PAGE_BYTES, PAGE_BYTES},
};

use crate::profile::Counters;

/// Pages of a huge one.
const HUGE_PAGES: u64 = HUGE_PAGE_BYTES / PAGE_BYTES;

/// Pages between two that are looked at, up to which they are looked at together: the kernel walks
/// those between in less time than a further call takes.
const GAP_PAGES: u64 = 96;

/// Longest range of pages that is looked at at once. The process can't change its mappings
/// meanwhile.
const SPAN_PAGES: u64 = 4096;

/// More touches than these of one huge page, all seen for the first time, are touches of pages that
/// the kernel has put together since; two can be threads that touched it at once.
const TOUCHES_OF_HUGE: usize = 2;

/// What the page tables say of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Found {
    pub present: bool,
    pub swapped: bool,
    /// Of a file, or shared memory.
    pub file: bool,
    /// The page that all untouched memory reads as.
    pub zero: bool,
    /// Mapped as a huge one.
    pub huge: bool,
}

impl Found {
    const fn is_anonymous(self) -> bool {
        self.present && !self.file && !self.zero
    }
}

/// Neighbouring pages of which the same is to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    pub pages: Range<u64>,
    pub found: Found,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Touched since the last look.
    Fresh,
    /// Touched, and not there when it was looked at: the fault takes its time, or the page was
    /// given back at once.
    Late,
    Small,
    Huge,
}

/// A page that was touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Touched {
    stack: StackId,
    born_ns: u64,
    state: State,
    /// Of it, resident. 0 while it is swapped out, and while nothing is known yet.
    resident_pages: u16,
    /// Of it, not given back yet, as far as is known. It never grows: what comes back into its place
    /// was touched by somebody else.
    left_pages: u16,
}

/// A page, or huge page, that is resident.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resident {
    pub address: u64,
    pub length_bytes: u64,
    pub stack: StackId,
    /// `CLOCK_MONOTONIC` of its touch.
    pub born_ns: u64,
}

/// See the module's documentation. Nothing here is multiplied: one page is one page, and what it
/// stands for is for others to say.
#[derive(Debug, Default)]
pub struct Pages {
    /// By page number.
    touched: BTreeMap<u64, Touched>,
    /// Not looked at yet.
    fresh: Vec<u64>,
    /// All that was found to be anonymous memory, whatever became of it.
    counted: HashMap<StackId, Counters>,
}

impl Pages {
    /// Pages that are kept.
    pub fn len(&self) -> usize {
        self.touched.len()
    }

    pub fn is_empty(&self) -> bool {
        self.touched.is_empty()
    }

    pub fn knows(&self, address: u64) -> bool {
        self.touched.contains_key(&(address / PAGE_BYTES))
    }

    /// Takes in a touch. A page that was touched before was given back since, or is there and has
    /// another fault: the first write after `fork`, NUMA balancing, from swap. Either way it belongs
    /// to the last touch, and the one before counts as released.
    pub fn touch(&mut self, address: u64, stack: StackId, born_ns: u64) {
        let page = address / PAGE_BYTES;
        let touched =
            Touched { stack, born_ns, state: State::Fresh, resident_pages: 0, left_pages: 1 };
        match self.touched.insert(page, touched) {
            // It came and went before anybody looked.
            Some(Touched { stack, state: State::Fresh | State::Late, .. }) => {
                self.count(stack, PAGE_BYTES);
            }
            Some(before @ Touched { state: State::Huge, .. }) => self.keep_rest(page, before),
            Some(Touched { state: State::Small, .. }) | None => {}
        }
        self.fresh.push(page);
    }

    /// Keeps a huge page under another page of it: its own was touched again, which says nothing of
    /// the rest.
    fn keep_rest(&mut self, page: u64, huge: Touched) {
        let Range { start, end } = huge_page(page);
        let mut others = (page + 1..end).chain(start..page);
        if let Some(free) = others.find(|other| !self.touched.contains_key(other)) {
            self.touched.insert(free, huge);
        }
    }

    pub fn has_fresh(&self) -> bool {
        !self.fresh.is_empty()
    }

    /// Looks at the pages touched since the last look, or at all. `scan` reads the page tables of a
    /// range of pages: what it does not mention is not there. It is also told, sorted, those of which
    /// it must say whether they are huge, or the page of zeros; of others that is not asked. After
    /// an error of it, which is passed on, the pages not looked at yet stay as they were.
    pub fn look<E>(
        &mut self,
        all: bool,
        mut scan: impl FnMut(Range<u64>, &[u64]) -> Result<Vec<Run>, E>,
    ) -> Result<(), E> {
        let mut fresh = std::mem::take(&mut self.fresh);
        let mut pages = match all {
            true => self.touched.keys().copied().collect(),
            false => {
                fresh.sort_unstable();
                fresh.dedup();
                std::mem::take(&mut fresh)
            }
        };
        let mut done = 0;
        let result = loop {
            let Some((count, span)) = self.next_span(pages.get(done..).unwrap_or_default()) else {
                break Ok(());
            };
            let together = pages.get(done..done + count).unwrap_or_default();
            match scan(span, &self.unsettled(together)) {
                Ok(runs) => self.judge(together, &runs),
                Err(error) => break Err(error),
            }
            done += count;
        };
        // What has not been looked at will be, whatever kept it from that.
        pages.drain(..done);
        pages.retain(|page| self.touched.get(page).is_some_and(|it| it.state == State::Fresh));
        self.fresh = pages;
        result
    }

    /// How many of the pages, which are sorted, are looked at together, and the range that shows
    /// them.
    fn next_span(&self, pages: &[u64]) -> Option<(usize, Range<u64>)> {
        let mut span = self.extent(*pages.first()?);
        let mut count = 1;
        for &page in pages.get(1..)? {
            let extent = self.extent(page);
            // A huge page begins before the page of it that was touched.
            let both = extent.start.min(span.start)..extent.end.max(span.end);
            if extent.start > span.end + GAP_PAGES || both.end - both.start > SPAN_PAGES {
                break;
            }
            span = both;
            count += 1;
        }
        Some((count, span))
    }

    fn unsettled(&self, pages: &[u64]) -> Vec<u64> {
        let state = |page: &u64| self.touched.get(page).map(|known| known.state);
        let unsettled = |page: &u64| matches!(state(page), Some(State::Fresh | State::Late));
        pages.iter().copied().filter(unsettled).collect()
    }

    /// The pages that one touch brought.
    fn extent(&self, page: u64) -> Range<u64> {
        match self.touched.get(&page) {
            Some(Touched { state: State::Huge, .. }) => huge_page(page),
            _ => page..page + 1,
        }
    }

    fn judge(&mut self, pages: &[u64], runs: &[Run]) {
        let mut huge = Vec::new();
        for &page in pages {
            let Some(known) = self.touched.get(&page).copied() else { continue };
            match known.state {
                State::Fresh | State::Late => {
                    let found = at(runs, page);
                    if found.is_anonymous() && found.huge {
                        huge.push(page);
                    } else {
                        self.settle(page, known, found);
                    }
                }
                State::Small => {
                    let found = at(runs, page);
                    match (found.is_anonymous(), found.swapped) {
                        (true, _) => self.keep(page, 1, 0),
                        (false, true) => self.keep(page, 0, 1),
                        (false, false) => self.drop_page(page),
                    }
                }
                State::Huge => {
                    let (resident, swapped) = self.within_huge(page, runs);
                    if resident + swapped > 0 {
                        self.keep(page, resident, swapped);
                    } else {
                        self.drop_page(page);
                    }
                }
            }
        }
        for together in huge.chunk_by(|a, b| huge_page(*a) == huge_page(*b)) {
            self.settle_huge(together);
        }
    }

    /// Decides on a page that was touched and is not part of a huge one.
    fn settle(&mut self, page: u64, known: Touched, found: Found) {
        if found.is_anonymous() || found.swapped {
            self.count(known.stack, PAGE_BYTES);
            self.set(page, State::Small, u16::from(!found.swapped));
        } else if found.present {
            // A file's, or read before it was written: the write will be another fault.
            self.drop_page(page);
        } else if known.state == State::Fresh {
            self.set(page, State::Late, 0);
        } else {
            self.count(known.stack, PAGE_BYTES);
            self.drop_page(page);
        }
    }

    /// Decides on touches of one huge page.
    fn settle_huge(&mut self, touches: &[u64]) {
        if touches.len() > TOUCHES_OF_HUGE {
            for page in touches {
                if let Some(known) = self.touched.get(page).copied() {
                    self.count(known.stack, PAGE_BYTES);
                    self.set(*page, State::Small, 1);
                }
            }
            return;
        }
        let born_ns = |page: &&u64| self.touched.get(page).map_or(u64::MAX, |it| it.born_ns);
        let Some(&first) = touches.iter().min_by_key(born_ns) else { return };
        // A huge page comes only where nothing was: all that is known of its place is over.
        let others: Vec<u64> = self
            .touched
            .range(huge_page(first))
            .map(|(page, _)| *page)
            .filter(|page| *page != first)
            .collect();
        others.into_iter().for_each(|page| self.drop_page(page));
        if let Some(known) = self.touched.get(&first).copied() {
            self.count(known.stack, HUGE_PAGE_BYTES);
            self.set(first, State::Huge, HUGE_PAGES as u16);
        }
    }

    fn count(&mut self, stack: StackId, bytes: u64) {
        let counters = self.counted.entry(stack).or_default();
        counters.allocated_bytes = counters.allocated_bytes.saturating_add(bytes);
        counters.allocated_count = counters.allocated_count.saturating_add(1);
    }

    /// How many pages of a huge one are resident, and how many are swapped out, without those that
    /// were touched again.
    fn within_huge(&self, page: u64, runs: &[Run]) -> (u16, u16) {
        let (mut resident, mut swapped) = within(runs, huge_page(page));
        let again = self.touched.range(huge_page(page)).filter(|(other, _)| **other != page);
        for (other, _) in again {
            let found = at(runs, *other);
            match (found.is_anonymous(), found.swapped) {
                (true, _) => resident = resident.saturating_sub(1),
                (false, true) => swapped = swapped.saturating_sub(1),
                (false, false) => {}
            }
        }
        (resident, swapped)
    }

    fn keep(&mut self, page: u64, resident_pages: u16, swapped_pages: u16) {
        if let Some(known) = self.touched.get_mut(&page) {
            known.left_pages = known.left_pages.min(resident_pages + swapped_pages);
            known.resident_pages = known.left_pages.min(resident_pages);
        }
    }

    fn set(&mut self, page: u64, state: State, resident_pages: u16) {
        if let Some(known) = self.touched.get_mut(&page) {
            known.state = state;
            known.resident_pages = resident_pages;
            known.left_pages = if state == State::Huge { HUGE_PAGES as u16 } else { 1 };
        }
    }

    fn drop_page(&mut self, page: u64) {
        self.touched.remove(&page);
    }

    /// The process is gone: what it touched last can't be looked at any more. `is_file` says which
    /// addresses belong to files; the rest is taken for memory that it held.
    pub fn end(&mut self, is_file: impl Fn(u64) -> bool) {
        for page in std::mem::take(&mut self.fresh) {
            let Some(known) = self.touched.get(&page).copied() else { continue };
            if known.state != State::Fresh {
                continue;
            }
            if is_file(page * PAGE_BYTES) {
                self.drop_page(page);
            } else {
                self.settle(page, known, Found { present: true, ..Found::default() });
            }
        }
        self.touched.retain(|_, known| known.state != State::Late);
    }

    /// What is resident, as of the last look.
    pub fn live(&self) -> impl Iterator<Item = Resident> {
        self.touched.iter().filter(|(_, known)| known.resident_pages > 0).map(|(page, known)| {
            let first = match known.state {
                State::Huge => huge_page(*page).start,
                _ => *page,
            };
            Resident {
                address: first * PAGE_BYTES,
                length_bytes: u64::from(known.resident_pages) * PAGE_BYTES,
                stack: known.stack,
                born_ns: known.born_ns,
            }
        })
    }

    /// By stack, what was touched and what of it was given back.
    pub fn counters(&self) -> BTreeMap<StackId, Counters> {
        let mut counters: BTreeMap<StackId, Counters> =
            self.counted.iter().map(|(stack, counted)| (*stack, *counted)).collect();
        for page in self.live() {
            let sum = counters.entry(page.stack).or_default();
            sum.live_bytes += page.length_bytes;
            sum.live_count += 1;
        }
        for sum in counters.values_mut() {
            sum.freed_bytes = sum.allocated_bytes.saturating_sub(sum.live_bytes);
            sum.freed_count = sum.allocated_count.saturating_sub(sum.live_count);
        }
        counters
    }
}

/// Pages that one huge page around `page` consists of.
fn huge_page(page: u64) -> Range<u64> {
    let first = page & !(HUGE_PAGES - 1);
    first..first + HUGE_PAGES
}

/// What the page tables say of a page; the runs are sorted.
fn at(runs: &[Run], page: u64) -> Found {
    let position = runs.partition_point(|run| run.pages.end <= page);
    let run = runs.get(position).filter(|run| run.pages.contains(&page));
    run.map(|run| run.found).unwrap_or_default()
}

/// How many pages of a huge one are anonymous and resident, and how many are swapped out.
fn within(runs: &[Run], pages: Range<u64>) -> (u16, u16) {
    let first = runs.partition_point(|run| run.pages.end <= pages.start);
    let inside = runs.get(first..).unwrap_or_default();
    let (mut resident, mut swapped) = (0, 0);
    for run in inside.iter().take_while(|run| run.pages.start < pages.end) {
        let start = run.pages.start.max(pages.start);
        let count = run.pages.end.min(pages.end).saturating_sub(start) as u16;
        match (run.found.is_anonymous(), run.found.swapped) {
            (true, _) => resident += count,
            (false, true) => swapped += count,
            (false, false) => {}
        }
    }
    (resident, swapped)
}

#[cfg(test)]
#[path = "pages_tests.rs"]
mod tests;
