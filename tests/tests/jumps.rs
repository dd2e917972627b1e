//! Allocator calls that never return, or return late: jumps, thread ends and signals in the middle
//! of them. (Switching to another stack inside a function with a return probe is nothing that the
//! kernel supports: it drops the pending return, and the program dies with a signal.)

use std::collections::HashSet;

use leakbpf_tests::{
    Allocator, EventKind, Leakbpf, Program, Target, assert_exact, c_library, c_program,
    heap_difference,
};

/// The program on an allocator that has a hook in the middle.
fn hooked() -> Program {
    let mut program = c_program("jumps", Allocator::Glibc);
    program.preload.push(c_library("hooked"));
    program
}

#[test]
fn a_longjmp_out_of_malloc_does_not_hide_the_calls_after_it() {
    assert_exact(&hooked(), &["longjmp"]);
}

#[test]
fn a_longjmp_out_of_realloc_keeps_the_old_block() {
    assert_exact(&hooked(), &["longjmp_realloc"]);
}

#[test]
fn threads_that_die_inside_malloc_leave_their_other_blocks() {
    assert_exact(&hooked(), &["threads"]);
}

#[test]
fn a_signal_inside_malloc_whose_handler_has_its_own_stack_is_counted() {
    assert_exact(&hooked(), &["signal"]);
}

#[test]
fn a_timer_that_jumps_out_anywhere_costs_at_most_the_call_in_flight() {
    let mut target = Target::start(&hooked());
    let session = Leakbpf::record().pid(target.pid()).start();
    let attached_ns = session.attached_ns();
    target.run("timer");
    let books = target.books();
    let profile = session.stop();
    let mut difference = heap_difference(&profile, target.pid(), &books, attached_ns, false);
    let excused: HashSet<u64> = books
        .events
        .iter()
        .filter(|event| event.kind == EventKind::Maybe)
        .map(|event| event.size_bytes)
        .collect();
    assert!(!excused.is_empty(), "the timer never hit inside malloc: the test shows nothing");
    difference.extra.retain(|(block, _)| !excused.contains(&block.size));
    assert!(difference.is_empty(), "{difference}");
    profile.assert_no_losses();
    profile.assert_consistent();
}
