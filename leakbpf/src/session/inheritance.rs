//! What a forked child inherits: the breakpoints of its parent's probes, which do nothing in it until it
//! has probes of its own. Whether it has come by one of them before is seen from outside.
//!
//! - Where all probes of an instruction have a link of their own, the kernel takes a breakpoint away
//!   when it is first hit in a process that nobody asked to trace (`handler_chain`, `unapply_uprobe` in
//!   kernel/events/uprobes.c), until somebody does.
//! - Those of links to many places stay where they are when they are hit. But when any such link at the
//!   instruction is closed, the kernel takes away what nobody asked for (`uprobe_unregister_nosync`).
//! - For the first return probe that a process hits, it maps a page of its own, which forks do not copy
//!   (`get_xol_area`); also for one of another process, since a link that is limited to a process keeps
//!   that to itself until the return is prepared (`uprobe_prog_run`, `uprobe_multi_link_handler` in
//!   kernel/trace/bpf_trace.c). Releases have none; those unseen were of the parent's blocks, or of such
//!   that were allocated unseen.

use std::collections::BTreeSet;

use super::placement::Placed;
use crate::process::{
    Pid,
    maps::{FileId, Maps},
    memory::Memory,
    status::rests_since,
};

/// What the kernel writes over a probed instruction (arch/x86/include/asm/uprobes.h,
/// `UPROBE_SWBP_INSN`).
const INT3: u8 = 0xcc;

/// A child that has not come by any of them yet.
pub struct Untouched {
    /// It rested then: [`rests_since`].
    rests_since: Option<u64>,
    /// The breakpoints stay where they are when they are hit.
    stay: bool,
    inherited: BTreeSet<(FileId, u64)>,
}

impl Untouched {
    /// `placed` are its parent's probes, `mapped` what that has mapped; `closing` tells that others are
    /// being closed; `maps` reads the child's own mappings. None of a child that has come by one.
    pub fn of(
        child: Pid,
        placed: &Placed,
        mapped: &Maps,
        closing: bool,
        maps: impl FnOnce() -> Maps,
    ) -> Option<Self> {
        // First, or what it does meanwhile would go unnoticed.
        let rests_since = rests_since(child);
        let files: BTreeSet<_> = mapped.iter().filter_map(|mapping| mapping.file_id()).collect();
        let inherited = placed.sites().filter(|(file, _)| files.contains(file)).collect();
        let untouched = Self { rests_since, stay: !closing && placed.all_to_many(), inherited };
        untouched.looks_so(child, &maps()).then_some(untouched)
    }

    /// Whether the child has certainly not come by one before its `own` probes were in place, which they
    /// are now. Those that it comes by at once are as good a sign as inherited ones: then nobody knows.
    pub fn still(self, child: Pid, own: &Placed, maps: impl FnOnce() -> Maps) -> bool {
        let rested = self.rests_since.is_some() && self.rests_since == rests_since(child);
        own.sites().all(|site| self.inherited.contains(&site))
            && (rested || self.stay && self.looks_so(child, &maps()))
    }

    /// By `maps`, which are empty when it is gone, and another program's when it is about to be one.
    fn looks_so(&self, child: Pid, maps: &Maps) -> bool {
        !maps.has_return_probe_page() && self.all_in_place(child, maps)
    }

    /// Whether every inherited site is in its memory and holds a breakpoint.
    fn all_in_place(&self, child: Pid, maps: &Maps) -> bool {
        let Ok(memory) = Memory::open(child) else { return false };
        self.inherited.iter().all(|(file, offset)| {
            let address = maps.iter().find_map(|mapping| {
                let inside = offset.checked_sub(mapping.file_offset)?;
                let address = mapping.start_avma.checked_add(inside)?;
                let here = mapping.file_id() == Some(*file) && mapping.contains(address);
                (here && mapping.permissions.execute).then_some(address)
            });
            address.and_then(|address| memory.byte(address)) == Some(INT3)
        })
    }
}
