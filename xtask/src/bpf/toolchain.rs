//! The compiler of the kernel side: Debian's, because it ships `core` for BPF prebuilt, and because
//! stable Rust does not. docs/development.md says more.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::{packages, shell};

const PACKAGES: &[&str] = &[
    "gcc",
    "g++",
    "rustc-web",
    "cargo-web",
    "libstd-rust-web-dev-bpf",
    "llvm-22",
    "llvm-22-dev",
    "libpolly-22-dev",
    "zlib1g-dev",
    "libzstd-dev",
];
const RUSTC: &str = "/usr/bin/rustc";
const CARGO: &str = "/usr/bin/cargo";
const LLVM_BIN: &str = "/usr/lib/llvm-22/bin";
const LINKER_VERSION: &str = "0.13.0";

/// Installs what is missing.
///
/// Returns one line for each tool, as it names itself.
pub fn prepare() -> Result<Vec<String>> {
    packages::install(PACKAGES)?;
    let linker = format!("bpf-linker {LINKER_VERSION}");
    if linker_version().as_deref() != Some(&linker) {
        install_linker()?;
    }
    match linker_version() {
        Some(version) if version == linker => {}
        _ => {
            bail!("{linker} is installed, but not the first in PATH: put cargo's bin folder there")
        }
    }
    let rustc = shell::output(Command::new(RUSTC).arg("--version"))?;
    let llvm = shell::output(llvm("llvm-config").arg("--version"))?;
    Ok(vec![rustc, linker, format!("LLVM {llvm}")])
}

fn linker_version() -> Option<String> {
    shell::output(Command::new("bpf-linker").arg("--version")).ok()
}

fn install_linker() -> Result<()> {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = shell::cargo();
    command.env("PATH", format!("{LLVM_BIN}:{path}")).args([
        "install",
        "bpf-linker",
        "--version",
        LINKER_VERSION,
        "--locked",
        "--force",
        "--no-default-features",
        "--features",
        "llvm-22",
    ]);
    shell::run(&mut command)
}

/// A tool of the LLVM that the linker uses.
pub fn llvm(tool: &str) -> Command {
    Command::new(Path::new(LLVM_BIN).join(tool))
}

/// Debian's cargo with Debian's rustc, free of what the calling cargo set for its own build.
pub fn cargo() -> Command {
    let mut command = Command::new(CARGO);
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let theirs = ["CARGO", "RUST"].iter().any(|prefix| text.starts_with(prefix));
        let network = ["CARGO_HOME", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTR", "CARGO_SOURCE_"]
            .iter()
            .any(|prefix| text.starts_with(prefix));
        if theirs && !network {
            command.env_remove(&name);
        }
    }
    // The `bpf` standard library needs features that are not stable.
    command.env("RUSTC_BOOTSTRAP", "1").env("RUSTC", RUSTC);
    command
}
