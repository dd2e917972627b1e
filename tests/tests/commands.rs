//! `record -- CMD`: from the first instruction, with signals and exit status passed on; and other
//! ways to choose processes.

use std::os::unix::process::ExitStatusExt;

use leakbpf_tests::{
    Allocator, Leakbpf, Profile, Session, Target, c_library, c_program, require_program,
};

fn leak(argument: &str) -> Session {
    let program = c_program("leak", Allocator::Glibc);
    Leakbpf::record().command([program.path.to_str().expect("a path in UTF-8"), argument]).spawn()
}

fn assert_leaks(profile: &Profile) {
    let of_size = |size| profile.blocks.iter().filter(|block| block.size == size).count();
    assert_eq!((of_size(1234), of_size(1235)), (25, 0));
    profile.assert_no_losses();
    profile.assert_consistent();
}

#[test]
fn a_command_is_counted_to_its_end_and_its_exit_status_passed_on() {
    for status in [0, 7, 2] {
        let mut session = leak(&status.to_string());
        assert_eq!(session.wait().code(), Some(status), "{}", session.stderr());
        assert_leaks(&session.parse_output());
    }
}

#[test]
fn a_command_that_a_signal_ends_says_so() {
    let mut session = leak("abort");
    let status = session.wait();
    let as_shells_do = Some(128 + libc::SIGABRT);
    assert!(
        status.signal() == Some(libc::SIGABRT) || status.code() == as_shells_do,
        "{status}: {}",
        session.stderr()
    );
    assert_leaks(&session.parse_output());
}

#[test]
fn a_termination_signal_reaches_the_command() {
    let mut session = leak("wait");
    session.wait_until_stdout_has("waiting");
    session.signal(libc::SIGTERM);
    assert_eq!(session.wait().code(), Some(44), "{}", session.stderr());
    assert_leaks(&session.parse_output());
}

#[test]
fn a_command_that_does_not_exist_is_an_error() {
    let mut session = Leakbpf::record().command(["/nonexistent/program"]).spawn();
    // As shells, env(1) and timeout(1) do.
    assert_eq!(session.wait().code(), Some(127));
    let said = session.stderr();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("/nonexistent/program"), "{said}");
}

/// Everything that the program, its C library and its loader ever allocated, by the oracle.
#[test]
fn a_command_is_exact_from_its_first_instruction() {
    let oracle = c_library("oracle");
    let directory = tempfile::tempdir().expect("a temporary directory");
    let books = directory.path().join("oracle");
    let python = require_program("python3", "python3");
    let mut session = Leakbpf::record()
        .command([
            require_program("env", "coreutils").to_str().expect("UTF-8"),
            &format!("LD_PRELOAD={}", oracle.display()),
            &format!("ORACLE_FILE={}", books.display()),
            "PYTHONMALLOC=malloc",
            python.to_str().expect("UTF-8"),
            "-S",
            "-c",
            "import os; kept = [str(i) * 9 for i in range(2000)]; print('pid', os.getpid(), flush=True); os._exit(0)",
        ])
        .spawn();
    let status = session.wait();
    assert!(status.success(), "{}", session.stderr());
    let printed = session.stdout();
    let pid: u32 = printed
        .lines()
        .find_map(|line| line.trim().strip_prefix("pid ")?.parse().ok())
        .unwrap_or_else(|| panic!("the program says its process id: {printed}"));
    let books = leakbpf_tests::Books::read(&directory.path().join(format!("oracle.{pid}")));
    assert!(books.blocks.len() > 5000, "{}", books.blocks.len());
    session.parse_output().assert_heap_equals_oracle(pid, &books, 0);
}

#[test]
fn processes_are_found_by_name() {
    let program = c_program("heap", Allocator::Glibc);
    let name = program.path.file_name().and_then(|name| name.to_str()).expect("UTF-8");
    // The kernel keeps 15 bytes of it.
    let name = &name[..15];
    let mut target = Target::start(&program);
    let session = Leakbpf::record().argument("--name").argument(format!("^{name}")).start();
    session.wait_until_stderr_has(&format!("attached to PID {}", target.pid()));
    target.run("many 17 4711");
    let profile = session.stop();
    let blocks = profile.heap_blocks(target.pid());
    assert_eq!(blocks.values().filter(|block| block.size == 4711).count(), 17);
}

#[test]
fn the_whole_machine_can_be_watched() {
    let program = c_program("heap", Allocator::Glibc);
    let mut before = Target::start(&program);
    let session = Leakbpf::record().argument("--all").start();
    session.attached_ns();
    before.run("many 17 4712");
    let profile = session.stop();
    let blocks = profile.heap_blocks(before.pid());
    assert_eq!(blocks.values().filter(|block| block.size == 4712).count(), 17);
}
