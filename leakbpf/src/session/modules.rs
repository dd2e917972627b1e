//! The files that code came from: opened while a process still has them mapped, so that they can
//! be named after it is gone.

use std::{collections::HashMap, sync::Arc};

use crate::{
    elf::{image::Source, layout::Layout},
    process::{
        Pid,
        mapped_file::MappedFile,
        maps::{Backing, FileId, Maps},
    },
    profile::{self, ModuleId, Symbol},
    symbolize::{Limits, ModuleHandle, ModuleSource, Symbolizer, debuginfod_caches, vdso},
};

/// What frames of one file are named from.
struct Module {
    about: profile::Module,
    layout: Layout,
    /// `None` when the file could not be opened.
    source: Option<ModuleHandle>,
}

/// All modules of the session.
pub struct Modules {
    modules: Vec<Module>,
    by_file: HashMap<FileId, ModuleId>,
    vdso: Option<ModuleId>,
    symbolizer: Symbolizer,
    names: HashMap<(ModuleId, u64, bool), Arc<[Symbol]>>,
}

impl Modules {
    pub fn new() -> Self {
        Self {
            modules: Vec::new(),
            by_file: HashMap::new(),
            vdso: None,
            symbolizer: Symbolizer::new(
                Limits::default(),
                debuginfod_caches(|name| std::env::var_os(name).map(Into::into)),
            ),
            names: HashMap::new(),
        }
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
        let path = match mapping.map(|mapping| &mapping.backing) {
            Some(Backing::File { path, .. }) => path.clone(),
            _ => std::path::PathBuf::from("[unknown]"),
        };
        let opened = mapping.and_then(|mapping| MappedFile::open(pid, mapping).ok());
        let file = opened.and_then(|opened| opened.file().try_clone().ok());
        let layout = file.as_ref().and_then(|file| Layout::of_file(file).ok()).unwrap_or_default();
        let source = file.map(|file| {
            let root = pid.proc_path("root");
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
        let module = self.push(Module { about, layout, source });
        self.by_file.insert(id, module);
        module
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
        let module = self.push(Module { about, layout, source });
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
}

impl Default for Modules {
    fn default() -> Self {
        Self::new()
    }
}
