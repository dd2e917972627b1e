//! What the programs cost that run in the watched processes' time: every run is counted, some are timed.

use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns};
use leakbpf_common::abi::{Cost, Runs};

use crate::maps::COSTS;

/// Does the work of a program at an allocator function.
#[inline(always)]
pub fn run<T>(work: impl FnOnce() -> Option<T>) -> Option<T> {
    timed::<{ Cost::HIT_TIMED_EVERY }, T>(hits, work)
}

/// Does the work of a program at a page fault that may bring a chosen page.
#[inline(always)]
pub fn touch<T>(work: impl FnOnce() -> Option<T>) -> Option<T> {
    timed::<{ Cost::TOUCH_TIMED_EVERY }, T>(touches, work)
}

#[inline(always)]
fn hits(cost: *mut Cost) -> *mut Runs {
    // SAFETY: the place of a field of a live map value.
    unsafe { &raw mut (*cost).hits }
}

#[inline(always)]
fn touches(cost: *mut Cost) -> *mut Runs {
    // SAFETY: as in `hits`.
    unsafe { &raw mut (*cost).touches }
}

/// A chosen page had a fault.
#[inline(always)]
pub fn fault() {
    if let Some(cost) = COSTS.get_ptr_mut(0) {
        // SAFETY: as in `begin`.
        unsafe { (*cost).faults += 1 };
    }
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

#[inline(always)]
fn timed<const EVERY: u64, T>(
    of: impl Fn(*mut Cost) -> *mut Runs,
    work: impl FnOnce() -> Option<T>,
) -> Option<T> {
    let Some(cost) = COSTS.get_ptr_mut(0) else { return work() };
    let began_ns = begin(of(cost));
    let result = work();
    if began_ns != 0 {
        end(of(cost), began_ns, EVERY);
    }
    result
}

/// Counts a run; the time when this one is to be timed, else 0.
#[inline(always)]
fn begin(runs: *mut Runs) -> u64 {
    // SAFETY: the pointer is to this CPU's own slot of a live array map, and a program stays on its
    // CPU. One that runs in between may make a count go missing.
    let due = unsafe {
        (*runs).count += 1;
        (*runs).count >= (*runs).next_timed
    };
    // SAFETY: the helper has no preconditions.
    if due { unsafe { bpf_ktime_get_ns() } } else { 0 }
}

/// Out of line: most runs are not timed.
#[inline(never)]
fn end(runs: *mut Runs, began_ns: u64, every: u64) {
    // SAFETY: the helpers have no preconditions; for the pointer see `begin`.
    unsafe {
        let took_ns = bpf_ktime_get_ns() - began_ns;
        let random = u64::from(bpf_get_prandom_u32()) & (every - 1);
        (*runs).next_timed = (*runs).count + every + random;
        if took_ns <= Runs::MOST_TIMED_NS {
            (*runs).timed += 1;
            (*runs).timed_ns += took_ns;
        }
    }
}
