//! Split DWARF: units of which the file itself has only a skeleton. The rest is in a `.dwo` file for
//! each, where the compiler put it, or in the `.dwp` file that dwp made of them.
//!
//! A skeleton has the address ranges, the lines, and an id that says which unit belongs to it.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use gimli::{
    DebugAbbrevOffset, DebugInfoOffset, DwoId, EndianSlice, IndexSectionId, LittleEndian,
    Section as _, SectionId,
};

use super::{
    Budget, Dwarf, DwarfError, Part, Reader, Root, Unit, UnitOffsets, abbreviations, load,
    open_unit,
};
use crate::elf::debug_files::{Open, Place};
use crate::elf::image::{Image, ImageError, Source};

/// Larger `.dwo` files are not read: a compiler makes one from one source file.
const FILE_MAX_BYTES: u64 = 64 << 20;
/// Contents of `.dwo` files are dropped beyond this.
const FILES_KEPT_BYTES: usize = 16 << 20;
const PATH_MAX_BYTES: usize = 4096;

/// Why the rest of a unit is not known.
#[derive(Debug, thiserror::Error)]
pub enum SplitError {
    #[error(
        "{} is not there: leave .dwo files where they were made, or pack them with dwp", .0.display()
    )]
    Missing(PathBuf),
    #[error("{} is of another compilation: build the program again", .0.display())]
    OtherId(PathBuf),
    #[error("{} {source}", .path.display())]
    Image { path: PathBuf, source: ImageError },
}

/// The split units of one module.
#[derive(Debug, Default)]
pub(super) struct Splits {
    /// By the number of the skeleton.
    ids: HashMap<u32, DwoId>,
    /// Files that may have something beside them: the module and its debug file.
    beside: Vec<Place>,
    package: Option<Package>,
    units: HashMap<u32, Option<SplitUnit>>,
    /// The first one; others are of its kind.
    error: Option<SplitError>,
}

#[derive(Debug)]
enum Package {
    Absent,
    Read(Box<PackageSections>),
}

#[derive(Debug)]
struct PackageSections {
    index: Vec<u8>,
    sections: gimli::DwarfSections<Vec<u8>>,
    bytes: usize,
}

/// Where a unit was found.
#[derive(Debug)]
struct SplitUnit {
    /// `None` when it is in the package.
    sections: Option<Box<gimli::DwarfSections<Vec<u8>>>>,
    bytes: usize,
    offset: usize,
    offsets: UnitOffsets,
}

/// What is behind a skeleton.
pub(super) struct View<'a> {
    pub part: Part,
    pub dwarf: Dwarf<'a>,
    /// Of the unit.
    pub offset: usize,
    /// Of all units in the same file.
    pub offsets: &'a UnitOffsets,
}

impl Splits {
    pub fn new(beside: Vec<Place>) -> Splits {
        Splits { beside, ..Splits::default() }
    }

    pub fn add(&mut self, number: u32, id: DwoId) {
        self.ids.insert(number, id);
    }

    /// Is there something behind the unit of that number that was not looked for yet?
    pub fn is_unopened(&self, number: u32) -> bool {
        self.ids.contains_key(&number) && !self.units.contains_key(&number)
    }

    /// Is there something behind it that was not found?
    pub fn lacks(&self, number: u32) -> bool {
        self.ids.contains_key(&number) && matches!(self.units.get(&number), None | Some(None))
    }

    pub fn error(&self) -> Option<&SplitError> {
        self.error.as_ref()
    }

    pub fn size_bytes(&self) -> usize {
        let package = match &self.package {
            Some(Package::Read(package)) => package.bytes,
            Some(Package::Absent) | None => 0,
        };
        package + self.units_bytes() + self.ids.len() * 32
    }

    fn units_bytes(&self) -> usize {
        self.units.values().flatten().map(|unit| unit.bytes + unit.offsets.len() * 8).sum()
    }

    /// Looks for what is behind the skeleton of that number.
    pub fn open(
        &mut self,
        number: u32,
        dwarf: &Dwarf,
        skeleton: &(Unit, Root),
        package_limit_bytes: u64,
        open: &mut Open,
        budget: &mut Budget,
    ) -> Result<(), DwarfError> {
        let Some(&id) = self.ids.get(&number) else {
            return Ok(());
        };
        if self.package.is_none() {
            self.package = Some(self.open_package(package_limit_bytes, open));
        }
        if self.units_bytes() > FILES_KEPT_BYTES {
            self.units.clear();
        }
        let mut unit = None;
        if let Some(Package::Read(package)) = &self.package
            && let Some(dwarf) = packaged(package, id, dwarf)
        {
            let found = find_unit(&dwarf, id, budget)?;
            unit = found.map(|(offset, offsets)| SplitUnit {
                sections: None,
                bytes: 0,
                offset,
                offsets,
            });
        }
        if unit.is_none() {
            let (skeleton, root) = skeleton;
            let name = root.dwo_name.and_then(|name| dwarf.attr_string(skeleton, name).ok());
            let name = name.map(|name| name.slice()).unwrap_or_default();
            let directory = skeleton.comp_dir.map(|directory| directory.slice());
            let places = places(name, directory.unwrap_or_default(), &self.beside);
            match open_file(&places, id, dwarf, open, budget)? {
                Ok(found) => unit = Some(found),
                Err(error) => drop(self.error.get_or_insert(error)),
            }
        }
        self.units.insert(number, unit);
        Ok(())
    }

    /// `None` when it was not found.
    pub fn view<'a>(&'a self, number: u32, dwarf: &Dwarf<'a>) -> Option<View<'a>> {
        let unit = self.units.get(&number)?.as_ref()?;
        let dwarf = match (&unit.sections, &self.package) {
            (Some(sections), _) => borrowed(sections, dwarf),
            (None, Some(Package::Read(package))) => {
                packaged(package, *self.ids.get(&number)?, dwarf)?
            }
            (None, _) => return None,
        };
        Some(View { part: Part::Split(number), dwarf, offset: unit.offset, offsets: &unit.offsets })
    }

    fn open_package(&mut self, limit_bytes: u64, open: &mut Open) -> Package {
        for place in self.beside.iter().flat_map(package_places) {
            let Some(source) = open(&place) else { continue };
            let path = place.path().to_owned();
            let mut left = limit_bytes;
            let read = |source: Source, left: &mut u64| -> Result<_, ImageError> {
                let image = Image::open(source)?;
                let index = load_split(&image, SectionId::DebugCuIndex, left)?;
                let sections = gimli::DwarfSections::load(|id| load_split(&image, id, left))?;
                Ok((index, sections))
            };
            match read(source, &mut left) {
                Ok((index, sections)) => {
                    let bytes = (limit_bytes - left) as usize;
                    return Package::Read(Box::new(PackageSections { index, sections, bytes }));
                }
                Err(source) => drop(self.error.get_or_insert(SplitError::Image { path, source })),
            }
        }
        Package::Absent
    }
}

/// `program.dwp` for `program` and `program.debug`.
fn package_places(file: &Place) -> Vec<Place> {
    let with_name = |stem: &OsStr| {
        let mut name = stem.to_owned();
        name.push(".dwp");
        file.sibling(Path::new(&name))
    };
    let path = file.path();
    let mut places: Vec<Place> = path.file_name().map(with_name).into_iter().collect();
    if path.extension() == Some(OsStr::new("debug")) {
        places.extend(path.file_stem().map(with_name));
    }
    places
}

/// Where the compiler says that it put the file, and beside the program.
fn places(name: &[u8], directory: &[u8], beside: &[Place]) -> Vec<Place> {
    if name.is_empty() || name.len() + directory.len() > PATH_MAX_BYTES {
        return Vec::new();
    }
    let name = Path::new(OsStr::from_bytes(name));
    let path = Path::new(OsStr::from_bytes(directory)).join(name);
    let mut places = Vec::new();
    if path.is_absolute() {
        places.push(Place::Target(path));
    }
    for file in beside {
        if name.is_relative() {
            places.push(file.sibling(name));
        }
        places.extend(name.file_name().map(|name| file.sibling(Path::new(name))));
    }
    places
}

fn open_file(
    places: &[Place],
    id: DwoId,
    parent: &Dwarf,
    open: &mut Open,
    budget: &mut Budget,
) -> Result<Result<SplitUnit, SplitError>, DwarfError> {
    let named = places.first().map(|place| place.path().to_owned()).unwrap_or_default();
    let mut error = SplitError::Missing(named);
    for place in places {
        let Some(source) = open(place) else { continue };
        let path = place.path().to_owned();
        let mut left = FILE_MAX_BYTES;
        let read = |source: Source, left: &mut u64| -> Result<_, ImageError> {
            let image = Image::open(source)?;
            gimli::DwarfSections::load(|id| load_split(&image, id, left))
        };
        let sections = match read(source, &mut left) {
            Ok(sections) => sections,
            Err(source) => {
                error = SplitError::Image { path, source };
                continue;
            }
        };
        match find_unit(&borrowed(&sections, parent), id, budget)? {
            Some((offset, offsets)) => {
                let bytes = (FILE_MAX_BYTES - left) as usize;
                let sections = Some(Box::new(sections));
                return Ok(Ok(SplitUnit { sections, bytes, offset, offsets }));
            }
            None => error = SplitError::OtherId(path),
        }
    }
    Ok(Err(error))
}

/// The offset of the unit with that id, and of all units.
fn find_unit(
    dwarf: &Dwarf,
    id: DwoId,
    budget: &mut Budget,
) -> Result<Option<(usize, UnitOffsets)>, DwarfError> {
    let mut offsets = UnitOffsets::new();
    let mut found = None;
    let mut headers = dwarf.units();
    while let Ok(Some(header)) = headers.next() {
        budget.keep()?;
        budget.check_time()?;
        let Some(DebugInfoOffset(offset)) = header.debug_info_offset() else { continue };
        offsets.push(offset);
        let theirs = match header.type_() {
            gimli::UnitType::SplitCompilation(theirs) => Some(theirs),
            // Before DWARF 5 the id is an attribute.
            gimli::UnitType::Compilation if found.is_none() => {
                let DebugAbbrevOffset(table) = header.debug_abbrev_offset();
                let unit = abbreviations(dwarf, table)
                    .and_then(|abbreviations| open_unit(dwarf, header, abbreviations));
                unit.ok().and_then(|(unit, _)| unit.dwo_id)
            }
            _ => None,
        };
        if theirs == Some(id) {
            found.get_or_insert(offset);
        }
    }
    Ok(found.map(|offset| (offset, offsets)))
}

fn borrowed<'a>(sections: &'a gimli::DwarfSections<Vec<u8>>, parent: &Dwarf<'a>) -> Dwarf<'a> {
    let mut dwarf = sections.borrow(|bytes| EndianSlice::new(bytes, LittleEndian));
    dwarf.make_dwo(parent);
    dwarf
}

/// The parts of a package's sections that belong to one unit. gimli's own function also wants the
/// sections that names do not need.
fn packaged<'a>(package: &'a PackageSections, id: DwoId, parent: &Dwarf<'a>) -> Option<Dwarf<'a>> {
    let index = gimli::DebugCuIndex::new(&package.index, LittleEndian).index().ok()?;
    let row = index.find(id.0)?;
    let whole = package.sections.borrow(|bytes| EndianSlice::new(bytes, LittleEndian));
    let mut dwarf = package.sections.borrow(|bytes| EndianSlice::new(bytes, LittleEndian));
    for part in index.sections(row).ok()? {
        let cut = |section: &Reader<'a>| -> Option<Reader<'a>> {
            let begin = part.offset as usize;
            let bytes = section.slice().get(begin..begin.checked_add(part.size as usize)?)?;
            Some(EndianSlice::new(bytes, LittleEndian))
        };
        match part.section {
            IndexSectionId::DebugAbbrev => {
                dwarf.debug_abbrev = cut(whole.debug_abbrev.reader())?.into();
            }
            IndexSectionId::DebugInfo => {
                dwarf.debug_info = cut(whole.debug_info.reader())?.into();
            }
            IndexSectionId::DebugStrOffsets => {
                dwarf.debug_str_offsets = cut(whole.debug_str_offsets.reader())?.into();
            }
            IndexSectionId::DebugRngLists => {
                let lists = cut(whole.ranges.debug_rnglists().reader())?.into();
                dwarf.ranges = gimli::RangeLists::new(*whole.ranges.debug_ranges(), lists);
            }
            _ => {}
        }
    }
    dwarf.make_dwo(parent);
    Some(dwarf)
}

/// Reads a section of a `.dwo` or `.dwp` file when names need it.
fn load_split(image: &Image, id: SectionId, left: &mut u64) -> Result<Vec<u8>, ImageError> {
    let is_needed = matches!(
        id,
        SectionId::DebugAbbrev
            | SectionId::DebugCuIndex
            | SectionId::DebugInfo
            | SectionId::DebugRngLists
            | SectionId::DebugStr
            | SectionId::DebugStrOffsets
    );
    match id.dwo_name().filter(|_| is_needed) {
        Some(name) => load(image, name, left),
        None => Ok(Vec::new()),
    }
}
