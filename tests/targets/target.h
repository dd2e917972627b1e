/* A program under test talks with the test in lines: a command in, `done` or `failed: why` out.
 * Neither side ever waits for time to pass. Nothing here allocates. */
#ifndef TARGET_H
#define TARGET_H

#include <stdarg.h>

#include "truth.h"

enum { MOST_ARGUMENTS = 8, LINE_BYTES = 1024 };

struct scenario {
    const char *name;
    void (*run)(int count, char **arguments);
};

static inline void say(const char *format, ...) {
    char line[LINE_BYTES];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    line[length++] = '\n';
    for (int at = 0; at < length;) {
        ssize_t wrote = write(1, line + at, (size_t)(length - at));
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote <= 0) _exit(3);
        at += (int)wrote;
    }
}

static inline bool hear(char *line) {
    int length = 0;
    for (;;) {
        char byte;
        ssize_t got = read(0, &byte, 1);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        if (byte == '\n') break;
        if (length < LINE_BYTES - 1) line[length++] = byte;
    }
    line[length] = 0;
    return true;
}

/* An expectation that the test stands on does not hold. */
#define require(condition)                                                    \
    do {                                                                      \
        if (!(condition)) {                                                   \
            say("failed: %s:%d: %s (errno %d)", __FILE__, __LINE__, #condition, errno); \
            _exit(3);                                                         \
        }                                                                     \
    } while (0)

static inline const char *books_path(void) {
    const char *path = getenv("TRUTH_FILE");
    return path ? path : "/dev/null";
}

static inline void open_books(void) {
    if (getenv("TRUTH_FILE")) books_open(books_path());
    else {
        books = (struct books *)mmap(NULL, sizeof(struct books), PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (books == MAP_FAILED) abort();
    }
}

/* Answers commands until the test says `quit` or goes away. */
static inline int converse(const struct scenario *scenarios) {
    char line[LINE_BYTES];
    if (!books) open_books();
    say("ready");
    while (hear(line)) {
        char *arguments[MOST_ARGUMENTS], *rest = NULL;
        int count = 0;
        for (char *word = strtok_r(line, " ", &rest); word && count < MOST_ARGUMENTS;
             word = strtok_r(NULL, " ", &rest))
            arguments[count++] = word;
        if (count == 0) continue;
        if (strcmp(arguments[0], "quit") == 0) return count > 1 ? atoi(arguments[1]) : 0;
        const struct scenario *scenario = scenarios;
        while (scenario->name && strcmp(scenario->name, arguments[0]) != 0) scenario++;
        if (!scenario->name) {
            say("failed: no scenario %s", arguments[0]);
            continue;
        }
        scenario->run(count, arguments);
        say("done");
    }
    return 0;
}

/* Deterministic for a seed, and the same everywhere. */
static inline uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

#endif
