/* jemalloc's own interface. */
#include "target.h"

void *mallocx(size_t size, int flags);
void *rallocx(void *block, size_t size, int flags);
size_t xallocx(void *block, size_t size, size_t extra, int flags);
void dallocx(void *block, int flags);
void sdallocx(void *block, size_t size, int flags);

#define ZERO 0x40
#define ALIGN_LOG(log) (log)

/* The block keeps its address; what it was asked to be is at most what the call says it is now. */
static void change_in_place(void *block, size_t size, size_t extra) {
    struct known_block known = books_remove((uint64_t)block);
    uint64_t begun = now_ns();
    size_t got = xallocx(block, size, extra, 0);
    if (got < size) {
        books_restore(known);
        return;
    }
    books_insert((uint64_t)block, got < size + extra ? got : size + extra, begun);
}

static void forms(int count, char **arguments) {
    (void)count, (void)arguments;
    for (size_t i = 1; i <= 24; i++) {
        size_t size = i * 50;
        void *plain = t_new(size, mallocx(size, 0));
        void *zeroed = t_new(size, mallocx(size, ZERO));
        void *aligned = t_new(size, mallocx(size, ALIGN_LOG(8)));
        plain = t_replace(plain, size * 3, rallocx(old_, bytes_, 0));
        aligned = t_replace(aligned, size / 2 + 1, rallocx(old_, bytes_, ALIGN_LOG(8)));
        if (i % 3 == 0) t_delete(plain, dallocx(plain, 0));
        if (i % 3 == 1) t_delete(zeroed, sdallocx(zeroed, size, 0));
        if (i % 4 == 1) t_delete(aligned, dallocx(aligned, ALIGN_LOG(8)));
    }
}

static void in_place(int count, char **arguments) {
    (void)count, (void)arguments;
    for (size_t i = 1; i <= 10; i++) {
        void *small = t_new(100, mallocx(100, 0));
        change_in_place(small, 105, 0);    /* the same size class: works */
        change_in_place(small, 90000, 0);  /* does not fit: unchanged */
        void *large = t_new(1 << 20, mallocx(1 << 20, 0));
        change_in_place(large, 1 << 19, 0);
        change_in_place(large, 1 << 19, 1 << 19);
    }
}

static void failing(int count, char **arguments) {
    (void)count, (void)arguments;
    volatile size_t huge = SIZE_MAX / 4;
    void *kept = t_new(444, mallocx(444, 0));
    require(t_replace(kept, huge, rallocx(old_, bytes_, 0)) == NULL);
    require(t_new(huge, mallocx(huge, 0)) == NULL);
}

int main(void) {
    static const struct scenario scenarios[] = {
        {"forms", forms}, {"in_place", in_place}, {"failing", failing}, {NULL, NULL}};
    return converse(scenarios);
}
