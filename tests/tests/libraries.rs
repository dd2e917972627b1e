//! Libraries that come and go while the agent is attached.

use std::time::Duration;

use leakbpf_tests::{
    Allocator, Leakbpf, Profile, Target, assert_heap_equals, c_library,
    c_library_without_frame_pointers, c_program, c_program_without_frame_pointers, require_file,
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

/// Where a library is, another one with the same code has been, whose functions have other names.
struct Swap {
    target: Target,
    first: String,
    second: String,
}

impl Swap {
    fn start() -> Self {
        let path = |name| c_library_without_frame_pointers(name).display().to_string();
        let target = Target::start(&c_program_without_frame_pointers("libraries"));
        Self { target, first: path("plugin"), second: path("plugin_other") }
    }
}

/// The function that asked for the only block of a size, if it has a name.
fn caller(profile: &Profile, pid: u32, size: u64) -> Option<String> {
    let frame = profile.site_of_size(pid, size).frames.first();
    frame.and_then(|frame| frame.function.clone())
}

/// The agent reads of the first library's stack when the second one is at its place.
#[test]
fn a_stack_names_its_own_library_however_late_the_agent_reads_it() {
    let Swap { mut target, first, second } = Swap::start();
    let session = Leakbpf::record().pid(target.pid()).start();
    target.run(&format!("open {first} plugin_allocate"));
    // The list of mappings is there after a millisecond, the table a little later.
    std::thread::sleep(Duration::from_millis(200));
    session.signal(libc::SIGSTOP);
    target.run("allocate 10001");
    target.run("close");
    target.run(&format!("open {second} second_allocate"));
    target.run("allocate 20001");
    session.signal(libc::SIGCONT);
    let profile = session.stop();
    let pid = target.pid();
    let site = profile.site_of_size(pid, 10001);
    assert_eq!(caller(&profile, pid, 10001).as_deref(), Some("plugin_allocate"));
    assert!(site.is_complete() && site.has_function("main"), "{}", site.describe());
    assert_eq!(caller(&profile, pid, 20001).as_deref(), Some("second_allocate"));
}

/// Faster than anybody can look: what is not known for sure has no name.
#[test]
fn libraries_that_take_each_others_place_are_never_mistaken_for_each_other() {
    const ROUNDS: u64 = 100;
    let Swap { mut target, first, second } = Swap::start();
    let session = Leakbpf::record().pid(target.pid()).start();
    let (first, second) = (format!("{first} plugin_allocate"), format!("{second} second_allocate"));
    target.run(&format!("swap {first} {second} {ROUNDS}"));
    let profile = session.stop();
    let mut named = 0;
    for round in 0..ROUNDS {
        for (size, function) in [(10000, "plugin_allocate"), (20000, "second_allocate")] {
            let name = caller(&profile, target.pid(), size + round);
            assert!(name.as_deref().is_none_or(|name| name == function), "{size}: {name:?}");
            named += u64::from(name.is_some());
        }
    }
    eprintln!("{named} of {} blocks are named", 2 * ROUNDS);
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
