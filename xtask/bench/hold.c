// Reads "BLOCKS SITES", allocates BLOCKS of 64 bytes from SITES different stacks, prints
// "hold: NANOSECONDS" and holds them until its standard input ends.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static void allocate(unsigned long site, int depth);

__attribute__((noinline)) static void left(unsigned long site, int depth) {
    allocate(site >> 1, depth - 1);
    __asm__ volatile(""); // keeps the call from becoming a jump
}

__attribute__((noinline)) static void right(unsigned long site, int depth) {
    allocate(site >> 1, depth - 1);
    __asm__ volatile("");
}

// Each bit of the site's number is one caller, so each site has a stack of its own.
__attribute__((noinline)) static void allocate(unsigned long site, int depth) {
    if (depth == 0) {
        if (!malloc(64)) exit(1);
    } else if (site & 1) {
        right(site, depth);
    } else {
        left(site, depth);
    }
    __asm__ volatile("");
}

int main(void) {
    char line[64];
    ssize_t length = read(0, line, sizeof line - 1);
    if (length <= 0) return 1;
    line[length] = 0;
    char *rest;
    long blocks = strtol(line, &rest, 10);
    long sites = strtol(rest, NULL, 10);
    if (sites < 1) return 1;
    int depth = 1;
    while ((1l << depth) < sites) depth++;
    uint64_t begin = now_ns();
    for (long i = 0; i < blocks; i++) allocate(i % sites, depth);
    dprintf(1, "hold: %ju\n", (uintmax_t)(now_ns() - begin));
    while (read(0, line, sizeof line) > 0) {}
    return 0;
}
