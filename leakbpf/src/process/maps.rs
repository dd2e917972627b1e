//! `/proc/PID/maps`: which file, or what else, is behind each address of a process.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::status::memory_owner;
use super::{Pid, ProcessError, read_proc};

/// A file system, as `/proc/PID/maps` prints it (`s_dev` of the superblock; `stat` answers another
/// number on btrfs, whose subvolumes each invent one).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device {
    pub major: u32,
    pub minor: u32,
}

/// One file of one machine, whatever its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId {
    pub device: Device,
    pub inode: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Permissions {
    pub read: bool,
    pub write: bool,
    pub execute: bool,
    /// `MAP_SHARED`.
    pub shared: bool,
}

/// What is behind a mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// A file, as the target's mount namespace named it when it was opened.
    File {
        id: FileId,
        path: PathBuf,
        /// The name is gone (or the file's name really ends in " (deleted)": the kernel prints both
        /// alike).
        deleted: bool,
    },
    /// Named by the kernel (`[heap]`, `[stack]`, `[vdso]`, `[uprobes]`) or by the program
    /// (`[anon:…]`).
    Special(String),
    Anonymous,
}

/// One line of `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    pub start_avma: u64,
    /// Exclusive.
    pub end_avma: u64,
    pub permissions: Permissions,
    /// Offset in the file of `start_avma`, in bytes.
    pub file_offset: u64,
    pub backing: Backing,
}

impl Mapping {
    pub fn contains(&self, avma: u64) -> bool {
        self.start_avma <= avma && avma < self.end_avma
    }

    pub fn file_id(&self) -> Option<FileId> {
        match &self.backing {
            Backing::File { id, .. } => Some(*id),
            _ => None,
        }
    }
}

/// All executable mappings of one file in one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecutableFile<'a> {
    pub id: FileId,
    /// By rising address; never empty.
    pub mappings: Vec<&'a Mapping>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct MapsError {
    /// Counted from 1.
    pub line: usize,
    pub reason: &'static str,
}

/// A process's address space at one moment, by rising address.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Maps {
    mappings: Vec<Mapping>,
}

impl Maps {
    /// Reads `/proc/PID/maps`. A zombie and a kernel thread have no mappings.
    pub fn of(pid: Pid) -> Result<Self, ProcessError> {
        let bytes = read_proc(memory_owner(pid), "maps")?;
        Self::parse(&bytes).map_err(|error| ProcessError::Malformed {
            path: pid.proc_path("maps"),
            reason: error.to_string(),
        })
    }

    /// The format is `show_map_vma` of the kernel's fs/proc/task_mmu.c.
    pub fn parse(bytes: &[u8]) -> Result<Self, MapsError> {
        let mut mappings = Vec::new();
        for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
            if !line.is_empty() {
                let mapping =
                    parse_line(line).map_err(|reason| MapsError { line: index + 1, reason })?;
                mappings.push(mapping);
            }
        }
        // The kernel prints them sorted, but page by page: between two pages the target goes on
        // mapping.
        mappings.sort_by_key(|mapping| mapping.start_avma);
        Ok(Self { mappings })
    }

    /// Whether a thread of the process has come by a return probe since it began its life.
    pub fn has_return_probe_page(&self) -> bool {
        self.iter().any(
            |mapping| matches!(&mapping.backing, Backing::Special(name) if name == "[uprobes]"),
        )
    }

    pub fn iter(&self) -> impl Iterator<Item = &Mapping> {
        self.mappings.iter()
    }

    pub fn is_empty(&self) -> bool {
        self.mappings.is_empty()
    }

    pub fn find(&self, avma: u64) -> Option<&Mapping> {
        let after = self.mappings.partition_point(|mapping| mapping.start_avma <= avma);
        self.mappings.get(after.checked_sub(1)?).filter(|mapping| mapping.contains(avma))
    }

    /// The mapped file behind an address, and the offset in it.
    pub fn locate(&self, avma: u64) -> Option<(&Mapping, u64)> {
        let mapping = self.find(avma)?;
        mapping.file_id()?;
        let offset = mapping.file_offset.checked_add(avma.checked_sub(mapping.start_avma)?)?;
        Some((mapping, offset))
    }

    /// Whether the same code is at the same addresses.
    pub fn same_code(&self, other: &Self) -> bool {
        let code = |maps: &Self| -> Vec<Mapping> {
            maps.iter().filter(|mapping| mapping.permissions.execute).cloned().collect()
        };
        code(self) == code(other)
    }

    /// Each file that code can run from, once, by lowest address.
    pub fn executable_files(&self) -> Vec<ExecutableFile<'_>> {
        let mut position = BTreeMap::new();
        let mut files: Vec<ExecutableFile<'_>> = Vec::new();
        for mapping in self.mappings.iter().filter(|mapping| mapping.permissions.execute) {
            let Some(id) = mapping.file_id() else {
                continue;
            };
            let index = *position.entry(id).or_insert(files.len());
            match files.get_mut(index) {
                Some(file) => file.mappings.push(mapping),
                None => files.push(ExecutableFile { id, mappings: vec![mapping] }),
            }
        }
        files
    }
}

fn parse_line(line: &[u8]) -> Result<Mapping, &'static str> {
    let (range, rest) = field(line).ok_or("no address range")?;
    let (permissions, rest) = field(rest).ok_or("no permissions")?;
    let (file_offset, rest) = field(rest).ok_or("no file offset")?;
    let (device, rest) = field(rest).ok_or("no device")?;
    let (inode, rest) = field(rest).ok_or("no inode")?;

    let (start, end) = split_at_byte(range, b'-').ok_or("no '-' in the address range")?;
    let start_avma = hexadecimal(start).ok_or("bad start address")?;
    let end_avma = hexadecimal(end).ok_or("bad end address")?;
    if start_avma >= end_avma {
        return Err("empty address range");
    }
    let &[read, write, execute, sharing] = permissions else {
        return Err("bad permissions");
    };
    let (major, minor) = split_at_byte(device, b':').ok_or("no ':' in the device")?;
    let device = Device {
        major: hexadecimal(major).and_then(|n| u32::try_from(n).ok()).ok_or("bad device")?,
        minor: hexadecimal(minor).and_then(|n| u32::try_from(n).ok()).ok_or("bad device")?,
    };
    let inode =
        std::str::from_utf8(inode).ok().and_then(|text| text.parse().ok()).ok_or("bad inode")?;

    Ok(Mapping {
        start_avma,
        end_avma,
        permissions: Permissions {
            read: read == b'r',
            write: write == b'w',
            execute: execute == b'x',
            shared: sharing == b's',
        },
        file_offset: hexadecimal(file_offset).ok_or("bad file offset")?,
        backing: backing(FileId { device, inode }, rest.trim_ascii_start()),
    })
}

fn backing(id: FileId, name: &[u8]) -> Backing {
    // Every file has a device; anonymous memory has 00:00 and inode 0. Some file systems do use
    // inode 0, and a bare "[" is no file name: d_path makes absolute paths.
    let has_file = id.inode != 0 || id.device != Device { major: 0, minor: 0 };
    if name.is_empty() && !has_file {
        return Backing::Anonymous;
    }
    if !has_file || name.first() == Some(&b'[') {
        return Backing::Special(String::from_utf8_lossy(name).into_owned());
    }
    let name = unescape_newlines(name);
    let (name, deleted) = match name.strip_suffix(b" (deleted)") {
        Some(stripped) => (stripped.to_vec(), true),
        None => (name, false),
    };
    Backing::File { id, path: PathBuf::from(OsString::from_vec(name)), deleted }
}

/// `seq_path(m, path, "\n")` replaces line ends, and nothing else, by `\012`: other backslashes are
/// the name's own.
fn unescape_newlines(name: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&first, tail)) = rest.split_first() {
        match rest.strip_prefix(b"\\012") {
            Some(after) => {
                plain.push(b'\n');
                rest = after;
            }
            None => {
                plain.push(first);
                rest = tail;
            }
        }
    }
    plain
}

fn field(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (field, rest) = match split_at_byte(bytes, b' ') {
        Some(split) => split,
        None => (bytes, &[][..]),
    };
    (!field.is_empty()).then_some((field, rest))
}

fn split_at_byte(bytes: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let mut parts = bytes.splitn(2, |&byte| byte == separator);
    Some((parts.next()?, parts.next()?))
}

fn hexadecimal(digits: &[u8]) -> Option<u64> {
    // `from_str_radix` alone would take a sign.
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
#[path = "maps_tests.rs"]
mod tests;
