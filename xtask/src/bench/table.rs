//! Figures and the Markdown tables that show them.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// What repeated measurements of one thing gave.
#[derive(Debug, Clone, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The least disturbed one; `None` without samples.
    pub fn min(&self) -> Option<f64> {
        self.0.iter().copied().reduce(f64::min)
    }

    /// `None` without samples.
    pub fn max(&self) -> Option<f64> {
        self.0.iter().copied().reduce(f64::max)
    }

    /// `None` without samples. Of an even number, the upper of the two in the middle.
    pub fn median(&self) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied()
    }
}

/// A Markdown table.
#[derive(Debug)]
pub struct Table {
    columns: usize,
    text: String,
}

impl Table {
    /// The first column is text, the others are figures.
    pub fn new(headings: &[&str]) -> Self {
        let mut text = String::new();
        let _ = writeln!(text, "| {} |", headings.join(" | "));
        let _ = writeln!(text, "|---|{}", "---:|".repeat(headings.len().saturating_sub(1)));
        Self { columns: headings.len(), text }
    }

    pub fn row(&mut self, name: &str, figures: &[String]) {
        debug_assert_eq!(figures.len() + 1, self.columns);
        let _ = writeln!(self.text, "| {name} | {} |", figures.join(" | "));
    }

    pub fn text(&self) -> &str {
        &self.text
    }
}

/// About three significant digits, thousands separated; an en dash for what was not measured.
pub fn figure(value: Option<f64>) -> String {
    let Some(value) = value else {
        return "–".to_owned();
    };
    let magnitude = value.abs();
    if magnitude < 0.1 {
        return format!("{value:.4}");
    }
    if magnitude < 10.0 {
        return format!("{value:.2}");
    }
    if magnitude < 100.0 {
        return format!("{value:.1}");
    }
    let digits = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    if value < 0.0 { format!("-{text}") } else { text }
}

/// A difference, with its sign; an en dash for what was not measured.
pub fn signed(value: Option<f64>) -> String {
    value.map_or_else(|| figure(None), |value| format!("{value:+.2}"))
}

/// How many times `of` one value is, with a multiplication sign.
pub fn ratio(value: Option<f64>, of: Option<f64>) -> String {
    match (value, of) {
        (Some(value), Some(of)) if of != 0.0 => format!("{}×", figure(Some(value / of))),
        _ => figure(None),
    }
}

/// Replaces what is between `<!-- bench:NAME -->` and the next `<!-- /bench -->`.
///
/// # Errors
/// The file cannot be read or written, or has no such markers.
pub fn insert(file: &Path, name: &str, content: &str) -> Result<()> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let replaced = replace(&text, name, content)
        .with_context(|| format!("{} has no markers for {name}", file.display()))?;
    fs::write(file, replaced).with_context(|| format!("write {}", file.display()))
}

fn replace(text: &str, name: &str, content: &str) -> Option<String> {
    let begin = format!("<!-- bench:{name} -->\n");
    let (before, rest) = text.split_once(&begin)?;
    let end = rest.find("<!-- /bench -->")?;
    Some(format!("{before}{begin}{content}{}", rest.get(end..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_significant_digits_and_separated_thousands() {
        assert_eq!(figure(Some(1.234)), "1.23");
        assert_eq!(figure(Some(12.34)), "12.3");
        assert_eq!(figure(Some(1234.0)), "1,234");
        assert_eq!(figure(Some(1_234_567.0)), "1,234,567");
        assert_eq!(figure(None), "–");
    }

    #[test]
    fn only_what_is_between_the_named_markers_is_replaced() {
        let text = "a\n<!-- bench:x -->\nold\n<!-- /bench -->\nb\n<!-- bench:y -->\nkept\n<!-- /bench -->\n";
        let replaced = replace(text, "x", "new\n").expect("markers");
        assert_eq!(
            replaced,
            "a\n<!-- bench:x -->\nnew\n<!-- /bench -->\nb\n<!-- bench:y -->\nkept\n<!-- /bench -->\n"
        );
        assert!(replace(text, "z", "").is_none());
    }

    #[test]
    fn the_median_is_not_moved_by_an_outlier() {
        let mut samples = Samples::default();
        for value in [3.0, 1.0, 1000.0] {
            samples.push(value);
        }
        assert_eq!(samples.median(), Some(3.0));
        assert_eq!(samples.min(), Some(1.0));
        assert_eq!(Samples::default().median(), None);
    }
}
