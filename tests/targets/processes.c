/* Processes that come from processes. */
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

#include "target.h"

extern char **environ;
static const struct scenario scenarios[];
static void *inherited[20];
static int to_child[2], from_child[2];

static void hold(int count, char **arguments) {
    (void)count, (void)arguments;
    for (int i = 0; i < 20; i++) require(inherited[i] = t_malloc(300 + (size_t)i));
}

/* A child that waits for `go_on`. Says `child PID`. */
static void fork_and_wait(int count, char **arguments) {
    (void)count, (void)arguments;
    require(pipe(to_child) == 0 && pipe(from_child) == 0);
    pid_t child = fork();
    require(child >= 0);
    if (child == 0) {
        close(to_child[1]);
        char byte;
        /* Ends with the parent, too. */
        if (read(to_child[0], &byte, 1) != 1) _exit(0);
        books_open_for_process(books_path());
        for (int i = 0; i < 20; i += 2) t_free(inherited[i]);
        for (int i = 0; i < 10; i++) t_malloc(4000 + (size_t)i);
        t_free(t_malloc(50));
        inherited[1] = t_realloc(inherited[1], 5000);
        if (write(from_child[1], "x", 1) != 1) _exit(1);
        (void)!read(to_child[0], &byte, 1);
        _exit(0);
    }
    close(to_child[0]);
    say("child %d", (int)child);
}

/* The child frees half of what it inherits and makes blocks of its own; so does the parent. */
static void go_on(int count, char **arguments) {
    (void)count, (void)arguments;
    char byte = 'x';
    require(write(to_child[1], &byte, 1) == 1);
    require(read(from_child[0], &byte, 1) == 1);
    for (int i = 1; i < 20; i += 2) t_free(inherited[i]);
    for (int i = 0; i < 10; i++) t_malloc(6000 + (size_t)i);
}

/* fork_at_once [MS [exit|exec]]: as its first act, but after MS, the child makes blocks of 4100 to 4119
 * bytes and frees every other one; then it stays, unless told otherwise. Says `child PID`. */
static void fork_at_once(int count, char **arguments) {
    struct timespec pause = {0, count > 1 ? atol(arguments[1]) * 1000000 : 0};
    const char *end = count > 2 ? arguments[2] : "";
    require(pipe(to_child) == 0 && pipe(from_child) == 0);
    pid_t child = fork();
    require(child >= 0);
    if (child == 0) {
        if (pause.tv_nsec) nanosleep(&pause, NULL);
        for (size_t i = 0; i < 20; i++) {
            void *volatile block = malloc(4100 + i);
            if (i % 2) free(block);
        }
        close(to_child[1]);
        if (write(from_child[1], "x", 1) != 1) _exit(1);
        if (strcmp(end, "exit") == 0) _exit(0);
        if (strcmp(end, "exec") == 0) execl("/bin/sleep", "sleep", "1", (char *)NULL);
        char byte;
        (void)!read(to_child[0], &byte, 1);
        _exit(0);
    }
    close(to_child[0]);
    char byte;
    require(read(from_child[0], &byte, 1) == 1);
    say("child %d", (int)child);
}

/* Children that end at once, and leave blocks that die with them. */
static void forks(int count, char **arguments) {
    (void)count, (void)arguments;
    for (int i = 0; i < 20; i++) {
        pid_t child = fork();
        require(child >= 0);
        if (child == 0) {
            /* The books are the parent's memory: nothing may be written to them here. */
            for (int j = 0; j < 20; j++) (void)!malloc(70);
            free(inherited[0]);
            _exit(0);
        }
        t_malloc(80);
        int status;
        require(waitpid(child, &status, 0) == child && status == 0);
    }
}

/* The child of vfork lives in this memory until its exec. */
static void vforks(int count, char **arguments) {
    (void)count, (void)arguments;
    for (int i = 0; i < 10; i++) {
        pid_t child = vfork();
        if (child == 0) {
            execl("/bin/true", "true", (char *)NULL);
            _exit(1);
        }
        require(child > 0);
        t_malloc(90);
        int status;
        require(waitpid(child, &status, 0) == child && status == 0);
    }
}

/* What the child of vfork allocates before its exec is this process's block. */
static void vfork_allocates(int count, char **arguments) {
    (void)count, (void)arguments;
    for (volatile int i = 0; i < 10; i++) {
        static void *volatile from_child;
        pid_t child = vfork();
        if (child == 0) {
            from_child = t_malloc(95);
            execl("/bin/true", "true", (char *)NULL);
            _exit(1);
        }
        require(child > 0);
        int status;
        require(waitpid(child, &status, 0) == child && status == 0);
        if (i % 2) t_free(from_child);
    }
}

static void spawns(int count, char **arguments) {
    (void)count, (void)arguments;
    char *words[] = {(char *)"true", NULL};
    for (int i = 0; i < 10; i++) {
        pid_t child;
        require(posix_spawn(&child, "/bin/true", NULL, NULL, words, environ) == 0);
        t_malloc(99);
        int status;
        require(waitpid(child, &status, 0) == child && status == 0);
    }
}

/* Becomes itself again: the same process, none of the old blocks. */
static void exec_in_place(int count, char **arguments) {
    (void)count, (void)arguments;
    for (int i = 0; i < 10; i++) t_malloc(7000);
    execl("/proc/self/exe", "again", (char *)NULL);
    require(!"exec returned");
}

static void *exec_in_thread(void *nothing) {
    for (int i = 0; i < 10; i++) t_malloc(7001);
    exec_in_place(0, NULL);
    return nothing;
}

/* The thread that calls it takes the place of the first one. */
static void thread_exec(int count, char **arguments) {
    (void)count, (void)arguments;
    pthread_t thread;
    require(pthread_create(&thread, NULL, exec_in_thread, NULL) == 0);
    pthread_join(thread, NULL);
    require(!"exec returned");
}

static void *goes_on(void *nothing) {
    say("done");
    converse(scenarios);
    _exit(0);
    return nothing;
}

/* Another thread goes on with the conversation. */
static void first_thread_ends(int count, char **arguments) {
    (void)count, (void)arguments;
    pthread_t thread;
    require(pthread_create(&thread, NULL, goes_on, NULL) == 0);
    pthread_exit(NULL);
}

static void make(int count, char **arguments) {
    require(count == 3);
    for (int i = atoi(arguments[1]); i > 0; i--) require(t_malloc((size_t)atoi(arguments[2])));
}

static void die(int count, char **arguments) {
    require(count == 2);
    kill(getpid(), atoi(arguments[1]));
}

static const struct scenario scenarios[] = {
    {"hold", hold},
    {"fork", fork_and_wait},
    {"go_on", go_on},
    {"forks", forks},
    {"fork_at_once", fork_at_once},
    {"vforks", vforks},
    {"vfork_allocates", vfork_allocates},
    {"spawns", spawns},
    {"exec", exec_in_place},
    {"thread_exec", thread_exec},
    {"first_thread_ends", first_thread_ends},
    {"make", make},
    {"die", die},
    {NULL, NULL},
};

int main(void) {
    return converse(scenarios);
}
