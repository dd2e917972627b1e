//! The program under test, as a command line.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::build::profile_directory;

/// A `leakbpf` command line without arguments. The program is built on first use; `LEAKBPF`
/// names another one.
pub fn leakbpf_command() -> Command {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    Command::new(PROGRAM.get_or_init(|| {
        if let Some(path) = env::var_os("LEAKBPF") {
            return path.into();
        }
        let directory = profile_directory();
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "-p", "leakbpf", "--bin", "leakbpf"]);
        if directory.ends_with("release") {
            build.arg("--release");
        }
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let status = build.current_dir(workspace).status().expect("cargo starts");
        assert!(status.success(), "leakbpf does not build: the reason is above");
        directory.join("leakbpf")
    }))
}
