//! Whole stacks of programs without frame pointers, function by function.

use std::{
    collections::BTreeMap,
    process::{Child, Command},
};

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

/// Processes that do nothing but compute, one for each CPU.
struct BusyMachine(Vec<Child>);

impl BusyMachine {
    fn start() -> Self {
        let cpus = std::thread::available_parallelism().expect("a number of CPUs").get();
        let spin = |_| Command::new("sh").args(["-c", "while :; do :; done"]).spawn();
        Self((0..cpus).map(spin).collect::<Result<_, _>>().expect("sh"))
    }
}

impl Drop for BusyMachine {
    fn drop(&mut self) {
        for process in &mut self.0 {
            // It runs until it is killed.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

const LIBRARIES: usize = 100;

/// Loads libraries of 110 KiB, one after the other, and allocates through each of them so long
/// after `dlopen` has returned. Returns how the walks ended; complete stacks are as they must be.
fn outcomes_after(wait_us: u32) -> BTreeMap<String, usize> {
    const FIRST_SIZE: u64 = 5000;
    let library = c_library_without_frame_pointers("fresh");
    let directory = tempfile::tempdir().expect("a temporary directory");
    // Other files: each needs a table of its own.
    for index in 0..LIBRARIES {
        let copy = directory.path().join(format!("{index}.so"));
        std::fs::copy(&library, copy).expect("a copy");
    }
    let directory = directory.path().display();
    let (profile, pid) =
        record(&[&format!("fresh {directory} {LIBRARIES} {wait_us} {FIRST_SIZE}")]);
    let mut outcomes = BTreeMap::new();
    for index in 0..LIBRARIES {
        let site = profile.site_of_size(pid, FIRST_SIZE + index as u64);
        if site.is_complete() {
            let library = ["fresh_innermost", "fresh_third", "fresh_second", "fresh_call"];
            assert_stack(site, &[&["innermost"], &library[..], &["fresh"]].concat());
        }
        *outcomes.entry(site.stack_outcome.clone()).or_insert(0) += 1;
    }
    println!("{wait_us} us after dlopen: {outcomes:?}");
    outcomes
}

fn whole_stacks_after(wait_us: u32) -> usize {
    outcomes_after(wait_us).get("complete").copied().unwrap_or(0)
}

/// All of a hundred; a machine that is busy with something else may spoil the first two rounds, not
/// all three, and none of them by much.
#[test]
fn a_library_that_was_loaded_10_ms_ago_is_in_the_next_stack() {
    let rounds = (0..3).map(|_| whole_stacks_after(10_000));
    let mut best = 0;
    for whole in rounds {
        assert!(whole >= LIBRARIES * 9 / 10, "{whole} of {LIBRARIES}");
        best = best.max(whole);
        if best == LIBRARIES {
            return;
        }
    }
    panic!("{best} of {LIBRARIES} at best");
}

#[test]
fn on_a_busy_machine_nearly_every_stack_has_a_library_that_was_loaded_10_ms_ago() {
    let _busy = BusyMachine::start();
    let whole = whole_stacks_after(10_000);
    assert!(whole >= LIBRARIES * 9 / 10, "{whole} of {LIBRARIES}");
}

/// A process's list of mappings comes after the tables that it names: so soon after `dlopen`, the
/// code is known with its rows or not at all.
#[test]
fn no_stack_meets_a_table_that_is_not_there_yet() {
    let early = [1_000, 2_000].map(outcomes_after);
    assert!(early.iter().all(|outcomes| !outcomes.contains_key("no_row")), "{early:?}");
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
