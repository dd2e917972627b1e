//! Builds the programs under test, each once for its content.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs};

/// Where Debian keeps the allocators.
const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";

/// Which allocator a program runs on, and how it gets there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocator {
    Glibc,
    GlibcStatic,
    Musl,
    MuslStatic,
    JemallocPreloaded,
    JemallocLinked,
    TcmallocPreloaded,
    TcmallocLinked,
    MimallocPreloaded,
    MimallocLinked,
}

impl Allocator {
    /// Fails the test, naming the package, when the library is missing.
    fn library(self) -> Option<PathBuf> {
        let (file, package) = match self {
            Self::Glibc | Self::GlibcStatic | Self::Musl | Self::MuslStatic => return None,
            Self::JemallocPreloaded | Self::JemallocLinked => ("libjemalloc.so.2", "libjemalloc2"),
            Self::TcmallocPreloaded | Self::TcmallocLinked => {
                ("libtcmalloc_minimal.so.4", "libtcmalloc-minimal4")
            }
            Self::MimallocPreloaded | Self::MimallocLinked => {
                ("libmimalloc.so.2", "libmimalloc2.0")
            }
        };
        Some(require_file(&format!("{LIBRARIES}/{file}"), package))
    }

    fn is_preloaded(self) -> bool {
        matches!(self, Self::JemallocPreloaded | Self::TcmallocPreloaded | Self::MimallocPreloaded)
    }

    /// The functions beyond the standard ones that come from this allocator and from no other: a
    /// program that mixes two allocators breaks without our help.
    pub fn extensions(self) -> &'static str {
        match self {
            Self::Glibc | Self::GlibcStatic => "memalign valloc pvalloc reallocarray",
            Self::Musl | Self::MuslStatic => "memalign valloc reallocarray",
            // Debian's has no pvalloc; glibc's reallocarray calls its realloc.
            Self::JemallocPreloaded | Self::JemallocLinked => "memalign valloc reallocarray",
            Self::TcmallocPreloaded | Self::TcmallocLinked => {
                "memalign valloc pvalloc reallocarray"
            }
            Self::MimallocPreloaded | Self::MimallocLinked => {
                "memalign valloc pvalloc reallocarray"
            }
        }
    }
}

/// A built program and how to start it.
#[derive(Debug, Clone)]
pub struct Program {
    pub path: PathBuf,
    pub preload: Vec<PathBuf>,
}

/// The path, if it exists; otherwise fails the test and names the Debian package that has it.
pub fn require_file(path: &str, package: &str) -> PathBuf {
    let path = PathBuf::from(path);
    assert!(
        path.exists(),
        "{} is missing: run `cargo xtask setup` or `apt-get install {package}`",
        path.display()
    );
    path
}

/// A program in PATH or in the directories of daemons; otherwise fails the test.
pub fn require_program(name: &str, package: &str) -> PathBuf {
    // Debian's own directories first: version managers put wrapper scripts before them.
    let directories =
        ["/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/local/bin"].map(PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    directories
        .into_iter()
        .chain(env::split_paths(&path))
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| {
            panic!("{name} not found: run `cargo xtask setup` or `apt-get install {package}`")
        })
}

/// Compiles `tests/targets/NAME.c` for the allocator.
pub fn c_program(name: &str, allocator: Allocator) -> Program {
    program("gcc", &format!("{name}.c"), &[], allocator)
}

/// Compiles `tests/targets/NAME.cc` for the allocator.
pub fn cpp_program(name: &str, allocator: Allocator) -> Program {
    program("g++", &format!("{name}.cc"), &["-std=c++17"], allocator)
}

/// Compiles `tests/targets/NAME.c` without any C library.
pub fn bare_program(name: &str) -> Program {
    let flags = ["-static", "-nostdlib", "-fno-stack-protector"];
    Program { path: compile("gcc", &format!("{name}.c"), &flags, &[]), preload: Vec::new() }
}

/// Compiles `tests/targets/NAME.c` as a shared library.
pub fn c_library(name: &str) -> PathBuf {
    compile("gcc", &format!("{name}.c"), &["-fPIC", "-shared", "-fexceptions"], &[])
}

const WITHOUT_FRAME_POINTERS: [&str; 3] =
    ["-O2", "-fomit-frame-pointer", "-fasynchronous-unwind-tables"];

/// As [`c_program`] on glibc, as distributions build programs: its stacks can't be walked by frame
/// pointers.
pub fn c_program_without_frame_pointers(name: &str) -> Program {
    program("gcc", &format!("{name}.c"), &WITHOUT_FRAME_POINTERS, Allocator::Glibc)
}

/// As [`c_library`], built so as well.
pub fn c_library_without_frame_pointers(name: &str) -> PathBuf {
    let flags = [&["-fPIC", "-shared"][..], &WITHOUT_FRAME_POINTERS].concat();
    compile("gcc", &format!("{name}.c"), &flags, &[])
}

/// Builds a program of the package `tests/targets/rust`.
pub fn rust_program(name: &str) -> Program {
    static BUILD: Mutex<()> = Mutex::new(());
    let _one_at_a_time = BUILD.lock();
    let package = sources().join("rust");
    let output = output_directory().join("rust");
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "--locked", "--bin", name])
        .arg("--manifest-path")
        .arg(package.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&output)
        .status()
        .expect("cargo starts");
    assert!(status.success(), "cargo could not build tests/targets/rust: its output is above");
    Program { path: output.join("release").join(name), preload: Vec::new() }
}

fn program(compiler: &str, source: &str, flags: &[&str], allocator: Allocator) -> Program {
    let mut flags = flags.to_vec();
    let mut compiler = compiler;
    let mut libraries = vec![];
    let mut preload = vec![];
    match allocator {
        Allocator::GlibcStatic => flags.push("-static"),
        Allocator::Musl | Allocator::MuslStatic => {
            compiler = "musl-gcc";
            flags.extend(["-DWITHOUT_PVALLOC", "-DWITHOUT_CONTEXTS"]);
            if allocator == Allocator::MuslStatic {
                flags.push("-static");
            }
        }
        _ => {}
    }
    if let Some(library) = allocator.library() {
        if allocator.is_preloaded() { preload.push(library) } else { libraries.push(library) }
    }
    Program { path: compile(compiler, source, &flags, &libraries), preload }
}

/// The output's name carries a hash of everything that it is made of.
fn compile(compiler: &str, source: &str, flags: &[&str], libraries: &[PathBuf]) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    (compiler, flags, libraries).hash(&mut hasher);
    let mut headers: Vec<PathBuf> = fs::read_dir(sources())
        .expect("tests/targets can be read")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "h"))
        .collect();
    headers.sort();
    let source_path = sources().join(source);
    for path in headers.iter().chain([&source_path]) {
        fs::read(path)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
            .hash(&mut hasher);
    }
    let is_library = flags.contains(&"-shared");
    let stem = source.split('.').next().unwrap_or(source);
    let output = output_directory().join(format!(
        "{stem}-{:016x}{}",
        hasher.finish(),
        if is_library { ".so" } else { "" }
    ));
    if output.exists() {
        return output;
    }
    let package = if compiler == "musl-gcc" { "musl-tools" } else { compiler };
    require_program(compiler, package);
    let unfinished = tempfile::Builder::new()
        .prefix(stem)
        .tempfile_in(output_directory())
        .expect("target/ can be written")
        .into_temp_path();
    // -fno-builtin: the compiler would drop pairs of malloc and free.
    // -fno-omit-frame-pointer: the programs' own functions can be named in every stack.
    let result = Command::new(compiler)
        .args(["-O1", "-g", "-fno-builtin", "-fno-omit-frame-pointer", "-pthread", "-D_GNU_SOURCE"])
        .args(flags)
        .arg(&source_path)
        .args(libraries)
        .arg("-o")
        .arg(&unfinished)
        .output()
        .expect("the compiler starts");
    assert!(
        result.status.success(),
        "{compiler} cannot build {source}:\n{}",
        String::from_utf8_lossy(&result.stderr)
    );
    // Two test programs may build the same thing at once; either result is right.
    fs::rename(&unfinished, &output).expect("a finished program can be renamed");
    output
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("targets")
}

/// `target/leakbpf-tests`, next to the profile's directory that this test was built into.
fn output_directory() -> PathBuf {
    let directory = profile_directory().parent().expect("target/").join("leakbpf-tests");
    fs::create_dir_all(&directory).expect("target/ can be written");
    directory
}

/// `target/debug` or `target/release`: tests run from its `deps`.
pub fn profile_directory() -> PathBuf {
    let test = env::current_exe().expect("a test knows its own path");
    test.ancestors().nth(2).expect("a test lies in target/PROFILE/deps").to_owned()
}
