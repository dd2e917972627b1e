//! Anonymous mappings as ranges: the truth is the target's list of pages, and the kernel's own.

use leakbpf_tests::{
    Allocator, Leakbpf, PageSet, Profile, Program, Target, bare_program, c_program,
};

/// Kinds that are the program's memory, not an allocator's.
const USERS: &[&str] = &["mapping"];
const ALL: &[&str] = &["mapping", "thread_stack", "allocator_mapping"];

/// Runs the commands; returns the report, the target's pages, and what the kernel lists more than
/// before.
fn record(program: &Program, commands: &[&str]) -> (Profile, u32, PageSet, PageSet) {
    let mut target = Target::start(program);
    let session = Leakbpf::record().pid(target.pid()).start();
    let before = PageSet::of_process(target.pid());
    for command in commands {
        target.run(command);
    }
    let pages = PageSet::from_lines(&target.run("tell"));
    let more = PageSet::of_process(target.pid()).minus(&before);
    let profile = session.stop();
    profile.assert_no_losses();
    (profile, target.pid(), pages, more)
}

fn assert_mappings_are_exact(commands: &[&str]) {
    for allocator in [Allocator::Glibc, Allocator::MuslStatic] {
        let (profile, pid, pages, more) = record(&c_program("mappings", allocator), commands);
        assert!(pages.bytes() > 0);
        let what = format!("{commands:?} on {allocator:?}");
        assert_eq!(pages.minus(&more).bytes(), 0, "{what}: the target's truth is not the kernel's");
        PageSet::new(profile.ranges(pid, USERS)).assert_equals(&pages, &what);
    }
}

#[test]
fn munmap_of_a_part_leaves_the_rest() {
    assert_mappings_are_exact(&["partial"]);
}

#[test]
fn a_fixed_mapping_replaces_what_was_there() {
    assert_mappings_are_exact(&["fixed"]);
}

#[test]
fn mremap_grows_moves_shrinks_and_fails() {
    assert_mappings_are_exact(&["moved"]);
}

#[test]
fn the_break_goes_up_and_down() {
    assert_mappings_are_exact(&["breaks"]);
}

#[test]
fn all_mapping_calls_together_are_exact() {
    assert_mappings_are_exact(&["partial", "moved", "fixed", "partial", "breaks", "moved"]);
}

#[test]
fn stacks_of_threads_are_a_kind_of_their_own() {
    let program = c_program("mappings", Allocator::Glibc);
    let (profile, pid, ..) = record(&program, &["stacks"]);
    assert_eq!(PageSet::new(profile.ranges(pid, USERS)).bytes(), 0, "no mapping of the user's");
    let stacks = PageSet::new(profile.ranges(pid, &["thread_stack"]));
    assert!(stacks.bytes() >= 6 << 20, "six stacks of 1 MiB: {stacks}");
}

#[test]
fn what_an_allocator_maps_is_not_counted_as_the_users() {
    for allocator in [
        Allocator::Glibc,
        Allocator::JemallocPreloaded,
        Allocator::TcmallocPreloaded,
        Allocator::MimallocPreloaded,
    ] {
        let (profile, pid, ..) = record(&c_program("mappings", allocator), &["arenas"]);
        let users = PageSet::new(profile.ranges(pid, USERS));
        assert_eq!(users.bytes(), 0, "{allocator:?}: {users}");
        let heap = 30 * (1 << 20) + 3000 * 5000;
        assert_eq!(profile.live_heap_bytes(pid), heap, "{allocator:?}");
        assert_eq!(profile.totals.live_bytes, heap, "{allocator:?}: counted twice");
        // Our own return probe stands between the allocator and its caller.
        let arenas = || profile.sites.iter().filter(|site| site.kind == "allocator_mapping");
        assert_ne!(arenas().count(), 0, "{allocator:?}");
        for site in arenas() {
            assert_eq!(site.stack_outcome, "complete", "{allocator:?}: {}", site.describe());
            assert!(site.has_function("main"), "{allocator:?}: {}", site.describe());
        }
    }
}

#[test]
fn ranges_of_all_kinds_are_what_the_kernel_lists() {
    let program = c_program("mappings", Allocator::Glibc);
    let commands = ["partial", "moved", "fixed", "arenas", "stacks"];
    let (profile, pid, _, more) = record(&program, &commands);
    // Allocators' mappings need not be listed as blocks; what is listed must be there.
    let reported = PageSet::new(profile.ranges(pid, ALL));
    let gone = reported.minus(&more);
    assert_eq!(gone.bytes(), 0, "reported, but not mapped: {gone}");
}

#[test]
fn a_program_without_a_c_library_has_mappings() {
    let program = bare_program("direct");
    let mut target = Target::start(&program);
    let session = Leakbpf::record().pid(target.pid()).start();
    let pages = PageSet::from_lines(&target.run("go"));
    let profile = session.stop();
    profile.assert_no_losses();
    let reported = PageSet::new(profile.ranges(target.pid(), USERS));
    reported.assert_equals(&pages, "direct system calls");
    assert!(profile.names_function("work") || profile.names_function("call"));
}
