//! `cargo xtask setup`: what the tests and benchmarks use beyond stable Rust.

use anyhow::Result;

use crate::{packages, shell};

/// Compilers and the allocators and programs that the privileged tests attach to.
const TESTS: &[&str] = &[
    "binutils",
    "gcc",
    "g++",
    "libc6-dev",
    "musl-tools",
    "libjemalloc2",
    "libtcmalloc-minimal4",
    "libmimalloc2.0",
    "redis-server",
    "redis-tools",
    "memcached",
    "nginx-light",
    "python3",
    "golang-go",
    "sqlite3",
    "perl",
];

/// What the guests of `xtask/vm-run` need on the host. It fetches QEMU itself.
const KERNELS: &[&str] = &["xz-utils", "zstd", "python3", "util-linux", "debian-archive-keyring"];

const BENCHMARKS: &[&str] = &["valgrind", "heaptrack"];

/// What only the commands of `cargo xtask bench` use: nothing else waits for them.
const SERVERS_AND_PROFILERS: &[&str] = &[
    "postgresql",
    "wrk",
    "libstb-dev",
    "bpftrace",
    "bpfcc-tools",
    "libgoogle-perftools4",
    "util-linux",
];

pub fn run() -> Result<()> {
    let mut wanted: Vec<&str> = Vec::new();
    for package in [TESTS, KERNELS, BENCHMARKS].concat() {
        // Other packages and sources provide the same programs.
        let present = match package {
            "nginx-light" => shell::find_program("nginx").is_some(),
            _ => false,
        };
        if !present && !wanted.contains(&package) {
            wanted.push(package);
        }
    }
    if shell::find_program("node").is_none() {
        wanted.push("nodejs");
    }
    if shell::find_program("javac").is_none() {
        wanted.push("default-jdk-headless");
    }
    packages::install(&wanted)?;
    println!("setup: everything is installed");
    Ok(())
}

/// What real programs are measured with, beyond [`run`].
pub fn servers_and_profilers() -> Result<()> {
    packages::install(SERVERS_AND_PROFILERS)
}
