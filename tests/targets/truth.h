/* Programs that know their own truth: each allocation goes through a wrapper at source level.
 *
 * Every wrapper is a macro around the call itself, so that the compiler sees, and the program
 * makes, exactly the call that is tested. */
#ifndef TRUTH_H
#define TRUTH_H

#include <errno.h>
#include <stdbool.h>

#include "table.h"

#define TRUTH_VOLATILE(type, value) ({ volatile type hidden_ = (value); (type)hidden_; })

/* `call` returns a new block of `bytes`, or NULL. */
#define t_new(bytes, call)                                                    \
    ({                                                                        \
        uint64_t begun_ = now_ns();                                           \
        void *block_ = (void *)(call);                                        \
        if (block_) books_insert((uint64_t)block_, (bytes), begun_);          \
        TRUTH_VOLATILE(void *, block_);                                       \
    })

/* `call` releases `block`. */
#define t_delete(block, call)                                                 \
    do {                                                                      \
        if (block) books_remove((uint64_t)(block));                           \
        call;                                                                 \
    } while (0)

/* `call` replaces `old` by a block of `bytes`. NULL leaves the old one alone, unless `bytes` is 0. */
#define t_replace(old, bytes, call)                                           \
    ({                                                                        \
        void *old_ = (old);                                                   \
        uint64_t bytes_ = (bytes), begun_ = now_ns();                         \
        struct known_block known_ = {0, 0, 0, 0};                                      \
        if (old_) known_ = books_remove((uint64_t)old_);                      \
        void *block_ = (void *)(call);                                        \
        if (block_) books_insert((uint64_t)block_, bytes_, begun_);           \
        else if (bytes_ != 0) books_restore(known_);                          \
        TRUTH_VOLATILE(void *, block_);                                       \
    })

#define t_malloc(n) t_new((n), malloc(n))
#define t_calloc(n, m) t_new((uint64_t)(n) * (m), calloc((n), (m)))
#define t_realloc(p, n) t_replace((p), (n), realloc(old_, bytes_))
#define t_free(p)                                                             \
    do {                                                                      \
        void *freed_ = (p);                                                   \
        t_delete(freed_, free(freed_));                                       \
    } while (0)

#endif
