/* A library that allocates, loaded and unloaded again and again. */
#include <stdlib.h>

void *plugin_allocate(size_t size);
void plugin_release(void *block);

__attribute__((noinline)) void *plugin_allocate(size_t size) {
    void *volatile block = malloc(size);
    return block;
}

__attribute__((noinline)) void plugin_release(void *block) { free(block); }
