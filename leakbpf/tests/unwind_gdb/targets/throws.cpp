// Threads that throw and catch, and call through std::function, as fast as they can.
#include <cstdio>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

struct Guard {
    std::string name;
    ~Guard() { name.clear(); }
};

[[gnu::noinline]] int descend(int depth, const std::function<int(int)> &at_end) {
    Guard guard{std::string(depth + 20, 'x')};
    if (depth == 0) {
        return at_end(static_cast<int>(guard.name.size()));
    }
    return descend(depth - 1, at_end) + 1;
}

[[gnu::noinline]] int throws(int value) {
    auto block = std::make_unique<std::vector<int>>(value, 1);
    if (block->size() % 2 == 0) {
        throw std::runtime_error("even: " + std::to_string(value));
    }
    return value;
}

void work() {
    for (int turn = 0;; turn++) {
        try {
            descend(turn % 30, [turn](int size) { return throws(size + turn % 2); });
        } catch (const std::exception &error) {
            if (error.what()[0] != 'e') {
                std::puts(error.what());
            }
        }
    }
}

int main() {
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; i++) {
        threads.emplace_back(work);
    }
    for (auto &thread : threads) {
        thread.join();
    }
}
