//! Whole stacks of programs without frame pointers, function by function.

use leakbpf_tests::{
    Leakbpf, Profile, Site, Target, c_library_without_frame_pointers,
    c_program_without_frame_pointers,
};

/// What glibc puts around `main`.
const START: [&str; 3] = ["__libc_start_call_main", "__libc_start_main", "_start"];

/// Runs the commands while leakbpf is attached.
fn record(commands: &[&str]) -> (Profile, u32) {
    record_with("dwarf", commands)
}

fn record_with(stack: &str, commands: &[&str]) -> (Profile, u32) {
    let mut target = Target::start(&c_program_without_frame_pointers("stacks"));
    let session = Leakbpf::record().pid(target.pid()).argument("--stack").argument(stack).start();
    for command in commands {
        target.run(command);
    }
    let profile = session.stop();
    profile.assert_no_losses();
    (profile, target.pid())
}

/// The stack must be these functions, then `main` and what starts it, and nothing else.
fn assert_stack(site: &Site, functions: &[&str]) {
    assert_eq!(site.stack_outcome, "complete", "{:?}", site.functions());
    // Where the compiler has inlined it, `main` has a frame for it all the same.
    let found: Vec<&str> =
        site.functions().into_iter().filter(|function| *function != "converse").collect();
    let expected: Vec<&str> = functions.iter().chain(&["main"]).chain(&START).copied().collect();
    // Debian names some of its functions twice.
    let plain = |names: &[&str]| -> Vec<String> {
        names.iter().map(|name| name.split('@').next().unwrap_or(name).to_owned()).collect()
    };
    assert_eq!(plain(&found), plain(&expected));
}

#[test]
fn alloca_huge_and_aligned_frames_are_walked_through() {
    let (profile, pid) = record(&["chain 1001"]);
    let site = profile.site_of_size(pid, 1001);
    assert_stack(site, &["innermost", "with_huge_frame", "with_alignment", "with_alloca", "chain"]);
}

#[test]
fn a_callback_from_the_c_library_has_all_of_its_callers() {
    let (profile, pid) = record(&["sort 1002"]);
    let functions = profile.site_of_size(pid, 1002).functions();
    assert_eq!(profile.site_of_size(pid, 1002).stack_outcome, "complete", "{functions:?}");
    assert_eq!(functions[..2], ["innermost", "compare"]);
    let position = |name: &str| functions.iter().position(|function| function.contains(name));
    let (sort, qsort) = (position("sort"), position("qsort"));
    assert!(sort.is_some() && qsort.is_some(), "{functions:?}");
    assert_eq!(functions[functions.len() - START.len()..], START);
    assert!(functions.contains(&"sort") && functions.contains(&"main"), "{functions:?}");
}

#[test]
fn the_code_that_a_signal_interrupted_is_in_the_stack() {
    let (profile, pid) = record(&["signal 1003"]);
    let site = profile.site_of_size(pid, 1003);
    let functions = site.functions();
    assert_eq!(site.stack_outcome, "complete", "{functions:?}");
    assert_eq!(functions[..2], ["innermost", "on_illegal"]);
    assert_eq!(functions[3..5], ["interrupted", "handle"], "after the return from the signal");
    assert_eq!(functions[functions.len() - START.len()..], START);
}

#[test]
fn a_thread_begins_where_it_was_started() {
    let (profile, pid) = record(&["thread 1004"]);
    let site = profile.site_of_size(pid, 1004);
    assert_eq!(site.stack_outcome, "complete", "{:?}", site.functions());
    assert_eq!(site.functions()[..3], ["innermost", "in_thread", "start_thread"]);
    assert_eq!(site.frames.len(), 4, "and one that starts it: {:?}", site.functions());
}

#[test]
fn a_hundred_frames_are_complete_and_two_hundred_are_truncated() {
    let (profile, pid) = record(&["recurse 100 1005", "recurse 200 1006"]);
    let hundred = profile.site_of_size(pid, 1005);
    let expected: Vec<&str> =
        ["innermost"].into_iter().chain(["deeper"; 100]).chain(["recurse"]).collect();
    assert_stack(hundred, &expected);
    let two_hundred = profile.site_of_size(pid, 1006);
    assert_eq!(two_hundred.stack_outcome, "truncated");
    assert_eq!(two_hundred.frames.len(), 127);
}

#[test]
fn the_walk_for_older_kernels_gives_the_same_stacks() {
    let commands = ["chain 1001", "sort 1002", "signal 1003", "thread 1004", "recurse 100 1005"];
    let (profile, pid) = record_with("dwarf", &commands);
    let (older, older_pid) = record_with("dwarf64", &commands);
    for size in 1001..=1004 {
        let (site, same) = (profile.site_of_size(pid, size), older.site_of_size(older_pid, size));
        assert_eq!(same.functions(), site.functions());
        assert_eq!(same.stack_outcome, "complete");
    }
    let deep = older.site_of_size(older_pid, 1005);
    assert_eq!((deep.stack_outcome.as_str(), deep.frames.len()), ("truncated", 64));
}

#[test]
fn a_library_that_was_loaded_a_moment_ago_is_walked_through() {
    let plugin = c_library_without_frame_pointers("caller");
    // The rows of a library are there about ten milliseconds after it, on an idle machine; the
    // second call through it comes later than that on any.
    let call = |size| format!("plugin {} {size}", plugin.display());
    let (profile, pid) = record(&[&call(1007), &call(1009), &call(1010), &call(1011)]);
    let site = profile.site_of_size(pid, 1011);
    assert_stack(site, &["innermost", "plugin_call", "plugin"]);
}

#[test]
fn after_an_exec_stacks_are_those_of_the_new_program() {
    let mut target = Target::start(&c_program_without_frame_pointers("stacks"));
    // Other code at other addresses: what is left of the old list would show.
    let other = leakbpf_tests::c_program("mappings", leakbpf_tests::Allocator::Glibc);
    let session = Leakbpf::record().pid(target.pid()).start();
    target.run("chain 1008");
    target.begin(&format!("exec {}", other.path.display()));
    assert_eq!(target.line(), "ready", "the program became the other one");
    leakbpf_tests::wait_until_probed(target.pid(), "libc.so.6");
    target.run("arenas");
    let profile = session.stop();
    let new_life = profile
        .processes
        .iter()
        .rposition(|process| process.pid == target.pid())
        .expect("the new life");
    let mut seen = 0;
    for block in profile.blocks.iter().filter(|block| block.process == new_life) {
        let site = profile.site(block);
        assert!(
            !site.frames.iter().any(|frame| {
                frame.module.as_deref().is_some_and(|module| module.contains("/stacks-"))
            }),
            "a frame of the old program: {:?}",
            site.functions()
        );
        seen += usize::from(site.has_function("arenas"));
    }
    assert!(seen > 0, "the new program's block is in the report");
}
