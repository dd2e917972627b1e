/* Memory that is touched, kept and given back, by functions whose names a report must show. */
#include <fcntl.h>
#include <sys/wait.h>

#include "target.h"

#define PAGE 4096UL
#define MIB (1UL << 20)

static char *passing;
static size_t passing_bytes;

static char *map(size_t bytes) {
    char *start = (char *)mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(start != MAP_FAILED);
    return start;
}

static void touch(char *start, size_t bytes) {
    for (size_t at = 0; at < bytes; at += PAGE) *(volatile char *)(start + at) = 1;
}

static size_t mebibytes(int count, char **arguments) {
    require(count > 1);
    return strtoul(arguments[1], NULL, 10) * MIB;
}

__attribute__((noinline)) static void keeps(int count, char **arguments) {
    size_t bytes = mebibytes(count, arguments);
    touch(map(bytes), bytes);
    __asm__ volatile("");
}

__attribute__((noinline)) static void passes(int count, char **arguments) {
    passing_bytes = mebibytes(count, arguments);
    passing = map(passing_bytes);
    touch(passing, passing_bytes);
    __asm__ volatile("");
}

/* One half by munmap, one by madvise. */
static void releases(int count, char **arguments) {
    (void)count, (void)arguments;
    size_t half = passing_bytes / 2;
    require(munmap(passing, half) == 0);
    require(madvise(passing + half, passing_bytes - half, MADV_DONTNEED) == 0);
}

/* The same pages again and again: given back and touched anew. */
__attribute__((noinline)) static void churns(int count, char **arguments) {
    size_t bytes = mebibytes(count, arguments);
    char *start = map(bytes);
    for (int round = 0; round < 8; round++) {
        touch(start, bytes);
        require(madvise(start, bytes, MADV_DONTNEED) == 0);
    }
    touch(start, bytes / 4);
}

__attribute__((noinline)) static void keeps_huge(int count, char **arguments) {
    size_t bytes = mebibytes(count, arguments);
    char *start = map(bytes + 2 * MIB);
    start = (char *)(((uintptr_t)start + 2 * MIB - 1) & ~(2 * MIB - 1));
    require(madvise(start, bytes, MADV_HUGEPAGE) == 0);
    touch(start, bytes);
    __asm__ volatile("");
}

/* The kernel touches it, on the program's behalf. */
__attribute__((noinline)) static void has_filled(int count, char **arguments) {
    size_t bytes = mebibytes(count, arguments);
    char *start = map(bytes);
    int zeros = open("/dev/zero", O_RDONLY);
    require(zeros >= 0);
    for (size_t at = 0; at < bytes;) {
        ssize_t got = read(zeros, start + at, bytes - at);
        require(got > 0);
        at += (size_t)got;
    }
    close(zeros);
}

/* Reading gives no memory; writing to a shared mapping gives none that is the process's own. */
__attribute__((noinline)) static void only_reads(int count, char **arguments) {
    size_t bytes = mebibytes(count, arguments);
    char *start = map(bytes);
    for (size_t at = 0; at < bytes; at += PAGE) (void)*(volatile char *)(start + at);
    char *shared =
        (char *)mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    require(shared != MAP_FAILED);
    touch(shared, bytes);
}

/* Without a fault. */
static void moves(int count, char **arguments) {
    size_t bytes = mebibytes(count, arguments);
    char *start = map(bytes), *room = map(bytes);
    touch(start, bytes);
    require(mremap(start, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, room) == room);
}

/* Without a fault, too. */
static void populates(int count, char **arguments) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE;
    require(mmap(NULL, mebibytes(count, arguments), PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED);
}

/* A child that holds memory of its own until it is told to end. */
static int child_input = -1;
static pid_t child;

__attribute__((noinline)) static void child_keeps(int count, char **arguments) {
    int to_child[2], from_child[2];
    char byte = 0;
    require(pipe(to_child) == 0 && pipe(from_child) == 0);
    child = fork();
    require(child >= 0);
    if (child == 0) {
        close(to_child[1]);
        keeps(count, arguments);
        require(write(from_child[1], &byte, 1) == 1);
        (void)!read(to_child[0], &byte, 1);
        _exit(0);
    }
    child_input = to_child[1];
    close(to_child[0]);
    require(read(from_child[0], &byte, 1) == 1);
    say("child %d", (int)child);
}

static void child_ends(int count, char **arguments) {
    (void)count, (void)arguments;
    close(child_input);
    int status;
    require(waitpid(child, &status, 0) == child && status == 0);
}

int main(void) {
    static const struct scenario scenarios[] = {
        {"keeps", keeps},           {"passes", passes},
        {"releases", releases},     {"churns", churns},
        {"keeps_huge", keeps_huge}, {"has_filled", has_filled},
        {"only_reads", only_reads}, {"child_keeps", child_keeps},
        {"child_ends", child_ends}, {"moves", moves},
        {"populates", populates},
        {NULL, NULL},
    };
    return converse(scenarios);
}
