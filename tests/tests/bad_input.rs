//! Bad input that only shows when everything else is in place.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use leakbpf_tests::{
    Allocator, Leakbpf, Target, assert_nothing_written, assert_refused, c_program, leakbpf_command,
    require_program, require_root, text_differences,
};

/// `leakbpf record` for a second, into the file.
fn record(output: &Path) -> Command {
    require_root();
    let mut command = leakbpf_command();
    command.args(["record", "-d", "200ms", "-o"]).arg(output);
    command
}

fn assert_pid_is_refused(pid: u32, names: &[&str]) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let pid = pid.to_string();
    let mut command = record(&directory.path().join("out.json"));
    command.args(["-p", &pid]);
    assert_refused(&mut command, &[&[pid.as_str()], names].concat());
    assert_nothing_written(directory.path());
    // Its report is what was asked for, so that is where it says so.
    let doctor = leakbpf_command().args(["doctor", "-p", &pid]).output().expect("it starts");
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&doctor.stdout),
        String::from_utf8_lossy(&doctor.stderr)
    );
    assert_eq!(doctor.status.code(), Some(2), "{said}");
    assert!(names.iter().all(|name| said.contains(name)), "{said}");
}

#[test]
fn an_unknown_pid_is_named() {
    assert_pid_is_refused(4_000_000, &[]);
}

#[test]
fn a_dead_pid_is_named() {
    let mut child = Command::new("/bin/true").spawn().expect("a child");
    child.wait().expect("its end");
    assert_pid_is_refused(child.id(), &[]);
}

#[test]
fn a_zombie_is_called_one() {
    let mut child: Child =
        Command::new("/bin/true").stdout(Stdio::piped()).spawn().expect("a child");
    // Its output ends with it, and nobody has waited for it yet.
    let mut output = child.stdout.take().expect("a pipe");
    std::io::copy(&mut output, &mut std::io::sink()).expect("the end of the output");
    let status = format!("/proc/{}/stat", child.id());
    while !fs::read_to_string(&status).expect("a zombie has a stat file").contains(") Z ") {
        std::thread::yield_now();
    }
    assert_pid_is_refused(child.id(), &["zombie"]);
    child.wait().expect("its end");
}

#[test]
fn a_kernel_thread_is_called_one() {
    assert_pid_is_refused(2, &["kernel thread"]);
}

#[test]
fn a_name_that_nothing_has_is_named() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut command = record(&directory.path().join("out.json"));
    assert_refused(command.args(["--name", "^no-such-program$"]), &["no-such-program"]);
    assert_nothing_written(directory.path());
}

#[test]
fn a_control_group_that_does_not_exist_is_named() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut command = record(&directory.path().join("out.json"));
    assert_refused(command.args(["--cgroup", "/sys/fs/cgroup/no-such"]), &["no-such"]);
    assert_nothing_written(directory.path());
}

#[test]
fn an_output_that_cannot_be_written_is_named_before_anything_is_attached() {
    let target = Target::start(&c_program("heap", Allocator::Glibc));
    let pid = target.pid().to_string();
    for output in ["/nonexistent/out.json", "/proc/out.json"] {
        assert_refused(record(Path::new(output)).args(["-p", &pid]), &[output]);
    }
    assert!(text_differences(target.pid()).is_empty());
}

#[test]
fn a_full_disk_leaves_nothing_under_the_final_name() {
    let mut target = Target::start(&c_program("heap", Allocator::Glibc));
    let directory = tempfile::tempdir().expect("a temporary directory");
    let script = format!(
        "mount -t tmpfs -o size=4k none {0} && head -c 1M /dev/zero > {0}/full 2>/dev/null; \
         \"$0\" record -p {1} -d 500ms -o {0}/out.$2 --blocks; status=$?; \
         ls -A {0} | grep -v '^full$' >&2; exit $status",
        directory.path().display(),
        target.pid()
    );
    for format in ["json", "svg", "lbpf", "pb.gz"] {
        let leakbpf = leakbpf_command();
        let mut command = Command::new(require_program("unshare", "util-linux"));
        command.args(["-m", "sh", "-c", &script]).arg(leakbpf.get_program()).args(["x", format]);
        target.run("many 200 100");
        let output = command.output().expect("unshare starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{format}: {said}");
        let complaint: Vec<&str> =
            said.lines().filter(|line| !line.starts_with("leakbpf: attached")).collect();
        assert_eq!(complaint.len(), 1, "{format}: one line, and no file:\n{said}");
        assert!(complaint[0].contains("out."), "{format}: {said}");
    }
    assert!(target.is_alive());
}

#[test]
fn without_privileges_it_says_what_is_missing() {
    require_root();
    let directory = tempfile::tempdir().expect("a temporary directory");
    // Nobody may not look into the directory that leakbpf was built into.
    let program = directory.path().join("leakbpf");
    fs::copy(leakbpf_command().get_program(), &program).expect("a copy of the program");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(directory.path(), mode).expect("a directory for all");
    let target = Target::start(&c_program("heap", Allocator::Glibc));
    let mut command = Command::new(&program);
    command.args(["record", "-p", &target.pid().to_string(), "-d", "1s"]).uid(65534).gid(65534);
    let said = assert_refused(&mut command, &[]);
    assert!(said.contains("root") || said.contains("CAP_"), "{said}");
}

#[test]
fn a_recording_that_is_cut_or_damaged_is_refused_or_read_but_never_a_crash() {
    let mut target = Target::start(&c_program("heap", Allocator::Glibc));
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("whole.lbpf");
    let mut session =
        Leakbpf::record().pid(target.pid()).argument("-d").argument("500ms").output(&path).start();
    target.run("churn 3000");
    assert!(session.wait().success(), "{}", session.stderr());
    let whole = fs::read(&path).expect("a recording");
    let report = leakbpf_command().arg("report").arg(&path).output().expect("leakbpf starts");
    assert!(report.status.success(), "{}", String::from_utf8_lossy(&report.stderr));

    let damaged = directory.path().join("damaged.lbpf");
    for length in [1, 15, 100, 4096, whole.len() / 2, whole.len() - 4096] {
        fs::write(&damaged, &whole[..length]).expect("a written file");
        assert_refused(leakbpf_command().arg("report").arg(&damaged), &["damaged.lbpf"]);
    }
    let mut random = 88172645463325252_u64;
    for _ in 0..30 {
        let mut bytes = whole.clone();
        for _ in 0..40 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let at = random as usize % bytes.len();
            bytes[at] = (random >> 32) as u8;
        }
        fs::write(&damaged, &bytes).expect("a written file");
        let output = leakbpf_command().arg("report").arg(&damaged).output().expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr);
        // A flipped byte in a number cannot be noticed; all else is refused like other bad input.
        assert!(matches!(output.status.code(), Some(0 | 2)), "{}: {said}", output.status);
        assert!(!said.contains("panicked"), "{said}");
    }
}

#[test]
fn a_recording_of_another_version_says_so() {
    let target = Target::start(&c_program("heap", Allocator::Glibc));
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("other.lbpf");
    let mut session =
        Leakbpf::record().pid(target.pid()).argument("-d").argument("200ms").output(&path).start();
    assert!(session.wait().success(), "{}", session.stderr());
    // SQLite's user_version: bytes 60 to 63 of the file, big endian.
    let mut bytes = fs::read(&path).expect("a recording");
    bytes[60..64].copy_from_slice(&999_u32.to_be_bytes());
    fs::write(&path, bytes).expect("a written file");
    assert_refused(leakbpf_command().arg("report").arg(&path), &["other.lbpf", "999"]);
}
