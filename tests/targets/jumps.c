/* Calls of an allocator that never return, or return late: runs on hooked.c. */
#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>

#include "target.h"

static void (**hook)(size_t);
static sigjmp_buf jump;

static void leave(size_t size) {
    (void)size;
    *hook = NULL;
    siglongjmp(jump, 1);
}

static __attribute__((noinline)) void at_depth(int depth, size_t size) {
    volatile char frame[256];
    frame[0] = (char)depth;
    if (depth > 0) at_depth(depth - 1, size);
    else {
        require(t_malloc(size));
        t_free(t_malloc(size + 1));
    }
    frame[1] = frame[0];
}

/* The next calls come from the same depth, from a shallower and from a deeper one. */
static void longjmp_out(int count, char **arguments) {
    (void)count, (void)arguments;
    for (volatile int i = 0; i < 30; i++) {
        if (sigsetjmp(jump, 1) == 0) {
            *hook = leave;
            if (i % 3 == 0) malloc(100);
            else if (i % 3 == 1) at_depth(8, 100);
            else realloc(NULL, 100);
            require(!"the hook jumps");
        }
        at_depth(i % 4 * 6, 2000 + (size_t)i);
    }
}

/* A realloc that never returned: its old block stays what it was. */
static void longjmp_out_of_realloc(int count, char **arguments) {
    (void)count, (void)arguments;
    for (volatile int i = 0; i < 10; i++) {
        void *volatile block = t_malloc(3000 + (size_t)i);
        if (sigsetjmp(jump, 1) == 0) {
            *hook = leave;
            realloc(block, 5000);
        }
        at_depth(i % 4 * 6, 4000 + (size_t)i);
    }
}

static void end_thread(size_t size) {
    (void)size;
    *hook = NULL;
    pthread_exit(NULL);
}

static void *dies_inside(void *argument) {
    t_malloc(600 + (size_t)(intptr_t)argument);
    *hook = end_thread;
    malloc(601);
    return NULL;
}

static void threads_die_inside(int count, char **arguments) {
    (void)count, (void)arguments;
    for (volatile int i = 0; i < 20; i++) {
        pthread_t thread;
        require(pthread_create(&thread, NULL, dies_inside, (void *)(intptr_t)i) == 0);
        require(pthread_join(thread, NULL) == 0);
        t_malloc(700);
    }
}

/* A handler on a stack of its own allocates while malloc is in flight: both blocks count. */
static void on_signal(int signal) {
    (void)signal;
    t_malloc(911);
    t_free(t_malloc(912));
}

static void raise_inside(size_t size) {
    (void)size;
    *hook = NULL;
    raise(SIGUSR1);
}

static void signal_inside(int count, char **arguments) {
    (void)count, (void)arguments;
    static char stack[1 << 16];
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    require(sigaltstack(&alternate, NULL) == 0);
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    require(sigaction(SIGUSR1, &action, NULL) == 0);
    for (volatile int i = 0; i < 20; i++) {
        *hook = raise_inside;
        require(t_malloc(800 + (size_t)i));
        require(t_malloc(810));
    }
}

/* A timer jumps out of a loop of allocations wherever it is. The call that it interrupts may have
 * got its block or not; sizes are unique, so the test can excuse that one. */
static volatile size_t in_flight_size;

static void on_timer(int signal) {
    (void)signal;
    siglongjmp(jump, 1);
}

static void timer(int count, char **arguments) {
    (void)count, (void)arguments;
    struct sigaction action = {.sa_handler = on_timer};
    require(sigaction(SIGUSR2, &action, NULL) == 0);
    static volatile int jumps;
    static volatile size_t size = 20000;
    timer_t made;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR2};
    require(timer_create(CLOCK_MONOTONIC, &event, &made) == 0);
    sigset_t blocked;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR2);
    require(sigprocmask(SIG_BLOCK, &blocked, NULL) == 0);
    for (jumps = 0; jumps < 50; jumps++) {
        if (sigsetjmp(jump, 1) == 0) {
            struct itimerspec soon = {.it_value = {0, 200000 + jumps * 7919}};
            require(timer_settime(made, 0, &soon, NULL) == 0);
            for (;;) {
                uint64_t begun = now_ns();
                in_flight_size = ++size;
                sigprocmask(SIG_UNBLOCK, &blocked, NULL);
                void *block = malloc(in_flight_size);
                sigprocmask(SIG_BLOCK, &blocked, NULL);
                in_flight_size = 0;
                books_insert((uint64_t)block, size, begun);
                if (size % 16) t_free(block);
            }
        }
        if (in_flight_size) books_note(MAYBE, 0, in_flight_size, now_ns(), now_ns());
    }
    timer_delete(made);
    sigprocmask(SIG_UNBLOCK, &blocked, NULL);
}

int main(void) {
    static const struct scenario scenarios[] = {
        {"longjmp", longjmp_out},
        {"longjmp_realloc", longjmp_out_of_realloc},
        {"threads", threads_die_inside},
        {"signal", signal_inside},
        {"timer", timer},
        {NULL, NULL},
    };
    open_books();
    hook = (void (**)(size_t))dlsym(RTLD_DEFAULT, "hooked_malloc_hook");
    require(hook != NULL);
    /* pthread_exit loads libgcc_s at its first use, which allocates. */
    pthread_t thread;
    require(pthread_create(&thread, NULL, dies_inside, NULL) == 0);
    require(pthread_join(thread, NULL) == 0);
    return converse(scenarios);
}
