//! `cargo xtask test`: which tests there are, and how each kind is run.

use anyhow::{Result, bail};
use clap::Args;

use crate::kernel::{self, Smoke};
use crate::{setup, shell};

#[derive(Args)]
pub struct Options {
    /// Tests that need neither root nor Debian's packages (the default)
    #[arg(long)]
    unprivileged: bool,
    /// Tests that attach to real processes (root)
    #[arg(long)]
    privileged: bool,
    /// The ledger under another kernel in a virtual machine, exact and sampled (root); may be repeated
    #[arg(long, value_name = "VERSION")]
    kernel: Vec<String>,
    /// All of them, with every kernel
    #[arg(long, conflicts_with_all = ["unprivileged", "privileged", "kernel"])]
    all: bool,
    /// Passed to the test programs: a filter, --nocapture, …
    #[arg(last = true)]
    arguments: Vec<String>,
}

pub fn run(options: &Options) -> Result<()> {
    let chosen = options.privileged || !options.kernel.is_empty();
    if options.unprivileged || options.all || !chosen {
        unprivileged(&options.arguments)?;
    }
    if options.privileged || options.all {
        privileged(&options.arguments)?;
    }
    let kernels: Vec<&str> = match options.all {
        true => kernel::ALL.to_vec(),
        false => options.kernel.iter().map(String::as_str).collect(),
    };
    kernels_all(&kernels)
}

pub fn unprivileged(arguments: &[String]) -> Result<()> {
    shell::run(shell::cargo().args(["test", "--workspace", "--no-fail-fast", "--"]).args(arguments))
}

pub fn privileged(arguments: &[String]) -> Result<()> {
    if !shell::is_root() {
        bail!(
            "attaching probes needs root: run `sudo -E env PATH=\"$PATH\" cargo xtask test --privileged`"
        );
    }
    setup::run()?;
    shell::run(shell::cargo().args(["build", "--release", "-p", "leakbpf"]))?;
    // Unit tests that need what the setup installs.
    shell::run(shell::cargo().args(["test", "-p", "leakbpf", "--lib", "--", "--ignored"]))?;
    // One at a time: a test that counts what is attached must not see another's probes.
    let mut command = shell::cargo();
    command
        .args(["test", "--release", "-p", "leakbpf-tests", "--features", "privileged"])
        .args(["--no-fail-fast", "--", "--test-threads=1"])
        .args(arguments);
    shell::run(&mut command)
}

/// Runs every kernel, then fails if one of them failed.
pub fn kernels_all(kernels: &[&str]) -> Result<()> {
    if kernels.is_empty() {
        return Ok(());
    }
    setup::run()?;
    let smoke = Smoke::build()?;
    let mut failed = Vec::new();
    for kernel in kernels {
        if let Err(error) = smoke.run(kernel) {
            println!("kernel {kernel}: FAILED: {error:#}");
            failed.push(*kernel);
        }
    }
    if !failed.is_empty() {
        bail!("kernel smoke failed under {}", failed.join(", "));
    }
    Ok(())
}
