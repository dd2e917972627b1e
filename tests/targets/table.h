/* The independent oracle's books: which blocks are outstanding, and what happened last.
 *
 * They live in a shared file, so that the test reads them while the program waits, and after it
 * was killed. Nothing here allocates. A block leaves the table before its release begins and
 * enters after its allocation ended: between the two nobody else can have its address.
 * tests/src/books.rs reads the same layout. */
#ifndef TABLE_H
#define TABLE_H

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SHARDS = 256, SLOTS = 2048, EVENTS = 1 << 16 };
enum event_kind { BORN = 1, FREED = 2, MAYBE = 3 };

struct known_block {
    uint64_t address; /* 0: empty */
    uint64_t size_bytes;
    uint64_t begun_ns; /* CLOCK_MONOTONIC before the call */
    uint64_t born_ns;  /* after it */
};

struct event {
    uint64_t address;
    uint64_t size_bytes;
    uint64_t begun_ns;
    uint64_t ended_ns;
    uint32_t kind;
    uint32_t tid;
};

struct shard {
    uint32_t lock;
    uint32_t used;
    uint64_t pad;
    struct known_block slots[SLOTS];
};

struct books {
    uint64_t magic;
    uint64_t next_event;
    uint64_t overflowed;
    uint64_t pad;
    struct event events[EVENTS];
    struct shard shards[SHARDS];
};

#define BOOKS_MAGIC 0x316b6f6f42ULL /* "Book1" */

static struct books *books;

static inline uint64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000ULL + (uint64_t)time.tv_nsec;
}

static inline uint64_t hash_address(uint64_t address) {
    return (address >> 3) * 0x9e3779b97f4a7c15ULL;
}

/* `PATH` for the first program, `PATH.PID` for each later process. */
static void books_open(const char *path) {
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, sizeof(struct books)) != 0) abort();
    void *memory =
        mmap(NULL, sizeof(struct books), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) abort();
    close(file);
    books = (struct books *)memory;
    books->magic = BOOKS_MAGIC;
}

static inline void shard_lock(struct shard *shard) {
    while (__atomic_exchange_n(&shard->lock, 1, __ATOMIC_ACQUIRE))
        while (__atomic_load_n(&shard->lock, __ATOMIC_RELAXED)) syscall(SYS_sched_yield);
}

static inline void shard_unlock(struct shard *shard) {
    __atomic_store_n(&shard->lock, 0, __ATOMIC_RELEASE);
}

static inline void books_note(enum event_kind kind, uint64_t address, uint64_t size_bytes,
                              uint64_t begun_ns, uint64_t ended_ns) {
    uint64_t index = __atomic_fetch_add(&books->next_event, 1, __ATOMIC_RELAXED);
    struct event *event = &books->events[index % EVENTS];
    event->address = address;
    event->size_bytes = size_bytes;
    event->begun_ns = begun_ns;
    event->ended_ns = ended_ns;
    event->kind = kind;
    static __thread uint32_t tid __attribute__((tls_model("initial-exec")));
    if (tid == 0) tid = (uint32_t)syscall(SYS_gettid);
    event->tid = tid;
}

/* The same address again replaces the entry: `operator new` ends after the `malloc` within it. */
static inline void books_insert(uint64_t address, uint64_t size_bytes, uint64_t begun_ns) {
    uint64_t hash = hash_address(address), born_ns = now_ns();
    struct shard *shard = &books->shards[hash >> 56];
    uint32_t index = (uint32_t)(hash >> 40) % SLOTS;
    books_note(BORN, address, size_bytes, begun_ns, born_ns);
    shard_lock(shard);
    while (shard->slots[index].address != 0 && shard->slots[index].address != address)
        index = (index + 1) % SLOTS;
    struct known_block *slot = &shard->slots[index];
    if (slot->address == 0 && shard->used >= SLOTS - 1) {
        books->overflowed = 1;
    } else {
        if (slot->address == 0) shard->used++;
        slot->address = address;
        slot->size_bytes = size_bytes;
        slot->begun_ns = begun_ns;
        slot->born_ns = born_ns;
    }
    shard_unlock(shard);
}

/* Returns what was known of the block; its address is 0 when nothing was. */
static inline struct known_block books_remove(uint64_t address) {
    uint64_t hash = hash_address(address);
    struct shard *shard = &books->shards[hash >> 56];
    uint32_t index = (uint32_t)(hash >> 40) % SLOTS;
    struct known_block found = {0, 0, 0, 0};
    shard_lock(shard);
    while (shard->slots[index].address != 0 && shard->slots[index].address != address)
        index = (index + 1) % SLOTS;
    if (shard->slots[index].address == address) {
        found = shard->slots[index];
        shard->used--;
        /* Linear probing without tombstones: later entries of the run move back. */
        uint32_t hole = index;
        for (uint32_t next = (hole + 1) % SLOTS; shard->slots[next].address != 0;
             next = (next + 1) % SLOTS) {
            uint32_t home = (uint32_t)(hash_address(shard->slots[next].address) >> 40) % SLOTS;
            int stays = hole <= next ? hole < home && home <= next : hole < home || home <= next;
            if (stays) continue;
            shard->slots[hole] = shard->slots[next];
            hole = next;
        }
        shard->slots[hole].address = 0;
    }
    shard_unlock(shard);
    if (found.address != 0) {
        uint64_t time_ns = now_ns();
        books_note(FREED, address, found.size_bytes, time_ns, time_ns);
    }
    return found;
}

static inline void books_restore(struct known_block block) {
    if (block.address == 0) return;
    books_insert(block.address, block.size_bytes, block.begun_ns);
}

/* After a fork: the inherited blocks are not this process's leaks; books of its own. */
static inline void books_open_for_process(const char *path) {
    char own[512];
    snprintf(own, sizeof own, "%s.%d", path, (int)getpid());
    books_open(own);
}

#endif
