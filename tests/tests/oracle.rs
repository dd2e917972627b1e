//! The two oracles against each other, without leakbpf: what the programs know of themselves must
//! be what the preloaded library saw.

use leakbpf_tests::{Allocator, Program, Target, c_program, cpp_program};

const HEAP: &[&str] =
    &["basic", "zero", "reallocs", "overflow", "posix", "indirect", "churn 20000"];

/// Every block of the program's books is in the oracle's, with the same size; what the oracle has
/// beyond is not the program's (the C library's own, before and after).
fn assert_agreement(program: &Program, commands: &[&str]) {
    let mut target = Target::start_with_oracle(program);
    let before = target.oracle_books();
    for command in commands {
        target.run(command);
    }
    let (own, oracle) = (target.books(), target.oracle_books());
    assert!(own.blocks.len() > 10);
    for block in own.blocks.values() {
        let seen = oracle.blocks.get(&block.address);
        assert_eq!(
            seen.map(|seen| seen.size_bytes),
            Some(block.size_bytes),
            "{:#x} in {commands:?}",
            block.address
        );
    }
    let foreign: Vec<_> = oracle
        .blocks
        .keys()
        .filter(|address| !own.blocks.contains_key(address) && !before.blocks.contains_key(address))
        .collect();
    assert!(foreign.is_empty(), "only the oracle knows {foreign:x?} of {commands:?}");
}

fn assert_heap_agreement(allocator: Allocator) {
    let aligned = format!("aligned {}", allocator.extensions());
    assert_agreement(&c_program("heap", allocator), &[HEAP, &[&aligned]].concat());
}

#[test]
fn the_oracles_agree_on_glibc() {
    assert_heap_agreement(Allocator::Glibc);
}

#[test]
fn the_oracles_agree_on_jemalloc() {
    assert_heap_agreement(Allocator::JemallocPreloaded);
}

#[test]
fn the_oracles_agree_on_tcmalloc() {
    assert_heap_agreement(Allocator::TcmallocPreloaded);
}

#[test]
fn the_oracles_agree_on_mimalloc() {
    assert_heap_agreement(Allocator::MimallocPreloaded);
}

#[test]
fn the_oracles_agree_on_operator_new() {
    for allocator in [Allocator::Glibc, Allocator::JemallocPreloaded, Allocator::TcmallocPreloaded]
    {
        let program = cpp_program("cpp", allocator);
        assert_agreement(&program, &["forms", "objects", "exceptions", "containers"]);
    }
}

#[test]
fn the_oracles_agree_on_a_storm_of_threads() {
    for allocator in [Allocator::Glibc, Allocator::JemallocPreloaded] {
        let program = c_program("threads", allocator);
        assert_agreement(&program, &["storm 300 1", "storm 300 2"]);
    }
}
