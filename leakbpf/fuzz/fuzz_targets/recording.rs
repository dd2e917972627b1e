//! Opening a recording and writing each report of it.
//!
//! What begins like an SQLite file is one. Anything else is rows for the tables of a recording:
//! mutated pages hardly ever hold any.

#![no_main]

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::LazyLock;

use leakbpf::profile::{BlockFilter, Cost, Mode, Profile, SiteKind, StackOutcome, Windows};
use leakbpf::recording::{LoadOptions, Reader, SessionFacts, Writer};
use leakbpf::report::{self, Format, ReportOptions, Sort};
use libfuzzer_sys::arbitrary::{self, Unstructured};
use libfuzzer_sys::fuzz_target;
use rusqlite::Connection;
use rusqlite::types::Value;

/// Reports are allowed to be a thousand times larger than their recording; the rest need not be seen.
const REPORT_MAX_BYTES: usize = 8 << 20;

const LISTS_MAX: usize = 12;
const ROWS_MAX: usize = 12;

struct Place {
    /// libFuzzer ends without running destructors: `cargo xtask fuzz` removes it.
    file: PathBuf,
    /// A recording with its tables and no rows but the session's facts.
    template: Vec<u8>,
}

static PLACE: LazyLock<Place> = LazyLock::new(|| {
    let directory =
        tempfile::Builder::new().prefix("leakbpf-fuzz-").tempdir().expect("a directory").keep();
    let path = directory.join("template");
    let facts = SessionFacts {
        started_unix_ns: 1_700_000_000_000_000_000,
        kernel: "6.1.0".to_owned(),
        hostname: "host".to_owned(),
    };
    let empty = Profile {
        mode: Mode::Exact,
        finished: true,
        started_unix_ns: facts.started_unix_ns,
        duration_ns: 5_000_000_000,
        kernel: facts.kernel.clone(),
        hostname: facts.hostname.clone(),
        processes: Vec::new(),
        modules: Vec::new(),
        sites: Vec::new(),
        blocks: Vec::new(),
        losses: Default::default(),
        events: Vec::new(),
        windows: Some(Windows::default()),
        page_interval: Some(16),
        cost: Cost { limit_ppm: Some(10_000), ..Cost::default() },
    };
    let writer = Writer::create(&path, &facts).expect("a recording");
    writer.finish(&empty, []).expect("a recording");
    let template = fs::read(&path).expect("a recording");
    Place { file: directory.join("recording"), template }
});

fuzz_target!(
    init: {
        // `cargo xtask fuzz` asks for a file to begin with.
        if let Some(path) = std::env::var_os("LEAKBPF_FUZZ_SEED") {
            let rows: Vec<u8> = (0..4000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
            fill(&rows).expect("rows");
            fs::copy(&PLACE.file, path).expect("a seed");
        }
    },
    |data: &[u8]| {
        if data.starts_with(b"SQLite") {
            fs::write(&PLACE.file, data).expect("room");
        } else if fill(data).is_err() {
            return;
        }
        // Each input one way: writing reports is most of the work.
        read(data.len().is_multiple_of(2));
    }
);

fn read(with_blocks: bool) {
    let reader = match Reader::open(&PLACE.file) {
        Ok(reader) => reader,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let filter = match with_blocks {
        true => BlockFilter { min_age_ns: 1, min_size_bytes: 2 },
        false => BlockFilter::default(),
    };
    let Ok(profile) = reader.profile(LoadOptions { with_blocks, filter }) else {
        return;
    };
    let options = ReportOptions {
        top: with_blocks.then_some(3),
        sort: if with_blocks { Sort::Age } else { Sort::Bytes },
        filter,
        with_blocks,
        color: with_blocks,
        width: with_blocks.then_some(20),
    };
    for format in Format::ALL {
        let mut out = Bounded(0);
        if report::write(format, &profile, &options, &mut out).is_err() {
            assert!(out.0 >= REPORT_MAX_BYTES, "{} fails by itself", format.name());
        }
    }
}

/// Takes so much and no more.
struct Bounded(usize);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        if self.0 >= REPORT_MAX_BYTES {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a column is to hold, mostly.
#[derive(Clone, Copy)]
enum Column {
    /// The number of the list, from 1.
    List,
    /// The number of the row, from 1.
    Id,
    /// The number of the row in its list, from 0.
    Position,
    Reference,
    Number,
    Real,
    Text,
    Optional(&'static Column),
    Kind,
    Outcome,
    Flag,
}

use Column::{Flag, Id, Kind, List, Number, Optional, Outcome, Position, Real, Reference, Text};

/// The tables in `schema.sql`, but for `meta`.
const TABLES: [(&str, &[Column]); 11] = [
    ("process", &[Id, Number, Optional(&Number), Number, Text, Text, Text, Text, Optional(&Text)]),
    (
        "module",
        &[Id, Text, Optional(&Text), Optional(&Number), Optional(&Number), Optional(&Number)],
    ),
    ("symbol", &[List, Position, Text, Optional(&Text), Optional(&Number), Flag]),
    ("frame", &[Id, Number, Optional(&Reference), Number, Optional(&Reference)]),
    ("stack", &[Id, Outcome]),
    ("stack_frame", &[List, Position, Reference]),
    ("site", &[Id, Reference, Reference, Kind]),
    ("snapshot", &[Id, Number, Flag]),
    (
        "site_counters",
        &[
            List,
            Id,
            Optional(&Number),
            Number,
            Number,
            Number,
            Number,
            Number,
            Optional(&Number),
            Optional(&Number),
            Optional(&Number),
            Optional(&Number),
            Optional(&Real),
            Optional(&Real),
        ],
    ),
    ("loss", &[Text, Reference, Number]),
    ("event", &[Id, Number, Optional(&Number), Text]),
];

const BLOCK: (&str, &[Column]) = ("block", &[Reference, Number, Number, Number]);

/// Facts of the session that reports compute with.
const FACTS: [&str; 9] = [
    "one_in",
    "sample_interval_bytes",
    "page_interval",
    "windows",
    "windows_open_ns",
    "windows_early_ns",
    "survived_bytes_variance",
    "target_cpu_ns",
    "spent_ns",
];

/// Makes a recording of rows that the input states.
fn fill(data: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
    let mut input = Unstructured::new(data);
    fs::write(&PLACE.file, &PLACE.template)?;
    let database = Connection::open(&PLACE.file)?;
    database.execute_batch(
        "PRAGMA journal_mode = off; PRAGMA synchronous = off; BEGIN; DELETE FROM snapshot;",
    )?;
    let mode = ["exact", "pages", "sample", "windows"][usize::from(input.arbitrary::<u8>()?) % 4];
    let mut fact = database.prepare("INSERT OR REPLACE INTO meta VALUES (?, ?)")?;
    fact.execute(["mode", mode])?;
    for key in FACTS {
        let text = match input.arbitrary::<u8>()? {
            0..=99 => input.arbitrary::<u16>()?.to_string(),
            100..=179 => input.arbitrary::<u64>()?.to_string(),
            180..=239 => input.arbitrary::<f64>()?.to_string(),
            _ => input.arbitrary::<&str>()?.to_owned(),
        };
        fact.execute([key, &text])?;
    }
    drop(fact);
    for (table, columns) in TABLES.into_iter().chain([BLOCK]) {
        let marks = vec!["?"; columns.len()].join(", ");
        let mut insert =
            database.prepare(&format!("INSERT OR IGNORE INTO {table} VALUES ({marks})"))?;
        let lists = columns.iter().any(|column| matches!(column, List));
        let lists = if lists { input.int_in_range(0..=LISTS_MAX)? } else { 1 };
        for list in 1..=lists {
            for row in 0..input.int_in_range(0..=ROWS_MAX)? {
                let values: Vec<Value> = columns
                    .iter()
                    .map(|column| value(&mut input, *column, list as i64, row as i64))
                    .collect::<Result<_, _>>()?;
                // What the schema refuses is left out.
                let _ = insert.execute(rusqlite::params_from_iter(values));
            }
        }
    }
    database.execute_batch("COMMIT")?;
    Ok(())
}

fn value(
    input: &mut Unstructured,
    column: Column,
    list: i64,
    row: i64,
) -> arbitrary::Result<Value> {
    // Now and then anything at all.
    let choice: u8 = input.arbitrary()?;
    if choice == 255 {
        return Ok(match input.int_in_range(0..=4)? {
            0 => Value::Null,
            1 => Value::Integer(input.arbitrary()?),
            2 => Value::Real(input.arbitrary()?),
            3 => Value::Text(input.arbitrary::<&str>()?.to_owned()),
            _ => Value::Blob(input.arbitrary::<&[u8]>()?.to_owned()),
        });
    }
    Ok(match column {
        List => Value::Integer(list),
        Id => Value::Integer(row + 1),
        Position => Value::Integer(row),
        Reference => Value::Integer(i64::from(choice % 8) + 1),
        Number => match choice {
            0..=99 => Value::Integer(choice.into()),
            100..=199 => Value::Integer(input.arbitrary::<u32>()?.into()),
            200..=239 => Value::Integer(input.arbitrary()?),
            _ => Value::Integer(i64::MAX),
        },
        Real => match choice {
            0..=199 => Value::Real(f64::from(choice) * 1e6),
            _ => Value::Real(input.arbitrary()?),
        },
        Text => match choice {
            0..=199 => Value::Text(format!("{}{}", char::from(choice), row)),
            _ => Value::Text(input.arbitrary::<&str>()?.to_owned()),
        },
        Optional(column) => match choice {
            0..=99 => Value::Null,
            _ => value(input, *column, list, row)?,
        },
        Kind => {
            Value::Text(SiteKind::ALL[usize::from(choice) % SiteKind::ALL.len()].name().to_owned())
        }
        Outcome => Value::Text(StackOutcome::ALL[usize::from(choice) % 10].name().to_owned()),
        Flag => Value::Integer(i64::from(!choice.is_multiple_of(4))),
    })
}
