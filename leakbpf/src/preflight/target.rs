//! What one process allows.

use super::hazards::{RETURN_PROBES_MISS_SHADOW_STACK, SECCOMP_STOPS_RETURN_PROBES};
use super::host::HostFacts;
use super::{Check, Verdict};
use crate::process::status::{ElfKind, SeccompMode};

/// `EM_X86_64`.
const MACHINE_X86_64: u16 = 62;

/// A process as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetFacts {
    pub pid: u32,
    pub comm: String,
    pub kernel_thread: bool,
    pub zombie: bool,
    /// Of the executable; `None` when it is no ELF file or there is none.
    pub elf: Option<ElfKind>,
    /// The strictest of all its threads.
    pub seccomp: SeccompMode,
    /// Of any of its threads.
    pub shadow_stack: bool,
    /// Its executable holds Go text (`.note.go.buildid`).
    pub go: bool,
}

/// Everything about one process, for the exact mode (which needs return probes).
pub fn judge(target: &TargetFacts, host: &HostFacts) -> Vec<Check> {
    let memory = memory(target);
    if target.kernel_thread || target.zombie {
        return vec![memory];
    }
    vec![memory, executable(target), seccomp(target, host), shadow_stack(target, host), go(target)]
}

/// A process that gets probes only because all do.
pub fn judge_bystander(target: &TargetFacts, host: &HostFacts) -> Vec<Check> {
    let mut check = shadow_stack(target, host);
    if check.verdict == Verdict::Fail {
        check.found = format!("process {} ({}): {}", target.pid, target.comm, check.found);
        check.remedy = Some(
            "update the kernel to 6.11 or later, or watch single processes (-p, --name, --cgroup) \
             without --shared-probes"
                .to_owned(),
        );
    }
    vec![check]
}

/// The same for the mode `pages`, which changes nothing in the process.
pub fn judge_for_pages(target: &TargetFacts) -> Vec<Check> {
    let memory = memory(target);
    if target.kernel_thread || target.zombie {
        return vec![memory];
    }
    vec![memory, executable(target)]
}

fn memory(target: &TargetFacts) -> Check {
    const NAME: &str = "process";
    let who = format!("{} ({})", target.pid, target.comm);
    if target.kernel_thread {
        let found = format!("{who} is a kernel thread: it has no memory of its own");
        Check::fail(NAME, found, "choose another: `ps -ef` shows kernel threads in [brackets]")
    } else if target.zombie {
        let found = format!("{who} is a zombie: its memory is gone");
        Check::fail(NAME, found, "start it again under `leakbpf record -- …`")
    } else {
        Check::ok(NAME, who)
    }
}

fn executable(target: &TargetFacts) -> Check {
    const NAME: &str = "executable";
    match target.elf {
        Some(ElfKind { bits: 64, machine: MACHINE_X86_64 }) => Check::ok(NAME, "64-bit x86-64"),
        Some(ElfKind { bits: 32, .. }) => {
            Check::fail(NAME, "a 32-bit program", "only 64-bit programs can be traced")
        }
        Some(ElfKind { machine, .. }) => Check::fail(
            NAME,
            format!("made for another machine (ELF machine {machine})"),
            "programs that run under an emulator cannot be traced",
        ),
        None => Check::fail(NAME, "no ELF file", "only ELF programs can be traced"),
    }
}

fn seccomp(target: &TargetFacts, host: &HostFacts) -> Check {
    let hazard = &SECCOMP_STOPS_RETURN_PROBES;
    if target.seccomp == SeccompMode::Off {
        return Check::ok("seccomp", "no filter");
    }
    if !host.seccomp_crashes_return_probes() {
        return Check::ok("seccomp", "a filter, which this kernel's return probes pass");
    }
    let release = &host.kernel_release;
    Check::fail(
        "seccomp",
        format!("a filter, and on kernel {release} {} ({})", hazard.consequence, hazard.source),
        "update the kernel to 6.12.14, 6.13.3, 6.14 or later",
    )
}

fn shadow_stack(target: &TargetFacts, host: &HostFacts) -> Check {
    const NAME: &str = "shadow stack";
    let hazard = &RETURN_PROBES_MISS_SHADOW_STACK;
    let affected = host.version().is_some_and(|version| hazard.affects(version));
    match (target.shadow_stack, affected) {
        (false, _) => Check::ok(NAME, "none"),
        (true, false) => Check::ok(NAME, "in use, which this kernel's return probes respect"),
        (true, true) => Check::fail(
            NAME,
            format!(
                "in use, and on kernel {} {} ({})",
                host.kernel_release, hazard.consequence, hazard.source
            ),
            "update the kernel to 6.11 or later, or start the program with GLIBC_TUNABLES=glibc.cpu.hwcaps=-SHSTK",
        ),
    }
}

fn go(target: &TargetFacts) -> Check {
    if target.go {
        Check::warn(
            "go",
            "Go moves its stacks: no return probe is placed in its executable, so Go's own memory is not counted",
            "use --mode pages, or Go's own heap profile; memory from C libraries is counted",
        )
    } else {
        Check::ok("go", "no Go text")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::host::SeccompAndReturnProbes;
    use crate::preflight::host::tests::good_host;

    fn good_target() -> TargetFacts {
        TargetFacts {
            pid: 7,
            comm: "server".into(),
            kernel_thread: false,
            zombie: false,
            elf: Some(ElfKind { bits: 64, machine: MACHINE_X86_64 }),
            seccomp: SeccompMode::Off,
            shadow_stack: false,
            go: false,
        }
    }

    fn complaints(
        change: impl FnOnce(&mut TargetFacts, &mut HostFacts),
    ) -> Vec<(&'static str, Verdict)> {
        let (mut target, mut host) = (good_target(), good_host());
        change(&mut target, &mut host);
        judge(&target, &host)
            .into_iter()
            .filter(|check| check.verdict != Verdict::Ok)
            .map(|check| (check.name, check.verdict))
            .collect()
    }

    #[test]
    fn an_ordinary_process_has_no_complaint() {
        assert_eq!(complaints(|_, _| {}), []);
    }

    #[test]
    fn processes_without_memory_are_refused_for_that_alone() {
        let expected = [("process", Verdict::Fail)];
        assert_eq!(
            complaints(|target, _| {
                target.zombie = true;
                target.elf = None;
            }),
            expected
        );
        let change = |target: &mut TargetFacts, _: &mut HostFacts| {
            target.kernel_thread = true;
            target.elf = None;
        };
        assert_eq!(complaints(change), expected);
    }

    #[test]
    fn foreign_and_32_bit_programs_are_refused() {
        for elf in [
            None,
            Some(ElfKind { bits: 32, machine: 3 }),
            // x32: the 64-bit machine with 32-bit pointers.
            Some(ElfKind { bits: 32, machine: MACHINE_X86_64 }),
            Some(ElfKind { bits: 64, machine: 183 }),
        ] {
            let found = complaints(|target, _| target.elf = elf);
            assert_eq!(found, [("executable", Verdict::Fail)], "{elf:?}");
        }
    }

    #[test]
    fn a_filter_is_refused_only_where_it_crashes_the_process() {
        for mode in [SeccompMode::Strict, SeccompMode::Filter] {
            assert_eq!(complaints(|target, _| target.seccomp = mode), []);
            let found = complaints(|target, host| {
                target.seccomp = mode;
                host.seccomp_and_return_probes = SeccompAndReturnProbes::Crash;
            });
            assert_eq!(found, [("seccomp", Verdict::Fail)]);
        }
        let without_filter = complaints(|_, host| {
            host.seccomp_and_return_probes = SeccompAndReturnProbes::Crash;
        });
        assert_eq!(without_filter, []);
    }

    #[test]
    fn a_bystander_matters_only_where_its_shadow_stack_does() {
        let mut host = good_host();
        let target = TargetFacts { shadow_stack: true, elf: None, ..good_target() };
        let failed = |target: &TargetFacts, host: &HostFacts| {
            judge_bystander(target, host).iter().any(|check| check.verdict == Verdict::Fail)
        };
        assert!(!failed(&target, &host));
        host.kernel_release = "6.8.0".to_owned();
        assert!(failed(&target, &host));
        assert!(!failed(&good_target(), &host));
        let check = &judge_bystander(&target, &host)[0];
        assert!(check.found.starts_with("process 7 (server): "), "{}", check.found);
    }

    #[test]
    fn looking_at_pages_needs_no_probes_to_be_safe() {
        let mut target = good_target();
        target.seccomp = SeccompMode::Filter;
        target.shadow_stack = true;
        let verdicts = |target: &TargetFacts| -> Vec<Verdict> {
            judge_for_pages(target).into_iter().map(|check| check.verdict).collect()
        };
        assert_eq!(verdicts(&target), [Verdict::Ok, Verdict::Ok]);
        target.elf = Some(ElfKind { bits: 32, machine: 3 });
        assert!(verdicts(&target).contains(&Verdict::Fail));
        target.zombie = true;
        assert_eq!(verdicts(&target), [Verdict::Fail]);
    }

    #[test]
    fn a_shadow_stack_is_refused_before_6_11() {
        let on = |release: &'static str| {
            complaints(move |target, host| {
                target.shadow_stack = true;
                host.kernel_release = release.into();
            })
        };
        assert_eq!(on("6.10.5"), [("shadow stack", Verdict::Fail)]);
        assert_eq!(on("6.11.0"), []);
    }

    #[test]
    fn go_text_is_a_warning() {
        assert_eq!(complaints(|target, _| target.go = true), [("go", Verdict::Warn)]);
    }
}
