//! What makes an SQLite file a recording.

use rusqlite::Connection;

pub const SQL: &str = include_str!("schema.sql");

/// "LEAK" in ASCII: `file` and SQLite call it the application id.
pub const APPLICATION_ID: u32 = 0x4c45_414b;

/// Raised with every change of [`SQL`].
pub const VERSION: u32 = 2;

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
