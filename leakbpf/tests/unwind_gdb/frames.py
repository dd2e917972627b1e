# Runs inside gdb, attached to a process. For each command on standard input, lets the process run
# up to its next stop (continue) or for one instruction (step), and prints the registers and the
# return addresses of all threads as gdb sees them. Lines for the test begin with "@".
import sys

import gdb

for setting in (
    "pagination off",
    "confirm off",
    "debuginfod enabled off",
    "backtrace past-main on",
    "backtrace past-entry on",
    "backtrace limit unlimited",
    "print thread-events off",
    "scheduler-locking step",
):
    gdb.execute("set " + setting)
gdb.execute("handle all nostop noprint pass", to_string=True)
# How the test stops a process that does not stop by itself.
gdb.execute("handle SIGWINCH stop print nopass", to_string=True)
gdb.execute("handle SIGTRAP stop print nopass", to_string=True)

MASK = (1 << 64) - 1


def tell(*words):
    # gdb may have left a line unfinished.
    print("\n@", *words, flush=True)


def point():
    selected = gdb.selected_thread()
    for thread in gdb.selected_inferior().threads():
        thread.switch()
        frame = gdb.newest_frame()
        registers = [int(frame.read_register(name)) & MASK for name in ("rip", "rsp", "rbp")]
        tell("thread", thread.ptid[1], *registers)
        while frame is not None:
            # Inlined and tail-called functions have no frame of their own on the stack.
            if frame.type() not in (gdb.INLINE_FRAME, gdb.TAILCALL_FRAME):
                tell("frame", frame.pc(), frame.name() or "?")
            frame = frame.older()
    # It may be the thread that has just ended.
    if selected is not None and selected.is_valid():
        selected.switch()
    tell("end")


try:
    point()
    for line in sys.stdin:
        command = line.strip()
        if command == "quit":
            break
        gdb.execute("stepi" if command == "step" else "continue", to_string=True)
        point()
except Exception as error:
    tell("error", error)
gdb.execute("detach", to_string=True)
