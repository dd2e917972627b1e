/* Leaks the same blocks at each run, and ends as its first argument says: for `record -- CMD`. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void on_signal(int signal) {
    (void)signal;
    _exit(44);
}

int main(int count, char **arguments) {
    const char *how = count > 1 ? arguments[1] : "0";
    for (int i = 0; i < 25; i++) (void)!malloc(1234);
    for (int i = 0; i < 25; i++) free(malloc(1235));
    if (strcmp(how, "wait") == 0) {
        signal(SIGTERM, on_signal);
        if (write(1, "waiting\n", 8) != 8) return 1;
        for (;;) pause();
    }
    if (strcmp(how, "abort") == 0) abort();
    _exit(atoi(how));
}
