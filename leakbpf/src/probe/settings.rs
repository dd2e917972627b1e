//! What is fixed before the kernel side is loaded.

use aya::{Ebpf, EbpfError, EbpfLoader, VerifierLogLevel};
use leakbpf_common::{abi::StackWalk, pages};

use super::kernel_types::KernelTypes;

/// include/uapi/linux/bpf.h
const BPF_RB_FORCE_WAKEUP: u32 = 2;

/// Of a session. [`Settings::load`] has their names in the programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub follow_forks: bool,
    /// Watch every process that hits a probe.
    pub watch_all: bool,
    pub stack_walk: StackWalk,
    /// Limit of the block map, in blocks.
    pub max_blocks: u32,
    /// Byte offsets of `pid` and `clone_flags` in the record of `task:task_newtask`.
    pub newtask_pid_offset: u32,
    pub newtask_flags_offset: u32,
    /// Byte offset of `old_pid` in the record of `sched:sched_process_exec`.
    pub exec_old_pid_offset: u32,
    pub return_instances: Option<ReturnInstances>,
    pub process_times: Option<ProcessTimes>,
    /// Allocator functions are probed.
    pub probes: bool,
    /// Page faults are looked at.
    pub pages: Option<PageChoice>,
    /// Blocks may be sampled: see [`Kernel::sample`](super::kernel::Kernel::sample).
    pub may_sample: bool,
    pub links: Links,
}

impl Settings {
    /// Loads the maps of an object, with its programs as these settings make them; nothing is in the
    /// kernel's hands yet but the maps.
    pub fn load(&self, object: &[u8]) -> Result<Ebpf, EbpfError> {
        let follow = u32::from(self.follow_forks);
        let all = u32::from(self.watch_all);
        let walk = self.stack_walk as u32;
        let agent = std::process::id();
        let returns = self.return_instances.unwrap_or(ReturnInstances::UNKNOWN);
        let times = self.process_times.unwrap_or(ProcessTimes::UNKNOWN);
        let choice = self.pages.unwrap_or(PageChoice { interval: 1, seed: 0 });
        let page_limit = pages::limit(choice.interval);
        let event_flags = if self.pages.is_some() { BPF_RB_FORCE_WAKEUP } else { 0 };
        let may_sample = u32::from(self.may_sample);
        let mut loader = EbpfLoader::new();
        loader
            .btf(None)
            .verifier_log_level(VerifierLogLevel::DISABLE)
            .override_global("FOLLOW_FORKS", &follow, true)
            .override_global("WATCH_ALL", &all, true)
            .override_global("STACK_WALK", &walk, true)
            .override_global("AGENT_TGID", &agent, true)
            .override_global("NEWTASK_PID_OFFSET", &self.newtask_pid_offset, true)
            .override_global("NEWTASK_FLAGS_OFFSET", &self.newtask_flags_offset, true)
            .override_global("EXEC_OLD_PID_OFFSET", &self.exec_old_pid_offset, true)
            .override_global("TASK_UTASK", &returns.utask, true)
            .override_global("UTASK_INSTANCES", &returns.first, true)
            .override_global("INSTANCE_STACK", &returns.stack, true)
            .override_global("INSTANCE_CALLER", &returns.caller, true)
            .override_global("INSTANCE_NEXT", &returns.next, true)
            .override_global("TASK_SIGNAL", &times.signal, true)
            .override_global("TASK_LEADER", &times.leader, true)
            .override_global("TASK_RUNTIME", &times.runtime, true)
            .override_global("SIGNAL_LIVE", &times.live, true)
            .override_global("SIGNAL_ENDED_RUNTIME", &times.ended_runtime, true)
            .override_global("PAGE_SEED", &choice.seed, true)
            .override_global("PAGE_LIMIT", &page_limit, true)
            .override_global("EVENT_FLAGS", &event_flags, true)
            .override_global("MAY_SAMPLE", &may_sample, true)
            .map_max_entries("BLOCKS", self.max_blocks);
        if !self.may_sample {
            loader.map_max_entries("RECORDED", 1);
        }
        loader.load(object)
    }
}

/// What holds probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// One link for all probes of a program in a file, where the kernel has such links: they come
    /// and go together.
    Many,
    /// One perf event for each probe.
    Single,
}

/// Which pages are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageChoice {
    /// One page in so many.
    pub interval: u32,
    /// Any number, another one in each session.
    pub seed: u32,
}

/// Where the kernel keeps the return addresses that return probes have replaced: byte offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReturnInstances {
    /// `task_struct.utask`
    pub utask: u32,
    /// `uprobe_task.return_instances`
    pub first: u32,
    /// `return_instance.stack`
    pub stack: u32,
    /// `return_instance.orig_ret_vaddr`
    pub caller: u32,
    /// `return_instance.next`
    pub next: u32,
}

impl ReturnInstances {
    /// Of a kernel with this type information.
    pub fn find(btf: &[u8]) -> Option<Self> {
        let types = KernelTypes::parse(btf)?;
        Some(Self {
            utask: types.offset_of("task_struct", "utask")?,
            first: types.offset_of("uprobe_task", "return_instances")?,
            stack: types.offset_of("return_instance", "stack")?,
            caller: types.offset_of("return_instance", "orig_ret_vaddr")?,
            next: types.offset_of("return_instance", "next")?,
        })
    }

    const UNKNOWN: Self = Self { utask: 0, first: 0, stack: 0, caller: 0, next: 0 };
}

/// Where the kernel keeps the processor time of processes: byte offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessTimes {
    /// `task_struct.signal`
    pub signal: u32,
    /// `task_struct.group_leader`
    pub leader: u32,
    /// `task_struct.se.sum_exec_runtime`
    pub runtime: u32,
    /// `signal_struct.live`
    pub live: u32,
    /// `signal_struct.sum_sched_runtime`
    pub ended_runtime: u32,
}

impl ProcessTimes {
    /// Of a kernel with this type information.
    pub fn find(btf: &[u8]) -> Option<Self> {
        let types = KernelTypes::parse(btf)?;
        let runtime = types.offset_of("sched_entity", "sum_exec_runtime")?;
        Some(Self {
            signal: types.offset_of("task_struct", "signal")?,
            leader: types.offset_of("task_struct", "group_leader")?,
            runtime: types.offset_of("task_struct", "se")?.checked_add(runtime)?,
            live: types.offset_of("signal_struct", "live")?,
            ended_runtime: types.offset_of("signal_struct", "sum_sched_runtime")?,
        })
    }

    const UNKNOWN: Self = Self { signal: 0, leader: 0, runtime: 0, live: 0, ended_runtime: 0 };
}
