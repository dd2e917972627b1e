//! leakbpf's kernel side: it decides and accounts; the agent names, judges and renders.
//!
//! - [`alloc`]: uprobes on allocator functions
//! - [`mappings`]: anonymous mappings, from the system calls themselves
//! - [`pages`]: pages, when they are touched first
//! - [`processes`]: fork, exec and the end of threads
//! - [`stack`]: who called
//! - [`task`]: what the kernel knows of the current thread
//! - [`kernel_stack`]: which stack a program runs on
//! - [`books`]: the accounting rules of `leakbpf_common::ledger` over BPF maps
#![no_std]
#![feature(asm_experimental_arch, core_intrinsics)]
#![allow(internal_features)]
#![no_main]

mod alloc;
mod books;
mod kernel_stack;
mod mappings;
mod maps;
mod meter;
mod pages;
mod processes;
mod stack;
mod task;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
