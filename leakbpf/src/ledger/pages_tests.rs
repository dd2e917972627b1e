use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const A: StackId = StackId(10);
const B: StackId = StackId(20);

const ANONYMOUS: Found =
    Found { present: true, swapped: false, file: false, zero: false, huge: false };
const FILE: Found = Found { file: true, ..ANONYMOUS };
const ZERO: Found = Found { zero: true, ..ANONYMOUS };
const HUGE: Found = Found { huge: true, ..ANONYMOUS };
const SWAPPED: Found = Found { present: false, swapped: true, ..ANONYMOUS };

fn touch(pages: &mut Pages, page: u64, stack: StackId, born_ns: u64) {
    pages.touch(page * PAGE_BYTES + 8, stack, born_ns);
}

fn run(pages: Range<u64>, found: Found) -> Run {
    Run { pages, found }
}

/// Looks at pages of which the page tables say this.
fn look(pages: &mut Pages, all: bool, tables: &[Run]) {
    let scan = |range: Range<u64>, _: &[u64]| {
        let inside = tables.iter().filter_map(|run| {
            let pages = run.pages.start.max(range.start)..run.pages.end.min(range.end);
            (pages.start < pages.end).then_some(Run { pages, found: run.found })
        });
        Ok::<_, ()>(inside.collect())
    };
    pages.look(all, scan).expect("readable");
}

fn resident(pages: &Pages, stack: StackId) -> (u64, u64) {
    let of_stack = pages.live().filter(|page| page.stack == stack);
    of_stack.fold((0, 0), |(bytes, count), page| (bytes + page.length_bytes, count + 1))
}

fn counters(pages: &Pages, stack: StackId) -> Counters {
    pages.counters().get(&stack).copied().unwrap_or_default()
}

#[test]
fn a_touched_page_counts_once_it_is_found_to_be_memory() {
    let mut pages = Pages::default();
    touch(&mut pages, 5, A, 1);
    assert_eq!(resident(&pages, A), (0, 0));
    look(&mut pages, false, &[run(0..10, ANONYMOUS)]);
    assert_eq!(resident(&pages, A), (4096, 1));
    let page = pages.live().next().expect("one");
    assert_eq!((page.address, page.born_ns), (5 * 4096, 1));
    look(&mut pages, true, &[run(0..10, ANONYMOUS)]);
    assert_eq!(counters(&pages, A).allocated_count, 1, "counted once");
}

#[test]
fn pages_of_files_and_pages_that_were_only_read_do_not_count() {
    let mut pages = Pages::default();
    touch(&mut pages, 1, A, 1);
    touch(&mut pages, 2, A, 1);
    look(&mut pages, false, &[run(1..2, FILE), run(2..3, ZERO)]);
    assert!(pages.is_empty());
    assert_eq!(counters(&pages, A), Counters::default());
    // The write is a fault of its own.
    touch(&mut pages, 2, B, 2);
    look(&mut pages, false, &[run(2..3, ANONYMOUS)]);
    assert_eq!(resident(&pages, B), (4096, 1));
}

#[test]
fn what_was_given_back_is_released() {
    let mut pages = Pages::default();
    (0..4).for_each(|page| touch(&mut pages, page, A, page));
    look(&mut pages, false, &[run(0..4, ANONYMOUS)]);
    look(&mut pages, true, &[run(0..1, ANONYMOUS), run(3..4, ANONYMOUS)]);
    let sum = counters(&pages, A);
    assert_eq!((sum.live_count, sum.allocated_count, sum.freed_count), (2, 4, 2));
    assert_eq!((sum.live_bytes, sum.freed_bytes), (8192, 8192));
}

#[test]
fn a_page_that_comes_back_belongs_to_who_touched_it_then() {
    let mut pages = Pages::default();
    touch(&mut pages, 9, A, 1);
    look(&mut pages, false, &[run(9..10, ANONYMOUS)]);
    // It was given back and touched again between two looks.
    touch(&mut pages, 9, B, 2);
    look(&mut pages, true, &[run(9..10, ANONYMOUS)]);
    assert_eq!((resident(&pages, A), resident(&pages, B)), ((0, 0), (4096, 1)));
    assert_eq!((counters(&pages, A).freed_count, pages.len()), (1, 1));
}

#[test]
fn pages_that_come_and_go_between_two_looks_were_touched() {
    let mut pages = Pages::default();
    (0..5).for_each(|time| touch(&mut pages, 9, A, time));
    look(&mut pages, true, &[run(9..10, ANONYMOUS)]);
    let sum = counters(&pages, A);
    assert_eq!((sum.live_count, sum.allocated_count, sum.freed_count), (1, 5, 4));
}

#[test]
fn a_fault_that_takes_its_time_is_waited_for_once() {
    let mut pages = Pages::default();
    touch(&mut pages, 1, A, 1);
    touch(&mut pages, 2, A, 1);
    look(&mut pages, false, &[]);
    assert_eq!((pages.len(), counters(&pages, A).allocated_count), (2, 0));
    look(&mut pages, true, &[run(2..3, ANONYMOUS)]);
    assert_eq!(resident(&pages, A), (4096, 1));
    let sum = counters(&pages, A);
    assert_eq!(
        (pages.len(), sum.allocated_count, sum.freed_count),
        (1, 2, 1),
        "given back at once"
    );
}

#[test]
fn what_is_swapped_out_is_not_resident_and_not_forgotten() {
    let mut pages = Pages::default();
    touch(&mut pages, 1, A, 1);
    look(&mut pages, false, &[run(1..2, ANONYMOUS)]);
    look(&mut pages, true, &[run(1..2, SWAPPED)]);
    assert_eq!((resident(&pages, A), pages.len()), ((0, 0), 1));
    assert_eq!(counters(&pages, A).freed_count, 1);
    look(&mut pages, true, &[run(1..2, ANONYMOUS)]);
    assert_eq!((resident(&pages, A), counters(&pages, A).freed_count), ((4096, 1), 0));
}

#[test]
fn a_huge_page_weighs_what_of_it_is_there() {
    let mut pages = Pages::default();
    touch(&mut pages, 512 + 7, A, 1);
    look(&mut pages, false, &[run(512..1024, HUGE)]);
    assert_eq!(resident(&pages, A), (2 << 20, 1));
    assert_eq!(pages.live().next().expect("one").address, 512 * 4096);
    // A part of it is given back: the rest is small pages.
    look(&mut pages, true, &[run(600..1024, ANONYMOUS)]);
    assert_eq!(resident(&pages, A), (424 * 4096, 1));
    look(&mut pages, true, &[]);
    assert_eq!((resident(&pages, A), pages.len()), ((0, 0), 0));
    assert_eq!(counters(&pages, A).freed_bytes, 2 << 20);
}

#[test]
fn what_comes_back_into_a_huge_page_belongs_to_who_touched_it_then() {
    let mut pages = Pages::default();
    touch(&mut pages, 512 + 7, A, 1);
    look(&mut pages, false, &[run(512..1024, HUGE)]);
    look(&mut pages, true, &[run(512..600, ANONYMOUS)]);
    touch(&mut pages, 700, B, 2);
    // Touched, too, but not chosen.
    look(&mut pages, true, &[run(512..600, ANONYMOUS), run(700..720, ANONYMOUS)]);
    assert_eq!((resident(&pages, A), resident(&pages, B)), ((88 * 4096, 1), (4096, 1)));
    look(&mut pages, true, &[run(700..720, ANONYMOUS)]);
    look(&mut pages, true, &[run(512..1024, ANONYMOUS)]);
    assert_eq!(resident(&pages, A).0, 19 * 4096, "it never grows");
}

#[test]
fn what_was_given_back_and_touched_again_before_anybody_looked_counts_once() {
    let mut pages = Pages::default();
    touch(&mut pages, 512, A, 1);
    look(&mut pages, false, &[run(512..1024, HUGE)]);
    (600..1024).for_each(|page| touch(&mut pages, page, B, 2));
    look(&mut pages, true, &[run(512..1024, ANONYMOUS)]);
    assert_eq!(resident(&pages, A), (88 * 4096, 1));
    assert_eq!(resident(&pages, B), (424 * 4096, 424));
    look(&mut pages, true, &[run(600..1024, ANONYMOUS)]);
    assert_eq!((resident(&pages, A), pages.len()), ((0, 0), 424));
}

#[test]
fn a_huge_page_is_seen_whole_behind_a_small_page_of_its_place() {
    let mut pages = Pages::default();
    touch(&mut pages, 4096 + 300, A, 1);
    look(&mut pages, false, &[run(4096..4608, HUGE)]);
    touch(&mut pages, 4096 + 200, B, 2);
    look(&mut pages, true, &[run(4096..4608, ANONYMOUS)]);
    assert_eq!((resident(&pages, A), resident(&pages, B)), ((511 * 4096, 1), (4096, 1)));
}

#[test]
fn ranges_of_huge_pages_are_bounded() {
    let mut pages = Pages::default();
    let huge: Vec<u64> = (1..40).map(|index| 512 * index).collect();
    huge.iter().for_each(|page| touch(&mut pages, page + 400, A, 1));
    look(&mut pages, false, &[run(512..512 * 40, HUGE)]);
    huge.iter().for_each(|page| touch(&mut pages, page + 300, B, 2));
    let result: Result<(), ()> = pages.look(true, |range, _| {
        assert!(range.end - range.start <= SPAN_PAGES, "{range:?}");
        Ok(vec![run(range, ANONYMOUS)])
    });
    assert_eq!(result, Ok(()));
    assert_eq!(resident(&pages, A), (39 * 511 * 4096, 39));
}

#[test]
fn the_first_page_of_a_huge_one_may_be_touched_again_without_the_rest() {
    let mut pages = Pages::default();
    touch(&mut pages, 512, A, 1);
    look(&mut pages, false, &[run(512..1024, HUGE)]);
    // As after a fork.
    for page in [512, 513, 1023, 512] {
        touch(&mut pages, page, B, 2);
        look(&mut pages, false, &[run(512..1024, ANONYMOUS)]);
    }
    look(&mut pages, true, &[run(512..1024, ANONYMOUS)]);
    assert_eq!((resident(&pages, A), resident(&pages, B)), ((509 * 4096, 1), (3 * 4096, 3)));
    assert_eq!(counters(&pages, A).allocated_bytes, 2 << 20, "counted once");
    touch(&mut pages, 512, B, 3);
    look(&mut pages, true, &[run(512..1024, HUGE)]);
    assert_eq!((resident(&pages, A), resident(&pages, B)), ((0, 0), (2 << 20, 1)));
    (512..1024).for_each(|page| touch(&mut pages, page, A, 4));
    look(&mut pages, true, &[run(512..1024, ANONYMOUS)]);
    assert_eq!((resident(&pages, A), pages.len()), ((2 << 20, 512), 512));
}

#[test]
fn what_of_a_huge_page_is_swapped_out_may_come_back() {
    let mut pages = Pages::default();
    touch(&mut pages, 512, A, 1);
    look(&mut pages, false, &[run(512..1024, HUGE)]);
    look(&mut pages, true, &[run(512..612, ANONYMOUS), run(612..712, SWAPPED)]);
    assert_eq!(resident(&pages, A), (100 * 4096, 1));
    look(&mut pages, true, &[run(512..1024, ANONYMOUS)]);
    assert_eq!(resident(&pages, A), (200 * 4096, 1));
}

#[test]
fn a_huge_page_ends_all_that_was_in_its_place() {
    let mut pages = Pages::default();
    touch(&mut pages, 512, A, 1);
    touch(&mut pages, 700, A, 1);
    touch(&mut pages, 1024, A, 1);
    look(&mut pages, false, &[run(512..1025, ANONYMOUS)]);
    touch(&mut pages, 800, B, 2);
    look(&mut pages, false, &[run(512..1024, HUGE), run(1024..1025, ANONYMOUS)]);
    assert_eq!((resident(&pages, A), resident(&pages, B)), ((4096, 1), (2 << 20, 1)));
}

#[test]
fn two_threads_at_one_huge_page_brought_it_once() {
    let mut pages = Pages::default();
    touch(&mut pages, 512, B, 2);
    touch(&mut pages, 513, A, 1);
    look(&mut pages, false, &[run(512..1024, HUGE)]);
    assert_eq!((resident(&pages, A), resident(&pages, B)), ((2 << 20, 1), (0, 0)));
}

#[test]
fn small_pages_stay_small_when_the_kernel_puts_them_together() {
    let mut pages = Pages::default();
    touch(&mut pages, 512, A, 1);
    look(&mut pages, false, &[run(512..513, ANONYMOUS)]);
    look(&mut pages, true, &[run(512..1024, HUGE)]);
    assert_eq!(resident(&pages, A), (4096, 1));
    // Before anybody has looked.
    (0..30).for_each(|index| touch(&mut pages, 1024 + 16 * index, B, index));
    look(&mut pages, false, &[run(1024..1536, HUGE)]);
    assert_eq!(resident(&pages, B), (30 * 4096, 30));
}

#[test]
fn a_failed_look_leaves_the_rest_for_the_next() {
    let mut pages = Pages::default();
    touch(&mut pages, 1, A, 1);
    touch(&mut pages, 10_000, A, 1);
    let mut calls = 0;
    let result = pages.look(false, |range, _| {
        calls += 1;
        if calls == 1 { Ok(vec![run(range, ANONYMOUS)]) } else { Err("gone") }
    });
    assert_eq!((result, resident(&pages, A)), (Err("gone"), (4096, 1)));
    assert!(pages.has_fresh());
    look(&mut pages, false, &[run(10_000..10_001, ANONYMOUS)]);
    assert_eq!(resident(&pages, A), (8192, 2));
    assert!(!pages.has_fresh());
}

#[test]
fn at_the_end_what_could_not_be_looked_at_is_taken_for_memory_unless_it_is_a_files() {
    let mut pages = Pages::default();
    touch(&mut pages, 1, A, 1);
    touch(&mut pages, 2, A, 1);
    look(&mut pages, false, &[run(2..3, ANONYMOUS)]);
    touch(&mut pages, 3, A, 1);
    touch(&mut pages, 4, A, 1);
    pages.end(|address| address == 3 * PAGE_BYTES);
    assert_eq!(resident(&pages, A), (2 * 4096, 2));
    assert_eq!(pages.len(), 2);
}

#[test]
fn ranges_are_bounded_and_cover_every_page() {
    let mut pages = Pages::default();
    let touched: Vec<u64> =
        (0..2000u64).map(|index| index * 16 + index / 100 * 5000 + 1_000_000).collect();
    touched.iter().for_each(|page| touch(&mut pages, *page, A, 1));
    let mut seen = BTreeSet::new();
    let mut calls = 0;
    let result: Result<(), ()> = pages.look(false, |range, _| {
        calls += 1;
        assert!(range.end - range.start <= SPAN_PAGES, "{range:?}");
        seen.extend(range.clone());
        Ok(vec![run(range, ANONYMOUS)])
    });
    assert_eq!(result, Ok(()));
    assert!(touched.iter().all(|page| seen.contains(page)));
    assert_eq!(pages.live().count(), touched.len());
    assert!(calls < 60, "{calls} calls");
}

#[test]
fn only_of_new_touches_is_asked_whether_they_are_huge() {
    let mut pages = Pages::default();
    let asked = |pages: &mut Pages, all| {
        let mut asked = Vec::new();
        let result: Result<(), ()> = pages.look(all, |range, unsettled| {
            asked.extend_from_slice(unsettled);
            // One is late.
            Ok(vec![run(range.start..7, ANONYMOUS), run(8..range.end, ANONYMOUS)])
        });
        assert_eq!(result, Ok(()));
        asked
    };
    [9, 5, 7].into_iter().for_each(|page| touch(&mut pages, page, A, 1));
    assert_eq!(asked(&mut pages, false), [5, 7, 9]);
    touch(&mut pages, 12, A, 2);
    assert_eq!(asked(&mut pages, true), [7, 12]);
    assert!(asked(&mut pages, true).is_empty());
}

/// A small address space, and what a program does in it.
#[derive(Debug, Clone)]
enum Step {
    Touch(u64, u64),
    Read(u64),
    GiveBack(Range<u64>),
    Look(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let page = 0..300u64;
    let step = prop_oneof![
        4 => (page.clone(), 1..4u64).prop_map(|(page, stack)| Step::Touch(page, stack)),
        1 => page.clone().prop_map(Step::Read),
        1 => (page, 1..80u64).prop_map(|(start, count)| Step::GiveBack(start..start + count)),
        1 => any::<bool>().prop_map(Step::Look),
    ];
    proptest::collection::vec(step, 0..120)
}

proptest! {
    #[test]
    fn after_a_look_at_all_the_books_hold_what_is_resident(steps in steps()) {
        let mut pages = Pages::default();
        // Page: None when it was only read.
        let mut truth: BTreeMap<u64, Option<StackId>> = BTreeMap::new();
        let tables = |truth: &BTreeMap<u64, Option<StackId>>| -> Vec<Run> {
            let found = |stack: &Option<StackId>| if stack.is_some() { ANONYMOUS } else { ZERO };
            truth.iter().map(|(page, stack)| run(*page..page + 1, found(stack))).collect()
        };
        for (time, step) in (1..).zip(&steps) {
            match step {
                // No fault, and so no record, where it is there already.
                Step::Touch(page, _) if truth.get(page).is_some_and(Option::is_some) => {}
                Step::Touch(page, stack) => {
                    truth.insert(*page, Some(StackId(*stack)));
                    touch(&mut pages, *page, StackId(*stack), time);
                }
                Step::Read(page) if truth.contains_key(page) => {}
                Step::Read(page) => {
                    truth.insert(*page, None);
                    touch(&mut pages, *page, StackId(9), time);
                }
                Step::GiveBack(range) => truth.retain(|page, _| !range.contains(page)),
                Step::Look(all) => look(&mut pages, *all, &tables(&truth)),
            }
        }
        look(&mut pages, true, &tables(&truth));
        let live: Vec<_> = pages.live().map(|page| (page.address / PAGE_BYTES, page.stack)).collect();
        let expected: Vec<_> =
            truth.iter().filter_map(|(page, stack)| Some((*page, (*stack)?))).collect();
        prop_assert_eq!(live, expected);
        for sum in pages.counters().values() {
            prop_assert_eq!(sum.live_bytes, sum.allocated_bytes - sum.freed_bytes);
            prop_assert_eq!(sum.live_count, sum.allocated_count - sum.freed_count);
        }
    }
}
