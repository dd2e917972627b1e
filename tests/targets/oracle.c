/* The preloaded oracle: logs every block of a program that knows nothing of it.
 *
 * Loaded before the allocator under test; each call goes on to the next definition, with the same
 * sizes, and gets the same addresses. It finds its books' path in ORACLE_FILE. */
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

#include "table.h"

#define EXPORT __attribute__((visibility("default")))

static const char *path;
static atomic_int state; /* 0: nothing known, 1: being looked up, 2: ready */

static void *(*next_malloc)(size_t);
static void *(*next_calloc)(size_t, size_t);
static void *(*next_realloc)(void *, size_t);
static void *(*next_memalign)(size_t, size_t);
static void *(*next_aligned_alloc)(size_t, size_t);
static int (*next_posix_memalign)(void **, size_t, size_t);
static void *(*next_valloc)(size_t);
static void *(*next_pvalloc)(size_t);
static void (*next_free)(void *);

/* `dlsym` may allocate while the real functions are still unknown: those few bytes come from here
 * and are never released. */
static _Alignas(16) char early[1 << 16];
static atomic_size_t early_used;

static void *early_block(size_t size_bytes) {
    size_t at = atomic_fetch_add(&early_used, (size_bytes + 15) & ~(size_t)15);
    if (at + size_bytes > sizeof early) abort();
    return early + at;
}

static int is_early(const void *block) {
    return (const char *)block >= early && (const char *)block < early + sizeof early;
}

static void in_child(void) {
    if (books) books_open_for_process(path);
}

static int ready(void) {
    int seen = atomic_load_explicit(&state, memory_order_acquire);
    if (seen == 2) return 1;
    int expected = 0;
    if (!atomic_compare_exchange_strong(&state, &expected, 1)) return expected == 2;
    next_malloc = dlsym(RTLD_NEXT, "malloc");
    next_calloc = dlsym(RTLD_NEXT, "calloc");
    next_realloc = dlsym(RTLD_NEXT, "realloc");
    next_memalign = dlsym(RTLD_NEXT, "memalign");
    next_aligned_alloc = dlsym(RTLD_NEXT, "aligned_alloc");
    next_posix_memalign = dlsym(RTLD_NEXT, "posix_memalign");
    next_valloc = dlsym(RTLD_NEXT, "valloc");
    next_pvalloc = dlsym(RTLD_NEXT, "pvalloc");
    next_free = dlsym(RTLD_NEXT, "free");
    path = getenv("ORACLE_FILE");
    if (!path || !next_malloc || !next_free) abort();
    /* A shell that wraps the program would leave its books to it: each process has its own. */
    books_open_for_process(path);
    atomic_store_explicit(&state, 2, memory_order_release);
    pthread_atfork(NULL, NULL, in_child);
    return 1;
}

__attribute__((constructor)) static void start(void) { ready(); }

static void *born(void *block, size_t size_bytes, uint64_t begun_ns) {
    if (block) {
        int kept = errno;
        books_insert((uint64_t)block, size_bytes, begun_ns);
        errno = kept;
    }
    return block;
}

EXPORT void *malloc(size_t size) {
    if (!ready()) return early_block(size);
    uint64_t begun = now_ns();
    return born(next_malloc(size), size, begun);
}

EXPORT void *calloc(size_t count, size_t size) {
    if (!ready()) return early_block(count * size);
    uint64_t begun = now_ns();
    return born(next_calloc(count, size), count * size, begun);
}

EXPORT void free(void *block) {
    if (!block || is_early(block)) return;
    if (!ready()) abort();
    books_remove((uint64_t)block);
    next_free(block);
}

EXPORT void *realloc(void *old, size_t size) {
    if (is_early(old)) {
        void *moved = malloc(size);
        if (moved) memcpy(moved, old, size < 1024 ? size : 1024);
        return moved;
    }
    if (!ready()) return early_block(size);
    uint64_t begun = now_ns();
    struct known_block known = {0};
    if (old) known = books_remove((uint64_t)old);
    void *block = next_realloc(old, size);
    if (!block && size != 0) books_restore(known);
    return born(block, size, begun);
}

EXPORT void *reallocarray(void *old, size_t count, size_t size) {
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) {
        errno = ENOMEM;
        return NULL;
    }
    return realloc(old, bytes);
}

EXPORT void *memalign(size_t alignment, size_t size) {
    ready();
    uint64_t begun = now_ns();
    return born(next_memalign(alignment, size), size, begun);
}

EXPORT void *aligned_alloc(size_t alignment, size_t size) {
    ready();
    uint64_t begun = now_ns();
    return born(next_aligned_alloc(alignment, size), size, begun);
}

EXPORT int posix_memalign(void **result, size_t alignment, size_t size) {
    ready();
    uint64_t begun = now_ns();
    int error = next_posix_memalign(result, alignment, size);
    if (error == 0) born(*result, size, begun);
    return error;
}

EXPORT void *valloc(size_t size) {
    ready();
    uint64_t begun = now_ns();
    return born(next_valloc(size), size, begun);
}

EXPORT void *pvalloc(size_t size) {
    ready();
    uint64_t begun = now_ns();
    return born(next_pvalloc(size), size, begun);
}

/* jemalloc 5.3, tcmalloc and mimalloc bring an `operator new` that never calls `malloc`. */
#define NEXT(name)                                                            \
    static __typeof__(&name) next;                                            \
    if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPERATOR_NEW(name, parameters, arguments)                             \
    EXPORT void *name parameters;                                             \
    EXPORT void *name parameters {                                            \
        NEXT(name);                                                           \
        uint64_t begun = now_ns();                                            \
        return born(next arguments, size, begun);                             \
    }

#define OPERATOR_DELETE(name, parameters, arguments)                          \
    EXPORT void name parameters;                                              \
    EXPORT void name parameters {                                             \
        NEXT(name);                                                           \
        if (block) books_remove((uint64_t)block);                             \
        next arguments;                                                       \
    }

OPERATOR_NEW(_Znwm, (size_t size), (size))
OPERATOR_NEW(_Znam, (size_t size), (size))
OPERATOR_NEW(_ZnwmRKSt9nothrow_t, (size_t size, const void *tag), (size, tag))
OPERATOR_NEW(_ZnamRKSt9nothrow_t, (size_t size, const void *tag), (size, tag))
OPERATOR_NEW(_ZnwmSt11align_val_t, (size_t size, size_t alignment), (size, alignment))
OPERATOR_NEW(_ZnamSt11align_val_t, (size_t size, size_t alignment), (size, alignment))
OPERATOR_NEW(_ZnwmSt11align_val_tRKSt9nothrow_t,
             (size_t size, size_t alignment, const void *tag), (size, alignment, tag))
OPERATOR_NEW(_ZnamSt11align_val_tRKSt9nothrow_t,
             (size_t size, size_t alignment, const void *tag), (size, alignment, tag))
OPERATOR_DELETE(_ZdlPv, (void *block), (block))
OPERATOR_DELETE(_ZdaPv, (void *block), (block))
OPERATOR_DELETE(_ZdlPvm, (void *block, size_t size), (block, size))
OPERATOR_DELETE(_ZdaPvm, (void *block, size_t size), (block, size))
OPERATOR_DELETE(_ZdlPvRKSt9nothrow_t, (void *block, const void *tag), (block, tag))
OPERATOR_DELETE(_ZdaPvRKSt9nothrow_t, (void *block, const void *tag), (block, tag))
OPERATOR_DELETE(_ZdlPvSt11align_val_t, (void *block, size_t alignment), (block, alignment))
OPERATOR_DELETE(_ZdaPvSt11align_val_t, (void *block, size_t alignment), (block, alignment))
OPERATOR_DELETE(_ZdlPvmSt11align_val_t, (void *block, size_t size, size_t alignment),
                (block, size, alignment))
OPERATOR_DELETE(_ZdaPvmSt11align_val_t, (void *block, size_t size, size_t alignment),
                (block, size, alignment))
OPERATOR_DELETE(_ZdlPvSt11align_val_tRKSt9nothrow_t,
                (void *block, size_t alignment, const void *tag), (block, alignment, tag))
OPERATOR_DELETE(_ZdaPvSt11align_val_tRKSt9nothrow_t,
                (void *block, size_t alignment, const void *tag), (block, alignment, tag))
