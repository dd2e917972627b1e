mod fixture;
mod hostile;
mod real;
mod synthetic;

use leakbpf_common::unwind::{PAGE_ROWS_MAX, PAGE_SHIFT, Rule, cfa};

use super::Table;

/// What every table must be, whatever the file was.
fn assert_sound(table: &Table) {
    assert_eq!(table.rules.first(), Some(&Rule::FRAME_POINTER));
    for pair in table.rows.windows(2) {
        assert!(pair[0].pc < pair[1].pc, "sorted, each address once: {pair:?}");
    }
    for row in &table.rows {
        assert!((row.rule as usize) < table.rules.len(), "{row:?}");
    }
    for (number, page) in table.pages.iter().enumerate() {
        let (first, end) = (page.first() as usize, page.end() as usize);
        assert!(first <= end && end <= table.rows.len(), "page {number}: {first}..{end}");
        assert!(end - first <= PAGE_ROWS_MAX as usize, "page {number}: {first}..{end}");
        let below = |row: usize| table.rows[row].pc >> PAGE_SHIFT <= number as u32;
        assert!((first..end).all(below), "page {number} has no row of a later one");
    }
    if let Some(last) = table.rows.last() {
        assert_eq!(table.rules[last.rule as usize].cfa, cfa::FRAME_POINTER, "the code ends");
        assert_eq!(table.pages.len() as u32, (last.pc >> PAGE_SHIFT) + 1);
    }
}
