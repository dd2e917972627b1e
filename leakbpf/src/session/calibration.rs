//! What a trap into the kernel costs on this machine, measured on the agent itself.

use std::{
    num::NonZeroU32,
    time::{Duration, Instant},
};

use crate::{
    probe::{
        attach::{Link, Site},
        kernel::{Kernel, Program},
    },
    process::{Pid, mapped_file::MappedFile, maps::Maps},
};

/// Until it is measured, and where it can't be: about what a virtual machine takes.
pub const USUAL_TRAP: Duration = Duration::from_nanos(700);

/// Many short rounds: on a machine under load, some are interrupted.
const CALLS: u32 = 200;
const ROUNDS: usize = 40;

// A function like those that are probed: the kernel emulates its first instruction.
#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    ".p2align 4",
    ".globl leakbpf_calibration_function",
    "leakbpf_calibration_function:",
    "push rbp",
    "pop rbp",
    "ret",
);

unsafe extern "C" {
    fn leakbpf_calibration_function();
}

/// Mean time that a probe at a function's entry or end takes, with an empty program; and the probes
/// that showed it, which take their time to go.
pub fn trap(kernel: &mut Kernel) -> Option<(Duration, Vec<Link>)> {
    let own = Pid::current();
    let address = leakbpf_calibration_function as *const () as u64;
    let maps = Maps::of(own).ok()?;
    let mapping = maps.find(address)?;
    let file = MappedFile::open(own, mapping).ok()?;
    let offset = address - mapping.start_avma + mapping.file_offset;
    let path = file.probe_path();
    let pid = NonZeroU32::new(own.0);
    let untraced = time_a_call();
    let site = [Site { file_offset: offset, cookie: 0 }];
    let mut links = Vec::new();
    for program in [Program::EmptyLeave, Program::EmptyEnter] {
        let placing = kernel.place(program, &path, &site, pid);
        if !placing.refused.is_empty() {
            return None;
        }
        links.extend(placing.links);
    }
    Some((time_a_call().saturating_sub(untraced) / 2, links))
}

/// That of the faster rounds, which nothing has interrupted.
fn time_a_call() -> Duration {
    let mut rounds = [Duration::ZERO; ROUNDS];
    for round in &mut rounds {
        let began = Instant::now();
        for _ in 0..CALLS {
            // SAFETY: the function takes nothing and changes nothing.
            unsafe { leakbpf_calibration_function() };
        }
        *round = began.elapsed() / CALLS;
    }
    rounds.sort_unstable();
    rounds[ROUNDS / 4]
}
