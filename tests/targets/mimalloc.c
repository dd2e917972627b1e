/* mimalloc's own interface. */
#include "target.h"

typedef struct mi_heap_s mi_heap_t;
void *mi_malloc(size_t), *mi_calloc(size_t, size_t), *mi_zalloc(size_t), *mi_realloc(void *, size_t);
void *mi_mallocn(size_t, size_t), *mi_reallocn(void *, size_t, size_t), *mi_reallocf(void *, size_t);
void *mi_malloc_small(size_t), *mi_zalloc_small(size_t), *mi_rezalloc(void *, size_t);
void *mi_malloc_aligned(size_t, size_t), *mi_zalloc_aligned(size_t, size_t);
void *mi_calloc_aligned(size_t, size_t, size_t), *mi_realloc_aligned(void *, size_t, size_t);
void *mi_recalloc(void *, size_t, size_t), *mi_new(size_t), *mi_new_aligned(size_t, size_t);
void *mi_new_n(size_t, size_t), *mi_new_nothrow(size_t);
void mi_free(void *), mi_free_size(void *, size_t), mi_free_aligned(void *, size_t);
void mi_free_size_aligned(void *, size_t, size_t);
mi_heap_t *mi_heap_new(void);
void *mi_heap_malloc(mi_heap_t *, size_t), *mi_heap_zalloc(mi_heap_t *, size_t);
void *mi_heap_calloc(mi_heap_t *, size_t, size_t), *mi_heap_realloc(mi_heap_t *, void *, size_t);

static mi_heap_t *heap;

static void forms(int count, char **arguments) {
    (void)count, (void)arguments;
    for (size_t i = 1; i <= 20; i++) {
        size_t n = i * 40;
        void *blocks[] = {
            t_new(n, mi_malloc(n)),
            t_new(n * 3, mi_calloc(n, 3)),
            t_new(n, mi_zalloc(n)),
            t_new(n * 2, mi_mallocn(n, 2)),
            t_new(i * 8, mi_malloc_small(i * 8)),
            t_new(i * 8, mi_zalloc_small(i * 8)),
            t_new(n, mi_malloc_aligned(n, 64)),
            t_new(n, mi_zalloc_aligned(n, 128)),
            t_new(n * 2, mi_calloc_aligned(n, 2, 64)),
            t_new(n, mi_new(n)),
            t_new(n, mi_new_aligned(n, 64)),
            t_new(n * 4, mi_new_n(n, 4)),
            t_new(n, mi_new_nothrow(n)),
        };
        enum { BLOCKS = sizeof blocks / sizeof *blocks };
        blocks[0] = t_replace(blocks[0], n * 9, mi_realloc(old_, bytes_));
        blocks[1] = t_replace(blocks[1], n * 8, mi_reallocn(old_, n, 8));
        blocks[2] = t_replace(blocks[2], n * 7, mi_rezalloc(old_, bytes_));
        blocks[3] = t_replace(blocks[3], n * 6, mi_recalloc(old_, n, 6));
        blocks[6] = t_replace(blocks[6], n * 5, mi_realloc_aligned(old_, bytes_, 64));
        for (size_t at = 0; at < BLOCKS; at++) {
            if ((at + i) % 3) continue;
            if (at == 9) t_delete(blocks[at], mi_free_size(blocks[at], n));
            else if (at == 10) t_delete(blocks[at], mi_free_size_aligned(blocks[at], n, 64));
            else if (at == 7) t_delete(blocks[at], mi_free_aligned(blocks[at], 128));
            else t_delete(blocks[at], mi_free(blocks[at]));
        }
    }
}

static void heaps(int count, char **arguments) {
    (void)count, (void)arguments;
    for (size_t i = 1; i <= 20; i++) {
        void *first = t_new(i * 30, mi_heap_malloc(heap, i * 30));
        void *second = t_new(i * 31, mi_heap_zalloc(heap, i * 31));
        t_new(i * 32 * 2, mi_heap_calloc(heap, i * 32, 2));
        first = t_replace(first, i * 300, mi_heap_realloc(heap, old_, bytes_));
        if (i % 2) t_delete(second, mi_free(second));
    }
}

/* reallocf frees its block when it fails; realloc keeps it. */
static void failing(int count, char **arguments) {
    (void)count, (void)arguments;
    volatile size_t huge = SIZE_MAX / 4;
    void *kept = t_new(555, mi_malloc(555));
    require(t_replace(kept, huge, mi_realloc(old_, bytes_)) == NULL);
    void *freed = t_new(556, mi_malloc(556));
    books_remove((uint64_t)freed);
    require(mi_reallocf(freed, huge) == NULL);
}

int main(void) {
    heap = mi_heap_new();
    static const struct scenario scenarios[] = {
        {"forms", forms}, {"heaps", heaps}, {"failing", failing}, {NULL, NULL}};
    return converse(scenarios);
}
