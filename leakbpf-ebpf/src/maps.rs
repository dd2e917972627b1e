//! Every map, and the settings that the agent writes before loading.

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    btf_maps::{Array as BtfArray, ArrayOfMaps},
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuArray, RingBuf},
};
use leakbpf_common::{
    abi::{
        Block, BlockKey, COUNTERS, Control, Cost, Loss, Owner, ProcessState, SiteCounters, SiteKey,
        StackRecord, Tally,
    },
    ledger::ThreadState,
    sampling::Sampling,
    table::{AddressSpace, Block as TableBlock, SPACES_MAX, TABLES_MAX},
    unwind::{Registers, Rule},
};

/// Outstanding blocks. The agent sets the limit; memory is taken as blocks come.
#[map]
pub static BLOCKS: HashMap<BlockKey, Block> = HashMap::with_max_entries(1 << 21, BPF_F_NO_PREALLOC);

#[map]
pub static SITES: HashMap<SiteKey, SiteCounters> =
    HashMap::with_max_entries(1 << 18, BPF_F_NO_PREALLOC);

/// How many recorded blocks are at the addresses of a hash: what is at none needs no look into the
/// other maps. Kept only where blocks may be sampled; blocks that the agent drops stay counted.
#[map]
pub static RECORDED: Array<u32> = Array::with_max_entries(RECORDED_HASHES, 0);

pub const RECORDED_HASHES: u32 = 1 << 16;

/// Keyed by `pid_tgid`.
#[map]
pub static THREADS: HashMap<u64, ThreadState> =
    HashMap::with_max_entries(1 << 17, BPF_F_NO_PREALLOC);

/// Watched processes, keyed by process id.
#[map]
pub static PROCESSES: HashMap<u32, ProcessState> =
    HashMap::with_max_entries(1 << 16, BPF_F_NO_PREALLOC);

/// Threads that a process's probes hang on, by thread id.
#[map]
pub static CARRIERS: HashMap<u32, u32> = HashMap::with_max_entries(1 << 16, BPF_F_NO_PREALLOC);

#[map]
pub static CONTROL: Array<Control> = Array::with_max_entries(1, 0);

/// Indexed by [`Loss`] and [`Tally`].
#[map]
pub static COUNTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTERS, 0);

#[map]
pub static COSTS: PerCpuArray<Cost> = PerCpuArray::with_max_entries(1, 0);

/// Bytes until the next block that is chosen, of whatever runs on the CPU.
#[map]
pub static UNTIL_SAMPLE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

#[map]
pub static RECORDS: RingBuf = RingBuf::with_byte_size(4 << 20, 0);

/// Room for one stack. A probe can be preempted by another on the same CPU (`preempt=full`), so
/// a slot is claimed before it is written.
#[repr(C)]
pub struct Scratch {
    pub busy: u64,
    /// Its own number.
    pub slot: u64,
    pub record: StackRecord,
    pub walk: Walk,
}

/// Of the stack that is copied at once; deeper words are read one by one.
pub const WINDOW_BYTES: u64 = 1024;
pub const WINDOW_WORDS: usize = WINDOW_BYTES as usize / 8;

/// State of a stack walk.
#[repr(C)]
pub struct Walk {
    pub registers: Registers,
    pub hash: u64,
    /// Frames in the record.
    pub count: u64,
    /// [`Outcome`](leakbpf_common::abi::Outcome).
    pub outcome: u64,
    /// An address in no known mapping, or 0.
    pub unmapped: u64,
    /// Position of the last frame's mapping.
    pub mapping: u64,
    /// All ones when frames are places in modules: the list of mappings is one of the present time.
    /// 0 when they are addresses.
    pub in_modules: u64,
    /// 0 when some frame is an address.
    pub all_in_modules: u64,
    pub stack: StackWindow,
    pub rules: [CachedRule; CACHED_RULES],
}

/// A part of the stack.
#[repr(C)]
pub struct StackWindow {
    pub start: u64,
    /// How much was copied.
    pub bytes: u64,
    /// Not 0 when it has served more than one frame.
    pub served: u64,
    pub words: [u64; WINDOW_WORDS],
}

/// A rule that was looked up before.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CachedRule {
    /// Serial number of the table and position in its code; 0 for none.
    pub key: u64,
    pub rule: Rule,
}

pub const CACHED_RULES: usize = 256;

/// Slots of each CPU: nobody was ever seen preempted four deep.
pub const SCRATCH_SLOTS: u32 = 4;

#[map]
pub static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(SCRATCH_SLOTS, 0);

/// Executable mappings of the watched processes.
#[map]
pub static SPACES: HashMap<Owner, AddressSpace> =
    HashMap::with_max_entries(SPACES_MAX, BPF_F_NO_PREALLOC);

/// Inner arrays may have different lengths (include/uapi/linux/bpf.h).
const BPF_F_INNER_MAP: usize = 1 << 12;

/// The modules' unwind tables, each an array of its own that the agent makes and drops.
#[btf_map]
pub static TABLES: ArrayOfMaps<BtfArray<TableBlock, 1, BPF_F_INNER_MAP>, TABLES_MAX> =
    ArrayOfMaps::new();

/// Settings: read-only data that the agent fills in before the programs are loaded.
pub mod settings {
    /// Follow children made by `fork`.
    #[unsafe(no_mangle)]
    pub static FOLLOW_FORKS: u32 = 0;
    /// Watch every process that hits a probe.
    #[unsafe(no_mangle)]
    pub static WATCH_ALL: u32 = 0;
    /// The agent's own process id: never watched.
    #[unsafe(no_mangle)]
    pub static AGENT_TGID: u32 = 0;
    /// [`StackWalk`](leakbpf_common::abi::StackWalk).
    #[unsafe(no_mangle)]
    pub static STACK_WALK: u32 = 0;
    /// Byte offset of `pid` in the record of `task:task_newtask`.
    #[unsafe(no_mangle)]
    pub static NEWTASK_PID_OFFSET: u32 = 8;
    /// Byte offset of `clone_flags` in the record of `task:task_newtask`.
    #[unsafe(no_mangle)]
    pub static NEWTASK_FLAGS_OFFSET: u32 = 32;
    /// Byte offset of `old_pid` in the record of `sched:sched_process_exec`.
    #[unsafe(no_mangle)]
    pub static EXEC_OLD_PID_OFFSET: u32 = 16;

    /// Byte offset of `utask` in `struct task_struct`; 0 when the kernel does not tell.
    #[unsafe(no_mangle)]
    pub static TASK_UTASK: u32 = 0;
    /// Of `return_instances` in `struct uprobe_task`.
    #[unsafe(no_mangle)]
    pub static UTASK_INSTANCES: u32 = 0;
    /// Of `stack` in `struct return_instance`.
    #[unsafe(no_mangle)]
    pub static INSTANCE_STACK: u32 = 0;
    /// Of `orig_ret_vaddr` in `struct return_instance`.
    #[unsafe(no_mangle)]
    pub static INSTANCE_CALLER: u32 = 0;
    /// Of `next` in `struct return_instance`.
    #[unsafe(no_mangle)]
    pub static INSTANCE_NEXT: u32 = 0;

    /// Byte offset of `signal` in `struct task_struct`; 0 when the kernel does not tell.
    #[unsafe(no_mangle)]
    pub static TASK_SIGNAL: u32 = 0;
    /// Of `group_leader`.
    #[unsafe(no_mangle)]
    pub static TASK_LEADER: u32 = 0;
    /// Of `se.sum_exec_runtime`.
    #[unsafe(no_mangle)]
    pub static TASK_RUNTIME: u32 = 0;
    /// Of `live` in `struct signal_struct`.
    #[unsafe(no_mangle)]
    pub static SIGNAL_LIVE: u32 = 0;
    /// Of `sum_sched_runtime` in `struct signal_struct`.
    #[unsafe(no_mangle)]
    pub static SIGNAL_ENDED_RUNTIME: u32 = 0;

    /// Differs from session to session, so that no program can be written against the choice of pages.
    #[unsafe(no_mangle)]
    pub static PAGE_SEED: u32 = 0;
    /// [`limit`](leakbpf_common::pages::limit) of the pages that are looked at.
    #[unsafe(no_mangle)]
    pub static PAGE_LIMIT: u32 = 0;

    /// `BPF_RB_*`, with events of processes: the agent has to be woken explicitly where there may be
    /// unread records that it was not woken for.
    #[unsafe(no_mangle)]
    pub static EVENT_FLAGS: u32 = 0;

    /// 0: every block is recorded, at all times. Else [`Control`](leakbpf_common::abi::Control) says
    /// which are, and sites count blocks in fractions.
    #[unsafe(no_mangle)]
    pub static MAY_SAMPLE: u32 = 0;

    /// Reads a setting; volatile, because the agent changes what the compiler sees as a constant.
    #[inline(always)]
    pub fn get(setting: &'static u32) -> u32 {
        // SAFETY: a reference to a static is valid for reads.
        unsafe { core::ptr::read_volatile(setting) }
    }
}

#[inline(always)]
pub fn count(index: u32) {
    if let Some(counter) = COUNTS.get_ptr_mut(index) {
        // SAFETY: the pointer is to this CPU's own slot of a live array map.
        unsafe { *counter += 1 }
    }
}

#[inline(always)]
pub fn lost(loss: Loss) {
    count(loss as u32);
}

#[inline(always)]
pub fn tally(tally: Tally) {
    count(tally as u32);
}

/// In the ring buffer, of which it is a quarter, from which on the agent is woken.
const UNREAD_MAX_BYTES: u64 = 1 << 20;

/// Flags of a record for which the agent need not be woken.
#[inline(always)]
pub fn without_haste() -> u64 {
    let waiting_bytes = RECORDS.query(BPF_RB_AVAIL_DATA.into());
    if waiting_bytes < UNREAD_MAX_BYTES {
        BPF_RB_NO_WAKEUP.into()
    } else {
        BPF_RB_FORCE_WAKEUP.into()
    }
}

/// Whether the session counts at this moment.
#[inline(always)]
pub fn enabled() -> bool {
    match CONTROL.get(0) {
        Some(control) => control.enabled != 0,
        None => false,
    }
}

/// How calls of allocators are counted at this moment; none when they are not.
#[inline(always)]
pub fn counting_calls() -> Option<Sampling> {
    let control = CONTROL.get(0)?;
    (control.enabled & control.calls != 0).then(|| sampling(control))
}

/// As [`counting_calls`], also between windows, when calls are not counted.
#[inline(always)]
pub fn counting() -> Option<Sampling> {
    let control = CONTROL.get(0)?;
    (control.enabled != 0).then(|| sampling(control))
}

#[inline(always)]
fn sampling(control: &Control) -> Sampling {
    // What is known when a program is loaded costs nothing when it runs.
    if settings::get(&settings::MAY_SAMPLE) == 0 { Sampling::NONE } else { control.sampling }
}

/// Whether mappings are told of.
#[inline(always)]
pub fn tells_mappings() -> bool {
    CONTROL.get(0).is_none_or(|control| control.mappings != 0)
}

/// Where [`RECORDED`] counts an address (Fibonacci hashing: Knuth, TAOCP 3, 6.4).
#[inline(always)]
pub fn recorded_at(address: u64) -> Option<*mut u32> {
    const SHIFT: u32 = u64::BITS - RECORDED_HASHES.trailing_zeros();
    let hash = address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> SHIFT;
    RECORDED.get_ptr_mut(hash as u32)
}

/// Whether a recorded block may be at an address.
#[inline(always)]
pub fn may_be_recorded(address: u64) -> bool {
    match recorded_at(address) {
        // SAFETY: a value of a live array map; others add to it at the same time.
        Some(count) => unsafe { core::ptr::read_volatile(count) != 0 },
        None => true,
    }
}
