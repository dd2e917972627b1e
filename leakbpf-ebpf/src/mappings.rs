//! Anonymous mappings, seen where the kernel's system calls begin and end, so that direct system
//! calls and static programs count as well.

use aya_ebpf::{
    bindings::pt_regs,
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_current_task_btf, bpf_probe_read_kernel,
        bpf_probe_read_user, bpf_task_pt_regs,
    },
    macros::{fentry, fexit, tracepoint},
    programs::{FEntryContext, FExitContext, TracePointContext},
};
use leakbpf_common::{
    abi::{MappingChange, MappingRecord, ProcessState, RecordKind, StackId, process_flags},
    unwind::Registers,
};

use crate::{
    maps::{self, THREADS},
    processes, stack,
};

const MAP_FIXED: u64 = 0x10;
const MAP_ANONYMOUS: u64 = 0x20;

/// The process's state when its mappings are of interest.
#[inline(always)]
fn interested() -> Option<(u64, ProcessState)> {
    if !maps::enabled() {
        return None;
    }
    let pid_tgid = bpf_get_current_pid_tgid();
    let process = processes::watched((pid_tgid >> 32) as u32)?;
    (process.flags & process_flags::MAPPINGS != 0).then_some((pid_tgid, process))
}

/// The user's registers at the system call.
#[inline(always)]
pub fn user_registers(regs: *const pt_regs) -> Option<pt_regs> {
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_kernel(regs) }.ok()
}

#[inline(always)]
pub fn registers(regs: &pt_regs) -> Registers {
    Registers { ip: regs.rip, sp: regs.rsp, bp: regs.rbp, after_call: 0 }
}

/// Failed calls return `-errno`, and no errno is larger than 4095.
#[inline(always)]
fn failed(result: i64) -> bool {
    (-4095..0).contains(&result)
}

struct Change {
    change: MappingChange,
    address: u64,
    length_bytes: u64,
    flags: u64,
    result: i64,
    stack: StackId,
}

#[inline(always)]
fn report(pid_tgid: u64, process: &ProcessState, stack_pointer: u64, change: Change) {
    // SAFETY: without preallocation the element is not reused before this program ends.
    let inside_allocator = match unsafe { THREADS.get(pid_tgid) } {
        Some(thread) => u32::from(thread.is_inside(stack_pointer, |address| {
            // SAFETY: the helper checks the address and fails on what it cannot read.
            unsafe { bpf_probe_read_user(address as *const u64) }.ok()
        })),
        None => 0,
    };
    processes::send(&MappingRecord {
        head: processes::head(RecordKind::Mapping, process.owner),
        change: change.change as u32,
        inside_allocator,
        address: change.address,
        length_bytes: change.length_bytes,
        flags: change.flags,
        result: change.result,
        stack: change.stack,
    });
}

// Where the kernel lets programs onto its functions (fentry, fexit), only these system calls pay.

#[fexit(function = "__x64_sys_mmap")]
pub fn mmap_fexit(ctx: FExitContext) -> i32 {
    if let Ok(result) = ctx.ret() {
        let _ = map_ends(ctx.arg(0), result);
    }
    0
}

#[fentry(function = "__x64_sys_munmap")]
pub fn munmap_fentry(ctx: FEntryContext) -> i32 {
    let _ = unmap_begins(ctx.arg(0));
    0
}

#[fexit(function = "__x64_sys_munmap")]
pub fn munmap_fexit(ctx: FExitContext) -> i32 {
    if let Ok(result) = ctx.ret() {
        let _ = unmap_ends(ctx.arg(0), result);
    }
    0
}

#[fentry(function = "__x64_sys_mremap")]
pub fn mremap_fentry(ctx: FEntryContext) -> i32 {
    let _ = remap_begins(ctx.arg(0));
    0
}

#[fexit(function = "__x64_sys_mremap")]
pub fn mremap_fexit(ctx: FExitContext) -> i32 {
    if let Ok(result) = ctx.ret() {
        let _ = remap_ends(ctx.arg(0), result);
    }
    0
}

#[fexit(function = "__x64_sys_brk")]
pub fn brk_fexit(ctx: FExitContext) -> i32 {
    if let Ok(result) = ctx.ret() {
        let _ = break_ends(ctx.arg(0), result);
    }
    0
}

// Elsewhere the tracepoints of the system calls serve. They make every system call of the machine
// take the kernel's slower path (`kernel/tracepoint.c`, `syscall_regfunc`).

/// The current thread's user registers. The system call's arguments are still in them at its
/// end; its result is, too (`arch/x86/entry/syscall_64.c`, `do_syscall_64`).
#[inline(always)]
pub fn current_registers() -> *const pt_regs {
    // SAFETY: the helpers have no preconditions.
    unsafe { bpf_task_pt_regs(bpf_get_current_task_btf()) as *const pt_regs }
}

#[inline(always)]
fn current_result(regs: *const pt_regs) -> i64 {
    user_registers(regs).map_or(-1, |regs| regs.rax as i64)
}

#[tracepoint]
pub fn mmap_exit(_ctx: TracePointContext) -> u32 {
    let regs = current_registers();
    let _ = map_ends(regs, current_result(regs));
    0
}

#[tracepoint]
pub fn munmap_entry(_ctx: TracePointContext) -> u32 {
    let _ = unmap_begins(current_registers());
    0
}

#[tracepoint]
pub fn munmap_exit(_ctx: TracePointContext) -> u32 {
    let regs = current_registers();
    let _ = unmap_ends(regs, current_result(regs));
    0
}

#[tracepoint]
pub fn mremap_entry(_ctx: TracePointContext) -> u32 {
    let _ = remap_begins(current_registers());
    0
}

#[tracepoint]
pub fn mremap_exit(_ctx: TracePointContext) -> u32 {
    let regs = current_registers();
    let _ = remap_ends(regs, current_result(regs));
    0
}

#[tracepoint]
pub fn brk_exit(_ctx: TracePointContext) -> u32 {
    let regs = current_registers();
    let _ = break_ends(regs, current_result(regs));
    0
}

#[inline(always)]
fn map_ends(regs: *const pt_regs, result: i64) -> Option<()> {
    let (pid_tgid, process) = interested()?;
    let regs = user_registers(regs)?;
    // A file mapping matters only where it replaces an anonymous one.
    if failed(result) || regs.r10 & (MAP_ANONYMOUS | MAP_FIXED) == 0 {
        return None;
    }
    let stack = if regs.r10 & MAP_ANONYMOUS != 0 {
        stack::capture(process.owner, process.library_epoch, &registers(&regs), true).stack
    } else {
        StackId::LOST
    };
    report(
        pid_tgid,
        &process,
        regs.rsp,
        Change {
            change: MappingChange::Map,
            address: regs.rdi,
            length_bytes: regs.rsi,
            flags: regs.r10,
            result,
            stack,
        },
    );
    Some(())
}

#[inline(always)]
fn unmap_begins(regs: *const pt_regs) -> Option<()> {
    unmapped(regs, MappingChange::Unmap, 0)
}

#[inline(always)]
fn unmap_ends(regs: *const pt_regs, result: i64) -> Option<()> {
    if !failed(result) {
        return None;
    }
    unmapped(regs, MappingChange::UnmapFailed, result)
}

#[inline(always)]
fn unmapped(regs: *const pt_regs, change: MappingChange, result: i64) -> Option<()> {
    let (pid_tgid, process) = interested()?;
    let regs = user_registers(regs)?;
    report(
        pid_tgid,
        &process,
        regs.rsp,
        Change {
            change,
            address: regs.rdi,
            length_bytes: regs.rsi,
            flags: 0,
            result,
            stack: StackId::LOST,
        },
    );
    Some(())
}

#[inline(always)]
fn remap_begins(regs: *const pt_regs) -> Option<()> {
    let (pid_tgid, process) = interested()?;
    let regs = user_registers(regs)?;
    report(
        pid_tgid,
        &process,
        regs.rsp,
        Change {
            change: MappingChange::RemapBegin,
            address: regs.rdi,
            length_bytes: regs.rsi,
            flags: regs.r10,
            result: 0,
            stack: StackId::LOST,
        },
    );
    Some(())
}

#[inline(always)]
fn remap_ends(regs: *const pt_regs, result: i64) -> Option<()> {
    let (pid_tgid, process) = interested()?;
    let regs = user_registers(regs)?;
    let stack = if failed(result) {
        StackId::LOST
    } else {
        stack::capture(process.owner, process.library_epoch, &registers(&regs), true).stack
    };
    report(
        pid_tgid,
        &process,
        regs.rsp,
        Change {
            change: MappingChange::RemapEnd,
            address: regs.rdi,
            length_bytes: regs.rdx,
            flags: regs.r10,
            result,
            stack,
        },
    );
    Some(())
}

#[inline(always)]
fn break_ends(regs: *const pt_regs, result: i64) -> Option<()> {
    let (pid_tgid, process) = interested()?;
    let regs = user_registers(regs)?;
    let stack = stack::capture(process.owner, process.library_epoch, &registers(&regs), true).stack;
    report(
        pid_tgid,
        &process,
        regs.rsp,
        Change {
            change: MappingChange::Break,
            address: regs.rdi,
            length_bytes: 0,
            flags: 0,
            result,
            stack,
        },
    );
    Some(())
}
