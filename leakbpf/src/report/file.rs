//! A report as a file that is there whole or not at all.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::{Format, ReportOptions};
use crate::profile::Profile;

/// Why a report could not be written to a file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("{} is a directory: name a file to write the report to", .path.display())]
    Directory { path: PathBuf },
    #[error("no space left for {}: free some, or choose another place with -o", .path.display())]
    Full { path: PathBuf },
    #[error("cannot write {}: choose another place with -o", .path.display())]
    Write { path: PathBuf, source: io::Error },
}

/// A file that gets its name when it is complete. What exists and is no regular file
/// (`/dev/stdout`, a FIFO) is written to directly.
#[derive(Debug)]
pub struct ReportFile {
    path: PathBuf,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Direct(File),
    /// In the same directory; gone when dropped.
    Temporary(tempfile::NamedTempFile),
}

impl ReportFile {
    /// Finds out whether `path` can be written, before there is anything to write.
    pub fn create(path: &Path) -> Result<Self, FileError> {
        if path.is_dir() {
            return Err(FileError::Directory { path: path.to_owned() });
        }
        let open = || {
            if path.exists() && !path.is_file() {
                return Ok(Place::Direct(OpenOptions::new().write(true).open(path)?));
            }
            let directory = match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
            // What the umask leaves of these: a report is for others to read.
            let temporary = tempfile::Builder::new()
                .prefix(".leakbpf-")
                .permissions(Permissions::from_mode(0o666))
                .tempfile_in(directory)?;
            Ok(Place::Temporary(temporary))
        };
        let place = open().map_err(|source| named(path, source))?;
        Ok(Self { path: path.to_owned(), place })
    }

    pub fn write(
        self,
        format: Format,
        profile: &Profile,
        options: &ReportOptions,
    ) -> Result<(), FileError> {
        let Self { path, place } = self;
        let write = |file: &File| {
            let mut out = BufWriter::new(file);
            super::write(format, profile, options, &mut out)?;
            out.flush()
        };
        let run = || match place {
            Place::Direct(file) => write(&file),
            Place::Temporary(temporary) => {
                write(temporary.as_file())?;
                temporary.persist(&path)?;
                Ok(())
            }
        };
        run().map_err(|source| named(&path, source))
    }
}

fn named(path: &Path, source: io::Error) -> FileError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            FileError::Full { path: path.to_owned() }
        }
        _ => FileError::Write { path: path.to_owned(), source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::samples;

    fn written(path: &Path) -> Result<(), FileError> {
        ReportFile::create(path)?.write(Format::Text, &samples::server(), &ReportOptions::default())
    }

    #[test]
    fn a_report_replaces_what_was_there_and_leaves_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.txt");
        std::fs::write(&path, "old").unwrap();
        written(&path).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().starts_with("2 processes"));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_full_disk_is_called_that() {
        let error = written(Path::new("/dev/full")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no space left for /dev/full: free some, or choose another place with -o"
        );
    }

    #[test]
    fn a_place_that_is_none_is_named() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(written(directory.path()), Err(FileError::Directory { .. })));
        let error = written(&directory.path().join("no/x.txt")).unwrap_err().to_string();
        assert!(error.contains("no/x.txt"), "{error}");
    }
}
