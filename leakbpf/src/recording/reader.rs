use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::limits::Limit;
use rusqlite::{Connection, OpenFlags};

use super::error::ReadError;
use super::row::{Fault, RowReader};
use super::schema::{self, meta};
use crate::profile::estimate::Spread;
use crate::profile::{
    Block, BlockFilter, Cost, Counters, Event, Frame, Mode, Module, ModuleId, Process, ProcessId,
    Profile, Site, SiteId, SiteKind, StackOutcome, Symbol, Windows,
};

/// Longest single text. Longer than any name, and short enough to hold one.
const MAX_TEXT_BYTES: i32 = 16 << 20;

/// Most text that the stacks may unfold to in a report. A few shared names in a small file could
/// otherwise fill a disk.
const MAX_UNFOLDED_BYTES: u64 = 8 << 30;

/// What a line of a stack takes in a report without any name.
const LINE_BYTES: u64 = 64;

/// What of a recording is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LoadOptions {
    /// Fill [`Profile::blocks`].
    pub with_blocks: bool,
    pub filter: BlockFilter,
}

/// Reads a recording of any provenance: nothing in the file is executed, every index is checked,
/// and time and memory are bounded by the file's size.
pub struct Reader {
    database: Connection,
    path: PathBuf,
    size_bytes: u64,
}

impl Reader {
    /// Opens a recording, finished or not. The file is not changed.
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        inspect(path)?;
        let open = || -> rusqlite::Result<Connection> {
            let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            let database = Connection::open_with_flags(path, flags)?;
            database.busy_timeout(Duration::from_secs(2))?;
            database.set_limit(Limit::SQLITE_LIMIT_LENGTH, MAX_TEXT_BYTES)?;
            database.set_limit(Limit::SQLITE_LIMIT_ATTACHED, 0)?;
            database.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
            database.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
            database.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_VIEW, false)?;
            database.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
            database.pragma_update(None, "cell_size_check", true)?;
            // One state of the file for everything that follows, while the session may still write.
            database.execute_batch("BEGIN")?;
            Ok(database)
        };
        let mut reader = Self {
            database: open().map_err(|error| ReadError::from_sqlite(path, &error))?,
            path: path.to_owned(),
            size_bytes: 0,
        };
        reader.check_schema()?;
        // From the first read on, a session that still writes can only append.
        reader.size_bytes = size_bytes(path);
        Ok(reader)
    }

    /// The last snapshot.
    pub fn profile(&self, options: LoadOptions) -> Result<Profile, ReadError> {
        let snapshot = self.last_snapshot()?;
        let facts = self.facts()?;
        let wants_blocks = options.with_blocks || !options.filter.keeps_all();
        if wants_blocks && !snapshot.is_final {
            return Err(ReadError::NoBlocks { path: self.path.clone() });
        }
        let processes = self.processes()?;
        let modules = self.modules()?;
        let stacks = self.stacks(&modules)?;
        let (mut sites, ids) = self.sites(&snapshot, &processes, &stacks)?;
        let mut blocks = Vec::new();
        if wants_blocks {
            let filter = options.filter;
            if !filter.keeps_all() {
                let listed = sites.iter_mut().filter(|site| facts.mode.lists(site.kind));
                listed.for_each(Site::clear_live);
            }
            self.blocks(&snapshot, &ids, |id, mut block| {
                let site = sites.get_mut(id.0)?;
                if !filter.keeps(block.size_bytes, block.age_ns) {
                    return Some(());
                }
                if !filter.keeps_all() {
                    site.count_live(block.size_bytes, block.age_ns, facts.mode, snapshot.at_ns);
                }
                if options.with_blocks {
                    block.process = site.process;
                    blocks.push(block);
                }
                Some(())
            })?;
        }
        Ok(Profile {
            mode: facts.mode,
            finished: snapshot.is_final,
            started_unix_ns: facts.started_unix_ns,
            duration_ns: snapshot.at_ns,
            kernel: facts.kernel,
            hostname: facts.hostname,
            processes,
            modules,
            sites,
            blocks,
            losses: self.losses()?,
            events: self.events()?,
            windows: facts.windows,
            page_interval: facts.page_interval,
            cost: facts.cost,
        })
    }

    /// A table of ours that is really a view or a trigger's target could run anything.
    fn check_schema(&self) -> Result<(), ReadError> {
        let expected = schema::expected_definitions().map_err(|error| self.sqlite_error(&error))?;
        let found =
            schema::definitions(&self.database).map_err(|error| self.sqlite_error(&error))?;
        for (name, sql) in &expected {
            let mut twins = found.iter().filter(|(other, _)| other == name);
            if twins.next().is_none_or(|(_, found)| found != sql) || twins.next().is_some() {
                return Err(self.damaged(format!("table {name} is not as it was made")));
            }
        }
        Ok(())
    }

    fn facts(&self) -> Result<Facts, ReadError> {
        let mut mode = None;
        let mut others = HashMap::new();
        let mut started_unix_ns = None;
        let mut kernel = String::new();
        let mut hostname = String::new();
        self.rows("SELECT key, value FROM meta", |row| {
            let value = row.text(1)?;
            match row.text(0)?.as_str() {
                "mode" => mode = Some(value),
                "started_unix_ns" => started_unix_ns = value.parse().ok(),
                "kernel" => kernel = value,
                "hostname" => hostname = value,
                name => {
                    others.insert(name.to_owned(), value);
                }
            }
            Ok(())
        })?;
        let mode =
            mode.and_then(|name| Mode::from_name(&name, |key| others.get(key)?.parse().ok()));
        match (mode, started_unix_ns) {
            (Some(mode), Some(started_unix_ns)) => Ok(Facts {
                mode,
                started_unix_ns,
                kernel,
                hostname,
                windows: self.windows(&others)?,
                page_interval: self.fact(&others, meta::PAGE_INTERVAL)?,
                cost: self.cost(&others)?,
            }),
            (None, _) => Err(self.damaged("meta: no mode that is known".to_owned())),
            (_, None) => Err(self.damaged("meta: no started_unix_ns".to_owned())),
        }
    }

    fn windows(&self, facts: &HashMap<String, String>) -> Result<Option<Windows>, ReadError> {
        let variance = |key: &str| -> Result<f64, ReadError> {
            let text = facts.get(key).map_or("0", String::as_str);
            let number = text.parse().ok().filter(|number: &f64| *number >= 0.0);
            number
                .filter(|number| number.is_finite())
                .ok_or_else(|| self.damaged(format!("meta: {key} is no variance")))
        };
        let Some(count) = self.fact(facts, meta::WINDOWS)? else { return Ok(None) };
        Ok(Some(Windows {
            count,
            open_ns: self.fact(facts, meta::WINDOWS_OPEN_NS)?.unwrap_or(0),
            early_ns: self.fact(facts, meta::WINDOWS_EARLY_NS)?.unwrap_or(0),
            bytes_variance: variance(meta::SURVIVED_BYTES_VARIANCE)?,
            count_variance: variance(meta::SURVIVED_COUNT_VARIANCE)?,
        }))
    }

    fn cost(&self, facts: &HashMap<String, String>) -> Result<Cost, ReadError> {
        let number = |key| self.fact(facts, key).map(Option::unwrap_or_default);
        Ok(Cost {
            limit_ppm: self.fact(facts, meta::MAX_OVERHEAD_PPM)?,
            target_cpu_ns: number(meta::TARGET_CPU_NS)?,
            hits: number(meta::PROBE_HITS)?,
            spent_ns: number(meta::SPENT_NS)?,
            agent_cpu_ns: number(meta::AGENT_CPU_NS)?,
            agent_peak_rss_bytes: number(meta::AGENT_PEAK_RSS_BYTES)?,
        })
    }

    /// A number of the table `meta`.
    fn fact<T: FromStr>(
        &self,
        facts: &HashMap<String, String>,
        key: &str,
    ) -> Result<Option<T>, ReadError> {
        let parse = |text: &String| {
            text.parse().map_err(|_| self.damaged(format!("meta: {key} is no number")))
        };
        facts.get(key).map(parse).transpose()
    }

    fn last_snapshot(&self) -> Result<Snapshot, ReadError> {
        let mut last = None;
        self.rows("SELECT id, at_ns, final FROM snapshot ORDER BY id", |row| {
            last = Some(Snapshot {
                id: row.integer(0)?,
                at_ns: row.count(1)?,
                is_final: row.integer(2)? != 0,
            });
            Ok(())
        })?;
        last.ok_or_else(|| ReadError::NoSnapshot { path: self.path.clone() })
    }

    fn processes(&self) -> Result<Vec<Process>, ReadError> {
        let mut processes = Vec::new();
        self.rows("SELECT * FROM process ORDER BY id", |row| {
            row.expect_id(0, processes.len())?;
            processes.push(Process {
                pid: row.u32(1)?,
                parent_pid: row.optional(2, RowReader::u32)?,
                start_time: row.count(3)?,
                comm: row.text(4)?,
                exe: row.text(5)?,
                cmdline: row.text(6)?,
                cgroup: row.text(7)?,
                end: row.optional(8, RowReader::text)?,
            });
            Ok(())
        })?;
        Ok(processes)
    }

    fn modules(&self) -> Result<Vec<Module>, ReadError> {
        let mut modules = Vec::new();
        self.rows("SELECT * FROM module ORDER BY id", |row| {
            row.expect_id(0, modules.len())?;
            let start = row.optional(3, RowReader::pattern)?;
            let end = row.optional(4, RowReader::pattern)?;
            let offset = row.optional(5, RowReader::pattern)?;
            modules.push(Module {
                path: row.text(1)?,
                build_id: row.optional(2, RowReader::text)?,
                mapping: match (start, end, offset) {
                    (Some(start), Some(end), Some(offset)) => Some((start, end, offset)),
                    _ => None,
                },
            });
            Ok(())
        })?;
        Ok(modules)
    }

    fn symbols(&self) -> Result<Vec<SymbolList>, ReadError> {
        let mut lists: Vec<Vec<Symbol>> = Vec::new();
        self.rows("SELECT * FROM symbol ORDER BY list_id, position", |row| {
            let list = row.integer(0)?;
            if usize::try_from(list).ok() == Some(lists.len() + 1) {
                lists.push(Vec::new());
            }
            let symbols = row.last_list(list, &mut lists)?;
            row.expect_position(1, symbols.len())?;
            symbols.push(Symbol {
                function: row.text(2)?,
                file: row.optional(3, RowReader::text)?,
                line: row.optional(4, RowReader::u32)?,
                inlined: row.integer(5)? != 0,
            });
            Ok(())
        })?;
        let text_bytes = |symbol: &Symbol| {
            (symbol.function.len() + symbol.file.as_ref().map_or(0, String::len)) as u64
        };
        Ok(lists
            .into_iter()
            .map(|symbols| SymbolList {
                text_bytes: symbols.iter().map(text_bytes).sum(),
                symbols: symbols.into(),
            })
            .collect())
    }

    /// With the text that each takes in a report.
    fn frames(&self, modules: &[Module]) -> Result<Vec<(Frame, u64)>, ReadError> {
        let lists = self.symbols()?;
        let unnamed: Arc<[Symbol]> = Arc::from([]);
        let mut frames = Vec::new();
        self.rows("SELECT * FROM frame ORDER BY id", |row| {
            row.expect_id(0, frames.len())?;
            let (symbols, text_bytes) = match row.optional(4, RowReader::integer)? {
                None => (unnamed.clone(), 0),
                Some(list) => {
                    let list = row.by_id("symbol list", list, &lists)?;
                    (list.symbols.clone(), list.text_bytes)
                }
            };
            let module = row
                .optional(2, |row, column| row.reference(column, "module", modules.len()))?
                .map(ModuleId);
            // Each function that is inlined there has a line of its own, with the module's name.
            let lines = symbols.len().max(1) as u64;
            let line_bytes = module
                .and_then(|id| modules.get(id.0))
                .map_or(LINE_BYTES, |module| LINE_BYTES.saturating_add(module_text_bytes(module)));
            let text_bytes = lines.saturating_mul(line_bytes).saturating_add(text_bytes);
            frames.push((
                Frame { address: row.pattern(1)?, module, offset: row.pattern(3)?, symbols },
                text_bytes,
            ));
            Ok(())
        })?;
        Ok(frames)
    }

    fn stacks(&self, modules: &[Module]) -> Result<Vec<Stack>, ReadError> {
        let frames = self.frames(modules)?;
        let mut outcomes = Vec::new();
        self.rows("SELECT * FROM stack ORDER BY id", |row| {
            row.expect_id(0, outcomes.len())?;
            let name = row.text(1)?;
            let outcome = StackOutcome::ALL.into_iter().find(|outcome| outcome.name() == name);
            outcomes.push(outcome.ok_or_else(|| row.wrong("an outcome that is not known"))?);
            Ok(())
        })?;
        let mut lists: Vec<(Vec<Frame>, u64)> = Vec::new();
        lists.resize_with(outcomes.len(), Default::default);
        self.rows("SELECT * FROM stack_frame ORDER BY stack_id, position", |row| {
            let stack = row.reference(0, "stack", lists.len())?;
            let (list, text_bytes) =
                lists.get_mut(stack).ok_or_else(|| row.wrong("a stack that is not there"))?;
            row.expect_position(1, list.len())?;
            let id = row.integer(2)?;
            let (frame, frame_bytes) = row.by_id("frame", id, &frames)?;
            *text_bytes = text_bytes.saturating_add(*frame_bytes);
            list.push(frame.clone());
            Ok(())
        })?;
        Ok(outcomes
            .into_iter()
            .zip(lists)
            .map(|(outcome, (frames, text_bytes))| Stack {
                outcome,
                frames: frames.into(),
                text_bytes,
            })
            .collect())
    }

    /// The sites that the snapshot lists, and for each row of the table the one that it became.
    fn sites(
        &self,
        snapshot: &Snapshot,
        processes: &[Process],
        stacks: &[Stack],
    ) -> Result<(Vec<Site>, Vec<Option<SiteId>>), ReadError> {
        let mut rows: Vec<(Site, bool)> = Vec::new();
        let mut unfolded_bytes: u64 = 0;
        self.rows("SELECT * FROM site ORDER BY id", |row| {
            row.expect_id(0, rows.len())?;
            let process = ProcessId(row.reference(1, "process", processes.len())?);
            let id = row.integer(2)?;
            let stack = row.by_id("stack", id, stacks)?;
            let name = row.text(3)?;
            let kind = SiteKind::ALL.into_iter().find(|kind| kind.name() == name);
            let comm_bytes = processes.get(process.0).map_or(0, |process| process.comm.len());
            unfolded_bytes = unfolded_bytes
                .saturating_add(stack.text_bytes)
                .saturating_add(LINE_BYTES + comm_bytes as u64);
            if unfolded_bytes > MAX_UNFOLDED_BYTES {
                return Err(row.wrong("stacks that would unfold without end"));
            }
            let site = Site {
                process,
                kind: kind.ok_or_else(|| row.wrong("a kind of memory that is not known"))?,
                counters: Counters::default(),
                oldest_age_ns: None,
                youngest_age_ns: None,
                outcome: stack.outcome,
                frames: stack.frames.clone(),
            };
            rows.push((site, false));
            Ok(())
        })?;
        self.rows("SELECT * FROM site_counters ORDER BY site_id, snapshot_id", |row| {
            let index = row.reference(0, "site", rows.len())?;
            if row.integer(1)? > snapshot.id {
                return Err(row.wrong("a snapshot that is not there"));
            }
            let (site, listed) =
                rows.get_mut(index).ok_or_else(|| row.wrong("a site that is not there"))?;
            *listed = row.optional(2, RowReader::count)?.is_some();
            if *listed {
                site.counters = Counters {
                    live_bytes: row.count(2)?,
                    live_count: row.count(3)?,
                    allocated_bytes: row.count(4)?,
                    allocated_count: row.count(5)?,
                    freed_bytes: row.count(6)?,
                    freed_count: row.count(7)?,
                    spread: Spread {
                        bytes: row.optional(10, RowReader::count)?.unwrap_or_default(),
                        count: row.optional(11, RowReader::count)?.unwrap_or_default(),
                        bytes_variance: row.optional(12, RowReader::measure)?.unwrap_or_default(),
                        count_variance: row.optional(13, RowReader::measure)?.unwrap_or_default(),
                    },
                };
                let age = |born| snapshot.age_ns(born);
                site.oldest_age_ns = row.optional(8, RowReader::integer)?.map(age);
                site.youngest_age_ns = row.optional(9, RowReader::integer)?.map(age);
            }
            Ok(())
        })?;
        let mut sites = Vec::with_capacity(rows.len());
        let mut ids = Vec::with_capacity(rows.len());
        for (site, listed) in rows {
            ids.push(listed.then_some(SiteId(sites.len())));
            if listed {
                sites.push(site);
            }
        }
        Ok((sites, ids))
    }

    /// Passes on every block, its process yet unknown. `visit` returns `None` for a site that is
    /// not there.
    fn blocks(
        &self,
        snapshot: &Snapshot,
        ids: &[Option<SiteId>],
        mut visit: impl FnMut(SiteId, Block) -> Option<()>,
    ) -> Result<(), ReadError> {
        self.rows("SELECT * FROM block", |row| {
            let index = row.reference(0, "site", ids.len())?;
            let site = ids.get(index).copied().flatten();
            let site = site.ok_or_else(|| row.wrong("a site that is not listed"))?;
            let block = Block {
                process: ProcessId(0),
                site,
                address: row.pattern(1)?,
                size_bytes: row.count(2)?,
                age_ns: snapshot.age_ns(row.integer(3)?),
            };
            visit(site, block).ok_or_else(|| row.wrong("a site that is not there"))
        })
    }

    fn losses(&self) -> Result<BTreeMap<String, u64>, ReadError> {
        let mut losses = BTreeMap::new();
        self.rows("SELECT name, count FROM loss ORDER BY name, snapshot_id", |row| {
            losses.insert(row.text(0)?, row.count(1)?);
            Ok(())
        })?;
        Ok(losses)
    }

    fn events(&self) -> Result<Vec<Event>, ReadError> {
        let mut events = Vec::new();
        self.rows("SELECT at_ns, pid, text FROM event ORDER BY id", |row| {
            events.push(Event {
                at_ns: row.count(0)?,
                pid: row.optional(1, RowReader::u32)?,
                text: row.text(2)?,
            });
            Ok(())
        })?;
        Ok(events)
    }

    /// Walks one table. The queries are plain scans in the order of the table's own key: what
    /// SQLite does for them, and what is read here, is bounded by the size of the file. A file
    /// whose pages form a net instead of a tree would yield more than it holds.
    fn rows(
        &self,
        query: &'static str,
        mut visit: impl FnMut(&mut RowReader<'_>) -> Result<(), Fault>,
    ) -> Result<(), ReadError> {
        let mut budget_bytes = self.size_bytes;
        let mut walk = || -> Result<(), Fault> {
            let mut statement = self.database.prepare(query)?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                // A cell is a pointer and at least two bytes: see "B-tree Pages" in SQLite's
                // description of its file format.
                let mut reader = RowReader::new(row, budget_bytes);
                reader.charge(4)?;
                visit(&mut reader)?;
                budget_bytes = reader.budget_bytes();
            }
            Ok(())
        };
        walk().map_err(|fault| match fault {
            Fault::Sqlite(error) => self.sqlite_error(&error),
            Fault::Content(what) => {
                let table = query.split(" FROM ").nth(1).and_then(|rest| rest.split(' ').next());
                self.damaged(format!("table {}: {what}", table.unwrap_or_default()))
            }
        })
    }

    fn sqlite_error(&self, error: &rusqlite::Error) -> ReadError {
        ReadError::from_sqlite(&self.path, error)
    }

    fn damaged(&self, detail: String) -> ReadError {
        ReadError::damaged(&self.path, detail)
    }
}

/// Judges a file by its first bytes, before SQLite sees it.
fn inspect(path: &Path) -> Result<(), ReadError> {
    let cannot_open = |source| ReadError::Open { path: path.to_owned(), source };
    // Opening a FIFO would wait for somebody to write to it.
    let metadata = fs::metadata(path).map_err(cannot_open)?;
    if metadata.is_dir() {
        return Err(ReadError::Directory { path: path.to_owned() });
    }
    if !metadata.is_file() {
        return Err(ReadError::NotAFile { path: path.to_owned() });
    }
    if metadata.len() == 0 {
        return Err(ReadError::Empty { path: path.to_owned() });
    }
    // Offsets: "The Database Header" in SQLite's description of its file format.
    let mut head = Vec::with_capacity(100);
    File::open(path).and_then(|file| file.take(100).read_to_end(&mut head)).map_err(cannot_open)?;
    let word = |at: usize| {
        let bytes = head.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_be_bytes(bytes))
    };
    if !head.starts_with(b"SQLite format 3\0") {
        return Err(ReadError::NotARecording { path: path.to_owned() });
    }
    match (word(68), word(60)) {
        (Some(schema::APPLICATION_ID), Some(schema::VERSION)) => {}
        (Some(schema::APPLICATION_ID), Some(found)) => {
            return Err(ReadError::OtherVersion { path: path.to_owned(), found });
        }
        (None, _) => return Err(ReadError::damaged(path, "it ends within its header")),
        _ => {
            return Err(ReadError::NotARecording { path: path.to_owned() });
        }
    }
    // SQLite itself misses the pages only when it needs them. While a session writes, the log has some.
    let page_bytes = match head.get(16..18) {
        Some(&[0, 1]) => 65_536,
        Some(&[high, low]) => u64::from(u16::from_be_bytes([high, low])),
        _ => 0,
    };
    let whole_bytes = page_bytes * u64::from(word(28).unwrap_or_default());
    if metadata.len() < whole_bytes && !log_path(path).exists() {
        let detail = format!("it is cut off: {} of {whole_bytes} bytes", metadata.len());
        return Err(ReadError::damaged(path, detail));
    }
    Ok(())
}

/// Of the recording and its write-ahead log.
/// Where SQLite writes ahead.
fn log_path(path: &Path) -> PathBuf {
    let mut log = path.as_os_str().to_owned();
    log.push("-wal");
    PathBuf::from(log)
}

fn size_bytes(path: &Path) -> u64 {
    [path.to_owned(), log_path(path)]
        .iter()
        .filter_map(|path| fs::metadata(path).ok())
        .fold(0, |sum: u64, metadata| sum.saturating_add(metadata.len()))
}

struct Facts {
    mode: Mode,
    started_unix_ns: u64,
    kernel: String,
    hostname: String,
    windows: Option<Windows>,
    page_interval: Option<u32>,
    cost: Cost,
}

struct Snapshot {
    id: i64,
    at_ns: u64,
    is_final: bool,
}

impl Snapshot {
    fn age_ns(&self, born_ns: i64) -> u64 {
        u64::try_from(i128::from(self.at_ns) - i128::from(born_ns)).unwrap_or(0)
    }
}

fn module_text_bytes(module: &Module) -> u64 {
    (module.path.len() + module.build_id.as_ref().map_or(0, String::len)) as u64
}

struct SymbolList {
    symbols: Arc<[Symbol]>,
    text_bytes: u64,
}

struct Stack {
    outcome: StackOutcome,
    frames: Arc<[Frame]>,
    text_bytes: u64,
}
