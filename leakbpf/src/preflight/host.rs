//! What this machine and the agent's rights on it allow.

use std::io;
use std::path::PathBuf;

use super::hazards::SECCOMP_STOPS_RETURN_PROBES;
use super::kernel_version::KernelVersion;
use super::tracepoint::TracepointFormat;
use super::{Check, Verdict};

/// The oldest release that gives probes a number of their own (`bpf_get_attach_cookie`,
/// 7adfc6c9b315, v5.15).
pub const OLDEST_KERNEL: KernelVersion = KernelVersion::new(5, 15, 0);

/// The oldest release whose page fault programs can use maps that take their memory as they need it
/// (96da3f7d489d, v6.1).
const OLDEST_KERNEL_FOR_PAGES: KernelVersion = KernelVersion::new(6, 1, 0);

/// `PROC_PID_INIT_INO` and `PROC_USER_INIT_INO` of the kernel's include/linux/proc_ns.h.
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";
const INITIAL_USER_NAMESPACE: &str = "user:[4026531837]";

/// Tracepoints that a session attaches to, with the fields that it reads.
pub const TRACEPOINTS: [(&str, &[&str]); 3] = [
    ("task/task_newtask", &["pid", "clone_flags"]),
    ("sched/sched_process_exec", &["pid", "old_pid"]),
    ("sched/sched_process_exit", &["pid"]),
];

/// Bits of `CapEff`, from capabilities(7).
const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// The host as the kernel describes it; texts are as read, without the line's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// `uname -r`.
    pub kernel_release: String,
    /// `std::env::consts::ARCH` of the agent.
    pub architecture: String,
    pub effective_uid: u32,
    /// `CapEff` of the agent.
    pub effective_capabilities: u64,
    /// Target of `/proc/self/ns/pid`.
    pub pid_namespace: Option<String>,
    /// Target of `/proc/self/ns/user`.
    pub user_namespace: Option<String>,
    /// Whether the `bpf` system call exists.
    pub has_bpf: bool,
    /// Whether `/sys/kernel/btf/vmlinux` exists.
    pub has_btf: bool,
    /// Whether that BTF knows `bpf_get_attach_cookie`; looked up only below [`OLDEST_KERNEL`].
    pub btf_has_attach_cookie: bool,
    /// `/sys/bus/event_source/devices/uprobe/type`.
    pub uprobe_event_type: Option<u32>,
    /// `/proc/sys/kernel/perf_event_paranoid`.
    pub perf_event_paranoid: Option<i32>,
    /// `/sys/kernel/security/lockdown`: `[none] integrity confidentiality`.
    pub lockdown: Option<String>,
    /// Contents of the format files of [`TRACEPOINTS`], or why they could not be read.
    pub tracepoints: Vec<(&'static str, Result<Vec<u8>, UnreadFile>)>,
    pub seccomp_and_return_probes: SeccompAndReturnProbes,
}

/// A file that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct UnreadFile {
    pub path: PathBuf,
    pub reason: io::ErrorKind,
}

/// Whether [`SECCOMP_STOPS_RETURN_PROBES`] is real here, as the kernel itself answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SeccompAndReturnProbes {
    /// Filters do not see the system call, or there is none.
    Safe,
    /// A filter does see it.
    Crash,
    /// It could not be tried; the release number has to do.
    Untried,
}

impl HostFacts {
    pub fn version(&self) -> Option<KernelVersion> {
        KernelVersion::parse(&self.kernel_release)
    }

    /// Whether return probes crash processes under a seccomp filter on this kernel.
    pub fn seccomp_crashes_return_probes(&self) -> bool {
        match self.seccomp_and_return_probes {
            SeccompAndReturnProbes::Safe => false,
            SeccompAndReturnProbes::Crash => true,
            SeccompAndReturnProbes::Untried => {
                self.version().is_some_and(|version| SECCOMP_STOPS_RETURN_PROBES.affects(version))
            }
        }
    }

    fn has_capability(&self, bit: u32) -> bool {
        self.effective_capabilities >> bit & 1 == 1
    }
}

/// Everything about the host, gravest reasons first.
pub fn judge(host: &HostFacts) -> Vec<Check> {
    let mut checks = vec![
        architecture(host),
        kernel(host),
        rights(host),
        namespace(host),
        bpf(host),
        uprobes(host),
        lockdown(host),
        btf(host),
    ];
    checks.extend(host.tracepoints.iter().map(|(name, contents)| tracepoint(name, contents)));
    checks.push(seccomp(host));
    let pages = page_faults(host);
    checks.push(match pages.verdict {
        Verdict::Fail => Check { verdict: Verdict::Warn, ..pages },
        _ => pages,
    });
    checks
}

/// For probes that every process gets, now or later: what kills some may come to any.
pub fn judge_for_shared_probes(host: &HostFacts) -> Vec<Check> {
    let mut checks = judge(host);
    if host.seccomp_crashes_return_probes() {
        let hazard = &SECCOMP_STOPS_RETURN_PROBES;
        checks.push(Check::fail(
            "seccomp",
            format!(
                "on kernel {} {} ({}), and services of the machine may have filters",
                host.kernel_release, hazard.consequence, hazard.source
            ),
            "watch single processes (-p, --name, --cgroup) without --shared-probes, or update the \
             kernel to 6.12.14, 6.13.3, 6.14 or later",
        ));
    }
    checks
}

/// What matters to the mode `pages`, which places no probes.
pub fn judge_for_pages(host: &HostFacts) -> Vec<Check> {
    let mut checks = vec![
        architecture(host),
        rights(host),
        namespace(host),
        bpf(host),
        page_faults(host),
        lockdown(host),
    ];
    checks.extend(host.tracepoints.iter().map(|(name, contents)| tracepoint(name, contents)));
    checks
}

fn page_faults(host: &HostFacts) -> Check {
    const NAME: &str = "page faults";
    if host.perf_event_paranoid.is_none() {
        return Check::fail(
            NAME,
            "the kernel has no perf events, which --mode pages needs",
            "use a kernel with CONFIG_PERF_EVENTS",
        );
    }
    if host.version().is_some_and(|version| version < OLDEST_KERNEL_FOR_PAGES) {
        let release = &host.kernel_release;
        return Check::fail(
            NAME,
            format!("{release} is older than {OLDEST_KERNEL_FOR_PAGES}, which --mode pages needs"),
            format!("use a kernel from {OLDEST_KERNEL_FOR_PAGES} on, or --mode exact"),
        );
    }
    if !host.has_btf {
        return Check::fail(
            NAME,
            "/sys/kernel/btf/vmlinux is missing, which --mode pages needs",
            "use a kernel with CONFIG_DEBUG_INFO_BTF, or --mode exact",
        );
    }
    Check::ok(NAME, "--mode pages can work")
}

fn architecture(host: &HostFacts) -> Check {
    match host.architecture.as_str() {
        "x86_64" => Check::ok("architecture", "x86_64"),
        other => Check::fail("architecture", other, "only x86_64 is supported so far"),
    }
}

fn kernel(host: &HostFacts) -> Check {
    let release = &host.kernel_release;
    match host.version() {
        Some(version) if version >= OLDEST_KERNEL => Check::ok("kernel", release),
        _ if host.btf_has_attach_cookie => {
            Check::ok("kernel", format!("{release}, with attach cookies carried back"))
        }
        Some(_) => Check::fail(
            "kernel",
            format!("{release} is older than {OLDEST_KERNEL}: probes cannot carry attach cookies"),
            format!("use a kernel from {OLDEST_KERNEL} on"),
        ),
        None => Check::warn(
            "kernel",
            format!("release {release:?} is not understood"),
            format!("make sure that it is {OLDEST_KERNEL} or newer"),
        ),
    }
}

fn rights(host: &HostFacts) -> Check {
    const NAME: &str = "rights";
    // CAP_SYS_ADMIN includes the two that were split from it in 5.8.
    let admin = host.has_capability(CAP_SYS_ADMIN);
    let missing: Vec<&str> = [
        ("CAP_BPF", admin || host.has_capability(CAP_BPF)),
        ("CAP_PERFMON", admin || host.has_capability(CAP_PERFMON)),
        ("CAP_SYS_PTRACE", host.has_capability(CAP_SYS_PTRACE)),
    ]
    .into_iter()
    .filter_map(|(name, held)| (!held).then_some(name))
    .collect();
    let uid = host.effective_uid;
    if !missing.is_empty() {
        let remedy = if uid == 0 {
            "in a container, add these capabilities (or use --privileged)"
        } else {
            "run `sudo leakbpf …`"
        };
        return Check::fail(NAME, format!("uid {uid} without {}", missing.join(", ")), remedy);
    }
    if host.user_namespace.as_deref().is_some_and(|namespace| namespace != INITIAL_USER_NAMESPACE) {
        return Check::fail(
            NAME,
            "root only inside a user namespace, where BPF is not allowed",
            "run it as root of the host",
        );
    }
    if !admin {
        return Check::warn(
            NAME,
            format!(
                "uid {uid} without CAP_SYS_ADMIN: mapped files that were deleted cannot be read"
            ),
            "run `sudo leakbpf …`, or add CAP_SYS_ADMIN",
        );
    }
    Check::ok(NAME, format!("uid {uid} with all capabilities that are needed"))
}

fn namespace(host: &HostFacts) -> Check {
    const NAME: &str = "pid namespace";
    match host.pid_namespace.as_deref() {
        Some(INITIAL_PID_NAMESPACE) => Check::ok(NAME, "the host's"),
        found => Check::fail(
            NAME,
            format!(
                "not the host's ({}): process ids mean something else to the kernel",
                found.unwrap_or("unknown")
            ),
            "start the container with --pid=host (Kubernetes: hostPID: true)",
        ),
    }
}

fn bpf(host: &HostFacts) -> Check {
    if host.has_bpf {
        Check::ok("bpf", "the system call exists")
    } else {
        Check::fail(
            "bpf",
            "the system call does not exist or is filtered",
            "use a kernel with CONFIG_BPF_SYSCALL; in a container, lift the seccomp profile",
        )
    }
}

fn uprobes(host: &HostFacts) -> Check {
    const NAME: &str = "uprobes";
    let paranoid = host.perf_event_paranoid;
    match (host.uprobe_event_type, paranoid) {
        (Some(kind), Some(level)) => {
            Check::ok(NAME, format!("perf event type {kind}, perf_event_paranoid {level}"))
        }
        (_, None) => Check::fail(
            NAME,
            "the kernel has no perf events",
            "use a kernel with CONFIG_PERF_EVENTS",
        ),
        (None, _) => Check::fail(
            NAME,
            "/sys/bus/event_source/devices/uprobe is missing",
            "mount /sys, or use a kernel with CONFIG_UPROBE_EVENTS",
        ),
    }
}

fn lockdown(host: &HostFacts) -> Check {
    const NAME: &str = "lockdown";
    match host.lockdown.as_deref() {
        Some(modes) if modes.contains("[confidentiality]") => Check::fail(
            NAME,
            "confidentiality: BPF programs may not read memory",
            "boot with lockdown=integrity, or without Secure Boot's lockdown",
        ),
        Some(modes) => Check::ok(NAME, modes),
        None => Check::ok(NAME, "not in use"),
    }
}

fn btf(host: &HostFacts) -> Check {
    if host.has_btf {
        Check::ok("btf", "/sys/kernel/btf/vmlinux")
    } else {
        Check::warn(
            "btf",
            "/sys/kernel/btf/vmlinux is missing: anonymous mappings are not counted",
            "use a kernel with CONFIG_DEBUG_INFO_BTF",
        )
    }
}

fn tracepoint(name: &'static str, contents: &Result<Vec<u8>, UnreadFile>) -> Check {
    let bytes = match contents {
        Ok(bytes) => bytes,
        Err(error) => {
            let remedy = match error.reason {
                io::ErrorKind::PermissionDenied => "run `sudo leakbpf …`",
                _ => "run `mount -t tracefs tracefs /sys/kernel/tracing`",
            };
            return Check::fail(name, error.to_string(), remedy);
        }
    };
    let needed = TRACEPOINTS
        .iter()
        .find_map(|(known, fields)| (*known == name).then_some(*fields))
        .unwrap_or_default();
    let format = TracepointFormat::parse(bytes);
    let found = format.and_then(|format| {
        let places: Result<Vec<String>, _> = needed
            .iter()
            .map(|field| Ok(format!("{field} at {}", format.field(field)?.offset_bytes)))
            .collect();
        places
    });
    match found {
        Ok(places) => Check::ok(name, places.join(", ")),
        Err(error) => Check::fail(
            name,
            error.to_string(),
            "this kernel is not supported: report its format file",
        ),
    }
}

fn seccomp(host: &HostFacts) -> Check {
    let hazard = &SECCOMP_STOPS_RETURN_PROBES;
    if host.seccomp_crashes_return_probes() {
        Check {
            verdict: Verdict::Warn,
            ..Check::warn(
                hazard.name,
                format!("{} on this kernel ({})", hazard.consequence, hazard.source),
                "do not trace processes that install a filter later; update the kernel",
            )
        }
    } else {
        Check::ok(hazard.name, "safe")
    }
}

#[cfg(test)]
#[path = "host_tests.rs"]
pub(super) mod tests;
