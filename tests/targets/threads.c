/* Threads that free each other's blocks. The workers exist before the test attaches, so that the
 * books need not know what the C library allocates for a new thread. */
#include <pthread.h>
#include <signal.h>
#ifndef WITHOUT_CONTEXTS
#include <ucontext.h>
#endif

#include "target.h"

enum { WORKERS = 8, INBOX = 256, HELD = 64, LOG_EVENTS = 1 << 22 };

struct inbox {
    uint32_t lock, head, tail;
    void *blocks[INBOX];
};

struct event_log {
    uint64_t count, pad;
    struct event events[LOG_EVENTS];
};

static struct inbox inboxes[WORKERS];
static pthread_barrier_t begin, end;
static uint64_t run_until_ns, seed;
static int roaming; /* until told otherwise, with a log of all calls */
static struct event_log *event_log;

static bool send_block(int to, void *block) {
    struct inbox *inbox = &inboxes[to];
    bool sent = false;
    while (__atomic_exchange_n(&inbox->lock, 1, __ATOMIC_ACQUIRE)) syscall(SYS_sched_yield);
    if (inbox->tail - inbox->head < INBOX) {
        inbox->blocks[inbox->tail++ % INBOX] = block;
        sent = true;
    }
    __atomic_store_n(&inbox->lock, 0, __ATOMIC_RELEASE);
    return sent;
}

static void *receive_block(int own) {
    struct inbox *inbox = &inboxes[own];
    void *block = NULL;
    while (__atomic_exchange_n(&inbox->lock, 1, __ATOMIC_ACQUIRE)) syscall(SYS_sched_yield);
    if (inbox->tail != inbox->head) block = inbox->blocks[inbox->head++ % INBOX];
    __atomic_store_n(&inbox->lock, 0, __ATOMIC_RELEASE);
    return block;
}

static void note(enum event_kind kind, void *block, size_t size, uint64_t begun, uint64_t ended) {
    uint64_t index = __atomic_fetch_add(&event_log->count, 1, __ATOMIC_RELAXED);
    if (index >= LOG_EVENTS) return;
    event_log->events[index] = (struct event){(uint64_t)block, size, begun, ended, kind, 0};
}

static void *get(size_t size, uint64_t dice) {
    if (!roaming) {
        if (dice & 1) return t_malloc(size);
        return t_calloc(1, size);
    }
    uint64_t begun = now_ns();
    void *block = dice & 1 ? malloc(size) : calloc(1, size);
    note(BORN, block, size, begun, now_ns());
    return block;
}

static void put(void *block) {
    if (!roaming) {
        t_free(block);
        return;
    }
    if (!block) return;
    uint64_t begun = now_ns();
    free(block);
    note(FREED, block, 0, begun, now_ns());
}

static void *change(void *block, size_t size) {
    if (!roaming) return t_realloc(block, size);
    uint64_t begun = now_ns();
    volatile uintptr_t old = (uintptr_t)block;
    void *moved = realloc(block, size);
    uint64_t ended = now_ns();
    if (old) note(FREED, (void *)old, 0, begun, ended);
    note(BORN, moved, size, begun, ended);
    return moved;
}

static void work(int own, uint64_t *random, void **held) {
    for (uint32_t turn = 0;; turn++) {
        if (turn % 32 == 0) {
            if (!roaming && now_ns() >= run_until_ns) return;
            if (roaming) {
                if (!__atomic_load_n(&run_until_ns, __ATOMIC_RELAXED)) return;
                nanosleep(&(struct timespec){0, 1000000}, NULL);
            }
        }
        uint64_t dice = next_random(random);
        void **slot = &held[dice >> 16 & (HELD - 1)];
        size_t size = (dice >> 40) % (dice & 0x700 ? 300 : 40000) + 1;
        switch (dice >> 1 & 7) {
        case 0: *slot = change(*slot, size); break;
        case 1: put(*slot); *slot = NULL; break;
        case 2:
        case 3:
        case 4:
            if (*slot && send_block((int)(dice >> 24 & (WORKERS - 1)), *slot)) *slot = NULL;
            break;
        case 5: {
            void *received = receive_block(own);
            if (received && (dice & 0x3800)) put(received);
            else if (received) put(change(received, size));
            break;
        }
        default: put(*slot); *slot = get(size, dice); break;
        }
    }
}

static void *worker(void *argument) {
    int own = (int)(intptr_t)argument;
    static void *held[WORKERS][HELD];
    for (uint64_t round = 1;; round++) {
        pthread_barrier_wait(&begin);
        uint64_t random = 88172645463325252ULL ^ (seed << 20) ^ (uint64_t)(own + 1) * 0x9e3779b97f4a7c15ULL;
        work(own, &random, held[own]);
        pthread_barrier_wait(&end);
    }
    return NULL;
}

/* `storm MILLISECONDS SEED` */
static void storm(int count, char **arguments) {
    require(count == 3);
    seed = strtoull(arguments[2], NULL, 0);
    run_until_ns = now_ns() + strtoull(arguments[1], NULL, 0) * 1000000;
    pthread_barrier_wait(&begin);
    pthread_barrier_wait(&end);
}

static void roam(int count, char **arguments) {
    (void)count, (void)arguments;
    char path[512];
    snprintf(path, sizeof path, "%s.log", books_path());
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    require(file >= 0 && ftruncate(file, sizeof *event_log) == 0);
    event_log = (struct event_log *)mmap(NULL, sizeof *event_log, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    require(event_log != MAP_FAILED);
    close(file);
    seed = 1;
    roaming = 1;
    run_until_ns = 1;
    pthread_barrier_wait(&begin);
}

static void rest(int count, char **arguments) {
    (void)count, (void)arguments;
    __atomic_store_n(&run_until_ns, 0, __ATOMIC_RELAXED);
    pthread_barrier_wait(&end);
    roaming = 0;
}

/* Threads that come and go, each ending in another way, each leaving blocks. */
static void *short_lived(void *argument) {
    int own = (int)(intptr_t)argument;
    t_malloc(1000 + (size_t)own);
    t_free(t_malloc(500));
    if (own % 3 == 0) pthread_exit(NULL);
    if (own % 3 == 1) {
        pthread_cancel(pthread_self());
        pthread_testcancel();
    }
    return NULL;
}

static void lives(int count, char **arguments) {
    (void)count, (void)arguments;
    for (int i = 0; i < 30; i++) {
        pthread_t thread;
        require(pthread_create(&thread, NULL, short_lived, (void *)(intptr_t)i) == 0);
        require(pthread_join(thread, NULL) == 0);
    }
}

/* A signal handler on a stack of its own. */
static void on_signal(int signal) {
    (void)signal;
    t_malloc(4242);
    t_free(t_malloc(4243));
}

static void signals(int count, char **arguments) {
    (void)count, (void)arguments;
    static char stack[1 << 16];
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    require(sigaltstack(&alternate, NULL) == 0);
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    require(sigaction(SIGUSR1, &action, NULL) == 0);
    for (int i = 0; i < 20; i++) {
        t_malloc(100);
        raise(SIGUSR1);
        t_free(t_malloc(101));
    }
}

#ifndef WITHOUT_CONTEXTS
/* Coroutines: the stack pointer jumps between heap and stack regions. */
static ucontext_t main_context, contexts[4];

static void coroutine(int own) {
    void *block = NULL;
    for (int i = 0; i < 10; i++) {
        if (block) block = t_realloc(block, 200 + (size_t)(i * 100 + own));
        else block = t_malloc(100 + (size_t)own);
        t_free(t_calloc(3, 50));
        swapcontext(&contexts[own], &main_context);
    }
}

static void coroutines(int count, char **arguments) {
    (void)count, (void)arguments;
    static char stacks[4][1 << 16];
    for (volatile int i = 0; i < 4; i++) {
        require(getcontext(&contexts[i]) == 0);
        contexts[i].uc_stack.ss_sp = stacks[i];
        contexts[i].uc_stack.ss_size = sizeof stacks[i];
        contexts[i].uc_link = &main_context;
        makecontext(&contexts[i], (void (*)(void))coroutine, 1, i);
    }
    for (int turn = 0; turn < 40; turn++) {
        t_malloc(30);
        require(swapcontext(&main_context, &contexts[turn % 4]) == 0);
    }
}
#endif

int main(void) {
    static const struct scenario scenarios[] = {
        {"storm", storm}, {"roam", roam}, {"rest", rest}, {"lives", lives}, {"signals", signals},
#ifndef WITHOUT_CONTEXTS
        {"coroutines", coroutines},
#endif
        {NULL, NULL},
    };
    open_books();
    pthread_barrier_init(&begin, NULL, WORKERS + 1);
    pthread_barrier_init(&end, NULL, WORKERS + 1);
    for (int i = 0; i < WORKERS; i++) {
        pthread_t thread;
        require(pthread_create(&thread, NULL, worker, (void *)(intptr_t)i) == 0);
    }
    /* pthread_cancel loads libgcc_s at its first use, which allocates. */
    pthread_t thread;
    require(pthread_create(&thread, NULL, short_lived, (void *)1) == 0);
    require(pthread_join(thread, NULL) == 0);
    return converse(scenarios);
}
