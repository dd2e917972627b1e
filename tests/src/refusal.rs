//! How leakbpf says no: exit status 2, one line that names the object, nothing written.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Instant;

/// Runs the command line and fails the test unless it is refused as every bad input must be.
/// `names` are what the line must mention. Returns the line.
pub fn assert_refused(command: &mut Command, names: &[&str]) -> String {
    let begun = Instant::now();
    let output = command.output().expect("leakbpf starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{command:?} said: {}", all_of(&output));
    assert_eq!(said.trim_end().lines().count(), 1, "{command:?}: one line, not:\n{said}");
    for name in names {
        assert!(said.contains(name), "{command:?}: {name:?} is not in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
    assert!(begun.elapsed().as_secs() < 10, "{command:?} took {:?}", begun.elapsed());
    said
}

/// Nothing under the final name, and nothing unfinished next to it.
pub fn assert_nothing_written(directory: &Path) {
    let left: Vec<_> = std::fs::read_dir(directory)
        .expect("the directory is there")
        .flatten()
        .map(|entry| entry.path())
        .collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

fn all_of(output: &Output) -> String {
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}
