//! One module: its sources of names, in the order in which they are asked.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::demangle::{demangle, is_mangled};
use super::dwarf::{DebugInfo, DwarfError, SourceFrame};
use super::symbol_table::{Match, SymbolTable, packed_image, plainness};
use super::{Limits, ModuleSource, root};
use crate::elf::debug_files::{self, DebugFile, Place, Refusal, Search};
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
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(
        "{path} refers to a file that dwz made and that is not there; install the same debug package again"
    )]
    NoAlternate { path: PathBuf },
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

/// What was read to answer, all of which can be read again.
#[derive(Debug)]
struct Loaded {
    debug_file: Option<Image>,
    debug_info: Option<DebugInfo>,
    tables: Vec<Table>,
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
    pub fn open(source: ModuleSource) -> Module {
        let (image, problems) = match Image::open(source.image) {
            Ok(image) => (Some(image), Vec::new()),
            Err(error) => (None, vec![Problem::Image { path: source.path.clone(), source: error }]),
        };
        Module {
            path: source.path,
            root: source.root,
            image,
            loaded: None,
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

    pub fn is_loaded(&self) -> bool {
        self.loaded.is_some()
    }

    pub fn last_call(&self) -> u64 {
        self.last_call
    }

    pub fn unload(&mut self) {
        self.loaded = None;
    }

    pub fn close(&mut self) {
        self.unload();
        self.image = None;
    }

    pub fn size_bytes(&self) -> usize {
        let Some(loaded) = &self.loaded else {
            return 0;
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
        tables + loaded.debug_info.as_ref().map_or(0, DebugInfo::size_bytes)
    }

    pub fn name(
        &mut self,
        svma: u64,
        call: u64,
        limits: &Limits,
        debuginfod_caches: &[PathBuf],
    ) -> Vec<Symbol> {
        self.last_call = call;
        let Some(image) = &self.image else {
            return Vec::new();
        };
        let mut problems = Vec::new();
        let loaded = self.loaded.get_or_insert_with(|| {
            let files = Files { path: &self.path, root: &self.root, debuginfod_caches };
            files.load(image, limits, &mut problems)
        });
        let mut frames = loaded.source_frames(svma, &self.path, &mut problems);
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
        symbols(frames, &mut self.demangling)
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
    fn source_frames(
        &mut self,
        svma: u64,
        path: &Path,
        problems: &mut Vec<Problem>,
    ) -> Vec<SourceFrame> {
        let Some(info) = &mut self.debug_info else {
            return Vec::new();
        };
        match info.find(svma) {
            Ok(frames) => frames,
            Err(source) => {
                problems.push(Problem::DebugInfo { path: path.to_owned(), source });
                Vec::new()
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
    debuginfod_caches: &'a [PathBuf],
}

impl Files<'_> {
    fn open(&self, place: &Place) -> Option<Source> {
        let file = match place {
            Place::Target(path) => root::open(self.root, path),
            Place::Host(path) => root::open(Path::new("/"), path),
        };
        file.ok().map(Source::File)
    }

    fn load(&self, image: &Image, limits: &Limits, problems: &mut Vec<Problem>) -> Loaded {
        let mut debug_file = None;
        if !debug_files::has_debug_info(image) {
            let open = &mut |place: &Place| self.open(place);
            let search = debug_files::find(image, self.path, self.debuginfod_caches, open);
            debug_file = accept(search, problems);
        }
        let (with_info, place) = match &debug_file {
            Some(DebugFile { image, place }) => (image, place.clone()),
            None => (image, Place::Target(self.path.to_owned())),
        };
        let debug_info = debug_files::has_debug_info(with_info)
            .then(|| self.debug_info(with_info, &place, limits, problems))
            .flatten();
        let tables = Origin::ALL.map(|origin| Table { origin, state: TableState::Unread });
        Loaded { debug_file: debug_file.map(|file| file.image), debug_info, tables: tables.into() }
    }

    fn debug_info(
        &self,
        image: &Image,
        place: &Place,
        limits: &Limits,
        problems: &mut Vec<Problem>,
    ) -> Option<DebugInfo> {
        let open = &mut |place: &Place| self.open(place);
        let search = debug_files::find_alternate(image, place, self.debuginfod_caches, open);
        let is_wanted = search.is_some();
        let alternate = search.and_then(|search| accept(search, problems));
        if is_wanted && alternate.is_none() {
            problems.push(Problem::NoAlternate { path: place.path().to_owned() });
        }
        let alternate = alternate.as_ref().map(|file| &file.image);
        match DebugInfo::read(image, alternate, limits.debug_info_bytes) {
            Ok(info) => Some(info),
            Err(source) => {
                problems.push(Problem::DebugInfo { path: place.path().to_owned(), source });
                None
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
