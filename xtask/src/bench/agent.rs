//! A running leakbpf, seen from outside.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::control_group::ControlGroup;
use crate::shell;

/// What is attached to the measured program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracer {
    /// Empty programs where leakbpf would place its own.
    Floor,
    /// The same, without those that a block needs not that is not chosen.
    UnchosenFloor,
    /// Empty programs at the functions' first instructions.
    Naive,
    /// leakbpf, counting every block.
    Exact,
    /// leakbpf as the arguments say.
    Record,
}

pub struct Agent {
    process: Child,
    /// Start of the process until all probes were placed, if the agent says so.
    pub attach_ms: Option<f64>,
    /// The same, from outside: until the agent said that it is attached.
    pub seen_ms: f64,
    _messages: Receiver<String>,
}

/// Longest that attaching may take.
const PATIENCE: Duration = Duration::from_secs(30);

impl Agent {
    /// Returns once the probes are placed. `arguments` are added to the command line.
    pub fn attach(tracer: Tracer, pid: u32, arguments: &[&str]) -> Result<Self> {
        Self::attach_to(tracer, &["-p", &pid.to_string()], arguments)
    }

    /// To a program with all its processes.
    pub fn attach_to_group(
        tracer: Tracer,
        group: &ControlGroup,
        arguments: &[&str],
    ) -> Result<Self> {
        Self::attach_to(tracer, &["--cgroup", &group.path().to_string_lossy()], arguments)
    }

    fn attach_to(tracer: Tracer, target: &[&str], arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new(binary());
        match tracer {
            Tracer::Floor => command.args(["bench-floor"]),
            Tracer::UnchosenFloor => command.args(["bench-floor", "--sites", "unchosen"]),
            Tracer::Naive => command.args(["bench-floor", "--sites", "first"]),
            Tracer::Exact => {
                command.args(["record", "--no-cache", "--interval", "1h", "--mode", "exact"])
            }
            Tracer::Record => command.args(["record", "--no-cache", "--interval", "1h"]),
        };
        command.args(target).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let begin = Instant::now();
        let mut process = command.spawn().context("cannot start leakbpf")?;
        let stderr = process.stderr.take().context("standard error")?;
        let messages = lines_of(stderr);
        let mut said = Vec::new();
        loop {
            match messages.recv_timeout(PATIENCE.saturating_sub(begin.elapsed())) {
                Ok(line) => {
                    if let Some(end) = line.strip_prefix("leakbpf: attached") {
                        let attach_ms = parse_attached(end);
                        let seen_ms = begin.elapsed().as_secs_f64() * 1e3;
                        return Ok(Self { process, attach_ms, seen_ms, _messages: messages });
                    }
                    said.push(line);
                }
                Err(reason) => {
                    let _ = process.kill();
                    let status = process.wait()?;
                    let what = match reason {
                        RecvTimeoutError::Timeout => "did not attach in time".to_owned(),
                        RecvTimeoutError::Disconnected => format!("ended with {status}"),
                    };
                    bail!("leakbpf {tracer:?} {what}: {}", said.join("; "));
                }
            }
        }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Stops it as Ctrl-C does.
    ///
    /// Returns the time until it had ended, and the most resident memory it ever had, in bytes.
    pub fn stop(mut self) -> Result<(Duration, u64)> {
        let begin = Instant::now();
        let mut peak_bytes = peak_resident_bytes(self.pid());
        shell::output(Command::new("kill").args(["-INT", &self.pid().to_string()]))?;
        loop {
            if let Some(status) = self.process.try_wait()? {
                if !status.success() {
                    bail!("leakbpf ended with {status}");
                }
                return Ok((begin.elapsed(), peak_bytes));
            }
            peak_bytes = peak_bytes.max(peak_resident_bytes(self.pid()));
            if begin.elapsed() > 2 * PATIENCE {
                let _ = self.process.kill();
                bail!("leakbpf does not stop");
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until it ends by itself.
    pub fn finish(mut self, patience: Duration) -> Result<()> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait()? {
                if !status.success() {
                    bail!("leakbpf ended with {status}");
                }
                return Ok(());
            }
            if begin.elapsed() > patience {
                bail!("leakbpf does not end");
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Kernel memory of the BPF maps that the agent has open, in bytes.
    pub fn map_bytes(&self) -> Result<u64> {
        let folder = PathBuf::from(format!("/proc/{}/fdinfo", self.pid()));
        let mut sum = 0;
        for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
            // A file that was closed meanwhile is no map.
            let Ok(text) = fs::read_to_string(entry?.path()) else {
                continue;
            };
            if text.contains("map_type:") {
                sum += field(&text, "memlock:").context("memlock of a BPF map")?;
            }
        }
        Ok(sum)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Ends it when a measurement failed half-way; does nothing after `stop`.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub fn binary() -> PathBuf {
    shell::root().join("target/release/leakbpf")
}

/// 0 when the process has ended.
fn peak_resident_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    field(&status, "VmHWM:").map_or(0, |kib| kib * 1024)
}

/// The number that follows a name at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Milliseconds at the end of `leakbpf: attached to PID 12 … in 34 ms`.
fn parse_attached(line: &str) -> Option<f64> {
    let (_, end) = line.rsplit_once(" in ")?;
    end.trim_end().strip_suffix(" ms")?.parse().ok()
}

fn lines_of(stderr: ChildStderr) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        // Reads on to the end, so that the agent never waits for a full pipe.
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_attach_time_is_read_from_the_agents_message() {
        let line = "leakbpf: attached to PID 7 (sign in 3 ms): 8 functions in 81.5 ms";
        assert_eq!(parse_attached(line), Some(81.5));
        assert_eq!(parse_attached("leakbpf: attached to PID 7: 15 probes"), None);
    }

    #[test]
    fn a_field_is_found_by_its_name() {
        assert_eq!(field("VmPeak:\t 9 kB\nVmHWM:\t  123 kB\n", "VmHWM:"), Some(123));
        assert_eq!(field("", "VmHWM:"), None);
    }
}
