//! `cargo xtask ci`: everything that must be green, with a summary that says how to mend the rest.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::{bpf, setup, shell, test};

struct Check {
    name: &'static str,
    /// The command that repeats the check, or mends what it found.
    remedy: &'static str,
    run: fn() -> Result<()>,
}

const CHECKS: &[Check] = &[
    Check { name: "setup", remedy: "cargo xtask setup", run: setup::run },
    Check {
        name: "format",
        remedy: "cargo fmt --all && (cd leakbpf-ebpf && cargo fmt) && (cd leakbpf/fuzz && cargo fmt)",
        run: format,
    },
    Check {
        name: "lint",
        remedy: "cargo clippy --workspace --all-targets --features leakbpf-tests/privileged",
        run: lint,
    },
    Check {
        name: "unprivileged tests",
        remedy: "cargo xtask test",
        run: || test::unprivileged(&[]),
    },
    Check {
        name: "bpf object",
        remedy: "cargo xtask bpf, then commit leakbpf/bpf/",
        run: bpf::check,
    },
    Check {
        name: "privileged tests",
        remedy: "cargo xtask test --privileged",
        run: || test::privileged(&[]),
    },
    Check {
        name: "kernels",
        remedy: "cargo xtask test --kernel 5.10 --kernel 6.1 --kernel 6.12 --kernel 7",
        run: || test::kernels_all(&["5.10", "6.1", "6.12", "7"]),
    },
];

pub fn run() -> Result<()> {
    let mut results: Vec<(&Check, Duration, Option<String>)> = Vec::new();
    for check in CHECKS {
        println!("\n=== {}", check.name);
        let started = Instant::now();
        let failure = (check.run)().err().map(|error| format!("{error:#}"));
        if let Some(failure) = &failure {
            println!("{}: {failure}", check.name);
        }
        results.push((check, started.elapsed(), failure));
    }

    println!("\n=== summary");
    let mut red = 0;
    for (check, time, failure) in &results {
        let verdict = if failure.is_none() { "green" } else { "RED" };
        println!("{verdict:5} {:20} {:4} s", check.name, time.as_secs());
        if let Some(failure) = failure {
            red += 1;
            println!("      {failure}");
            println!("      mend or repeat with: {}", check.remedy);
        }
    }
    if red > 0 {
        anyhow::bail!("{red} of {} checks are red", results.len());
    }
    println!("all {} checks are green", results.len());
    Ok(())
}

fn format() -> Result<()> {
    shell::run(shell::cargo().args(["fmt", "--all", "--check"]))?;
    for manifest in ["leakbpf-ebpf/Cargo.toml", "leakbpf/fuzz/Cargo.toml"] {
        shell::run(shell::cargo().args(["fmt", "--manifest-path", manifest, "--check"]))?;
    }
    Ok(())
}

fn lint() -> Result<()> {
    shell::run(shell::cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--features",
        "leakbpf-tests/privileged",
        "--",
        "-D",
        "warnings",
    ]))?;
    // What a plain `cargo test` builds.
    shell::run(shell::cargo().args([
        "clippy",
        "-p",
        "leakbpf-tests",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))?;
    // A workspace of their own: nothing else would notice that they no longer fit.
    shell::run(shell::cargo().args([
        "clippy",
        "--manifest-path",
        "leakbpf/fuzz/Cargo.toml",
        "--target-dir",
        "target/fuzz",
        "--",
        "-D",
        "warnings",
    ]))
}
