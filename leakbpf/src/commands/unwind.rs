//! `leakbpf unwind`

use std::{fmt, fs::OpenOptions, io::Write as _, os::unix::fs::OpenOptionsExt as _, time::Instant};

use anyhow::Context as _;
use leakbpf::{
    elf::image::{Image, ImageError, Source},
    unwind::{Table, TableError},
};
use leakbpf_common::unwind::{Rule, bp, cfa};

use super::Failure;
use crate::cli::UnwindArgs;

pub fn run(args: &UnwindArgs) -> Result<u8, Failure> {
    let named = || args.file.display().to_string();
    // Does not wait for a writer when the file is a pipe.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&args.file)
        .with_context(named)?;
    let start = Instant::now();
    let table = Image::open(Source::File(file))
        .map_err(TableError::from)
        .and_then(|image| Table::of_image(&image))
        .map_err(|error| match error {
            TableError::Image(ImageError::Read(error)) => anyhow::Error::new(error),
            error => error.into(),
        })
        .with_context(named)?;
    let text = match args.pc {
        Some(svma) => at(&table, svma),
        None => summary(&table, start.elapsed().as_secs_f64() * 1e3),
    };
    std::io::stdout().write_all(text.as_bytes()).context("standard output")?;
    Ok(0)
}

fn at(table: &Table, svma: u64) -> String {
    let rule = Described(table.rule(svma));
    match table.row(svma) {
        Some(row) => format!(
            "row from {:#x}, rule {}: {rule}\n",
            table.base_svma.wrapping_add(row.pc.into()),
            row.rule
        ),
        None => format!("no row: {rule}\n"),
    }
}

fn summary(table: &Table, build_ms: f64) -> String {
    let stats = &table.stats;
    let origins: Vec<_> = stats.origins.iter().map(|origin| origin.name()).collect();
    let mut text = match origins.as_slice() {
        [] => "no call frame information: stacks follow frame pointers\n".to_owned(),
        _ => format!("{} bytes of {}\n", stats.frame_bytes, origins.join(" and ")),
    };
    let mut line = |name: &str, value: String| text.push_str(&format!("{name:<20} {value}\n"));
    line("functions", stats.functions.to_string());
    line("rows", format!("{} ({} before merging)", table.rows.len(), stats.raw_rows));
    line("rules", table.rules.len().to_string());
    line("pages", table.pages.len().to_string());
    line("table bytes", table.size_bytes().to_string());
    line("built in", format!("{build_ms:.1} ms"));
    line("unsupported rows", stats.unsupported_rows.to_string());
    line("damaged entries", stats.damaged_entries.to_string());
    line("outside of code", stats.outside_code.to_string());
    line("overlapping", stats.overlapping.to_string());
    if stats.exhausted {
        line("incomplete", "the file has more than is read of one file".to_owned());
    }
    text
}

/// A rule in words.
struct Described(Rule);

impl fmt::Display for Described {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rule { a, b, bp_offset, .. } = self.0;
        match self.0.cfa {
            cfa::FRAME_POINTER => return f.write_str("follow the frame pointer"),
            cfa::END => return f.write_str("end: the thread's first frame"),
            cfa::SIGNAL => return f.write_str("signal frame: registers from *(sp + 120..)"),
            cfa::SP => write!(f, "cfa = sp + {a}")?,
            cfa::BP => write!(f, "cfa = bp + {a}")?,
            cfa::AT_SP => write!(f, "cfa = *(sp + {a}) + {b}")?,
            cfa::AT_BP => write!(f, "cfa = *(bp + {a}) + {b}")?,
            cfa::PLT => write!(f, "cfa = sp + {a} + ((ip & 15) >= {b}) * 8")?,
            _ => return f.write_str("stop: a register or expression that is not followed"),
        }
        match self.0.bp {
            bp::SAME => f.write_str(", bp unchanged"),
            bp::AT_CFA => write!(f, ", bp = *(cfa + {bp_offset})"),
            bp::AT_BP => write!(f, ", bp = *(bp + {bp_offset})"),
            _ => f.write_str(", bp unknown"),
        }
    }
}
