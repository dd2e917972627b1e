/* Frames, symbols and inlined calls of many kinds. */
void callee(char *);
int imported(int);
#ifdef ALONE
int imported(int n) { return n; }
#endif
static volatile int sink;

static inline __attribute__((always_inline)) int twice(int n) { sink = n; return 2 * n; }
static inline __attribute__((always_inline)) int four_times(int n) { return twice(twice(n)); }
static __attribute__((noinline)) int hidden(int n) { return four_times(n) + imported(n); }

void alloca_of(int n) { char *p = __builtin_alloca(n); callee(p); }
void aligned(int n) { char p[64] __attribute__((aligned(64))); p[n & 63] = 0; callee(p); }
void huge(void) { char p[500000]; callee(p); }
int many(int n) {
    for (int i = 0; i < n; i++) { alloca_of(i); aligned(i); }
    if (n == 12345) __builtin_trap();
    return hidden(n);
}
__attribute__((noinline)) void callee(char *p) { __asm__ volatile("" :: "r"(p) : "rbx", "r12"); }
void _start(void) { huge(); many(3); for (;;) {} }
int (*pick(void))(int) { return many; }
int chosen(int) __attribute__((ifunc("pick")));
