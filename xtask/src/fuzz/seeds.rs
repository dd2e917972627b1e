//! What the fuzzer begins with: small files that are in order.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Folders, INPUT_MAX_BYTES, Target, read_folder};
use crate::shell;

/// Of this machine, the smallest first.
const SYSTEM_FILES: usize = 12;
const SYSTEM_FOLDERS: [&str; 2] = ["/usr/lib/x86_64-linux-gnu", "/usr/bin"];

/// Output name, source and options of each file to compile.
const COMPILED: &[(&str, &str, &[&str])] = &[
    ("library.so", "frames.c", &["-g", "-shared", "-fPIC"]),
    ("dwarf4.so", "frames.c", &["-gdwarf-4", "-shared", "-fPIC"]),
    ("zlib.so", "frames.c", &["-g", "-gz=zlib", "-shared", "-fPIC"]),
    ("units.so", "frames.c", &["-g", "-shared", "-fPIC", "-ffunction-sections", "-fno-plt"]),
    ("sysv.so", "frames.c", &["-shared", "-fPIC", "-Wl,--hash-style=sysv", "-Wl,-z,lazy"]),
    ("debug_frame.so", "frames.c", &["-g", "-shared", "-fPIC", "-fno-asynchronous-unwind-tables"]),
    ("static", "frames.c", &["-g", "-static", "-DALONE"]),
    ("object.o", "frames.c", &["-g", "-c"]),
    ("names.so", "names.cc", &["-g", "-shared", "-fPIC", "-fno-rtti", "-fno-exceptions"]),
    ("allocator.so", "allocator.c", &["-g", "-shared", "-fPIC", "-fno-builtin"]),
    ("allocator_size.so", "allocator.c", &["-Os", "-shared", "-fPIC", "-fno-builtin"]),
];

/// Mangled names for what demangles.
const NAMES: &[&str] = &[
    "_ZN4core3fmt9Formatter9write_str17h0123456789abcdefE",
    "_RNvMs_NtCskwGfYPst2Cb_7mycrate3fooNtB4_3Bar3bazpE",
    "_ZNSt6vectorIiSaIiEE9push_backERKi",
    "_ZN5outer4RingIPKcLi3EE4pushERKS2_",
    "_ZZ3runiENKUliE_clEi",
    "_ZNKSt8functionIFvRKN3foo3BarEEEclES4_",
    "memcpy@@GLIBC_2.14",
];

const PERF_MAP: &str = "7f0000001000 40 Interpreter\n7f0000001040 20 LazyCompile:*run /a.js:3\n\
    0x7f0000001020 0x40 again\n";

const TRACEPOINT: &str = "name: task_newtask\nID: 205\nformat:\n\
    \tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\
    \tfield:pid_t pid;\toffset:8;\tsize:4;\tsigned:1;\n\
    \tfield:char comm[16];\toffset:12;\tsize:16;\tsigned:0;\n\nprint fmt: \"pid=%d\", REC->pid\n";

const CGROUP: &str = "5:memory:/a.slice\n1:name=systemd:/b.slice\n0::/system.slice/c.service\n";

/// Fills the target's folder of seeds.
pub fn make(folders: &Folders, target: Target) -> Result<()> {
    let into = folders.of("seeds", target)?;
    match target {
        Target::Unwind | Target::Elf | Target::Symbolize | Target::Planner => {
            for file in elf_files(folders)? {
                let name = file.file_name().context("a file name")?;
                fs::copy(&file, into.join(name)).context("copy a seed")?;
            }
        }
        Target::Recording => recording(folders, &into)?,
        Target::Text => text(&into)?,
    }
    match target {
        Target::Symbolize => {
            for (number, name) in NAMES.iter().enumerate() {
                write(&into, &format!("name{number}"), name.as_bytes())?;
            }
        }
        Target::Planner => functions(&into)?,
        Target::Elf => {
            // LZMA2: a chunk that is not packed, and the end.
            write(&into, "lzma2", b"\x01\x00\x05ELF???\x00")?;
        }
        _ => {}
    }
    Ok(())
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = folder.join(name);
    fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))
}

/// Compiled once, for all targets.
fn elf_files(folders: &Folders) -> Result<Vec<PathBuf>> {
    let folder = folders.work.join("elf");
    if !folder.is_dir() {
        let unfinished = folders.work.join("elf.unfinished");
        fs::create_dir_all(&unfinished).context("create a folder for seeds")?;
        compile(folders, &unfinished)?;
        strip(&unfinished)?;
        system_files(&unfinished)?;
        fs::rename(&unfinished, &folder).context("rename the folder of seeds")?;
    }
    let mut files = read_folder(&folder)?;
    files.retain(|file| size_bytes(file) <= u64::from(INPUT_MAX_BYTES));
    Ok(files)
}

fn compile(folders: &Folders, into: &Path) -> Result<()> {
    for (output, source, options) in COMPILED {
        let mut command = Command::new("gcc");
        command.args(["-O2", "-nostdlib", "-Wl,--build-id"]).args(*options);
        command.arg("-o").arg(into.join(output)).arg(folders.sources.join("seeds").join(source));
        shell::run(&mut command)?;
    }
    Ok(())
}

/// The forms in which distributions ship files.
fn strip(folder: &Path) -> Result<()> {
    let run = |program: &str, arguments: &[&str]| {
        shell::run(Command::new(program).args(arguments).current_dir(folder))
    };
    run("strip", &["-o", "stripped.so", "library.so"])?;
    run("objcopy", &["--only-keep-debug", "library.so", "library.debug"])?;
    run("objcopy", &["--add-gnu-debuglink=library.debug", "stripped.so", "linked.so"])?;
    run("objcopy", &["--strip-debug", "--keep-symbol=hidden", "library.so", "mini"])?;
    run("xz", &["--force", "--keep", "--check=crc32", "mini"])?;
    run("objcopy", &["--add-section", ".gnu_debugdata=mini.xz", "stripped.so", "mini_debug.so"])?;
    run("objcopy", &["--compress-debug-sections=zlib-gnu", "library.so", "zdebug.so"])?;
    run("objcopy", &["--compress-debug-sections=zstd", "library.so", "zstd.so"])?;
    // As some packers leave it: the file header's fields about section headers are zero.
    let mut bytes = fs::read(folder.join("stripped.so")).context("read a seed")?;
    for range in [0x28..0x30, 0x3c..0x40] {
        bytes.get_mut(range).context("a file header")?.fill(0);
    }
    write(folder, "headerless.so", &bytes)
}

fn system_files(into: &Path) -> Result<()> {
    let mut files = Vec::new();
    for folder in SYSTEM_FOLDERS {
        for path in read_folder(Path::new(folder))? {
            if path.is_file() && fs::read(&path).is_ok_and(|bytes| bytes.starts_with(b"\x7fELF")) {
                files.push((size_bytes(&path), path));
            }
        }
    }
    files.sort();
    for (_, path) in files.iter().take(SYSTEM_FILES) {
        fs::copy(path, into.join(path.file_name().context("a file name")?))
            .with_context(|| format!("copy {}", path.display()))?;
    }
    Ok(())
}

fn size_bytes(path: &Path) -> u64 {
    fs::metadata(path).map_or(u64::MAX, |metadata| metadata.len())
}

/// The target makes one itself: it is linked with what writes recordings.
fn recording(folders: &Folders, into: &Path) -> Result<()> {
    let mut command = folders.command(Target::Recording);
    command.arg("-runs=0").env("LEAKBPF_FUZZ_SEED", into.join("recording.lbpf"));
    shell::run(&mut command)?;
    // Rows, for those inputs that are none.
    for size in [64u32, 512, 4096] {
        let rows: Vec<u8> =
            (0..size).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        write(into, &format!("rows{size}"), &rows)?;
    }
    Ok(())
}

fn text(into: &Path) -> Result<()> {
    let of_self = |entry: &str| {
        let path = Path::new("/proc/self").join(entry);
        fs::read(&path).with_context(|| format!("read {}", path.display()))
    };
    let seeds = [
        PERF_MAP.into(),
        of_self("maps")?,
        of_self("status")?,
        of_self("stat")?,
        TRACEPOINT.into(),
        CGROUP.into(),
        of_self("cmdline")?,
        "a name\u{1b}[31m\u{202e}".into(),
    ];
    for (number, seed) in (0u8..).zip(seeds) {
        write(into, &format!("text{number}"), &[&[number], seed.as_slice()].concat())?;
    }
    Ok(())
}

/// A few functions' first instructions, behind each choice of what to do with them.
fn functions(into: &Path) -> Result<()> {
    let code: [&[u8]; 4] = [
        b"\xf3\x0f\x1e\xfa\x55\x48\x89\xe5\x53\x48\x83\xec\x18\x48\x85\xff\x74\x05\xe8\x10\0\0\0\x5b\x5d\xc3",
        b"\x0f\x1f\x44\0\0\x48\x89\xf8\xe9\x20\0\0\0",
        b"\xff\x25\x10\x20\0\0\x68\0\0\0\0\xe9\xe0\xff\xff\xff",
        b"\x31\xc0\xc3\x41\x57\x41\x56\xf0\x48\x0f\xb1\x0e\xeb\xf0\x0f\x0b",
    ];
    for (number, code) in (0u8..).zip(code) {
        for choice in (0..32u8).step_by(5) {
            write(into, &format!("code{number}-{choice}"), &[&[choice], code].concat())?;
        }
    }
    Ok(())
}
