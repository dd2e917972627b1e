//! Priority of the agent's own threads.

/// A thread that works for a millisecond now and then, and that others go on without meanwhile.
const NICE: libc::c_int = -10;

/// Has the calling thread run soon after it is woken.
pub fn raise() {
    // It may not be allowed (a container without CAP_SYS_NICE): then it is slower, not wrong.
    // SAFETY: no pointers are passed. 0 is the calling thread, whatever POSIX says of processes
    // (setpriority(2)).
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
}
