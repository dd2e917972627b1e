//! Threads that free each other's blocks, come and go, and change their stacks; attaching to and
//! detaching from them in the middle.

use std::env;
use std::thread;
use std::time::Duration;

use leakbpf_tests::{
    Allocator, Leakbpf, Target, assert_exact, assert_exact_on, assert_exact_with_oracle,
    assert_heap_equals, assert_storm_explained, c_program, monotonic_ns,
};

/// How often the storm is repeated, each time with a new attach.
fn storm_repeats() -> u32 {
    let repeats = env::var("LEAKBPF_STORM_REPEATS");
    repeats.map_or(100, |text| text.parse().expect("LEAKBPF_STORM_REPEATS is a number"))
}

#[test]
fn eight_threads_that_free_each_others_blocks_are_exact_a_hundred_times() {
    let mut target = Target::start(&c_program("threads", Allocator::Glibc));
    for repeat in 1..=storm_repeats() {
        // Blocks of the storms before are freed in this one: unknown frees, not errors.
        assert_exact_on(&mut target, &[&format!("storm 300 {repeat}")]);
    }
}

#[test]
fn a_storm_is_exact_on_jemalloc() {
    assert_exact(&c_program("threads", Allocator::JemallocPreloaded), &["storm 1000 1"]);
}

#[test]
fn a_storm_is_exact_on_tcmalloc() {
    assert_exact(&c_program("threads", Allocator::TcmallocPreloaded), &["storm 1000 1"]);
}

#[test]
fn a_storm_is_exact_on_mimalloc() {
    assert_exact(&c_program("threads", Allocator::MimallocPreloaded), &["storm 1000 1"]);
}

#[test]
fn a_storm_is_exact_on_musl() {
    assert_exact(&c_program("threads", Allocator::Musl), &["storm 500 1"]);
}

#[test]
fn a_storm_is_exact_by_the_preloaded_oracle() {
    assert_exact_with_oracle(&c_program("threads", Allocator::Glibc), &["storm 500 1"]);
}

#[test]
fn threads_that_come_and_go_leave_only_their_blocks() {
    assert_exact(&c_program("threads", Allocator::Glibc), &["lives", "storm 100 1"]);
}

#[test]
fn what_the_c_library_allocates_for_threads_is_exact_too() {
    assert_exact_with_oracle(&c_program("threads", Allocator::Glibc), &["lives"]);
}

#[test]
fn a_signal_handler_on_its_own_stack_is_counted() {
    assert_exact(&c_program("threads", Allocator::Glibc), &["signals"]);
}

#[test]
fn coroutines_are_counted() {
    assert_exact(&c_program("threads", Allocator::Glibc), &["coroutines"]);
}

#[test]
fn attaching_in_the_middle_of_a_storm_counts_all_that_follows() {
    for _ in 0..5 {
        let mut target = Target::start(&c_program("threads", Allocator::Glibc));
        target.run("roam");
        let session = Leakbpf::record().pid(target.pid()).start();
        let attached_ns = session.attached_ns();
        // The storm goes on for a while; how long does not matter.
        thread::park_timeout(Duration::from_millis(200));
        target.run("rest");
        let rested_ns = monotonic_ns();
        let profile = session.stop();
        let log = target.storm_log();
        profile.assert_no_losses();
        profile.assert_consistent();
        assert_storm_explained(
            &profile,
            target.pid(),
            &log,
            attached_ns,
            (rested_ns, rested_ns + 1),
        );
    }
}

#[test]
fn detaching_in_the_middle_of_a_storm_reports_one_instant() {
    for _ in 0..5 {
        let mut target = Target::start(&c_program("threads", Allocator::Glibc));
        let session = Leakbpf::record().pid(target.pid()).start();
        let attached_ns = session.attached_ns();
        target.run("roam");
        thread::park_timeout(Duration::from_millis(200));
        let stopped_ns = monotonic_ns();
        let profile = session.stop();
        let ended_ns = monotonic_ns();
        target.run("rest");
        assert!(target.is_alive());
        let log = target.storm_log();
        assert!(log.blocks_ever() > 1000, "a storm of {} blocks is none", log.blocks_ever());
        profile.assert_consistent();
        assert_storm_explained(&profile, target.pid(), &log, attached_ns, (stopped_ns, ended_ns));
    }
}

#[test]
fn a_second_attach_counts_as_exactly_as_the_first() {
    let mut target = Target::start(&c_program("threads", Allocator::Glibc));
    assert_exact_on(&mut target, &["storm 200 1"]);
    target.run("storm 200 2");
    assert_exact_on(&mut target, &["storm 200 3"]);
}

#[test]
fn two_agents_on_one_target_both_count_exactly() {
    let mut target = Target::start(&c_program("threads", Allocator::Glibc));
    let first = Leakbpf::record().pid(target.pid()).start();
    let first_attached_ns = first.attached_ns();
    target.run("storm 200 1");
    let second = Leakbpf::record().pid(target.pid()).start();
    let second_attached_ns = second.attached_ns();
    target.run("storm 200 2");
    let (first, books) = (first.stop(), target.books());
    assert_heap_equals(&first, target.pid(), &books, first_attached_ns);
    target.run("storm 200 3");
    let (second, books) = (second.stop(), target.books());
    assert_heap_equals(&second, target.pid(), &books, second_attached_ns);
}
