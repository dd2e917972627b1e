//! Small programs that are compiled when a test asks for them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use object::{Object, ObjectSection, ObjectSymbol};
use tempfile::TempDir;

use crate::elf::image::Source;
use crate::symbolize::{Limits, ModuleHandle, ModuleSource, Symbolizer};

/// The line numbers are what the tests expect.
pub const C_SOURCE: &str = r#"extern int puts(const char *);
volatile int sink;
static inline __attribute__((always_inline)) void innermost(int n) {
    sink += n;
    puts("x");
    sink -= n;
}
static inline __attribute__((always_inline)) void middle(int n) {
    innermost(n + 1);
    sink *= 3;
}
__attribute__((noinline)) void outer(int n) {
    middle(n);
    sink++;
}
__attribute__((noinline)) static int hidden(int n) {
    sink = n;
    return sink + 5;
}
int entry(int n) {
    outer(n);
    return hidden(n) + sink;
}
"#;

pub const CPP_SOURCE: &str = r#"#include <cstdlib>
namespace shop {
template <typename T> struct Basket {
    __attribute__((noipa)) T *add(T item) { T *p = (T *)malloc(sizeof(T)); *p = item; return p; }
};
}
int *fill() { shop::Basket<int> basket; return basket.add(7); }
"#;

/// Two files as dwz makes them: the name and the partial unit are in the shared one.
pub const DWZ_SHARED_SOURCE: &str = r#"
    .section .debug_abbrev, "", @progbits
    .byte 1, 0x3c, 1, 0, 0              # partial unit
    .byte 2, 0x2e, 0, 0x03, 0x08, 0, 0  # subprogram: name
    .byte 0
    .section .debug_info, "", @progbits
    .long 2f - 1f
1:  .short 4
    .long 0
    .byte 8
    .byte 1
    .byte 2                             # at offset 12
    .asciz "from_the_shared_file"
    .byte 0
2:
    .section .debug_str, "", @progbits
    .asciz "also_from_the_shared_file"
"#;
pub const DWZ_SHARED_BUILD_ID: &str = "-Wl,--build-id=0x0102030405060708090a0b0c0d0e0f1011121314";

/// Refers to the shared file as `../shared/common.dwz`.
pub const DWZ_MAIN_SOURCE: &str = r#"
    .text
.Llow: .fill 32, 1, 0x90
    .section .gnu_debugaltlink, "", @progbits
    .asciz "../shared/common.dwz"
    .byte 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20
    .section .debug_abbrev, "", @progbits
    .byte 1, 0x11, 1, 0x11, 0x01, 0x12, 0x06, 0, 0         # unit: low_pc, high_pc
    .byte 2, 0x2e, 0, 0x31                                 # subprogram: abstract_origin
    .uleb128 0x1f20                                        #   GNU_ref_alt
    .byte 0x11, 0x01, 0x12, 0x06, 0, 0                     #   low_pc, high_pc
    .byte 3, 0x2e, 0, 0x03                                 # subprogram: name
    .uleb128 0x1f21                                        #   GNU_strp_alt
    .byte 0x11, 0x01, 0x12, 0x06, 0, 0
    .byte 0
    .section .debug_info, "", @progbits
    .long 2f - 1f
1:  .short 4
    .long 0
    .byte 8
    .byte 1
    .quad .Llow
    .long 32
    .byte 2
    .long 12
    .quad .Llow
    .long 16
    .byte 3
    .long 0
    .quad .Llow + 16
    .long 16
    .byte 0
2:
"#;

pub struct Fixture {
    pub directory: TempDir,
}

impl Fixture {
    pub fn new() -> Fixture {
        let directory = tempfile::tempdir().expect("temporary directory");
        Fixture { directory }
    }

    pub fn root(&self) -> &Path {
        self.directory.path()
    }

    /// Where a path of the pretended target really is.
    pub fn real(&self, path: &str) -> PathBuf {
        let real = self.root().join(path.trim_start_matches('/'));
        let parent = real.parent().expect("a directory");
        fs::create_dir_all(parent).expect("directory");
        real
    }

    /// Compiles `source` to the shared object `path` of the pretended target.
    pub fn compile(&self, source_name: &str, source: &str, path: &str, flags: &[&str]) {
        let source_path = self.real(source_name);
        fs::write(&source_path, source).expect("source");
        let compiler = if source_name.ends_with("cpp") { "g++" } else { "gcc" };
        run(Command::new(compiler)
            .args(["-g", "-O2", "-shared", "-fPIC", "-Wl,--build-id=sha1"])
            .args(flags)
            .arg("-o")
            .arg(self.real(path))
            .arg(source_path));
    }

    pub fn compile_c(&self, path: &str) {
        self.compile("/src/fixture.c", C_SOURCE, path, &[]);
    }

    /// Moves the debug information of `path` to `debug_path`, as distributions do.
    pub fn split(&self, path: &str, debug_path: &str, with_link: bool) {
        let (path, debug_path) = (self.real(path), self.real(debug_path));
        let (file, debug_file) =
            (path.to_str().expect("UTF-8"), debug_path.to_str().expect("UTF-8"));
        run(Command::new("objcopy").args(["--only-keep-debug", file, debug_file]));
        run(Command::new("strip").args(["--strip-all", file]));
        if with_link {
            run(Command::new("objcopy").arg(format!("--add-gnu-debuglink={debug_file}")).arg(file));
        }
    }

    pub fn module(&self, path: &str) -> ModuleSource {
        ModuleSource {
            path: PathBuf::from(path),
            image: Source::File(File::open(self.real(path)).expect("module")),
            root: self.root().to_owned(),
        }
    }

    pub fn symbolizer(&self, path: &str) -> (Symbolizer, ModuleHandle) {
        let mut symbolizer = Symbolizer::new(Limits::default(), Vec::new());
        let module = symbolizer.add(self.module(path));
        (symbolizer, module)
    }

    /// Where the code begins.
    pub fn text(&self, path: &str) -> u64 {
        let bytes = fs::read(self.real(path)).expect("file");
        let file = object::File::parse(&*bytes).expect("ELF");
        file.section_by_name(".text").expect("code").address()
    }

    /// Address and size of a symbol, by another reader than the one under test.
    pub fn symbol(&self, path: &str, name: &str) -> (u64, u64) {
        symbol_of(&self.real(path), name)
    }
}

pub fn symbol_of(path: &Path, name: &str) -> (u64, u64) {
    let bytes = fs::read(path).expect("file");
    let file = object::File::parse(&*bytes).expect("ELF");
    file.symbols()
        .chain(file.dynamic_symbols())
        .find(|symbol| symbol.name() == Ok(name) && symbol.is_definition())
        .map(|symbol| (symbol.address(), symbol.size()))
        .unwrap_or_else(|| panic!("{name} in {path:?}"))
}

pub fn build_id_of(path: &Path) -> String {
    let bytes = fs::read(path).expect("file");
    let file = object::File::parse(&*bytes).expect("ELF");
    let id = file.build_id().expect("notes").expect("build id");
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn run(command: &mut Command) {
    let output = command.output().expect("the tool is installed");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
