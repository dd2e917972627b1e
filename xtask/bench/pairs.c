// THREADS: reads milliseconds, one number a line; for each, runs pairs of malloc(64) and free in so
// many threads for so long, and prints how many pairs that were. Allocates nothing else meanwhile.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { MOST_THREADS = 64, PAIRS_A_LOOK = 256 };

static uint64_t until_ns;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static void *pairs(void *count) {
    uint64_t done = 0;
    while (now_ns() < until_ns) {
        for (int i = 0; i < PAIRS_A_LOOK; i++) {
            void *volatile block = malloc(64);
            free(block);
        }
        done += PAIRS_A_LOOK;
    }
    *(uint64_t *)count = done;
    return NULL;
}

int main(int argc, char **argv) {
    int threads = argc > 1 ? atoi(argv[1]) : 1;
    char line[64];
    ssize_t length;
    if (threads < 1 || threads > MOST_THREADS) return 2;
    while ((length = read(0, line, sizeof line - 1)) > 0) {
        line[length] = 0;
        until_ns = now_ns() + strtoull(line, NULL, 10) * 1000000;
        pthread_t started[MOST_THREADS];
        uint64_t counts[MOST_THREADS], sum = 0;
        // With one thread the program stays a single-threaded one, which glibc serves faster.
        for (int i = 1; i < threads; i++)
            if (pthread_create(&started[i], NULL, pairs, &counts[i]) != 0) return 3;
        pairs(&counts[0]);
        for (int i = 1; i < threads; i++) pthread_join(started[i], NULL);
        for (int i = 0; i < threads; i++) sum += counts[i];
        dprintf(1, "%ju\n", (uintmax_t)sum);
    }
    return 0;
}
