/* The same code as in plugin.c at the same places, under other names of the same length. */
#define plugin_allocate second_allocate
#define plugin_release second_release
#include "plugin.c"
