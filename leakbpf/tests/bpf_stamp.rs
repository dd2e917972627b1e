//! The committed BPF object is made from the sources that are committed with it.

#[path = "../../xtask/src/bpf/stamp.rs"]
mod stamp;

use std::path::Path;

use stamp::{STAMP, Stamp};

#[test]
fn the_committed_object_is_made_from_the_committed_sources() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's root");
    let text = std::fs::read_to_string(root.join(STAMP)).expect(STAMP);
    let committed = Stamp::parse(&text);
    let now = Stamp::of_files(root, committed.toolchain.clone()).expect("readable sources");
    let differences = committed.differences(&now);
    assert!(
        differences.is_empty(),
        "{} does not match {STAMP}:\n  {}\nRun `cargo xtask bpf` and commit leakbpf/bpf/.",
        stamp::OBJECT,
        differences.join("\n  "),
    );
}

#[test]
fn a_stamp_survives_being_written_and_read() {
    let mut stamp = Stamp { toolchain: vec!["rustc 1.96.0".to_owned()], ..Stamp::default() };
    stamp.hashes.insert("leakbpf-ebpf/src/a b.rs".to_owned(), "0".repeat(64));
    assert_eq!(Stamp::parse(&stamp.render()), stamp);
}

#[test]
fn a_changed_a_new_and_a_lost_file_are_each_named() {
    let entry = |path: &str, hash: &str| (path.to_owned(), hash.to_owned());
    let committed = Stamp {
        hashes: [entry("same", "1"), entry("changed", "1"), entry("lost", "1")].into(),
        ..Stamp::default()
    };
    let now = Stamp {
        hashes: [entry("same", "1"), entry("changed", "2"), entry("new", "1")].into(),
        ..Stamp::default()
    };
    assert_eq!(committed.differences(&now), ["changed changed", "new is new", "lost is gone"]);
}
