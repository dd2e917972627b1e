//! `cargo xtask bpf`: the kernel side, built as the stamp describes.

mod stamp;
mod toolchain;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::shell;
use stamp::{OBJECT, STAMP, Stamp};

#[derive(Args)]
pub struct Options {
    /// Rebuild and compare with the committed object and stamp; change nothing
    #[arg(long)]
    check: bool,
}

pub fn run(options: &Options) -> Result<()> {
    if options.check { check() } else { write() }
}

fn write() -> Result<()> {
    let root = shell::root();
    let toolchain = toolchain::prepare()?;
    let built = build(&root)?;
    let object = root.join(OBJECT);
    if let Some(folder) = object.parent() {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    fs::write(&object, &built).with_context(|| format!("write {}", object.display()))?;
    let stamp = Stamp::of_files(&root, toolchain)?;
    fs::write(root.join(STAMP), stamp.render()).with_context(|| format!("write {STAMP}"))?;
    println!("bpf: wrote {OBJECT} ({} bytes) and its stamp", built.len());
    Ok(())
}

/// # Errors
/// Names what differs and the command that mends it.
pub fn check() -> Result<()> {
    const REMEDY: &str = "run `cargo xtask bpf` and commit leakbpf/bpf/";
    let root = shell::root();
    let text = fs::read_to_string(root.join(STAMP))
        .with_context(|| format!("cannot read {STAMP}; {REMEDY}"))?;
    let committed = Stamp::parse(&text);
    let toolchain = toolchain::prepare()?;
    let now = Stamp::of_files(&root, toolchain.clone())?;
    let differences = committed.differences(&now);
    if !differences.is_empty() {
        bail!("{OBJECT} is not made from these sources: {}; {REMEDY}", differences.join(", "));
    }
    let built = build(&root)?;
    let object = fs::read(root.join(OBJECT)).with_context(|| format!("cannot read {OBJECT}"))?;
    if built != object {
        if committed.toolchain != toolchain {
            bail!(
                "{OBJECT} was built with {:?}, but this machine has {toolchain:?}; {REMEDY}",
                committed.toolchain,
            );
        }
        bail!("{OBJECT} differs from what its own sources give; {REMEDY}");
    }
    println!("bpf: {OBJECT} is byte for byte what its sources give");
    Ok(())
}

/// Compiles leakbpf-ebpf and returns the object's bytes.
fn build(root: &Path) -> Result<Vec<u8>> {
    let folder = root.join("leakbpf-ebpf");
    let target = folder.join("target");
    // Cargo does not notice a changed linker or wrapper, so nothing for BPF is taken from a cache.
    let cached = target.join("bpfel-unknown-none");
    if cached.exists() {
        fs::remove_dir_all(&cached).with_context(|| format!("remove {}", cached.display()))?;
    }
    let mut command = toolchain::cargo();
    command
        .current_dir(&folder)
        .env("CARGO_ENCODED_RUSTFLAGS", flags(root)?)
        .env("RUSTC_WRAPPER", root.join("xtask/src/bpf/rustc-fixed-metadata"))
        .args(["build", "--release", "--locked", "--target", "bpfel-unknown-none"])
        .arg("--target-dir")
        .arg(&target);
    shell::run(&mut command)?;
    let object = cached.join("release/leakbpf");
    // The linker wants DWARF to make BTF from; the kernel wants only BTF, and DWARF is most bytes.
    shell::run(toolchain::llvm("llvm-objcopy").arg("--strip-debug").arg(&object))?;
    let bytes = fs::read(&object).with_context(|| format!("read {}", object.display()))?;
    refuse_local_paths(&bytes, root)?;
    Ok(bytes)
}

/// Compiler flags, separated as `CARGO_ENCODED_RUSTFLAGS` wants it.
fn flags(root: &Path) -> Result<OsString> {
    // BTF with function types is what lets bpf_loop take a callback.
    let mut flags: Vec<OsString> =
        ["-C", "link-arg=--btf", "-C", "debuginfo=2"].map(OsString::from).into();
    // The last prefix that matches wins, so from the outside in.
    let cargo_home = cargo_home()?;
    let mut prefixes = vec![(cargo_home.clone(), "/cargo".to_owned())];
    let registries = cargo_home.join("registry/src");
    if let Ok(entries) = fs::read_dir(&registries) {
        for entry in entries {
            prefixes.push((entry?.path(), "/registry".to_owned()));
        }
    }
    prefixes.push((root.to_path_buf(), "/leakbpf".to_owned()));
    for (from, to) in prefixes {
        let mut flag = OsString::from("--remap-path-prefix=");
        flag.push(&from);
        flag.push("=");
        flag.push(to);
        flags.push(flag);
    }
    Ok(flags.join(&OsString::from("\u{1f}")))
}

fn cargo_home() -> Result<PathBuf> {
    if let Some(home) = std::env::var_os("CARGO_HOME") {
        return Ok(home.into());
    }
    let home = std::env::var_os("HOME").context("neither CARGO_HOME nor HOME is set")?;
    Ok(Path::new(&home).join(".cargo"))
}

/// The object is committed: it must not say where it was built.
fn refuse_local_paths(object: &[u8], root: &Path) -> Result<()> {
    for path in [root.to_path_buf(), cargo_home()?] {
        let needle = path.as_os_str().as_encoded_bytes();
        if object.windows(needle.len()).any(|window| window == needle) {
            bail!("the object contains the local path {}", path.display());
        }
    }
    Ok(())
}
