//! Names for addresses: functions, inlined calls and source lines of what a stack points to.
//!
//! A [`Symbolizer`] is given modules (opened files, so that it does not matter what becomes of
//! their paths) and answers with [`Symbol`]s. What cannot be read costs its own names only: it is
//! noted as a [`Problem`] of the module, and the next source of names is tried.

pub mod cache;
pub mod debuginfod;
pub mod demangle;
pub mod dwarf;
mod module;
mod names;
pub mod perf_map;
pub mod root;
pub mod symbol_table;
#[cfg(test)]
mod tests;
pub mod vdso;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

pub use cache::Cache;
pub use demangle::demangle;
pub use dwarf::WorkTime;
use module::Module;
pub use module::Problem;
pub use perf_map::PerfMap;

use crate::elf::debug_files::Debuginfod;
use crate::elf::image::Source;
use crate::profile::Symbol;

/// A file that code was loaded from.
#[derive(Debug)]
pub struct ModuleSource {
    /// As the target's mount namespace names it; `[vdso]` for the vDSO.
    pub path: PathBuf,
    /// An opened file, or [`vdso::image_bytes`].
    pub image: Source,
    /// Where the target's paths begin: `/proc/PID/root`, or what it led to. Debug files are looked for below it.
    pub root: PathBuf,
}

/// What a symbolizer may use.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Debug information of one module, decompressed. A module with more is named by its symbol
    /// tables.
    pub debug_info_bytes: u64,
    /// For all modules together. The module in use is kept, however large.
    pub retained_bytes: usize,
    /// For the debug information of one module.
    pub time: WorkTime,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { debug_info_bytes: 256 << 20, retained_bytes: 24 << 20, time: WorkTime::default() }
    }
}

/// One module of a [`Symbolizer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ModuleHandle(usize);

/// Names addresses. Fastest when the addresses of one module are asked for together.
#[derive(Debug)]
pub struct Symbolizer {
    means: Means,
    modules: Vec<Module>,
    calls: u64,
}

/// What every module is named with.
#[derive(Debug)]
struct Means {
    limits: Limits,
    debuginfod: Debuginfod,
    cache: Option<Cache>,
}

/// Calls between two looks at the memory that is retained.
const CALLS_BETWEEN_TRIMS: u64 = 256;

impl Symbolizer {
    /// `debuginfod_caches`: see [`debuginfod_caches`].
    pub fn new(limits: Limits, debuginfod_caches: Vec<PathBuf>) -> Symbolizer {
        let debuginfod = Debuginfod { caches: debuginfod_caches, ..Debuginfod::default() };
        let means = Means { limits, debuginfod, cache: None };
        Symbolizer { means, modules: Vec::new(), calls: 0 }
    }

    /// Uses the names that earlier sessions kept, for modules that are added from now on.
    pub fn use_cache(&mut self, cache: Cache) {
        self.means.cache = Some(cache);
    }

    /// Keeps the names found so far for later sessions.
    pub fn save(&mut self) {
        let Some(cache) = &self.means.cache else { return };
        let mut is_larger = false;
        for module in &mut self.modules {
            is_larger |= module.save(cache);
        }
        if is_larger {
            cache.trim();
        }
    }

    /// Takes up a module. Its headers are read, and nothing else until an address is asked for. The
    /// file stays open until [`Symbolizer::close`].
    pub fn add(&mut self, source: ModuleSource) -> ModuleHandle {
        self.modules.push(Module::open(source, self.means.cache.is_some()));
        ModuleHandle(self.modules.len() - 1)
    }

    /// The functions at `svma`, an address as the file states it; innermost inlined first, empty
    /// when nothing names it. `after_call`: `svma` is a return address, and the call before it is
    /// meant, which may be the last instruction of its function.
    pub fn name(&mut self, module: ModuleHandle, svma: u64, after_call: bool) -> Vec<Symbol> {
        self.calls += 1;
        let calls = self.calls;
        let Some(named) = self.modules.get_mut(module.0) else {
            return Vec::new();
        };
        let was_loaded = named.is_loaded();
        let svma = svma.saturating_sub(u64::from(after_call));
        let symbols = named.name(svma, calls, &self.means);
        let is_new_in_memory = !was_loaded && named.is_loaded();
        if is_new_in_memory || calls.is_multiple_of(CALLS_BETWEEN_TRIMS) {
            self.trim(module);
        }
        symbols
    }

    /// Has debuginfod asked for the debug files that modules lack, of those modules that names were
    /// asked for. Returns the modules that have better names now. Takes as long as the client's
    /// patience.
    pub fn fetch(&mut self, client: &mut debuginfod::Client) -> Vec<ModuleHandle> {
        let mut improved = BTreeSet::new();
        // The second round is for what dwz moved out of the files of the first.
        for _ in 0..2 {
            let wanted: BTreeMap<Vec<u8>, Vec<usize>> = self.wanted(client);
            let build_ids: Vec<Vec<u8>> = wanted.keys().cloned().collect();
            let answers = client.fetch(&build_ids);
            for ((build_id, modules), answer) in wanted.into_iter().zip(answers) {
                let answer =
                    answer.map(|path| self.means.debuginfod.fetched.insert(build_id, path));
                for index in modules {
                    let Some(module) = self.modules.get_mut(index) else { continue };
                    match &answer {
                        Ok(_) => {
                            if module.reload(&self.means) {
                                improved.insert(index);
                            }
                            self.trim(ModuleHandle(index));
                        }
                        Err(error) => module.not_fetched(error.clone()),
                    }
                }
            }
        }
        improved.into_iter().map(ModuleHandle).collect()
    }

    /// Is there anything that [`Symbolizer::fetch`] would ask for?
    pub fn wants(&self, client: &debuginfod::Client) -> bool {
        !self.wanted(client).is_empty()
    }

    /// Build ids of debug files to ask for, with the modules that lack them.
    fn wanted(&self, client: &debuginfod::Client) -> BTreeMap<Vec<u8>, Vec<usize>> {
        let mut wanted: BTreeMap<Vec<u8>, Vec<usize>> = BTreeMap::new();
        for (index, module) in self.modules.iter().enumerate() {
            if let Some(build_id) = module.missing()
                && !client.has_asked(build_id)
            {
                wanted.entry(build_id.to_vec()).or_default().push(index);
            }
        }
        wanted
    }

    /// GNU build id of the module, lower-case hexadecimal.
    pub fn build_id(&self, module: ModuleHandle) -> Option<String> {
        self.modules.get(module.0)?.build_id()
    }

    /// What went wrong with the module's names so far.
    pub fn problems(&self, module: ModuleHandle) -> &[Problem] {
        self.modules.get(module.0).map_or(&[], Module::problems)
    }

    /// Closes the module's file and forgets what was read of it; it has no names from now on.
    pub fn close(&mut self, module: ModuleHandle) {
        if let Some(module) = self.modules.get_mut(module.0) {
            module.close();
        }
    }

    /// Gives up everything that was read of all modules, except for the opened files: for an agent
    /// that will not name anything for a while. Later calls read it again.
    pub fn rest(&mut self) {
        for module in &mut self.modules {
            module.unload();
        }
    }

    /// Unloads the modules that were not used for longest until the rest fits.
    fn trim(&mut self, in_use: ModuleHandle) {
        let mut sizes: Vec<(u64, usize, usize)> = self
            .modules
            .iter()
            .enumerate()
            .filter(|(_, module)| module.is_loaded() || module.size_bytes() > 0)
            .map(|(index, module)| (module.last_call(), index, module.size_bytes()))
            .collect();
        sizes.sort_unstable();
        let mut total: usize = sizes.iter().map(|(_, _, size)| size).sum();
        for (_, index, size) in sizes {
            if total <= self.means.limits.retained_bytes {
                return;
            }
            if index == in_use.0 {
                continue;
            }
            if let Some(module) = self.modules.get_mut(index) {
                module.unload();
                total -= size;
            }
        }
    }
}

/// Where debuginfod clients of the current user keep what they fetched (debuginfod-find(1)):
/// `variable` looks up the environment.
pub fn debuginfod_caches(variable: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    let home = variable("HOME");
    let below_home = |path: &str| home.as_ref().map(|home| home.join(path));
    [
        variable("DEBUGINFOD_CACHE_PATH"),
        variable("XDG_CACHE_HOME").map(|cache| cache.join("debuginfod_client")),
        below_home(".cache/debuginfod_client"),
        below_home(".debuginfod_client_cache"),
    ]
    .into_iter()
    .flatten()
    .filter(|path| path.is_absolute())
    .collect()
}
