//! The stamp next to the committed BPF object: SHA-256 of every source and of the object, in
//! `sha256sum`'s own format (`sha256sum --check leakbpf/bpf/leakbpf.bpf.stamp` works from the
//! workspace's root), after comment lines that name the toolchain.
//!
//! Shared by `cargo xtask bpf` and by leakbpf's test that the object is current.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use sha2::{Digest, Sha256};

pub const OBJECT: &str = "leakbpf/bpf/leakbpf.bpf.o";
pub const STAMP: &str = "leakbpf/bpf/leakbpf.bpf.stamp";

/// Folders whose every file the object is made from, relative to the workspace's root.
const SOURCE_FOLDERS: [&str; 2] = ["leakbpf-ebpf", "leakbpf-common/src"];

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stamp {
    /// One line for each tool, as it names itself.
    pub toolchain: Vec<String>,
    /// SHA-256 in hexadecimal by path relative to the workspace's root, `/`-separated.
    pub hashes: BTreeMap<String, String>,
}

impl Stamp {
    /// Reads what [`Stamp::render`] wrote. Lines of another form are skipped: the hashes they might
    /// have held are then missing, which [`Stamp::differences`] shows.
    pub fn parse(text: &str) -> Self {
        let mut stamp = Self::default();
        for line in text.lines() {
            if let Some(tool) = line.strip_prefix("# ") {
                stamp.toolchain.push(tool.to_owned());
            } else if let Some((hash, path)) = line.split_once("  ") {
                stamp.hashes.insert(path.to_owned(), hash.to_owned());
            }
        }
        stamp
    }

    pub fn render(&self) -> String {
        let mut text = String::new();
        for tool in &self.toolchain {
            let _ = writeln!(text, "# {tool}");
        }
        for (path, hash) in &self.hashes {
            let _ = writeln!(text, "{hash}  {path}");
        }
        text
    }

    /// Hashes of the sources and the object as they are on disk.
    ///
    /// # Errors
    /// The object or a source cannot be read.
    pub fn of_files(root: &Path, toolchain: Vec<String>) -> io::Result<Self> {
        let mut hashes = BTreeMap::new();
        for folder in SOURCE_FOLDERS {
            hash_folder(root, folder, &mut hashes)?;
        }
        hashes.insert(OBJECT.to_owned(), hash_file(&root.join(OBJECT))?);
        Ok(Self { toolchain, hashes })
    }

    /// One line for each file that differs from `now`; empty when the object is current.
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        for (path, hash) in &now.hashes {
            match self.hashes.get(path) {
                None => lines.push(format!("{path} is new")),
                Some(old) if old != hash => lines.push(format!("{path} changed")),
                Some(_) => {}
            }
        }
        for path in self.hashes.keys().filter(|path| !now.hashes.contains_key(*path)) {
            lines.push(format!("{path} is gone"));
        }
        lines
    }
}

fn hash_folder(root: &Path, folder: &str, hashes: &mut BTreeMap<String, String>) -> io::Result<()> {
    for entry in fs::read_dir(root.join(folder))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = format!("{folder}/{name}");
        if entry.file_type()?.is_dir() {
            if name != "target" {
                hash_folder(root, &path, hashes)?;
            }
        } else if is_source(&name) {
            hashes.insert(path, hash_file(&entry.path())?);
        }
    }
    Ok(())
}

/// Not licences and notes, nor what an editor leaves behind.
fn is_source(name: &str) -> bool {
    [".rs", ".toml", ".lock", ".h"].iter().any(|ending| name.ends_with(ending))
}

fn hash_file(path: &Path) -> io::Result<String> {
    let bytes = fs::read(path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    let mut text = String::new();
    for byte in Sha256::digest(bytes) {
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}
