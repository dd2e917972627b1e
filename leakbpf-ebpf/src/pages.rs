//! Pages, seen when a fault is about to bring them: the memory of any program, whatever hands it out.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, bpf_perf_event_data},
    helpers::bpf_get_current_pid_tgid,
    macros::perf_event,
    programs::PerfEventContext,
};
use leakbpf_common::{
    abi::{Loss, PageRecord, RecordKind, Tally},
    pages,
    unwind::Registers,
};

use crate::{
    mappings,
    maps::{self, RECORDS, settings},
    processes, stack,
};

/// In the ring buffer, of which it is a quarter, from which on the agent is woken.
const UNREAD_MAX_BYTES: u64 = 1 << 20;

/// Every page fault of the CPU, before it is served. Most end at the choice, which comes first.
#[perf_event]
pub fn page_fault(ctx: PerfEventContext) -> u32 {
    let _ = touched(&ctx);
    0
}

#[inline(always)]
fn touched(ctx: &PerfEventContext) -> Option<()> {
    let event = ctx.as_ptr() as *const bpf_perf_event_data;
    // SAFETY: the field of the program's context.
    let address = unsafe { (*event).addr };
    let tgid = (bpf_get_current_pid_tgid() >> 32) as u32;
    let key = u64::from(settings::get(&settings::PAGE_SEED)) << 32 | u64::from(tgid);
    let limit = settings::get(&settings::PAGE_LIMIT);
    if !pages::is_chosen(key, address / pages::PAGE_BYTES, limit) || !maps::enabled() {
        return None;
    }
    let process = processes::watched(tgid)?;
    maps::tally(Tally::PagesTouched);
    let registers = user_registers(event)?;
    let stack = stack::capture(process.owner, process.library_epoch, &registers).stack;
    let record =
        PageRecord { head: processes::head(RecordKind::Page, process.owner), address, stack };
    // The agent comes for them by itself, a few times a second: waking it for each would cost more
    // than all the rest.
    let waiting_bytes = RECORDS.query(BPF_RB_AVAIL_DATA.into());
    let flags =
        if waiting_bytes < UNREAD_MAX_BYTES { BPF_RB_NO_WAKEUP } else { BPF_RB_FORCE_WAKEUP };
    if RECORDS.output::<PageRecord>(&record, flags.into()).is_err() {
        maps::lost(Loss::EventsDropped);
    }
    Some(())
}

/// Of the code that runs in user mode, or that has called the kernel: a system call that fills a
/// buffer touches it first.
#[inline(always)]
fn user_registers(event: *const bpf_perf_event_data) -> Option<Registers> {
    // SAFETY: fields of the program's context.
    let (code_segment, ip, sp, bp) = unsafe {
        let regs = &raw const (*event).regs;
        ((*regs).cs, (*regs).rip, (*regs).rsp, (*regs).rbp)
    };
    // The privilege level: arch/x86/include/asm/ptrace.h, `user_mode`.
    if code_segment & 3 != 0 {
        return Some(Registers { ip, sp, bp, after_call: 0 });
    }
    let regs = mappings::user_registers(mappings::current_registers())?;
    Some(mappings::registers(&regs))
}
