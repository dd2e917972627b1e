/* Allocator functions of its own that begin with nopl 0x0(%rax,%rax,1), as code that is built for hot
 * patching does. */
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "target.h"
#include "truth.h"

#define WITH_LONG_NOP(name, target)                                                                    \
    __asm__(".globl " #name "\n.type " #name ", @function\n" #name ":\n"                               \
            ".byte 0x0f, 0x1f, 0x44, 0x00, 0x00\n"                                                     \
            "push %rbx\ncall " #target "@plt\npop %rbx\nret\n"                                         \
            ".size " #name ", . - " #name "\n")

WITH_LONG_NOP(malloc, __libc_malloc);
WITH_LONG_NOP(free, __libc_free);

static void make(int count, char **arguments) {
    require(count == 3);
    for (int i = atoi(arguments[1]); i > 0; i--) {
        t_free(t_malloc((size_t)atoi(arguments[2])));
        require(t_malloc((size_t)atoi(arguments[2])));
    }
}

/* Says how a child ends that allocates. */
static void fork_and_wait(int count, char **arguments) {
    (void)count, (void)arguments;
    pid_t child = fork();
    require(child >= 0);
    if (child == 0) {
        for (int i = 0; i < 20; i++) {
            void *volatile block = malloc(100);
            free(block);
        }
        _exit(0);
    }
    int status;
    require(waitpid(child, &status, 0) == child);
    say("status %d", status);
}

int main(void) {
    const struct scenario scenarios[] = {{"make", make}, {"fork", fork_and_wait}, {NULL, NULL}};
    return converse(scenarios);
}
