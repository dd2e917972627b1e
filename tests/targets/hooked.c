/* An allocator with a hook in the middle of each call, for what must not happen inside the real
 * ones: jumps out, thread ends, signals, stack switches. It never reuses an address, and holds no
 * lock, so that it survives all of them. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default"), noinline))

__attribute__((visibility("default"))) void (*hooked_malloc_hook)(size_t size);

static _Alignas(4096) char arena[512 << 20];
static size_t used;

static void *carve(size_t size, size_t alignment) {
    if (size > sizeof arena / 4) return NULL;
    size_t wanted = size + alignment + 16;
    size_t start = __atomic_fetch_add(&used, (wanted + 15) & ~(size_t)15, __ATOMIC_RELAXED);
    if (start + wanted > sizeof arena) return NULL;
    uintptr_t at = ((uintptr_t)arena + start + 16 + alignment - 1) & ~(uintptr_t)(alignment - 1);
    ((size_t *)at)[-1] = size;
    return (void *)at;
}

EXPORT void *malloc(size_t size) {
    void (*hook)(size_t) = hooked_malloc_hook;
    if (hook) hook(size);
    return carve(size, 16);
}

EXPORT void free(void *block) { __asm__ volatile("" ::"r"(block) : "memory"); }

EXPORT void *calloc(size_t count, size_t size) {
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) return NULL;
    return carve(bytes, 16); /* fresh memory is zero */
}

EXPORT void *realloc(void *old, size_t size) {
    void (*hook)(size_t) = hooked_malloc_hook;
    if (hook) hook(size);
    void *block = carve(size, 16);
    if (block && old) {
        size_t had = ((size_t *)old)[-1];
        memcpy(block, old, had < size ? had : size);
    }
    return block;
}

EXPORT void *memalign(size_t alignment, size_t size) { return carve(size, alignment); }
EXPORT void *aligned_alloc(size_t alignment, size_t size) { return carve(size, alignment); }
EXPORT int posix_memalign(void **result, size_t alignment, size_t size) {
    return (*result = carve(size, alignment)) ? 0 : 12;
}
