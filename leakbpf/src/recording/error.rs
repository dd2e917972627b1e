use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

use super::schema;

/// Why a recording could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("cannot open recording {}", .path.display())]
    Open { path: PathBuf, source: std::io::Error },
    #[error("{} is a directory, not a recording: name the file that `leakbpf record -o` wrote", .path.display())]
    Directory { path: PathBuf },
    #[error("{} is not a regular file: copy its contents to one first", .path.display())]
    NotAFile { path: PathBuf },
    #[error("{} is empty: the session that was to write it never began", .path.display())]
    Empty { path: PathBuf },
    #[error("{} is not a leakbpf recording: name a file that `leakbpf record -o` wrote", .path.display())]
    NotARecording { path: PathBuf },
    #[error(
        "{} is a recording of format {found}, and this leakbpf reads format {}: use the leakbpf that wrote it",
        .path.display(), schema::VERSION
    )]
    OtherVersion { path: PathBuf, found: u32 },
    #[error("recording {} is damaged ({detail}): copy it again from where it was made, or record anew", .path.display())]
    Damaged { path: PathBuf, detail: String },
    #[error("recording {} cannot be read where it is ({detail}): copy it, with its -wal file, to a directory that you can write to", .path.display())]
    Inaccessible { path: PathBuf, detail: String },
    #[error("recording {} holds no snapshot: its session ended before the first interval", .path.display())]
    NoSnapshot { path: PathBuf },
    #[error(
        "recording {} has no list of blocks, because its session did not end in an orderly way: leave out --blocks, --min-age and --min-size",
        .path.display()
    )]
    NoBlocks { path: PathBuf },
}

impl ReadError {
    pub(super) fn damaged(path: &Path, detail: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), detail: detail.into() }
    }

    /// Sorts what SQLite says into what the user can do about it.
    pub(super) fn from_sqlite(path: &Path, error: &rusqlite::Error) -> Self {
        let detail = error.to_string();
        match error.sqlite_error_code() {
            Some(
                ErrorCode::CannotOpen
                | ErrorCode::PermissionDenied
                | ErrorCode::ReadOnly
                | ErrorCode::DatabaseBusy
                | ErrorCode::DatabaseLocked,
            ) => Self::Inaccessible { path: path.to_owned(), detail },
            _ => Self::damaged(path, detail),
        }
    }
}

/// Why a recording could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error("{} is a directory: name a file to write the recording to", .path.display())]
    Directory { path: PathBuf },
    #[error("{} is not a regular file, which a recording must be: choose another place with -o", .path.display())]
    NotAFile { path: PathBuf },
    #[error("cannot create {}: choose another place with -o", .path.display())]
    Create { path: PathBuf, source: std::io::Error },
    #[error("no space left for recording {}: free some, or choose another place with -o", .path.display())]
    Full { path: PathBuf },
    #[error("recording {} is being read by another program: close that, or keep the file under this name", .path.display())]
    Busy { path: PathBuf },
    #[error("cannot write recording {}", .path.display())]
    Sqlite { path: PathBuf, source: rusqlite::Error },
    #[error("cannot rename recording {} to {}: it stays under its first name", .from.display(), .to.display())]
    Rename { from: PathBuf, to: PathBuf, source: std::io::Error },
}

impl WriteError {
    pub(super) fn from_sqlite(path: &Path, source: rusqlite::Error) -> Self {
        let path = path.to_owned();
        match source.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::Full { path },
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Busy { path },
            _ => Self::Sqlite { path, source },
        }
    }
}
