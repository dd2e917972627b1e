//! The agent under test: `leakbpf record`, started, waited for, stopped.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{env, fs};

use crate::command::leakbpf_command;
use crate::profile::Profile;
use crate::{monotonic_ns, require_root};

/// Longest that attaching or the final report may take.
const PATIENCE: Duration = Duration::from_secs(150);

/// How `leakbpf record` is to be started.
#[derive(Debug, Default)]
pub struct Leakbpf {
    arguments: Vec<String>,
    command: Vec<String>,
    output: Option<PathBuf>,
    environment: Vec<(String, OsString)>,
    caches: Option<PathBuf>,
}

impl Leakbpf {
    pub fn record() -> Self {
        require_root();
        Self::default()
    }

    pub fn pid(self, pid: u32) -> Self {
        self.argument("-p").argument(pid.to_string())
    }

    pub fn argument(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// `-- CMD ARGS…`.
    pub fn command<S: AsRef<OsStr>>(mut self, command: impl IntoIterator<Item = S>) -> Self {
        self.command =
            command.into_iter().map(|word| word.as_ref().to_string_lossy().into_owned()).collect();
        self
    }

    /// Writes there, in the format of the name's ending, instead of a report for the test.
    pub fn output(mut self, path: &Path) -> Self {
        self.output = Some(path.to_owned());
        self
    }

    pub fn environment(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    /// Keeps names in that directory, instead of looking all up anew.
    pub fn keep_names_in(mut self, caches: &Path) -> Self {
        self.caches = Some(caches.to_owned());
        self
    }

    /// Starts it and waits until all probes are in place.
    pub fn start(self) -> Session {
        let session = self.spawn();
        session.wait_until_attached();
        session
    }

    /// Starts it and does not wait. What holds its probes can be chosen for all tests
    /// (`LEAKBPF_LINKS`: `many` or `single`).
    pub fn spawn(mut self) -> Session {
        if let Ok(links) = env::var("LEAKBPF_LINKS")
            && !self.arguments.iter().any(|argument| argument.starts_with("--links"))
        {
            self.arguments.push(format!("--links={links}"));
        }
        let directory = tempfile::tempdir().expect("a temporary directory");
        let output = self.output.unwrap_or_else(|| directory.path().join("report.json"));
        let mut command = leakbpf_command();
        command
            .arg("record")
            .args(&self.arguments)
            .arg("--blocks")
            .arg("-o")
            .arg(&output)
            .env_remove("DEBUGINFOD_URLS")
            .envs(self.environment)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        match &self.caches {
            Some(caches) => command.env("XDG_CACHE_HOME", caches),
            None => command.arg("--no-cache"),
        };
        // Tests compare with what happened, block by block, unless they are about another mode.
        let mode_given =
            self.arguments.iter().any(|it| it.starts_with("--mode") || it == "--max-overhead");
        if !mode_given {
            command.args(["--mode", "exact"]);
        }
        if !self.command.is_empty() {
            command.arg("--").args(&self.command);
        }
        let started_ns = monotonic_ns();
        let mut child = command.spawn().expect("leakbpf starts");

        let said = Arc::new(Mutex::new(String::new()));
        let (sender, attached) = channel();
        let stderr = child.stderr.take().expect("a piped stderr");
        let heard = Arc::clone(&said);
        let reader = thread::spawn(move || {
            for line in BufReader::new(stderr).lines() {
                let time_ns = monotonic_ns();
                let Ok(line) = line else { break };
                if line.contains("attached to") {
                    // Nobody waits for it when the test has what it needs.
                    let _ = sender.send(time_ns);
                }
                let mut said = heard.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                said.push_str(&line);
                said.push('\n');
            }
        });
        let stdout = child.stdout.take().expect("a piped stdout");
        let printed = Arc::new(Mutex::new(String::new()));
        let into = Arc::clone(&printed);
        let printer = thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let mut printed = into.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                printed.push_str(&line);
                printed.push('\n');
            }
        });
        Session {
            child,
            started_ns,
            attached,
            attached_ns: OnceLock::new(),
            said,
            printed,
            readers: vec![reader, printer],
            output,
            _directory: directory,
        }
    }
}

/// A running `leakbpf record`.
#[derive(Debug)]
pub struct Session {
    child: Child,
    /// Before it was started.
    pub started_ns: u64,
    attached: Receiver<u64>,
    attached_ns: OnceLock<u64>,
    said: Arc<Mutex<String>>,
    printed: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
    output: PathBuf,
    _directory: tempfile::TempDir,
}

impl Session {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// When it had said that every probe is in place (`CLOCK_MONOTONIC`).
    pub fn attached_ns(&self) -> u64 {
        self.wait_until_attached();
        *self.attached_ns.get().expect("it is attached")
    }

    fn wait_until_attached(&self) {
        self.attached_ns.get_or_init(|| {
            self.attached.recv_timeout(PATIENCE).unwrap_or_else(|_| {
                panic!("leakbpf never said that it is attached; it said:\n{}", self.stderr())
            })
        });
    }

    /// Waits until it has written that to stderr.
    pub fn wait_until_stderr_has(&self, wanted: &str) {
        self.wait_until(wanted, Self::stderr);
    }

    /// Waits until it, or the command that it started, has written that to stdout.
    pub fn wait_until_stdout_has(&self, wanted: &str) {
        self.wait_until(wanted, Self::stdout);
    }

    fn wait_until(&self, wanted: &str, text: impl Fn(&Self) -> String) {
        let deadline = Instant::now() + PATIENCE;
        while !text(self).contains(wanted) {
            assert!(
                Instant::now() < deadline,
                "{wanted:?} never came; leakbpf said:\n{}",
                self.stderr()
            );
            thread::park_timeout(Duration::from_millis(2));
        }
    }

    /// All that it wrote to stderr so far.
    pub fn stderr(&self) -> String {
        self.said.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// All that it wrote to stdout so far.
    pub fn stdout(&self) -> String {
        self.printed.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Processor time that it has used.
    pub fn cpu_time(&self) -> Duration {
        let schedstat = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("schedstat"));
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid())).expect("it runs");
        let spent = threads.flatten().filter_map(|thread| {
            let text = schedstat(thread).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(spent.sum())
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: the child was not waited for, so its process id is still its own.
        let result = unsafe { libc::kill(self.pid() as i32, signal) };
        assert_eq!(result, 0, "kill leakbpf: {}", std::io::Error::last_os_error());
    }

    /// Ctrl-C, and its final report.
    pub fn stop(mut self) -> Profile {
        self.signal(libc::SIGINT);
        self.report()
    }

    /// Its final report, when it ends by itself.
    pub fn report(&mut self) -> Profile {
        let status = self.wait();
        assert!(status.success(), "leakbpf ended with {status}; it said:\n{}", self.stderr());
        self.parse_output()
    }

    /// The report that it wrote, whatever its exit status.
    pub fn parse_output(&self) -> Profile {
        let json = fs::read_to_string(&self.output).unwrap_or_else(|error| {
            panic!("leakbpf wrote no report ({error}); it said:\n{}", self.stderr())
        });
        Profile::parse(&json)
    }

    /// Its exit status; ends the test when it takes too long.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            assert!(Instant::now() < deadline, "leakbpf does not end; it said:\n{}", self.stderr());
            // There is no wait with a deadline for a child.
            thread::park_timeout(Duration::from_millis(2));
        };
        for reader in self.readers.drain(..) {
            reader.join().expect("the reader ends with its stream");
        }
        status
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
