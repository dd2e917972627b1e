//! Folded stacks: `comm-pid;outermost;…;innermost live_bytes`, the input of flame graph tools.

use std::io::{self, Write};

use super::{ReportOptions, names, ranked};
use crate::profile::Profile;

/// One line a site that holds bytes, the largest first. The sum of the lines is
/// `totals().live_bytes`.
pub fn write(profile: &Profile, options: &ReportOptions, out: &mut dyn Write) -> io::Result<()> {
    for (_, site) in ranked(profile, options.sort) {
        if !profile.mode.counts(site.kind) || site.counters.live_bytes == 0 {
            continue;
        }
        let process = names::folded(&names::process_name(profile.process(site.process)));
        // Tools take a line that begins like this for a comment.
        let process =
            process.strip_prefix('#').map(|rest| format!("\\u{{23}}{rest}")).unwrap_or(process);
        out.write_all(process.as_bytes())?;
        let mut path: Vec<String> =
            names::lines(site).map(|line| names::folded(&line.name(profile))).collect();
        if let Some(innermost) = path.first_mut() {
            *innermost = without_count(innermost);
        }
        for name in path.iter().rev() {
            write!(out, ";{name}")?;
        }
        writeln!(out, " {}", site.counters.live_bytes)?;
    }
    Ok(())
}

/// A name that ends in a number of its own would be read as a line with two counts.
fn without_count(name: &str) -> String {
    match name.trim_end().rsplit_once(' ') {
        Some((head, tail)) if tail.starts_with(|first: char| first.is_ascii_digit()) => {
            format!("{head}_{tail}")
        }
        _ => name.to_owned(),
    }
}
