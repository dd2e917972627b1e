//! One test for each rule, on hand-written records.

use leakbpf_common::abi::{MappingChange, MappingRecord, Owner, RecordHead, StackId};

use super::*;

const ANON: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
const FILE: i32 = libc::MAP_PRIVATE;
const MAIN: u32 = 1;
const OTHER: u32 = 2;
const MAP_SITE: StackId = StackId(10);
const REMAP_SITE: StackId = StackId(20);
const BREAK_SITE: StackId = StackId(30);
const K: u64 = 4096;
const AT: u64 = 0x10_0000;

/// A program whose system calls are booked; the clock ticks once a record.
struct Program {
    books: Mappings,
    now_ns: u64,
    inside_allocator: u32,
}

impl Program {
    fn new(initial_break: Option<u64>) -> Self {
        Self { books: Mappings::new(initial_break), now_ns: 0, inside_allocator: 0 }
    }

    fn tell(
        &mut self,
        tid: u32,
        change: MappingChange,
        (address, length_bytes): (u64, u64),
        flags: i32,
        result: i64,
    ) -> Result<(), RecordError> {
        self.now_ns += 1;
        let stack = match change {
            MappingChange::Map => MAP_SITE,
            MappingChange::Break => BREAK_SITE,
            _ => REMAP_SITE,
        };
        self.books.apply(&MappingRecord {
            head: RecordHead { kind: 2, tid, owner: Owner::new(MAIN, 0), time_ns: self.now_ns },
            change: change as u32,
            inside_allocator: self.inside_allocator,
            address,
            length_bytes,
            flags: flags as u32 as u64,
            result,
            stack,
        })
    }

    fn map(&mut self, at: u64, length_bytes: u64, flags: i32) {
        self.tell(MAIN, MappingChange::Map, (0, length_bytes), flags, at as i64).unwrap();
    }

    fn unmap(&mut self, at: u64, length_bytes: u64) {
        self.tell(MAIN, MappingChange::Unmap, (at, length_bytes), 0, 0).unwrap();
    }

    fn remap(&mut self, (at, old): (u64, u64), (result, new): (i64, u64), flags: i32) {
        self.tell(MAIN, MappingChange::RemapBegin, (at, old), flags, 0).unwrap();
        self.tell(MAIN, MappingChange::RemapEnd, (at, new), flags, result).unwrap();
    }

    fn set_break(&mut self, requested: u64, result: u64) {
        self.tell(MAIN, MappingChange::Break, (requested, 0), 0, result as i64).unwrap();
    }

    /// Start, bytes, site and birth of what is live, in order of address.
    fn live(&self) -> Vec<(u64, u64, StackId, u64)> {
        let live = self.books.live();
        let mut live: Vec<_> = live
            .map(|range| (range.start, range.length_bytes, range.stack, range.born_ns))
            .collect();
        live.sort_unstable();
        live
    }

    fn kinds(&self) -> Vec<SiteKind> {
        self.books.live().map(|range| range.kind).collect()
    }

    /// Allocated, freed and live: (bytes, count) each, of one site.
    fn counters(&self, stack: StackId) -> [(u64, u64); 3] {
        let counters = self.books.counters();
        let of = counters.get(&(stack, SiteKind::Mapping)).copied().unwrap_or_default();
        [
            (of.allocated_bytes, of.allocated_count),
            (of.freed_bytes, of.freed_count),
            (of.live_bytes, of.live_count),
        ]
    }
}

#[test]
fn only_anonymous_mappings_count_and_in_whole_pages() {
    let mut program = Program::new(None);
    program.map(AT, 1, ANON);
    program.map(AT + 16 * K, 8 * K, FILE);
    assert_eq!(program.live(), [(AT, K, MAP_SITE, 1)]);
}

#[test]
fn a_failed_mmap_counts_nothing() {
    let mut program = Program::new(None);
    let failed = program.tell(MAIN, MappingChange::Map, (0, K), ANON, -12);
    assert_eq!(failed, Ok(()));
    assert!(program.books.counters().is_empty());
}

#[test]
fn huge_pages_are_rounded_to_their_size() {
    let mut program = Program::new(None);
    let huge = ANON | libc::MAP_HUGETLB;
    program.map(1 << 30, 1, huge);
    program.map(2 << 30, 1, huge | libc::MAP_HUGE_1GB);
    program.map(4 << 30, (16 << 20) + 1, huge | libc::MAP_HUGE_16MB);
    let lengths: Vec<u64> = program.live().iter().map(|range| range.1).collect();
    assert_eq!(lengths, [2 << 20, 1 << 30, 32 << 20]);
}

#[test]
fn huge_pages_shrink_by_whole_huge_pages() {
    let mut program = Program::new(None);
    program.map(1 << 30, 8 << 20, ANON | libc::MAP_HUGETLB);
    program.remap((1 << 30, 8 << 20), (1 << 30, 3 << 20), 0);
    assert_eq!(program.live(), [(1 << 30, 4 << 20, MAP_SITE, 1)]);
}

#[test]
fn an_allocators_mapping_is_never_the_programs_own() {
    let mut program = Program::new(Some(0x5000));
    program.inside_allocator = 1;
    program.map(AT, K, ANON | libc::MAP_STACK);
    program.set_break(0x7000, 0x7000);
    program.remap((AT, K), (AT as i64, 2 * K), 0);
    assert_eq!(program.kinds(), [SiteKind::AllocatorMapping; 3]);
}

#[test]
fn a_thread_stack_is_told_by_its_flag() {
    let mut program = Program::new(None);
    program.map(AT, 8 << 20, ANON | libc::MAP_STACK);
    assert_eq!(program.kinds(), [SiteKind::ThreadStack]);
}

#[test]
fn unmapping_the_middle_leaves_one_mapping_in_two_pieces() {
    let mut program = Program::new(None);
    program.map(AT, 4 * K, ANON);
    program.unmap(AT + K, 2 * K);
    assert_eq!(program.live(), [(AT, K, MAP_SITE, 1), (AT + 3 * K, K, MAP_SITE, 1)]);
    assert_eq!(program.counters(MAP_SITE), [(4 * K, 1), (2 * K, 0), (2 * K, 1)]);
    program.unmap(AT, 4 * K);
    assert_eq!(program.counters(MAP_SITE), [(4 * K, 1), (4 * K, 1), (0, 0)]);
}

#[test]
fn one_munmap_frees_several_mappings_and_unknown_gaps() {
    let mut program = Program::new(None);
    program.map(AT, 2 * K, ANON);
    program.map(AT + 4 * K, 2 * K, ANON);
    program.unmap(AT - 8 * K, 13 * K);
    assert_eq!(program.live(), [(AT + 5 * K, K, MAP_SITE, 2)]);
    assert_eq!(program.counters(MAP_SITE)[1], (3 * K, 1));
}

#[test]
fn a_failed_munmap_gives_everything_back_with_its_birth_and_site() {
    let mut program = Program::new(None);
    program.map(AT, 4 * K, ANON);
    let before = program.counters(MAP_SITE);
    program.unmap(AT, 2 * K);
    program.tell(OTHER, MappingChange::Map, (0, K), ANON, (AT + 9 * K) as i64).unwrap();
    program.tell(MAIN, MappingChange::UnmapFailed, (AT, 2 * K), 0, -12).unwrap();
    program.tell(OTHER, MappingChange::Unmap, (AT + 9 * K, K), 0, 0).unwrap();
    let bytes: u64 = program.live().iter().map(|range| range.1).sum();
    assert_eq!(bytes, 4 * K);
    assert!(program.live().iter().all(|range| (range.2, range.3) == (MAP_SITE, 1)));
    assert_eq!(program.counters(MAP_SITE)[2], before[2]);
}

#[test]
fn a_munmap_that_the_kernel_refuses_frees_nothing() {
    let mut program = Program::new(None);
    program.map(AT, 4 * K, ANON);
    program.unmap(AT + 1, K);
    program.unmap(AT, 0);
    program.unmap(AT, u64::MAX);
    assert_eq!(program.counters(MAP_SITE)[1], (0, 0));
}

#[test]
fn map_fixed_replaces_even_by_a_file() {
    let mut program = Program::new(None);
    program.map(AT, 4 * K, ANON);
    program.map(AT, K, ANON | libc::MAP_FIXED);
    program.map(AT + 2 * K, K, FILE | libc::MAP_FIXED);
    assert_eq!(
        program.live(),
        [(AT, K, MAP_SITE, 2), (AT + K, K, MAP_SITE, 1), (AT + 3 * K, K, MAP_SITE, 1)]
    );
    assert_eq!(program.books.losses(), MappingLosses::default());
}

#[test]
fn a_mapping_where_something_is_recorded_reveals_a_missed_release() {
    for flags in [FILE, ANON, ANON | libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE] {
        let mut program = Program::new(None);
        program.map(AT, 4 * K, ANON);
        program.map(AT + K, K, flags);
        assert_eq!(program.books.losses().frees_missed, 1);
        assert_eq!(program.counters(MAP_SITE)[1], (K, 0));
    }
}

#[test]
fn growth_belongs_to_mremap_and_the_rest_stays_whose_it_was() {
    let mut program = Program::new(None);
    program.map(AT, 2 * K, ANON);
    program.remap((AT, 2 * K), ((AT + 64 * K) as i64, 5 * K), libc::MREMAP_MAYMOVE);
    assert_eq!(
        program.live(),
        [(AT + 64 * K, 2 * K, MAP_SITE, 1), (AT + 66 * K, 3 * K, REMAP_SITE, 3)]
    );
    assert_eq!(program.counters(MAP_SITE), [(2 * K, 1), (0, 0), (2 * K, 1)]);
    assert_eq!(program.counters(REMAP_SITE), [(3 * K, 1), (0, 0), (3 * K, 1)]);
}

#[test]
fn growing_in_place_adds_only_the_tail() {
    let mut program = Program::new(None);
    program.map(AT, 2 * K, ANON);
    program.remap((AT, 2 * K), (AT as i64, 3 * K), 0);
    assert_eq!(program.live(), [(AT, 2 * K, MAP_SITE, 1), (AT + 2 * K, K, REMAP_SITE, 3)]);
}

#[test]
fn shrinking_frees_the_tail() {
    let mut program = Program::new(None);
    program.map(AT, 4 * K, ANON);
    program.remap((AT, 4 * K), (AT as i64, K), 0);
    assert_eq!(program.live(), [(AT, K, MAP_SITE, 1)]);
    assert_eq!(program.counters(MAP_SITE), [(4 * K, 1), (3 * K, 0), (K, 1)]);
}

#[test]
fn a_failed_mremap_changes_nothing() {
    let mut program = Program::new(None);
    program.map(AT, 4 * K, ANON);
    let before = (program.live(), program.counters(MAP_SITE));
    program.tell(MAIN, MappingChange::RemapBegin, (AT, 4 * K), 0, 0).unwrap();
    assert_eq!((program.live(), program.counters(MAP_SITE)), before);
    program.tell(MAIN, MappingChange::RemapEnd, (AT, 8 * K), 0, -12).unwrap();
    assert_eq!((program.live(), program.counters(MAP_SITE)), before);
}

#[test]
fn mremap_fixed_replaces_its_destination() {
    let mut program = Program::new(None);
    program.map(AT, K, ANON);
    program.map(AT + 8 * K, 2 * K, ANON);
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    program.remap((AT, K), ((AT + 8 * K) as i64, K), flags);
    assert_eq!(program.live(), [(AT + 8 * K, K, MAP_SITE, 1), (AT + 9 * K, K, MAP_SITE, 2)]);
    assert_eq!(program.books.losses().frees_missed, 0);
}

#[test]
fn mremap_dontunmap_keeps_the_old_range_and_adds_the_new_one() {
    let mut program = Program::new(None);
    program.map(AT, 2 * K, ANON);
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
    program.remap((AT, 2 * K), ((AT + 8 * K) as i64, 2 * K), flags);
    assert_eq!(program.live(), [(AT, 2 * K, MAP_SITE, 1), (AT + 8 * K, 2 * K, REMAP_SITE, 3)]);
}

#[test]
fn an_old_length_of_zero_duplicates_a_shared_mapping() {
    let mut program = Program::new(None);
    program.map(AT, 2 * K, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    program.remap((AT, 0), ((AT + 8 * K) as i64, 2 * K), libc::MREMAP_MAYMOVE);
    assert_eq!(program.live(), [(AT, 2 * K, MAP_SITE, 1), (AT + 8 * K, 2 * K, REMAP_SITE, 3)]);
}

#[test]
fn remapping_what_is_no_known_anonymous_mapping_counts_nothing() {
    let mut program = Program::new(None);
    program.map(AT, 2 * K, FILE);
    program.remap((AT, 2 * K), ((AT + 8 * K) as i64, 4 * K), libc::MREMAP_MAYMOVE);
    program.remap((AT, 0), ((AT + 16 * K) as i64, 4 * K), libc::MREMAP_MAYMOVE);
    assert_eq!(program.live(), []);
}

#[test]
fn an_address_that_mremap_left_can_be_mapped_before_mremap_is_told() {
    let mut program = Program::new(None);
    program.map(AT, 2 * K, ANON);
    let flags = libc::MREMAP_MAYMOVE;
    program.tell(MAIN, MappingChange::RemapBegin, (AT, 2 * K), flags, 0).unwrap();
    program.tell(OTHER, MappingChange::Map, (0, K), ANON, AT as i64).unwrap();
    let moved_to = (AT + 8 * K) as i64;
    program.tell(MAIN, MappingChange::RemapEnd, (AT, 2 * K), flags, moved_to).unwrap();
    assert_eq!(program.live(), [(AT, K, MAP_SITE, 3), (AT + 8 * K, 2 * K, MAP_SITE, 1)]);
    assert_eq!(program.books.losses().frees_missed, 0);
}

#[test]
fn an_mremap_whose_end_was_dropped_keeps_its_memory_where_it_was() {
    let mut program = Program::new(None);
    program.map(AT, 2 * K, ANON);
    program.tell(MAIN, MappingChange::RemapBegin, (AT, 2 * K), 0, 0).unwrap();
    program.map(AT + 8 * K, K, ANON);
    assert_eq!(program.live(), [(AT, 2 * K, MAP_SITE, 1), (AT + 8 * K, K, MAP_SITE, 3)]);
}

#[test]
fn an_mremap_whose_beginning_is_missing_is_reported() {
    let mut program = Program::new(None);
    let end = program.tell(MAIN, MappingChange::RemapEnd, (AT, K), 0, (AT + 8 * K) as i64);
    assert_eq!(end, Err(RecordError::RemapWithoutBegin { tid: MAIN }));
    assert_eq!(program.live(), []);
}

#[test]
fn the_first_brk_only_tells_where_an_unknown_break_is() {
    let mut program = Program::new(None);
    program.set_break(0, 0x5800);
    assert_eq!(program.books.program_break(), Some(0x5800));
    assert_eq!(program.live(), []);
    program.set_break(0x8001, 0x8001);
    assert_eq!(program.live(), [(0x6000, 0x3000, BREAK_SITE, 2)]);
}

#[test]
fn a_shrinking_break_frees_from_the_top() {
    let mut program = Program::new(Some(0x5000));
    program.set_break(0x7000, 0x7000);
    program.set_break(0x9000, 0x9000);
    program.set_break(0x6000, 0x6000);
    assert_eq!(program.live(), [(0x5000, 0x1000, BREAK_SITE, 1)]);
    assert_eq!(program.counters(BREAK_SITE), [(0x4000, 2), (0x3000, 1), (0x1000, 1)]);
}

#[test]
fn a_break_below_the_first_known_one_frees_nothing_but_what_comes_back_counts() {
    let mut program = Program::new(Some(0x9000));
    program.set_break(0x5000, 0x5000);
    assert!(program.books.counters().is_empty());
    program.set_break(0x6000, 0x6000);
    assert_eq!(program.live(), [(0x5000, 0x1000, BREAK_SITE, 2)]);
}

#[test]
fn a_refused_or_merely_asking_brk_changes_nothing() {
    let mut program = Program::new(Some(0x5000));
    program.set_break(0x8000, 0x8000);
    program.set_break(1 << 40, 0x8000);
    program.set_break(0, 0x5000);
    assert_eq!(program.live(), [(0x5000, 0x3000, BREAK_SITE, 1)]);
}

#[test]
fn impossible_records_are_refused_and_leave_the_books_as_they_were() {
    let mut program = Program::new(None);
    program.map(AT, 2 * K, ANON);
    let before = program.live();
    let impossible = [
        (MappingChange::Map, (0, 0), ANON, AT as i64),
        (MappingChange::Map, (0, K), ANON, AT as i64 + 1),
        (MappingChange::Map, (0, K), ANON, i64::MIN),
        (MappingChange::Map, (0, u64::MAX), ANON, AT as i64),
        (MappingChange::Map, (0, i64::MAX as u64), ANON, AT as i64),
        (MappingChange::Map, (0, K), ANON | libc::MAP_HUGETLB | 63 << 26, AT as i64),
        (MappingChange::Break, (0, 0), 0, -1),
    ];
    for (change, range, flags, result) in impossible {
        let refused = program.tell(MAIN, change, range, flags, result);
        assert!(matches!(refused, Err(RecordError::Impossible { .. })), "{refused:?}");
    }
    assert_eq!(program.live(), before);
    for (length_bytes, result) in [(0, AT), (u64::MAX, AT), (K, AT + 1)] {
        program.tell(MAIN, MappingChange::RemapBegin, (AT, 2 * K), 0, 0).unwrap();
        let refused =
            program.tell(MAIN, MappingChange::RemapEnd, (AT, length_bytes), 0, result as i64);
        assert!(matches!(refused, Err(RecordError::Impossible { .. })), "{refused:?}");
        assert_eq!(program.live(), before);
    }
    let unknown = MappingRecord { change: 99, ..Default::default() };
    assert_eq!(program.books.apply(&unknown), Err(RecordError::UnknownChange(99)));
}

#[test]
fn more_ranges_than_the_limit_are_counted_as_lost() {
    let mut program = Program::new(None);
    program.books = Mappings::with_range_limit(None, 2);
    program.map(AT, 4 * K, ANON);
    program.map(AT + 8 * K, K, ANON);
    program.map(AT + 16 * K, K, ANON);
    assert_eq!(program.books.losses().ranges_full, 1);
    program.unmap(AT + K, K);
    assert_eq!(program.books.losses().ranges_full, 2);
    assert_eq!(program.live(), [(AT, K, MAP_SITE, 1), (AT + 8 * K, K, MAP_SITE, 2)]);
    assert_eq!(program.counters(MAP_SITE)[2], (2 * K, 2));
}

#[test]
fn threads_that_ended_after_munmap_do_not_pile_up() {
    let mut program = Program::new(None);
    program.books = Mappings::with_range_limit(None, 64);
    for tid in 0..10_000 {
        program.tell(tid, MappingChange::Map, (0, K), ANON, AT as i64).unwrap();
        program.tell(tid, MappingChange::Unmap, (AT, K), 0, 0).unwrap();
    }
    // The oldest was pushed out and can no longer be given back; the newest can.
    program.tell(0, MappingChange::UnmapFailed, (AT, K), 0, -12).unwrap();
    assert_eq!(program.live(), []);
    program.tell(9_999, MappingChange::UnmapFailed, (AT, K), 0, -12).unwrap();
    assert_eq!(program.live().len(), 1);
}

#[test]
fn live_stays_exact_when_the_history_exceeds_64_bits() {
    let mut program = Program::new(None);
    let span = (1 << 62, 1 << 62);
    for _ in 0..5 {
        program.map(span.0, span.1, ANON);
        program.unmap(span.0, span.1);
    }
    program.map(AT, K, ANON);
    assert_eq!(program.counters(MAP_SITE), [(u64::MAX, 6), (u64::MAX - K, 5), (K, 1)]);
}
