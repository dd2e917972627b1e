/* A service: answers requests, each with a few blocks that it releases a little later, and leaks. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "target.h"

enum { LIVE = 512, LEAKED_BYTES = 1024 };

static uint64_t time_ns(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void *leaked;

__attribute__((noinline)) static void leak_one(void) {
    void **block = malloc(LEAKED_BYTES);
    require(block);
    memset(block, 1, LEAKED_BYTES);
    *block = leaked;
    leaked = block;
}

__attribute__((noinline)) static void answer(void **live, uint64_t *random, uint64_t work) {
    for (int block = 0; block < 3; block++) {
        uint64_t place = next_random(random) % LIVE;
        free(live[place]);
        size_t bytes = 32 + next_random(random) % 480;
        live[place] = malloc(bytes);
        require(live[place]);
        memset(live[place], 2, bytes);
    }
    for (uint64_t turn = 0; turn < 2000 * work; turn++) next_random(random);
}

/* serve MS LEAKED_BLOCKS_A_SECOND PAUSE_US [WORK]: says how many requests, processor time, blocks
 * leaked. A request does as much between its allocations as WORK says. */
static void serve(int count, char **arguments) {
    require(count == 4 || count == 5);
    uint64_t end_ms = strtoull(arguments[1], NULL, 10);
    uint64_t rate = strtoull(arguments[2], NULL, 10);
    uint64_t pause_us = strtoull(arguments[3], NULL, 10);
    uint64_t work = count == 5 ? strtoull(arguments[4], NULL, 10) : 1;
    static void *live[LIVE];
    uint64_t random = 88172645463325252u, requests = 0, blocks = 0;
    uint64_t began = time_ns(CLOCK_MONOTONIC), cpu = time_ns(CLOCK_PROCESS_CPUTIME_ID), passed = 0;
    while (passed < end_ms * 1000000) {
        answer(live, &random, work);
        requests++;
        if (pause_us) {
            struct timespec pause = {0, (long)pause_us * 1000};
            nanosleep(&pause, NULL);
        }
        passed = time_ns(CLOCK_MONOTONIC) - began;
        while (blocks * 1000000000 < passed * rate) {
            leak_one();
            blocks++;
        }
    }
    cpu = time_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    say("%llu %llu %llu", (unsigned long long)requests, (unsigned long long)cpu,
        (unsigned long long)blocks);
}

static volatile bool stormy;

static void *blow(void *argument) {
    uint64_t *pairs = argument;
    while (stormy) {
        free(malloc(64));
        ++*pairs;
    }
    return NULL;
}

/* storm MS THREADS: says how many pairs of malloc and free there were. */
static void storm(int count, char **arguments) {
    require(count == 3);
    enum { MOST = 64 };
    static uint64_t pairs[MOST * 8];
    int threads = atoi(arguments[2]);
    require(threads > 0 && threads <= MOST);
    pthread_t handles[MOST];
    stormy = true;
    memset(pairs, 0, sizeof pairs);
    for (int thread = 0; thread < threads; thread++)
        require(pthread_create(&handles[thread], NULL, blow, &pairs[thread * 8]) == 0);
    uint64_t ms = strtoull(arguments[1], NULL, 10);
    struct timespec time = {(time_t)(ms / 1000), (long)(ms % 1000) * 1000000};
    nanosleep(&time, NULL);
    stormy = false;
    uint64_t sum = 0;
    for (int thread = 0; thread < threads; thread++) {
        pthread_join(handles[thread], NULL);
        sum += pairs[thread * 8];
    }
    say("%llu", (unsigned long long)sum);
}

int main(void) {
    const struct scenario scenarios[] = {{"serve", serve}, {"storm", storm}, {NULL, NULL}};
    return converse(scenarios);
}
