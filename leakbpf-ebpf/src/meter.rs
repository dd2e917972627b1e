//! What the programs at allocator functions cost: every run is counted, some are timed.

use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns};
use leakbpf_common::abi::Cost;

use crate::maps::COSTS;

/// Runs a program's work.
#[inline(always)]
pub fn run<T>(work: impl FnOnce() -> Option<T>) -> Option<T> {
    let began_ns = begin();
    let result = work();
    if began_ns != 0 {
        end(began_ns);
    }
    result
}

/// This run is at a return that need not be seen when its block is not chosen.
#[inline(always)]
pub fn optional_return() {
    if let Some(cost) = COSTS.get_ptr_mut(0) {
        // SAFETY: as in `begin`.
        unsafe { (*cost).optional_returns += 1 };
    }
}

/// There will be no run at the return of this call.
#[inline(always)]
pub fn let_return_go() {
    if let Some(cost) = COSTS.get_ptr_mut(0) {
        // SAFETY: as in `begin`.
        unsafe { (*cost).returns_let_go += 1 };
    }
}

/// Counts a run; the time when this one is to be timed, else 0.
#[inline(always)]
fn begin() -> u64 {
    let Some(cost) = COSTS.get_ptr_mut(0) else { return 0 };
    // SAFETY: the pointer is to this CPU's own slot of a live array map, and a program stays on its
    // CPU. One that runs in between may make a count go missing.
    let due = unsafe {
        (*cost).hits += 1;
        (*cost).hits >= (*cost).next_timed
    };
    // SAFETY: the helper has no preconditions.
    if due { unsafe { bpf_ktime_get_ns() } } else { 0 }
}

/// Out of line: most runs are not timed.
#[inline(never)]
fn end(began_ns: u64) {
    let Some(cost) = COSTS.get_ptr_mut(0) else { return };
    // SAFETY: the helpers have no preconditions; for the pointer see `begin`.
    unsafe {
        let took_ns = bpf_ktime_get_ns() - began_ns;
        let random = u64::from(bpf_get_prandom_u32()) & (Cost::TIMED_EVERY - 1);
        (*cost).next_timed = (*cost).hits + Cost::TIMED_EVERY + random;
        if took_ns <= Cost::MOST_TIMED_NS {
            (*cost).timed += 1;
            (*cost).timed_ns += took_ns;
        }
    }
}
