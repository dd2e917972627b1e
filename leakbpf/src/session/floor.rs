//! Probes with empty programs: what a session costs at the least.

use std::num::NonZeroU32;

use leakbpf_common::abi::{Role, StackWalk};

use super::{SessionError, placement::Plans};
use crate::{
    preflight,
    probe::{
        attach::{Link, Site},
        kernel::{Kernel, Program},
        settings::{Links, Settings},
    },
    process::{Pid, host, mapped_file::MappedFile, maps::Maps},
};

/// The probes; gone when dropped.
pub struct Floor {
    _links: Vec<Link>,
    probes: usize,
    _kernel: Kernel,
}

impl Floor {
    pub fn len(&self) -> usize {
        self.probes
    }

    pub fn is_empty(&self) -> bool {
        self.probes == 0
    }
}

/// Where they are placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sites {
    /// Where a session would place its own.
    Session,
    /// The same, without the returns that calls need not have whose block is not chosen.
    Unchosen,
    /// At the functions' first instructions.
    First,
}

pub fn place(pid: u32, sites: Sites, kind: Links) -> Result<Floor, SessionError> {
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
        process_times: None,
        probes: true,
        pages: None,
        may_sample: false,
        links: kind,
    })?;
    let maps = Maps::of(Pid(pid))?;
    let (mut links, mut probes) = (Vec::new(), 0);
    for file in Plans::default().of(Pid(pid), &maps) {
        let Ok(plan) = file.plan else { continue };
        let mapping = maps
            .iter()
            .find(|mapping| mapping.permissions.execute && mapping.file_id() == Some(file.id));
        let Some(opened) = mapping.and_then(|mapping| MappedFile::open(Pid(pid), mapping).ok())
        else {
            continue;
        };
        let path = opened.probe_path();
        let (mut leaves, mut enters) = (Vec::new(), Vec::new());
        let site = |file_offset| Site { file_offset, cookie: 0 };
        for probe in &plan.probes {
            let spared = sites == Sites::Unchosen && kernel.has_sessions() && probe.calls_no_other;
            let first = sites == Sites::First;
            let enter = if first { probe.entry_file_offset } else { probe.enter_file_offset };
            let leave = match probe.role {
                Role::Free => None,
                _ if first => Some(probe.entry_file_offset),
                _ => probe.leave_file_offset.filter(|_| !spared),
            };
            leaves.extend(leave.map(site));
            enters.extend(probe.exit_file_offsets.iter().filter(|_| !first).copied().map(site));
            enters.push(site(enter));
        }
        for (program, sites) in [(Program::EmptyLeave, leaves), (Program::EmptyEnter, enters)] {
            if sites.is_empty() {
                continue;
            }
            let placing = kernel.place(program, &path, &sites, NonZeroU32::new(pid));
            if let Some((_, error)) = placing.refused.into_iter().next() {
                return Err(error.into());
            }
            links.extend(placing.links);
            probes += sites.len();
        }
    }
    Ok(Floor { _links: links, probes, _kernel: kernel })
}
