/* An allocator's functions, for the planner. */
typedef unsigned long size_t;
static char arena[4096];
static size_t used;
void abort(void);
void *mmap_more(size_t);

void *malloc(size_t size) {
    if (used + size > sizeof arena) return mmap_more(size);
    void *block = arena + used;
    used += (size + 15) & ~15ul;
    return block;
}
void free(void *block) { if (block == arena) used = 0; }
void *calloc(size_t count, size_t size) { return malloc(count * size); }
void *realloc(void *block, size_t size) {
    char *to = malloc(size), *from = block;
    for (size_t i = 0; from && to && i < size; i++) to[i] = from[i];
    free(block);
    return to;
}
int posix_memalign(void **out, size_t alignment, size_t size) {
    *out = malloc(size + alignment);
    return *out ? 0 : 12;
}
void *aligned_alloc(size_t alignment, size_t size) { return malloc(size + alignment); }
void cfree(void *block) { free(block); }
void *_Znwm(size_t size) { void *block = malloc(size); if (!block) abort(); return block; }
void _ZdlPv(void *block) { free(block); }
void _dl_debug_state(void) {}
