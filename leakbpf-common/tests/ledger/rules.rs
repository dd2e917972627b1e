//! Rules that the simulated program cannot reach, one by one.

use leakbpf_common::{
    abi::{Block, BlockKey, Cookie, Loss, MAX_IN_FLIGHT, Owner, Role, SizeRule, StackId, Tally},
    ledger::{self, Call, NESTING_BYTES, Return, ThreadState, UNWOUND_BYTES},
    sampling::Sampling,
};

use super::{
    books::{HostBooks, begin},
    program::{RETURN_ADDRESS, TRAMPOLINE, cookie},
};

const OWNER: Owner = Owner::new(100, 1);
const STACK: u64 = 1 << 40;

fn call(cookie: Cookie, stack_pointer: u64, size: u64, pointer: u64) -> Call {
    Call { cookie, stack_pointer, size, second_size: 0, pointer }
}

fn enter(thread: &mut ThreadState, books: &mut HostBooks, role: Role, at: u64, pointer: u64) {
    books.memory.insert(at, RETURN_ADDRESS);
    jump_to(thread, books, role, at, pointer);
    books.memory.insert(at, TRAMPOLINE);
}

/// The function that is in flight at `at` ends in a jump to this one.
fn jump_to(thread: &mut ThreadState, books: &mut HostBooks, role: Role, at: u64, pointer: u64) {
    begin(thread, books, &call(cookie(role, SizeRule::First, false), at, 10, pointer));
}

fn leave(thread: &mut ThreadState, books: &mut HostBooks, at: u64, result: u64) {
    if let Some(birth) = ledger::leave(thread, books, at, result) {
        ledger::born(books, &birth, StackId(at), at);
    }
}

fn malloc(thread: &mut ThreadState, books: &mut HostBooks, at: u64, result: u64) {
    enter(thread, books, Role::Allocate, at, 0);
    leave(thread, books, at, result);
}

fn free(thread: &mut ThreadState, books: &mut HostBooks, at: u64, pointer: u64) {
    let call = call(cookie(Role::Free, SizeRule::First, false), at, 0, pointer);
    ledger::free(Some(thread), books, OWNER, &call);
}

fn addresses(books: &HostBooks) -> Vec<u64> {
    let mut addresses: Vec<u64> = books.blocks.keys().map(|key| key.address).collect();
    addresses.sort_unstable();
    addresses
}

fn start() -> (ThreadState, HostBooks) {
    (ThreadState::new(OWNER), HostBooks::new(usize::MAX))
}

#[test]
fn a_block_that_comes_back_from_a_dead_call_yields_to_a_newer_one_at_its_address() {
    let (mut first, mut books) = start();
    let mut second = ThreadState::new(OWNER);
    malloc(&mut first, &mut books, STACK, 0x1000);
    enter(&mut first, &mut books, Role::Reallocate, STACK, 0x1000);
    // The first thread jumps out; the second releases the block and gets its address again.
    free(&mut second, &mut books, STACK, 0x1000);
    malloc(&mut second, &mut books, STACK + 8, 0x1000);
    first.end(&mut books);
    let key = BlockKey { owner: OWNER, address: 0x1000 };
    let newer = Block { size_bytes: 10, born_ns: STACK + 8, stack: StackId(STACK + 8) };
    assert_eq!(books.blocks.get(&key), Some(&newer));
    assert_eq!(books.live().values().collect::<Vec<_>>(), [&(10, 1)], "only the newer one is live");
    assert_eq!(books.loss(Loss::FreesMissed), 1);
}

#[test]
fn calls_on_more_stacks_than_there_are_slots_are_counted_as_lost() {
    let (mut thread, mut books) = start();
    for stack in 0..=MAX_IN_FLIGHT as u64 {
        enter(&mut thread, &mut books, Role::Allocate, STACK * (stack + 1), 0);
    }
    assert_eq!(books.loss(Loss::InFlightFull), 1);
    assert_eq!(thread.depth, MAX_IN_FLIGHT as u64);
    for stack in (0..=MAX_IN_FLIGHT as u64).rev() {
        leave(&mut thread, &mut books, STACK * (stack + 1), 0x1000 * (stack + 1));
    }
    assert_eq!(books.blocks.len(), MAX_IN_FLIGHT, "one call for each slot was counted");
    assert_eq!(thread.depth, 0);
}

#[test]
fn a_result_that_cannot_be_read_is_a_loss() {
    let (mut thread, mut books) = start();
    enter(&mut thread, &mut books, Role::AllocateOut, STACK, 0x7777);
    leave(&mut thread, &mut books, STACK, 0);
    assert_eq!(books.loss(Loss::ResultsUnreadable), 1);
    assert!(books.blocks.is_empty());
}

#[test]
fn a_call_counts_as_nested_only_near_below() {
    for (distance, nested) in
        [(8, true), (NESTING_BYTES - 8, true), (NESTING_BYTES, false), (STACK / 2, false)]
    {
        let (mut thread, mut books) = start();
        enter(&mut thread, &mut books, Role::Allocate, STACK, 0);
        malloc(&mut thread, &mut books, STACK - distance, 0x2000);
        leave(&mut thread, &mut books, STACK, 0x1000);
        let expected = if nested { vec![0x1000] } else { vec![0x1000, 0x2000] };
        assert_eq!(addresses(&books), expected, "{distance} below");
    }
}

#[test]
fn a_call_above_one_in_flight_means_that_the_stack_has_unwound_unless_it_is_far() {
    for (distance, unwound) in
        [(0, true), (8, true), (UNWOUND_BYTES - 8, true), (UNWOUND_BYTES, false)]
    {
        let (mut thread, mut books) = start();
        enter(&mut thread, &mut books, Role::Allocate, STACK, 0);
        malloc(&mut thread, &mut books, STACK + distance, 0x2000);
        assert_eq!(books.count(Tally::AbandonedCalls), u64::from(unwound), "{distance} above");
        leave(&mut thread, &mut books, STACK, 0x1000);
        let expected = if unwound { vec![0x2000] } else { vec![0x1000, 0x2000] };
        assert_eq!(addresses(&books), expected, "{distance} above");
    }
}

#[test]
fn a_return_drops_the_calls_that_lie_below_it_and_no_others() {
    let (mut thread, mut books) = start();
    enter(&mut thread, &mut books, Role::Allocate, STACK, 0);
    // A stack of its own, so that it is not taken for a nested call, and left by `longjmp`.
    enter(&mut thread, &mut books, Role::Allocate, STACK - NESTING_BYTES, 0);
    leave(&mut thread, &mut books, STACK + 64, 0x9000);
    assert_eq!(thread.depth, 0, "both lie below the frame that returned");
    assert!(books.blocks.is_empty());

    enter(&mut thread, &mut books, Role::Allocate, STACK, 0);
    leave(&mut thread, &mut books, STACK - 64, 0x9000);
    assert_eq!(thread.depth, 1, "the call above it is still running");
    leave(&mut thread, &mut books, STACK, 0x1000);
    assert_eq!(addresses(&books), [0x1000]);
}

#[test]
fn a_reallocation_that_frees_through_its_own_functions_is_counted_once() {
    let (mut thread, mut books) = start();
    malloc(&mut thread, &mut books, STACK, 0x1000);
    enter(&mut thread, &mut books, Role::Reallocate, STACK, 0x1000);
    malloc(&mut thread, &mut books, STACK - 64, 0x2000);
    free(&mut thread, &mut books, STACK - 64, 0x1000);
    leave(&mut thread, &mut books, STACK, 0x2000);
    assert_eq!(addresses(&books), [0x2000]);
    assert_eq!(books.count(Tally::UnknownFrees), 0);
    let site = books.sites.values().next().copied().unwrap_or_default();
    assert_eq!((site.allocated.1, site.freed.1), (2, 1));
}

#[test]
fn a_realloc_of_size_zero_that_jumps_to_free_releases_the_block() {
    let (mut thread, mut books) = start();
    malloc(&mut thread, &mut books, STACK, 0x1000);
    let shrink = call(cookie(Role::Reallocate, SizeRule::First, false), STACK, 0, 0x1000);
    begin(&mut thread, &mut books, &shrink);
    free(&mut thread, &mut books, STACK, 0x1000);
    leave(&mut thread, &mut books, STACK, 0);
    assert!(books.blocks.is_empty());
    assert!(books.live().is_empty());
}

#[test]
fn after_a_jump_out_of_a_call_deeper_calls_count_once_the_stack_was_written_over() {
    let (mut thread, mut books) = start();
    enter(&mut thread, &mut books, Role::Allocate, STACK, 0);
    books.memory.insert(STACK, 0x1234_5678);
    malloc(&mut thread, &mut books, STACK - 64, 0x1000);
    assert_eq!(addresses(&books), [0x1000]);
    assert_eq!(books.count(Tally::AbandonedCalls), 1);
}

#[test]
fn of_two_calls_at_one_stack_pointer_the_first_is_the_programs() {
    let (mut thread, mut books) = start();
    enter(&mut thread, &mut books, Role::Allocate, STACK, 0);
    let rounded = call(cookie(Role::Allocate, SizeRule::First, false), STACK, 4096, 0);
    begin(&mut thread, &mut books, &rounded);
    leave(&mut thread, &mut books, STACK, 0x1000);
    leave(&mut thread, &mut books, STACK, 0x1000);
    let sizes: Vec<u64> = books.blocks.values().map(|block| block.size_bytes).collect();
    assert_eq!(sizes, [10]);
    assert_eq!(books.count(Tally::AbandonedCalls), 0);
}

#[test]
fn a_resize_in_place_gets_no_more_than_it_asked_for() {
    let (mut thread, mut books) = start();
    malloc(&mut thread, &mut books, STACK, 0x1000);
    let mut grow = call(cookie(Role::ResizeInPlace, SizeRule::Sum, false), STACK, 100, 0x1000);
    grow.second_size = 50;
    for (result, size_bytes) in [(120, 120), (192, 150), (96, 150)] {
        begin(&mut thread, &mut books, &grow);
        leave(&mut thread, &mut books, STACK, result);
        let sizes: Vec<u64> = books.blocks.values().map(|block| block.size_bytes).collect();
        assert_eq!(sizes, [size_bytes], "xallocx returned {result}");
    }
}

#[test]
fn a_call_that_threw_does_not_hide_the_next_one_of_its_caller() {
    let (mut thread, mut books) = start();
    let mut throws = cookie(Role::Allocate, SizeRule::First, false);
    throws.returns_unprobed = true;
    books.memory.insert(STACK, RETURN_ADDRESS);
    begin(&mut thread, &mut books, &call(throws, STACK, 1 << 60, 0));
    // The exception has passed; the same line asks for less.
    begin(&mut thread, &mut books, &call(throws, STACK, 10, 0));
    malloc(&mut thread, &mut books, STACK - 64, 0x2000);
    books.memory.insert(STACK, RETURN_ADDRESS);
    leave(&mut thread, &mut books, STACK, 0x1000);
    let blocks: Vec<(u64, u64)> =
        books.blocks.iter().map(|(key, block)| (key.address, block.size_bytes)).collect();
    assert_eq!(blocks, [(0x1000, 10)]);
    assert_eq!(books.count(Tally::AbandonedCalls), 1);
}

#[test]
fn an_allocator_is_known_to_run_without_its_return_until_its_caller_calls_something_else() {
    let (mut thread, mut books) = start();
    books.sampling = Sampling { interval_bytes: 1 << 30, since_ns: 0 };
    let cookie = Cookie { return_optional: true, ..cookie(Role::Allocate, SizeRule::First, false) };
    books.memory.insert(STACK, RETURN_ADDRESS);
    let inside = |thread: &ThreadState, books: &HostBooks, at| {
        thread.is_inside(at, |address| books.memory.get(&address).copied())
    };
    assert!(!inside(&thread, &books, STACK - 100));

    let ends = begin(&mut thread, &mut books, &call(cookie, STACK, 10, 0));
    assert_eq!((ends, thread.depth), (Return::Unwatched, 0));
    // `mmap` for a new heap.
    assert!(inside(&thread, &books, STACK - 100));
    // By a function above the caller, and on another stack.
    assert!(!inside(&thread, &books, STACK + 100));
    assert!(!inside(&thread, &books, STACK - NESTING_BYTES));
    // Somebody else's variable is there now.
    books.memory.insert(STACK, 0);
    assert!(!inside(&thread, &books, STACK - 100));
    // The caller calls `mmap` itself.
    books.memory.insert(STACK, RETURN_ADDRESS + 16);
    assert!(!inside(&thread, &books, STACK));
    assert!(!inside(&thread, &books, STACK - 100));

    // A call whose end is watched is in flight until then.
    books.sampling = Sampling::NONE;
    let ends = begin(&mut thread, &mut books, &call(cookie, STACK, 10, 0));
    assert_eq!(ends, Return::Watched);
    assert!(inside(&thread, &books, STACK + 100));
    leave(&mut thread, &mut books, STACK, 0x1000);
    books.memory.insert(STACK, RETURN_ADDRESS);
    assert!(!inside(&thread, &books, STACK - 100));
}
