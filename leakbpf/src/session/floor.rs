//! Probes with empty programs: what a session costs at the least.

use std::num::NonZeroU32;

use leakbpf_common::abi::{Role, StackWalk};

use super::{SessionError, placement::Plans, planner_kernel};
use crate::{
    preflight,
    probe::{
        attach::Link,
        kernel::{Kernel, KernelError, Program, Settings},
    },
    process::{Pid, host, mapped_file::MappedFile, maps::Maps},
};

/// The probes; gone when dropped.
pub struct Floor {
    links: Vec<Link>,
    _kernel: Kernel,
}

impl Floor {
    pub fn len(&self) -> usize {
        self.links.len()
    }

    pub fn is_empty(&self) -> bool {
        self.links.is_empty()
    }
}

/// Places them where a session would, or (`naive`) at the functions' first instructions.
pub fn place(pid: u32, naive: bool) -> Result<Floor, SessionError> {
    let host = host::observe();
    preflight::Report { checks: preflight::host::judge(&host) }.refuse_failures()?;
    let mut kernel = Kernel::load(&Settings {
        follow_forks: false,
        watch_all: false,
        stack_walk: StackWalk::FramePointers,
        max_blocks: 1,
        newtask_pid_offset: 0,
        newtask_flags_offset: 0,
        exec_old_pid_offset: 0,
        return_instances: None,
        probes: true,
        pages: None,
        sample_interval_bytes: 0,
    })?;
    let maps = Maps::of(Pid(pid))?;
    let mut links = Vec::new();
    for file in Plans::new(planner_kernel(&host)).of(Pid(pid), &maps) {
        let Ok(plan) = file.plan else { continue };
        let mapping = maps
            .iter()
            .find(|mapping| mapping.permissions.execute && mapping.file_id() == Some(file.id));
        let Some(opened) = mapping.and_then(|mapping| MappedFile::open(Pid(pid), mapping).ok())
        else {
            continue;
        };
        let path = opened.probe_path();
        for probe in &plan.probes {
            let enter = if naive { probe.entry_file_offset } else { probe.enter_file_offset };
            let leave = match probe.role {
                Role::Free => None,
                _ if naive => Some(probe.entry_file_offset),
                _ => probe.leave_file_offset,
            };
            let pid = NonZeroU32::new(pid);
            let mut add = |program, offset| -> Result<(), KernelError> {
                links.push(kernel.place(program, &path, offset, 0, pid)?);
                Ok(())
            };
            if let Some(leave) = leave {
                add(Program::EmptyLeave, leave)?;
            }
            for &exit in probe.exit_file_offsets.iter().filter(|_| !naive) {
                add(Program::EmptyEnter, exit)?;
            }
            add(Program::EmptyEnter, enter)?;
        }
    }
    Ok(Floor { links, _kernel: kernel })
}
