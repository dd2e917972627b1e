//! `leakbpf doctor`

use std::io::Write as _;

use leakbpf::{
    preflight::{Report, Verdict, host, target},
    probe::{discover::PlannedProbe, planner::Cost},
    process::{Pid, host as observed_host, maps::Maps, target as observed_target},
    report::printable,
    session::placement::{LookedAt, Plans},
};
use serde::Serialize;

use super::Failure;
use crate::cli::{DoctorArgs, DoctorFormat};

/// What `--format json` prints.
#[derive(Serialize)]
struct Diagnosis {
    schema: u32,
    host: Report,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<Report>,
    files: Vec<File>,
}

#[derive(Serialize)]
struct File {
    path: String,
    allocators: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    functions: Vec<Function>,
    skipped: Vec<Skipped>,
}

#[derive(Serialize)]
struct Function {
    name: String,
    aliases: Vec<String>,
    entry_file_offset: u64,
    enter_file_offset: u64,
    leave_file_offset: Option<u64>,
    single_stepped: bool,
    why: String,
}

#[derive(Serialize)]
struct Skipped {
    name: String,
    reason: String,
}

pub fn run(args: &DoctorArgs) -> Result<u8, Failure> {
    let facts = observed_host::observe();
    let mut diagnosis = Diagnosis {
        schema: 1,
        host: Report { checks: host::judge(&facts) },
        target: None,
        files: Vec::new(),
    };
    if let Some(pid) = args.pid {
        let pid = Pid(pid);
        let checks = target::judge(&observed_target::observe(pid, false)?, &facts);
        diagnosis.target = Some(Report { checks });
        let maps = Maps::of(pid)?;
        let looked_at = Plans::default().of(pid, &maps);
        diagnosis.files = looked_at.into_iter().map(file).collect();
    }
    let verdict = diagnosis
        .target
        .iter()
        .map(Report::verdict)
        .chain([diagnosis.host.verdict()])
        .max()
        .unwrap_or(Verdict::Ok);
    let mut out = std::io::stdout().lock();
    let written = match args.format {
        DoctorFormat::Json => serde_json::to_writer_pretty(&mut out, &diagnosis)
            .map_err(std::io::Error::from)
            .and_then(|()| writeln!(out)),
        DoctorFormat::Text => out.write_all(text(&diagnosis).as_bytes()),
    };
    match written {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
        other => other?,
    }
    Ok(if verdict == Verdict::Fail { 2 } else { 0 })
}

fn file(looked_at: LookedAt) -> File {
    let path = looked_at.path.display().to_string();
    let plan = match looked_at.plan {
        Ok(plan) => plan,
        Err(error) => {
            return File {
                path,
                allocators: Vec::new(),
                error: Some(error),
                functions: Vec::new(),
                skipped: Vec::new(),
            };
        }
    };
    File {
        path,
        allocators: plan.allocators.iter().map(ToString::to_string).collect(),
        error: None,
        functions: plan
            .probes
            .iter()
            .map(|probe| Function {
                name: probe.function.clone(),
                aliases: probe.aliases.clone(),
                entry_file_offset: probe.entry_file_offset,
                enter_file_offset: probe.enter_file_offset,
                leave_file_offset: probe.leave_file_offset,
                single_stepped: probe.plan.cost() == Cost::SingleStepped
                    || !probe.exit_file_offsets.is_empty(),
                why: why(probe),
            })
            .collect(),
        skipped: plan
            .skipped
            .iter()
            .map(|skipped| Skipped {
                name: skipped.function.clone(),
                reason: skipped.reason.to_string(),
            })
            .collect(),
    }
}

fn why(probe: &PlannedProbe) -> String {
    match probe.exit_file_offsets.len() {
        0 => probe.plan.to_string(),
        count => format!(
            "{}; {count} return instructions, single-stepped: it may throw, which a return probe \
             does not survive",
            probe.plan
        ),
    }
}

fn text(diagnosis: &Diagnosis) -> String {
    let mut text = format!("This machine\n{}", diagnosis.host.to_text());
    let Some(target) = &diagnosis.target else { return text };
    text.push_str("\nThe process\n");
    text.push_str(&target.to_text());
    let with_functions = diagnosis.files.iter().filter(|file| {
        !file.functions.is_empty() || !file.skipped.is_empty() || file.error.is_some()
    });
    for file in with_functions {
        text.push_str(&format!("\n{}", printable(&file.path)));
        if !file.allocators.is_empty() {
            text.push_str(&format!(" ({})", file.allocators.join(", ")));
        }
        text.push('\n');
        if let Some(error) = &file.error {
            text.push_str(&format!("  not looked at: {error}\n"));
        }
        for function in &file.functions {
            text.push_str(&format!("  {:<24} {}\n", printable(&function.name), function.why));
        }
        for skipped in &file.skipped {
            text.push_str(&format!(
                "  {:<24} not probed: {}\n",
                printable(&skipped.name),
                skipped.reason
            ));
        }
    }
    if diagnosis.files.iter().all(|file| file.functions.is_empty()) {
        let paths: Vec<&str> = diagnosis.files.iter().map(|file| file.path.as_str()).collect();
        text.push_str(&format!(
            "\nNo allocator function was found in {}. `record` would show resident \
             memory by who touched it first; to see the blocks of a stripped static program, install its \
             debug symbols.\n",
            printable(&paths.join(", ")),
        ));
    }
    text
}
