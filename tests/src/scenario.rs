//! The commonest scenario: attach, let the target do something, wait until it rests, compare.

use crate::{Leakbpf, Profile, Program, Target, assert_heap_equals};

/// Runs the commands on a fresh target while leakbpf is attached, and fails the test at the first
/// block in which its report differs from the target's own books. Returns the report.
pub fn assert_exact(program: &Program, commands: &[&str]) -> Profile {
    assert_exact_on(&mut Target::start(program), commands)
}

/// As [`assert_exact`], on a target that has run for a while.
pub fn assert_exact_on(target: &mut Target, commands: &[&str]) -> Profile {
    let session = Leakbpf::record().pid(target.pid()).start();
    let attached_ns = session.attached_ns();
    for command in commands {
        target.run(command);
    }
    let books = target.books();
    let profile = session.stop();
    assert!(target.is_alive(), "the target did not survive the detach");
    let expected = books.clone().since(attached_ns).blocks.len();
    assert!(expected > 0, "{commands:?} leave nothing: the test shows nothing");
    assert_heap_equals(&profile, target.pid(), &books, attached_ns);
    profile
}

/// As [`assert_exact`], against the preloaded oracle: the C library's own blocks count, too.
pub fn assert_exact_with_oracle(program: &Program, commands: &[&str]) -> Profile {
    let mut target = Target::start_with_oracle(program);
    let session = Leakbpf::record().pid(target.pid()).start();
    let attached_ns = session.attached_ns();
    for command in commands {
        target.run(command);
    }
    let books = target.oracle_books();
    let profile = session.stop();
    assert!(!books.clone().since(attached_ns).blocks.is_empty(), "the oracle saw nothing");
    profile.assert_heap_equals_oracle(target.pid(), &books, attached_ns);
    profile
}
