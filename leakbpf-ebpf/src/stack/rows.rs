//! The walk with unwind rows: for code without frame pointers.

use core::ffi::c_void;

use aya_ebpf::helpers::{bpf_loop, bpf_probe_read_user, bpf_probe_read_user_buf};
use leakbpf_common::{
    abi::{FrameWord, MAX_FRAMES, Outcome, Owner, StackWalk},
    ledger,
    table::{self, AddressSpace, BLOCK_WORDS, PackedPage, RULE_WORDS, TABLES_MAX, no_table},
    unwind::{self, Registers, Rule, Step},
};

use super::mix;
use crate::{
    maps::{
        CACHED_RULES, CachedRule, SCRATCH, SPACES, Scratch, StackWindow, TABLES, WINDOW_BYTES,
        WINDOW_WORDS, settings,
    },
    task,
};

/// A frame's saved registers and return address lie so close to each other.
const FRAME_HEAD_BYTES: u64 = 64;

/// Frames of a walk without `bpf_loop`: as many as the verifier has the patience for.
const BOUNDED_FRAMES: u32 = 64;

/// What one step needs. It lies on the BPF stack; what it changes lies in map memory, where the
/// verifier does not follow every value that it can have.
struct Context<'a> {
    scratch: &'a mut Scratch,
    space: &'a AddressSpace,
}

/// Walks from `registers` to the thread's first frame. The frames and their number are in the
/// record, hash and outcome in the walk's state.
#[inline(always)]
pub fn walk(
    space: &AddressSpace,
    library_epoch: u32,
    registers: &Registers,
    hash: u64,
    scratch: &mut Scratch,
) {
    let walk = &mut scratch.walk;
    walk.registers = *registers;
    walk.hash = hash;
    walk.count = 0;
    walk.outcome = Outcome::Truncated as u64;
    // Volatile, or the compiler calls a function that fills memory.
    // SAFETY: references are valid for writes.
    unsafe {
        core::ptr::write_volatile(&raw mut walk.unmapped, 0);
        core::ptr::write_volatile(&raw mut walk.mapping, 0);
    }
    // SAFETY: the field of a map value, which the agent may replace.
    let listed = unsafe { core::ptr::read_volatile(&raw const space.library_epoch) };
    walk.in_modules = if listed == library_epoch { u64::MAX } else { 0 };
    walk.all_in_modules = walk.in_modules;
    walk.stack.copy(registers.sp, WINDOW_BYTES);
    if settings::get(&settings::STACK_WALK) == StackWalk::Rows as u32 {
        let mut context = Context { scratch, space };
        // SAFETY: the callback has the type that the helper calls, and its context outlives the
        // call.
        unsafe {
            bpf_loop(MAX_FRAMES as u32, frame as *mut c_void, (&raw mut context).cast(), 0);
        }
    } else {
        walk_bounded(scratch.slot as u32, space.owner.0);
    }
}

/// The walk without `bpf_loop`. A global function, which takes numbers only: the verifier follows it
/// once for itself and not again on each way that leads to it. The result has no meaning.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn walk_bounded(slot: u32, owner: u64) -> u32 {
    let Some(scratch) = SCRATCH.get_ptr_mut(slot) else { return 0 };
    // SAFETY: the caller has claimed the slot, and the element of `SPACES` stays while it runs.
    let (scratch, space) = unsafe {
        let Some(space) = SPACES.get(Owner(owner)) else { return 0 };
        (&mut *scratch, space)
    };
    let mut turn = 0;
    while turn < BOUNDED_FRAMES {
        if let Some(outcome) = advance::<false>(scratch, space) {
            scratch.walk.outcome = outcome as u64;
            return 0;
        }
        turn += 1;
    }
    0
}

/// One frame. Returns 1 when it was the last.
unsafe extern "C" fn frame(_index: u32, context: *mut c_void) -> i64 {
    // SAFETY: `walk` passes its context.
    let context = unsafe { &mut *context.cast::<Context<'_>>() };
    match advance::<true>(context.scratch, context.space) {
        None => 0,
        Some(outcome) => {
            context.scratch.walk.outcome = outcome as u64;
            1
        }
    }
}

/// Records the current frame and goes on to its caller; the outcome when there is none.
///
/// `CACHES`: with the window, the rules that were looked up before and the way behind trampolines,
/// which have more branches than a loop that the verifier follows turn by turn may have.
#[inline(always)]
fn advance<const CACHES: bool>(scratch: &mut Scratch, space: &AddressSpace) -> Option<Outcome> {
    let walk = &mut scratch.walk;
    let address = walk.registers.lookup_ip();
    let mut rule = &Rule::FRAME_POINTER;
    let word;
    match space.find(address, walk.mapping as u32) {
        Some(position) => {
            walk.mapping = u64::from(position);
            let mapping = &space.mappings[position as usize & (table::MAPPINGS_MAX - 1)];
            if mapping.table == no_table::TRAMPOLINE {
                if CACHES && go_behind_trampoline(&mut walk.registers) {
                    return None;
                }
                return Some(Outcome::Trampoline);
            }
            word = walk.registers.ip.wrapping_add(mapping.shift & walk.in_modules);
            if mapping.table != no_table::FRAME_POINTERS {
                let pc = mapping.offset(address);
                let key = u64::from(mapping.table) << 32 | u64::from(pc);
                let slot = mix(0, key) as usize & (CACHED_RULES - 1);
                // Two places for each: frames that share one would push each other out at each walk.
                let other = slot ^ 1;
                let place = if CACHES && walk.rules[slot].key == key {
                    slot
                } else if CACHES && walk.rules[other].key == key {
                    other
                } else {
                    let Some(found) = find_rule(mapping.table, pc) else {
                        return Some(Outcome::NoRow);
                    };
                    if CACHES {
                        walk.rules[other] = walk.rules[slot];
                    }
                    walk.rules[slot] = CachedRule { key, rule: *found };
                    slot
                };
                rule = &walk.rules[place].rule;
            } else if mapping.shift == 0 {
                walk.all_in_modules = 0;
            }
        }
        None => {
            // The trampoline's page comes with the process's first return probe.
            if CACHES && go_behind_trampoline(&mut walk.registers) {
                return None;
            }
            walk.unmapped = address;
            walk.all_in_modules = 0;
            word = walk.registers.ip & FrameWord::ADDRESS;
        }
    }
    let index = walk.count as usize;
    if index < MAX_FRAMES {
        let interrupted =
            (walk.registers.after_call ^ 1) << FrameWord::INTERRUPTED.trailing_zeros();
        scratch.record.frames[index] = FrameWord(word | interrupted);
    }
    walk.count += 1;
    walk.hash = mix(walk.hash, word);

    let stack = &mut walk.stack;
    let read = |address: u64| match CACHES {
        true => stack.read(address),
        // SAFETY: the helper checks the address and fails on what it cannot read.
        false => unsafe { bpf_probe_read_user(address as *const u64) }.ok(),
    };
    match unwind::step(rule, &walk.registers, read) {
        Step::Frame(caller) => {
            walk.registers = caller;
            None
        }
        Step::End => Some(Outcome::Complete),
        Step::Stop(outcome) => Some(outcome),
    }
}

/// A return probe has replaced a return address by that of a trampoline, when a mapping or a signal
/// interrupts the function: the kernel keeps a list of what stood there, by place (`struct
/// return_instance` in include/linux/uprobes.h).
#[inline(always)]
fn go_behind_trampoline(registers: &mut Registers) -> bool {
    if !ledger::is_trampoline(registers.ip) || settings::get(&settings::TASK_UTASK) == 0 {
        return false;
    }
    let slot = registers.sp.wrapping_sub(8);
    let mut at = task::word(task::current(), &settings::TASK_UTASK);
    at = task::word(at, &settings::UTASK_INSTANCES);
    let mut turn = 0;
    while turn < RETURN_INSTANCES && at != 0 {
        if task::word(at, &settings::INSTANCE_STACK) == slot {
            let caller = task::word(at, &settings::INSTANCE_CALLER);
            // One that came later has replaced the trampoline of another one.
            if !ledger::is_trampoline(caller) {
                registers.ip = caller;
                return true;
            }
        }
        at = task::word(at, &settings::INSTANCE_NEXT);
        turn += 1;
    }
    false
}

/// Return probes of one thread that are looked at: the kernel allows 64.
const RETURN_INSTANCES: u32 = 16;

impl StackWindow {
    /// Moves the window to `start`: all of it, or only as much as the head of a frame needs.
    #[inline(always)]
    fn copy(&mut self, start: u64, bytes: u64) -> bool {
        self.start = start;
        self.bytes = bytes;
        self.served = 0;
        // SAFETY: `bytes` is no more than the words have; the helper checks the address.
        let copied = unsafe {
            let words = (&raw mut self.words).cast::<u8>();
            let words = core::slice::from_raw_parts_mut(words, bytes as usize);
            bpf_probe_read_user_buf(start as *const u8, words)
        };
        if copied.is_err() {
            self.bytes = 0;
        }
        copied.is_ok()
    }

    /// A word of the stack.
    #[inline(always)]
    fn read(&mut self, address: u64) -> Option<u64> {
        let offset = address.wrapping_sub(self.start);
        if offset < self.bytes && offset & 7 == 0 {
            self.served += offset / FRAME_HEAD_BYTES;
            return Some(self.words[(offset >> 3) as usize & (WINDOW_WORDS - 1)]);
        }
        if self.move_to(address) != 0 { Some(self.words[0]) } else { None }
    }

    /// Puts the word at `address` first. Where frames are large, a whole window would cost more
    /// than it saves: the last one served one frame. Returns 0 when the word can't be read.
    #[inline(never)]
    fn move_to(&mut self, address: u64) -> u64 {
        let offset = address.wrapping_sub(self.start);
        let dense = match self.bytes {
            WINDOW_BYTES => self.served != 0,
            _ => offset < WINDOW_BYTES / 2,
        };
        if dense && self.copy(address, WINDOW_BYTES) || self.copy(address, FRAME_HEAD_BYTES) {
            return 1;
        }
        // SAFETY: the helper checks the address and fails on what it cannot read.
        match unsafe { bpf_probe_read_user(address as *const u64) } {
            Ok(word) => {
                self.words[0] = word;
                1
            }
            Err(_) => 0,
        }
    }
}

/// The rule that holds at `pc` of a module's table.
#[inline(always)]
fn find_rule(table: u32, pc: u32) -> Option<&'static Rule> {
    const MASK: usize = BLOCK_WORDS - 1;
    let table = TABLES.get(table % TABLES_MAX as u32)?;
    let position = table::page_position(pc) as usize;
    let block = table.get((position / BLOCK_WORDS) as u32)?;
    let page = PackedPage(block[position & MASK]);
    let block = table.get(page.position() / BLOCK_WORDS as u32)?;
    let rule = table::find_row(block, page, pc).rule() as usize * RULE_WORDS;
    let block = table.get((rule / BLOCK_WORDS) as u32)?;
    let word = rule & MASK & !(RULE_WORDS - 1);
    // SAFETY: four words at a multiple of four words lie inside the block and are aligned as the
    // rule, which is valid for every bit pattern; the element lives as long as this program runs.
    Some(unsafe { &*(&raw const block[word]).cast::<Rule>() })
}
