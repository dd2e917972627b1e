//! A program that knows its own truth: answers commands line by line, as `target.h` does, and says
//! its outstanding blocks as lines `block ADDRESS SIZE`. It allocates for itself only before it is
//! ready, and releases what it allocates in between.

use std::alloc::{GlobalAlloc, Layout};
use std::io::{BufRead, Write};

/// What is outstanding, with its layout.
type Blocks = Vec<(*mut u8, Layout)>;

/// Serves commands on the allocator until the input ends.
pub fn serve<A: GlobalAlloc>(allocator: &A) {
    let mut blocks: Blocks = Vec::with_capacity(1 << 16);
    let mut line = String::with_capacity(1 << 12);
    let mut answer = String::with_capacity(1 << 22);
    let stdin = std::io::stdin();
    let mut input = stdin.lock();
    let mut output = std::fs::File::from(std::os::fd::OwnedFd::from(
        std::os::fd::AsFd::as_fd(&std::io::stdout()).try_clone_to_owned().expect("stdout"),
    ));
    output.write_all(b"ready\n").expect("stdout");
    loop {
        line.clear();
        if input.read_line(&mut line).expect("stdin") == 0 || line.starts_with("quit") {
            return;
        }
        answer.clear();
        match line.trim() {
            "forms" => forms(allocator, &mut blocks),
            "vectors" => vectors(),
            "tell" => tell(&blocks, &mut answer),
            other => panic!("no scenario {other}"),
        }
        answer.push_str("done\n");
        output.write_all(answer.as_bytes()).expect("stdout");
    }
}

/// Blocks of many sizes and alignments, zeroed and not, a third reallocated, a third released.
#[inline(never)]
fn forms<A: GlobalAlloc>(allocator: &A, blocks: &mut Blocks) {
    for index in 1..2000_usize {
        let layout = Layout::from_size_align(index * 13, 1 << (index % 8)).expect("a layout");
        // SAFETY: the layouts have a size, and each block is released or resized with its own.
        unsafe {
            let mut block = match index % 2 {
                0 => allocator.alloc(layout),
                _ => allocator.alloc_zeroed(layout),
            };
            assert!(!block.is_null());
            let mut now = layout;
            if index % 3 == 1 {
                let size = (index * 7919) % 9000 + 1;
                block = allocator.realloc(block, layout, size);
                now = Layout::from_size_align(size, layout.align()).expect("a layout");
            }
            if index % 3 == 2 {
                allocator.dealloc(block, now);
            } else {
                blocks.push((block, now));
            }
        }
    }
}

/// What the standard library does with the global allocator; all of it is released.
#[inline(never)]
fn vectors() {
    let mut words: Vec<String> = Vec::new();
    for index in 0..1000 {
        words.push("w".repeat(index % 200));
    }
    words.sort();
    assert_eq!(words.len(), 1000);
}

fn tell(blocks: &Blocks, answer: &mut String) {
    use std::fmt::Write;
    for (block, layout) in blocks {
        writeln!(answer, "block {:x} {}", *block as usize, layout.size()).expect("a string");
    }
    assert!(answer.len() < 1 << 22, "the answer must not be reallocated");
}
