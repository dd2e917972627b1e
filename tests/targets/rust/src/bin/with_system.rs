#[global_allocator]
static ALLOCATOR: std::alloc::System = std::alloc::System;

fn main() {
    leakbpf_rust_targets::serve(&ALLOCATOR);
}
