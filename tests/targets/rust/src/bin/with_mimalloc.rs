#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    leakbpf_rust_targets::serve(&ALLOCATOR);
}
