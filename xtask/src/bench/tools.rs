//! The tools that are compared: how each gets at a program.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::agent::{Agent, Tracer};
use super::control_group::ControlGroup;
use super::workloads::{Dress, FOLDER, Kind, Shape, Workload};
use crate::shell;

const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    Nothing,
    LeakbpfPages,
    LeakbpfSample,
    LeakbpfExact,
    EmptyUprobes,
    Bpftrace,
    Memleak,
    Jemalloc,
    JemallocProfile,
    Tcmalloc,
    TcmallocProfile,
    Heaptrack,
    Valgrind,
}

/// In the order of the tables.
pub const ALL: [Tool; 13] = [
    Tool::Nothing,
    Tool::LeakbpfPages,
    Tool::LeakbpfSample,
    Tool::LeakbpfExact,
    Tool::EmptyUprobes,
    Tool::Bpftrace,
    Tool::Memleak,
    Tool::Jemalloc,
    Tool::JemallocProfile,
    Tool::Tcmalloc,
    Tool::TcmallocProfile,
    Tool::Heaptrack,
    Tool::Valgrind,
];

/// How a tool gets at a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// To a running one.
    Attach,
    /// The program must be started with it.
    Start,
    /// Not at all, because.
    Never(&'static str),
}

impl Tool {
    pub fn title(self) -> &'static str {
        match self {
            Self::Nothing => "untraced",
            Self::LeakbpfPages => "leakbpf `--mode pages`",
            Self::LeakbpfSample => "leakbpf `--mode sample`",
            Self::LeakbpfExact => "leakbpf `--mode exact`",
            Self::EmptyUprobes => "uprobes at the first instructions, empty programs",
            Self::Bpftrace => "bpftrace, counting `malloc` only",
            Self::Memleak => "bcc memleak",
            Self::Jemalloc => "on jemalloc, not profiled",
            Self::JemallocProfile => "jemalloc's profiler, every 512 KiB",
            Self::Tcmalloc => "on tcmalloc, not profiled",
            Self::TcmallocProfile => "tcmalloc's heap profiler",
            Self::Heaptrack => "heaptrack",
            Self::Valgrind => "valgrind",
        }
    }

    pub fn way(self, workload: &Workload) -> Way {
        let one_process = workload.shape == Shape::OneProcess;
        match self {
            Self::Nothing | Self::LeakbpfPages | Self::LeakbpfSample | Self::LeakbpfExact => {
                Way::Attach
            }
            Self::EmptyUprobes | Self::Bpftrace | Self::Memleak if one_process => Way::Attach,
            Self::EmptyUprobes | Self::Bpftrace | Self::Memleak => {
                Way::Never("one process only, without its children")
            }
            Self::Jemalloc | Self::JemallocProfile | Self::Tcmalloc | Self::TcmallocProfile => {
                Way::Start
            }
            Self::Heaptrack if workload.kind == Kind::Server && !one_process => {
                Way::Never("does not record forked children")
            }
            Self::Heaptrack => Way::Start,
            Self::Valgrind if one_process => Way::Start,
            Self::Valgrind => Way::Never("too slow"),
        }
    }

    /// How the program is started for it.
    pub fn dress(self) -> Dress {
        let library = |name: &str| Some(Path::new(LIBRARIES).join(name));
        let variable = |name: &str, value: &str| [(name.to_owned(), value.to_owned())].to_vec();
        match self {
            Self::Jemalloc => Dress { preload: library("libjemalloc.so.2"), ..Dress::default() },
            Self::JemallocProfile => Dress {
                preload: library("libjemalloc.so.2"),
                environment: variable("MALLOC_CONF", "prof:true,lg_prof_sample:19"),
                ..Dress::default()
            },
            Self::Tcmalloc => Dress { preload: library("libtcmalloc.so.4"), ..Dress::default() },
            Self::TcmallocProfile => Dress {
                preload: library("libtcmalloc.so.4"),
                environment: variable("HEAPPROFILE", &format!("{FOLDER}/profile")),
                ..Dress::default()
            },
            // Without its shell script, whose compressor would be counted as the program's.
            Self::Heaptrack => Dress {
                preload: Some(PathBuf::from("/usr/lib/heaptrack/libheaptrack_preload.so")),
                environment: variable("DUMP_HEAPTRACK_OUTPUT", &format!("{FOLDER}/heaptrack")),
                ..Dress::default()
            },
            Self::Valgrind => Dress {
                wrapper: ["valgrind", "-q"].map(str::to_owned).to_vec(),
                ..Dress::default()
            },
            _ => Dress::default(),
        }
    }

    /// Attaches to what runs in the group; nothing for tools that a program is started with.
    pub fn attach(self, program: &ControlGroup) -> Result<Attached> {
        let leakbpf = |mode: &str| {
            let agent = Agent::attach_to_group(Tracer::Record, program, &["--mode", mode])?;
            Attached::new(agent.pid(), Process::Leakbpf(agent))
        };
        match self {
            Self::LeakbpfPages => leakbpf("pages"),
            Self::LeakbpfSample => leakbpf("sample"),
            Self::LeakbpfExact => leakbpf("exact"),
            Self::EmptyUprobes => {
                let agent = Agent::attach(Tracer::Naive, only_process(program)?, &[])?;
                Attached::new(agent.pid(), Process::Leakbpf(agent))
            }
            Self::Bpftrace => {
                let pid = only_process(program)?;
                let script = format!("uprobe:{}:malloc {{ @ = count(); }}", allocator(pid)?);
                let mut command = Command::new("bpftrace");
                command.args(["-p", &pid.to_string(), "-e", &script]);
                other(&mut command, "Attaching")
            }
            Self::Memleak => {
                let pid = only_process(program)?;
                let mut command = Command::new("memleak-bpfcc");
                command.args(["-p", &pid.to_string(), "-O", &allocator(pid)?, "5"]);
                other(&mut command, "Attaching")
            }
            _ => Ok(Attached { process: None }),
        }
    }
}

/// What was attached, until it is stopped.
pub struct Attached {
    process: Option<(Process, ControlGroup)>,
}

enum Process {
    Leakbpf(Agent),
    Other(Child),
}

impl Attached {
    fn new(pid: u32, process: Process) -> Result<Self> {
        let group = ControlGroup::new("agent")?;
        group.add(pid)?;
        Ok(Self { process: Some((process, group)) })
    }

    /// leakbpf with these arguments.
    pub fn leakbpf(program: &ControlGroup, arguments: &[&str]) -> Result<Self> {
        let agent = Agent::attach_to_group(Tracer::Record, program, arguments)?;
        Self::new(agent.pid(), Process::Leakbpf(agent))
    }

    /// The tool's own time since it was attached; `None` where there is no process of its own.
    pub fn cpu_seconds(&self) -> Result<Option<f64>> {
        self.process.as_ref().map(|(_, group)| group.cpu_seconds()).transpose()
    }

    pub fn stop(self) -> Result<()> {
        let Some((process, group)) = self.process else {
            return Ok(());
        };
        match process {
            Process::Leakbpf(agent) => {
                agent.stop()?;
            }
            Process::Other(mut child) => {
                group.end();
                child.wait()?;
            }
        }
        Ok(())
    }
}

/// Starts a tool that says so when it attaches.
fn other(command: &mut Command, says: &str) -> Result<Attached> {
    /// From that line until its probes are there.
    const ATTACHING: Duration = Duration::from_millis(1500);
    const PATIENCE: Duration = Duration::from_secs(30);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
    let attached_pid = child.id();
    let (sender, lines) = mpsc::channel();
    let stderr = sender.clone();
    let (output, complaints) = (child.stdout.take(), child.stderr.take());
    // Both are read to their ends, so that the tool never waits for a full pipe.
    thread::spawn(move || forward(output, &sender));
    thread::spawn(move || forward(complaints, &stderr));
    let attached = Attached::new(attached_pid, Process::Other(child));
    let mut said = Vec::new();
    loop {
        match lines.recv_timeout(PATIENCE) {
            Ok(line) if line.contains(says) => {
                thread::sleep(ATTACHING);
                return attached;
            }
            Ok(line) => said.push(line),
            Err(_) => {
                attached?.stop()?;
                // One line of a traceback's many.
                let is_reason = |line: &&String| line.contains("nable to") || line.contains("rror");
                let reason = said.iter().find(is_reason).or(said.first());
                bail!("{}", reason.map_or("did not say why it does not attach", String::as_str));
            }
        }
    }
}

fn forward(stream: Option<impl std::io::Read>, to: &mpsc::Sender<String>) {
    let Some(stream) = stream else {
        return;
    };
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        let _ = to.send(line);
    }
}

fn only_process(group: &ControlGroup) -> Result<u32> {
    match group.pids()?.as_slice() {
        [pid] => Ok(*pid),
        pids => bail!("{} processes where one was expected", pids.len()),
    }
}

/// The library whose `malloc` the process calls.
fn allocator(pid: u32) -> Result<String> {
    let path = format!("/proc/{pid}/maps");
    let maps = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    ["/libjemalloc.so", "/libtcmalloc", "/libc.so"]
        .iter()
        .find_map(|name| {
            let line = maps.lines().find(|line| line.contains(name))?;
            Some(line.split_whitespace().last()?.to_owned())
        })
        .with_context(|| format!("{path} names no allocator"))
}

/// Which versions were compared, for the line above a table.
pub fn versions() -> String {
    let said = |program: &str, arguments: &[&str]| {
        shell::output(Command::new(program).args(arguments)).unwrap_or_default()
    };
    let package = |name: &str| {
        let version = said("dpkg-query", &["-W", "-f=${Version}", name]);
        format!("{name} {}", if version.is_empty() { "not installed" } else { &version })
    };
    let packages = [
        "bpftrace",
        "bpfcc-tools",
        "libjemalloc2",
        "libgoogle-perftools4",
        "heaptrack",
        "valgrind",
        "redis-server",
        "memcached",
        "nginx-light",
        "postgresql-15",
        "python3",
        "gcc-12",
    ];
    format!("Debian's {}.", packages.map(package).join(", "))
}
