//! `leakbpf demo`: an installation that can show a known leak works.

use std::{hint::black_box, io::Write as _, time::Duration};

use anyhow::Context as _;
use leakbpf::{
    profile::BlockFilter,
    report::Sort,
    session::config::{Config, Method, StackMethod, Target},
};

use super::{Failure, record};

/// How long the demonstration runs.
const DURATION: Duration = Duration::from_secs(3);

/// Starts the leaking program, watches it and shows the result.
pub fn run() -> Result<u8, Failure> {
    let program = std::env::current_exe().context("cannot find the leakbpf program itself")?;
    println!(
        "Starting a program that keeps 1 KiB of every 64 KiB that it handles, and watching it for \
         {} s.\n",
        DURATION.as_secs()
    );
    let config = Config {
        target: Target::Program {
            program: program.into_os_string(),
            arguments: vec!["demo-target".into()],
        },
        method: Method::Exact,
        duration: None,
        output: None,
        filter: BlockFilter::default(),
        interval: Duration::from_secs(3600),
        top: 3,
        sort: Sort::Bytes,
        blocks: false,
        follow_forks: true,
        shared_probes: false,
        max_blocks: 1 << 18,
        stack: StackMethod::Auto,
        links: None,
        max_table_bytes: 192 << 20,
        cache: true,
        quiet: true,
    };
    let code = record::run_session(&config)?;
    println!(
        "\nThe first site is the leak: the function keep_one_of_many. Now try it on a process of \
         yours:\n  leakbpf record -p PID"
    );
    Ok(code)
}

/// The program that leaks.
pub fn target() -> Result<u8, Failure> {
    let began = std::time::Instant::now();
    let mut kept = Vec::new();
    while began.elapsed() < DURATION {
        for _ in 0..64 {
            handle_and_release();
        }
        keep_one_of_many(&mut kept);
        std::thread::sleep(Duration::from_millis(1));
    }
    std::io::stdout().flush()?;
    std::mem::forget(kept);
    Ok(0)
}

#[inline(never)]
fn handle_and_release() {
    drop(black_box(vec![1u8; 1024]));
}

#[inline(never)]
fn keep_one_of_many(kept: &mut Vec<Box<[u8]>>) {
    kept.push(black_box(vec![1u8; 1024]).into_boxed_slice());
}
