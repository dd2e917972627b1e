//! Unwind tables in the kernel: shared, bounded, and gone when nobody needs them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use leakbpf_tests::{
    Leakbpf, Session, Target, c_library_without_frame_pointers, c_program_without_frame_pointers,
    require_program, unwind_tables,
};

/// A Python process that sleeps.
struct Sleeper(Child);

impl Sleeper {
    fn start(program: &Path) -> Self {
        let mut child = Command::new(program)
            .args(["-c", "import time; print('ready', flush=True); time.sleep(600)"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 starts");
        let mut line = String::new();
        let output = child.stdout.as_mut().expect("a piped output");
        BufReader::new(output).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n");
        Self(child)
    }

    /// Files that it has code of, and the kernel's page.
    fn modules(&self) -> BTreeSet<String> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.0.id()))
            .expect("a living process");
        let code = maps.lines().filter(|line| line.contains("r-xp"));
        let names = code.filter_map(|line| line.split_whitespace().nth(5));
        names.filter(|name| name.starts_with('/') || *name == "[vdso]").map(str::to_owned).collect()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Tables that were not there before.
fn tables_since(before: &BTreeMap<u32, u64>) -> BTreeMap<u32, u64> {
    let mut tables = unwind_tables();
    tables.retain(|id, _| !before.contains_key(id));
    tables
}

/// Kilobytes, as `/proc/PID/status` has them.
fn resident_kb(session: &Session) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", session.pid()))
        .expect("a living process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    line.split_whitespace().next().and_then(|word| word.parse().ok()).expect("a number")
}

/// Attaches to all processes of that name, and says what that took.
fn tables_of(name: &str, processes: usize) -> BTreeMap<u32, u64> {
    let before = unwind_tables();
    let session = Leakbpf::record().argument("--name").argument(format!("^{name}$")).start();
    let attach_ms = (session.attached_ns() - session.started_ns) / 1_000_000;
    let tables = tables_since(&before);
    println!(
        "{processes} python3: {} tables, {} KiB of kernel memory; agent {} KiB resident; attached \
         in {attach_ms} ms",
        tables.len(),
        tables.values().sum::<u64>() / 1024,
        resident_kb(&session)
    );
    // The kernel takes 70 ms to take a probe away: nobody waits for a report of 200 processes.
    if processes <= FEW {
        let profile = session.stop();
        assert_eq!(profile.processes.len(), processes);
        assert_eq!((profile.losses["spaces_full"], profile.losses["unwind_tables_full"]), (0, 0));
    } else {
        assert!(session.stderr().contains(&format!("attached to {processes} processes")));
    }
    tables
}

fn assert_tables_are_shared(processes: usize) {
    // Under a name that no other process has.
    let directory = tempfile::tempdir().expect("a temporary directory");
    let python = directory.path().join("shared_tables");
    std::fs::copy(require_program("python3", "python3"), &python).expect("a copy");
    let mut sleepers = vec![Sleeper::start(&python)];
    let one = tables_of("shared_tables", 1);
    assert_eq!(one.len(), sleepers[0].modules().len(), "one for each file and the vDSO");
    sleepers.extend((1..processes).map(|_| Sleeper::start(&python)));
    let all = tables_of("shared_tables", processes);
    let bytes = |tables: &BTreeMap<u32, u64>| tables.values().sum::<u64>();
    assert_eq!((all.len(), bytes(&all)), (one.len(), bytes(&one)));
}

/// So many that the test takes half a minute.
const FEW: usize = 10;

#[test]
fn processes_share_one_set_of_tables() {
    assert_tables_are_shared(FEW);
}

/// The figures of docs/unwinding.md.
#[test]
#[ignore = "takes five minutes: cargo test --release -p leakbpf-tests --features privileged --test tables -- --ignored --nocapture"]
fn two_hundred_processes_share_one_set_of_tables() {
    assert_tables_are_shared(200);
}

#[test]
fn tables_go_with_the_last_process_that_needs_them() {
    let library = c_library_without_frame_pointers("fresh");
    let directory = tempfile::tempdir().expect("a temporary directory");
    std::fs::copy(library, directory.path().join("0.so")).expect("a copy");
    let program = c_program_without_frame_pointers("stacks");
    let (mut first, mut second) = (Target::start(&program), Target::start(&program));
    let stays = Target::start(&program);
    let before = unwind_tables();
    let session = Leakbpf::record().pid(first.pid()).pid(second.pid()).pid(stays.pid()).start();
    let without_library = tables_since(&before).len();
    let load = format!("fresh {} 1 10000 5000", directory.path().display());
    first.run(&load);
    second.run(&load);
    wait_for_tables(&before, without_library + 1);
    first.quit(0);
    // The second one has it still.
    second.run(&load.replace("5000", "6000"));
    assert_eq!(tables_since(&before).len(), without_library + 1);
    second.quit(0);
    wait_for_tables(&before, without_library);
    let profile = session.stop();
    let site = profile.site_of_size(second.pid(), 6000);
    assert!(site.is_complete() && site.has_function("fresh_second"), "{}", site.describe());
}

/// Tables come and go in the background.
fn wait_for_tables(before: &BTreeMap<u32, u64>, wanted: usize) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let count = tables_since(before).len();
        if count == wanted {
            return;
        }
        assert!(Instant::now() < deadline, "{count} tables where {wanted} are needed");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

#[test]
fn a_table_beyond_the_limit_is_left_out_counted_and_the_rest_is_used() {
    const LIMIT: u64 = 64 << 10;
    let library = c_library_without_frame_pointers("fresh");
    let directory = tempfile::tempdir().expect("a temporary directory");
    std::fs::copy(library, directory.path().join("0.so")).expect("a copy");
    let mut target = Target::start(&c_program_without_frame_pointers("stacks"));
    let before = unwind_tables();
    let session =
        Leakbpf::record().pid(target.pid()).argument("--max-tables").argument("64KiB").start();
    let tables = tables_since(&before);
    // Those of the program, the loader and the vDSO; libc's has some 200 KiB.
    assert_eq!(tables.len(), 3, "{tables:?}");
    assert!(tables.values().sum::<u64>() < LIMIT, "{tables:?}");
    target.run(&format!("fresh {} 1 10000 5000", directory.path().display()));
    target.run("chain 1001");
    let profile = session.stop();
    assert!(profile.losses["unwind_tables_full"] > 0, "{:?}", profile.losses);
    // Through the program, whose table came first.
    let functions = profile.site_of_size(target.pid(), 1001).functions();
    assert!(functions.starts_with(&["innermost", "with_huge_frame"]), "{functions:?}");
}
