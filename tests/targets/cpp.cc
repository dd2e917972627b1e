// operator new and delete in every form, and exceptions thrown through them.
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "target.h"

namespace {

struct alignas(64) Wide {
    char bytes[192];
};

struct Throwing {
    char bytes[88];
    Throwing() { throw 7; }
};

std::align_val_t at(size_t alignment) { return std::align_val_t(alignment); }

void forms(int, char **) {
    for (size_t i = 1; i <= 12; i++) {
        size_t n = i * 24;
        // libstdc++ asks its allocator for a multiple of the alignment, and that is what counts.
        size_t n128 = (n + 127) & ~size_t(127), n64 = (n + 63) & ~size_t(63);
        void *blocks[] = {
            t_new(n, operator new(n)),
            t_new(n, operator new[](n)),
            t_new(n, operator new(n, std::nothrow)),
            t_new(n, operator new[](n, std::nothrow)),
            t_new(n128, operator new(n128, at(128))),
            t_new(n128, operator new[](n128, at(128))),
            t_new(n64, operator new(n64, at(64), std::nothrow)),
            t_new(n64, operator new[](n64, at(64), std::nothrow)),
        };
        if (i % 3 == 0) continue;
        bool sized = i % 3 == 1;
        if (sized) {
            t_delete(blocks[0], operator delete(blocks[0], n));
            t_delete(blocks[1], operator delete[](blocks[1], n));
            t_delete(blocks[2], operator delete(blocks[2], std::nothrow));
            t_delete(blocks[3], operator delete[](blocks[3], std::nothrow));
            t_delete(blocks[4], operator delete(blocks[4], n128, at(128)));
            t_delete(blocks[5], operator delete[](blocks[5], n128, at(128)));
            t_delete(blocks[6], operator delete(blocks[6], at(64), std::nothrow));
            t_delete(blocks[7], operator delete[](blocks[7], at(64), std::nothrow));
        } else {
            t_delete(blocks[0], operator delete(blocks[0]));
            t_delete(blocks[1], operator delete[](blocks[1]));
            t_delete(blocks[4], operator delete(blocks[4], at(128)));
            t_delete(blocks[5], operator delete[](blocks[5], at(128)));
        }
    }
}

void objects(int, char **) {
    for (int i = 0; i < 10; i++) {
        Wide *wide = static_cast<Wide *>(t_new(sizeof(Wide), new Wide));
        auto *text = static_cast<std::string *>(t_new(sizeof(std::string), new std::string("short")));
        if (i % 2) t_delete(wide, delete wide);
        if (i % 3) t_delete(text, delete text);
    }
}

// The call in flight never returns: the next ones must count as outermost again.
void exceptions(int, char **) {
    volatile size_t huge = SIZE_MAX / 4;
    int caught = 0;
    for (int i = 0; i < 20; i++) {
        try {
            (void)t_new(huge, operator new(huge));
        } catch (const std::bad_alloc &) {
            caught++;
        }
        require(t_new(50 + i, operator new(50 + i)));
        try {
            (void)t_new(huge, operator new[](huge, at(256)));
        } catch (const std::bad_alloc &) {
            caught++;
        }
        require(t_malloc(150 + i));
        require(t_new(huge, operator new(huge, std::nothrow)) == nullptr);
        // The compiler releases the block of an object whose constructor throws.
        try {
            new Throwing;
        } catch (int) {
            caught++;
        }
    }
    require(caught == 60);
}

// Blocks that the library's own templates allocate and release: nothing may be left of them.
void containers(int, char **) {
    std::vector<std::string> words;
    for (int i = 0; i < 2000; i++) words.push_back(std::string(i % 90, 'w'));
    auto shared = std::make_shared<std::vector<int>>(1000);
    auto other = shared;
}

}  // namespace

int main() {
    static const scenario scenarios[] = {{"forms", forms},
                                         {"objects", objects},
                                         {"exceptions", exceptions},
                                         {"containers", containers},
                                         {nullptr, nullptr}};
    // The first exception of a program loads what the unwinder needs, which allocates.
    open_books();
    try {
        throw 1;
    } catch (int) {
    }
    return converse(scenarios);
}
