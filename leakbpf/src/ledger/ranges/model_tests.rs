//! The books against a kernel that is simulated page by page, with threads in the middle of their
//! calls, and against records that make no sense.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use leakbpf_common::abi::{MappingChange, MappingRecord, Owner, RecordHead, StackId};
use proptest::prelude::*;

use super::*;

const PAGES: u64 = 64;
/// The break starts here; what the kernel places by itself stays below.
const BREAK_FLOOR: u64 = 48;
const BREAK_CEILING: u64 = 60;
/// Mapped before the session began.
const PREEXISTING: std::ops::Range<u64> = 20..24;
const THREADS: usize = 4;

#[derive(Debug, Clone, Copy)]
enum Call {
    Map,
    Unmap,
    Remap,
    Break,
    AskBreak,
}

/// What one thread does next; a call uses the fields that it has a use for. All in pages.
#[derive(Debug, Clone, Copy)]
struct Step {
    thread: usize,
    call: Call,
    start: u64,
    length: u64,
    new_length: u64,
    destination: u64,
    fixed: bool,
    /// `MAP_ANONYMOUS`, or the absence of `MREMAP_DONTUNMAP`.
    plain: bool,
    inside_allocator: bool,
    stack_flag: bool,
    /// The kernel is out of memory.
    fails: bool,
    site: u64,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let call = prop_oneof![
        4 => Just(Call::Map),
        2 => Just(Call::Unmap),
        4 => Just(Call::Remap),
        1 => Just(Call::Break),
        1 => Just(Call::AskBreak),
    ];
    let ranges = (0..PAGES, 0u64..7, 0u64..9, 0..PAGES);
    let switches = (
        prop::bool::weighted(0.3),
        prop::bool::weighted(0.7),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.1),
    );
    let step = (0..THREADS, call, ranges, switches, 0u64..3).prop_map(
        |(thread, call, (start, length, new_length, destination), switches, site)| Step {
            thread,
            call,
            start,
            length,
            new_length,
            destination,
            fixed: switches.0,
            plain: switches.1,
            inside_allocator: switches.2,
            stack_flag: switches.3,
            fails: switches.4,
            site,
        },
    );
    prop::collection::vec(step, 1..400)
}

type Site = (StackId, SiteKind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Page {
    /// Of a file, or older than the session.
    Uncounted,
    /// Made by this call, an index into [`Kernel::made`].
    Made(usize),
}

/// The truth: what each page of the address space is.
struct Kernel {
    pages: HashMap<u64, Page>,
    /// Site, time and pages of each call that made memory.
    made: Vec<(Site, u64, u64)>,
    program_break: u64,
    now_ns: u64,
}

impl Kernel {
    fn new() -> Self {
        Self {
            pages: PREEXISTING.map(|page| (page, Page::Uncounted)).collect(),
            made: Vec::new(),
            program_break: BREAK_FLOOR,
            now_ns: 0,
        }
    }

    fn is_free(&self, mut pages: std::ops::Range<u64>) -> bool {
        pages.all(|page| !self.pages.contains_key(&page))
    }

    /// The lowest free place that no thread is about to call `munmap` or `MAP_FIXED` on: a program
    /// that does so without owning the place has no one truth.
    fn place(&self, length: u64, reserved: &BTreeSet<u64>) -> Option<u64> {
        (0..BREAK_FLOOR.saturating_sub(length)).find(|&start| {
            self.is_free(start..start + length)
                && (start..start + length).all(|page| !reserved.contains(&page))
        })
    }

    fn make(&mut self, step: Step, kind: SiteKind, pages: std::ops::Range<u64>) {
        let kind = if step.inside_allocator { SiteKind::AllocatorMapping } else { kind };
        let page = Page::Made(self.made.len());
        self.made.push(((stack(step), kind), self.now_ns, pages.end - pages.start));
        self.pages.extend(pages.map(|at| (at, page)));
    }

    fn map(&mut self, step: Step, reserved: &BTreeSet<u64>) -> Option<u64> {
        let start = match step.fixed {
            true => step.start,
            false => self.place(step.length, reserved)?,
        };
        let pages = start..start + step.length;
        match step.plain {
            true if step.stack_flag => self.make(step, SiteKind::ThreadStack, pages),
            true => self.make(step, SiteKind::Mapping, pages),
            false => self.pages.extend(pages.map(|page| (page, Page::Uncounted))),
        }
        Some(start)
    }

    fn remap(&mut self, step: Step, reserved: &BTreeSet<u64>) -> Option<u64> {
        let source: Option<Vec<Page>> = (step.start..step.start + step.length.max(1))
            .map(|page| self.pages.get(&page).copied())
            .collect();
        let source = source?;
        let counted = matches!(source.first()?, Page::Made(_));
        if source.iter().any(|page| matches!(page, Page::Made(_)) != counted) {
            return None;
        }
        let dont_unmap = !step.plain;
        if dont_unmap && step.length != step.new_length {
            return None;
        }
        let tail = step.start + step.length..step.start + step.new_length;
        let stays = !step.fixed && !dont_unmap && step.length > 0;
        let room = self.is_free(tail.clone())
            && tail.end <= BREAK_FLOOR
            && tail.clone().all(|page| !reserved.contains(&page));
        let target = if stays && (room || tail.is_empty()) {
            step.start
        } else if step.fixed {
            step.destination
        } else {
            self.place(step.new_length, reserved)?
        };
        let old = step.start..step.start + step.length;
        let new = target..target + step.new_length;
        if step.fixed && old.start < new.end && new.start < old.end {
            return None;
        }
        if step.length == 0 || dont_unmap {
            match counted {
                true => self.make(step, SiteKind::Mapping, new),
                false => self.pages.extend(new.map(|page| (page, Page::Uncounted))),
            }
            return Some(target);
        }
        for page in old.clone().chain(new.clone()) {
            self.pages.remove(&page);
        }
        self.pages.extend(new.clone().zip(source));
        let added = target + step.length..new.end;
        match counted {
            true if !added.is_empty() => self.make(step, SiteKind::Mapping, added),
            true => {}
            false => self.pages.extend(added.map(|page| (page, Page::Uncounted))),
        }
        Some(target)
    }

    /// The break after the call; the request is `step.destination`.
    fn set_break(&mut self, step: Step) -> u64 {
        let (before, wanted) = (self.program_break, step.destination);
        let refused = step.fails
            || !(BREAK_FLOOR - 4..=BREAK_CEILING).contains(&wanted)
            || !self.is_free(before..wanted);
        if refused || matches!(step.call, Call::AskBreak) {
            return before;
        }
        for page in wanted..before {
            self.pages.remove(&page);
        }
        if wanted > before {
            self.make(step, SiteKind::Mapping, before..wanted);
        }
        self.program_break = wanted;
        wanted
    }
}

fn stack(step: Step) -> StackId {
    StackId(100 + step.site)
}

/// A thread's call in flight.
#[derive(Debug, Clone)]
struct InFlight {
    step: Step,
    /// What it returned, in pages, once the kernel did it, and when.
    done: Option<(Option<u64>, u64)>,
    /// Pages that no sane thread touches meanwhile.
    reserved: BTreeSet<u64>,
}

struct Machine {
    kernel: Kernel,
    books: Mappings,
    threads: Vec<Option<InFlight>>,
}

impl Machine {
    fn new() -> Self {
        Self {
            kernel: Kernel::new(),
            books: Mappings::new(Some(BREAK_FLOOR * PAGE_BYTES)),
            threads: vec![None; THREADS],
        }
    }

    fn reserved(&self) -> BTreeSet<u64> {
        self.threads.iter().flatten().flat_map(|call| call.reserved.iter().copied()).collect()
    }

    /// The next thing that the thread does: begin a call, have the kernel do it, or return.
    fn advance(&mut self, step: Step) {
        self.kernel.now_ns += 1;
        match self.threads[step.thread].take() {
            None => self.begin(step),
            Some(call) if call.done.is_none() => self.execute(call),
            Some(call) => self.end(call),
        }
    }

    fn begin(&mut self, step: Step) {
        let length = step.length.max(1);
        let source = step.start..step.start + length;
        let destination = step.destination..step.destination + step.new_length;
        let reserved: BTreeSet<u64> = match step.call {
            Call::Map if step.length == 0 => return,
            Call::Map if !step.fixed => BTreeSet::new(),
            Call::Map | Call::Unmap => source.collect(),
            Call::Remap if step.new_length == 0 => return,
            Call::Remap if step.fixed => source.chain(destination).collect(),
            Call::Remap => source.collect(),
            Call::Break => (BREAK_FLOOR - 4..PAGES).collect(),
            Call::AskBreak => BTreeSet::new(),
        };
        if !reserved.is_disjoint(&self.reserved()) {
            return;
        }
        match step.call {
            Call::Unmap => {
                let range = (step.start, step.length);
                self.tell(step, MappingChange::Unmap, range, 0, self.kernel.now_ns);
            }
            Call::Remap => {
                let range = (step.start, step.length);
                self.tell(step, MappingChange::RemapBegin, range, 0, self.kernel.now_ns);
            }
            Call::Map | Call::Break | Call::AskBreak => {}
        }
        self.threads[step.thread] = Some(InFlight { step, done: None, reserved });
    }

    fn execute(&mut self, mut call: InFlight) {
        let step = call.step;
        let reserved = self.reserved();
        let result = match step.call {
            Call::Break | Call::AskBreak => Some(self.kernel.set_break(step)),
            _ if step.fails => None,
            Call::Map => self.kernel.map(step, &reserved),
            Call::Unmap if step.length == 0 => None,
            Call::Unmap => {
                for page in step.start..step.start + step.length {
                    self.kernel.pages.remove(&page);
                }
                Some(0)
            }
            Call::Remap => self.kernel.remap(step, &reserved),
        };
        match (step.call, result) {
            (Call::Map, Some(start)) => call.reserved.extend(start..start + step.length),
            (Call::Unmap, Some(_)) => call.reserved.clear(),
            (Call::Remap, Some(start)) => {
                // What it left is anybody's before the program is told.
                if step.plain && step.length > 0 {
                    call.reserved.clear();
                }
                call.reserved.extend(start..start + step.new_length);
            }
            _ => {}
        }
        call.done = Some((result, self.kernel.now_ns));
        self.threads[step.thread] = Some(call);
    }

    fn end(&mut self, call: InFlight) {
        let step = call.step;
        let Some((result, time_ns)) = call.done else {
            return;
        };
        let returned = result.map_or(-12, |page| (page * PAGE_BYTES) as i64);
        match (step.call, result) {
            (Call::Map, _) => {
                let range = (step.start, step.length);
                self.tell(step, MappingChange::Map, range, returned, time_ns);
            }
            (Call::Unmap, Some(_)) => {}
            (Call::Unmap, None) => {
                let range = (step.start, step.length);
                self.tell(step, MappingChange::UnmapFailed, range, returned, time_ns);
            }
            (Call::Remap, _) => {
                let range = (step.start, step.new_length);
                self.tell(step, MappingChange::RemapEnd, range, returned, time_ns);
            }
            (Call::Break, _) => {
                self.tell(step, MappingChange::Break, (step.destination, 0), returned, time_ns);
            }
            (Call::AskBreak, _) => {
                self.tell(step, MappingChange::Break, (0, 0), returned, time_ns);
            }
        }
    }

    fn tell(
        &mut self,
        step: Step,
        change: MappingChange,
        (start, length): (u64, u64),
        result: i64,
        time_ns: u64,
    ) {
        let flags = match step.call {
            Call::Map => {
                (if step.fixed { MAP_FIXED } else { 0 })
                    | (if step.plain { MAP_ANONYMOUS } else { 0 })
                    | (if step.stack_flag { MAP_STACK } else { 0 })
            }
            _ => {
                (if step.fixed { MREMAP_FIXED } else { 0 })
                    | (if step.plain { 0 } else { MREMAP_DONTUNMAP })
            }
        };
        let record = MappingRecord {
            head: RecordHead { kind: 2, tid: step.thread as u32, owner: Owner::new(1, 0), time_ns },
            change: change as u32,
            inside_allocator: step.inside_allocator.into(),
            address: start * PAGE_BYTES,
            // The kernel rounds up; the program need not.
            length_bytes: (length * PAGE_BYTES).saturating_sub(if length > 0 { 7 } else { 0 }),
            flags,
            result,
            stack: stack(step),
        };
        self.books.apply(&record).unwrap();
        check_sums(&self.books);
    }

    fn finish(&mut self) {
        for thread in 0..THREADS {
            while let Some(call) = self.threads[thread].take() {
                match call.done {
                    None => self.execute(call),
                    Some(_) => self.end(call),
                }
            }
        }
    }

    fn check(&self) {
        let mut pages = BTreeMap::new();
        for range in self.books.live() {
            for page in 0..range.length_bytes / PAGE_BYTES {
                let site = ((range.stack, range.kind), range.born_ns);
                let doubled = pages.insert(range.start / PAGE_BYTES + page, site);
                assert_eq!(doubled, None);
            }
        }
        let mut truth = BTreeMap::new();
        let mut pages_left = vec![0; self.kernel.made.len()];
        for (&at, &page) in &self.kernel.pages {
            if let Page::Made(call) = page {
                let (site, born_ns, _) = self.kernel.made[call];
                truth.insert(at, (site, born_ns));
                pages_left[call] += 1;
            }
        }
        assert_eq!(pages, truth);

        let mut counters: BTreeMap<Site, Counters> = BTreeMap::new();
        for (&(site, _, made), left) in self.kernel.made.iter().zip(pages_left) {
            let of = counters.entry(site).or_default();
            of.allocated_bytes += made * PAGE_BYTES;
            of.allocated_count += 1;
            of.live_bytes += left * PAGE_BYTES;
            of.live_count += u64::from(left > 0);
            of.freed_bytes += (made - left) * PAGE_BYTES;
            of.freed_count += u64::from(left == 0);
        }
        assert_eq!(self.books.counters(), counters);
        assert_eq!(self.books.losses(), MappingLosses::default());
        assert_eq!(self.books.program_break(), Some(self.kernel.program_break * PAGE_BYTES));
    }
}

/// What holds after every record, whatever it says.
fn check_sums(books: &Mappings) {
    let mut live: BTreeMap<Site, u128> = BTreeMap::new();
    for range in books.live() {
        assert_ne!(range.length_bytes, 0);
        *live.entry((range.stack, range.kind)).or_default() += u128::from(range.length_bytes);
    }
    for (site, of) in books.counters() {
        assert_eq!(of.live_bytes, of.allocated_bytes - of.freed_bytes);
        assert_eq!(of.live_count, of.allocated_count - of.freed_count);
        let sum = live.remove(&site).unwrap_or(0);
        assert_eq!(of.live_bytes, u64::try_from(sum).unwrap_or(u64::MAX));
        assert_eq!(of.live_count == 0, of.live_bytes == 0);
    }
    assert!(live.is_empty());
}

fn check_disjoint(books: &Mappings) {
    let mut end = 0;
    for piece in books.pieces.iter() {
        assert!(piece.span.start >= end);
        end = piece.span.end;
    }
    assert!(books.pieces.len() <= books.range_limit);
}

/// A number that is often small and aligned, and sometimes anything.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0u64..32).prop_map(|page| page * PAGE_BYTES),
        1 => any::<u64>(),
        1 => (0u64..40).prop_map(|page| (1 << 63) - page * PAGE_BYTES),
        1 => (0u32..64).prop_map(|shift| 1 << shift),
        1 => (0u64..32).prop_map(|offset| u64::MAX - offset),
    ]
}

fn nonsense() -> impl Strategy<Value = Vec<MappingRecord>> {
    let flag = |bit: u64| prop_oneof![Just(0u64), Just(bit)];
    let flags = (
        flag(MAP_ANONYMOUS),
        flag(MAP_FIXED),
        prop_oneof![9 => Just(0u64), 1 => any::<u64>()],
        // These are MREMAP_MAYMOVE, MREMAP_FIXED and MREMAP_DONTUNMAP.
        0u64..8,
    )
        .prop_map(|(anonymous, fixed, any, low)| anonymous | fixed | any | low);
    let record = (0u32..8, 0u32..4, address(), address(), flags, address(), 1u64..4, any::<u64>())
        .prop_map(|(change, tid, address, length_bytes, flags, result, stack, time_ns)| {
            MappingRecord {
                head: RecordHead { kind: 2, tid, owner: Owner(1), time_ns },
                change,
                inside_allocator: tid & 1,
                address,
                length_bytes,
                flags,
                result: result as i64,
                stack: StackId(stack),
            }
        });
    prop::collection::vec(record, 1..300)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_books_equal_the_kernels_pages_however_calls_interleave(steps in steps()) {
        let mut machine = Machine::new();
        for step in steps {
            machine.advance(step);
            if machine.threads.iter().all(Option::is_none) {
                machine.check();
            }
        }
        machine.finish();
        machine.check();
    }

    #[test]
    fn one_thread_alone_is_exact_after_every_call(steps in steps()) {
        let mut machine = Machine::new();
        for step in steps {
            machine.advance(Step { thread: 0, ..step });
            machine.finish();
            machine.check();
        }
    }

    #[test]
    fn records_that_make_no_sense_never_corrupt_the_books(
        records in nonsense(),
        range_limit in prop_oneof![Just(4usize), Just(MAX_RANGES)],
        initial_break in prop::option::of(address()),
    ) {
        let mut books = Mappings::with_range_limit(initial_break, range_limit);
        for record in records {
            // Refused or not, the books must hold.
            let _ = books.apply(&record);
            check_sums(&books);
            check_disjoint(&books);
        }
    }
}
