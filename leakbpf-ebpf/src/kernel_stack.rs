//! Which stack a program runs on.

use core::arch::asm;

/// Keeps a program on the stack of the thread that it interrupts. The first thing in every program
/// on a uprobe.
///
/// Since 6.13 the kernel gives a program of this kind a private stack, one for each CPU
/// (kernel/bpf/verifier.c, `bpf_enable_priv_stack`), as nothing was thought to run it twice at once
/// there. A probe in user code can be preempted, though, and the next thread's run writes over the
/// stack of the one that waits: the kernel dies of what that reads back. A program with a tail call
/// gets no private stack (`check_max_stack_depth`, from what `check_subprogs` finds before anything is
/// removed as dead). This one can never be reached, and the verifier takes it out.
#[inline(always)]
pub fn keep() {
    // SAFETY: a constant and a jump over the call; were it made, it would change no more than any
    // call does.
    unsafe {
        asm!(
            "r0 = 0",
            "if r0 == 0 goto +1",
            "call 12", // bpf_tail_call
            out("r0") _,
            out("r1") _,
            out("r2") _,
            out("r3") _,
            out("r4") _,
            out("r5") _,
            options(nostack),
        );
    }
}
