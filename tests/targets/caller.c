/* A library without frame pointers that calls back. */
void plugin_call(void (*function)(void));

__attribute__((noinline)) void plugin_call(void (*function)(void)) {
    /* Nothing that was a frame pointer still is one. */
    __asm__ volatile("mov $1, %%ebp" ::: "rbp", "memory");
    function();
    __asm__ volatile("" ::: "rbp", "memory");
}
