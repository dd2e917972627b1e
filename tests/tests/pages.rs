//! `--mode pages`: the truth is what the kernel says of the process's memory.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use leakbpf_tests::{
    Allocator, BpfIds, Leakbpf, Profile, Program, Session, Target, c_program, require_program,
    text_differences,
};

const MIB: u64 = 1 << 20;

/// Anonymous memory of a process that is resident.
fn anonymous_bytes(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("a living process");
    let line = text.lines().find_map(|line| line.strip_prefix("Anonymous:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.expect("Anonymous in smaps_rollup") * 1024
}

fn record() -> Leakbpf {
    Leakbpf::record().argument("--mode").argument("pages")
}

fn watch(target: &Target) -> Session {
    record().pid(target.pid()).start()
}

/// Live bytes of the sites of a process in whose stack the function occurs.
fn held_by(profile: &Profile, pid: u32, function: &str) -> u64 {
    let named = |name: &str| name == function || name.ends_with(function);
    let sites = profile.sites.iter().filter(|site| {
        let frames = site.frames.iter().filter_map(|frame| frame.function.as_deref());
        site.pid == pid && frames.into_iter().any(named)
    });
    sites.map(|site| site.counters.live_bytes).sum()
}

fn largest(profile: &Profile) -> String {
    let mut sites: Vec<_> = profile.sites.iter().collect();
    sites.sort_by_key(|site| std::cmp::Reverse(site.counters.live_bytes));
    let lines = sites.iter().take(6);
    lines
        .map(|site| {
            let (bytes, outcome) = (site.counters.live_bytes, &site.stack_outcome);
            format!("\n  {bytes} bytes, {outcome}: {}", site.describe())
        })
        .collect()
}

/// With 1 in 16, 100 MiB have a standard error of 2.4 %: 10 % are four of them.
fn assert_within_a_tenth(what: &str, estimate: u64, truth: u64, profile: &Profile) {
    let off = estimate.abs_diff(truth) as f64 / truth as f64;
    assert!(off <= 0.1, "{what}: {estimate} where it is {truth}{}", largest(profile));
}

fn assert_is_an_estimate(profile: &Profile, one_in: u64) {
    assert_eq!(profile.mode, "pages");
    let estimate = profile.estimate.as_ref().expect("it says that it is one");
    assert_eq!((estimate.unit.as_str(), estimate.one_in), ("resident", Some(one_in)));
    assert_eq!(estimate.confidence_percent, 95);
    for counters in profile.sites.iter().map(|site| &site.counters).chain([&profile.totals]) {
        let [low, high] = counters.live_bytes_interval.expect("an interval");
        assert!(low <= counters.live_bytes && counters.live_bytes <= high, "{counters:?}");
        assert_eq!(counters.live_bytes, counters.allocated_bytes - counters.freed_bytes);
    }
    assert!(profile.sites.iter().all(|site| site.kind == "resident"));
    let sum: u64 = profile.sites.iter().map(|site| site.counters.live_bytes).sum();
    assert_eq!(sum, profile.totals.live_bytes);
}

/// Runs the commands; returns the report, and by how much anonymous memory grew.
fn grown(target: &mut Target, session: Session, commands: &[&str]) -> (Profile, u64) {
    let before = anonymous_bytes(target.pid());
    for command in commands {
        target.run(command);
    }
    let after = anonymous_bytes(target.pid());
    let profile = session.stop();
    profile.assert_no_losses();
    (profile, after.saturating_sub(before))
}

#[test]
fn what_is_resident_is_found_with_who_touched_it() {
    let mut target = Target::start(&c_program("pages", Allocator::Glibc));
    let pid = target.pid();
    let session = watch(&target);
    let held = BpfIds::held_by(session.pid());
    assert!(!held.is_empty());
    assert_eq!(text_differences(pid), Vec::<String>::new(), "no probe is placed");
    let before = anonymous_bytes(pid);
    target.run("keeps 200");
    target.run("passes 100");
    // What comes and goes faster than the agent looks is not in what was touched.
    std::thread::sleep(Duration::from_secs(2));
    let (profile, grown) = grown(&mut target, session, &["releases", "only_reads 100"]);
    assert!(grown == 0, "the kernel says that nothing more came: {grown}");
    let grown = anonymous_bytes(pid) - before;
    held.assert_gone();
    assert_is_an_estimate(&profile, 16);
    assert_within_a_tenth("all", profile.totals.live_bytes, grown, &profile);
    assert_within_a_tenth("keeps", held_by(&profile, pid, "keeps"), 200 * MIB, &profile);
    assert_eq!(held_by(&profile, pid, "passes"), 0, "{}", largest(&profile));
    let passed = profile
        .sites
        .iter()
        .filter(|site| site.frames.iter().any(|frame| frame.function.as_deref() == Some("passes")));
    let touched = passed.map(|site| site.counters.allocated_bytes).sum();
    assert_within_a_tenth("passes touched", touched, 100 * MIB, &profile);
    assert!(held_by(&profile, pid, "only_reads") < 2 * MIB, "{}", largest(&profile));
    let keeps = profile.sites.iter().max_by_key(|site| site.counters.live_bytes).expect("a site");
    assert_eq!(keeps.stack_outcome, "complete");
    assert!(target.quit(7).code() == Some(7), "the target is unharmed");
}

#[test]
fn the_interval_holds_the_truth() {
    // One run in 20 may miss, so of several most must hold.
    let mut target = Target::start(&c_program("pages", Allocator::Glibc));
    let mut holds = 0;
    for _ in 0..8 {
        let session = watch(&target);
        let (profile, grown) = grown(&mut target, session, &["keeps 20"]);
        let [low, high] = profile.totals.live_bytes_interval.expect("an interval");
        holds += u32::from((low..=high).contains(&grown));
        assert!(high - low < 20 * MIB / 4, "{low} to {high} says something");
    }
    // At most 2 of 8 fail in all but 6 of 1000 cases.
    assert!(holds >= 6, "{holds} of 8 intervals held the truth");
}

#[test]
fn pages_that_come_and_go_are_counted_once() {
    let mut target = Target::start(&c_program("pages", Allocator::Glibc));
    let session = watch(&target);
    let (profile, grown) = grown(&mut target, session, &["churns 100"]);
    assert_within_a_tenth("all", profile.totals.live_bytes, grown, &profile);
    let touched = profile.totals.allocated_bytes;
    assert_within_a_tenth("touched", touched, 825 * MIB, &profile);
}

#[test]
fn a_huge_page_is_as_large_as_it_is() {
    let setting = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    let setting = setting.expect("a kernel with transparent huge pages");
    assert!(!setting.contains("[never]"), "allow huge pages: {setting}");
    let mut target = Target::start(&c_program("pages", Allocator::Glibc));
    let session = record().pid(target.pid()).argument("--page-interval").argument("1").start();
    let pid = target.pid();
    let (profile, grown) = grown(&mut target, session, &["keeps_huge 128", "keeps 16"]);
    assert_is_an_estimate(&profile, 1);
    // Every page is seen, so nothing is left to chance.
    let off = profile.totals.live_bytes.abs_diff(grown);
    assert!(
        off <= MIB / 4,
        "{} where it is {grown}{}",
        profile.totals.live_bytes,
        largest(&profile)
    );
    assert_eq!(held_by(&profile, pid, "keeps_huge"), 128 * MIB, "{}", largest(&profile));
    let huge = profile.blocks.iter().filter(|block| block.size == 2 * MIB).count();
    assert!(huge >= 60, "{huge} huge pages: else this test shows nothing");
}

#[test]
fn what_the_kernel_touches_belongs_to_who_asked_it_to() {
    let mut target = Target::start(&c_program("pages", Allocator::GlibcStatic));
    let pid = target.pid();
    let session = watch(&target);
    let (profile, grown) = grown(&mut target, session, &["has_filled 100"]);
    assert_within_a_tenth("all", profile.totals.live_bytes, grown, &profile);
    assert_within_a_tenth("has_filled", held_by(&profile, pid, "has_filled"), 100 * MIB, &profile);
}

#[test]
fn a_forked_child_has_books_of_its_own_that_outlive_it() {
    let mut target = Target::start(&c_program("pages", Allocator::Glibc));
    let session = watch(&target);
    target.run("keeps 50");
    let said = target.run("child_keeps 100");
    let child: u32 = said[0].strip_prefix("child ").expect("its id").parse().expect("a number");
    let ended = target.run("child_ends");
    assert!(ended.is_empty());
    let profile = session.stop();
    profile.assert_no_losses();
    assert_within_a_tenth("child", held_by(&profile, child, "child_keeps"), 100 * MIB, &profile);
    assert_within_a_tenth("parent", held_by(&profile, target.pid(), "keeps"), 50 * MIB, &profile);
}

#[test]
fn a_program_that_is_started_is_watched_through_its_execve() {
    let program = c_program("pages", Allocator::Glibc);
    let shell = format!("printf 'keeps 64\\nquit 5\\n' | exec {}", program.path.display());
    let mut session = record().command(["/bin/sh", "-c", &shell]).spawn();
    assert_eq!(session.wait().code(), Some(5), "{}", session.stderr());
    let profile = session.parse_output();
    let life = profile.processes.iter().rfind(|process| process.comm.starts_with("pages"));
    let pid = life.unwrap_or_else(|| panic!("{:?}", profile.processes)).pid;
    let sites = profile.sites.iter().filter(|site| site.pid == pid);
    let held = sites.map(|site| site.counters.live_bytes).sum();
    assert_within_a_tenth("all", held, 64 * MIB, &profile);
    // The first stacks of a new program may come before its unwind tables.
    assert!(held_by(&profile, pid, "keeps") >= 32 * MIB, "{}", largest(&profile));
}

/// Seconds of a line of the shell's `times`: `0m0.12s 0m0.03s`.
fn seconds(times: &str) -> f64 {
    let one = |word: &str| -> Option<f64> {
        let (minutes, seconds) = word.strip_suffix('s')?.split_once('m')?;
        Some(minutes.parse::<f64>().ok()? * 60.0 + seconds.parse::<f64>().ok()?)
    };
    times.split_whitespace().map(|word| one(word).expect("a time")).sum()
}

#[test]
fn the_time_of_children_that_end_before_anybody_looks_counts() {
    let times = std::env::temp_dir().join(format!("leakbpf-times-{}", std::process::id()));
    let burn = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done";
    let script = format!(
        "for n in 1 2 3 4 5 6 7 8 9 10; do ({burn}); sh -c '{burn}'; done; times > {}",
        times.display()
    );
    let mut session = record().command(["/bin/sh", "-c", &script]).spawn();
    assert_eq!(session.wait().code(), Some(0), "{}", session.stderr());
    let profile = session.parse_output();
    let said = fs::read_to_string(&times).expect("what `times` says");
    fs::remove_file(&times).expect("a file");
    let truth: f64 = said.lines().map(seconds).sum();
    assert!(truth > 0.2, "{said}");
    // The kernel's account of a thread is up to a tick old when it ends, and its last work comes after.
    let share = profile.cost.target_cpu_ns as f64 / 1e9 / truth;
    assert!((0.7..1.1).contains(&share), "{share} of {truth} s");
}

#[test]
fn memory_that_is_not_explained_is_told_of() {
    let mut target = Target::start(&c_program("pages", Allocator::Glibc));
    let reasons = "moved by mremap or brought in without a fault";
    let told = |profile: &Profile| profile.events.iter().any(|event| event.text.contains(reasons));
    let (profile, _) = {
        let session = watch(&target);
        grown(&mut target, session, &["keeps 64"])
    };
    assert!(!told(&profile), "{:?}", profile.events);
    for command in ["moves 64", "populates 64"] {
        let session = watch(&target);
        let (profile, grown) = grown(&mut target, session, &[command]);
        assert!(grown >= 64 * MIB && profile.totals.live_bytes < 32 * MIB, "{command}");
        assert!(told(&profile), "{command}: {:?}", profile.events);
    }
}

#[test]
fn when_there_is_no_room_pages_are_counted_as_lost() {
    let mut target = Target::start(&c_program("pages", Allocator::Glibc));
    let session = record().pid(target.pid()).argument("--max-blocks").argument("100").start();
    target.run("keeps 50");
    let profile = session.stop();
    assert!((80 * 16..=100 * 16).contains(&profile.totals.live_count), "{:?}", profile.totals);
    assert!(profile.losses["blocks_full"] > 500, "{:?}", profile.losses);
}

#[test]
fn a_recording_says_the_same_as_the_session() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("x.leakbpf");
    let mut target = Target::start(&c_program("pages", Allocator::Glibc));
    let session = record().pid(target.pid()).output(&file).start();
    target.run("keeps 64");
    session.signal(libc::SIGINT);
    let mut session = session;
    assert!(session.wait().success(), "{}", session.stderr());
    let report = |arguments: &[&str]| {
        let mut command = leakbpf_tests::leakbpf_command();
        let output = command.arg("report").arg(&file).args(arguments).output().expect("it starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    let profile = Profile::parse(&report(&["--format", "json"]));
    assert_is_an_estimate(&profile, 16);
    assert_within_a_tenth("keeps", held_by(&profile, target.pid(), "keeps"), 64 * MIB, &profile);
    let filtered = Profile::parse(&report(&["--format", "json", "--min-size", "4096"]));
    assert_eq!(filtered.totals.live_bytes, profile.totals.live_bytes, "each stands for 16");
    assert!(report(&[]).contains("1 in 16 pages"));
    assert!(report(&["--format", "svg"]).contains("resident memory by first touch"));
}

/// What a process says to `leak 150`, whose leak is in a function of that name.
fn assert_leak_is_named(mut target: Target, function: &str, arguments: &[&str]) -> Profile {
    let pid = target.pid();
    let session = watch(&target);
    let before = anonymous_bytes(pid);
    target.run("leak 150");
    if !arguments.is_empty() {
        let status = Command::new(arguments[0]).arg(pid.to_string()).args(&arguments[1..]).output();
        let status = status.expect("it starts");
        assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    }
    let grown = anonymous_bytes(pid) - before;
    assert_eq!(text_differences(pid), Vec::<String>::new(), "no probe is placed");
    let profile = session.stop();
    assert_within_a_tenth("all", profile.totals.live_bytes, grown, &profile);
    let top = profile.sites.iter().max_by_key(|site| site.counters.live_bytes).expect("a site");
    let names = top.frames.iter().filter_map(|frame| frame.function.as_deref());
    assert!(names.into_iter().any(|name| name.contains(function)), "{}", largest(&profile));
    let leak = profile.sites.iter().filter(|site| {
        let mut names = site.frames.iter().filter_map(|frame| frame.function.as_deref());
        names.any(|name| name.contains(function))
    });
    let leak: u64 = leak.map(|site| site.counters.live_bytes).sum();
    assert!(leak >= 120 * MIB, "{leak} of 150 MiB{}", largest(&profile));
    assert_eq!(target.quit(3).code(), Some(3), "the target is unharmed");
    profile
}

fn source(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("targets").join(name)
}

#[test]
fn a_static_go_programs_leak_is_named() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("pages");
    let status = Command::new(require_program("go", "golang-go"))
        .args(["build", "-o"])
        .arg(&path)
        .arg(source("pages.go"))
        .env("CGO_ENABLED", "0")
        .env("GOCACHE", directory.path().join("cache"))
        .env("GO111MODULE", "off")
        .status()
        .expect("go starts");
    assert!(status.success(), "go could not build pages.go: its output is above");
    let target = Target::start(&Program { path, preload: Vec::new() });
    let profile = assert_leak_is_named(target, "main.keepsForever", &[]);
    assert!(held_by(&profile, profile.processes[0].pid, "main.usesForAMoment") < 40 * MIB);
}

#[test]
fn a_java_programs_leak_is_named_by_its_perf_map() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let java = require_program("java", "default-jdk-headless");
    let status = Command::new(require_program("javac", "default-jdk-headless"))
        .arg("-d")
        .arg(directory.path())
        .arg(source("Pages.java"))
        .status()
        .expect("javac starts");
    assert!(status.success(), "javac could not build Pages.java: its output is above");
    let classes = directory.path().to_str().expect("a plain path").to_owned();
    let program = Program { path: java, preload: Vec::new() };
    // Interpreted methods have no frames of their own that anything could name.
    let arguments = [
        "-Xmx1g",
        "-Xcomp",
        "-XX:+PreserveFramePointer",
        "-XX:CompileCommand=quiet",
        "-XX:CompileCommand=compileonly,Pages::*",
        "-XX:CompileCommand=dontinline,Pages::keepsForever",
        "-cp",
        &classes,
        "Pages",
    ];
    let target = Target::start_with(&program, &[], &arguments);
    let jcmd = require_program("jcmd", "default-jdk-headless");
    let jcmd = jcmd.to_str().expect("a plain path").to_owned();
    assert_leak_is_named(target, "Pages.keepsForever", &[&jcmd, "Compiler.perfmap"]);
}
