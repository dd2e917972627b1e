//! Programs under load: each started in one way, loaded in one way and measured in one way.

mod memcached;
mod nginx;
mod postgres;
mod redis;
mod worker;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::control_group::ControlGroup;

pub use memcached::load_until;

/// A program and the load that it is put under.
pub struct Workload {
    /// For `--only`.
    pub name: &'static str,
    /// For the tables.
    pub title: &'static str,
    /// What its work is counted in.
    pub unit: &'static str,
    pub kind: Kind,
    pub shape: Shape,
    begin: fn(&Place) -> Result<Box<dyn Load>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing but calls of the allocator.
    Loop,
    /// Requests come from outside.
    Server,
    /// Works on its own.
    Job,
}

/// What a tool must be able to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// One process that lives as long as the measurement.
    OneProcess,
    /// Several, all of which live as long.
    SeveralProcesses,
    /// Processes come and go.
    Forks,
}

/// All of them, in the order of the tables.
pub const ALL: [&Workload; 10] = [
    &worker::PAIR,
    &worker::PAIR2,
    &redis::REDIS,
    &redis::PIPELINED,
    &memcached::MEMCACHED,
    &nginx::NGINX,
    &postgres::SELECT,
    &postgres::DEFAULT,
    &worker::PYTHON,
    &worker::COMPILE,
];

/// What is done to a program when it is started.
#[derive(Debug, Clone, Default)]
pub struct Dress {
    /// Words before the program's own.
    pub wrapper: Vec<String>,
    pub environment: Vec<(String, String)>,
    /// `LD_PRELOAD`, copied to where the program may read it.
    pub preload: Option<PathBuf>,
}

/// Something that makes a running program work.
pub trait Load: Send {
    /// Loads it for about that long, at least one unit.
    fn run(&mut self, span: Duration) -> Result<Work>;

    /// Which kind of work comes next, where there are several.
    fn choose(&mut self, _kind: usize) {}
}

/// What was done.
pub struct Work {
    pub units: f64,
    /// Of a unit, where the loader tells it.
    pub p99_us: Option<f64>,
}

/// A measured stretch of a load.
#[derive(Debug, Clone, Copy)]
pub struct Slice {
    pub units: f64,
    pub seconds: f64,
    /// User and system time of all the program's processes.
    pub cpu_seconds: f64,
    pub p99_us: Option<f64>,
}

impl Slice {
    pub fn cpu_us_per_unit(&self) -> f64 {
        self.cpu_seconds * 1e6 / self.units
    }

    pub fn units_per_second(&self) -> f64 {
        self.units / self.seconds
    }
}

/// Where a workload starts its program: files, control group, processor.
pub struct Place {
    group: ControlGroup,
    folder: PathBuf,
    dress: Dress,
}

impl Place {
    /// The command line with what it is to be started with.
    fn dressed(&self, words: &[&str]) -> Vec<String> {
        let mut line = Vec::new();
        let mut environment = self.dress.environment.clone();
        if let Some(library) = &self.dress.preload {
            environment.push(("LD_PRELOAD".to_owned(), library.display().to_string()));
        }
        if !environment.is_empty() {
            line.push("env".to_owned());
            line.extend(environment.iter().map(|(name, value)| format!("{name}={value}")));
        }
        line.extend(self.dress.wrapper.iter().cloned());
        line.extend(words.iter().map(|&word| word.to_owned()));
        line
    }

    /// A command in the group, on the processor of the measured program.
    fn command(&self, words: &[String]) -> Command {
        let mut line = pinned(Side::Program);
        line.extend(words.iter().cloned());
        let mut command = self.group.command(&line);
        command.current_dir(&self.folder).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Starts a server, and waits until it answers.
    fn serve(&self, words: &[String], answers: impl Fn() -> bool) -> Result<()> {
        let mut command = self.command(words);
        let mut child = command.spawn().with_context(|| format!("cannot start {words:?}"))?;
        // Valgrind takes its time.
        const PATIENCE: Duration = Duration::from_secs(60);
        let begin = Instant::now();
        while !answers() {
            if let Some(status) = child.try_wait()? {
                eprintln!("{} ended with {status}", words.join(" "));
                bail!("the server ended with {status}");
            }
            if begin.elapsed() > PATIENCE {
                eprintln!("{} does not answer", words.join(" "));
                bail!("the server does not answer");
            }
            thread::sleep(Duration::from_millis(20));
        }
        reap(child);
        Ok(())
    }
}

/// Waits for a server's end, whenever that is: nobody should see a process that is gone.
fn reap(mut child: Child) {
    thread::spawn(move || {
        let _ = child.wait();
    });
}

/// A running program with its load.
pub struct Running {
    load: Box<dyn Load>,
    place: Place,
}

impl Running {
    /// Starts it and warms it up.
    pub fn start(workload: &Workload, dress: &Dress) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        // Socket paths are limited to 107 bytes, and servers drop their rights: not below the
        // workspace.
        let folder =
            std::env::temp_dir().join(format!("leakbpf-bench-{}-{number}", std::process::id()));
        fs::create_dir(&folder).with_context(|| format!("create {}", folder.display()))?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777))?;
        let mut dress = dress.clone();
        if let Some(library) = &dress.preload {
            let copy = folder.join(library.file_name().context("a library's name")?);
            fs::copy(library, &copy).with_context(|| format!("copy {}", library.display()))?;
            dress.preload = Some(copy);
        }
        for (_, value) in &mut dress.environment {
            *value = value.replace(FOLDER, &folder.display().to_string());
        }
        let place = Place { group: ControlGroup::new(workload.name)?, folder, dress };
        let load = (workload.begin)(&place).with_context(|| format!("start {}", workload.name));
        let mut running = Self { load: load?, place };
        running.load.run(Duration::from_secs(1))?;
        Ok(running)
    }

    pub fn group(&self) -> &ControlGroup {
        &self.place.group
    }

    /// Which kind of work comes next, where the load has several.
    pub fn choose(&mut self, kind: usize) {
        self.load.choose(kind);
    }

    /// User and system time of all its processes so far.
    pub fn cpu_seconds(&self) -> Result<f64> {
        self.place.group.cpu_seconds()
    }

    pub fn measure(&mut self, span: Duration) -> Result<Slice> {
        let cpu_before = self.cpu_seconds()?;
        let begin = Instant::now();
        let work = self.load.run(span)?;
        let seconds = begin.elapsed().as_secs_f64();
        let cpu_seconds = self.cpu_seconds()? - cpu_before;
        Ok(Slice { units: work.units, seconds, cpu_seconds, p99_us: work.p99_us })
    }

    /// Runs `work` while the load goes on for at least `span`.
    pub fn under_load<T>(
        &mut self,
        span: Duration,
        work: impl FnOnce(&ControlGroup) -> Result<T>,
    ) -> Result<T> {
        let (load, group) = (&mut self.load, &self.place.group);
        thread::scope(|scope| {
            let loader = scope.spawn(move || load.run(span));
            let result = work(group);
            match loader.join() {
                Ok(loaded) => loaded.context("the load")?,
                Err(_) => bail!("the loader panicked"),
            };
            result
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.group.end();
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("cannot remove {}: {error}", self.folder.display());
        }
    }
}

/// Stands for the program's own folder in the values of [`Dress::environment`].
pub const FOLDER: &str = "{folder}";

enum Side {
    Program,
    Loader,
}

/// The words that keep a command on the processor of its side: load and program then do not take
/// each other's time. Nothing on a machine with one.
fn pinned(side: Side) -> Vec<String> {
    if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        return Vec::new();
    }
    let processor = match side {
        Side::Program => "0",
        Side::Loader => "1",
    };
    ["taskset", "-c", processor].map(str::to_owned).to_vec()
}

/// A loader's command, on its own processor.
fn loader(program: &str) -> Command {
    let mut words = pinned(Side::Loader);
    words.push(program.to_owned());
    let mut words = words.into_iter();
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words);
    command
}

/// Rounded up: some loaders know whole seconds only.
fn whole_seconds(span: Duration) -> String {
    (span.as_millis().div_ceil(1000).max(1)).to_string()
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
