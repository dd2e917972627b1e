//! Bad input that is recognised before any privilege is needed.

use std::fs;
use std::path::PathBuf;

use leakbpf_tests::{assert_nothing_written, assert_refused, leakbpf_command};

#[test]
fn a_session_without_processes_is_refused() {
    assert_refused(leakbpf_command().arg("record"), &["-p"]);
}

#[test]
fn contradictory_choices_of_processes_are_refused() {
    assert_refused(leakbpf_command().args(["record", "--all", "-p", "1"]), &["--all"]);
    assert_refused(leakbpf_command().args(["record", "--all", "--name", "x"]), &["--all"]);
    assert_refused(leakbpf_command().args(["record", "-p", "1", "--", "true"]), &["-p"]);
}

#[test]
fn a_bad_regular_expression_is_named() {
    assert_refused(leakbpf_command().args(["record", "--name", "a(b"]), &["a(b"]);
}

#[test]
fn bad_numbers_times_and_sizes_are_named() {
    for arguments in [
        ["-p", "0"],
        ["-p", "abc"],
        ["-p", "99999999999"],
        ["-d", "soon"],
        ["--min-size", "1x"],
        ["--mode", "magic"],
        ["--max-blocks", "0"],
        ["--max-tables", "much"],
    ] {
        let [flag, value] = arguments;
        let mut command = leakbpf_command();
        command.arg("record").args(arguments);
        if flag != "-p" {
            command.args(["-p", "1"]);
        }
        assert_refused(&mut command, &[value]);
    }
}

#[test]
fn an_unknown_option_is_named() {
    assert_refused(leakbpf_command().args(["record", "--frobnicate"]), &["--frobnicate"]);
}

/// Files that are no recordings, by what they are.
fn no_recordings() -> (tempfile::TempDir, Vec<PathBuf>) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut header = b"SQLite format 3\0".to_vec();
    header.resize(5000, 0);
    let files = [
        ("empty", Vec::new()),
        ("text", b"this is a shopping list\n".repeat(300)),
        ("cut", b"SQLite format 3\0\x10\0".to_vec()),
        ("hollow", header),
        ("noise", (0..40000_u32).map(|i| (i.wrapping_mul(2654435761) >> 13) as u8).collect()),
    ];
    let paths = files.into_iter().map(|(name, bytes)| {
        let path = directory.path().join(format!("{name}.leakbpf"));
        fs::write(&path, bytes).expect("a written file");
        path
    });
    let paths = paths.collect();
    (directory, paths)
}

#[test]
fn what_is_no_recording_is_refused_by_name() {
    let (_directory, paths) = no_recordings();
    for path in paths {
        let name = path.file_name().and_then(|name| name.to_str()).expect("UTF-8");
        assert_refused(leakbpf_command().arg("report").arg(&path), &[name]);
    }
}

#[test]
fn a_recording_that_does_not_exist_is_named() {
    assert_refused(leakbpf_command().args(["report", "/nonexistent.leakbpf"]), &["/nonexistent"]);
}

#[test]
fn a_directory_is_no_recording() {
    assert_refused(leakbpf_command().args(["report", "/usr"]), &["/usr"]);
}

#[test]
fn a_refused_report_writes_nothing() {
    let (_directory, paths) = no_recordings();
    let output = tempfile::tempdir().expect("a temporary directory");
    for path in paths {
        let mut command = leakbpf_command();
        command.arg("report").arg(&path).args(["--format", "svg"]);
        assert_refused(command.arg("-o").arg(output.path().join("out.svg")), &[]);
        assert_nothing_written(output.path());
    }
}
