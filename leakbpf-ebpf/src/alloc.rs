//! Uprobes on allocator functions. What a function does and where its operands are is in the
//! attach cookie, so few programs serve every allocator.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_NOEXIST, pt_regs},
    helpers::{
        bpf_get_attach_cookie, bpf_get_current_pid_tgid, bpf_get_func_ip, bpf_ktime_get_ns,
        bpf_probe_read_kernel, bpf_probe_read_user,
    },
    macros::{uprobe, uretprobe},
    programs::{ProbeContext, RetProbeContext},
};
use leakbpf_common::{
    abi::{Cookie, Loss, Owner, RegisterSlot},
    ledger::{self, Call, Return, ThreadState},
    unwind::Registers,
};

use crate::{
    books::KernelBooks,
    kernel_stack,
    maps::{self, THREADS, settings},
    meter, processes, stack,
};

/// A thread with nothing in flight. In read-only data: it would fill half of a BPF stack.
static IDLE: ThreadState = ThreadState::new(Owner(0));

/// An allocation, reallocation or resize begins.
#[uprobe]
pub fn alloc_enter(ctx: ProbeContext) -> u32 {
    kernel_stack::keep();
    meter::run(|| begin(&ctx));
    0
}

/// An allocation, reallocation or resize begins, or returns: a session of uprobes (Linux 6.13,
/// `uprobe_multi_link_handler`), in which the beginning decides whether there is a probe at the end.
///
/// aya's `uprobe` would return 0 whatever this returns.
#[unsafe(no_mangle)]
#[unsafe(link_section = "uprobe")]
pub extern "C" fn alloc_call(ctx: *mut c_void) -> u32 {
    const NO_PROBE_AT_THE_END: u32 = 1;
    kernel_stack::keep();
    let ctx = ProbeContext::new(ctx);
    // SAFETY: the context is a uprobe's.
    let (place, probed) = unsafe { ((*ctx.regs).rip, bpf_get_func_ip(ctx.as_ptr())) };
    if place != probed {
        meter::run(|| {
            if settings::get(&settings::MAY_SAMPLE) != 0 && cookie(&ctx)?.return_optional {
                meter::optional_return();
            }
            finish(ctx.regs)
        });
        return 0;
    }
    match meter::run(|| begin(&ctx)) {
        Some(Return::Watched) => 0,
        Some(Return::Unwatched) | None => {
            meter::let_return_go();
            NO_PROBE_AT_THE_END
        }
    }
}

/// A block is about to be released.
#[uprobe]
pub fn free_enter(ctx: ProbeContext) -> u32 {
    kernel_stack::keep();
    meter::run(|| release(&ctx));
    0
}

/// An allocation, reallocation or resize returns.
#[uretprobe]
pub fn alloc_leave(ctx: RetProbeContext) -> u32 {
    kernel_stack::keep();
    meter::run(|| finish(ctx.regs));
    0
}

/// At a function's own return instruction, where a return probe would stand in an exception's way:
/// the unwinder meets the kernel's trampoline instead of the caller.
#[uprobe]
pub fn alloc_exit(ctx: ProbeContext) -> u32 {
    kernel_stack::keep();
    meter::run(|| finish_in_place(&ctx));
    0
}

/// Does nothing: what a probe costs by itself.
#[uprobe]
pub fn empty_enter(_ctx: ProbeContext) -> u32 {
    0
}

/// Does nothing: what a return probe costs by itself.
#[uretprobe]
pub fn empty_leave(_ctx: RetProbeContext) -> u32 {
    0
}

#[inline(always)]
fn register(regs: *const pt_regs, slot: RegisterSlot) -> u64 {
    // The usual argument registers directly; the context can't be read at a variable offset.
    // SAFETY: `regs` is the program's context.
    unsafe {
        match slot.0 {
            14 => (*regs).rdi,
            13 => (*regs).rsi,
            12 => (*regs).rdx,
            0..14 => {
                bpf_probe_read_kernel(regs.cast::<u64>().add(usize::from(slot.0))).unwrap_or(0)
            }
            _ => 0,
        }
    }
}

/// What the current thread has in flight, when its process is part of the session.
#[inline(always)]
fn thread_state(pid_tgid: u64) -> Option<&'static mut ThreadState> {
    if let Some(state) = THREADS.get_ptr_mut(pid_tgid) {
        // SAFETY: only the thread itself writes its state.
        return Some(unsafe { &mut *state });
    }
    let process = processes::watched((pid_tgid >> 32) as u32)?;
    let _ = THREADS.insert(pid_tgid, &IDLE, BPF_NOEXIST as u64);
    match THREADS.get_ptr_mut(pid_tgid) {
        Some(state) => {
            // SAFETY: as above.
            let state = unsafe { &mut *state };
            state.owner = process.owner;
            Some(state)
        }
        None => {
            maps::lost(Loss::ThreadsFull);
            None
        }
    }
}

#[inline(always)]
fn call(ctx: &ProbeContext, cookie: Cookie) -> Call {
    let regs = ctx.regs;
    Call {
        cookie,
        // SAFETY: `regs` is the program's context.
        stack_pointer: unsafe { (*regs).rsp } + u64::from(cookie.stack_distance),
        size: register(regs, cookie.size),
        second_size: register(regs, cookie.second_size),
        pointer: register(regs, cookie.pointer),
    }
}

/// What the probe's function does.
#[inline(always)]
fn cookie(ctx: &ProbeContext) -> Option<Cookie> {
    // SAFETY: the context is a uprobe's.
    Cookie::unpack(unsafe { bpf_get_attach_cookie(ctx.as_ptr()) })
}

#[inline(always)]
fn begin(ctx: &ProbeContext) -> Option<Return> {
    let sampling = maps::counting_calls()?;
    let call = call(ctx, cookie(ctx)?);
    let mut books = KernelBooks::new(sampling);
    let chosen = ledger::choose(&mut books, &call);
    // Where every process is watched, the first call tells of a new one.
    let known = settings::get(&settings::WATCH_ALL) == 0;
    if known && ledger::leaves_no_trace(&call, chosen) && !maps::tells_mappings() {
        return Some(Return::Unwatched);
    }
    let thread = thread_state(bpf_get_current_pid_tgid())?;
    Some(ledger::enter(thread, &mut books, &call, chosen))
}

#[inline(always)]
fn release(ctx: &ProbeContext) -> Option<()> {
    let sampling = maps::counting_calls()?;
    let call = call(ctx, cookie(ctx)?);
    if sampling.interval_bytes != 0 && !maps::may_be_recorded(call.pointer) {
        return None;
    }
    let pid_tgid = bpf_get_current_pid_tgid();
    // SAFETY: only the thread itself writes its state.
    let thread = THREADS.get_ptr_mut(pid_tgid).map(|state| unsafe { &mut *state });
    let owner = match &thread {
        Some(thread) => thread.owner,
        None => processes::watched((pid_tgid >> 32) as u32)?.owner,
    };
    ledger::free(thread, &mut KernelBooks::new(sampling), owner, &call);
    Some(())
}

/// How a call ended.
struct Ended {
    result: u64,
    /// At the function's entry.
    stack_pointer: u64,
    /// Of the caller.
    registers: Registers,
}

#[inline(always)]
fn finish(regs: *const pt_regs) -> Option<()> {
    settle(|| {
        // SAFETY: the context is the program's. The return has popped the return address.
        let regs = unsafe { &*regs };
        Some(Ended {
            result: regs.rax,
            stack_pointer: regs.rsp.wrapping_sub(8),
            registers: Registers { ip: regs.rip, sp: regs.rsp, bp: regs.rbp, after_call: 1 },
        })
    })
}

#[inline(always)]
fn finish_in_place(ctx: &ProbeContext) -> Option<()> {
    settle(|| {
        // SAFETY: the context is the program's.
        let regs = unsafe { &*ctx.regs };
        Some(Ended {
            result: regs.rax,
            stack_pointer: regs.rsp,
            registers: Registers {
                // SAFETY: the helper checks the address and fails on what it cannot read.
                ip: unsafe { bpf_probe_read_user(regs.rsp as *const u64) }.ok()?,
                sp: regs.rsp.wrapping_add(8),
                bp: regs.rbp,
                after_call: 1,
            },
        })
    })
}

#[inline(always)]
fn settle(ended: impl FnOnce() -> Option<Ended>) -> Option<()> {
    let sampling = maps::counting_calls()?;
    let pid_tgid = bpf_get_current_pid_tgid();
    let thread = THREADS.get_ptr_mut(pid_tgid)?;
    // SAFETY: only the thread itself writes its state.
    let thread = unsafe { &mut *thread };
    if thread.depth == 0 {
        return None;
    }
    let Ended { result, stack_pointer, registers } = ended()?;
    if settings::get(&settings::MAY_SAMPLE) != 0 && ledger::leave_unseen(thread, stack_pointer) {
        return None;
    }
    let process = processes::watched((pid_tgid >> 32) as u32)?;
    let mut books = KernelBooks::new(sampling);
    let birth = ledger::leave(thread, &mut books, stack_pointer, result)?;
    // Who looks at page faults comes for the records by itself.
    let haste = settings::get(&settings::EVENT_FLAGS) == 0;
    let captured = stack::capture(process.owner, process.library_epoch, &registers, haste);
    books.remember(&captured);
    // SAFETY: the helper has no preconditions.
    ledger::born(&mut books, &birth, captured.stack, unsafe { bpf_ktime_get_ns() });
    Some(())
}
