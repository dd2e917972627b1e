//! A session as one file: an SQLite database that outlives the processes it is about.
//!
//! While the session runs it is called `FILE.partial` and holds every snapshot so far, also when
//! the agent is killed; [`Writer::finish`] gives it its name. The tables are described in
//! `schema.sql`, whose comments `sqlite3 FILE .schema` shows.

mod error;
mod interner;
mod reader;
mod row;
mod schema;
#[cfg(test)]
mod tests;
mod writer;

pub use error::{ReadError, WriteError};
pub use reader::{LoadOptions, Reader};
pub use writer::{SessionFacts, Writer};
