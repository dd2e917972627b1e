//! Attaching and detaching: nothing is left behind, whatever happens to the agent.

use std::time::{Duration, Instant};

use leakbpf_tests::{
    Allocator, BpfIds, Leakbpf, Program, Target, assert_exact_on, assert_heap_equals, c_program,
    kernel_version, links_of, require_program, text_differences,
};

/// Breakpoints go when the last descriptor is closed, which the kernel may do a moment after the
/// agent's end.
fn assert_text_is_clean(pid: u32) {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let differences = text_differences(pid);
        if differences.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "left in the target:\n{}", differences.join("\n"));
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

#[test]
fn ten_attaches_in_a_row_leave_nothing_behind() {
    let mut target = Target::start(&c_program("threads", Allocator::Glibc));
    assert_text_is_clean(target.pid());
    for repeat in 0..10 {
        let session = Leakbpf::record().pid(target.pid()).start();
        let held = BpfIds::held_by(session.pid());
        assert!(!held.is_empty(), "the agent holds programs and maps while it is attached");
        assert!(
            !text_differences(target.pid()).is_empty(),
            "breakpoints are seen while it is attached: else this test shows nothing"
        );
        target.run(&format!("storm 50 {}", repeat + 1));
        session.stop();
        held.assert_gone();
        assert_text_is_clean(target.pid());
    }
    assert_exact_on(&mut target, &["storm 100 77"]);
}

#[test]
fn an_agent_that_is_killed_leaves_the_target_unharmed() {
    let mut target = Target::start(&c_program("threads", Allocator::Glibc));
    for _ in 0..3 {
        let mut session = Leakbpf::record().pid(target.pid()).start();
        let held = BpfIds::held_by(session.pid());
        target.begin("storm 300 5");
        session.signal(libc::SIGKILL);
        session.wait();
        target.end("storm 300 5");
        held.assert_gone();
        assert_text_is_clean(target.pid());
        assert!(target.is_alive());
    }
    // Its own work goes on, and the next agent counts it right.
    assert_exact_on(&mut target, &["storm 100 6"]);
}

#[test]
fn an_agent_that_is_killed_while_it_attaches_leaves_the_target_unharmed() {
    let mut target = Target::start(&c_program("threads", Allocator::Glibc));
    target.run("roam");
    for delay_ms in [5, 20, 40, 80, 120, 160, 240] {
        let mut session = Leakbpf::record().pid(target.pid()).spawn();
        std::thread::park_timeout(Duration::from_millis(delay_ms));
        session.signal(libc::SIGKILL);
        session.wait();
        assert!(target.is_alive());
        assert_text_is_clean(target.pid());
    }
    target.run("rest");
}

#[test]
fn a_session_with_a_duration_ends_by_itself() {
    let target = Target::start(&c_program("heap", Allocator::Glibc));
    let mut session = Leakbpf::record().pid(target.pid()).argument("-d").argument("300ms").start();
    let profile = session.report();
    assert!((300_000_000..5_000_000_000).contains(&profile.duration_ns), "{}", profile.duration_ns);
    assert_text_is_clean(target.pid());
}

#[test]
fn a_termination_signal_ends_the_session_with_its_report() {
    let mut target = Target::start(&c_program("heap", Allocator::Glibc));
    let mut session = Leakbpf::record().pid(target.pid()).start();
    target.run("many 10 123");
    session.signal(libc::SIGTERM);
    let profile = session.report();
    assert_eq!(profile.heap_blocks(target.pid()).len(), 10);
}

/// A stop is honoured also while the target floods the agent with events.
#[test]
fn a_stop_in_the_middle_of_a_storm_takes_less_than_a_few_seconds() {
    let mut target = Target::start(&c_program("threads", Allocator::Glibc));
    let session = Leakbpf::record().pid(target.pid()).start();
    target.begin("storm 2000 9");
    let asked = Instant::now();
    session.stop();
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
    target.end("storm 2000 9");
}

/// Kernels before 6.6 have no links to many places: there, nothing is left to test.
fn has_links_to_many_places(agent: u32) -> bool {
    let has = links_of(agent, "uprobe_multi") > 0;
    let version = kernel_version();
    // The limit to processes came with 6.10.
    assert!(has || version < (6, 10), "no link to many places on {version:?}");
    has
}

/// Their probes come and go together.
#[test]
fn links_to_many_places_are_gone_within_a_second() {
    let mut target = Target::start(&c_program("heap", Allocator::Glibc));
    for mode in ["--mode=sample", "--mode=exact"] {
        let session =
            Leakbpf::record().pid(target.pid()).argument(mode).argument("--links=many").start();
        let attached_ns = session.attached_ns();
        target.run("many 10 123");
        if !has_links_to_many_places(session.pid()) {
            return;
        }
        assert!(!text_differences(target.pid()).is_empty(), "breakpoints are seen");
        let asked = Instant::now();
        session.signal(libc::SIGINT);
        assert_text_is_clean(target.pid());
        assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
        let books = target.books();
        let mut session = session;
        let profile = session.report();
        if mode == "--mode=exact" {
            assert_heap_equals(&profile, target.pid(), &books, attached_ns);
        }
    }
}

#[test]
fn a_session_that_counts_every_block_has_a_link_for_each_probe() {
    let target = Target::start(&c_program("heap", Allocator::Glibc));
    let session = Leakbpf::record().pid(target.pid()).argument("--links=single").start();
    assert_eq!(links_of(session.pid(), "uprobe_multi"), 0);
    assert!(links_of(session.pid(), "perf") > 15);
    session.stop();
}

/// The allocator's file exists only in the target's own mount namespace.
#[test]
fn a_target_in_another_mount_namespace_is_counted() {
    let program = c_program("heap", Allocator::GlibcStatic);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let script = format!(
        "exec 9<{}; mount -t tmpfs none {1} && cp /proc/self/fd/9 {1}/heap && chmod +x {1}/heap \
         && exec {1}/heap",
        program.path.display(),
        directory.path().display()
    );
    let unshare = Program { path: require_program("unshare", "util-linux"), preload: Vec::new() };
    let mut target = Target::start_with(&unshare, &[], &["-m", "sh", "-c", &script]);
    assert_exact_on(&mut target, &["basic"]);
}
