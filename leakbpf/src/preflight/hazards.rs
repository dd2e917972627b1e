//! Kernels on which probes harm the program that they are placed in.
//!
//! Two known ones are absent because leakbpf does nothing that they need:
//! `perf_callchain_user` reads a freed `utask` at a task's exit (fixed by b583ef82b671, v6.13;
//! 6.1.131, 6.6.83 and 6.12.19), but only for the stack helpers of BPF, and stacks are walked by our
//! own code here; and a return probe in Go text, on every kernel, corrupts stacks that Go moves, which
//! is why none is ever placed there.

use super::kernel_version::KernelVersion;

/// A defect and the mainline and stable releases that have it.
#[derive(Debug)]
pub struct Hazard {
    pub name: &'static str,
    /// Releases from the first up to, but not including, the second.
    pub affected: &'static [(KernelVersion, KernelVersion)],
    pub consequence: &'static str,
    /// Commits that brought and removed it.
    pub source: &'static str,
}

impl Hazard {
    /// By the release number alone: a distribution may have repaired its kernel.
    pub fn affects(&self, version: KernelVersion) -> bool {
        self.affected.iter().any(|&(first, repaired)| first <= version && version < repaired)
    }
}

/// Since 6.11 a return probe on x86-64 ends in a system call, `uretprobe`, which filters that do not
/// know it (Docker's, systemd's) refuse: the program crashes where the probed function returns.
/// 6.11.y ended without the repair; 6.14-rc1, the only 6.14 without it, counts as repaired.
pub const SECCOMP_STOPS_RETURN_PROBES: Hazard = Hazard {
    name: "return probes under seccomp",
    affected: &[
        (KernelVersion::new(6, 11, 0), KernelVersion::new(6, 12, 14)),
        (KernelVersion::new(6, 13, 0), KernelVersion::new(6, 13, 3)),
    ],
    consequence: "a return probe crashes a process that has a seccomp filter",
    source: "ff474a78cef5 (v6.11) brought it; cf6cb56ef244 (v6.14-rc2, 6.13.3, 6.12.14) removed it",
};

/// A return probe exchanges the return address on the stack but, before 6.11, not its copy on the
/// shadow stack: the next `ret` faults. User-space shadow stacks exist since 6.6.
pub const RETURN_PROBES_MISS_SHADOW_STACK: Hazard = Hazard {
    name: "return probes on shadow stacks",
    affected: &[(KernelVersion::new(6, 6, 0), KernelVersion::new(6, 11, 0))],
    consequence: "a return probe crashes a process that has a shadow stack",
    source: "possible since user shadow stacks (v6.6); 1713b63a07a2 (v6.11) removed it",
};

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> KernelVersion {
        KernelVersion::parse(text).expect("a version")
    }

    #[test]
    fn the_seccomp_hazard_has_exactly_its_releases() {
        for affected in ["6.11.0", "6.11.11", "6.12.0", "6.12.13", "6.13.0", "6.13.2"] {
            assert!(SECCOMP_STOPS_RETURN_PROBES.affects(version(affected)), "{affected}");
        }
        for safe in
            ["5.15.0", "6.10.14", "6.12.14", "6.12.90", "6.13.3", "6.14.0", "6.18.0", "7.0.0"]
        {
            assert!(!SECCOMP_STOPS_RETURN_PROBES.affects(version(safe)), "{safe}");
        }
    }

    #[test]
    fn the_shadow_stack_hazard_ends_with_6_11() {
        assert!(RETURN_PROBES_MISS_SHADOW_STACK.affects(version("6.6.0")));
        assert!(RETURN_PROBES_MISS_SHADOW_STACK.affects(version("6.10.14")));
        assert!(!RETURN_PROBES_MISS_SHADOW_STACK.affects(version("6.11.0")));
    }
}
