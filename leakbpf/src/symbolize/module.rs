//! One module: its sources of names, in the order in which they are asked.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::cache::{Cache, Key};
use super::debuginfod::FetchError;
use super::demangle::{demangle, is_mangled};
use super::dwarf::{DebugInfo, DwarfError, Found, SourceFrame};
use super::names::Names;
use super::symbol_table::{Match, SymbolTable, packed_image, plainness};
use super::{Limits, Means, ModuleSource, root};
use crate::elf::debug_files::{self, DebugFile, Debuginfod, Place, Refusal, Search};
use crate::elf::image::{Image, ImageError, Source};
use crate::profile::Symbol;

/// What keeps a module, or a part of it, from being named.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    #[error("{path} {source}")]
    Image { path: PathBuf, source: ImageError },
    #[error("{section} of {path} is not used: it {source}")]
    SymbolTable { path: PathBuf, section: &'static str, source: ImageError },
    #[error("lines and inlined functions of {path} are not known: {source}")]
    DebugInfo { path: PathBuf, source: DwarfError },
    #[error("some lines and inlined functions of {path} are not known: {reason}")]
    Split { path: PathBuf, reason: String },
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(
        "{path} refers to a file that dwz made and that is not there; install the same debug package again"
    )]
    NoAlternate { path: PathBuf },
    #[error("debug information of {path} was not fetched: {source}")]
    NotFetched { path: PathBuf, source: FetchError },
}

/// Time for a module's mangled names: so much, and what each is allowed on average, a hundred times
/// what honest ones take.
const DEMANGLING_MAX: Duration = Duration::from_secs(5);
const DEMANGLING_MEAN_MAX: Duration = Duration::from_millis(1);
/// A name is never charged more: the agent may have been stopped meanwhile.
const NAME_CHARGE_MAX: Duration = Duration::from_secs(1);

/// A module that is asked for hours must not collect the same complaint for ever.
const PROBLEMS_MAX: usize = 16;

#[derive(Debug)]
pub(super) struct Module {
    path: PathBuf,
    root: PathBuf,
    image: Option<Image>,
    loaded: Option<Loaded>,
    /// `None` when names are not to be kept.
    key: Option<Key>,
    kept: Option<Kept>,
    /// Build id of a debug file that would help and was not found.
    missing: Option<Vec<u8>>,
    last_call: u64,
    problems: Vec<Problem>,
    demangling: Demangling,
}

/// What names took so far.
#[derive(Debug, Default)]
struct Demangling {
    spent: Duration,
    names: u32,
}

impl Demangling {
    fn demangle(&mut self, name: &str) -> String {
        let allowed = DEMANGLING_MAX.saturating_add(DEMANGLING_MEAN_MAX.saturating_mul(self.names));
        if self.spent > allowed {
            return name.to_owned();
        }
        let start = Instant::now();
        let plain = demangle(name);
        self.spent = self.spent.saturating_add(start.elapsed().min(NAME_CHARGE_MAX));
        self.names = self.names.saturating_add(1);
        plain
    }
}

/// Names from the cache, and for it.
#[derive(Debug, Default)]
struct Kept {
    names: Names,
    is_new: bool,
}

/// What was read to answer, all of which can be read again.
#[derive(Debug)]
struct Loaded {
    debug_file: Option<Image>,
    debug_info: Option<DebugInfo>,
    tables: Vec<Table>,
    missing: Option<Vec<u8>>,
    split_error_noted: bool,
    /// Somebody else than those who can write the module could write what was read.
    is_foreign: bool,
}

/// How good the names of a module can be, the best last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Quality {
    DynamicSymbols,
    /// `.gnu_debugdata`
    PackedSymbols,
    Symbols,
    /// Some of it is in a file that is not there.
    PartOfDebugInfo,
    DebugInfo,
}

impl Quality {
    /// In order: an index is what the cache stores.
    pub const ALL: [Quality; 5] = [
        Quality::DynamicSymbols,
        Quality::PackedSymbols,
        Quality::Symbols,
        Quality::PartOfDebugInfo,
        Quality::DebugInfo,
    ];
}

#[derive(Debug)]
struct Table {
    origin: Origin,
    state: TableState,
}

#[derive(Debug)]
enum TableState {
    Unread,
    Absent,
    Own(SymbolTable),
    /// From the file in `.gnu_debugdata`, which its names are in.
    Packed(Box<(Image, SymbolTable)>),
}

#[derive(Debug, Clone, Copy)]
enum Origin {
    Symtab,
    DebugFileSymtab,
    Dynsym,
    GnuDebugdata,
}

impl Origin {
    const ALL: [Origin; 4] =
        [Origin::Symtab, Origin::DebugFileSymtab, Origin::Dynsym, Origin::GnuDebugdata];

    fn section(self) -> &'static str {
        match self {
            Origin::Symtab | Origin::DebugFileSymtab => ".symtab",
            Origin::Dynsym => ".dynsym",
            Origin::GnuDebugdata => ".gnu_debugdata",
        }
    }
}

impl Module {
    /// `keeps_names`: whether there is a cache.
    pub fn open(source: ModuleSource, keeps_names: bool) -> Module {
        let (image, problems) = match Image::open(source.image) {
            Ok(image) => (Some(image), Vec::new()),
            Err(error) => (None, vec![Problem::Image { path: source.path.clone(), source: error }]),
        };
        // Now, while there is a process whose root it is.
        let key = image
            .as_ref()
            .filter(|_| keeps_names)
            .and_then(|image| Key::of(image.file()?, &image.build_id()?, &source.root));
        Module {
            path: source.path,
            root: source.root,
            image,
            loaded: None,
            key,
            kept: None,
            missing: None,
            last_call: 0,
            problems,
            demangling: Demangling::default(),
        }
    }

    pub fn build_id(&self) -> Option<String> {
        let id = self.image.as_ref()?.build_id()?;
        Some(debug_files::hex(&id))
    }

    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// Build id of the debug file that was looked for in vain when names were asked for.
    pub fn missing(&self) -> Option<&[u8]> {
        // The vDSO is no file, and whole.
        self.image.as_ref()?.file()?;
        self.missing.as_deref()
    }

    pub fn not_fetched(&mut self, source: FetchError) {
        self.note(Problem::NotFetched { path: self.path.clone(), source });
    }

    pub fn is_loaded(&self) -> bool {
        self.loaded.is_some()
    }

    pub fn last_call(&self) -> u64 {
        self.last_call
    }

    pub fn unload(&mut self) {
        self.loaded = None;
        // What is new cannot be read again.
        self.kept = self.kept.take().filter(|kept| kept.is_new);
    }

    pub fn close(&mut self) {
        self.unload();
        self.image = None;
    }

    pub fn size_bytes(&self) -> usize {
        let kept = self.kept.as_ref().filter(|kept| !kept.is_new);
        let kept = kept.map_or(0, |kept| kept.names.size_bytes());
        let Some(loaded) = &self.loaded else {
            return kept;
        };
        let tables: usize = loaded
            .tables
            .iter()
            .map(|table| match &table.state {
                TableState::Unread | TableState::Absent => 0,
                TableState::Own(symbols) => symbols.size_bytes(),
                TableState::Packed(packed) => packed.0.len_bytes() as usize + packed.1.size_bytes(),
            })
            .sum();
        kept + tables + loaded.debug_info.as_ref().map_or(0, DebugInfo::size_bytes)
    }

    /// Finds and opens what names come from, unless that is done.
    fn load(&mut self, means: &Means) -> Option<Quality> {
        let image = self.image.as_ref()?;
        if self.loaded.is_none() {
            let mut problems = Vec::new();
            let files = Files::new(&self.path, &self.root, self.key.as_ref(), means);
            let loaded = files.load(image, &means.limits, &mut problems);
            self.missing.clone_from(&loaded.missing);
            self.loaded = Some(loaded);
            problems.into_iter().for_each(|problem| self.note(problem));
        }
        Some(self.loaded.as_ref()?.quality(self.image.as_ref()?))
    }

    /// Looks for the missing debug file once more. True when names are better than before.
    pub fn reload(&mut self, means: &Means) -> bool {
        let before = self.load(means);
        self.problems.retain(|problem| !matches!(problem, Problem::NoAlternate { .. }));
        self.unload();
        self.load(means) > before
    }

    pub fn name(&mut self, svma: u64, call: u64, means: &Means) -> Vec<Symbol> {
        self.last_call = call;
        let kept = self.kept(svma, means);
        // There are no better ones: no debug file needs to be looked for.
        if let Some((Quality::DebugInfo, symbols)) = kept {
            return symbols;
        }
        let Some(quality) = self.load(means) else {
            return Vec::new();
        };
        if let Some((kept_quality, symbols)) = kept
            && kept_quality >= quality
        {
            return symbols;
        }
        let (symbols, is_partial) = self.look_up(svma, means);
        if !is_partial {
            self.keep(svma, quality, &symbols);
        }
        symbols
    }

    /// What the cache has for an address.
    fn kept(&mut self, svma: u64, means: &Means) -> Option<(Quality, Vec<Symbol>)> {
        let (cache, key) = (means.cache.as_ref()?, self.key.as_ref()?);
        self.image.as_ref()?;
        let kept = self.kept.get_or_insert_with(|| Kept {
            names: cache.read(key).unwrap_or_default(),
            is_new: false,
        });
        kept.names.get(svma)
    }

    fn keep(&mut self, svma: u64, quality: Quality, symbols: &[Symbol]) {
        let is_foreign = self.loaded.as_ref().is_none_or(|loaded| loaded.is_foreign);
        if let Some(kept) = &mut self.kept
            && !is_foreign
        {
            kept.is_new |= kept.names.insert(svma, quality, symbols);
        }
    }

    /// Writes what is new to the cache. True when there was something.
    pub fn save(&mut self, cache: &Cache) -> bool {
        let (Some(key), Some(kept)) = (&self.key, &mut self.kept) else {
            return false;
        };
        if !std::mem::take(&mut kept.is_new) {
            return false;
        }
        // Another session may have added to it meanwhile.
        if let Some(others) = cache.read(key) {
            kept.names.merge(&others);
        }
        cache.write(key, &kept.names).is_ok()
    }

    /// The names, and whether a later session may find more.
    fn look_up(&mut self, svma: u64, means: &Means) -> (Vec<Symbol>, bool) {
        let (Some(image), Some(loaded)) = (&self.image, &mut self.loaded) else {
            return (Vec::new(), true);
        };
        let mut problems = Vec::new();
        let files = Files::new(&self.path, &self.root, self.key.as_ref(), means);
        let Found { mut frames, is_partial } = loaded.source_frames(svma, &files, &mut problems);
        loaded.is_foreign |= files.is_foreign.get();
        let outermost = frames.last().and_then(|frame| frame.function.as_deref());
        // glibc's sources call it __libc_malloc, and everybody else malloc.
        let may_have_alias =
            outermost.is_none_or(|name| name.starts_with('_') && !is_mangled(name));
        if may_have_alias {
            let symbol = loaded.symbol(image, svma, &self.path, &mut problems);
            let better = symbol.filter(|symbol| {
                outermost.is_none_or(|name| {
                    !is_mangled(&symbol.name) && plainness(&symbol.name) < plainness(name)
                })
            });
            if let Some(Match { name, .. }) = better {
                let name = Some(name.into());
                match frames.last_mut() {
                    Some(frame) => frame.function = name,
                    None => frames.push(SourceFrame { function: name, file: None, line: None }),
                }
            }
        }
        for problem in problems {
            self.note(problem);
        }
        (symbols(frames, &mut self.demangling), is_partial)
    }

    /// Keeps a problem, unless it is known: what was unloaded and is read again fails again.
    fn note(&mut self, problem: Problem) {
        let text = problem.to_string();
        let is_known = self.problems.iter().any(|known| known.to_string() == text);
        if !is_known && self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        }
    }
}

/// A line without a function names nothing, unless a function was inlined into it.
fn symbols(frames: Vec<SourceFrame>, demangling: &mut Demangling) -> Vec<Symbol> {
    let count = frames.len();
    frames
        .into_iter()
        .enumerate()
        .filter_map(|(index, frame)| {
            let inlined = index + 1 < count;
            let function = match (&frame.function, inlined) {
                (Some(name), _) => demangling.demangle(name),
                // Dropping it would make a caller out of the callee.
                (None, true) => "[inlined]".to_owned(),
                (None, false) => return None,
            };
            Some(Symbol {
                function,
                file: frame.file.map(|file| file.as_ref().to_owned()),
                line: frame.line,
                inlined,
            })
        })
        .collect()
}

impl Loaded {
    fn quality(&self, image: &Image) -> Quality {
        let has_symbols = |image: &Image| image.section(".symtab").is_some();
        match &self.debug_info {
            Some(_) if self.missing.is_some() => Quality::PartOfDebugInfo,
            Some(_) => Quality::DebugInfo,
            None if has_symbols(image) => Quality::Symbols,
            None if self.debug_file.as_ref().is_some_and(has_symbols) => Quality::Symbols,
            None if image.section(".gnu_debugdata").is_some() => Quality::PackedSymbols,
            None => Quality::DynamicSymbols,
        }
    }

    fn source_frames(&mut self, svma: u64, files: &Files, problems: &mut Vec<Problem>) -> Found {
        let Some(info) = &mut self.debug_info else {
            return Found::default();
        };
        let path = || files.path.to_owned();
        match info.find(svma, &mut |place: &Place| files.open(place)) {
            Ok(found) => {
                if let Some(error) = info.split_error()
                    && !self.split_error_noted
                {
                    self.split_error_noted = true;
                    problems.push(Problem::Split { path: path(), reason: error.to_string() });
                }
                found
            }
            Err(source) => {
                problems.push(Problem::DebugInfo { path: path(), source });
                Found { frames: Vec::new(), is_partial: true }
            }
        }
    }

    fn symbol(
        &mut self,
        image: &Image,
        svma: u64,
        path: &Path,
        problems: &mut Vec<Problem>,
    ) -> Option<Match> {
        let debug_file = self.debug_file.as_ref();
        for table in &mut self.tables {
            if matches!(table.state, TableState::Unread) {
                table.state =
                    read_table(table.origin, image, debug_file).unwrap_or_else(|source| {
                        problems.push(Problem::SymbolTable {
                            path: path.to_owned(),
                            section: table.origin.section(),
                            source,
                        });
                        TableState::Absent
                    });
            }
            let found = match (&table.state, table.origin, debug_file) {
                (TableState::Own(symbols), Origin::DebugFileSymtab, Some(file)) => {
                    symbols.find(file, svma)
                }
                (TableState::Own(symbols), _, _) => symbols.find(image, svma),
                (TableState::Packed(packed), _, _) => packed.1.find(&packed.0, svma),
                (TableState::Unread | TableState::Absent, _, _) => None,
            };
            if found.is_some() {
                return found;
            }
        }
        None
    }
}

fn read_table(
    origin: Origin,
    image: &Image,
    debug_file: Option<&Image>,
) -> Result<TableState, ImageError> {
    let file = match origin {
        Origin::Symtab | Origin::Dynsym => image,
        Origin::DebugFileSymtab => match debug_file {
            Some(file) => file,
            None => return Ok(TableState::Absent),
        },
        Origin::GnuDebugdata => {
            let Some(packed) = packed_image(image)? else {
                return Ok(TableState::Absent);
            };
            let table = SymbolTable::read(&packed, ".symtab")?;
            return Ok(table.map_or(TableState::Absent, |table| {
                TableState::Packed(Box::new((packed, table)))
            }));
        }
    };
    let table = SymbolTable::read(file, origin.section())?;
    Ok(table.map_or(TableState::Absent, TableState::Own))
}

/// Where a module's debug files may be.
struct Files<'a> {
    path: &'a Path,
    root: &'a Path,
    key: Option<&'a Key>,
    debuginfod: &'a Debuginfod,
    /// Set when a file is opened that is not to be trusted like the module itself.
    is_foreign: Cell<bool>,
}

impl<'a> Files<'a> {
    fn new(path: &'a Path, root: &'a Path, key: Option<&'a Key>, means: &'a Means) -> Files<'a> {
        let debuginfod = &means.debuginfod;
        Files { path, root, key, debuginfod, is_foreign: Cell::new(false) }
    }

    fn open(&self, place: &Place) -> Option<Source> {
        let file = match place {
            Place::Target(path) => root::open(self.root, path),
            Place::Host(path) => root::open(Path::new("/"), path),
        };
        let file = file.ok()?;
        if self.key.is_none_or(|key| !key.trusts(&file)) {
            self.is_foreign.set(true);
        }
        Some(Source::File(file))
    }

    fn load(&self, image: &Image, limits: &Limits, problems: &mut Vec<Problem>) -> Loaded {
        let mut debug_file = None;
        if !debug_files::has_debug_info(image) {
            let open = &mut |place: &Place| self.open(place);
            let search = debug_files::find(image, self.path, self.debuginfod, open);
            debug_file = accept(search, problems);
        }
        let (with_info, place) = match &debug_file {
            Some(DebugFile { image, place }) => (image, place.clone()),
            None => (image, Place::Target(self.path.to_owned())),
        };
        let (debug_info, missing) = match debug_files::has_debug_info(with_info) {
            true => self.debug_info(with_info, &place, limits, problems),
            false => (None, image.build_id()),
        };
        let tables = Origin::ALL.map(|origin| Table { origin, state: TableState::Unread });
        let debug_file = debug_file.map(|file| file.image);
        Loaded {
            debug_file,
            debug_info,
            tables: tables.into(),
            missing,
            split_error_noted: false,
            is_foreign: self.is_foreign.get(),
        }
    }

    /// The debug information of `image`, and the build id of a file that it refers to and that was
    /// not found.
    fn debug_info(
        &self,
        image: &Image,
        place: &Place,
        limits: &Limits,
        problems: &mut Vec<Problem>,
    ) -> (Option<DebugInfo>, Option<Vec<u8>>) {
        let open = &mut |place: &Place| self.open(place);
        let search = debug_files::find_alternate(image, place, self.debuginfod, open);
        let (mut alternate, mut missing) = (None, None);
        if let Some((build_id, search)) = search {
            alternate = accept(search, problems);
            if alternate.is_none() {
                problems.push(Problem::NoAlternate { path: place.path().to_owned() });
                missing = Some(build_id);
            }
        }
        let alternate = alternate.as_ref().map(|file| &file.image);
        let mut beside = vec![Place::Target(self.path.to_owned())];
        if !beside.contains(place) {
            beside.push(place.clone());
        }
        match DebugInfo::read(image, alternate, beside, limits.debug_info_bytes, limits.time) {
            Ok(info) => (Some(info), missing),
            Err(source) => {
                problems.push(Problem::DebugInfo { path: place.path().to_owned(), source });
                (None, missing)
            }
        }
    }
}

fn accept(search: Search, problems: &mut Vec<Problem>) -> Option<DebugFile> {
    problems.extend(search.refused.into_iter().map(Problem::from));
    search.found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_whose_names_took_too_long_keeps_the_rest_mangled() {
        let mut demangling = Demangling::default();
        assert_eq!(demangling.demangle("_Znwm"), "operator new(unsigned long)");
        assert_eq!(demangling.names, 1);
        assert!(demangling.spent > Duration::ZERO);
        demangling.spent += DEMANGLING_MAX + 2 * DEMANGLING_MEAN_MAX;
        assert_eq!(demangling.demangle("_Znwm"), "_Znwm");
    }
}
