//! Pages, seen when a fault is about to bring them: the memory of any program, whatever hands it out.
//!
//! The kernel's tracepoints, not its software event: a quarter of the price, which every process of the
//! machine pays, and they tell a write from a read. Memory comes with a write (a page that is read before
//! it was ever written is the one of zeros, `do_anonymous_page` in mm/memory.c), so reads are let pass:
//! code, files, a runtime's safepoints.

use aya_ebpf::{
    bindings::pt_regs, helpers::bpf_get_current_pid_tgid, macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use leakbpf_common::{
    abi::{Loss, PageRecord, RecordKind},
    pages,
};

use crate::{
    mappings,
    maps::{self, RECORDS, settings},
    meter, processes, stack,
};

/// Bit of a page fault's error code (arch/x86/include/asm/trap_pf.h, `X86_PF_WRITE`).
const WRITE: u64 = 1 << 1;

/// `exceptions:page_fault_user`: every fault of code in user mode, before it is served. Most end at the
/// choice, which comes first.
#[raw_tracepoint]
pub fn page_fault_user(ctx: RawTracePointContext) -> i32 {
    let _ = fault(&ctx, || ctx.arg(1));
    0
}

/// `exceptions:page_fault_kernel`: those of the kernel. A system call that fills a buffer touches it first,
/// for the code that has called it.
#[raw_tracepoint]
pub fn page_fault_kernel(ctx: RawTracePointContext) -> i32 {
    let _ = fault(&ctx, mappings::current_registers);
    0
}

#[inline(always)]
fn fault(ctx: &RawTracePointContext, registers: impl Fn() -> *const pt_regs) -> Option<()> {
    let address: u64 = ctx.arg(0);
    let tgid = (bpf_get_current_pid_tgid() >> 32) as u32;
    let key = u64::from(settings::get(&settings::PAGE_SEED)) << 32 | u64::from(tgid);
    let limit = settings::get(&settings::PAGE_LIMIT);
    // The upper half of the addresses is the kernel's own.
    if !pages::is_chosen(key, address / pages::PAGE_BYTES, limit)
        || address >> 63 != 0
        || !maps::enabled()
    {
        return None;
    }
    let process = processes::watched(tgid)?;
    meter::fault();
    if ctx.arg::<u64>(2) & WRITE == 0 {
        return None;
    }
    meter::touch(|| {
        let registers = mappings::registers(&mappings::user_registers(registers())?);
        // The agent comes for the records by itself, a few times a second: waking it for each would
        // cost more than all the rest.
        let stack = stack::capture(process.owner, process.library_epoch, &registers, false).stack;
        let record =
            PageRecord { head: processes::head(RecordKind::Page, process.owner), address, stack };
        if RECORDS.output::<PageRecord>(&record, maps::without_haste()).is_err() {
            maps::lost(Loss::EventsDropped);
        }
        Some(())
    })
}
