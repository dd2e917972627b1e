#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() {
    leakbpf_rust_targets::serve(&ALLOCATOR);
}
