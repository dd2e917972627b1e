//! Split DWARF, as `gcc -gsplit-dwarf` and dwp make it.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use proptest::prelude::*;

use super::fixture::{C_SOURCE, Fixture, run};
use super::*;

const VERSIONS: [&str; 2] = ["-gdwarf-4", "-gdwarf-5"];

/// `/lib/fixture.so`, whose `.dwo` files are said to be in `/build/obj` of the pretended target,
/// and are in `/obj`. The second source is there so that there are two.
fn compile(version: &str, source_name: &str, source: &str) -> Fixture {
    let fixture = Fixture::new();
    let root = fixture.root().to_owned();
    fs::write(fixture.real(&format!("/src/{source_name}")), source).expect("source");
    fs::write(fixture.real("/src/other.c"), "int other(int n) { return n * 3; }").expect("source");
    fs::create_dir_all(root.join("obj")).expect("directory");
    let prefix_map = format!("-fdebug-prefix-map={}=/build", root.display());
    let mut objects = Vec::new();
    for source_name in [source_name, "other.c"] {
        let stem = source_name.split('.').next().expect("a name");
        let object = format!("obj/{stem}.o");
        let compiler = if source_name.ends_with("cpp") { "g++" } else { "gcc" };
        run(Command::new(compiler)
            .current_dir(&root)
            .args(["-c", "-g", "-O2", "-fPIC", "-gsplit-dwarf", version, &prefix_map])
            .arg(format!("src/{source_name}"))
            .args(["-o", &object]));
        assert!(root.join(format!("obj/{stem}.dwo")).exists(), "the compiler splits");
        objects.push(object);
    }
    fixture.real("/lib/fixture.so");
    run(Command::new("g++")
        .current_dir(&root)
        .args(["-shared", "-Wl,--build-id=sha1", "-o", "lib/fixture.so"])
        .args(&objects));
    fixture
}

fn compile_c(version: &str) -> Fixture {
    compile(version, "fixture.c", C_SOURCE)
}

fn deepest(fixture: &Fixture) -> (Vec<Symbol>, Vec<String>) {
    let (mut symbolizer, module) = fixture.symbolizer("/lib/fixture.so");
    let (outer, size) = fixture.symbol("/lib/fixture.so", "outer");
    let names = (outer..outer + size).map(|svma| symbolizer.name(module, svma, false));
    let deepest = names.max_by_key(Vec::len).expect("addresses");
    let problems = symbolizer.problems(module).iter().map(ToString::to_string).collect();
    (deepest, problems)
}

fn expect_found(fixture: &Fixture, what: &str) {
    let (symbols, problems) = deepest(fixture);
    assert_eq!(functions(&symbols), ["innermost", "middle", "outer"], "{what}");
    assert_eq!(symbols[1].line, Some(9), "{what}");
    assert_eq!(symbols[2].line, Some(13), "{what}");
    for symbol in symbols {
        assert_eq!(symbol.file.as_deref(), Some("/build/src/fixture.c"), "{what}");
    }
    assert!(problems.is_empty(), "{what}: {problems:?}");
}

fn move_to(fixture: &Fixture, directory: &str) {
    for name in ["fixture.dwo", "other.dwo"] {
        let to = fixture.real(&format!("{directory}/{name}"));
        fs::rename(fixture.real(&format!("/obj/{name}")), to).expect("moved");
    }
}

#[test]
fn a_dwo_file_is_found_in_each_of_its_places() {
    for version in VERSIONS {
        for directory in ["/build/obj", "/lib/obj", "/lib"] {
            let fixture = compile_c(version);
            move_to(&fixture, directory);
            expect_found(&fixture, &format!("{version} {directory}"));
        }
    }
}

#[test]
fn a_dwp_file_beside_the_module_or_its_debug_file_is_found() {
    // This dwp packs DWARF 4 only.
    let fixture = compile_c("-gdwarf-4");
    let package = fixture.real("/lib/fixture.so.dwp");
    run(Command::new("dwp").current_dir(fixture.root()).args([
        "-o",
        "lib/fixture.so.dwp",
        "obj/fixture.dwo",
        "obj/other.dwo",
    ]));
    expect_found(&fixture, "beside the module");
    fixture.split("/lib/fixture.so", "/lib/.debug/fixture.debug", true);
    expect_found(&fixture, "stripped");
    for name in ["fixture.debug.dwp", "fixture.dwp"] {
        let place = fixture.real(&format!("/lib/.debug/{name}"));
        fs::rename(&package, &place).expect("moved");
        expect_found(&fixture, name);
        fs::rename(&place, &package).expect("moved back");
    }
    // The package of another program has no such unit.
    fs::write(fixture.real("/src/another.c"), "int another(void) { return 7; }").expect("source");
    run(Command::new("gcc").current_dir(fixture.root()).args([
        "-c",
        "-g",
        "-gsplit-dwarf",
        "-gdwarf-4",
        "src/another.c",
        "-o",
        "obj/another.o",
    ]));
    run(Command::new("dwp").current_dir(fixture.root()).args([
        "-o",
        "lib/fixture.so.dwp",
        "obj/another.dwo",
    ]));
    let (symbols, problems) = deepest(&fixture);
    assert_eq!(functions(&symbols), ["outer"]);
    assert!(problems.len() == 1 && problems[0].contains("obj/fixture.dwo"), "{problems:?}");
    move_to(&fixture, "/build/obj");
    expect_found(&fixture, "a .dwo file in spite of a useless package");
}

/// As DWARF 5 packages are (section 7.3.5.3): here of one unit, with the parts in reverse order.
#[test]
fn a_dwp_file_of_dwarf_5_is_read() {
    use object::{Object, ObjectSection};
    let fixture = compile_c("-gdwarf-5");
    let unit = fixture.real("/obj/fixture.dwo");
    let bytes = fs::read(&unit).expect("file");
    let file = object::File::parse(&*bytes).expect("ELF");
    let section =
        |name: &str| file.section_by_name(name).map_or(&[][..], |s| s.data().expect("data"));
    let mut padded = Vec::new();
    let mut index: Vec<u8> = Vec::new();
    let parts: Vec<(u32, &str)> = [
        (8, ".debug_rnglists.dwo"),
        (6, ".debug_str_offsets.dwo"),
        (3, ".debug_abbrev.dwo"),
        (1, ".debug_info.dwo"),
    ]
    .into_iter()
    .filter(|(_, name)| !section(name).is_empty())
    .collect();
    let count = parts.len() as u32;
    // Version, sections, units, slots.
    index.extend([5, count, 1, 2].iter().flat_map(|word: &u32| word.to_le_bytes()));
    let id = &section(".debug_info.dwo")[12..20];
    let slot = usize::from(id[0] & 1);
    let (mut ids, mut rows) = ([0u8; 16], [0u8; 8]);
    ids[8 * slot..][..8].copy_from_slice(id);
    rows[4 * slot] = 1;
    index.extend(ids.iter().chain(&rows));
    index.extend(parts.iter().flat_map(|(number, _)| number.to_le_bytes()));
    // What comes before the unit's parts in their sections.
    const BEFORE: u32 = 24;
    index.extend(parts.iter().flat_map(|_| BEFORE.to_le_bytes()));
    index.extend(parts.iter().flat_map(|(_, name)| (section(name).len() as u32).to_le_bytes()));
    let index_path = fixture.real("/obj/index");
    fs::write(&index_path, index).expect("index");
    let mut objcopy = Command::new("objcopy");
    objcopy.arg(format!("--add-section=.debug_cu_index={}", index_path.display()));
    for (number, name) in &parts {
        let path = fixture.real(&format!("/obj/part{number}"));
        padded.clear();
        padded.extend([0xff; BEFORE as usize]);
        padded.extend(section(name));
        fs::write(&path, &padded).expect("part");
        objcopy.arg(format!("--update-section={name}={}", path.display()));
    }
    run(objcopy.arg(&unit).arg(fixture.real("/lib/fixture.so.dwp")));
    expect_found(&fixture, "DWARF 5");
}

#[test]
fn without_its_dwo_file_code_has_names_and_lines_but_no_inlined_calls() {
    for version in VERSIONS {
        let fixture = compile_c(version);
        fs::remove_dir_all(fixture.real("/obj")).expect("removed");
        let (mut symbolizer, module) = fixture.symbolizer("/lib/fixture.so");
        for name in ["outer", "hidden", "entry", "other"] {
            let (svma, _) = fixture.symbol("/lib/fixture.so", name);
            let symbols = symbolizer.name(module, svma, false);
            assert_eq!(functions(&symbols), [name], "{version}");
            assert!(symbols[0].line.is_some(), "{version}");
        }
        let problems = symbolizer.problems(module);
        assert_eq!(problems.len(), 1, "{problems:?}");
        let problem = problems[0].to_string();
        assert!(problem.contains("/build/obj/fixture.dwo is not there"), "{problem}");
    }
}

#[test]
fn a_dwo_file_of_another_compilation_is_refused() {
    for version in VERSIONS {
        let fixture = compile_c(version);
        let changed = C_SOURCE.replace("innermost", "imposter");
        let other = compile(version, "fixture.c", &changed);
        fs::copy(other.real("/obj/fixture.dwo"), fixture.real("/build/obj/fixture.dwo"))
            .expect("copied");
        let (symbols, problems) = deepest(&fixture);
        assert_eq!(functions(&symbols), ["outer"]);
        assert!(problems.len() == 1 && problems[0].contains("another compilation"), "{problems:?}");
        // The right one in another place is found all the same.
        move_to(&fixture, "/lib");
        expect_found(&fixture, version);
    }
}

#[test]
fn links_to_dwo_files_do_not_lead_out_of_the_target() {
    let fixture = compile_c("-gdwarf-5");
    move_to(&fixture, "/elsewhere");
    fixture.real("/build/obj/x");
    // Absolute: only below the target's root is there such a file.
    symlink("/elsewhere/fixture.dwo", fixture.real("/build/obj/fixture.dwo")).expect("link");
    expect_found(&fixture, "link");
}

#[test]
fn names_are_kept_once_the_dwo_file_was_found() {
    let fixture = compile_c("-gdwarf-5");
    let (outer, _) = fixture.symbol("/lib/fixture.so", "outer");
    let session = || {
        let mut symbolizer = Symbolizer::new(Limits::default(), Vec::new());
        let caches = fixture.root().join("cache");
        let variable = |name: &str| (name == "XDG_CACHE_HOME").then(|| caches.clone());
        symbolizer.use_cache(Cache::open(variable).expect("cache"));
        let module = symbolizer.add(fixture.module("/lib/fixture.so"));
        let symbols = symbolizer.name(module, outer + 4, false);
        symbolizer.save();
        (functions(&symbols).len(), symbolizer.modules[module.0].is_loaded())
    };
    assert_eq!(session(), (1, true));
    move_to(&fixture, "/build/obj");
    let (count, _) = session();
    assert!(count > 1, "the poorer names hide it");
    fs::remove_dir_all(fixture.real("/build")).expect("removed");
    assert_eq!(session(), (count, false));
}

/// As without splitting, at each address.
#[test]
fn splitting_changes_no_name_and_no_line() {
    for version in VERSIONS {
        let split = compile(version, "orders.cpp", oracle::SOURCE);
        fs::rename(split.real("/obj"), split.real("/lib/obj")).expect("moved");
        let root = split.root().to_owned();
        let prefix_map = format!("-fdebug-prefix-map={}=/build", root.display());
        for (source, object) in [("orders.cpp", "orders.o"), ("other.c", "other.o")] {
            let compiler = if source.ends_with("cpp") { "g++" } else { "gcc" };
            run(Command::new(compiler)
                .current_dir(&root)
                .args(["-c", "-g", "-O2", "-fPIC", version, &prefix_map])
                .args([&format!("src/{source}"), "-o", object]));
        }
        run(Command::new("g++").current_dir(&root).args([
            "-shared",
            "-Wl,--build-id=sha1",
            "-o",
            "lib/whole.so",
            "orders.o",
            "other.o",
        ]));
        let (mut symbolizer, whole) = split.symbolizer("/lib/whole.so");
        let module = symbolizer.add(split.module("/lib/fixture.so"));
        let (mut compared, mut longest) = (0, 0);
        for name in ["_Z3addRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEEi", "_Z5totalv"] {
            let (at, size) = split.symbol("/lib/fixture.so", name);
            let (whole_at, whole_size) = split.symbol("/lib/whole.so", name);
            assert_eq!(size, whole_size);
            for offset in 0..size {
                let symbols = symbolizer.name(module, at + offset, false);
                assert_eq!(symbols, symbolizer.name(whole, whole_at + offset, false), "{version}");
                compared += 1;
                longest = longest.max(symbols.len());
            }
        }
        assert!(compared > 500 && longest > 5, "{compared} {longest}");
        assert!(symbolizer.problems(module).is_empty(), "{:?}", symbolizer.problems(module));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damaged_dwo_and_dwp_files_never_panic(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
        file in 0..3usize,
    ) {
        static FIXTURES: std::sync::OnceLock<[Fixture; 3]> = std::sync::OnceLock::new();
        let fixtures = FIXTURES.get_or_init(|| {
            let package = compile_c("-gdwarf-4");
            run(Command::new("dwp").current_dir(package.root()).args([
                "-o", "lib/fixture.so.dwp", "obj/fixture.dwo", "obj/other.dwo",
            ]));
            let files = VERSIONS.map(compile_c);
            files.iter().for_each(|fixture| move_to(fixture, "/lib"));
            let [four, five] = files;
            [package, four, five]
        });
        let fixture = &fixtures[file];
        let name = ["/lib/fixture.so.dwp", "/lib/fixture.dwo", "/lib/fixture.dwo"][file];
        let intact = fs::read(fixture.real(name)).expect("file");
        let mut bytes = intact.clone();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        fs::write(fixture.real(name), bytes).expect("damaged");
        let (symbols, _) = deepest(fixture);
        fs::write(fixture.real(name), intact).expect("intact");
        prop_assert!(!symbols.is_empty());
    }
}
