//! Processes that come from processes, become others, and end.

use std::os::unix::fs::PermissionsExt;

use leakbpf_tests::{
    Allocator, Frame, Leakbpf, Site, Target, assert_exact, assert_exact_with_oracle,
    assert_heap_equals, c_program, heap_difference, links_of, wait_until_more_links,
    wait_until_probed,
};

/// The agent says so once the probes hang on another thread.
const PROBES_MOVED: &str = "they were placed anew";

#[test]
fn a_forked_child_has_books_of_its_own() {
    let mut target = Target::start(&c_program("processes", Allocator::Glibc));
    let session = Leakbpf::record().pid(target.pid()).start();
    let attached_ns = session.attached_ns();
    target.run("hold");
    let links = links_of(session.pid(), "perf");
    let child = child_of(&target.run("fork"));
    wait_until_more_links(session.pid(), "perf", links);
    target.run("go_on");
    let (parents, childs) = (target.books(), target.books_of(child));
    let profile = session.stop();
    assert_heap_equals(&profile, target.pid(), &parents, attached_ns);
    assert!(childs.blocks.len() >= 10);
    assert_heap_equals(&profile, child, &childs, attached_ns);
    assert!(profile.processes.iter().any(|process| process.pid == child));
}

/// While the probes of many that have ended are taken away, which takes its time, a child gets none; but then.
#[test]
fn a_child_that_had_to_wait_for_its_probes_gets_them() {
    let mut target = Target::start(&c_program("processes", Allocator::Glibc));
    let session = Leakbpf::record().pid(target.pid()).argument("--links=single").start();
    let of_one = links_of(session.pid(), "perf");
    target.run("hold");
    let others: Vec<u32> = (0..3).map(|_| child_of(&target.run("fork_at_once 100"))).collect();
    wait_until_more_links(session.pid(), "perf", of_one);
    let of_all = links_of(session.pid(), "perf");
    for child in others {
        // SAFETY: of a process that this test's target has started, and not waited for.
        assert_eq!(unsafe { libc::kill(child as i32, libc::SIGKILL) }, 0);
    }
    while links_of(session.pid(), "perf") == of_all {
        std::thread::yield_now();
    }
    let child = child_of(&target.run("fork"));
    // Until those of the others are gone.
    wait_until_more_links(session.pid(), "perf", of_one);
    target.run("go_on");
    let childs = target.books_of(child);
    let profile = session.stop();
    let mut events = profile.events.iter();
    assert!(
        events.any(|event| event.text.contains("has to wait for its probes")),
        "{:?}",
        profile.events
    );
    assert!(childs.blocks.len() >= 10);
    let difference = heap_difference(&profile, child, &childs, 0, false);
    assert!(difference.is_empty(), "{difference}");
}

#[test]
fn shared_probes_see_a_child_from_its_first_instruction() {
    let mut target = Target::start(&c_program("processes", Allocator::Glibc));
    let mut bystander = Target::start(&c_program("processes", Allocator::Glibc));
    let session = Leakbpf::record().pid(target.pid()).argument("--shared-probes").start();
    for _ in 0..5 {
        let said = target.run("fork_at_once");
        assert!(child_of(&said) > 0);
    }
    bystander.run("make 10 999");
    let profile = session.stop();
    profile.assert_no_losses();
    assert_eq!(profile.losses["children_seen_late"], 0);
    assert_eq!(profile.processes.len(), 6, "the parent and its children, nobody else");
    for child in profile.processes.iter().filter(|process| process.pid != target.pid()) {
        let mut sizes: Vec<u64> =
            profile.heap_blocks(child.pid).values().map(|block| block.size).collect();
        sizes.sort_unstable();
        assert_eq!(sizes, (4100..4120).step_by(2).collect::<Vec<_>>(), "{child:?}");
    }
}

/// A child that allocates before, while or after its probes are placed is known completely, or an event
/// says that it may not be; also with probes whose breakpoints stay in a child that hits them, and when
/// nothing is left of it to look at.
#[test]
fn a_child_that_allocates_before_it_has_probes_is_counted() {
    // Events name no more than nine of them.
    const PAUSES_MS: [u32; 9] = [0, 0, 3, 6, 9, 12, 15, 20, 900];
    let mut unknown = 0;
    for (links, end) in [("many", ""), ("many", "exit"), ("many", "exec"), ("single", "")] {
        let mut target = Target::start(&c_program("processes", Allocator::Glibc));
        let session =
            Leakbpf::record().pid(target.pid()).argument(format!("--links={links}")).start();
        let children: Vec<u32> = PAUSES_MS
            .iter()
            .map(|pause| child_of(&target.run(&format!("fork_at_once {pause} {end}"))))
            .collect();
        let profile = session.stop();
        // What an `execve` replaces is free, and no block any more.
        let known = |child: u32| {
            let is_own = |frame: &Frame| frame.function.as_deref() == Some("fork_at_once");
            let own = |site: &&Site| site.pid == child && site.frames.iter().any(is_own);
            let sites = profile.sites.iter().filter(own).filter(|site| site.kind == "heap");
            sites.map(|site| site.counters.allocated_count).sum::<u64>() == 20
        };
        let late = |child: u32| {
            let mut events = profile.events.iter();
            events.any(|event| event.pid == Some(child) && event.text.contains("before its probes"))
        };
        for (child, pause) in children.iter().zip(PAUSES_MS) {
            assert!(
                known(*child) || late(*child),
                "{links} {end}: {pause} ms: {:?}",
                profile.events
            );
        }
        unknown += children.iter().filter(|child| !known(**child)).count();
        let last = *children.last().expect("some");
        assert!(known(last), "{links} {end}: {:?}", profile.events);
        if links == "many" && end.is_empty() {
            assert!(!late(last), "it slept while its probes were placed: {:?}", profile.events);
        }
    }
    assert!(unknown > 0, "none was late, so this shows nothing");
}

/// `posix_spawn` makes children that have no probes before their `exec`.
#[test]
fn a_program_that_is_spawned_is_counted_as_seen_late() {
    let mut target = Target::start(&c_program("processes", Allocator::Glibc));
    let session = Leakbpf::record().pid(target.pid()).start();
    target.run("spawns");
    let profile = session.stop();
    let spawned = profile.processes.len() as u64 - 1;
    assert!(spawned > 0);
    assert_eq!(profile.losses["children_seen_late"], spawned, "{:?}", profile.events);
}

/// The kernel makes a call of such an instruction, to a page that forks do not copy.
#[test]
fn children_survive_probes_on_functions_that_begin_with_a_long_nop() {
    let mut target = Target::start(&c_program("nops", Allocator::Glibc));
    let session = Leakbpf::record().pid(target.pid()).start();
    let attached_ns = session.attached_ns();
    // Several times: the kernel does it at a hit.
    target.run("make 100 70");
    assert_eq!(target.run("fork"), ["status 0"]);
    let books = target.books();
    let profile = session.stop();
    assert_heap_equals(&profile, target.pid(), &books, attached_ns);
}

fn child_of(said: &[String]) -> u32 {
    said.iter()
        .find_map(|line| line.strip_prefix("child ")?.parse().ok())
        .expect("the target says its child's process id")
}

#[test]
fn a_forked_child_is_not_followed_when_asked_not_to() {
    let mut target = Target::start(&c_program("processes", Allocator::Glibc));
    let session = Leakbpf::record().pid(target.pid()).argument("--no-follow").start();
    let attached_ns = session.attached_ns();
    target.run("hold");
    target.run("fork");
    target.run("go_on");
    let books = target.books();
    let profile = session.stop();
    assert_heap_equals(&profile, target.pid(), &books, attached_ns);
    let others: Vec<u32> = profile
        .processes
        .iter()
        .map(|process| process.pid)
        .filter(|pid| *pid != target.pid())
        .collect();
    assert!(others.is_empty(), "followed {others:?}");
    assert!(profile.blocks.iter().all(|block| block.pid == target.pid()));
}

#[test]
fn children_that_end_take_nothing_of_the_parent_along() {
    assert_exact(&c_program("processes", Allocator::Glibc), &["hold", "forks"]);
}

#[test]
fn vfork_and_exec_leave_the_parents_books_alone() {
    assert_exact(&c_program("processes", Allocator::Glibc), &["hold", "vforks"]);
}

#[test]
fn what_a_child_of_vfork_allocates_is_the_parents() {
    // Other links do not see it: see `suitable_links`.
    assert_exact(&c_program("processes", Allocator::Glibc), &["vfork_allocates"]);
}

#[test]
fn posix_spawn_leaves_the_parents_books_alone() {
    assert_exact(&c_program("processes", Allocator::Glibc), &["hold", "spawns"]);
}

#[test]
fn the_oracle_agrees_on_processes_that_start_processes() {
    let program = c_program("processes", Allocator::Glibc);
    assert_exact_with_oracle(&program, &["hold", "forks", "vforks", "spawns"]);
}

#[test]
fn after_an_exec_none_of_the_old_blocks_are_left_and_the_new_ones_count() {
    assert_new_life_after("exec");
}

#[test]
fn a_thread_that_execs_takes_the_place_of_the_first_one() {
    assert_new_life_after("thread_exec");
}

fn assert_new_life_after(command: &str) {
    let mut target = Target::start(&c_program("processes", Allocator::Glibc));
    let session = Leakbpf::record().pid(target.pid()).start();
    let attached_ns = session.attached_ns();
    target.run("hold");
    target.begin(command);
    assert_eq!(target.line(), "ready", "the program became itself again");
    if command == "thread_exec" {
        session.wait_until_stderr_has(PROBES_MOVED);
        // The new program's C library may come after that.
        wait_until_probed(target.pid(), "libc.so.6");
    }
    target.run("make 30 777");
    let books = target.books();
    let mut profile = session.stop();
    let lives: Vec<_> =
        profile.processes.iter().filter(|process| process.pid == target.pid()).collect();
    assert_eq!(lives.len(), 2, "one life before the exec, one after");
    assert!(lives[0].end.is_some() && lives[1].end.is_none(), "{lives:?}");
    assert_eq!(books.blocks.len(), 30);
    let mine = profile.heap_blocks(target.pid());
    assert_eq!(mine.values().filter(|block| block.size == 777).count(), 30);
    assert_eq!(mine.values().filter(|block| block.size == 7000).count(), 0);
    if command == "thread_exec" {
        assert_eq!(profile.losses.insert("probes_moved".to_owned(), 0), Some(1));
    }
    assert_heap_equals(&profile, target.pid(), &books, attached_ns);
}

#[test]
fn a_process_goes_on_without_its_first_thread() {
    let mut target = Target::start(&c_program("processes", Allocator::Glibc));
    let session = Leakbpf::record().pid(target.pid()).start();
    let attached_ns = session.attached_ns();
    target.run("make 20 555");
    target.run("first_thread_ends");
    session.wait_until_stderr_has(PROBES_MOVED);
    target.run("make 30 777");
    let books = target.books();
    let mut profile = session.stop();
    assert_eq!(profile.losses.insert("probes_moved".to_owned(), 0), Some(1));
    let mine = profile.heap_blocks(target.pid());
    assert_eq!(mine.values().filter(|block| block.size == 777).count(), 30);
    assert_heap_equals(&profile, target.pid(), &books, attached_ns);
}

#[test]
fn attaching_to_a_process_without_its_first_thread_works() {
    let mut target = Target::start(&c_program("processes", Allocator::Glibc));
    target.run("first_thread_ends");
    let session = Leakbpf::record().pid(target.pid()).start();
    let attached_ns = session.attached_ns();
    target.run("make 30 777");
    let books = target.books();
    let profile = session.stop();
    assert_heap_equals(&profile, target.pid(), &books, attached_ns);
}

#[test]
fn probes_go_on_when_the_thread_that_took_them_over_ends() {
    let mut target = Target::start(&c_program("processes", Allocator::Glibc));
    target.run("first_thread_ends");
    let session = Leakbpf::record().pid(target.pid()).start();
    let attached_ns = session.attached_ns();
    target.run("make 20 555");
    // A third thread goes on.
    target.run("first_thread_ends");
    session.wait_until_stderr_has(PROBES_MOVED);
    target.run("make 30 777");
    let books = target.books();
    let mut profile = session.stop();
    assert_eq!(profile.losses.insert("probes_moved".to_owned(), 0), Some(1));
    assert_heap_equals(&profile, target.pid(), &books, attached_ns);
}

/// The blocks outstanding at the end are the final state.
fn assert_final_state(end: &str, named: &str) {
    let mut target = Target::start(&c_program("processes", Allocator::Glibc));
    let mut session = Leakbpf::record().pid(target.pid()).start();
    let attached_ns = session.attached_ns();
    target.run("make 40 888");
    let pid = target.pid();
    target.begin(end);
    target.wait();
    let books = target.books();
    let profile = session.report();
    assert_eq!(books.blocks.len(), 40);
    assert_heap_equals(&profile, pid, &books, attached_ns);
    assert!(profile.names_function(named), "names are still right after the end");
}

#[test]
fn the_blocks_of_a_target_that_is_killed_are_the_final_state() {
    assert_final_state("die 9", "make");
}

#[test]
fn the_blocks_of_a_target_that_crashes_are_the_final_state() {
    assert_final_state("die 11", "make");
}

#[test]
fn the_blocks_of_a_target_that_exits_are_the_final_state() {
    assert_final_state("quit 0", "make");
}

#[test]
fn several_processes_in_one_session_each_have_their_own_books() {
    let program = c_program("heap", Allocator::Glibc);
    let mut targets = [(); 3].map(|()| Target::start(&program));
    let mut record = Leakbpf::record();
    for target in &targets {
        record = record.pid(target.pid());
    }
    let session = record.start();
    // One line for each process: the last of them is what counts.
    for target in &targets {
        session.wait_until_stderr_has(&format!("attached to PID {}", target.pid()));
    }
    let attached_ns = leakbpf_tests::monotonic_ns();
    for (index, target) in targets.iter_mut().enumerate() {
        target.run(&format!("churn 5000 {}", index + 1));
    }
    let books: Vec<_> = targets.iter().map(Target::books).collect();
    let profile = session.stop();
    for (target, books) in targets.iter().zip(&books) {
        assert_heap_equals(&profile, target.pid(), books, attached_ns);
    }
}

/// Programs that replace each other faster than the agent can look at them.
#[test]
fn a_chain_of_execs_leaves_no_program_with_anothers_memory() {
    let directory = tempfile::tempdir().expect("a directory");
    // Each script is three programs: env, bash, and the next script.
    let script = directory.path().join("script");
    let text = "#!/usr/bin/env bash\nX=$(echo $1)\n\
        if [ $1 -gt 0 ]; then exec $0 $(($1 - 1)); fi\n";
    std::fs::write(&script, text).expect("a script");
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).expect("executable");
    let script = script.to_str().expect("a path in UTF-8");
    let profile = Leakbpf::record().command([script, "20"]).spawn().report();
    for site in &profile.sites {
        let bytes = site.counters.allocated_bytes;
        assert!(bytes < 64 << 20, "{} of {bytes} bytes: {}", site.kind, site.describe());
    }
    let count = profile.totals.allocated_count;
    assert!(count > 1000, "only {count} allocations of some sixty programs");
}
