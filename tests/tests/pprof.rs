//! What Go's own `pprof` makes of our file.

use std::{collections::BTreeMap, path::Path, process::Command};

use leakbpf_tests::{
    Allocator, Leakbpf, Profile, Target, c_program, leakbpf_command, require_program,
};

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {said}", output.status);
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn pprof(options: &[&str], file: &Path) -> String {
    let go = require_program("go", "golang-go");
    output(Command::new(go).args(["tool", "pprof"]).args(options).arg(file))
}

/// Sums of the samples' values by their names, of `pprof -raw`.
fn totals(raw: &str) -> BTreeMap<String, u64> {
    let mut lines = raw.lines().skip_while(|line| !line.starts_with("Samples:")).skip(1);
    let names: Vec<&str> = lines.next().expect("names").split_whitespace().collect();
    let mut totals = BTreeMap::new();
    for line in lines.take_while(|line| !line.starts_with("Locations")) {
        let values = line.split(':').next().unwrap_or_default().split_whitespace();
        let values: Option<Vec<u64>> = values.map(|value| value.parse().ok()).collect();
        // Labels stand on lines of their own.
        let Some(values) = values.filter(|values| values.len() == names.len()) else { continue };
        for (name, value) in names.iter().zip(values) {
            *totals.entry(name.split('/').next().unwrap_or(name).to_owned()).or_default() += value;
        }
    }
    totals
}

#[test]
fn go_reads_the_same_numbers_functions_and_build_ids() {
    let folder = tempfile::tempdir().expect("a folder");
    let recording = folder.path().join("x.leak");
    let mut target = Target::start(&c_program("heap", Allocator::Glibc));
    let session = Leakbpf::record().pid(target.pid()).output(&recording).start();
    for command in ["many 1000 500", "reallocs", "churn"] {
        target.run(command);
    }
    session.signal(libc::SIGINT);
    let mut session = session;
    assert!(session.wait().success(), "{}", session.stderr());

    let report = |format: &str, output_path: &Path| {
        let arguments = [format, "-o", output_path.to_str().expect("UTF-8")];
        let mut command = leakbpf_command();
        output(command.arg("report").arg(&recording).arg("--format").args(arguments));
    };
    let (json, file) = (folder.path().join("x.json"), folder.path().join("x.pb.gz"));
    report("json", &json);
    report("pprof", &file);
    let profile = Profile::parse(&std::fs::read_to_string(&json).expect("the JSON report"));

    let raw = pprof(&["-raw"], &file);
    let expected = [
        ("alloc_objects", profile.totals.allocated_count),
        ("alloc_space", profile.totals.allocated_bytes),
        ("inuse_objects", profile.totals.live_count),
        ("inuse_space", profile.totals.live_bytes),
    ];
    let expected = expected.map(|(name, value)| (name.to_owned(), value));
    assert_eq!(totals(&raw), BTreeMap::from(expected));
    assert!(profile.totals.live_count >= 1000, "{:?}", profile.totals);

    let top = pprof(&["-top", "-cum", "-sample_index=inuse_space"], &file);
    assert!(top.lines().any(|line| line.ends_with(" many")), "{top}");
    let mappings = raw.lines().skip_while(|line| !line.starts_with("Mappings"));
    let libc = mappings.filter(|line| line.contains("libc.so.6")).collect::<Vec<_>>();
    assert!(libc.iter().any(|line| line.split_whitespace().any(is_build_id)), "{libc:?}");
}

/// A SHA-1 in hexadecimal.
fn is_build_id(word: &str) -> bool {
    word.len() == 40 && word.bytes().all(|byte| byte.is_ascii_hexdigit())
}
