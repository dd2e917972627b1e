/* Every function of the C allocation interface, in all its forms. */
#include <malloc.h>
#include <signal.h>

#include "target.h"

#define KEEP_EVERY 3

static void keep_some(void **blocks, int count) {
    for (int i = 0; i < count; i++)
        if (i % KEEP_EVERY != 0) t_free(blocks[i]);
}

static void basic(int count, char **arguments) {
    (void)count, (void)arguments;
    void *blocks[60];
    for (int i = 0; i < 60; i++) {
        switch (i % 3) {
        case 0: blocks[i] = t_malloc((size_t)(i + 1) * 37); break;
        case 1: blocks[i] = t_calloc((size_t)i + 1, 11); break;
        case 2: blocks[i] = t_realloc(NULL, (size_t)(i + 1) * 501); break;
        }
        require(blocks[i]);
    }
    for (int i = 0; i < 60; i++)
        if (i % 4 != 0) t_free(blocks[i]);
    t_free(NULL);
    /* Large enough for a mapping of its own in every allocator. */
    void *large = t_malloc(40 << 20), *freed = t_malloc(50 << 20);
    require(large && freed);
    t_free(freed);
}

static void zero(int count, char **arguments) {
    (void)count, (void)arguments;
    for (int i = 0; i < 4; i++) {
        void *kept = t_malloc(0), *freed = t_malloc(0), *none = t_calloc(0, 5);
        (void)kept;
        t_free(freed);
        if (i % 2) t_free(none);
        /* A free or a block without bytes: the return value says which. */
        (void)t_realloc(t_malloc(100), 0);
        (void)t_realloc(NULL, 0);
    }
}

static void reallocs(int count, char **arguments) {
    (void)count, (void)arguments;
    void *grown = t_malloc(100);
    for (size_t size = 200; size < 3 << 20; size *= 2) require(grown = t_realloc(grown, size));
    for (size_t size = 1 << 20; size > 64; size /= 3) require(grown = t_realloc(grown, size));
    void *same = t_malloc(1000);
    for (int i = 0; i < 10; i++) same = t_realloc(same, 1000);
    void *in_place = t_malloc(1000);
    for (size_t i = 0; i < 8; i++) in_place = t_realloc(in_place, 1000 - i);
    /* A failing one keeps the block. */
    void *kept = t_malloc(777);
    require(t_realloc(kept, SIZE_MAX / 2) == NULL);
    require(t_realloc(kept, SIZE_MAX / 2 - 4096) == NULL);
    void *freed_after = t_malloc(778);
    require(t_realloc(freed_after, SIZE_MAX / 2) == NULL);
    t_free(freed_after);
    require(t_realloc(NULL, SIZE_MAX / 2) == NULL);
    /* Between entry and return the old address may belong to somebody else: take turns. */
    void *left = t_malloc(64), *right = t_malloc(64);
    for (size_t i = 0; i < 200; i++) {
        left = t_realloc(left, 64 + i % 7 * 4000);
        right = t_realloc(right, 64 + i % 5 * 3000);
    }
}

static void overflow(int count, char **arguments) {
    (void)count, (void)arguments;
    volatile size_t half = SIZE_MAX / 2;
    require(t_new(1, calloc(half, 3)) == NULL);
    require(t_new(1, calloc(half, 1)) == NULL);
    require(t_new(1, malloc(half + 100)) == NULL);
    require(t_calloc(10, 10));
}

static void posix(int count, char **arguments) {
    (void)count, (void)arguments;
    void *blocks[20];
    for (int i = 0; i < 20; i++) {
        void *made = (void *)0x1234;
        uint64_t begun = now_ns();
        size_t size = (size_t)(i + 1) * 100;
        require(posix_memalign(&made, (size_t)64 << (i % 8), size) == 0);
        books_insert((uint64_t)made, size, begun);
        blocks[i] = made;
    }
    keep_some(blocks, 20);
    volatile size_t bad = 3, huge = SIZE_MAX / 2;
    /* A failed call leaves the pointer alone, or clears it; here it names a living block. */
    void *living = t_malloc(321), *pointer = living;
    require(posix_memalign(&pointer, bad, 100) == EINVAL);
    pointer = living;
    require(posix_memalign(&pointer, 64, huge) == ENOMEM);
}

static void aligned(int count, char **arguments) {
    void *blocks[24];
    for (int i = 0; i < 24; i++)
        require(blocks[i] = t_new((size_t)(i + 1) * 128, aligned_alloc(64, (size_t)(i + 1) * 128)));
    keep_some(blocks, 24);
    for (int at = 1; at < count; at++) {
        if (strcmp(arguments[at], "memalign") == 0)
            for (int i = 0; i < 24; i++)
                require(blocks[i] = t_new(i * 50u + 1, memalign((size_t)16 << i % 9, i * 50u + 1)));
        else if (strcmp(arguments[at], "valloc") == 0)
            for (int i = 0; i < 24; i++) require(blocks[i] = t_new(i * 50u + 1, valloc(i * 50u + 1)));
#ifndef WITHOUT_PVALLOC
        else if (strcmp(arguments[at], "pvalloc") == 0)
            for (int i = 0; i < 24; i++)
                require(blocks[i] = t_new(i * 500u + 1, pvalloc(i * 500u + 1)));
#endif
        else if (strcmp(arguments[at], "reallocarray") == 0) {
            for (int i = 0; i < 24; i++) {
                blocks[i] = t_replace(NULL, 7 * 30, reallocarray(old_, 7, 30));
                blocks[i] = t_replace(blocks[i], 70 * 3, reallocarray(old_, 70, 3));
                require(blocks[i] = t_replace(blocks[i], i * 600u + 9, reallocarray(old_, i * 200u + 3, 3)));
            }
            /* An overflowing product keeps the block. */
            volatile size_t half = SIZE_MAX / 2;
            require(t_replace(blocks[0], half, reallocarray(old_, half, 3)) == NULL);
        } else require(!"known function");
        keep_some(blocks, 24);
    }
}

/* Functions that allocate on the caller's behalf. */
static void indirect(int count, char **arguments) {
    (void)count, (void)arguments;
    for (int i = 0; i < 20; i++) {
        char text[64];
        memset(text, 'x', sizeof text);
        text[20 + i] = 0;
        void *copy = t_new(21 + i, strdup(text));
        void *part = t_new(11, strndup(text, 10));
        if (i % 2) t_free(copy);
        else t_free(part);
    }
}

/* Random calls with a seed: many addresses come back again and again. */
static void churn(int count, char **arguments) {
    enum { HELD = 512 };
    static void *held[HELD];
    int calls = count > 1 ? atoi(arguments[1]) : 20000;
    uint64_t random = count > 2 ? strtoull(arguments[2], NULL, 0) : 88172645463325252ULL;
    for (int i = 0; i < calls; i++) {
        uint64_t dice = next_random(&random);
        void **slot = &held[dice >> 8 & (HELD - 1)];
        size_t size = (dice >> 32) % ((dice & 0x30) ? 400 : 70000) + 1;
        switch (dice & 7) {
        case 0: *slot = t_realloc(*slot, size); break;
        case 1: t_free(*slot); *slot = t_calloc(1, size); break;
        case 2: t_free(*slot); *slot = NULL; break;
        default: t_free(*slot); *slot = t_malloc(size); break;
        }
    }
}

/* `many COUNT SIZE`: that many blocks, none ever freed. */
static void many(int count, char **arguments) {
    require(count == 3);
    for (long i = atol(arguments[1]); i > 0; i--) require(t_malloc((size_t)atol(arguments[2])));
}

static void fault(int count, char **arguments) {
    (void)count, (void)arguments;
    raise(9);
}

int main(void) {
    static const struct scenario scenarios[] = {
        {"basic", basic},       {"zero", zero},   {"reallocs", reallocs},
        {"overflow", overflow}, {"posix", posix}, {"aligned", aligned},
        {"indirect", indirect}, {"churn", churn}, {"many", many},
        {"die", fault},         {NULL, NULL},
    };
    return converse(scenarios);
}
