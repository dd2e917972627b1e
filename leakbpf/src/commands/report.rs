//! `leakbpf report`

use std::io::{self, Write as _};

use leakbpf::{
    profile::BlockFilter,
    recording::{LoadOptions, Reader},
    report::{self, ReportFile, ReportOptions},
    session::SessionError,
};

use super::Failure;
use crate::cli::ReportArgs;

pub fn run(args: ReportArgs) -> Result<u8, Failure> {
    let filter = BlockFilter {
        min_age_ns: u64::try_from(args.min_age.as_nanos()).unwrap_or(u64::MAX),
        min_size_bytes: args.min_size,
    };
    let reader = Reader::open(&args.file)?;
    let profile = reader.profile(LoadOptions { with_blocks: args.blocks, filter })?;
    let format = args.format.into();
    let options = ReportOptions {
        top: match format {
            report::Format::Text => Some(args.top),
            _ => None,
        },
        sort: args.sort.into(),
        filter,
        with_blocks: args.blocks,
        ..ReportOptions::default()
    };
    match args.output {
        Some(path) => {
            ReportFile::create(&path)?.write(format, &profile, &options)?;
        }
        None => {
            let options = match format {
                report::Format::Text => {
                    let terminal = leakbpf::session::terminal_options();
                    ReportOptions { color: terminal.color, width: terminal.width, ..options }
                }
                _ => options,
            };
            let mut out = io::BufWriter::new(io::stdout().lock());
            let written =
                report::write(format, &profile, &options, &mut out).and_then(|()| out.flush());
            match written {
                // Whoever reads has seen enough, as with `head`.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                other => other.map_err(SessionError::Stdout)?,
            }
        }
    }
    Ok(0)
}
