//! Whose memory it is: the processes of the session, through fork, exec and exit.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_ns},
    macros::{tracepoint, uprobe},
    programs::{ProbeContext, TracePointContext},
};
use leakbpf_common::abi::{
    EndedRecord, ExecRecord, ForkRecord, LibrariesRecord, Loss, Owner, ProcessState, RecordHead,
    RecordKind, UNMAPPED_INTERVAL_NS, UnmappedRecord, process_flags,
};

use crate::{
    books::KernelBooks,
    kernel_stack,
    maps::{self, CARRIERS, PROCESSES, RECORDS, SPACES, THREADS, settings},
    task,
};

const CLONE_VM: u64 = 0x100;
const CLONE_THREAD: u64 = 0x10000;

#[inline(always)]
fn now_ns() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}

#[inline(always)]
fn pid_tgid() -> u64 {
    bpf_get_current_pid_tgid()
}

/// Generations differ when two lives of one process id begin more than 16 µs apart.
#[inline(always)]
fn new_owner(tgid: u32) -> Owner {
    Owner::new(tgid, (now_ns() >> 14) as u32)
}

#[inline(always)]
pub fn head(kind: RecordKind, owner: Owner) -> RecordHead {
    RecordHead { kind: kind as u32, tid: pid_tgid() as u32, owner, time_ns: now_ns() }
}

#[inline(always)]
pub fn send<T: 'static>(record: &T) {
    if RECORDS.output::<T>(record, settings::get(&settings::EVENT_FLAGS).into()).is_err() {
        maps::lost(Loss::EventsDropped);
    }
}

/// The process's state when it is part of the session.
#[inline(always)]
pub fn watched(tgid: u32) -> Option<ProcessState> {
    // SAFETY: without preallocation the element is not reused before this program ends.
    if let Some(state) = unsafe { PROCESSES.get(tgid) } {
        return Some(*state);
    }
    if settings::get(&settings::WATCH_ALL) == 0 || tgid == settings::get(&settings::AGENT_TGID) {
        return None;
    }
    let state = ProcessState {
        owner: new_owner(tgid),
        library_epoch: 0,
        flags: process_flags::MAPPINGS,
        asked_ns: 0,
    };
    if PROCESSES.insert(tgid, state, BPF_NOEXIST as u64).is_ok() {
        send(&LibrariesRecord {
            head: head(RecordKind::Seen, state.owner),
            library_epoch: 0,
            pad: 0,
        });
        return Some(state);
    }
    // SAFETY: as above.
    match unsafe { PROCESSES.get(tgid) } {
        Some(state) => Some(*state),
        None => {
            maps::lost(Loss::ProcessesFull);
            None
        }
    }
}

/// `task:task_newtask`, in the parent, before the child runs.
#[tracepoint]
pub fn task_new(ctx: TracePointContext) -> u32 {
    let _ = forked(&ctx);
    0
}

#[inline(always)]
fn forked(ctx: &TracePointContext) -> Option<()> {
    let pid_offset = settings::get(&settings::NEWTASK_PID_OFFSET) as usize;
    let flags_offset = settings::get(&settings::NEWTASK_FLAGS_OFFSET) as usize;
    // SAFETY: the helper checks what it reads.
    let clone_flags = unsafe { ctx.read_at::<u64>(flags_offset) }.ok()?;
    if clone_flags & CLONE_THREAD != 0 {
        return None;
    }
    // SAFETY: as above.
    let child_tgid = unsafe { ctx.read_at::<u32>(pid_offset) }.ok()?;
    let parent_tgid = (pid_tgid() >> 32) as u32;
    // SAFETY: without preallocation the element is not reused before this program ends.
    let parent = match unsafe { PROCESSES.get(parent_tgid) } {
        Some(parent) => *parent,
        None => {
            // Whoever had this process id before is gone.
            let _ = PROCESSES.remove(child_tgid);
            return None;
        }
    };
    let borrows = clone_flags & CLONE_VM != 0;
    let follow = settings::get(&settings::FOLLOW_FORKS) != 0;
    if !borrows && !follow {
        let _ = PROCESSES.remove(child_tgid);
        return None;
    }
    let mut child = parent;
    if borrows {
        child.flags |= process_flags::BORROWS_MEMORY;
    } else {
        child.owner = new_owner(child_tgid);
        child.flags &= !process_flags::BORROWS_MEMORY;
        inherit_space(parent.owner, child.owner);
    }
    if PROCESSES.insert(child_tgid, child, BPF_ANY as u64).is_err() {
        maps::lost(Loss::ProcessesFull);
        return None;
    }
    if follow {
        send(&ForkRecord {
            head: head(RecordKind::Fork, parent.owner),
            child: child.owner,
            child_tgid,
            flags: child.flags,
        });
    }
    Some(())
}

/// A child has its parent's mappings from its first instruction on.
#[inline(always)]
fn inherit_space(parent: Owner, child: Owner) {
    // SAFETY: the memory stays mapped until this program ends.
    let Some(space) = (unsafe { SPACES.get(parent) }) else { return };
    if SPACES.insert(child, space, BPF_ANY as u64).is_err() {
        maps::lost(Loss::SpacesFull);
        return;
    }
    if let Some(copy) = SPACES.get_ptr_mut(child) {
        // SAFETY: the field of a live map value, of a process that does not run yet.
        unsafe { (*copy).owner = child };
    }
}

/// Tells the agent, now and then, that the current process has code that it does not know.
#[inline(always)]
pub fn ask_for_mappings(address: u64) {
    let tgid = (pid_tgid() >> 32) as u32;
    let Some(state) = PROCESSES.get_ptr_mut(tgid) else { return };
    let now = now_ns();
    // SAFETY: fields of a live map value. Two threads at once would ask twice, no more.
    let (owner, library_epoch) = unsafe {
        if now - (*state).asked_ns < UNMAPPED_INTERVAL_NS {
            return;
        }
        (*state).asked_ns = now;
        ((*state).owner, (*state).library_epoch)
    };
    send(&UnmappedRecord {
        head: head(RecordKind::Unmapped, owner),
        library_epoch,
        pad: 0,
        address,
    });
}

/// `sched:sched_process_exec`, in the process, with its new memory.
#[tracepoint]
pub fn process_exec(ctx: TracePointContext) -> u32 {
    let _ = executed(&ctx);
    0
}

#[inline(always)]
fn executed(ctx: &TracePointContext) -> Option<()> {
    let id = pid_tgid();
    let tgid = (id >> 32) as u32;
    // SAFETY: without preallocation the element is not reused before this program ends.
    let old = unsafe { *PROCESSES.get(tgid)? };
    let _ = THREADS.remove(id);
    // A thread that was not the first takes that one's id (fs/exec.c, `de_thread`).
    let old_pid_offset = settings::get(&settings::EXEC_OLD_PID_OFFSET) as usize;
    // SAFETY: the helper checks what it reads.
    let old_tid = unsafe { ctx.read_at::<u32>(old_pid_offset) }.unwrap_or(id as u32);
    let _ = THREADS.remove(id & !0xffff_ffff | u64::from(old_tid));
    let borrowed = old.flags & process_flags::BORROWS_MEMORY != 0;
    if borrowed && settings::get(&settings::FOLLOW_FORKS) == 0 {
        let _ = PROCESSES.remove(tgid);
        return None;
    }
    let new = ProcessState {
        owner: new_owner(tgid),
        library_epoch: 0,
        flags: old.flags & !process_flags::BORROWS_MEMORY,
        asked_ns: 0,
    };
    if PROCESSES.insert(tgid, new, BPF_ANY as u64).is_err() {
        maps::lost(Loss::ProcessesFull);
        return None;
    }
    send(&ExecRecord {
        head: head(RecordKind::Exec, new.owner),
        old: old.owner,
        old_flags: old.flags,
        old_tid,
    });
    Some(())
}

/// `sched:sched_process_exit`, in each thread that ends.
#[tracepoint]
pub fn thread_exit(_ctx: TracePointContext) -> u32 {
    let _ = ended();
    0
}

#[inline(always)]
fn ended() -> Option<()> {
    let id = pid_tgid();
    let tgid = (id >> 32) as u32;
    if let Some(thread) = THREADS.get_ptr_mut(id) {
        if let Some(sampling) = maps::counting() {
            // SAFETY: only the thread itself writes its state.
            unsafe { (*thread).end(&mut KernelBooks::new(sampling)) };
        }
        let _ = THREADS.remove(id);
    }
    if tgid == id as u32 {
        // SAFETY: without preallocation the element is not reused before this program ends.
        let state = unsafe { *PROCESSES.get(tgid)? };
        if state.flags & process_flags::BORROWS_MEMORY != 0 {
            let _ = PROCESSES.remove(tgid);
        }
    }
    tell_time(tgid);
    // The agent names them; nobody else does it for the thread that has the id next.
    if CARRIERS.remove(id as u32).is_ok() {
        // SAFETY: as above.
        let state = unsafe { *PROCESSES.get(tgid)? };
        send(&head(RecordKind::CarrierEnded, state.owner));
    }
    Some(())
}

/// What a process has used up, when it ends: nobody can ask later.
#[inline(always)]
fn tell_time(tgid: u32) {
    // SAFETY: without preallocation the element is not reused before this program ends.
    let Some(state) = (unsafe { PROCESSES.get(tgid) }) else { return };
    if state.flags & process_flags::BORROWS_MEMORY == 0
        && let Some(cpu_ns) = task::process_time_at_end()
    {
        send(&EndedRecord { head: head(RecordKind::Ended, state.owner), cpu_ns });
    }
}

/// The dynamic loader has changed the set of libraries (`_dl_debug_state`).
#[uprobe]
pub fn libraries_changed(_ctx: ProbeContext) -> u32 {
    kernel_stack::keep();
    let _ = changed();
    0
}

#[inline(always)]
fn changed() -> Option<()> {
    let tgid = (pid_tgid() >> 32) as u32;
    let state = PROCESSES.get_ptr_mut(tgid)?;
    // SAFETY: a live map value; the loader holds its lock, so no other thread is here.
    let state = unsafe {
        (*state).library_epoch += 1;
        *state
    };
    send(&LibrariesRecord {
        head: head(RecordKind::Libraries, state.owner),
        library_epoch: state.library_epoch,
        pad: 0,
    });
    Some(())
}
