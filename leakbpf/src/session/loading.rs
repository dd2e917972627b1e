//! The kernel side for a session: settings, and the best stack walk that the kernel takes.

use leakbpf_common::abi::StackWalk;

use super::{
    SessionError,
    clock::monotonic_ns,
    config::{Config, Method, StackMethod, Target},
};
use crate::{
    preflight::tracepoint::TracepointFormat,
    probe::{
        kernel::Kernel,
        settings::{Links, PageChoice, ProcessTimes, ReturnInstances, Settings},
    },
    process::{host, select::Selector, tracefs},
};

/// Loads the kernel side with the best walk that the kernel takes of those that will do; with the
/// reason when it is not the best of all.
pub fn load(config: &Config) -> Result<(Kernel, Option<String>), SessionError> {
    let mut settings = settings(config)?;
    const BOUNDED: (StackWalk, &str) = (StackWalk::RowsBounded, "stacks have at most 64 frames");
    const POINTERS: (StackWalk, &str) =
        (StackWalk::FramePointers, "stacks follow frame pointers only");
    let (best, others): (StackWalk, &[(StackWalk, &str)]) = match config.stack {
        StackMethod::Auto => (StackWalk::Rows, &[BOUNDED, POINTERS]),
        StackMethod::Rows => (StackWalk::Rows, &[BOUNDED]),
        StackMethod::RowsBounded => (StackWalk::RowsBounded, &[]),
        StackMethod::FramePointers => (StackWalk::FramePointers, &[]),
    };
    settings.stack_walk = best;
    let refusal = match Kernel::load(&settings) {
        Ok(kernel) => return Ok((kernel, None)),
        Err(error) => error,
    };
    for &(walk, what) in others {
        settings.stack_walk = walk;
        if let Ok(kernel) = Kernel::load(&settings) {
            return Ok((kernel, Some(format!("{what}: {refusal}"))));
        }
    }
    Err(refusal.into())
}

fn settings(config: &Config) -> Result<Settings, SessionError> {
    let types = host::kernel_types();
    let types = types.as_deref();
    Ok(Settings {
        follow_forks: config.follow_forks,
        watch_all: matches!(config.target, Target::Running(Selector::All)),
        stack_walk: StackWalk::Rows,
        max_blocks: config.max_blocks,
        newtask_pid_offset: field_offset("task/task_newtask", "pid")?,
        newtask_flags_offset: field_offset("task/task_newtask", "clone_flags")?,
        exec_old_pid_offset: field_offset("sched/sched_process_exec", "old_pid")?,
        return_instances: types.and_then(ReturnInstances::find),
        process_times: types.and_then(ProcessTimes::find),
        probes: config.method.probes(),
        pages: config.method.page_interval().map(|interval| PageChoice { interval, seed: seed() }),
        may_sample: config.method.may_sample(),
        links: config.links.unwrap_or_else(|| suitable_links(config)),
    })
}

/// Links to many places come and go at once and cost less at a hit. But when they are for one
/// process, the kernel does not run their programs in a child of `vfork` (it shares the memory, but
/// not the thread group: `uprobe_prog_run` in kernel/trace/bpf_trace.c), and children that are not
/// followed keep the breakpoints. So whoever counts every block of a session does without. Windows
/// could not be short without.
fn suitable_links(config: &Config) -> Links {
    let sampled = matches!(config.method, Method::Sample { .. }) && config.follow_forks;
    let windows = config.method.limit().is_some();
    if config.shared_probes || sampled || windows { Links::Many } else { Links::Single }
}

/// Where a field lies in a tracepoint's record, in bytes.
fn field_offset(name: &'static str, field: &str) -> Result<u32, SessionError> {
    let failed = |reason: String| SessionError::Tracepoint { name, reason };
    let bytes = tracefs::tracepoint_format(name).map_err(|error| failed(error.to_string()))?;
    let format = TracepointFormat::parse(&bytes).map_err(|error| failed(error.to_string()))?;
    let field = format.field(field).map_err(|error| failed(error.to_string()))?;
    Ok(field.offset_bytes)
}

/// Differs from session to session.
fn seed() -> u32 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(monotonic_ns()) as u32
}
