//! What a session says when it has attached.

use std::time::Instant;

use super::{
    config::{Config, Method},
    watch::{Attached, Watch},
};
use crate::{
    probe::kernel::{KernelError, MappingEvents},
    report,
};

/// More processes than these are announced in one line.
const ANNOUNCED_ONE_BY_ONE: usize = 8;

/// With more processes than these, the cost of probes for each is worth a word.
const PROBED_ONE_BY_ONE: usize = 32;

/// How mappings are seen, where that is not the usual way.
pub fn mapping_events(
    events: Option<Result<MappingEvents, KernelError>>,
    method: Method,
    watch: &mut Watch,
) {
    match events {
        None | Some(Ok(MappingEvents::Functions)) => {}
        Some(Ok(MappingEvents::Tracepoints)) => watch.note(
            None,
            "mappings are seen through system call tracepoints, which slow every system call of \
             the machine down a little: the kernel refuses programs on its functions (fentry), \
             or leaves some out, since it preempts itself"
                .to_owned(),
        ),
        Some(Err(_)) if method != Method::Exact => watch.note(
            None,
            "where blocks are counted, mappings are not: without programs on its functions \
             (fentry) that it always runs, this kernel shows them only by slowing every system call of the machine down"
                .to_owned(),
        ),
        Some(Err(error)) => {
            eprintln!("leakbpf: mmap, munmap, mremap and brk are not counted: {error}");
            watch.note(None, format!("anonymous mappings are not counted: {error}"));
        }
    }
}

/// As [`one`], of all processes that were there at the start.
pub fn all(placed: &[Attached], watch: &Watch, config: &Config, started: Instant) {
    if placed.len() > PROBED_ONE_BY_ONE && watch.probes() > placed.len() {
        eprintln!(
            "leakbpf: {} processes have probes of their own: the kernel asks each process's at \
             each hit, some 45 ns each, and takes them away one by one, some 70 ms each; \
             --shared-probes has one for all",
            placed.len()
        );
    }
    if placed.len() > ANNOUNCED_ONE_BY_ONE {
        eprintln!(
            "leakbpf: attached to {} processes: {} in {} ms",
            placed.len(),
            match config.method {
                Method::Pages { one_in } => pages_in_words(one_in),
                _ => format!("{} probes", watch.probes()),
            },
            started.elapsed().as_millis()
        );
    } else {
        placed.iter().for_each(|attached| one(attached, watch, config, started));
    }
}

fn pages_in_words(one_in: u32) -> String {
    match one_in {
        1 => "every page".to_owned(),
        _ => format!("1 in {one_in} pages"),
    }
}

/// Whom the session has attached to, and with what.
pub fn one(attached: &Attached, watch: &Watch, config: &Config, started: Instant) {
    let comm = watch
        .lives
        .iter()
        .find(|life| life.pid() == attached.pid)
        .map_or("", |life| life.process.comm.as_str());
    let what = match config.method {
        Method::Pages { one_in } => pages_in_words(one_in),
        _ => format!("{} functions", attached.functions),
    };
    eprintln!(
        "leakbpf: attached to PID {} ({}): {what} in {} ms",
        attached.pid,
        report::printable(comm),
        started.elapsed().as_millis()
    );
    if config.method.probes() && attached.functions == 0 && watch.probes() == 0 {
        let looked_at: Vec<String> = attached
            .looked_at
            .iter()
            .map(|file| match &file.plan {
                Ok(_) => file.path.display().to_string(),
                Err(error) => format!("{} ({error})", file.path.display()),
            })
            .collect();
        let pid = attached.pid;
        let what = match config.method {
            Method::Auto { .. } => {
                "the report has resident memory by who touched it first".to_owned()
            }
            Method::Exact => format!(
                "only mappings are counted, and `leakbpf record --mode pages -p {pid}` shows what it holds"
            ),
            Method::Sample { .. } | Method::Pages { .. } => {
                format!("`leakbpf record --mode pages -p {pid}` shows what it holds")
            }
            Method::Windows { .. } => "nothing is counted".to_owned(),
        };
        eprintln!(
            "leakbpf: no allocator function was found in {}: {what}; debug symbols of a stripped \
             static program would help (`leakbpf doctor -p {pid}`)",
            report::printable(&looked_at.join(", ")),
        );
    }
}
