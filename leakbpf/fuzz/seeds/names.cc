// Mangled names, in namespaces and templates.
namespace outer {
template <typename T, int N> struct Ring {
    T items[N];
    int used = 0;
    __attribute__((noinline)) void push(T const &item) { items[used++ % N] = item; }
};
struct Shape { virtual ~Shape() {} virtual int area() const = 0; };
struct Square : Shape { int side = 3; int area() const override { return side * side; } };
}
int measure(outer::Shape const *shape) { return shape->area(); }
int run(int n) {
    outer::Ring<int, 7> ints;
    outer::Ring<char const *, 3> texts;
    auto add = [&](int by) { ints.push(n + by); texts.push("x"); };
    add(1); add(2);
    outer::Square square;
    return measure(&square) + ints.used;
}
