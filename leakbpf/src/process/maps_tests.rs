use std::path::Path;

use proptest::prelude::*;

use super::*;

fn only(line: &str) -> Mapping {
    let maps = Maps::parse(line.as_bytes()).expect("a well-formed line");
    maps.iter().next().expect("one mapping").clone()
}

#[test]
fn a_file_mapping_is_read_with_all_its_fields() {
    let mapping = only(
        "7f0a10026000-7f0a1017b000 r-xp 00026000 fe:00 1717                       /usr/lib/libc.so.6\n",
    );
    assert_eq!(mapping.start_avma, 0x7f0a_1002_6000);
    assert_eq!(mapping.end_avma, 0x7f0a_1017_b000);
    assert_eq!(mapping.file_offset, 0x26000);
    let expected = Permissions { read: true, write: false, execute: true, shared: false };
    assert_eq!(mapping.permissions, expected);
    let id = FileId { device: Device { major: 0xfe, minor: 0 }, inode: 1717 };
    assert_eq!(
        mapping.backing,
        Backing::File { id, path: "/usr/lib/libc.so.6".into(), deleted: false }
    );
}

#[test]
fn names_keep_their_spaces_and_backslashes_and_get_their_newlines_back() {
    let mapping = only("1000-2000 r-xp 0 08:01 7    /a  dir\\040/two\\012lines \n");
    let Backing::File { path, .. } = mapping.backing else { panic!("a file") };
    assert_eq!(path, Path::new("/a  dir\\040/two\nlines "));
}

#[test]
fn a_deleted_file_keeps_its_identity_and_loses_the_remark() {
    let mapping = only("1000-2000 r-xp 0 00:05 77 /memfd:jit code (deleted)");
    let Backing::File { path, deleted, id } = mapping.backing else { panic!("a file") };
    assert_eq!(path, Path::new("/memfd:jit code"));
    assert!(deleted);
    assert_eq!(id.inode, 77);
}

#[test]
fn memory_without_a_file_is_special_or_anonymous() {
    assert_eq!(only("1000-2000 rw-p 0 00:00 0 ").backing, Backing::Anonymous);
    assert_eq!(only("1000-2000 rw-p 0 00:00 0").backing, Backing::Anonymous);
    for name in ["[heap]", "[vdso]", "[uprobes]", "[anon:a (deleted)]"] {
        let line = format!("1000-2000 rw-p 0 00:00 0      {name}\n");
        assert_eq!(only(&line).backing, Backing::Special(name.into()));
    }
}

#[test]
fn addresses_lead_to_file_offsets_only_inside_file_mappings() {
    let maps = Maps::parse(
        b"1000-2000 r-xp 5000 08:01 7 /a\n2000-3000 rw-p 0 00:00 0 [heap]\n4000-5000 r-xp 0 08:01 8 /b\n",
    )
    .expect("well-formed");
    assert_eq!(maps.locate(0x1fff).map(|(_, offset)| offset), Some(0x5fff));
    assert_eq!(maps.locate(0x4000).map(|(_, offset)| offset), Some(0));
    for outside in [0, 0xfff, 0x2000, 0x3000, 0x5000, u64::MAX] {
        assert_eq!(maps.locate(outside), None, "{outside:#x}");
    }
}

#[test]
fn the_mappings_of_one_file_are_grouped_even_under_two_names() {
    let maps = Maps::parse(
        b"1000-2000 r-xp 0 08:01 7 /a\n2000-3000 rw-p 0 08:01 7 /a\n3000-4000 r-xp 0 08:01 9 /c\n5000-6000 r-xp 2000 08:01 7 /link\n",
    )
    .expect("well-formed");
    let files = maps.executable_files();
    let starts: Vec<Vec<u64>> = files
        .iter()
        .map(|file| file.mappings.iter().map(|mapping| mapping.start_avma).collect())
        .collect();
    assert_eq!(starts, [vec![0x1000, 0x5000], vec![0x3000]]);
}

#[test]
fn a_line_that_no_kernel_prints_is_named() {
    for (text, line) in [
        ("garbage", 1),
        ("1000-2000 r-xp 0 08:01 7 /a\n1000 r-xp 0 08:01 7 /b", 2),
        ("2000-1000 r-xp 0 08:01 7 /a", 1),
        ("1000-2000 r-xpp 0 08:01 7 /a", 1),
        ("+1000-2000 r-xp 0 08:01 7 /a", 1),
        ("1000-20000000000000000 r-xp 0 08:01 7 /a", 1),
        ("1000-2000 r-xp 0 0801 7 /a", 1),
        ("1000-2000 r-xp 0 08:01 -7 /a", 1),
    ] {
        assert_eq!(Maps::parse(text.as_bytes()).map_err(|error| error.line), Err(line), "{text}");
    }
}

#[test]
fn the_own_code_is_found_in_the_own_maps() {
    let maps = Maps::of(Pid::current()).expect("own maps");
    let address = the_own_code_is_found_in_the_own_maps as *const () as u64;
    let (mapping, _) = maps.locate(address).expect("this function");
    let Backing::File { path, .. } = &mapping.backing else { panic!("a file") };
    assert_eq!(*path, std::env::current_exe().expect("an executable"));
    assert!(maps.executable_files().iter().any(|file| Some(file.id) == mapping.file_id()));
}

proptest! {
    #[test]
    fn no_input_makes_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = Maps::parse(&bytes);
    }

    #[test]
    fn every_path_without_the_kernels_remark_survives(name in "[^\\\\\u{0}]{0,40}[a-z]") {
        let printed = name.replace('\n', "\\012");
        let mapping = only(&format!("1000-2000 r-xp 0 08:01 7                 /{printed}\n"));
        let Backing::File { path, deleted, .. } = mapping.backing else { panic!("a file") };
        prop_assert_eq!(path, PathBuf::from(format!("/{name}")));
        prop_assert!(!deleted);
    }
}
