//! What makes an SQLite file a recording.

use rusqlite::Connection;

pub const SQL: &str = include_str!("schema.sql");

/// "LEAK" in ASCII: `file` and SQLite call it the application id.
pub const APPLICATION_ID: u32 = 0x4c45_414b;

/// Raised with every change of [`SQL`].
pub const VERSION: u32 = 3;

/// Keys of the table `meta` that each snapshot writes anew.
pub mod meta {
    pub const MAX_OVERHEAD_PPM: &str = "max_overhead_ppm";
    pub const TARGET_CPU_NS: &str = "target_cpu_ns";
    pub const PROBE_HITS: &str = "probe_hits";
    pub const SPENT_NS: &str = "spent_ns";
    pub const AGENT_CPU_NS: &str = "agent_cpu_ns";
    pub const AGENT_PEAK_RSS_BYTES: &str = "agent_peak_rss_bytes";
    pub const PAGE_INTERVAL: &str = "page_interval";
    pub const WINDOWS: &str = "windows";
    pub const WINDOWS_OPEN_NS: &str = "windows_open_ns";
    pub const WINDOWS_EARLY_NS: &str = "windows_early_ns";
    pub const SURVIVED_BYTES_VARIANCE: &str = "survived_bytes_variance";
    pub const SURVIVED_COUNT_VARIANCE: &str = "survived_count_variance";
}

/// The statements that created the tables, by table name, as SQLite keeps them.
pub fn definitions(database: &Connection) -> rusqlite::Result<Vec<(String, String)>> {
    let mut statement = database.prepare(
        "SELECT name, sql FROM sqlite_schema WHERE type = 'table' AND name = tbl_name ORDER BY name",
    )?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    rows.collect()
}

/// What [`definitions`] says of a recording of this version.
pub fn expected_definitions() -> rusqlite::Result<Vec<(String, String)>> {
    let database = Connection::open_in_memory()?;
    database.execute_batch(SQL)?;
    definitions(&database)
}
