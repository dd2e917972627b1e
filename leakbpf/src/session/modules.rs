//! The files that code came from: opened while a process still has them mapped, so that they can
//! be named after it is gone.

use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use super::numbers::{Base, Numbered, Numbers, Opened, Origin, Stamp};
use crate::{
    elf::{image::Source, layout::Layout},
    process::{
        Pid,
        mapped_file::MappedFile,
        maps::{Backing, FileId, Mapping, Maps},
        root_directory::{RootDirectory, RootId},
    },
    profile::{self, ModuleId, Symbol},
    symbolize::{
        Cache, Limits, ModuleHandle, ModuleSource, Symbolizer,
        debuginfod::{Client, Patience},
        debuginfod_caches, vdso,
    },
};

/// What frames of one file are named from.
struct Module {
    about: profile::Module,
    /// `None` for the vDSO.
    file: Option<FileId>,
    layout: Layout,
    /// `None` when the file could not be opened.
    source: Option<ModuleHandle>,
}

/// All modules of the session.
pub struct Modules {
    modules: Vec<Module>,
    /// The file that has the id now.
    by_file: HashMap<FileId, ModuleId>,
    by_stamp: HashMap<(FileId, Option<Stamp>), ModuleId>,
    numbers: Numbers,
    vdso: Option<ModuleId>,
    /// Debug files are looked for below them, perhaps after the last process is gone.
    roots: HashMap<RootId, RootDirectory>,
    symbolizer: Symbolizer,
    debuginfod: Option<Client>,
    names: HashMap<(ModuleId, u64, bool), Arc<[Symbol]>>,
}

impl Modules {
    pub fn new(numbers: Numbers) -> Self {
        Self {
            modules: Vec::new(),
            by_file: HashMap::new(),
            by_stamp: HashMap::new(),
            numbers,
            vdso: None,
            roots: HashMap::new(),
            symbolizer: Symbolizer::new(
                Limits::default(),
                debuginfod_caches(|name| std::env::var_os(name).map(Into::into)),
            ),
            debuginfod: Client::new(Patience::of(|name| std::env::var_os(name)), |name| {
                std::env::var_os(name)
            }),
            names: HashMap::new(),
        }
    }

    /// Uses the names that earlier sessions kept, if there is a place for them.
    pub fn use_cache(&mut self) {
        if let Some(cache) = Cache::open(|name| std::env::var_os(name).map(Into::into)) {
            self.symbolizer.use_cache(cache);
        }
    }

    /// Keeps the names for later sessions.
    pub fn save(&mut self) {
        self.symbolizer.save();
    }

    /// As profiles list them.
    pub fn list(&self) -> Vec<profile::Module> {
        self.modules.iter().map(|module| module.about.clone()).collect()
    }

    pub fn about(&self, id: ModuleId) -> Option<&profile::Module> {
        self.modules.get(id.0).map(|module| &module.about)
    }

    /// The module of a file that `pid` has mapped; opens it the first time.
    pub fn of_file(&mut self, pid: Pid, id: FileId, maps: Option<&Maps>) -> ModuleId {
        if let Some(&known) = self.by_file.get(&id) {
            return known;
        }
        let mapping = maps.and_then(|maps| {
            maps.iter().find(|mapping| mapping.permissions.execute && mapping.file_id() == Some(id))
        });
        let opened = mapping.and_then(|mapping| MappedFile::open(pid, mapping).ok());
        let file = opened.and_then(|opened| opened.file().try_clone().ok());
        self.add(pid, id, mapping, file)
    }

    /// The module of a number that the kernel side has sent, and the address that it states itself.
    pub fn of_number(
        &mut self,
        number: u32,
        offset: u32,
        pid: Pid,
        maps: Option<&Maps>,
    ) -> (ModuleId, u64) {
        let offset = u64::from(offset);
        let numbered = self.numbers.get(number);
        let module = match numbered.map(|numbered| (numbered.origin, numbered.stamp)) {
            Some((Origin::File(id), stamp)) => match self.by_stamp.get(&(id, stamp)) {
                Some(&known) => known,
                None => self.of_file(pid, id, maps),
            },
            Some((Origin::Vdso, _)) => self.vdso(),
            // The kernel side has no others.
            None => self.nameless(),
        };
        match numbered {
            Some(Numbered { base: Base::Svma(base), .. }) => (module, base.saturating_add(offset)),
            _ => (module, self.svma(module, offset)),
        }
    }

    /// The file of a module (`None` for the vDSO), and where it holds the byte at an address that
    /// it states.
    pub fn in_file(&self, module: ModuleId, svma: u64) -> Option<(Option<FileId>, u64)> {
        let module = self.modules.get(module.0)?;
        Some((module.file, module.layout.file_offset(svma)?))
    }

    /// Takes over the files that were opened for their tables.
    pub fn take_opened(&mut self) {
        for Opened { pid, mapping, file } in self.numbers.take_opened() {
            let Some(id) = mapping.file_id() else { continue };
            if !self.by_stamp.contains_key(&(id, Stamp::of(&file))) {
                self.add(pid, id, Some(&mapping), Some(file));
            }
        }
    }

    fn add(
        &mut self,
        pid: Pid,
        id: FileId,
        mapping: Option<&Mapping>,
        file: Option<File>,
    ) -> ModuleId {
        let path = match mapping.map(|mapping| &mapping.backing) {
            Some(Backing::File { path, .. }) => path.clone(),
            _ => PathBuf::from("[unknown]"),
        };
        let stamp = file.as_ref().and_then(Stamp::of);
        let layout = file.as_ref().and_then(|file| Layout::of_file(file).ok()).unwrap_or_default();
        let source = file.map(|file| {
            let root = root_path(&mut self.roots, pid);
            self.symbolizer.add(ModuleSource {
                path: path.clone(),
                image: Source::File(file),
                root,
            })
        });
        let about = profile::Module {
            path: path.to_string_lossy().into_owned(),
            build_id: source.and_then(|source| self.symbolizer.build_id(source)),
            mapping: mapping
                .map(|mapping| (mapping.start_avma, mapping.end_avma, mapping.file_offset)),
        };
        let module = self.push(Module { about, file: Some(id), layout, source });
        self.by_file.insert(id, module);
        self.by_stamp.insert((id, stamp), module);
        module
    }

    fn nameless(&mut self) -> ModuleId {
        let about = profile::Module { path: "[unknown]".to_owned(), build_id: None, mapping: None };
        self.push(Module { about, file: None, layout: Layout::default(), source: None })
    }

    /// The kernel's page of code; the same in every process.
    pub fn vdso(&mut self) -> ModuleId {
        if let Some(known) = self.vdso {
            return known;
        }
        let image = vdso::image_bytes();
        let layout =
            image.as_deref().and_then(|bytes| Layout::of_bytes(bytes).ok()).unwrap_or_default();
        let source = image.map(|bytes| {
            self.symbolizer.add(ModuleSource {
                path: "[vdso]".into(),
                image: Source::Memory(bytes),
                root: "/".into(),
            })
        });
        let about = profile::Module {
            path: "[vdso]".to_owned(),
            build_id: source.and_then(|source| self.symbolizer.build_id(source)),
            mapping: None,
        };
        let module = self.push(Module { about, file: None, layout, source });
        self.vdso = Some(module);
        module
    }

    fn push(&mut self, module: Module) -> ModuleId {
        self.modules.push(module);
        ModuleId(self.modules.len() - 1)
    }

    /// The address that the file itself states for a byte of it.
    pub fn svma(&self, module: ModuleId, file_offset: u64) -> u64 {
        self.modules
            .get(module.0)
            .and_then(|module| module.layout.svma(file_offset))
            .unwrap_or(file_offset)
    }

    /// Names an address, innermost inlined function first. A return address belongs to the call
    /// before it.
    pub fn name(&mut self, module: ModuleId, svma: u64, is_return: bool) -> Arc<[Symbol]> {
        if let Some(known) = self.names.get(&(module, svma, is_return)) {
            return known.clone();
        }
        let symbols = match self.modules.get(module.0).and_then(|module| module.source) {
            Some(source) => self.symbolizer.name(source, svma, is_return),
            None => Vec::new(),
        };
        let symbols: Arc<[Symbol]> = symbols.into();
        self.names.insert((module, svma, is_return), symbols.clone());
        symbols
    }

    /// How long [`Modules::fetch_debug_files`] may take; `None` when it would ask no server.
    pub fn lack_debug_files(&self) -> Option<Duration> {
        let client = self.debuginfod.as_ref().filter(|client| self.symbolizer.wants(client))?;
        Some(client.patience().session)
    }

    /// [`Modules::fetch_debug_files`] goes on without the rest when `interrupted` is set.
    pub fn end_fetching_with(&mut self, interrupted: &Arc<AtomicBool>) {
        if let Some(client) = &mut self.debuginfod {
            client.end_with(Arc::clone(interrupted));
        }
    }

    /// Has debuginfod asked for the debug files that the modules named so far lack, which may take
    /// half a minute. Returns the modules whose addresses have better names now.
    pub fn fetch_debug_files(&mut self) -> BTreeSet<ModuleId> {
        let Some(client) = &mut self.debuginfod else {
            return BTreeSet::new();
        };
        let sources = self.symbolizer.fetch(client);
        let improved = (0..self.modules.len()).map(ModuleId).filter(|id| {
            let source = self.modules.get(id.0).and_then(|module| module.source);
            source.is_some_and(|source| sources.contains(&source))
        });
        let improved: BTreeSet<ModuleId> = improved.collect();
        self.names.retain(|(module, _, _), _| !improved.contains(module));
        improved
    }

    /// What kept code of the stacks from being named, in words; of many the first ones.
    pub fn problems(&self) -> Vec<String> {
        const SHOWN: usize = 8;
        let named: BTreeSet<ModuleId> = self.names.keys().map(|(module, _, _)| *module).collect();
        let sources = named.iter().filter_map(|id| self.modules.get(id.0)?.source);
        let problems = sources.flat_map(|source| self.symbolizer.problems(source));
        let all: BTreeSet<String> = problems.map(ToString::to_string).collect();
        let hidden = all.len().saturating_sub(SHOWN);
        let mut shown: Vec<String> = all.into_iter().take(SHOWN).collect();
        if hidden > 0 {
            shown.push(format!("names are missing for {hidden} more reasons like these"));
        }
        shown
    }
}

/// Where the paths of `pid` begin; held open from now on.
fn root_path(roots: &mut HashMap<RootId, RootDirectory>, pid: Pid) -> PathBuf {
    match RootDirectory::open(pid) {
        Ok(root) => roots.entry(root.id().clone()).or_insert(root).path(),
        Err(_) => pid.proc_path("root"),
    }
}
