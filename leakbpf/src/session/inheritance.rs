//! What a forked child inherits: the breakpoints of its parent's probes, which do nothing in it until it
//! has probes of its own. Whether it has come by one of them before is seen from outside.
//!
//! - Where all probes of an instruction have a link of their own, the kernel takes a breakpoint away
//!   when it is first hit in a process that nobody asked to trace (`handler_chain`, `unapply_uprobe` in
//!   kernel/events/uprobes.c), until somebody does. It keeps those of links to many places.
//! - For the first return probe that a process hits, it maps a page of its own, which forks do not copy
//!   (`get_xol_area`). Releases have none; those unseen were of the parent's blocks, or of such that
//!   were allocated unseen.

use super::placement::Placed;
use crate::process::{Pid, maps::Maps, memory::Memory, status::Status};

/// What the kernel writes over a probed instruction (arch/x86/include/asm/uprobes.h,
/// `UPROBE_SWBP_INSN`).
const INT3: u8 = 0xcc;

/// A child that has not come by any of them yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Untouched {
    /// It rested then: [`Status::rests_since`].
    rests_since: Option<u64>,
    /// The breakpoints stay where they are when they are hit.
    stay: bool,
}

impl Untouched {
    /// `placed` are its parent's probes. None of a child that has come by one.
    pub fn of(child: Pid, maps: &Maps, placed: &Placed) -> Option<Self> {
        // First, or what it does meanwhile would go unnoticed.
        let rests_since = rests_since(child);
        (all_in_place(child, maps, placed) && !has_return_probe_page(child))
            .then(|| Self { rests_since, stay: placed.all_to_many() })
    }

    /// Whether the child has certainly not come by one before its own probes were in place, which they
    /// are now. Those that it comes by at once are as good a sign as inherited ones: then nobody knows.
    pub fn still(self, child: Pid) -> bool {
        let rested = self.rests_since.is_some() && self.rests_since == rests_since(child);
        rested || self.stay && !has_return_probe_page(child)
    }
}

fn rests_since(child: Pid) -> Option<u64> {
    Status::of(child).ok()?.rests_since()
}

fn has_return_probe_page(child: Pid) -> bool {
    Maps::of(child).map_or(true, |now| now.has_return_probe_page())
}

/// Whether every site in its memory holds a breakpoint.
fn all_in_place(child: Pid, maps: &Maps, placed: &Placed) -> bool {
    let Ok(memory) = Memory::open(child) else { return false };
    placed.sites().all(|(file, offset)| {
        let address = maps.iter().find_map(|mapping| {
            let inside = offset.checked_sub(mapping.file_offset)?;
            let address = mapping.start_avma.checked_add(inside)?;
            let here = mapping.file_id() == Some(file) && mapping.contains(address);
            (here && mapping.permissions.execute).then_some(address)
        });
        // A site of a file that is not mapped here can't have been hit.
        address.is_none_or(|address| memory.byte(address).is_some_and(|byte| byte == INT3))
    })
}
