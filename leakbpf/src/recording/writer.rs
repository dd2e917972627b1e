use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, Transaction, params};

use super::error::WriteError;
use super::interner::Interner;
use super::schema::{self, meta};
use crate::profile::estimate::Spread;
use crate::profile::{
    Block, Counters, Frame, Module, Process, Profile, Site, SiteKind, StackOutcome, Symbol,
};

/// How many unfinished recordings of one name are kept before a new one is refused.
const MAX_PARTIAL: u32 = 1000;

/// SQLite's page cache. The agent promises to stay small whatever it writes.
const CACHE_KIB: i64 = 2048;

/// Stands for the row of a site that names no process of its profile.
const NO_ROW: i64 = 0;

/// What is known of a session when it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionFacts {
    /// Nanoseconds after the Unix epoch.
    pub started_unix_ns: u64,
    /// `uname -r`.
    pub kernel: String,
    pub hostname: String,
}

/// Writes a recording. Dropped without [`Writer::finish`], it leaves `FILE.partial` with every
/// snapshot that was completed, and nothing when there is none.
pub struct Writer {
    database: Connection,
    path: PathBuf,
    partial: Partial,
    written: Written,
}

/// The file under its first name; goes away with the session that never completed a snapshot.
struct Partial {
    path: PathBuf,
    worth_keeping: bool,
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.worth_keeping {
            // SQLite's own files go when its connection closes, which may come later.
            for ending in ["", "-wal", "-shm"] {
                let mut name = self.path.as_os_str().to_owned();
                name.push(ending);
                let _ = fs::remove_file(name);
            }
        }
    }
}

/// What the file holds already.
struct Written {
    snapshots: i64,
    events: usize,
    processes: HashMap<(u32, u64, usize), i64>,
    process_rows: Vec<Process>,
    modules: HashMap<(String, Option<String>), i64>,
    module_rows: Vec<Module>,
    symbols: Interner<Arc<[Symbol]>>,
    /// Code of a module is the same code when it gets better names; code without one is not.
    frames: Interner<(u64, Option<i64>, u64, Option<i64>)>,
    /// By row id - 1: the symbols of each frame.
    frame_symbols: Vec<Option<i64>>,
    stacks: Interner<(StackOutcome, Box<[i64]>)>,
    sites: Interner<(i64, SiteKind, i64)>,
    /// By row id - 1: the newest row of each site.
    states: Vec<Option<SiteState>>,
    losses: BTreeMap<String, u64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct SiteState {
    counters: Counters,
    oldest_born_ns: Option<i64>,
    youngest_born_ns: Option<i64>,
}

impl Writer {
    /// Begins a recording that will be called `path`. Until then it is `path` with `.partial`
    /// appended (and a number, when an earlier session left such a file: nothing is overwritten).
    pub fn create(path: &Path, facts: &SessionFacts) -> Result<Self, WriteError> {
        if path.is_dir() {
            return Err(WriteError::Directory { path: path.to_owned() });
        }
        // Renaming would put a file in the place of /dev/null.
        if path.exists() && !path.is_file() {
            return Err(WriteError::NotAFile { path: path.to_owned() });
        }
        let partial = reserve_partial(path)?;
        let begin = || -> rusqlite::Result<Connection> {
            let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
                | OpenFlags::SQLITE_OPEN_NO_MUTEX
                | OpenFlags::SQLITE_OPEN_NOFOLLOW;
            let database = Connection::open_with_flags(&partial, flags)?;
            database.busy_timeout(Duration::from_secs(2))?;
            database.pragma_update(None, "application_id", schema::APPLICATION_ID)?;
            database.pragma_update(None, "user_version", schema::VERSION)?;
            database.pragma_update(None, "cache_size", -CACHE_KIB)?;
            // The references are right by construction; checking them doubles the time of a block.
            database.pragma_update(None, "foreign_keys", false)?;
            database.execute_batch("BEGIN")?;
            database.execute_batch(schema::SQL)?;
            for (key, value) in [
                ("started_unix_ns", stored(facts.started_unix_ns).to_string()),
                ("kernel", facts.kernel.clone()),
                ("hostname", facts.hostname.clone()),
                ("leakbpf", env!("CARGO_PKG_VERSION").to_owned()),
            ] {
                database.execute("INSERT INTO meta VALUES (?, ?)", params![key, value])?;
            }
            database.execute_batch("COMMIT")?;
            // A rollback journal that a killed agent leaves can only be rolled back by a reader
            // that may write; a write-ahead log can simply be ignored or read.
            database.pragma_update(None, "journal_mode", "wal")?;
            database.pragma_update(None, "synchronous", "normal")?;
            Ok(database)
        };
        match begin() {
            Ok(database) => Ok(Self {
                database,
                path: path.to_owned(),
                partial: Partial { path: partial, worth_keeping: false },
                written: Written::new(),
            }),
            Err(error) => {
                // Nothing of the session is in it yet; the first error is the one to report.
                let _ = fs::remove_file(&partial);
                Err(WriteError::from_sqlite(&partial, error))
            }
        }
    }

    /// Where the recording is until [`Writer::finish`].
    pub fn partial_path(&self) -> &Path {
        &self.partial.path
    }

    /// Adds the state at an interval. `profile.blocks` is not written.
    pub fn snapshot(&mut self, profile: &Profile) -> Result<(), WriteError> {
        self.transaction(profile, false, std::iter::empty())?;
        self.partial.worth_keeping = true;
        Ok(())
    }

    /// Adds the final state with its blocks, whose sites are those of `profile`, and gives the
    /// file its name. The blocks are written as they come and never held.
    pub fn finish(
        mut self,
        profile: &Profile,
        blocks: impl IntoIterator<Item = Block>,
    ) -> Result<PathBuf, WriteError> {
        self.transaction(profile, true, blocks)?;
        self.partial.worth_keeping = true;
        let Self { database, path, partial, .. } = self;
        let partial = partial.path.clone();
        let close = || -> rusqlite::Result<()> {
            database.pragma_update(None, "journal_mode", "delete")?;
            database.close().map_err(|(_, error)| error)
        };
        close().map_err(|error| WriteError::from_sqlite(&partial, error))?;
        let rename = || {
            File::open(&partial)?.sync_all()?;
            fs::rename(&partial, &path)
        };
        match rename() {
            Ok(()) => Ok(path),
            Err(source) => Err(WriteError::Rename { from: partial, to: path, source }),
        }
    }

    fn transaction(
        &mut self,
        profile: &Profile,
        is_final: bool,
        blocks: impl IntoIterator<Item = Block>,
    ) -> Result<(), WriteError> {
        let write = || -> rusqlite::Result<()> {
            let transaction = self.database.transaction()?;
            let sites = self.written.snapshot(&transaction, profile, is_final)?;
            insert_blocks(&transaction, &sites, profile.duration_ns, blocks)?;
            transaction.commit()?;
            // With the log folded in, the partial file alone is complete. A reader may be in the
            // way, which does no harm: the log stays, and the next snapshot folds it in.
            self.database.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        };
        write().map_err(|error| WriteError::from_sqlite(&self.partial.path, error))
    }
}

/// Creates the file that only this session writes. `create_new` follows no symbolic link that
/// somebody put there.
fn reserve_partial(path: &Path) -> Result<PathBuf, WriteError> {
    let mut number = 0;
    loop {
        let mut name = path.as_os_str().to_owned();
        name.push(".partial");
        if number > 0 {
            name.push(format!(".{number}"));
        }
        let partial = PathBuf::from(name);
        match OpenOptions::new().write(true).create_new(true).mode(0o666).open(&partial) {
            Ok(_) => return Ok(partial),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < MAX_PARTIAL => {
                number += 1;
            }
            Err(source) => {
                return Err(WriteError::Create { path: partial, source });
            }
        }
    }
}

/// What is known of the session when a snapshot is taken.
fn facts_of(profile: &Profile) -> Vec<(&'static str, String)> {
    let cost = &profile.cost;
    let mut facts = vec![
        ("mode", profile.mode.name().to_owned()),
        (meta::TARGET_CPU_NS, stored(cost.target_cpu_ns).to_string()),
        (meta::PROBE_HITS, stored(cost.hits).to_string()),
        (meta::SPENT_NS, stored(cost.spent_ns).to_string()),
        (meta::AGENT_CPU_NS, stored(cost.agent_cpu_ns).to_string()),
        (meta::AGENT_PEAK_RSS_BYTES, stored(cost.agent_peak_rss_bytes).to_string()),
    ];
    let choice = profile.mode.choice().into_iter();
    facts.extend(choice.map(|(key, number)| (key, number.to_string())));
    facts.extend(cost.limit_ppm.map(|ppm| (meta::MAX_OVERHEAD_PPM, ppm.to_string())));
    facts.extend(profile.page_interval.map(|one_in| (meta::PAGE_INTERVAL, one_in.to_string())));
    if let Some(windows) = &profile.windows {
        facts.extend([
            (meta::WINDOWS, windows.count.to_string()),
            (meta::WINDOWS_OPEN_NS, stored(windows.open_ns).to_string()),
            (meta::WINDOWS_EARLY_NS, stored(windows.early_ns).to_string()),
            (meta::SURVIVED_BYTES_VARIANCE, windows.bytes_variance.to_string()),
            (meta::SURVIVED_COUNT_VARIANCE, windows.count_variance.to_string()),
        ]);
    }
    facts
}

fn insert_blocks(
    transaction: &Transaction<'_>,
    sites: &[i64],
    now_ns: u64,
    blocks: impl IntoIterator<Item = Block>,
) -> rusqlite::Result<()> {
    let mut insert = transaction.prepare("INSERT INTO block VALUES (?, ?, ?, ?)")?;
    for block in blocks {
        let Some(&site) = sites.get(block.site.0).filter(|row| **row != NO_ROW) else {
            continue;
        };
        insert.execute((
            site,
            pattern(block.address),
            stored(block.size_bytes),
            born(now_ns, block.age_ns),
        ))?;
    }
    Ok(())
}

impl Written {
    fn new() -> Self {
        Self {
            snapshots: 0,
            events: 0,
            processes: HashMap::new(),
            process_rows: Vec::new(),
            modules: HashMap::new(),
            module_rows: Vec::new(),
            symbols: Interner::new(),
            frames: Interner::new(),
            frame_symbols: Vec::new(),
            stacks: Interner::new(),
            sites: Interner::new(),
            states: Vec::new(),
            losses: BTreeMap::new(),
        }
    }

    /// Returns the row of each site of `profile`.
    fn snapshot(
        &mut self,
        transaction: &Transaction<'_>,
        profile: &Profile,
        is_final: bool,
    ) -> rusqlite::Result<Vec<i64>> {
        self.snapshots += 1;
        transaction.execute(
            "INSERT INTO snapshot VALUES (?, ?, ?)",
            params![self.snapshots, stored(profile.duration_ns), is_final],
        )?;
        let mut replace =
            transaction.prepare_cached("INSERT OR REPLACE INTO meta VALUES (?, ?)")?;
        for (key, value) in facts_of(profile) {
            replace.execute(params![key, value])?;
        }
        let processes = self.processes(transaction, &profile.processes)?;
        let modules = self.modules(transaction, &profile.modules)?;
        let sites = self.sites(transaction, profile, &processes, &modules)?;
        self.counters(transaction, profile, &sites, is_final)?;
        self.losses(transaction, &profile.losses)?;
        let mut insert =
            transaction.prepare_cached("INSERT INTO event (at_ns, pid, text) VALUES (?, ?, ?)")?;
        for event in profile.events.iter().skip(self.events) {
            insert.execute(params![stored(event.at_ns), event.pid, event.text])?;
        }
        self.events = self.events.max(profile.events.len());
        Ok(sites)
    }

    fn processes(
        &mut self,
        transaction: &Transaction<'_>,
        processes: &[Process],
    ) -> rusqlite::Result<Vec<i64>> {
        let mut write = transaction
            .prepare_cached("INSERT OR REPLACE INTO process VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)")?;
        let mut lives: HashMap<(u32, u64), usize> = HashMap::new();
        let mut rows = Vec::with_capacity(processes.len());
        for process in processes {
            let life = lives.entry((process.pid, process.start_time)).or_default();
            let key = (process.pid, process.start_time, *life);
            *life += 1;
            let next = self.process_rows.len() as i64 + 1;
            let row = *self.processes.entry(key).or_insert(next);
            rows.push(row);
            match self.process_rows.get_mut(row as usize - 1) {
                Some(known) if known == process => continue,
                Some(known) => known.clone_from(process),
                None => self.process_rows.push(process.clone()),
            }
            write.execute(params![
                row,
                process.pid,
                process.parent_pid,
                stored(process.start_time),
                process.comm,
                process.exe,
                process.cmdline,
                process.cgroup,
                process.end,
            ])?;
        }
        Ok(rows)
    }

    fn modules(
        &mut self,
        transaction: &Transaction<'_>,
        modules: &[Module],
    ) -> rusqlite::Result<Vec<i64>> {
        let mut write = transaction
            .prepare_cached("INSERT OR REPLACE INTO module VALUES (?, ?, ?, ?, ?, ?)")?;
        let mut rows = Vec::with_capacity(modules.len());
        for module in modules {
            let key = (module.path.clone(), module.build_id.clone());
            let next = self.module_rows.len() as i64 + 1;
            let row = *self.modules.entry(key).or_insert(next);
            rows.push(row);
            match self.module_rows.get_mut(row as usize - 1) {
                Some(known) if known == module => continue,
                Some(known) => known.clone_from(module),
                None => self.module_rows.push(module.clone()),
            }
            let mapping = module.mapping;
            write.execute(params![
                row,
                module.path,
                module.build_id,
                mapping.map(|(start, _, _)| pattern(start)),
                mapping.map(|(_, end, _)| pattern(end)),
                mapping.map(|(_, _, offset)| pattern(offset)),
            ])?;
        }
        Ok(rows)
    }

    fn sites(
        &mut self,
        transaction: &Transaction<'_>,
        profile: &Profile,
        processes: &[i64],
        modules: &[i64],
    ) -> rusqlite::Result<Vec<i64>> {
        let mut insert = transaction.prepare_cached("INSERT INTO site VALUES (?, ?, ?, ?)")?;
        let mut rows = Vec::with_capacity(profile.sites.len());
        for site in &profile.sites {
            let Some(&process) = processes.get(site.process.0) else {
                rows.push(NO_ROW);
                continue;
            };
            let stack = self.stack(transaction, site, modules)?;
            let key = (process, site.kind, stack);
            let row = match self.sites.get(&key) {
                Some(row) => row,
                None => {
                    let row = self.sites.insert(key);
                    insert.execute(params![row, process, stack, site.kind.name()])?;
                    self.states.push(None);
                    row
                }
            };
            rows.push(row);
        }
        Ok(rows)
    }

    fn stack(
        &mut self,
        transaction: &Transaction<'_>,
        site: &Site,
        modules: &[i64],
    ) -> rusqlite::Result<i64> {
        let frames = site
            .frames
            .iter()
            .map(|frame| self.frame(transaction, frame, modules))
            .collect::<rusqlite::Result<Box<[i64]>>>()?;
        let key = (site.outcome, frames);
        if let Some(row) = self.stacks.get(&key) {
            return Ok(row);
        }
        let frames = key.1.clone();
        let row = self.stacks.insert(key);
        transaction
            .prepare_cached("INSERT INTO stack VALUES (?, ?)")?
            .execute(params![row, site.outcome.name()])?;
        let mut insert = transaction.prepare_cached("INSERT INTO stack_frame VALUES (?, ?, ?)")?;
        for (position, frame) in (0_i64..).zip(&frames) {
            insert.execute((row, position, frame))?;
        }
        Ok(row)
    }

    fn frame(
        &mut self,
        transaction: &Transaction<'_>,
        frame: &Frame,
        modules: &[i64],
    ) -> rusqlite::Result<i64> {
        let symbols = self.symbols(transaction, &frame.symbols)?;
        let module = frame.module.and_then(|module| modules.get(module.0).copied());
        let key = (frame.address, module, frame.offset, symbols.filter(|_| module.is_none()));
        if let Some(row) = self.frames.get(&key) {
            if let Some(known) = self.frame_symbols.get_mut(row as usize - 1)
                && *known != symbols
                && symbols.is_some()
            {
                *known = symbols;
                transaction
                    .prepare_cached("UPDATE frame SET symbol_list_id = ? WHERE id = ?")?
                    .execute(params![symbols, row])?;
            }
            return Ok(row);
        }
        let row = self.frames.insert(key);
        self.frame_symbols.push(symbols);
        transaction.prepare_cached("INSERT INTO frame VALUES (?, ?, ?, ?, ?)")?.execute(
            params![row, pattern(frame.address), module, pattern(frame.offset), symbols],
        )?;
        Ok(row)
    }

    fn symbols(
        &mut self,
        transaction: &Transaction<'_>,
        symbols: &Arc<[Symbol]>,
    ) -> rusqlite::Result<Option<i64>> {
        if symbols.is_empty() {
            return Ok(None);
        }
        if let Some(list) = self.symbols.get(&**symbols) {
            return Ok(Some(list));
        }
        let list = self.symbols.insert(symbols.clone());
        let mut insert =
            transaction.prepare_cached("INSERT INTO symbol VALUES (?, ?, ?, ?, ?, ?)")?;
        for (position, symbol) in (0_i64..).zip(&**symbols) {
            insert.execute(params![
                list,
                position,
                symbol.function,
                symbol.file,
                symbol.line,
                symbol.inlined
            ])?;
        }
        Ok(Some(list))
    }

    fn counters(
        &mut self,
        transaction: &Transaction<'_>,
        profile: &Profile,
        rows: &[i64],
        is_final: bool,
    ) -> rusqlite::Result<()> {
        let mut now: Vec<Option<SiteState>> = vec![None; self.states.len()];
        for (site, row) in profile.sites.iter().zip(rows) {
            let index = usize::try_from(row - 1).unwrap_or(usize::MAX);
            let Some(slot) = now.get_mut(index) else {
                continue;
            };
            let state = SiteState::of(site, profile.duration_ns);
            match slot {
                Some(twin) => twin.merge(&state),
                None => *slot = Some(state),
            }
        }
        let mut insert = transaction.prepare_cached(
            "INSERT INTO site_counters VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )?;
        for (row, (before, now)) in (1_i64..).zip(self.states.iter_mut().zip(now)) {
            // Ages are measured a moment before or after `duration_ns`, so births differ a little
            // where nothing happened; only the final ones are worth a row for that.
            let unchanged = match (&before, &now) {
                (Some(before), Some(now)) if !is_final => before.counters == now.counters,
                (before, now) => **before == *now,
            };
            if unchanged {
                continue;
            }
            let counters = now.map(|now| now.counters);
            let spread = counters.map(|it| it.spread).filter(|it| *it != Spread::default());
            let number = |field: fn(&Counters) -> u64| counters.as_ref().map(field).map(stored);
            insert.execute(params![
                row,
                self.snapshots,
                number(|counters| counters.live_bytes),
                number(|counters| counters.live_count),
                number(|counters| counters.allocated_bytes),
                number(|counters| counters.allocated_count),
                number(|counters| counters.freed_bytes),
                number(|counters| counters.freed_count),
                now.and_then(|now| now.oldest_born_ns),
                now.and_then(|now| now.youngest_born_ns),
                spread.map(|it| stored(it.bytes)),
                spread.map(|it| stored(it.count)),
                spread.map(|it| it.bytes_variance),
                spread.map(|it| it.count_variance),
            ])?;
            *before = now;
        }
        Ok(())
    }

    fn losses(
        &mut self,
        transaction: &Transaction<'_>,
        losses: &BTreeMap<String, u64>,
    ) -> rusqlite::Result<()> {
        let mut insert = transaction.prepare_cached("INSERT INTO loss VALUES (?, ?, ?)")?;
        for (name, &count) in losses {
            if self.losses.get(name) != Some(&count) {
                insert.execute(params![name, self.snapshots, stored(count)])?;
                self.losses.insert(name.clone(), count);
            }
        }
        Ok(())
    }
}

impl SiteState {
    fn of(site: &Site, now_ns: u64) -> Self {
        Self {
            counters: site.counters,
            oldest_born_ns: site.oldest_age_ns.map(|age_ns| born(now_ns, age_ns)),
            youngest_born_ns: site.youngest_age_ns.map(|age_ns| born(now_ns, age_ns)),
        }
    }

    /// Adds another site with the same process, kind and stack.
    fn merge(&mut self, other: &Self) {
        self.counters.add(&other.counters);
        self.oldest_born_ns = self.oldest_born_ns.into_iter().chain(other.oldest_born_ns).min();
        self.youngest_born_ns = self.youngest_born_ns.max(other.youngest_born_ns);
    }
}

/// SQLite's integers are signed. A count or time beyond that is none that ever was.
fn stored(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Addresses use all 64 bits (`[vsyscall]` lies at the top).
fn pattern(address: u64) -> i64 {
    address.cast_signed()
}

/// When a block of `age_ns` was born, in session time. Before the session's begin it is negative.
fn born(now_ns: u64, age_ns: u64) -> i64 {
    stored(now_ns).saturating_sub(stored(age_ns))
}
