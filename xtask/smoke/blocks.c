// Allocates and frees in every common way once it is told to, then prints which blocks it still
// holds: "address size", one a line, and "end". Its own table is static and its output unbuffered,
// so that the books hold nothing else.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SLOTS = 600 };

static struct {
    void *address;
    size_t size;
} slot[SLOTS];

static void put(int i, void *address, size_t size) {
    if (!address) {
        perror("out of memory");
        exit(1);
    }
    memset(address, 1, size);
    slot[i].address = address;
    slot[i].size = size;
}

static void drop(int i) {
    free(slot[i].address);
    slot[i].address = NULL;
}

__attribute__((noinline)) static void fill(void) {
    for (int i = 0; i < SLOTS; i++) {
        size_t size = 1 + (size_t)i * 37 % 5000;
        void *out = NULL;
        switch (i % 5) {
        case 0: put(i, malloc(size), size); break;
        case 1: put(i, calloc(size, 3), size * 3); break;
        case 2: put(i, realloc(NULL, size), size); break;
        case 3: put(i, posix_memalign(&out, 64, size) ? NULL : out, size); break;
        case 4: put(i, aligned_alloc(32, size * 32), size * 32); break;
        }
    }
}

__attribute__((noinline)) static void churn(void) {
    for (int i = 0; i < SLOTS; i += 2) drop(i);
    for (int i = 1; i < SLOTS; i += 6) put(i, realloc(slot[i].address, slot[i].size * 4), slot[i].size * 4);
    // A realloc that cannot be served leaves the block where it is.
    for (int i = 5; i < SLOTS; i += 60) {
        volatile size_t impossible = SIZE_MAX / 2;
        if (realloc(slot[i].address, impossible)) exit(1);
    }
    for (int i = 0; i < SLOTS; i += 4) put(i, malloc(100 + i), 100 + i);
}

int main(void) {
    static char line[8];
    if (read(0, line, sizeof line) < 1) return 1;
    fill();
    churn();
    for (int i = 0; i < SLOTS; i++)
        if (slot[i].address) dprintf(1, "%ju %zu\n", (uintmax_t)(uintptr_t)slot[i].address, slot[i].size);
    dprintf(1, "end\n");
    // Until the agent has looked.
    while (read(0, line, sizeof line) > 0) {}
    return 0;
}
