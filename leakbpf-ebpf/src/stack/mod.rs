//! Who called: captures the user stack and announces it to the agent when it is new.

use core::intrinsics::AtomicOrdering;

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_ns},
};
use leakbpf_common::{
    abi::{
        FrameWord, Loss, MAX_FRAMES, Outcome, Owner, RecordHead, RecordKind, SiteCounters, SiteKey,
        StackId, StackWalk,
    },
    table::AddressSpace,
    unwind::Registers,
};

use crate::{
    maps::{self, RECORDS, SCRATCH, SCRATCH_SLOTS, SITES, SPACES, Scratch, settings},
    processes,
};

mod frame_pointers;
mod rows;

const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

#[inline(always)]
fn mix(hash: u64, word: u64) -> u64 {
    let product = (hash ^ word).wrapping_mul(SEED);
    product ^ product >> 32
}

/// A captured stack.
pub struct Captured {
    pub stack: StackId,
    /// Its site, a live map value.
    pub site: Option<*mut SiteCounters>,
}

impl Captured {
    const LOST: Self = Self { stack: StackId::LOST, site: None };
}

/// Captures the stack of the current thread and makes its site.
///
/// Frames come from the module's unwind rows where the agent has loaded them, else from the chain
/// of frame pointers; the first one is exact in either case. Without `haste`, the agent is not woken for a
/// new one.
#[inline(always)]
pub fn capture(owner: Owner, library_epoch: u32, registers: &Registers, haste: bool) -> Captured {
    let Some(scratch) = claim() else {
        maps::lost(Loss::StacksLost);
        return Captured::LOST;
    };
    // SAFETY: `claim` returned a live map value that nobody else writes until it is given back.
    let scratch = unsafe { &mut *scratch };
    let captured = walk(owner, library_epoch, registers, haste, scratch);
    // SAFETY: as above; volatile so that the store stays after the walk.
    unsafe { core::ptr::write_volatile(&raw mut scratch.busy, 0) };
    captured
}

#[inline(always)]
fn claim() -> Option<*mut Scratch> {
    let mut slot = 0;
    while slot < SCRATCH_SLOTS {
        let scratch = SCRATCH.get_ptr_mut(slot)?;
        // SAFETY: the field of a live map value. The exchange is atomic against preemption.
        let busy = unsafe {
            core::intrinsics::atomic_xchg::<u64, { AtomicOrdering::SeqCst }>(
                &raw mut (*scratch).busy,
                1,
            )
        };
        if busy == 0 {
            // SAFETY: the slot is ours now.
            unsafe { (*scratch).slot = u64::from(slot) };
            return Some(scratch);
        }
        slot += 1;
    }
    None
}

#[inline(always)]
fn walk(
    owner: Owner,
    library_epoch: u32,
    registers: &Registers,
    haste: bool,
    scratch: &mut Scratch,
) -> Captured {
    let hash = mix(owner.0, 0);
    match address_space(owner) {
        Some(space) => {
            rows::walk(space, library_epoch, registers, hash, scratch);
            let walk = &mut scratch.walk;
            if walk.unmapped != 0 || walk.in_modules == 0 {
                processes::ask_for_mappings(walk.unmapped);
            }
            // The agent may have replaced the list meanwhile, and a later one or another process's
            // got its memory: nothing is sure but where the walk began.
            // SAFETY: fields of a map value.
            let (now_owner, now_epoch) = unsafe {
                let owner = core::ptr::read_volatile(&raw const space.owner);
                (owner, core::ptr::read_volatile(&raw const space.library_epoch))
            };
            if now_owner != owner || walk.in_modules != 0 && now_epoch != library_epoch {
                let word = registers.ip & FrameWord::ADDRESS;
                scratch.record.frames[0] = FrameWord(word);
                walk.count = 1;
                walk.all_in_modules = 0;
                walk.hash = mix(hash, word);
                walk.outcome = Outcome::BadAddress as u64;
            }
        }
        None => frame_pointers::walk(registers, hash, scratch),
    }
    if scratch.walk.all_in_modules == 0 {
        // Addresses are other code when libraries have come or gone.
        scratch.walk.hash = mix(scratch.walk.hash, u64::from(library_epoch));
    }
    announce(owner, library_epoch, haste, scratch)
}

/// The executable mappings of a process, where rows are used at all.
#[inline(always)]
fn address_space(owner: Owner) -> Option<&'static AddressSpace> {
    if settings::get(&settings::STACK_WALK) == StackWalk::FramePointers as u32 {
        return None;
    }
    // SAFETY: the memory stays mapped until this program ends; `walk` looks whether it is still
    // this process's.
    unsafe { SPACES.get(owner) }
}

/// Makes the site of a walked stack and sends its frames when it is new.
#[inline(always)]
fn announce(owner: Owner, library_epoch: u32, haste: bool, scratch: &mut Scratch) -> Captured {
    let record = &mut scratch.record;
    let outcome = scratch.walk.outcome as u32;
    let count = (scratch.walk.count as usize).min(MAX_FRAMES);
    maps::count(Outcome::FIRST_COUNTER + outcome);
    let hash = mix(scratch.walk.hash, u64::from(outcome));
    // 0 and 1 have meanings of their own.
    let stack = StackId(if hash < 2 { hash + 2 } else { hash });

    let key = SiteKey { owner, stack };
    let site = SITES.get_ptr_mut(key).or_else(|| {
        let fresh = SiteCounters::default();
        let _ = SITES.insert(key, fresh, BPF_NOEXIST as u64);
        SITES.get_ptr_mut(key)
    });
    let Some(site) = site else {
        maps::lost(Loss::SitesFull);
        return Captured::LOST;
    };
    let captured = Captured { stack, site: Some(site) };
    // SAFETY: the field of a live map value.
    if unsafe { core::ptr::read_volatile(&raw const (*site).announced) } != 0 {
        return captured;
    }
    record.head = RecordHead {
        kind: RecordKind::Stack as u32,
        tid: bpf_get_current_pid_tgid() as u32,
        owner,
        // SAFETY: as above.
        time_ns: unsafe { bpf_ktime_get_ns() },
    };
    record.stack = stack;
    record.library_epoch = library_epoch;
    record.outcome = outcome;
    record.frame_count = count as u64;
    let head_bytes = core::mem::offset_of!(leakbpf_common::abi::StackRecord, frames);
    let bytes = head_bytes + 8 * (count & MAX_FRAMES);
    let start = (&raw const *record).cast::<u8>();
    // SAFETY: `bytes` is at most the size of the record.
    let slice = unsafe { core::slice::from_raw_parts(start, bytes) };
    let flags = if haste { 0 } else { maps::without_haste() };
    // When the ring buffer is full, the next hit of this site announces it.
    if RECORDS.output::<[u8]>(slice, flags).is_ok() {
        // SAFETY: the field of a live map value.
        unsafe { core::ptr::write_volatile(&raw mut (*site).announced, 1) };
    }
    captured
}
