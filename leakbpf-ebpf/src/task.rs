//! What the kernel knows of the current thread, by the members' places in its structures.

use aya_ebpf::helpers::{bpf_get_current_task, bpf_probe_read_kernel};

use crate::maps::settings;

/// Its `struct task_struct`.
#[inline(always)]
pub fn current() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_get_current_task() }
}

/// A member of a kernel structure; 0 when it can't be read.
#[inline(always)]
pub fn word(structure: u64, offset: &'static u32) -> u64 {
    let address = structure.wrapping_add(u64::from(settings::get(offset)));
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_kernel(address as *const u64) }.unwrap_or(0)
}

/// Processor time of a process whose last thread, the current one, ends (kernel/sched/cputime.c,
/// `thread_group_cputime`); none while others go on, and where the kernel does not tell. Threads that end at
/// the same moment may be missing.
#[inline(always)]
pub fn process_time_at_end() -> Option<u64> {
    if settings::get(&settings::TASK_SIGNAL) == 0 {
        return None;
    }
    let task = current();
    let signal = word(task, &settings::TASK_SIGNAL);
    // An `int`.
    if word(signal, &settings::SIGNAL_LIVE) as u32 != 0 {
        return None;
    }
    let ended_before = word(signal, &settings::SIGNAL_ENDED_RUNTIME);
    let first = word(task, &settings::TASK_LEADER);
    let own = word(task, &settings::TASK_RUNTIME);
    let of_first = if first == task { 0 } else { word(first, &settings::TASK_RUNTIME) };
    Some(ended_before + own + of_first)
}
