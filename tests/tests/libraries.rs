//! Libraries that come and go while the agent is attached.

use leakbpf_tests::{
    Allocator, Leakbpf, Target, assert_heap_equals, c_library, c_program, require_file,
    wait_until_probed,
};

#[test]
fn a_library_that_is_loaded_and_unloaded_fifty_times_is_named_and_counted() {
    let plugin = c_library("plugin");
    let mut target = Target::start(&c_program("libraries", Allocator::Glibc));
    let session = Leakbpf::record().pid(target.pid()).start();
    let attached_ns = session.attached_ns();
    target.run(&format!("plugins {} 50", plugin.display()));
    let books = target.books();
    let profile = session.stop();
    assert_eq!(books.blocks.len(), 50);
    assert_heap_equals(&profile, target.pid(), &books, attached_ns);
    // A library that came and went between two looks at the process is one through which the stack
    // cannot be walked: the stack says so. One that is walked through is named.
    let blocks = profile.heap_blocks(target.pid());
    let sites: Vec<_> = blocks
        .values()
        .filter(|block| (501..=550).contains(&block.size))
        .map(|block| profile.site(block))
        .collect();
    for site in &sites {
        let named = site.has_function("plugins") && site.has_function("main");
        let honest = site.stack_outcome != "complete";
        assert!(named || honest, "{}: {}", site.stack_outcome, site.describe());
    }
    assert!(
        sites.iter().any(|site| site.has_function("plugin_allocate")),
        "the library is never named: {}",
        sites.first().map(|site| site.describe()).unwrap_or_default()
    );
}

/// The loading itself allocates, and may end before the new functions are probed: what is used
/// after the agent had the time to look must be exact.
fn assert_late_allocator_is_exact(functions: &str) {
    let library = require_file("/usr/lib/x86_64-linux-gnu/libmimalloc.so.2", "libmimalloc2.0");
    let mut target = Target::start(&c_program("libraries", Allocator::Glibc));
    let session = Leakbpf::record().pid(target.pid()).start();
    let attached_ns = session.attached_ns();
    target.run(&format!("load {} {functions}", library.display()));
    wait_until_probed(target.pid(), "libmimalloc");
    target.run("use");
    let books = target.books();
    let profile = session.stop();
    assert_heap_equals(&profile, target.pid(), &books, attached_ns);
}

#[test]
fn an_allocator_that_is_loaded_late_is_counted_by_its_own_names() {
    assert_late_allocator_is_exact("mi_malloc mi_calloc mi_realloc mi_free");
}

#[test]
fn an_allocator_that_is_loaded_late_is_counted_by_the_standard_names() {
    assert_late_allocator_is_exact("malloc calloc realloc free");
}
