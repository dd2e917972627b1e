//! The processes of a measured program, and the processor time of all of them together.
//!
//! A control group counts children that have ended, too, which `/proc` does not: a server that forks
//! for each connection loses most of its time there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::shell;

pub struct ControlGroup {
    folder: PathBuf,
}

/// How long a program may take to end by itself, after it was asked to.
const GRACE: Duration = Duration::from_secs(10);

impl ControlGroup {
    /// An empty one. Each is another one, whatever the name.
    pub fn new(name: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = mount()?.join(format!("leakbpf-bench-{}-{number}-{name}", std::process::id()));
        fs::create_dir(&folder).with_context(|| format!("create {}", folder.display()))?;
        Ok(Self { folder })
    }

    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// A command whose process is in the group from its first instruction on.
    pub fn command(&self, words: &[String]) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", r#"echo $$ > "$0" && exec "$@""#]);
        command.arg(self.folder.join("cgroup.procs")).args(words);
        command
    }

    /// Takes a running process in. What it took so far stays uncounted.
    pub fn add(&self, pid: u32) -> Result<()> {
        let file = self.folder.join("cgroup.procs");
        fs::write(&file, pid.to_string()).with_context(|| format!("write {}", file.display()))
    }

    pub fn pids(&self) -> Result<Vec<u32>> {
        let file = self.folder.join("cgroup.procs");
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// User and system time since the group was made, also of processes that have ended.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let file = self.folder.join("cpu.stat");
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let field = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
        let microseconds: f64 = field
            .and_then(|number| number.parse().ok())
            .with_context(|| format!("{} has no usage_usec", file.display()))?;
        Ok(microseconds / 1e6)
    }

    /// Asks all processes to end as Ctrl-C does, then makes them.
    pub fn end(&self) {
        for pid in self.pids().unwrap_or_default() {
            // One that has ended meanwhile needs no signal.
            let _ = shell::output(Command::new("kill").args(["-INT", &pid.to_string()]));
        }
        let begin = Instant::now();
        while begin.elapsed() < GRACE && self.pids().is_ok_and(|pids| !pids.is_empty()) {
            thread::sleep(Duration::from_millis(10));
        }
        let _ = fs::write(self.folder.join("cgroup.kill"), "1");
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        let _ = fs::write(self.folder.join("cgroup.kill"), "1");
        let begin = Instant::now();
        // Killed processes leave the group a moment later.
        while fs::remove_dir(&self.folder).is_err() && begin.elapsed() < GRACE {
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Of the second version: it counts processor time everywhere, without a controller.
fn mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let mut lines = mounts.lines().map(|line| line.split(' '));
    let folder = lines.find_map(|mut fields| {
        let folder = fields.nth(1)?;
        (fields.next() == Some("cgroup2")).then(|| PathBuf::from(folder))
    });
    folder.context("no cgroup2 is mounted: mount -t cgroup2 none /sys/fs/cgroup")
}
