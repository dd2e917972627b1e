// One stack of each kind that -O2 -fomit-frame-pointer code can make, each stopped at an int3 in
// `checkpoint`. Runs them again and again once a line has come on standard input.
#include <alloca.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define OWN_FRAME __attribute__((noinline, noclone, noipa))

static volatile int sink;

OWN_FRAME static void checkpoint(void) {
    __asm__ volatile("int3");
}

OWN_FRAME static void leaf(int depth) {
    if (depth > 0) {
        leaf(depth - 1);
        sink++;
        return;
    }
    checkpoint();
    sink++;
}

OWN_FRAME static void with_alloca(int size) {
    char *block = alloca(size);
    memset(block, size, size);
    leaf(1);
    sink += block[size / 2];
}

OWN_FRAME static void with_huge_frame(void) {
    volatile char block[500000];
    block[0] = 1;
    block[sizeof block - 1] = 2;
    leaf(1);
    sink += block[0] + block[sizeof block - 1];
}

OWN_FRAME static void with_alignment(int size) {
    volatile char block[128] __attribute__((aligned(64)));
    block[0] = size;
    char *more = alloca(size);
    memset(more, 1, size);
    leaf(1);
    sink += block[0] + more[size - 1];
}

static int comparisons;

OWN_FRAME static int compare(const void *a, const void *b) {
    if (comparisons++ == 3) {
        leaf(2);
    }
    return *(const int *)a - *(const int *)b;
}

OWN_FRAME static void in_qsort(void) {
    int numbers[] = {5, 3, 8, 1, 9, 2};
    comparisons = 0;
    qsort(numbers, 6, sizeof *numbers, compare);
    sink += numbers[0];
}

static void on_signal(int number) {
    leaf(number & 1);
    sink++;
}

OWN_FRAME static void in_handler(int flags) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = flags};
    sigaction(SIGUSR1, &action, NULL);
    raise(SIGUSR1);
    sink++;
}

static void on_signal_allocates(int number) {
    leaf(number & 1);
    for (int i = 1; i <= 8; i++) {
        // Not from the thread's cache alone.
        char *volatile block = malloc(i * 1000);
        block[0] = i;
        free(block);
    }
    sink++;
}

OWN_FRAME static void in_allocating_handler(void) {
    struct sigaction action = {.sa_handler = on_signal_allocates};
    sigaction(SIGUSR1, &action, NULL);
    raise(SIGUSR1);
    sink++;
}

static void *forbidden;

static void on_fault(int number) {
    leaf(number & 1);
    mprotect(forbidden, 4096, PROT_READ);
    sink++;
}

// Faults in its first instruction: one byte before lies another function.
OWN_FRAME static int reads_first(volatile int *from) {
    return *from;
}

OWN_FRAME static void in_fault_handler(void) {
    struct sigaction action = {.sa_handler = on_fault, .sa_flags = SA_ONSTACK};
    sigaction(SIGSEGV, &action, NULL);
    mprotect(forbidden, 4096, PROT_NONE);
    sink += reads_first(forbidden);
}

static jmp_buf back;

OWN_FRAME __attribute__((noreturn)) static void leaves(void) {
    leaf(0);
    longjmp(back, 1);
}

// Ends with a call: the return address belongs to the next function.
OWN_FRAME __attribute__((noreturn)) static void never_returns(void) {
    sink++;
    leaves();
}

OWN_FRAME static void before_longjmp(void) {
    if (setjmp(back) == 0) {
        never_returns();
    }
}

static void *in_thread(void *argument) {
    with_alloca(300);
    return argument;
}

OWN_FRAME static void in_other_thread(void) {
    pthread_t thread;
    pthread_create(&thread, NULL, in_thread, NULL);
    pthread_join(thread, NULL);
}

int main(void) {
    static char other_stack[1 << 16];
    stack_t stack = {.ss_sp = other_stack, .ss_size = sizeof other_stack};
    sigaltstack(&stack, NULL);
    forbidden = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (getchar() == EOF) {
        return 1;
    }
    for (;;) {
        // The twelve of FRAME_KINDS in main.rs.
        in_allocating_handler();
        leaf(40);
        with_alloca(100);
        with_alloca(70000);
        with_huge_frame();
        with_alignment(48);
        in_qsort();
        in_handler(0);
        in_handler(SA_ONSTACK);
        in_fault_handler();
        before_longjmp();
        in_other_thread();
    }
}
