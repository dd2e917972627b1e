//! Names that come from elsewhere than the files of the program: an earlier session, a server.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use leakbpf_tests::{Allocator, Leakbpf, Profile, c_program, require_program};

/// A copy of the leaking program that can be stripped.
fn copy_of_leak(directory: &Path) -> PathBuf {
    let copy = directory.join("leak");
    fs::copy(c_program("leak", Allocator::Glibc).path, &copy).expect("copy");
    copy
}

fn run(command: &mut Command) {
    let output = command.output().expect("the tool is installed");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn record(agent: Leakbpf, program: &Path) -> Profile {
    let mut session = agent.command([program.to_str().expect("UTF-8"), "0"]).spawn();
    assert!(session.wait().success(), "{}", session.stderr());
    let profile = session.parse_output();
    println!("{}", session.stdout());
    profile.assert_no_losses();
    profile
}

/// Sites with a frame in `main`.
fn in_main(profile: &Profile) -> usize {
    profile.sites.iter().filter(|site| site.functions().contains(&"main")).count()
}

#[test]
fn names_are_kept_for_the_next_session() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let program = copy_of_leak(directory.path());
    let caches = directory.path().join("cache");
    let first = record(Leakbpf::record().keep_names_in(&caches), &program);
    assert!(in_main(&first) > 0);

    // Nothing else can name its functions from now on; its build id stays.
    run(Command::new(require_program("strip", "binutils")).arg(&program));
    let second = record(Leakbpf::record().keep_names_in(&caches), &program);
    assert_eq!(in_main(&second), in_main(&first));
    let anew = record(Leakbpf::record(), &program);
    assert_eq!(in_main(&anew), 0);

    let names = caches.join("leakbpf/names");
    for path in [caches.join("leakbpf"), names.clone()] {
        let mode = fs::metadata(path).expect("directory").permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }
    // A cache that is damaged, all of it, fails no session.
    for directory in fs::read_dir(names).expect("list") {
        for file in fs::read_dir(directory.expect("entry").path()).expect("list") {
            let path = file.expect("entry").path();
            let bytes = fs::read(&path).expect("file");
            fs::write(&path, &bytes[..bytes.len() / 2]).expect("damaged");
        }
    }
    let damaged = record(Leakbpf::record().keep_names_in(&caches), &program);
    assert_eq!(in_main(&damaged), 0);
}

#[test]
fn a_stripped_program_is_named_by_what_debuginfod_serves() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let program = copy_of_leak(directory.path());
    let debug_file = directory.path().join("served.debug");
    let objcopy = require_program("objcopy", "binutils");
    run(Command::new(objcopy).arg("--only-keep-debug").args([&program, &debug_file]));
    run(Command::new(require_program("strip", "binutils")).arg(&program));

    let id = build_id(&program);
    let script = format!("case $2 in {id}) echo {};; *) exit 1;; esac", debug_file.display());
    let path = with_debuginfod(directory.path(), &script);
    let with_path = || Leakbpf::record().environment("PATH", path.clone());
    assert_eq!(in_main(&record(with_path(), &program)), 0);
    assert!(in_main(&record(served(with_path()), &program)) > 0);
}

#[test]
fn ctrl_c_ends_the_wait_for_debuginfod_and_the_report_comes_without_those_names() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let program = copy_of_leak(directory.path());
    run(Command::new(require_program("strip", "binutils")).arg(&program));
    let asked = directory.path().join("asked");
    let script = format!("echo > {}; exec sleep 1000", asked.display());
    let path = with_debuginfod(directory.path(), &script);
    let agent = served(Leakbpf::record().environment("PATH", path));
    let mut session = agent.command([program.to_str().expect("UTF-8"), "0"]).spawn();
    // The program has ended by itself, and so has the recording.
    let deadline = Instant::now() + Duration::from_secs(120);
    while !asked.exists() {
        assert!(Instant::now() < deadline, "debuginfod is never asked: {}", session.stderr());
        std::thread::sleep(Duration::from_millis(5));
    }
    session.signal(libc::SIGINT);
    // It would be waited for longer than the test waits for the agent.
    let profile = session.report();
    assert!(profile.sites.iter().any(|site| site.counters.live_bytes > 0), "a whole report");
    let said = profile.events.iter().any(|event| event.text.contains("ended the wait"));
    assert!(said, "{:?}", profile.events);
}

/// Makes a `debuginfod-find` of a shell script; returns the `PATH` that leads to it.
fn with_debuginfod(directory: &Path, script: &str) -> OsString {
    let stub = directory.join("debuginfod-find");
    fs::write(&stub, format!("#!/bin/sh\n{script}\n")).expect("script");
    fs::set_permissions(&stub, fs::Permissions::from_mode(0o755)).expect("mode");
    let mut path = directory.as_os_str().to_owned();
    path.push(":/usr/bin:/bin");
    path
}

/// With a server, which has all the time that a slow machine may need.
fn served(agent: Leakbpf) -> Leakbpf {
    agent
        .environment("DEBUGINFOD_URLS", "http://127.0.0.1:1/")
        .environment("DEBUGINFOD_MAXTIME", "600")
}

fn build_id(program: &Path) -> String {
    let readelf = require_program("readelf", "binutils");
    let output = Command::new(readelf).arg("-nW").arg(program).output().expect("readelf");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let id = text.split("Build ID: ").nth(1).expect("a build id");
    id.split_whitespace().next().expect("a build id").to_owned()
}

/// Files that only the paths of the process lead to, when it has ended before anything was named.
#[test]
fn a_program_that_has_ended_is_named_by_the_debug_file_beside_it() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let program = copy_of_leak(directory.path());
    let debug_file = directory.path().join("leak.debug");
    let objcopy = || Command::new(require_program("objcopy", "binutils"));
    run(objcopy().arg("--only-keep-debug").args([&program, &debug_file]));
    run(Command::new(require_program("strip", "binutils")).arg(&program));
    run(objcopy().arg(format!("--add-gnu-debuglink={}", debug_file.display())).arg(&program));
    assert!(in_main(&record(Leakbpf::record(), &program)) > 0);
}
