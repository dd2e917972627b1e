//! [`Books`] over the BPF maps.

use core::intrinsics::AtomicOrdering;

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{bpf_get_prandom_u32, bpf_probe_read_user},
};
use leakbpf_common::{
    abi::{Block, BlockKey, Loss, SiteCounters, SiteKey, StackId, Tally},
    ledger::{Books, NotPut, Put},
    sampling::{self, Sampling, Weight},
};

use crate::{
    maps::{self, BLOCKS, SITES, UNTIL_SAMPLE, settings},
    stack::Captured,
};

pub struct KernelBooks {
    /// The site that the next allocation is likely to be of.
    site: Option<(StackId, *mut SiteCounters)>,
    sampling: Sampling,
}

impl KernelBooks {
    #[inline(always)]
    pub const fn new(sampling: Sampling) -> Self {
        Self { site: None, sampling }
    }

    /// What a recorded block adds to its site.
    #[inline(always)]
    fn weight(&self, block: &Block) -> Weight {
        if settings::get(&settings::MAY_SAMPLE) == 0 {
            Weight { bytes: block.size_bytes, count: 1 }
        } else {
            self.sampling.weight(block.size_bytes, block.born_ns)
        }
    }

    /// Adds to the blocks that are recorded at an address; `u32::MAX` takes one away.
    #[inline(always)]
    fn count_recorded(&self, address: u64, change: u32) {
        if settings::get(&settings::MAY_SAMPLE) != 0
            && let Some(count) = maps::recorded_at(address)
        {
            // SAFETY: a field of a live map value, 4-byte aligned.
            unsafe {
                core::intrinsics::atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(
                    count, change,
                );
            }
        }
    }

    /// Spares the look-up of a site that the capture has just looked up.
    #[inline(always)]
    pub fn remember(&mut self, captured: &Captured) {
        self.site = captured.site.map(|site| (captured.stack, site));
    }
}

/// Adds to a counter that other CPUs add to as well.
#[inline(always)]
fn add(counter: *mut u64, value: u64) {
    // SAFETY: the callers pass fields of live map values, which are 8-byte aligned.
    unsafe {
        core::intrinsics::atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, value);
    }
}

const EEXIST: i32 = -17;

impl Books for KernelBooks {
    #[inline(always)]
    fn put(&mut self, key: &BlockKey, block: &Block) -> Put {
        match self.put_new(key, block) {
            Ok(()) => Put::New,
            Err(NotPut::Occupied) => {
                let ghost = self.take(key);
                let put = BLOCKS.insert(key, block, BPF_ANY as u64);
                match (put, ghost) {
                    (Ok(()), Some(ghost)) => Put::Replaced(ghost),
                    (Ok(()), None) => Put::New,
                    (Err(_), ghost) => {
                        // Another CPU was quicker to take the room that the ghost left.
                        if let Some(ghost) = ghost {
                            self.freed(key, &ghost);
                        }
                        Put::Full
                    }
                }
            }
            Err(NotPut::Full) => Put::Full,
        }
    }

    #[inline(always)]
    fn put_new(&mut self, key: &BlockKey, block: &Block) -> Result<(), NotPut> {
        match BLOCKS.insert(key, block, BPF_NOEXIST as u64) {
            Ok(()) => Ok(()),
            Err(EEXIST) => Err(NotPut::Occupied),
            Err(_) => Err(NotPut::Full),
        }
    }

    #[inline(always)]
    fn take(&mut self, key: &BlockKey) -> Option<Block> {
        // SAFETY: without preallocation the element is not reused before this program ends.
        let block = unsafe { *BLOCKS.get(key)? };
        // Whoever deletes it has taken it; the loser of a race between two frees has nothing.
        BLOCKS.remove(key).ok()?;
        Some(block)
    }

    #[inline(always)]
    fn allocated(&mut self, key: &BlockKey, block: &Block) {
        self.count_recorded(key.address, 1);
        let (owner, stack) = (key.owner, block.stack);
        let site = match self.site {
            Some((known, site)) if known == stack => Some(site),
            _ => {
                let key = SiteKey { owner, stack };
                SITES.get_ptr_mut(key).or_else(|| {
                    // Only the site of a lost stack is not made by the capture.
                    let _ = SITES.insert(key, SiteCounters::default(), BPF_NOEXIST as u64);
                    SITES.get_ptr_mut(key)
                })
            }
        };
        if let Some(site) = site {
            // SAFETY: field addresses of a live map value.
            unsafe {
                let weight = self.weight(block);
                add(&raw mut (*site).allocated_bytes, weight.bytes);
                add(&raw mut (*site).allocated_count, weight.count);
            }
        }
    }

    #[inline(always)]
    fn freed(&mut self, key: &BlockKey, block: &Block) {
        self.count_recorded(key.address, u32::MAX);
        if let Some(site) = SITES.get_ptr_mut(SiteKey { owner: key.owner, stack: block.stack }) {
            // SAFETY: field addresses of a live map value.
            unsafe {
                let weight = self.weight(block);
                add(&raw mut (*site).freed_bytes, weight.bytes);
                add(&raw mut (*site).freed_count, weight.count);
            }
        }
    }

    #[inline(always)]
    fn lost(&mut self, loss: Loss) {
        maps::lost(loss);
    }

    #[inline(always)]
    fn tally(&mut self, tally: Tally) {
        maps::tally(tally);
    }

    #[inline(always)]
    fn sampling(&self) -> Sampling {
        self.sampling
    }

    #[inline(always)]
    fn choose(&mut self, size_bytes: u64, interval_bytes: u64) -> bool {
        let Some(until) = UNTIL_SAMPLE.get_ptr_mut(0) else { return true };
        // SAFETY: the helper has no preconditions.
        let random = || unsafe { bpf_get_prandom_u32() };
        // SAFETY: the pointer is to this CPU's own slot of a live array map. A program that runs in
        // between may make a count go missing.
        sampling::choose(unsafe { &mut *until }, size_bytes, interval_bytes, random)
    }

    #[inline(always)]
    fn read_word(&mut self, address: u64) -> Option<u64> {
        // SAFETY: the helper checks the address and fails on what it cannot read.
        unsafe { bpf_probe_read_user(address as *const u64) }.ok()
    }
}
