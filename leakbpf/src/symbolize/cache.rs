//! Names kept between sessions: a directory of ours with a file for each build id.
//!
//! Nothing of it is needed: whatever is wrong with it, names are looked up as if it were not there.
//!
//! A build id says what a file claims to be. So that nobody can give names to the code of others, a
//! file of names is only for modules that the same people could write, below the same root: see
//! [`Key`]. So that nobody can make us write elsewhere, the directories must be ours alone, and are
//! held open.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::unistd::geteuid;

use super::names::{FILE_MAX_BYTES, Names};
use crate::elf::debug_files::hex;

/// All files together.
const CACHE_MAX_BYTES: u64 = 64 << 20;
/// What the smallest file takes of a disk.
const BLOCK_BYTES: u64 = 4096;
/// Files looked at when the oldest are searched for.
const FILES_MAX: usize = 1 << 16;
/// Whatever has a shorter one (made by hand) may not be alone in having it.
const BUILD_ID_MIN_BYTES: usize = 8;
/// A file that is in use counts as new again after this time.
const TOUCH_INTERVAL: Duration = Duration::from_secs(24 * 3600);
const TEMPORARY_PREFIX: &str = ".new-";
/// Older ones were left by sessions that were killed.
const TEMPORARY_AGE_MAX: Duration = Duration::from_secs(3600);

/// Users who can write a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Writers {
    user: u32,
    group: Option<u32>,
}

impl Writers {
    /// `None` when everybody can.
    fn of(metadata: &Metadata) -> Option<Writers> {
        let mode = metadata.mode();
        let group = (mode & 0o020 != 0).then(|| metadata.gid());
        (mode & 0o002 == 0).then_some(Writers { user: metadata.uid(), group })
    }
}

/// What names are kept for: a build id, and who vouches for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    build_id: String,
    writers: Writers,
    /// Device and inode of the target's root directory; `None` for our own.
    root: Option<(u64, u64)>,
}

impl Key {
    /// `None` for what is not kept.
    pub fn of(file: &File, build_id: &[u8], root: &Path) -> Option<Key> {
        if build_id.len() < BUILD_ID_MIN_BYTES {
            return None;
        }
        let identity = |path: &Path| fs::metadata(path).map(|root| (root.dev(), root.ino())).ok();
        let root = identity(root)?;
        Some(Key {
            build_id: hex(build_id),
            writers: Writers::of(&file.metadata().ok()?)?,
            root: (Some(root) != identity(Path::new("/"))).then_some(root),
        })
    }

    /// May a debug file, which is not worth more than its writers, tell names for this key?
    pub fn trusts(&self, file: &File) -> bool {
        let Some(writers) = file.metadata().ok().and_then(|metadata| Writers::of(&metadata)) else {
            return false;
        };
        let trusted_users = [0, geteuid().as_raw(), self.writers.user];
        trusted_users.contains(&writers.user)
            && writers.group.is_none_or(|group| group == 0 || self.writers.group == Some(group))
    }

    fn directory(&self) -> &str {
        self.build_id.get(..2).unwrap_or_default()
    }

    fn file_name(&self) -> String {
        let mut name =
            format!("{}-u{}", self.build_id.get(2..).unwrap_or_default(), self.writers.user);
        if let Some(group) = self.writers.group {
            name.push_str(&format!("g{group}"));
        }
        if let Some((device, inode)) = self.root {
            name.push_str(&format!("-r{device:x}.{inode:x}"));
        }
        name
    }

    fn text(&self) -> String {
        format!("{}{}", self.directory(), self.file_name())
    }
}

/// The directory, `leakbpf/names` below the user's caches.
#[derive(Debug)]
pub struct Cache {
    /// Held, so that nobody can put another one in its place.
    directory: File,
    limit_bytes: u64,
}

impl Cache {
    /// `None` when there is no place that belongs to the user that we run as. `variable` looks up
    /// the environment.
    pub fn open(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<Cache> {
        let is_root = geteuid().is_root();
        let system_caches = || open_owned(Path::new("/var/cache")).ok().filter(|_| is_root);
        Cache::below(&user_caches(variable).or_else(system_caches)?)
    }

    fn below(caches: &File) -> Option<Cache> {
        let ours = open_private(&below(caches, "leakbpf")).ok()?;
        let directory = open_private(&below(&ours, "names")).ok()?;
        Some(Cache { directory, limit_bytes: CACHE_MAX_BYTES })
    }

    /// The names that are kept for `key`.
    pub(super) fn read(&self, key: &Key) -> Option<Names> {
        let path = self.path(key);
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&path)
            .ok()?;
        let metadata = file.metadata().ok()?;
        if !metadata.is_file() || !is_private(&metadata) {
            return None;
        }
        let mut bytes = Vec::new();
        let names = match (&file).take(FILE_MAX_BYTES as u64 + 1).read_to_end(&mut bytes) {
            Ok(count) if count <= FILE_MAX_BYTES => Names::decode(&bytes, &key.text()),
            _ => None,
        };
        match &names {
            None => drop(fs::remove_file(&path)),
            Some(_) if age(&metadata) > TOUCH_INTERVAL => {
                drop(file.set_modified(SystemTime::now()));
            }
            Some(_) => {}
        }
        names
    }

    /// Keeps the names for `key`, in the place of those that are there.
    pub(super) fn write(&self, key: &Key, names: &Names) -> io::Result<()> {
        let bytes = names.encode(&key.text());
        if bytes.len() > FILE_MAX_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let path = self.path(key);
        let directory = below(&self.directory, key.directory());
        make_directory(&directory)?;
        let mut file = tempfile::Builder::new().prefix(TEMPORARY_PREFIX).tempfile_in(directory)?;
        file.write_all(&bytes)?;
        // Not synchronised: what a power failure damages is found out by its checksum.
        file.persist(path)?;
        Ok(())
    }

    fn path(&self, key: &Key) -> PathBuf {
        below(&self.directory, key.directory()).join(key.file_name())
    }

    /// Removes the files that were not used for longest until the rest fits.
    pub(super) fn trim(&self) {
        let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        let list = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
        for directory in list(&below(&self.directory, "")) {
            for entry in list(&directory.path()).take(FILES_MAX.saturating_sub(files.len())) {
                let Ok(metadata) = entry.metadata() else { continue };
                let name = entry.file_name();
                let is_temporary = name.as_encoded_bytes().starts_with(TEMPORARY_PREFIX.as_bytes());
                if is_temporary && age(&metadata) > TEMPORARY_AGE_MAX {
                    let _ = fs::remove_file(entry.path());
                    continue;
                }
                let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                let size_bytes = metadata.len().next_multiple_of(BLOCK_BYTES);
                files.push((modified, size_bytes, entry.path()));
            }
        }
        files.sort_unstable();
        let mut total: u64 = files.iter().map(|(_, size_bytes, _)| size_bytes).sum();
        for (_, size_bytes, path) in files {
            if total <= self.limit_bytes {
                return;
            }
            if fs::remove_file(path).is_ok() {
                total -= size_bytes;
            }
        }
    }
}

/// Where the user that we run as keeps caches (XDG Base Directory Specification).
fn user_caches(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<File> {
    let absolute = |name| variable(name).filter(|path| path.is_absolute());
    if let Some(caches) = absolute("XDG_CACHE_HOME") {
        make_directory(&caches).ok()?;
        return open_owned(&caches).ok();
    }
    // With `sudo` it may be somebody else's, who should not find root's files there.
    let home = open_owned(&absolute("HOME")?).ok()?;
    let caches = below(&home, ".cache");
    make_directory(&caches).ok()?;
    open_owned(&caches).ok()
}

/// Ours, and nobody else can write it.
fn is_private(metadata: &Metadata) -> bool {
    metadata.uid() == geteuid().as_raw() && metadata.mode() & 0o022 == 0
}

fn age(metadata: &Metadata) -> Duration {
    let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    SystemTime::now().duration_since(modified).unwrap_or_default()
}

/// A path that goes through an open directory, whatever becomes of its name.
fn below(directory: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name)
}

/// Makes a directory that only we may enter, unless there is one.
fn make_directory(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

/// A directory of the user that we run as.
fn open_owned(path: &Path) -> io::Result<File> {
    let directory = File::options().read(true).custom_flags(libc::O_DIRECTORY).open(path)?;
    match directory.metadata()?.uid() == geteuid().as_raw() {
        true => Ok(directory),
        false => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

/// A directory that only we can write, made when there is none.
fn open_private(path: &Path) -> io::Result<File> {
    make_directory(path)?;
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let directory = File::options().read(true).custom_flags(flags).open(path)?;
    match is_private(&directory.metadata()?) {
        true => Ok(directory),
        false => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::profile::Symbol;
    use crate::symbolize::module::Quality;

    fn cache(directory: &tempfile::TempDir) -> Cache {
        Cache::below(&File::open(directory.path()).expect("directory")).expect("cache")
    }

    fn key(number: u32) -> Key {
        let writers = Writers { user: 0, group: None };
        Key { build_id: format!("{number:016x}"), writers, root: None }
    }

    fn names(function: &str) -> Names {
        let mut names = Names::default();
        let function = function.to_owned();
        let symbol = Symbol { function, file: None, line: None, inlined: false };
        names.insert(1, Quality::Symbols, &[symbol]);
        names
    }

    fn function(names: Option<Names>) -> Option<String> {
        Some(names?.get(1)?.1.first()?.function.clone())
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("mode");
    }

    #[test]
    fn only_the_owner_can_read_what_is_kept() {
        let directory = tempfile::tempdir().expect("directory");
        let home = directory.path().to_owned();
        let cache = Cache::open(|name| (name == "HOME").then(|| home.clone())).expect("cache");
        cache.write(&key(7), &names("a")).expect("written");
        assert_eq!(function(cache.read(&key(7))).as_deref(), Some("a"));
        let mut path = home;
        let parts = [".cache", "leakbpf", "names", "00", "00000000000007-u0"];
        for (depth, part) in parts.iter().enumerate() {
            path.push(part);
            let mode = fs::symlink_metadata(&path).expect("made").mode() & 0o7777;
            assert_eq!(mode, if depth == 4 { 0o600 } else { 0o700 }, "{path:?}");
        }
        assert_eq!(fs::read_dir(path.parent().expect("directory")).expect("list").count(), 1);
    }

    #[test]
    fn each_of_user_group_and_root_has_names_of_its_own() {
        let directory = tempfile::tempdir().expect("directory");
        let cache = cache(&directory);
        let mut keys = vec![key(1)];
        let with = |change: fn(&mut Key)| {
            let mut key = key(1);
            change(&mut key);
            key
        };
        keys.push(with(|key| key.writers.user = 1000));
        keys.push(with(|key| key.writers.group = Some(1000)));
        keys.push(with(|key| key.root = Some((5, 6))));
        keys.push(with(|key| key.root = Some((6, 6))));
        keys.push(key(2));
        for (number, key) in keys.iter().enumerate() {
            assert!(cache.read(key).is_none());
            cache.write(key, &names(&number.to_string())).expect("written");
        }
        for (number, key) in keys.iter().enumerate() {
            assert_eq!(function(cache.read(key)), Some(number.to_string()));
        }
        // A file under another name is none.
        fs::copy(cache.path(&keys[0]), cache.path(&keys[1])).expect("copy");
        assert!(cache.read(&keys[1]).is_none());
    }

    #[test]
    fn what_others_can_write_is_not_read_and_not_removed() {
        let directory = tempfile::tempdir().expect("directory");
        let cache = cache(&directory);
        let path = cache.path(&key(1));
        for mode in [0o620, 0o602] {
            cache.write(&key(1), &names("a")).expect("written");
            set_mode(&path, mode);
            assert!(cache.read(&key(1)).is_none());
            assert!(path.exists());
        }
        fs::rename(&path, path.with_file_name("elsewhere")).expect("moved");
        set_mode(&path.with_file_name("elsewhere"), 0o600);
        symlink("elsewhere", &path).expect("link");
        assert!(cache.read(&key(1)).is_none());
        // Written anew, it is right again, and the file behind the link as it was.
        cache.write(&key(1), &names("b")).expect("written");
        assert_eq!(function(cache.read(&key(1))).as_deref(), Some("b"));
        assert!(!path.is_symlink());
        fs::remove_file(&path).expect("removed");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).expect("FIFO");
        assert!(cache.read(&key(1)).is_none());
    }

    #[test]
    fn a_directory_that_others_can_write_or_that_is_a_link_is_not_used() {
        for part in ["leakbpf", "leakbpf/names"] {
            let directory = tempfile::tempdir().expect("directory");
            let below = || Cache::below(&File::open(directory.path()).expect("directory"));
            assert!(below().is_some());
            let path = directory.path().join(part);
            for mode in [0o770, 0o707] {
                set_mode(&path, mode);
                assert!(below().is_none(), "{part} {mode:o}");
            }
            set_mode(&path, 0o700);
            assert!(below().is_some());
            fs::rename(&path, directory.path().join("moved")).expect("moved");
            symlink(directory.path().join("moved"), &path).expect("link");
            assert!(below().is_none(), "{part}");
        }
    }

    #[test]
    fn without_a_home_of_our_own_there_is_no_place_for_the_user() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().to_owned();
        // Root's is somebody else's for everybody but root, and the other way round.
        let other = match geteuid().is_root() {
            true => {
                std::os::unix::fs::chown(&path, Some(65534), None).expect("chown");
                path.clone()
            }
            false => PathBuf::from("/"),
        };
        for name in ["HOME", "XDG_CACHE_HOME"] {
            for value in [&other, Path::new("relative"), Path::new("/nonexistent/a")] {
                let value = value.to_owned();
                assert!(user_caches(|wanted| (wanted == name).then(|| value.clone())).is_none());
            }
        }
        assert!(user_caches(|_| None).is_none());
        assert_eq!(fs::read_dir(&path).expect("list").count(), 0);
    }

    #[test]
    fn a_damaged_file_is_removed() {
        let directory = tempfile::tempdir().expect("directory");
        let cache = cache(&directory);
        for damage in [0, 10, 60] {
            cache.write(&key(1), &names("a")).expect("written");
            let path = cache.path(&key(1));
            let bytes = fs::read(&path).expect("file");
            fs::write(&path, &bytes[..damage]).expect("damaged");
            assert!(cache.read(&key(1)).is_none());
            assert!(!path.exists());
        }
        // As large as a hostile one may be.
        cache.write(&key(1), &names("a")).expect("written");
        let path = cache.path(&key(1));
        let file = File::options().write(true).open(&path).expect("file");
        file.set_len(1 << 40).expect("sparse");
        assert!(cache.read(&key(1)).is_none());
        assert!(!path.exists());
    }

    #[test]
    fn the_files_that_were_used_last_stay() {
        let directory = tempfile::tempdir().expect("directory");
        let mut cache = cache(&directory);
        let days_ago = |days| SystemTime::now() - Duration::from_secs(days * 24 * 3600);
        for number in 0..8u64 {
            // In several directories.
            let key = Key { build_id: format!("{number:02x}00000000000000"), ..key(0) };
            cache.write(&key, &names("a")).expect("written");
            let file = File::options().write(true).open(cache.path(&key)).expect("file");
            file.set_modified(days_ago(10 - number)).expect("time");
        }
        let key_of =
            |number: u32| Key { build_id: format!("{number:02x}00000000000000"), ..key(0) };
        // The oldest is read, and is the newest then.
        assert!(cache.read(&key_of(0)).is_some());
        cache.limit_bytes = 3 * BLOCK_BYTES;
        cache.trim();
        let kept: Vec<u32> = (0..8).filter(|&n| cache.read(&key_of(n)).is_some()).collect();
        assert_eq!(kept, [0, 6, 7]);

        let path = cache.path(&key_of(0)).with_file_name(format!("{TEMPORARY_PREFIX}x"));
        let file = File::create(&path).expect("left by a killed session");
        cache.trim();
        assert!(path.exists(), "it may be in use");
        file.set_modified(days_ago(1)).expect("time");
        cache.trim();
        assert!(!path.exists());
    }

    #[test]
    fn debug_files_of_strangers_are_not_trusted() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("file");
        let file = File::create(&path).expect("file");
        let us = file.metadata().expect("metadata");
        let key = |user, group| Key { writers: Writers { user, group }, ..key(0) };
        set_mode(&path, 0o644);
        assert!(key(us.uid(), None).trusts(&file));
        set_mode(&path, 0o664);
        assert!(key(us.uid(), Some(us.gid())).trusts(&file));
        assert_eq!(key(us.uid(), Some(us.gid() + 1)).trusts(&file), us.gid() == 0);
        set_mode(&path, 0o646);
        assert!(!key(us.uid(), Some(us.gid())).trusts(&file));
        if geteuid().is_root() {
            set_mode(&path, 0o644);
            std::os::unix::fs::chown(&path, Some(1000), None).expect("chown");
            assert!(key(1000, None).trusts(&file));
            assert!(!key(0, None).trusts(&file) && !key(1001, None).trusts(&file));
        }
    }
}
