/* Anonymous mappings, page by page: the truth is the list of the pages that are mapped. */
#include <pthread.h>

#include "target.h"

#define PAGE 4096ULL
enum { MOST_PAGES = 1 << 16 };

static uint64_t pages[MOST_PAGES];
static int page_count;

static void add(void *start, uint64_t bytes) {
    for (uint64_t at = 0; at < bytes; at += PAGE) {
        require(page_count < MOST_PAGES);
        pages[page_count++] = (uint64_t)start + at;
    }
}

static void drop(void *start, uint64_t bytes) {
    int kept = 0;
    for (int i = 0; i < page_count; i++)
        if (pages[i] - (uint64_t)start >= bytes) pages[kept++] = pages[i];
    page_count = kept;
}

static void *map(uint64_t count, int flags, void *where) {
    void *made = mmap(where, count * PAGE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    require(made != MAP_FAILED);
    drop(made, count * PAGE); /* MAP_FIXED replaces */
    add(made, count * PAGE);
    return made;
}

static void unmap(void *start, uint64_t count) {
    require(munmap(start, count * PAGE) == 0);
    drop(start, count * PAGE);
}

static char *after(void *start, uint64_t count) { return (char *)start + count * PAGE; }

static void partial(int count, char **arguments) {
    (void)count, (void)arguments;
    unmap(after(map(16, 0, NULL), 4), 8);  /* in the middle */
    unmap(map(16, 0, NULL), 4);            /* at the start */
    unmap(after(map(16, 0, NULL), 12), 4); /* at the end */
    unmap(map(16, 0, NULL), 16);           /* all */
    /* Across two mappings, and across a hole between them. */
    void *room = map(64, 0, NULL);
    map(16, MAP_FIXED, after(room, 8));
    map(16, MAP_FIXED, after(room, 24));
    unmap(after(room, 16), 16);
    unmap(after(room, 12), 28);
    /* What is not mapped can be unmapped, too. */
    unmap(after(room, 12), 28);
    /* A length that is no multiple of the page frees the whole last page. */
    void *odd = map(4, 0, NULL);
    require(munmap(odd, PAGE + 1) == 0);
    drop(odd, 2 * PAGE);
    /* A failing one changes nothing. */
    void *kept = map(3, 0, NULL);
    require(munmap((char *)kept + 1, PAGE) != 0);
    /* A mapping with an odd length. */
    void *short_one = mmap(NULL, 5000, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(short_one != MAP_FAILED);
    add(short_one, 8192);
}

static void fixed(int count, char **arguments) {
    (void)count, (void)arguments;
    /* The last eight pages are given back, so that what goes over the end hits nothing else. */
    void *room = map(40, 0, NULL);
    require(munmap(after(room, 32), 8 * PAGE) == 0);
    drop(after(room, 32), 8 * PAGE);
    map(8, MAP_FIXED, after(room, 4));
    map(8, MAP_FIXED, after(room, 28)); /* over the end */
    /* A file over anonymous memory: those pages are anonymous no more. */
    int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    require(mmap(after(room, 16), 2 * PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, file, 0) != MAP_FAILED);
    drop(after(room, 16), 2 * PAGE);
    close(file);
    require(mmap(after(room, 4), 8 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == MAP_FAILED);
    /* Only a reservation, later used. */
    void *reserved = mmap(NULL, 8 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    require(reserved != MAP_FAILED && mprotect(reserved, 4 * PAGE, PROT_READ | PROT_WRITE) == 0);
    add(reserved, 8 * PAGE);
}

static void *remap(void *old, uint64_t had, uint64_t wants, int flags, void *where) {
    void *made = flags & MREMAP_FIXED ? mremap(old, had * PAGE, wants * PAGE, flags, where)
                                      : mremap(old, had * PAGE, wants * PAGE, flags);
    if (made == MAP_FAILED) return NULL;
    drop(old, had * PAGE);
    drop(made, wants * PAGE);
    add(made, wants * PAGE);
    return made;
}

static void moved(int count, char **arguments) {
    (void)count, (void)arguments;
    /* In place, there is room behind. */
    void *room = map(64, 0, NULL);
    unmap(after(room, 8), 24);
    require(remap(room, 8, 16, 0, NULL) == room);
    require(remap(room, 16, 6, 0, NULL) == room);
    /* No room: it moves, or fails and stays. */
    void *wall = map(64, 0, NULL);
    map(16, MAP_FIXED, wall);
    require(remap(wall, 8, 40, 0, NULL) == NULL);
    require(remap(wall, 8, 40, MREMAP_MAYMOVE, NULL) != NULL);
    /* To a given place, over something else. */
    void *from = map(8, 0, NULL), *onto = map(32, 0, NULL);
    require(remap(from, 8, 12, MREMAP_MAYMOVE | MREMAP_FIXED, after(onto, 4)) != NULL);
    require(remap(onto, 4, 4, MREMAP_MAYMOVE | MREMAP_FIXED, after(onto, 2)) == NULL);
    /* Only a part of a mapping. */
    void *whole = map(32, 0, NULL);
    require(remap(after(whole, 8), 8, 16, MREMAP_MAYMOVE, NULL) != NULL);
    require(remap((void *)PAGE, 1, 2, MREMAP_MAYMOVE, NULL) == NULL);
#ifdef MREMAP_DONTUNMAP
    void *stays = map(4, 0, NULL);
    void *copy = mremap(stays, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
    if (copy != MAP_FAILED) add(copy, 4 * PAGE);
#endif
}

/* The break up and down, with steps that are no multiple of the page. */
static void breaks(int count, char **arguments) {
    (void)count, (void)arguments;
    uint64_t start = (uint64_t)syscall(SYS_brk, 0);
    uint64_t now = start;
    int64_t steps[] = {100000, 3 * 4096, -5000, 77777, -90000, 1, -1};
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        now += (uint64_t)steps[i];
        require((uint64_t)syscall(SYS_brk, now) == now);
    }
    /* A failing one changes nothing. */
    require((uint64_t)syscall(SYS_brk, 1ULL << 62) == now);
    uint64_t first = (start + PAGE - 1) & ~(PAGE - 1), last = (now + PAGE - 1) & ~(PAGE - 1);
    add((void *)first, last - first);
}

static void *wait_forever(void *argument) {
    (void)argument;
    for (;;) pause();
    return NULL;
}

/* Stacks that the C library maps for its threads. Says `stacks COUNT BYTES`. */
static void stacks(int count, char **arguments) {
    (void)count, (void)arguments;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 1 << 20);
    for (int i = 0; i < 6; i++) {
        pthread_t thread;
        require(pthread_create(&thread, &attributes, wait_forever, NULL) == 0);
    }
    say("stacks %d %d", 6, 1 << 20);
}

/* What the allocator maps for itself is not the user's mapping. */
static void arenas(int count, char **arguments) {
    (void)count, (void)arguments;
    for (int i = 0; i < 30; i++) t_malloc(1 << 20);
    for (int i = 0; i < 3000; i++) t_malloc(5000);
}

static int by_address(const void *left, const void *right) {
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return a < b ? -1 : a > b;
}

static void tell(int count, char **arguments) {
    (void)count, (void)arguments;
    for (int i = 1; i < page_count; i++) { /* insertion sort: qsort may allocate */
        uint64_t page = pages[i];
        int at = i;
        for (; at > 0 && by_address(&pages[at - 1], &page) > 0; at--) pages[at] = pages[at - 1];
        pages[at] = page;
    }
    for (int i = 0; i < page_count;) {
        int end = i + 1;
        while (end < page_count && pages[end] == pages[end - 1] + PAGE) end++;
        say("page %llx %llu", (unsigned long long)pages[i], (unsigned long long)(pages[end - 1] + PAGE - pages[i]));
        i = end;
    }
}

int main(void) {
    static const struct scenario scenarios[] = {
        {"partial", partial}, {"fixed", fixed},   {"moved", moved}, {"breaks", breaks},
        {"stacks", stacks},   {"arenas", arenas}, {"tell", tell},   {NULL, NULL},
    };
    return converse(scenarios);
}
