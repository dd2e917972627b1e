//! A program under test: started, talked to in lines, killed when the test ends.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::build::Program;
use crate::{Books, StormLog, c_library};

/// Longest that a command of a target may take; far beyond what any needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running program that answers commands (`tests/targets/target.h`).
#[derive(Debug)]
pub struct Target {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    books: PathBuf,
    oracle: PathBuf,
    _directory: tempfile::TempDir,
}

impl Target {
    /// Starts the program and waits until it is ready.
    pub fn start(program: &Program) -> Self {
        Self::start_with(program, &[], &[])
    }

    /// As [`Target::start`], with the preloaded oracle before the allocator.
    pub fn start_with_oracle(program: &Program) -> Self {
        Self::start_with(program, &[c_library("oracle")], &[])
    }

    /// As [`Target::start`], with libraries that are loaded before the program's own, and
    /// arguments.
    pub fn start_with(program: &Program, preload: &[PathBuf], arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let books = directory.path().join("books");
        let oracle = directory.path().join("oracle");
        let mut command = Command::new(&program.path);
        command
            .args(arguments)
            .env("TRUTH_FILE", &books)
            .env("ORACLE_FILE", &oracle)
            // Otherwise Python's small objects come from arenas that no allocator sees.
            .env("PYTHONMALLOC", "malloc")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let preload: Vec<PathBuf> = preload.iter().chain(&program.preload).cloned().collect();
        if !preload.is_empty() {
            command.env("LD_PRELOAD", joined(&preload));
        }
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.path.display()));
        let input = child.stdin.take();
        let output = child.stdout.take().expect("a piped output");
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines() {
                let Ok(line) = line else { break };
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let target = Self { child, input, lines, books, oracle, _directory: directory };
        target.expect("ready");
        target
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs a scenario to its end, and returns the lines that it said before `done`.
    pub fn run(&mut self, command: &str) -> Vec<String> {
        self.begin(command);
        self.end(command)
    }

    /// Starts a scenario without waiting for its end.
    pub fn begin(&mut self, command: &str) {
        let input = self.input.as_mut().expect("the target still listens");
        writeln!(input, "{command}").unwrap_or_else(|error| {
            panic!("the target died before `{command}` ({error}): {:?}", self.child.try_wait())
        });
    }

    /// Waits for the end of what [`Target::begin`] started.
    pub fn end(&mut self, command: &str) -> Vec<String> {
        let mut said = Vec::new();
        loop {
            match self.line() {
                line if line == "done" => return said,
                line if line.starts_with("failed") => panic!("target in `{command}` {line}"),
                line => said.push(line),
            }
        }
    }

    /// The next line that the target says.
    pub fn line(&self) -> String {
        self.lines
            .recv_timeout(PATIENCE)
            .unwrap_or_else(|_| panic!("target {} said nothing, or died", self.pid()))
    }

    fn expect(&self, wanted: &str) {
        let line = self.line();
        assert_eq!(line, wanted, "target {}", self.pid());
    }

    /// What the program itself knows to be outstanding. Only while it waits for a command.
    pub fn books(&self) -> Books {
        Books::read(&self.books)
    }

    /// The same of a child that it forked, after the child closed its accounts.
    pub fn books_of(&self, pid: u32) -> Books {
        Books::read(&per_process(&self.books, pid))
    }

    /// What the preloaded oracle knows of a process.
    pub fn oracle_books_of(&self, pid: u32) -> Books {
        Books::read(&per_process(&self.oracle, pid))
    }

    pub fn oracle_books(&self) -> Books {
        self.oracle_books_of(self.pid())
    }

    /// The time-stamped log of a roaming storm (`tests/targets/threads.c`).
    pub fn storm_log(&self) -> StormLog {
        let mut name = self.books.as_os_str().to_owned();
        name.push(".log");
        StormLog::read(Path::new(&name))
    }

    /// Waits until the program sleeps: an interpreter still allocates after it has printed its
    /// answer, until it waits for the next line.
    pub fn wait_until_asleep(&self) {
        const LOOKS: usize = 5;
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut asleep = 0;
        while asleep < LOOKS {
            assert!(Instant::now() < deadline, "{} never sleeps", self.pid());
            std::thread::sleep(Duration::from_millis(4));
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))
                .expect("the program lives");
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            asleep = if state == Some('S') { asleep + 1 } else { 0 };
        }
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: the child was not waited for, so its process id is still its own.
        let result = unsafe { libc::kill(self.pid() as i32, signal) };
        assert_eq!(result, 0, "kill {}: {}", self.pid(), std::io::Error::last_os_error());
    }

    /// Ends the program with an exit code of the test's choice and returns its status.
    pub fn quit(&mut self, code: i32) -> ExitStatus {
        self.begin(&format!("quit {code}"));
        self.wait()
    }

    /// Waits for the program's end.
    pub fn wait(&mut self) -> ExitStatus {
        self.input = None;
        self.child.wait().expect("a child can be waited for")
    }

    /// Whether it is still running.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn per_process(path: &Path, pid: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{pid}"));
    name.into()
}

fn joined(paths: &[PathBuf]) -> OsString {
    let names: Vec<&std::ffi::OsStr> = paths.iter().map(|path| path.as_os_str()).collect();
    names.join(std::ffi::OsStr::new(":"))
}
