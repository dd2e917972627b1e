//! Can it work here, and on this process: what `doctor` prints and what every session asks first.
//!
//! Judging is pure; [`crate::process`] gathers what is judged.

use std::fmt::{self, Write};

use serde::Serialize;

pub mod hazards;
pub mod host;
pub mod kernel_version;
pub mod target;
pub mod tracepoint;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    /// It works, with something less.
    Warn,
    /// It cannot work.
    Fail,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        })
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub verdict: Verdict,
    pub found: String,
    /// What to do about it; `None` when there is nothing to do.
    pub remedy: Option<String>,
}

impl Check {
    pub fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    pub fn warn(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Warn, found: found.into(), remedy: Some(remedy.into()) }
    }

    pub fn fail(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fail, ..Self::warn(name, found, remedy) }
    }
}

/// Checks that cannot be passed over; never empty. The message is the first one's, since later ones
/// often follow from it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", one_line(.0))]
pub struct Refusal(pub Vec<Check>);

fn one_line(checks: &[Check]) -> String {
    let Some(first) = checks.first() else {
        return String::new();
    };
    let mut line = format!("{}: {}", first.name, first.found);
    if let Some(remedy) = &first.remedy {
        line += &format!(": {remedy}");
    }
    match checks.len() {
        1 => line,
        more => format!("{line} (and {} more: `leakbpf doctor` lists them)", more - 1),
    }
}

/// Everything that was looked at, in the order of its meaning.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Report {
    pub checks: Vec<Check>,
}

impl Report {
    /// The gravest verdict; [`Verdict::Ok`] when nothing was looked at.
    pub fn verdict(&self) -> Verdict {
        self.checks.iter().map(|check| check.verdict).max().unwrap_or(Verdict::Ok)
    }

    /// An error that names every failed check.
    pub fn refuse_failures(&self) -> Result<(), Refusal> {
        let failed: Vec<Check> =
            self.checks.iter().filter(|check| check.verdict == Verdict::Fail).cloned().collect();
        if failed.is_empty() { Ok(()) } else { Err(Refusal(failed)) }
    }

    /// For people; one line a check, its remedy below it.
    pub fn to_text(&self) -> String {
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
        let mut text = String::new();
        for check in &self.checks {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{:<4}  {:<width$}  {}", check.verdict, check.name, check.found);
            if let Some(remedy) = &check.remedy {
                let _ = writeln!(text, "{:<4}  {:<width$}  → {remedy}", "", "");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            checks: vec![
                Check::ok("kernel", "6.18.0"),
                Check::warn("btf", "absent", "take another kernel"),
                Check::fail("rights", "uid 1000", "run sudo leakbpf"),
            ],
        }
    }

    #[test]
    fn the_gravest_check_decides() {
        let mut report = report();
        assert_eq!(report.verdict(), Verdict::Fail);
        let refusal = report.refuse_failures().expect_err("a failed check");
        assert_eq!(refusal.to_string(), "rights: uid 1000: run sudo leakbpf");
        report.checks.push(Check::fail("bpf", "absent", "take another kernel"));
        let refusal = report.refuse_failures().expect_err("two failed checks");
        assert_eq!(
            refusal.to_string(),
            "rights: uid 1000: run sudo leakbpf (and 1 more: `leakbpf doctor` lists them)"
        );
        report.checks.truncate(2);
        assert_eq!(report.verdict(), Verdict::Warn);
        assert_eq!(report.refuse_failures(), Ok(()));
        assert_eq!(Report::default().verdict(), Verdict::Ok);
    }

    #[test]
    fn the_text_puts_each_remedy_below_its_finding() {
        assert_eq!(
            report().to_text(),
            "ok    kernel  6.18.0\n\
             warn  btf     absent\n\
             \u{20}             → take another kernel\n\
             FAIL  rights  uid 1000\n\
             \u{20}             → run sudo leakbpf\n"
        );
    }

    #[test]
    fn the_json_names_verdict_finding_and_remedy() {
        let json = serde_json::to_value(report()).expect("JSON");
        assert_eq!(
            json["checks"][1],
            serde_json::json!({
                "name": "btf", "verdict": "warn", "found": "absent", "remedy": "take another kernel"
            })
        );
        assert_eq!(json["checks"][0]["remedy"], serde_json::Value::Null);
    }
}
