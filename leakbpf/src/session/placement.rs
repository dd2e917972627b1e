//! Which probes a process gets, and placing them in an order that never counts a block whose
//! release would go unseen.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs::File,
    io::Read as _,
    num::NonZeroU32,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    elf::{
        debug_files::{self, Debuginfod, Place},
        file::ElfFile,
        image::{Image, Source},
    },
    probe::{
        attach::{Link, Site},
        discover::{FilePlan, discover},
        kernel::{Kernel, Program},
    },
    process::{
        Pid,
        mapped_file::MappedFile,
        maps::{Backing, ExecutableFile, FileId, Maps},
    },
    symbolize::{debuginfod_caches, root},
};
use leakbpf_common::abi::{Cookie, Role};

/// Largest file that is read into memory because its owner could change it while it is mapped.
const MAX_READ_BYTES: u64 = 512 << 20;

/// A file that was looked at for allocator functions.
#[derive(Debug, Clone)]
pub struct LookedAt {
    pub path: PathBuf,
    pub id: FileId,
    /// Why it could not be looked at.
    pub plan: Result<Arc<FilePlan>, String>,
}

/// Plans of all files met so far: a library is read once, however many processes map it.
#[derive(Default)]
pub struct Plans {
    known: HashMap<FileId, Result<Arc<FilePlan>, String>>,
}

impl Plans {
    /// Looks at every file that `maps` can run code from.
    pub fn of(&mut self, pid: Pid, maps: &Maps) -> Vec<LookedAt> {
        maps.executable_files().iter().map(|file| self.look_at(pid, file)).collect()
    }

    fn look_at(&mut self, pid: Pid, file: &ExecutableFile<'_>) -> LookedAt {
        let mapping = file.mappings[0];
        let path = match &mapping.backing {
            Backing::File { path, .. } => path.clone(),
            _ => PathBuf::new(),
        };
        let plan = match self.known.get(&file.id) {
            Some(known) => known.clone(),
            None => match MappedFile::open(pid, mapping) {
                // The next process that maps the file may live longer.
                Err(error) => Err(error.to_string()),
                Ok(opened) => {
                    let plan = self.read(pid, &path, &opened);
                    self.known.insert(file.id, plan.clone());
                    plan
                }
            },
        };
        LookedAt { path, id: file.id, plan }
    }

    fn read(&self, pid: Pid, path: &Path, opened: &MappedFile) -> Result<Arc<FilePlan>, String> {
        let bytes = FileBytes::of(opened.file()).map_err(|error| error.to_string())?;
        let elf = ElfFile::parse(bytes.as_slice()).map_err(|error| error.to_string())?;
        let plan = discover(&elf, None);
        if !plan.probes.is_empty() || !plan.skipped.is_empty() {
            return Ok(Arc::new(plan));
        }
        // Stripped, perhaps: its debug file still has the names.
        let debug = debug_file(pid, path, opened.file());
        let debug = debug.as_ref().and_then(|file| FileBytes::of(file).ok());
        let debug = debug.as_ref().and_then(|bytes| ElfFile::parse(bytes.as_slice()).ok());
        Ok(Arc::new(match debug {
            Some(debug) => discover(&elf, Some(&debug)),
            None => plan,
        }))
    }
}

/// The separate debug file of a mapped one.
fn debug_file(pid: Pid, path: &Path, file: &File) -> Option<File> {
    let image = Image::open(Source::File(file.try_clone().ok()?)).ok()?;
    let target_root = pid.proc_path("root");
    let open = |place: &Place| match place {
        Place::Target(path) => root::open(&target_root, path).ok(),
        Place::Host(path) => root::open(Path::new("/"), path).ok(),
    };
    let caches = debuginfod_caches(|name| std::env::var_os(name).map(Into::into));
    let debuginfod = Debuginfod { caches, ..Debuginfod::default() };
    let found =
        debug_files::find(&image, path, &debuginfod, &mut |place| open(place).map(Source::File));
    open(&found.found?.place)
}

/// The bytes of a file of another process.
pub enum FileBytes {
    Mapped(memmap2::Mmap),
    Read(Vec<u8>),
}

impl FileBytes {
    /// Maps files that only root can change. Others are read: a mapped file that shrinks kills
    /// whoever touches the missing part (SIGBUS).
    pub fn of(file: &File) -> std::io::Result<Self> {
        let metadata = file.metadata()?;
        if metadata.uid() == 0 && metadata.mode() & 0o022 == 0 {
            // SAFETY: nobody but root can truncate the file while it is mapped.
            return Ok(Self::Mapped(unsafe { memmap2::Mmap::map(file)? }));
        }
        if metadata.len() > MAX_READ_BYTES {
            return Err(std::io::Error::other(format!(
                "larger than {} MiB and not owned by root",
                MAX_READ_BYTES >> 20
            )));
        }
        let mut bytes = Vec::new();
        file.take(MAX_READ_BYTES).read_to_end(&mut bytes)?;
        Ok(Self::Read(bytes))
    }

    pub fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Read(bytes) => bytes,
        }
    }
}

/// One probe to be placed.
struct Placement {
    program: Program,
    path: PathBuf,
    file: FileId,
    site: Site,
    function: String,
    /// It gets a link of its own.
    alone: bool,
}

/// Probes that one link can hold: of one program, in one file.
fn groups(placements: impl Iterator<Item = Placement>) -> Vec<Vec<Placement>> {
    let mut groups: Vec<Vec<Placement>> = Vec::new();
    for new in placements {
        let same = |known: &Placement| {
            (known.program, known.file, known.alone) == (new.program, new.file, new.alone)
        };
        match groups.iter_mut().find(|group| group.first().is_some_and(same)) {
            Some(group) => group.push(new),
            None => groups.push(vec![new]),
        }
    }
    groups
}

/// The probes of one process, or, system-wide, of all.
#[derive(Default)]
pub struct Placed {
    links: Vec<Link>,
    files: HashSet<FileId>,
    sites: BTreeSet<(FileId, u64)>,
    probes: usize,
    pub functions: usize,
    /// All of a program and file share a link, whatever that hides of children.
    pub together: bool,
    /// The thread that the kernel looks for the process's memory through; none for all processes.
    pub carrier: Option<NonZeroU32>,
    /// Names of functions whose probe could not be placed, with the reason.
    pub failed: Vec<(String, String)>,
}

impl Placed {
    pub fn len(&self) -> usize {
        self.probes
    }

    pub fn is_empty(&self) -> bool {
        self.probes == 0
    }

    pub fn files(&self) -> impl Iterator<Item = FileId> {
        self.files.iter().copied()
    }

    pub fn into_links(self) -> Vec<Link> {
        self.links
    }

    /// Where they are.
    pub fn sites(&self) -> impl Iterator<Item = (FileId, u64)> {
        self.sites.iter().copied()
    }

    /// Whether all are links to many places.
    pub fn all_to_many(&self) -> bool {
        self.links.iter().all(Link::is_to_many)
    }

    /// Places the probes of the files that have none yet; `scope` is the process, or none for
    /// every process that maps them. Returns how many functions are new.
    ///
    /// Returns come first (without its beginning a return is ignored), then releases, then what
    /// makes blocks: when the first block is counted, its release is already watched.
    pub fn place(
        &mut self,
        kernel: &mut Kernel,
        pid: Pid,
        scope: Option<NonZeroU32>,
        maps: &Maps,
        looked_at: &[LookedAt],
    ) -> usize {
        let mut leaves = Vec::new();
        let mut exits = HashSet::new();
        let mut frees = Vec::new();
        let mut enters = Vec::new();
        // Held until every probe is placed: their paths lead through these descriptors.
        let mut files = Vec::new();
        let before = self.functions;
        for file in looked_at {
            let Ok(plan) = &file.plan else { continue };
            if self.files.contains(&file.id)
                || (plan.probes.is_empty() && plan.library_event.is_none())
            {
                continue;
            }
            let Some(mapping) = maps
                .iter()
                .find(|mapping| mapping.permissions.execute && mapping.file_id() == Some(file.id))
            else {
                continue;
            };
            let opened = match MappedFile::open(pid, mapping) {
                Ok(opened) => opened,
                Err(error) => {
                    self.failed.push((file.path.display().to_string(), error.to_string()));
                    continue;
                }
            };
            let path = opened.probe_path();
            files.push(opened);
            self.files.insert(file.id);
            if let Some(offset) = plan.library_event {
                leaves.push(Placement {
                    program: Program::LibrariesChanged,
                    path: path.clone(),
                    file: file.id,
                    site: Site { file_offset: offset, cookie: 0 },
                    function: "_dl_debug_state".to_owned(),
                    alone: false,
                });
            }
            for probe in &plan.probes {
                self.functions += 1;
                let site = |program, file_offset| Placement {
                    program,
                    path: path.clone(),
                    file: file.id,
                    site: Site { file_offset, cookie: probe.enter_cookie.pack() },
                    function: probe.function.clone(),
                    alone: false,
                };
                let one_place = probe.leave_file_offset == Some(probe.enter_file_offset);
                if one_place && kernel.has_sessions() {
                    let return_optional = probe.calls_no_other;
                    let cookie = Cookie { return_optional, ..probe.enter_cookie }.pack();
                    let call = site(Program::AllocCall, probe.enter_file_offset);
                    enters.push(Placement { site: Site { cookie, ..call.site }, ..call });
                    continue;
                }
                if let Some(offset) = probe.leave_file_offset {
                    leaves.push(site(Program::AllocLeave, offset));
                }
                // Functions may share their ends.
                for &offset in &probe.exit_file_offsets {
                    if exits.insert((file.id, offset)) {
                        leaves.push(site(Program::AllocExit, offset));
                    }
                }
                if probe.role == Role::Free {
                    frees.push(site(Program::FreeEnter, probe.enter_file_offset));
                } else {
                    let enter = site(Program::AllocEnter, probe.enter_file_offset);
                    // Without a return probe, only this one tells that a child was here before it
                    // had probes of its own: see `inheritance`.
                    let alone =
                        scope.is_some() && probe.leave_file_offset.is_none() && !self.together;
                    enters.push(Placement { alone, ..enter });
                }
            }
        }
        for group in groups(leaves.into_iter().chain(frees).chain(enters)) {
            self.place_group(kernel, group, scope);
        }
        drop(files);
        self.functions - before
    }

    fn place_group(
        &mut self,
        kernel: &mut Kernel,
        group: Vec<Placement>,
        scope: Option<NonZeroU32>,
    ) {
        let Some(Placement { program, path, alone, .. }) = group.first() else { return };
        let sites: Vec<Site> = group.iter().map(|placement| placement.site).collect();
        let placing = match alone {
            true => kernel.place_single(*program, path, &sites, scope),
            false => kernel.place(*program, path, &sites, scope),
        };
        self.links.extend(placing.links);
        let mut refused = placing.refused;
        for placement in group {
            match refused.iter().position(|(site, _)| *site == placement.site) {
                Some(index) => {
                    let (_, error) = refused.swap_remove(index);
                    self.failed.push((placement.function, error.to_string()));
                }
                None => {
                    self.probes += 1;
                    self.sites.insert((placement.file, placement.site.file_offset));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::maps::Device;

    #[test]
    fn one_link_holds_what_is_of_one_program_and_file_in_the_order_of_the_programs() {
        let placement = |program, inode, file_offset, alone| Placement {
            program,
            path: PathBuf::new(),
            file: FileId { device: Device { major: 0, minor: 0 }, inode },
            site: Site { file_offset, cookie: 0 },
            function: String::new(),
            alone,
        };
        let all = [
            placement(Program::AllocLeave, 1, 10, false),
            placement(Program::AllocLeave, 2, 20, false),
            placement(Program::AllocLeave, 1, 30, false),
            placement(Program::FreeEnter, 1, 40, false),
            placement(Program::AllocEnter, 1, 50, true),
            placement(Program::AllocEnter, 1, 60, false),
            placement(Program::AllocEnter, 1, 70, true),
        ];
        let offsets: Vec<Vec<u64>> = groups(all.into_iter())
            .iter()
            .map(|group| group.iter().map(|placement| placement.site.file_offset).collect())
            .collect();
        assert_eq!(offsets, [vec![10, 30], vec![20], vec![40], vec![50, 70], vec![60]]);
    }
}
