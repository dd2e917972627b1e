//! A stub in the place of `debuginfod-find`.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::fixture::{
    DWZ_MAIN_SOURCE, DWZ_SHARED_BUILD_ID, DWZ_SHARED_SOURCE, Fixture, build_id_of, run,
};
use super::*;
use crate::symbolize::debuginfod::{Client, FetchError, Patience};

const PATIENCE: Patience =
    Patience { file: Duration::from_secs(20), session: Duration::from_secs(60) };

/// A stripped module without a debug file where one would be looked for, and the address of a
/// function that only the debug file names.
struct Stripped {
    fixture: Fixture,
    hidden: u64,
    debug_file: PathBuf,
}

impl Stripped {
    fn new() -> Stripped {
        let fixture = Fixture::new();
        fixture.compile_c("/lib/fixture.so");
        let (hidden, _) = fixture.symbol("/lib/fixture.so", "hidden");
        fixture.split("/lib/fixture.so", "/elsewhere/fixture.debug", false);
        let debug_file = fixture.real("/elsewhere/fixture.debug");
        Stripped { fixture, hidden, debug_file }
    }

    fn build_id(&self) -> String {
        build_id_of(&self.fixture.real("/lib/fixture.so"))
    }
}

/// A client whose `debuginfod-find` is a shell script. It notes its arguments in `/calls`.
fn client(fixture: &Fixture, script: &str, patience: Patience) -> Client {
    let (calls, source) = (fixture.real("/calls"), fixture.real("/bin/script"));
    let text = format!("#!/bin/sh\necho \"$*\" >> {}\n{script}\n", calls.display());
    fs::write(&source, text).expect("script");
    // By another process: what is open for writing, be it in a child that another test forked at
    // this moment, cannot be executed.
    let program = fixture.real("/bin/debuginfod-find");
    run(std::process::Command::new("install").args(["-m", "755"]).arg(&source).arg(&program));
    let path = program.parent().expect("directory").to_owned();
    let variable = |name: &str| match name {
        "DEBUGINFOD_URLS" => Some(OsString::from("http://127.0.0.1:1/")),
        "PATH" => Some(path.clone().into_os_string()),
        _ => None,
    };
    Client::new(patience, variable).expect("a server is named")
}

fn calls(fixture: &Fixture) -> Vec<String> {
    let calls = fs::read_to_string(fixture.real("/calls")).unwrap_or_default();
    calls.lines().map(str::to_owned).collect()
}

/// Asks for a name, has the client fetch, and asks again; returns the problems.
fn fetched(stripped: &Stripped, client: &mut Client) -> (Vec<Symbol>, Vec<String>) {
    let (mut symbolizer, module) = stripped.fixture.symbolizer("/lib/fixture.so");
    assert!(!symbolizer.wants(client), "nothing was named yet");
    assert!(symbolizer.name(module, stripped.hidden, false).is_empty());
    assert!(symbolizer.wants(client));
    let improved = symbolizer.fetch(client);
    assert!(!symbolizer.wants(client), "each file is asked for once");
    let symbols = symbolizer.name(module, stripped.hidden, false);
    assert_eq!(!symbols.is_empty(), improved == [module]);
    let problems = symbolizer.problems(module).iter().map(ToString::to_string).collect();
    (symbols, problems)
}

#[test]
fn a_fetched_debug_file_names_what_stripping_removed() {
    let stripped = Stripped::new();
    let script = format!("echo {}", stripped.debug_file.display());
    let mut client = client(&stripped.fixture, &script, PATIENCE);
    let (symbols, problems) = fetched(&stripped, &mut client);
    assert_eq!(functions(&symbols), ["hidden"]);
    assert!(symbols[0].line.is_some());
    assert!(problems.is_empty(), "{problems:?}");
    assert_eq!(calls(&stripped.fixture), [format!("debuginfo {}", stripped.build_id())]);

    // Another session of the same client asks no more.
    let (mut symbolizer, module) = stripped.fixture.symbolizer("/lib/fixture.so");
    symbolizer.name(module, stripped.hidden, false);
    assert!(symbolizer.fetch(&mut client).is_empty());
    assert_eq!(calls(&stripped.fixture).len(), 1);
}

#[test]
fn nothing_is_asked_for_where_there_is_debug_information() {
    let stripped = Stripped::new();
    let mut client = client(&stripped.fixture, "exit 1", PATIENCE);
    let id = stripped.build_id();
    let place = format!("/usr/lib/debug/.build-id/{}/{}.debug", &id[..2], &id[2..]);
    fs::rename(&stripped.debug_file, stripped.fixture.real(&place)).expect("moved");
    let (mut symbolizer, module) = stripped.fixture.symbolizer("/lib/fixture.so");
    assert_eq!(functions(&symbolizer.name(module, stripped.hidden, false)), ["hidden"]);
    assert!(!symbolizer.wants(&client));
    assert!(symbolizer.fetch(&mut client).is_empty());
    assert!(calls(&stripped.fixture).is_empty());
}

#[test]
fn without_servers_there_is_no_client() {
    for urls in [None, Some(""), Some("  ")] {
        let variable = |name: &str| match name {
            "DEBUGINFOD_URLS" => urls.map(OsString::from),
            _ => Some(OsString::from("/usr/bin")),
        };
        assert!(Client::new(PATIENCE, variable).is_none());
    }
}

#[test]
fn a_missing_program_is_a_problem_that_says_how_to_mend_it() {
    let stripped = Stripped::new();
    // Relative directories do not count.
    let mut client = Client::new(PATIENCE, |name| {
        let value = if name == "PATH" { "bin:/nonexistent" } else { "http://127.0.0.1:1/" };
        Some(OsString::from(value))
    })
    .expect("a server is named");
    let (symbols, problems) = fetched(&stripped, &mut client);
    assert!(symbols.is_empty());
    assert_eq!(problems.len(), 1);
    assert!(problems[0].contains("install it"), "{problems:?}");
}

#[test]
fn a_file_that_no_server_has_is_one_problem() {
    let stripped = Stripped::new();
    let mut client = client(&stripped.fixture, "echo gone >&2; exit 1", PATIENCE);
    let (symbols, problems) = fetched(&stripped, &mut client);
    assert!(symbols.is_empty());
    assert_eq!(problems.len(), 1);
    assert!(problems[0].contains("/lib/fixture.so") && problems[0].contains("DEBUGINFOD_URLS"));
}

#[test]
fn an_answer_that_is_no_path_is_refused() {
    let other = "head -c 100000 /dev/zero | tr '\\0' x";
    for script in [
        "true",
        "echo relative/path",
        "printf /etc/passwd",
        "printf '/a\\n/b\\n'",
        "echo /nonexistent",
    ] {
        let stripped = Stripped::new();
        let (symbols, problems) =
            fetched(&stripped, &mut client(&stripped.fixture, script, PATIENCE));
        assert!(symbols.is_empty());
        assert!(problems.len() == 1 && problems[0].contains("no file's path"), "{problems:?}");
    }
    // More than the pipe holds: it waits to be read, and is stopped.
    let stripped = Stripped::new();
    let patience = Patience { file: Duration::from_millis(300), ..PATIENCE };
    let (_, problems) = fetched(&stripped, &mut client(&stripped.fixture, other, patience));
    assert!(problems.len() == 1 && problems[0].contains("0.3 s"), "{problems:?}");
}

#[test]
fn an_answer_that_is_no_debug_file_is_refused() {
    let stripped = Stripped::new();
    let (symbols, problems) =
        fetched(&stripped, &mut client(&stripped.fixture, "echo /etc/passwd", PATIENCE));
    assert!(symbols.is_empty());
    assert!(problems.len() == 1 && problems[0].contains("not a 64-bit"), "{problems:?}");
}

#[test]
fn an_answer_with_another_build_id_is_refused() {
    let stripped = Stripped::new();
    stripped.fixture.compile("/src/other.cpp", CPP_SOURCE, "/lib/other.so", &[]);
    let script = format!("echo {}", stripped.fixture.real("/lib/other.so").display());
    let (symbols, problems) = fetched(&stripped, &mut client(&stripped.fixture, &script, PATIENCE));
    assert!(symbols.is_empty());
    assert!(problems.len() == 1 && problems[0].contains("another build id"), "{problems:?}");
}

/// `Z` is a process that nobody has waited for yet.
fn is_running(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| {
        let state = rest.split_whitespace().next();
        state.is_some_and(|state| state != "Z" && state != "X")
    })
}

#[test]
fn a_server_that_hangs_is_not_waited_for_and_nothing_is_left_running() {
    let stripped = Stripped::new();
    let pids = stripped.fixture.real("/pids");
    let script = format!("sleep 1000 & echo $! >> {0}; echo $$ >> {0}; wait", pids.display());
    let patience = Patience { file: Duration::from_millis(500), ..PATIENCE };
    let began = Instant::now();
    let (symbols, problems) = fetched(&stripped, &mut client(&stripped.fixture, &script, patience));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert!(symbols.is_empty());
    assert!(problems.len() == 1 && problems[0].contains("in 0.5 s"), "{problems:?}");
    let pids = fs::read_to_string(pids).expect("it ran");
    assert_eq!(pids.lines().count(), 2);
    // SIGKILL takes effect a moment after it was sent.
    while pids.lines().any(is_running) {
        assert!(began.elapsed() < Duration::from_secs(20), "still running: {pids}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn an_interrupted_wait_ends_with_what_has_come_and_leaves_nothing_running() {
    let fixture = Fixture::new();
    let answer = fixture.real("/answer");
    fs::write(&answer, "").expect("a file");
    let (pids, answer) = (fixture.real("/pids"), answer.display().to_string());
    let script = format!(
        "case $2 in 00*) echo {answer}; exit;; esac\necho $$ >> {}; exec sleep 1000",
        pids.display()
    );
    // Nothing but the interruption ends it.
    let hour = Duration::from_secs(3600);
    let mut client = client(&fixture, &script, Patience { file: hour, session: hour });
    let interrupted = Arc::new(AtomicBool::new(false));
    client.end_with(Arc::clone(&interrupted));
    let seen = pids.clone();
    let interrupter = std::thread::spawn(move || {
        let lines = || fs::read_to_string(&seen).unwrap_or_default().lines().count();
        // The first one was answered when so many others run.
        while lines() < 4 {
            std::thread::sleep(Duration::from_millis(5));
        }
        interrupted.store(true, Ordering::Relaxed);
    });
    let ids: Vec<Vec<u8>> = (0..9).map(|number| vec![number; 20]).collect();
    let answers = client.fetch(&ids);
    interrupter.join().expect("it ends");
    assert_eq!(answers[0].as_ref().expect("answered"), Path::new(&answer));
    assert!(answers[1..].iter().all(|answer| matches!(answer, Err(FetchError::Interrupted))));
    // One at most was started meanwhile.
    let pids = fs::read_to_string(pids).expect("it ran");
    while pids.lines().any(is_running) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(client.fetch(&[vec![99; 20]]).iter().all(|answer| answer.is_err()));
    assert!(calls(&fixture).len() <= 5, "{:?}", calls(&fixture));
}

#[test]
fn a_session_is_as_patient_as_the_program_was_told_to_be() {
    let patience = |text: &str| Patience::of(|_| Some(OsString::from(text)));
    let standard = Patience::default();
    assert_eq!(Patience::of(|_| None), standard);
    for text in ["", "soon", "0", "-3"] {
        assert_eq!(patience(text), standard);
    }
    assert_eq!(patience("3").file, Duration::from_secs(4));
    assert_eq!(patience("3").session, standard.session);
    assert_eq!(patience("600").session, Duration::from_secs(601));
}

#[test]
fn a_session_waits_for_all_files_together_no_longer_than_it_said() {
    let fixture = Fixture::new();
    let session = Duration::from_millis(700);
    let patience = Patience { file: Duration::from_secs(20), session };
    let mut client = client(&fixture, "exec sleep 1000", patience);
    let ids: Vec<Vec<u8>> = (0..9).map(|number| vec![number; 20]).collect();
    let began = Instant::now();
    for ids in ids.chunks(3) {
        for answer in client.fetch(ids) {
            let error = answer.expect_err("it hangs").to_string();
            assert!(error.contains("0.7 s"), "{error}");
        }
    }
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    // Those of the first call; nothing was started when the time was over.
    assert_eq!(calls(&fixture).len(), 3);
}

#[test]
fn a_target_with_thousands_of_files_does_not_bother_the_servers_with_all_of_them() {
    let fixture = Fixture::new();
    let mut client = client(&fixture, "exit 1", PATIENCE);
    let ids: Vec<Vec<u8>> = (0..300u32).map(|number| number.to_le_bytes().to_vec()).collect();
    let (first, rest) = ids.split_at(200);
    assert!(client.fetch(first).iter().all(|answer| answer.is_err()));
    let answers = client.fetch(rest);
    let last = answers.last().and_then(|answer| answer.as_ref().err()).expect("refused");
    assert!(last.to_string().contains("256 files"), "{last}");
    assert_eq!(calls(&fixture).len(), 256);
}

#[test]
fn answers_belong_to_their_questions_though_they_come_in_another_order() {
    let fixture = Fixture::new();
    let script = format!(
        "case $2 in 00*) sleep 0.5;; 03*) exit 1;; esac\ntouch {0}/$2\necho {0}/$2",
        fixture.root().display()
    );
    let mut client = client(&fixture, &script, PATIENCE);
    let ids: Vec<Vec<u8>> = (0..7).map(|number| vec![number; 20]).collect();
    for (id, answer) in ids.iter().zip(client.fetch(&ids)) {
        match answer {
            Ok(path) => assert!(path.ends_with(crate::elf::debug_files::hex(id)), "{path:?}"),
            Err(_) => assert_eq!(id[0], 3),
        }
    }
}

#[test]
fn what_dwz_moved_out_of_a_fetched_file_is_fetched_next() {
    let fixture = Fixture::new();
    let flags = ["-g0", "-nostdlib"];
    let shared_flags = ["-g0", "-nostdlib", DWZ_SHARED_BUILD_ID];
    fixture.compile("/src/shared.s", DWZ_SHARED_SOURCE, "/served/common.dwz", &shared_flags);
    fixture.compile("/src/main.s", DWZ_MAIN_SOURCE, "/lib/main.so", &flags);
    let low = fixture.text("/lib/main.so");
    fixture.split("/lib/main.so", "/served/main.debug", false);
    let script = format!(
        "case $2 in {}) echo {};; 01020304*) echo {};; *) exit 1;; esac",
        build_id_of(&fixture.real("/lib/main.so")),
        fixture.real("/served/main.debug").display(),
        fixture.real("/served/common.dwz").display(),
    );
    let mut client = client(&fixture, &script, PATIENCE);
    let (mut symbolizer, module) = fixture.symbolizer("/lib/main.so");
    assert!(symbolizer.name(module, low + 3, false).is_empty());
    assert_eq!(symbolizer.fetch(&mut client), [module]);
    assert_eq!(functions(&symbolizer.name(module, low + 3, false)), ["from_the_shared_file"]);
    assert!(symbolizer.problems(module).is_empty(), "{:?}", symbolizer.problems(module));
    assert_eq!(calls(&fixture).len(), 2);
}
