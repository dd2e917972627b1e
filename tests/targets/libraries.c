/* Libraries that come and go while the agent is attached. */
#include <dlfcn.h>

#include "target.h"

static void *find(void *library, const char *name) {
    void *function = dlsym(library, name);
    require(function != NULL);
    return function;
}

/* `plugins PATH COUNT` */
static void plugins(int count, char **arguments) {
    require(count == 3);
    for (int i = atoi(arguments[2]); i > 0; i--) {
        void *library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
        require(library != NULL);
        void *(*allocate)(size_t) = (void *(*)(size_t))find(library, "plugin_allocate");
        void (*release)(void *) = (void (*)(void *))find(library, "plugin_release");
        t_new(500 + (size_t)i, allocate(500 + (size_t)i));
        void *freed = t_new(400, allocate(400));
        t_delete(freed, release(freed));
        require(dlclose(library) == 0);
        /* Something else may get the addresses. */
        void *other = mmap(NULL, 1 << 16, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (i % 2) munmap(other, 1 << 16);
    }
}

static void *opened;
static void *(*opened_allocate)(size_t);

/* `open PATH ALLOCATE`; where another library was open before, its function was at the same
 * address. */
static void open_library(int count, char **arguments) {
    require(count == 3);
    opened = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    require(opened != NULL);
    void *(*before)(size_t) = opened_allocate;
    opened_allocate = (void *(*)(size_t))find(opened, arguments[2]);
    require(before == NULL || before == opened_allocate);
}

/* `allocate BYTES` */
static void allocate(int count, char **arguments) {
    require(count == 2);
    size_t bytes = (size_t)atol(arguments[1]);
    t_new(bytes, opened_allocate(bytes));
}

static void close_library(int count, char **arguments) {
    (void)count, (void)arguments;
    require(dlclose(opened) == 0);
}

/* `swap PATH ALLOCATE OTHER OTHER_ALLOCATE COUNT`: one after the other, without a pause. */
static void swap(int count, char **arguments) {
    require(count == 6);
    for (size_t i = 0; i < (size_t)atol(arguments[5]); i++) {
        for (size_t other = 0; other < 2; other++) {
            open_library(3, arguments + 2 * other);
            size_t bytes = (other ? 20000 : 10000) + i;
            t_new(bytes, opened_allocate(bytes));
            close_library(1, arguments);
        }
    }
}

static void *(*late_malloc)(size_t), *(*late_calloc)(size_t, size_t), *(*late_realloc)(void *, size_t);
static void (*late_free)(void *);
static void *late_kept[64];

/* `load PATH MALLOC CALLOC REALLOC FREE`: an allocator that comes with a library of its own. */
static void load(int count, char **arguments) {
    require(count == 6);
    void *library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) say("dlopen: %s", dlerror());
    require(library != NULL);
    late_malloc = (void *(*)(size_t))find(library, arguments[2]);
    late_calloc = (void *(*)(size_t, size_t))find(library, arguments[3]);
    late_realloc = (void *(*)(void *, size_t))find(library, arguments[4]);
    late_free = (void (*)(void *))find(library, arguments[5]);
}

static void use(int count, char **arguments) {
    (void)count, (void)arguments;
    for (size_t i = 0; i < 64; i++) {
        late_kept[i] = t_new(100 + i, late_malloc(100 + i));
        if (i % 3 == 1) late_kept[i] = t_replace(late_kept[i], 1000 + i, late_realloc(old_, bytes_));
        if (i % 4 == 0) {
            t_delete(late_kept[i], late_free(late_kept[i]));
            late_kept[i] = t_new(7 * i, late_calloc(7, i));
        }
    }
}

int main(void) {
    static const struct scenario scenarios[] = {
        {"plugins", plugins}, {"open", open_library},   {"allocate", allocate},
        {"swap", swap},       {"close", close_library}, {"load", load},
        {"use", use},         {NULL, NULL}};
    return converse(scenarios);
}
