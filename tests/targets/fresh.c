/* A library of some 100 KiB of code without frame pointers, with many frames of its own. */
#define OWN_FRAME __attribute__((noinline, noclone))
/* Nothing that was a frame pointer still is one. */
#define NO_FRAME_POINTER() __asm__ volatile("mov $1, %%ebp" ::: "rbp", "memory")

#define BODY(name, next)                                     \
    OWN_FRAME void name(void (*function)(void)) {            \
        volatile char room[sizeof #name * 8];                \
        room[0] = 1;                                         \
        NO_FRAME_POINTER();                                  \
        next(function);                                      \
        NO_FRAME_POINTER();                                  \
        room[sizeof room - 1] = 2;                           \
    }
#define CALL(function) function()

BODY(fresh_innermost, CALL)
BODY(fresh_third, fresh_innermost)
BODY(fresh_second, fresh_third)
BODY(fresh_call, fresh_second)

/* What else a library has: functions whose rows must be there too. */
#define UNUSED(name)                                         \
    OWN_FRAME int name(int a, int b, int (*function)(int)) { \
        volatile int room[sizeof #name];                     \
        room[0] = function(a);                               \
        if (a > b) room[1] = function(b) + function(a * b);  \
        __asm__ volatile(".skip 160, 0x90");                 \
        return function(room[0]) + function(b - a);          \
    }
#define UNUSED_4(name) UNUSED(name##0) UNUSED(name##1) UNUSED(name##2) UNUSED(name##3)
#define UNUSED_16(name) UNUSED_4(name##0) UNUSED_4(name##1) UNUSED_4(name##2) UNUSED_4(name##3)
#define UNUSED_64(name) UNUSED_16(name##0) UNUSED_16(name##1) UNUSED_16(name##2) UNUSED_16(name##3)
#define UNUSED_256(name) UNUSED_64(name##0) UNUSED_64(name##1) UNUSED_64(name##2) UNUSED_64(name##3)

UNUSED_256(unused_)
UNUSED_64(other_)
