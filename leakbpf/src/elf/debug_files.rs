//! Separate debug files: where the debug information of a module may lie, and whether a file found
//! there belongs to it.
//!
//! The places are those of GDB ("Debugging Information in Separate Files") and of debuginfod. How a
//! place is opened is the caller's business, so that a target's own mount namespace can be used.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::image::{Fields, Image, ImageError, Source};

const LINK_MAX_BYTES: u64 = 1 << 16;
/// Debug files up to this size are read through for the checksum of a `.gnu_debuglink`.
const CHECKSUMMED_MAX_BYTES: u64 = 2 << 30;
const CHUNK_BYTES: u64 = 1 << 18;

const DEBUG_ROOT: &str = "/usr/lib/debug";

/// A path, and whose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// As the target's mount namespace names it.
    Target(PathBuf),
    /// As our own does.
    Host(PathBuf),
}

impl Place {
    pub fn path(&self) -> &Path {
        match self {
            Place::Target(path) | Place::Host(path) => path,
        }
    }

    /// A path that counts from the directory of this one.
    pub fn sibling(&self, path: &Path) -> Place {
        let path = match self.path().parent() {
            Some(directory) => directory.join(path),
            None => path.to_owned(),
        };
        match self {
            Place::Target(_) => Place::Target(path),
            Place::Host(_) => Place::Host(path),
        }
    }
}

/// What debuginfod clients of the current user fetched from their servers.
#[derive(Debug, Clone, Default)]
pub struct Debuginfod {
    /// Directories of our own that hold `BUILDID/debuginfo`.
    pub caches: Vec<PathBuf>,
    /// Files of our own by build id, fetched while we run.
    pub fetched: HashMap<Vec<u8>, PathBuf>,
}

impl Debuginfod {
    fn places(&self, id: &[u8]) -> impl Iterator<Item = Place> {
        let name = Path::new(&hex(id)).join("debuginfo");
        let fetched = self.fetched.get(id).cloned();
        let cached: Vec<PathBuf> = self.caches.iter().map(|cache| cache.join(&name)).collect();
        fetched.into_iter().chain(cached).map(Place::Host)
    }
}

/// A separate debug file that belongs to the module it was looked for.
#[derive(Debug)]
pub struct DebugFile {
    pub image: Image,
    pub place: Place,
}

/// Why a file that was found was not used.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("debug file {path} {source}; install the debug package again")]
    Image { path: PathBuf, source: ImageError },
    #[error("debug file {path} has another build id; install the debug package of this version")]
    BuildId { path: PathBuf },
    #[error(
        "debug file {path} has another CRC-32 than the module's .gnu_debuglink states; install the debug package of this version"
    )]
    Checksum { path: PathBuf },
}

/// What a search brought up.
#[derive(Debug, Default)]
pub struct Search {
    pub found: Option<DebugFile>,
    /// Files that were there and did not belong, in the order they were tried.
    pub refused: Vec<Refusal>,
}

/// Opens a place; `None` when nothing is there.
pub type Open<'a> = dyn FnMut(&Place) -> Option<Source> + 'a;

/// Has the file debug information of its own?
pub fn has_debug_info(image: &Image) -> bool {
    [".debug_info", ".zdebug_info"]
        .iter()
        .any(|name| image.section(name).is_some_and(|info| info.size_bytes > 0))
}

/// Looks for the debug file of `image`, which the target knows as `module_path`.
pub fn find(image: &Image, module_path: &Path, debuginfod: &Debuginfod, open: &mut Open) -> Search {
    let mut search = Search::default();
    let build_id = image.build_id();
    let link = debug_link(image);

    if let Some(id) = &build_id {
        let place = build_id_path(id);
        for place in [Place::Target(place.clone()), Place::Host(place)] {
            if search.take(place, Some(id), None, open) {
                return search;
            }
        }
    }
    if let Some((name, crc)) = &link {
        for path in linked_paths(module_path, name) {
            if search.take(Place::Target(path), build_id.as_deref(), Some(*crc), open) {
                return search;
            }
        }
    }
    if let Some(id) = &build_id {
        for place in debuginfod.places(id) {
            if search.take(place, Some(id), None, open) {
                return search;
            }
        }
    }
    search
}

/// Looks for the file that `dwz` moved the shared parts of a debug file to. `place` is where the
/// debug file itself was found. Returns its build id and what was found; `None` when the debug file
/// names no such file.
pub fn find_alternate(
    image: &Image,
    place: &Place,
    debuginfod: &Debuginfod,
    open: &mut Open,
) -> Option<(Vec<u8>, Search)> {
    let section = image.section(".gnu_debugaltlink")?;
    let link = image.contents(section, LINK_MAX_BYTES).ok()?;
    let end = link.iter().position(|&byte| byte == 0)?;
    let path = PathBuf::from(OsStr::from_bytes(link.get(..end)?));
    let id = link.get(end + 1..).filter(|id| id.len() >= 2)?;

    let by_id = build_id_path(id);
    let mut places = vec![place.sibling(&path), Place::Target(by_id.clone()), Place::Host(by_id)];
    if path.is_absolute() {
        places.push(Place::Host(path));
    }
    places.extend(debuginfod.places(id));
    let mut search = Search::default();
    for place in places {
        if search.take(place, Some(id), None, open) {
            break;
        }
    }
    Some((id.to_vec(), search))
}

impl Search {
    /// Opens and checks one place; true when it was what is looked for.
    fn take(
        &mut self,
        place: Place,
        build_id: Option<&[u8]>,
        crc: Option<u32>,
        open: &mut Open,
    ) -> bool {
        let Some(source) = open(&place) else {
            return false;
        };
        // How debuginfod clients note that no server has the file.
        if source.len().is_ok_and(|len_bytes| len_bytes == 0) {
            return false;
        }
        let path = place.path().to_owned();
        match checked(source, &path, build_id, crc) {
            // A stripped module at the place of its own debug file would end the search too soon.
            Ok(image) if !has_debug_info(&image) && image.section(".symtab").is_none() => false,
            Ok(image) => {
                self.found = Some(DebugFile { image, place });
                true
            }
            Err(refusal) => {
                self.refused.push(refusal);
                false
            }
        }
    }
}

fn checked(
    source: Source,
    path: &Path,
    build_id: Option<&[u8]>,
    crc: Option<u32>,
) -> Result<Image, Refusal> {
    let damaged = |source| Refusal::Image { path: path.to_owned(), source };
    let image = Image::open(source).map_err(damaged)?;
    let theirs = image.build_id();
    let belongs = match (build_id, theirs.as_deref()) {
        (Some(ours), Some(theirs)) => ours == theirs,
        // A build id is the only tie when there is no checksum.
        (Some(_), None) => crc.is_some(),
        (None, _) => true,
    };
    if !belongs {
        return Err(Refusal::BuildId { path: path.to_owned() });
    }
    if let Some(crc) = crc
        && checksum(&image).map_err(damaged)? != crc
    {
        return Err(Refusal::Checksum { path: path.to_owned() });
    }
    Ok(image)
}

/// CRC-32 of the whole file.
fn checksum(image: &Image) -> Result<u32, ImageError> {
    let size_bytes = image.len_bytes();
    if size_bytes > CHECKSUMMED_MAX_BYTES {
        return Err(ImageError::TooLarge {
            what: "debug file".to_owned(),
            size_bytes,
            limit_bytes: CHECKSUMMED_MAX_BYTES,
        });
    }
    let mut hasher = crc32fast::Hasher::new();
    let mut offset = 0;
    while offset < size_bytes {
        let count = (size_bytes - offset).min(CHUNK_BYTES);
        hasher.update(&image.bytes("debug file", offset, count, CHUNK_BYTES)?);
        offset += count;
    }
    Ok(hasher.finalize())
}

/// File name and CRC-32 that `.gnu_debuglink` states.
fn debug_link(image: &Image) -> Option<(PathBuf, u32)> {
    let section = image.section(".gnu_debuglink")?;
    let link = image.contents(section, LINK_MAX_BYTES).ok()?;
    let end = link.iter().position(|&byte| byte == 0)?;
    let crc_offset = (end + 1).checked_next_multiple_of(4)?;
    link.get(crc_offset..crc_offset.checked_add(4)?)?;
    let name = link.get(..end)?;
    // A name, not a path: a module must not point us elsewhere.
    if name.is_empty() || name.contains(&b'/') {
        return None;
    }
    let name = PathBuf::from(OsStr::from_bytes(name));
    Some((name, Fields(&link).u32(crc_offset)))
}

fn linked_paths(module_path: &Path, name: &Path) -> Vec<PathBuf> {
    let Some(directory) = module_path.parent() else {
        return Vec::new();
    };
    let global = |directory: &Path| -> Option<PathBuf> {
        let relative = directory.strip_prefix("/").ok()?;
        Some(Path::new(DEBUG_ROOT).join(relative).join(name))
    };
    let mut paths = vec![directory.join(name), directory.join(".debug").join(name)];
    paths.extend(global(directory));
    // Where /lib is a link to /usr/lib, packages still use either name.
    match directory.strip_prefix("/usr") {
        Ok(merged) => paths.extend(global(&Path::new("/").join(merged))),
        Err(_) => paths.extend(global(
            &Path::new("/usr").join(directory.strip_prefix("/").unwrap_or(directory)),
        )),
    }
    // A stripped module that links to its own name would find itself.
    paths.retain(|path| path != module_path);
    paths
}

fn build_id_path(id: &[u8]) -> PathBuf {
    let id = hex(id);
    let (directory, name) = id.split_at_checked(2).unwrap_or((&id, ""));
    Path::new(DEBUG_ROOT).join(".build-id").join(directory).join(format!("{name}.debug"))
}

/// Lower-case hexadecimal, as build ids are written.
pub fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}
