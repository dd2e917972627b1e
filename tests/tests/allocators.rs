//! Every function of every allocator, in all its forms, block by block.

use leakbpf_tests::{
    Allocator, Program, assert_exact, assert_exact_with_oracle, c_program, cpp_program,
};

const HEAP: &[&str] =
    &["basic", "zero", "reallocs", "overflow", "posix", "indirect", "churn 20000"];

fn assert_heap_is_exact(allocator: Allocator) {
    let aligned = format!("aligned {}", allocator.extensions());
    let program = c_program("heap", allocator);
    let profile = assert_exact(&program, &[HEAP, &[&aligned]].concat());
    assert!(profile.names_function("reallocs"), "the program's own functions are named");
}

fn assert_cpp_is_exact(program: &Program) {
    assert_exact(program, &["forms", "objects", "exceptions", "containers"]);
}

#[test]
fn malloc_calloc_and_realloc_of_null_are_counted() {
    assert_exact(&c_program("heap", Allocator::Glibc), &["basic"]);
}

#[test]
fn blocks_of_no_bytes_are_counted() {
    assert_exact(&c_program("heap", Allocator::Glibc), &["zero", "basic"]);
}

#[test]
fn realloc_moves_shrinks_and_keeps_its_block_when_it_fails() {
    assert_exact(&c_program("heap", Allocator::Glibc), &["reallocs"]);
}

#[test]
fn a_product_that_overflows_allocates_nothing() {
    assert_exact(&c_program("heap", Allocator::Glibc), &["overflow"]);
}

#[test]
fn posix_memalign_counts_only_when_it_succeeds() {
    assert_exact(&c_program("heap", Allocator::Glibc), &["posix"]);
}

#[test]
fn all_aligned_forms_are_counted() {
    let program = c_program("heap", Allocator::Glibc);
    assert_exact(&program, &["aligned memalign valloc pvalloc reallocarray"]);
}

#[test]
fn strdup_is_one_block_of_its_caller() {
    let profile = assert_exact(&c_program("heap", Allocator::Glibc), &["indirect"]);
    assert!(profile.names_function("indirect"));
}

#[test]
fn addresses_that_come_back_are_new_blocks() {
    assert_exact(&c_program("heap", Allocator::Glibc), &["churn 60000 7", "churn 60000 8"]);
}

#[test]
fn glibc_in_a_static_executable_is_exact() {
    assert_heap_is_exact(Allocator::GlibcStatic);
}

#[test]
fn musl_is_exact() {
    assert_heap_is_exact(Allocator::Musl);
}

#[test]
fn musl_in_a_static_executable_is_exact() {
    assert_heap_is_exact(Allocator::MuslStatic);
}

#[test]
fn a_preloaded_jemalloc_is_exact() {
    assert_heap_is_exact(Allocator::JemallocPreloaded);
}

#[test]
fn a_linked_jemalloc_is_exact() {
    assert_heap_is_exact(Allocator::JemallocLinked);
}

#[test]
fn a_preloaded_tcmalloc_is_exact() {
    assert_heap_is_exact(Allocator::TcmallocPreloaded);
}

#[test]
fn a_linked_tcmalloc_is_exact() {
    assert_heap_is_exact(Allocator::TcmallocLinked);
}

#[test]
fn a_preloaded_mimalloc_is_exact() {
    assert_heap_is_exact(Allocator::MimallocPreloaded);
}

#[test]
fn a_linked_mimalloc_is_exact() {
    assert_heap_is_exact(Allocator::MimallocLinked);
}

#[test]
fn jemallocs_own_interface_is_exact() {
    let program = c_program("jemalloc", Allocator::JemallocLinked);
    assert_exact(&program, &["forms", "failing"]);
}

#[test]
fn a_block_that_jemalloc_resizes_in_place_has_its_new_size() {
    assert_exact(&c_program("jemalloc", Allocator::JemallocLinked), &["in_place"]);
}

#[test]
fn mimallocs_own_interface_is_exact() {
    let program = c_program("mimalloc", Allocator::MimallocLinked);
    assert_exact(&program, &["forms", "heaps", "failing"]);
}

#[test]
fn operator_new_and_delete_are_exact_on_glibc() {
    assert_cpp_is_exact(&cpp_program("cpp", Allocator::Glibc));
}

#[test]
fn operator_new_and_delete_are_exact_on_jemalloc() {
    assert_cpp_is_exact(&cpp_program("cpp", Allocator::JemallocPreloaded));
}

#[test]
fn operator_new_and_delete_are_exact_on_tcmalloc() {
    assert_cpp_is_exact(&cpp_program("cpp", Allocator::TcmallocPreloaded));
}

#[test]
fn operator_new_and_delete_are_exact_on_mimalloc() {
    // Debian's is built from C and aborts where others throw.
    let program = cpp_program("cpp", Allocator::MimallocPreloaded);
    assert_exact(&program, &["forms", "objects", "containers"]);
}

#[test]
fn operator_new_and_delete_are_exact_in_a_static_executable() {
    assert_cpp_is_exact(&cpp_program("cpp", Allocator::GlibcStatic));
}

/// The oracle is an allocator itself: four layers deep, the outermost call counts.
#[test]
fn the_preloaded_oracle_agrees_on_glibc() {
    assert_exact_with_oracle(&c_program("heap", Allocator::Glibc), HEAP);
}

#[test]
fn the_preloaded_oracle_agrees_on_jemalloc() {
    assert_exact_with_oracle(&c_program("heap", Allocator::JemallocPreloaded), HEAP);
}

#[test]
fn the_preloaded_oracle_agrees_on_operator_new() {
    let program = cpp_program("cpp", Allocator::Glibc);
    // The oracle is built as C and passes on what libstdc++ throws: docs/accounting.md says why
    // such a library is not protected.
    assert_exact_with_oracle(&program, &["forms", "objects", "containers"]);
}
