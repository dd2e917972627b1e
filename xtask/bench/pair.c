// Reads "PAIRS DEPTH" lines; for each, runs PAIRS of malloc(64) and free under DEPTH more callers
// and prints "pair: NANOSECONDS" of all of them. Allocates nothing else.
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

__attribute__((noinline)) static uint64_t pairs(long count) {
    uint64_t begin = now_ns();
    for (long i = 0; i < count; i++) {
        void *volatile block = malloc(64);
        free(block);
    }
    return now_ns() - begin;
}

__attribute__((noinline)) static uint64_t under(long depth, long count) {
    uint64_t ns = depth ? under(depth - 1, count) : pairs(count);
    __asm__ volatile("" : "+r"(ns)); // keeps the call from becoming a jump
    return ns;
}

int main(void) {
    char line[64];
    ssize_t length;
    while ((length = read(0, line, sizeof line - 1)) > 0) {
        line[length] = 0;
        char *rest;
        long count = strtol(line, &rest, 10);
        long depth = strtol(rest, NULL, 10);
        dprintf(1, "pair: %ju\n", (uintmax_t)under(depth, count));
    }
    return 0;
}
