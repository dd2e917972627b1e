/* LD_PRELOAD: a leak of LEAK_RATE_BYTES a second (1 MiB by default) in each process that is sent
 * requests, on the thread that reads them, from a function whose name a report should show. */
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SMALLEST = 1024, SIZES = 4, MOST_AT_ONCE = 256 << 10 };

/* Smaller reads are no requests: what wakes a process up (a pipe, a signal) is read so. */
enum { SMALLEST_REQUEST_BUFFER = 1025 };

static long rate_bytes = 1 << 20;
static atomic_long leaked_bytes;
static _Atomic uint64_t began_ms;
static atomic_int owner_pid;

static uint64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

__attribute__((constructor)) static void begin(void) {
    const char *rate = getenv("LEAK_RATE_BYTES");
    if (rate) rate_bytes = atol(rate);
}

/* Loses blocks of 1, 2, 3 and 4 KiB in turn, and returns how many bytes: so much or a little more. */
__attribute__((noinline)) static long planted_leak(long due_bytes) {
    static atomic_uint turn;
    long lost = 0;
    while (lost < due_bytes) {
        size_t size = SMALLEST * (1 + atomic_fetch_add(&turn, 1) % SIZES);
        void *volatile block = malloc(size);
        if (!block) break;
        memset(block, 0x5a, size);
        lost += (long)size;
    }
    return lost;
}

static void leak_what_is_due(void) {
    uint64_t now = now_ms();
    if (atomic_load(&owner_pid) != getpid()) {
        /* The first call, or the first in a child: its time and its leak begin here. */
        atomic_store(&owner_pid, getpid());
        atomic_store(&leaked_bytes, 0);
        atomic_store(&began_ms, now);
        return;
    }
    long target = (long)((now - atomic_load(&began_ms)) * (uint64_t)rate_bytes / 1000);
    long leaked = atomic_load(&leaked_bytes);
    long due = target - leaked;
    if (due < SMALLEST) return;
    if (due > MOST_AT_ONCE) due = MOST_AT_ONCE;
    /* Of several threads, one pays. */
    if (!atomic_compare_exchange_strong(&leaked_bytes, &leaked, leaked + due)) return;
    int error = errno;
    atomic_fetch_add(&leaked_bytes, planted_leak(due) - due);
    errno = error;
}

/* The calls themselves go to the kernel: looking up the C library's own could allocate. */
ssize_t recv(int socket, void *buffer, size_t size, int flags) {
    leak_what_is_due();
    return syscall(SYS_recvfrom, socket, buffer, size, flags, NULL, NULL);
}

ssize_t read(int file, void *buffer, size_t size) {
    if (size >= SMALLEST_REQUEST_BUFFER) leak_what_is_due();
    return syscall(SYS_read, file, buffer, size);
}
