use std::fs;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::process::status::{Stat, Status};

/// A C program in a folder of its own, deleted on drop. `cc` is what rustc links with.
pub(in crate::process) struct Program {
    folder: tempfile::TempDir,
}

impl Program {
    pub(in crate::process) fn compile(source: &str, flags: &[&str]) -> Self {
        Self::compile_with("cc", source, flags)
    }

    fn compile_with(compiler: &str, source: &str, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("program.c");
        fs::write(&file, source).expect("source");
        let output = Command::new(compiler)
            .args(["-O1", "-o"])
            .arg(folder.path().join("program"))
            .arg(&file)
            .args(flags)
            .output()
            .expect("a C compiler");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { folder }
    }

    pub(in crate::process) fn path(&self) -> PathBuf {
        self.folder.path().join("program")
    }
}

type Launched<R> = Result<(LaunchedProgram, R), LaunchError<String>>;

fn run<R>(program: &Path, arguments: &[&Path], on_ready: impl FnOnce(Pid) -> R) -> Launched<R> {
    let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
    launch(program.as_os_str(), &arguments, |pid| Ok(on_ready(pid)))
}

/// Runs `program FILE`, where it writes what happens, and returns what had happened at `on_ready`,
/// whether a library was mapped then, what happened in all, and the exit code.
fn observe(program: &Path) -> (String, bool, String, u8) {
    let mut log = tempfile::NamedTempFile::new().expect("a file");
    let path = log.path().to_path_buf();
    let (mut child, (before, has_library)) = run(program, &[&path], |pid| {
        let before = fs::read_to_string(&path).expect("the log");
        let maps = Maps::of(pid).expect("maps");
        // The program, its loader and the C library.
        (before, maps.executable_files().len() >= 3)
    })
    .expect("a start");
    let code = exit_code(child.wait().expect("the end"));
    assert_eq!(exit_code(child.wait().expect("the end")), code, "a second wait tells the same");
    let mut after = String::new();
    log.rewind().expect("seek");
    log.read_to_string(&mut after).expect("the log");
    (before, has_library, after, code)
}

/// Constructors get argc, argv and envp on glibc, not on musl: hence /proc/self/cmdline.
const CONSTRUCTOR: &str = r#"
    #include <fcntl.h>
    #include <string.h>
    #include <unistd.h>
    static void say(const char *text) {
        char line[8192];
        int fd = open("/proc/self/cmdline", O_RDONLY);
        int length = read(fd, line, sizeof line - 1);
        close(fd);
        line[length < 0 ? 0 : length] = 0;
        fd = open(line + strlen(line) + 1, O_WRONLY | O_APPEND);
        write(fd, text, strlen(text));
        close(fd);
    }
    __attribute__((constructor)) static void first(void) { say("constructor "); }
    int main(void) { say("main"); return 42; }
"#;

#[test]
fn a_dynamic_program_is_held_with_all_libraries_and_before_any_constructor() {
    for flags in [&["-pie", "-fPIE"][..], &["-no-pie", "-fno-pie"], &["-Wl,-z,now"]] {
        let program = Program::compile(CONSTRUCTOR, flags);
        let (before, has_library, after, code) = observe(&program.path());
        assert_eq!(before, "", "{flags:?}");
        assert!(has_library, "{flags:?}");
        assert_eq!(after, "constructor main", "{flags:?}");
        assert_eq!(code, 42, "{flags:?}");
    }
}

#[test]
fn a_librarys_constructor_has_not_run_either() {
    let library = CONSTRUCTOR.replace("int main(void) { say(\"main\"); return 42; }", "int used;");
    let library = Program::compile(&library, &["-shared", "-fPIC"]);
    let path = library.path();
    let flags = [path.to_str().expect("text"), "-Wl,--no-as-needed"];
    let program = Program::compile("extern int used; int main(void) { return used; }", &flags);
    let (before, has_library, after, code) = observe(&program.path());
    assert_eq!((before.as_str(), has_library, after.as_str(), code), ("", true, "constructor ", 0));
}

#[test]
#[ignore = "needs musl-gcc; `cargo xtask test --privileged` installs it and runs this"]
fn a_musl_program_is_held_before_any_constructor() {
    let program = Program::compile_with("musl-gcc", CONSTRUCTOR, &[]);
    let (before, _, after, code) = observe(&program.path());
    assert_eq!((before.as_str(), after.as_str(), code), ("", "constructor main", 42));
    let program = Program::compile_with("musl-gcc", CONSTRUCTOR, &["-static"]);
    let (before, _, after, code) = observe(&program.path());
    assert_eq!((before.as_str(), after.as_str(), code), ("", "constructor main", 42));
}

/// Needs no C library, which not every machine has in its static form.
const FREESTANDING: &str =
    "void _start(void) { __asm__ volatile(\"mov $60, %eax; mov $7, %edi; syscall\"); }";

#[test]
fn a_static_program_is_held_before_its_first_instruction() {
    for flags in [["-static", "-no-pie"], ["-static-pie", "-fPIE"]] {
        let program = Program::compile(FREESTANDING, &[&["-nostdlib"], &flags[..]].concat());
        let path = program.path();
        let (mut child, mapped) = run(&path, &[], |pid| {
            let maps = Maps::of(pid).expect("maps");
            maps.executable_files().len()
        })
        .expect("a start");
        assert_eq!(mapped, 1, "{flags:?}");
        assert_eq!(exit_code(child.wait().expect("the end")), 7, "{flags:?}");
    }
}

#[test]
fn a_script_runs_with_its_interpreter() {
    let folder = tempfile::tempdir().expect("a folder");
    let script = folder.path().join("script");
    // By another process: a descriptor of ours, open for writing, could leak into a child that
    // another test forks, and make the script "busy".
    let write = r#"printf '#!/bin/sh\nexit $(($1 + 1))\n' > "$0" && chmod 755 "$0""#;
    let written = Command::new("sh").args(["-c", write]).arg(&script).status();
    assert!(written.expect("sh").success());
    let (mut child, ()) = run(&script, &[Path::new("4")], |_| ()).expect("a start");
    assert_eq!(exit_code(child.wait().expect("the end")), 5);
}

#[test]
fn a_name_is_looked_up_in_the_path() {
    let (mut child, pid) = run(Path::new("true"), &[], |pid| pid).expect("a start");
    assert_eq!(child.pid(), pid);
    assert_eq!(exit_code(child.wait().expect("the end")), 0);
}

#[test]
fn what_cannot_be_executed_is_told_apart_as_shells_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let plain = folder.path().join("plain");
    fs::write(&plain, "text").expect("a file");
    for (path, code) in [
        (Path::new("/no/such/program"), EXIT_NOT_FOUND),
        (Path::new("no-such-program-anywhere"), EXIT_NOT_FOUND),
        (&plain, EXIT_NOT_EXECUTABLE),
        (folder.path(), EXIT_NOT_EXECUTABLE),
    ] {
        let Err(error) = run(path, &[], |_| ()) else { panic!("{} ran", path.display()) };
        assert_eq!(error.exit_code(), Some(code), "{error}");
        assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
    }
}

#[test]
fn a_program_whose_library_is_missing_ends_with_the_loaders_status() {
    let folder = tempfile::tempdir().expect("a folder");
    let library = folder.path().join("libgone.so");
    let built = Program::compile("int used;", &["-shared", "-fPIC"]);
    fs::copy(built.path(), &library).expect("copy");
    let program = Program::compile(
        "extern int used; int main(void) { return used; }",
        &[library.to_str().expect("text")],
    );
    fs::remove_file(&library).expect("remove");
    let Err(error) = run(&program.path(), &[], |_| ()) else { panic!("it ran") };
    assert!(matches!(error, LaunchError::EndedEarly { .. }), "{error}");
    assert_eq!(error.exit_code(), Some(127));
}

#[test]
fn a_program_that_a_signal_ends_gives_128_and_its_number() {
    let program = Program::compile("int main(void) { __builtin_trap(); }", &[]);
    let (mut child, ()) = run(&program.path(), &[], |_| ()).expect("a start");
    assert_eq!(exit_code(child.wait().expect("the end")), 128 + libc::SIGILL as u8);
}

#[test]
fn a_real_time_signal_is_delivered_while_it_is_held_and_reported_at_the_end() {
    let real_time = libc::SIGRTMIN() + 3;
    let (mut child, ()) = run(Path::new("cat"), &[], |pid| {
        // SAFETY: a system call on two integers.
        assert_eq!(unsafe { libc::kill(pid.0 as i32, real_time) }, 0);
    })
    .expect("a start");
    assert_eq!(i32::from(exit_code(child.wait().expect("the end"))), 128 + real_time);
}

/// Answers SIGUSR1 and SIGTERM in turn; says how signals were handed to it.
const SIGNALS: &str = r#"
    #include <fcntl.h>
    #include <signal.h>
    #include <unistd.h>
    int main(int argc, char **argv) {
        struct sigaction action;
        sigset_t set;
        int signal;
        sigprocmask(SIG_SETMASK, 0, &set);
        for (int number = 1; number < 32; number++)
            if (sigismember(&set, number)) return 100 + number;
        sigaction(SIGPIPE, 0, &action);
        if (action.sa_handler != SIG_DFL) return 99;
        sigemptyset(&set);
        sigaddset(&set, SIGUSR1);
        sigaddset(&set, SIGTERM);
        sigprocmask(SIG_BLOCK, &set, 0);
        creat(argv[1], 0600);
        sigwait(&set, &signal);
        if (signal != SIGUSR1) return 1;
        sigwait(&set, &signal);
        return signal == SIGTERM ? 33 : 2;
    }
"#;

#[test]
fn signals_are_passed_on_and_arrive_unblocked() {
    let program = Program::compile(SIGNALS, &[]);
    let folder = tempfile::tempdir().expect("a folder");
    let listening = folder.path().join("listening");
    let blocked = SigSet::all();
    let mut before = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&blocked), Some(&mut before)).expect("mask");
    let (mut child, ()) = run(&program.path(), &[&listening], |_| ()).expect("a start");
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None).expect("mask");
    // Until it blocks them to wait for them, signals would end it.
    while !listening.exists() {
        assert_eq!(child.try_wait().expect("wait"), None);
        std::thread::yield_now();
    }
    child.forward(Signal::SIGUSR1).expect("passed on");
    child.forward(Signal::SIGTERM).expect("passed on");
    assert_eq!(exit_code(child.wait().expect("the end")), 33);
    child.forward(Signal::SIGTERM).expect("nobody is there, nobody is hit");
}

#[test]
fn a_failure_while_it_is_held_kills_it() {
    let mut held = None;
    let result: Launched<()> = launch("cat".as_ref(), &[], |pid| {
        held = Some(pid);
        assert_eq!(Stat::of(pid).expect("stat").state, 't');
        Err("no probes today".into())
    });
    let Err(error) = result else { panic!("it ran") };
    assert_eq!(error.to_string(), "no probes today");
    assert!(matches!(Stat::of(held.expect("held")), Err(ProcessError::Gone(_))));
}

#[test]
fn a_signal_that_arrives_while_it_is_held_is_not_lost() {
    let (mut child, ()) = run(Path::new("cat"), &[], |pid| {
        kill(nix::unistd::Pid::from_raw(pid.0 as i32), Signal::SIGTERM).expect("signal");
    })
    .expect("a start");
    assert_eq!(exit_code(child.wait().expect("the end")), 128 + libc::SIGTERM as u8);
}

#[test]
fn it_is_not_traced_any_more_when_it_runs() {
    let mut log = tempfile::NamedTempFile::new().expect("a file");
    let script = format!("grep TracerPid /proc/$$/status > {}", log.path().display());
    let (mut child, tgid) = run(Path::new("sh"), &[Path::new("-c"), Path::new(&script)], |pid| {
        Status::of(pid).expect("status").tgid
    })
    .expect("a start");
    assert_eq!(tgid, Some(child.pid().0));
    assert_eq!(exit_code(child.wait().expect("the end")), 0);
    let mut text = String::new();
    log.flush().expect("flush");
    log.read_to_string(&mut text).expect("the log");
    assert_eq!(text.split_whitespace().last(), Some("0"));
}
