/* Call chains that a walk by frame pointers gets wrong: built with -O2 -fomit-frame-pointer. */
#include <alloca.h>
#include <dlfcn.h>
#include <signal.h>

#include "target.h"

#define FUNCTION static __attribute__((noinline, noclone))
/* Keeps a call from becoming a jump. */
#define KEEP_FRAME() __asm__ volatile("" ::: "memory")

static size_t bytes;

FUNCTION void innermost(void) {
    require(malloc(bytes) != NULL);
    KEEP_FRAME();
}

FUNCTION void with_huge_frame(void) {
    volatile char room[300000];
    room[0] = room[sizeof room - 1] = 1;
    innermost();
    KEEP_FRAME();
}

FUNCTION void with_alignment(void) {
    _Alignas(64) volatile char room[64];
    room[0] = 1;
    __asm__ volatile("" ::"r"(room) : "memory");
    with_huge_frame();
    KEEP_FRAME();
}

FUNCTION void with_alloca(size_t count) {
    volatile char *room = alloca(count);
    room[0] = 1;
    with_alignment();
    KEEP_FRAME();
}

/* `chain SIZE` */
FUNCTION void chain(int count, char **arguments) {
    require(count == 2);
    bytes = (size_t)atoi(arguments[1]);
    with_alloca(bytes);
    KEEP_FRAME();
}

static int compared;

FUNCTION int compare(const void *left, const void *right) {
    if (compared++ == 0) innermost();
    KEEP_FRAME();
    return *(const int *)left - *(const int *)right;
}

/* `sort SIZE`: the C library in the middle. */
FUNCTION void sort(int count, char **arguments) {
    require(count == 2);
    bytes = (size_t)atoi(arguments[1]);
    int numbers[] = {3, 1, 2};
    compared = 0;
    qsort(numbers, 3, sizeof *numbers, compare);
    KEEP_FRAME();
}


/* Interrupted at an instruction that is no call. */
FUNCTION void interrupted(void) {
    __asm__ volatile("ud2");
    KEEP_FRAME();
}

FUNCTION void on_illegal(int number, siginfo_t *about, void *context) {
    (void)number, (void)about;
    innermost();
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += 2;
}

/* `signal SIZE` */
FUNCTION void handle(int count, char **arguments) {
    require(count == 2);
    bytes = (size_t)atoi(arguments[1]);
    struct sigaction action = {.sa_sigaction = on_illegal, .sa_flags = SA_SIGINFO};
    require(sigaction(SIGILL, &action, NULL) == 0);
    interrupted();
    KEEP_FRAME();
}

FUNCTION void deeper(int depth) {
    if (depth > 1) deeper(depth - 1);
    else innermost();
    KEEP_FRAME();
}

/* `recurse DEPTH SIZE` */
FUNCTION void recurse(int count, char **arguments) {
    require(count == 3);
    bytes = (size_t)atoi(arguments[2]);
    deeper(atoi(arguments[1]));
    KEEP_FRAME();
}

/* `fresh DIRECTORY COUNT WAIT_US SIZE`: through each of the libraries 0.so, 1.so…, so long after
   it has been loaded; the block from the first one has SIZE bytes, the next one more. */
FUNCTION void fresh(int count, char **arguments) {
    require(count == 5);
    int libraries = atoi(arguments[2]);
    long wait_us = atol(arguments[3]);
    bytes = (size_t)atoi(arguments[4]);
    for (int i = 0; i < libraries; i++, bytes++) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%d.so", arguments[1], i);
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        require(library != NULL);
        void (*call)(void (*)(void)) = (void (*)(void (*)(void)))dlsym(library, "fresh_call");
        require(call != NULL);
        struct timespec wait = {.tv_nsec = wait_us * 1000};
        nanosleep(&wait, NULL);
        call(innermost);
    }
    KEEP_FRAME();
}

static void *in_thread(void *unused) {
    innermost();
    return unused;
}

/* `thread SIZE` */
FUNCTION void in_new_thread(int count, char **arguments) {
    require(count == 2);
    bytes = (size_t)atoi(arguments[1]);
    pthread_t thread;
    require(pthread_create(&thread, NULL, in_thread, NULL) == 0 && pthread_join(thread, NULL) == 0);
}

/* `exec PATH`: becomes that program, which talks to the test as this one did. */
FUNCTION void become(int count, char **arguments) {
    require(count == 2);
    execl(arguments[1], arguments[1], (char *)NULL);
    require(false);
}

int main(void) {
    static const struct scenario scenarios[] = {
        {"chain", chain}, {"sort", sort},            {"signal", handle}, {"recurse", recurse},
        {"exec", become}, {"thread", in_new_thread}, {"fresh", fresh},   {NULL, NULL}};
    int status = converse(scenarios);
    KEEP_FRAME();
    return status;
}
