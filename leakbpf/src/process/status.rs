//! What a process is: `/proc/PID/stat`, `status`, `exe`, `cmdline` and `cgroup`.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::{Pid, ProcessError, classify, read_proc};

/// `PF_KTHREAD` of the kernel's include/linux/sched.h, as field 9 of `stat` shows it.
const PF_KTHREAD: u64 = 0x0020_0000;

/// The fields of `/proc/PID/stat` that matter here (proc_pid_stat(5) numbers them).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Any 15 bytes that the program chose.
    pub comm: Vec<u8>,
    /// `R`, `S`, `D`, `Z`, `T`, `t`, `X`, `I`.
    pub state: char,
    pub parent: Pid,
    pub kernel_thread: bool,
    /// Clock ticks (`sysconf(_SC_CLK_TCK)` a second).
    pub user_time_ticks: u64,
    pub system_time_ticks: u64,
    /// That have not ended; the first one counts even then.
    pub threads: u64,
    /// Field 22: clock ticks after boot. With the process id it names one process ever.
    pub start_time: u64,
}

impl Stat {
    pub fn of(pid: Pid) -> Result<Self, ProcessError> {
        Self::parse(&read_proc(pid, "stat")?)
            .ok_or_else(|| malformed(pid, "stat", "fewer than 22 fields"))
    }

    /// `None` unless all fields up to 22 are there.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        // The name may hold ") (": its end is the last parenthesis, all later fields are numbers.
        let open = bytes.iter().position(|&byte| byte == b'(')?;
        let close = bytes.iter().rposition(|&byte| byte == b')')?;
        let comm = bytes.get(open + 1..close)?.to_vec();
        let rest = std::str::from_utf8(bytes.get(close + 1..)?).ok()?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        Some(Self {
            comm,
            state: fields.first()?.chars().next()?,
            parent: Pid(u32::try_from(number(4)?).ok()?),
            kernel_thread: number(9)? & PF_KTHREAD != 0,
            user_time_ticks: number(14)?,
            system_time_ticks: number(15)?,
            threads: number(20)?,
            start_time: number(22)?,
        })
    }

    /// Dead, but not yet waited for by its parent: its memory is gone.
    pub fn is_zombie(&self) -> bool {
        self.first_thread_ended() && self.threads <= 1
    }

    /// Whether the thread itself has not ended, whatever the others of its process do.
    pub fn lives(&self) -> bool {
        !self.first_thread_ended()
    }

    /// Whether its only thread sleeps or is stopped. One in `D` may wait for a `vfork` child in its memory.
    fn rests(&self) -> bool {
        self.threads == 1 && matches!(self.state, 'S' | 'T' | 't')
    }

    fn first_thread_ended(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

/// The id below `/proc` that leads to the memory of a process: its own, or, when its first thread
/// has ended before the others (`pthread_exit` in `main`), that of a thread which lives.
pub fn memory_owner(pid: Pid) -> Pid {
    if !Stat::of(pid).is_ok_and(|stat| stat.first_thread_ended() && !stat.is_zombie()) {
        return pid;
    }
    let Ok(threads) = fs::read_dir(pid.proc_path("task")) else {
        return pid;
    };
    threads
        .flatten()
        .filter_map(|thread| thread.file_name().to_str()?.parse().ok().map(Pid))
        .find(|&thread| Stat::of(thread).is_ok_and(|stat| !stat.first_thread_ended()))
        .unwrap_or(pid)
}

/// `Seccomp:` of `/proc/PID/status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum SeccompMode {
    #[default]
    Off,
    Strict,
    Filter,
}

/// The lines of `/proc/PID/status` that matter here; what a kernel does not print is the default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Status {
    /// The process that this is a thread of.
    pub tgid: Option<u32>,
    pub effective_uid: Option<u32>,
    /// Process ids from the reader's pid namespace inwards.
    pub namespace_pids: Vec<u32>,
    pub seccomp: SeccompMode,
    /// `shstk` in `x86_Thread_features`.
    pub shadow_stack: bool,
    /// Highest resident size so far.
    pub peak_resident_bytes: Option<u64>,
    pub anonymous_resident_bytes: Option<u64>,
    /// Bit n is capability n of capabilities(7).
    pub effective_capabilities: u64,
}

impl Status {
    pub fn of(pid: Pid) -> Result<Self, ProcessError> {
        Ok(Self::parse(&read_proc(pid, "status")?))
    }

    pub fn parse(bytes: &[u8]) -> Self {
        let mut status = Self::default();
        // The name's line cannot imitate another: `status` prints its line ends escaped.
        for line in bytes.split(|&byte| byte == b'\n') {
            let Ok(line) = std::str::from_utf8(line) else {
                continue;
            };
            let Some((key, value)) = line.split_once(':') else {
                continue;
            };
            let value = value.trim();
            match key {
                "Tgid" => status.tgid = value.parse().ok(),
                "Uid" => {
                    status.effective_uid =
                        value.split_ascii_whitespace().nth(1).and_then(|uid| uid.parse().ok());
                }
                "NSpid" => {
                    status.namespace_pids =
                        value.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect();
                }
                "Seccomp" => {
                    status.seccomp = match value {
                        "1" => SeccompMode::Strict,
                        "2" => SeccompMode::Filter,
                        _ => SeccompMode::Off,
                    };
                }
                "x86_Thread_features" => {
                    status.shadow_stack =
                        value.split_ascii_whitespace().any(|feature| feature == "shstk");
                }
                "VmHWM" => status.peak_resident_bytes = kibibytes(value),
                "RssAnon" => status.anonymous_resident_bytes = kibibytes(value),
                "CapEff" => {
                    status.effective_capabilities = u64::from_str_radix(value, 16).unwrap_or(0);
                }
                _ => {}
            }
        }
        status
    }
}

/// Of a process whose only thread sleeps or is stopped: how often it has been given a processor. Another
/// number means that it has run.
pub fn rests_since(pid: Pid) -> Option<u64> {
    let stat = Stat::of(pid).ok()?;
    let runs = runs(&read_proc(pid, "schedstat").ok()?)?;
    stat.rests().then_some(runs)
}

/// The last of three numbers; none where the kernel does not count.
fn runs(schedstat: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(schedstat).ok()?;
    text.split_ascii_whitespace().nth(2)?.parse().ok().filter(|&runs| runs > 0)
}

fn kibibytes(value: &str) -> Option<u64> {
    value.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Which process it is, for reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub pid: Pid,
    pub parent: Pid,
    /// As [`Stat::start_time`].
    pub start_time: u64,
    pub comm: String,
    /// As the target's own mount namespace names it; empty where there is none (a kernel thread, a
    /// zombie) or it may not be read.
    pub exe: String,
    /// Arguments separated by spaces; empty when the process has none.
    pub cmdline: String,
    pub cgroup: String,
}

impl Identity {
    pub fn of(pid: Pid) -> Result<Self, ProcessError> {
        let stat = Stat::of(pid)?;
        let or_empty = |read: Result<Vec<u8>, ProcessError>| match read {
            Err(error @ ProcessError::Gone(_)) => Err(error),
            other => Ok(other.unwrap_or_default()),
        };
        let cmdline = or_empty(read_proc(pid, "cmdline"))?;
        let cgroup = or_empty(read_proc(pid, "cgroup"))?;
        let exe = fs::read_link(memory_owner(pid).proc_path("exe")).unwrap_or_default();
        Ok(Self {
            pid,
            parent: stat.parent,
            start_time: stat.start_time,
            comm: String::from_utf8_lossy(&stat.comm).into_owned(),
            exe: exe.to_string_lossy().into_owned(),
            cmdline: join_arguments(&cmdline),
            cgroup: cgroup_path(&String::from_utf8_lossy(&cgroup)),
        })
    }
}

/// Arguments of `/proc/PID/cmdline` (each ended by a zero byte), separated by spaces.
pub fn join_arguments(cmdline: &[u8]) -> String {
    let end = cmdline.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let arguments = cmdline.get(..end).unwrap_or_default();
    String::from_utf8_lossy(arguments).replace('\0', " ")
}

/// The path that says most in `/proc/PID/cgroup`: of the unified hierarchy, else (a machine that
/// still uses version 1) of the memory controller, else systemd's.
pub fn cgroup_path(text: &str) -> String {
    let mut best = (0, "/");
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let rank = match controllers {
            "" => 3,
            "name=systemd" => 1,
            _ if controllers.split(',').any(|controller| controller == "memory") => 2,
            _ => continue,
        };
        if path != "/" && rank > best.0 {
            best = (rank, path);
        }
    }
    best.1.to_owned()
}

/// Word size and instruction set of an ELF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ElfKind {
    /// 32 or 64.
    pub bits: u8,
    /// `e_machine` (62 is x86-64).
    pub machine: u16,
}

impl ElfKind {
    /// Of the executable that the process runs; `None` when it is no ELF file.
    pub fn of(pid: Pid) -> Result<Option<Self>, ProcessError> {
        let path = memory_owner(pid).proc_path("exe");
        let mut header = [0; 20];
        let read = fs::File::open(&path).and_then(|file| {
            use std::os::unix::fs::FileExt;
            file.read_at(&mut header, 0)
        });
        match read {
            Ok(length) => Ok(Self::parse(header.get(..length).unwrap_or_default())),
            Err(error) => Err(classify(pid, path, error)),
        }
    }

    /// From the first 20 bytes of a file.
    pub fn parse(header: &[u8]) -> Option<Self> {
        if !header.starts_with(b"\x7fELF") {
            return None;
        }
        let machine: [u8; 2] = header.get(18..20)?.try_into().ok()?;
        Some(Self {
            bits: match header.get(4)? {
                1 => 32,
                2 => 64,
                _ => return None,
            },
            machine: match header.get(5)? {
                1 => u16::from_le_bytes(machine),
                2 => u16::from_be_bytes(machine),
                _ => return None,
            },
        })
    }
}

/// Name of the executable without its folder; `None` where it may not be read.
pub(super) fn exe_name(pid: Pid) -> Option<Vec<u8>> {
    let exe: PathBuf = fs::read_link(pid.proc_path("exe")).ok()?;
    let name = exe.file_name()?.as_bytes();
    Some(name.strip_suffix(b" (deleted)").unwrap_or(name).to_vec())
}

fn malformed(pid: Pid, entry: &str, reason: &str) -> ProcessError {
    ProcessError::Malformed { path: pid.proc_path(entry), reason: reason.to_owned() }
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
