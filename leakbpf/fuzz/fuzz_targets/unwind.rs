//! Call frame information to a table, and a walk by that table. The file's last bytes are also the
//! registers and the stack.

#![no_main]

use leakbpf::unwind::{Packed, Table};
use leakbpf_common::table::{BLOCK_WORDS, PackedPage, RULE_WORDS, find_row, page_position};
use leakbpf_common::unwind::{PAGE_ROWS_MAX, Registers, Rule, Step, step};
use libfuzzer_sys::fuzz_target;

/// Words of stack that the input gives.
const STACK_WORDS: usize = 64;
const FRAMES_MAX: usize = 128;
const ROWS_MAX: usize = 256;

/// Code of a gigabyte, which any file can claim, takes a tenth of a second to pack.
const PAGES_MAX: usize = 1 << 12;

fuzz_target!(|data: &[u8]| {
    let Ok(table) = Table::of_bytes(data) else {
        return;
    };
    assert_sound(&table);
    if table.pages.len() <= PAGES_MAX
        && let Ok(Some(packed)) = &Packed::new(&table)
    {
        for row in table.rows.iter().take(ROWS_MAX) {
            assert_agrees(&table, packed, row.pc);
            assert_agrees(&table, packed, row.pc.saturating_sub(1));
        }
    }
    let (words, _) = data.as_chunks::<8>();
    let words: Vec<u64> =
        words.iter().rev().take(STACK_WORDS).map(|word| u64::from_le_bytes(*word)).collect();
    walk(&table, &words);
});

/// What every table must be, whatever the file was.
fn assert_sound(table: &Table) {
    assert_eq!(table.rules.first(), Some(&Rule::FRAME_POINTER));
    assert!(table.rows.is_sorted_by(|a, b| a.pc < b.pc));
    for row in &table.rows {
        assert!((row.rule as usize) < table.rules.len());
    }
    for page in &table.pages {
        assert!(page.first() <= page.end() && page.end() as usize <= table.rows.len());
        assert!(page.end() - page.first() <= PAGE_ROWS_MAX);
    }
}

/// The kernel side's search finds the same rule as ours.
fn assert_agrees(table: &Table, packed: &Packed, pc: u32) {
    let word = |position: usize| packed.blocks[position / BLOCK_WORDS][position % BLOCK_WORDS];
    let page = PackedPage(word(page_position(pc) as usize));
    let block = &packed.blocks[page.position() as usize / BLOCK_WORDS];
    let position = find_row(block, page, pc).rule() as usize * RULE_WORDS;
    let theirs: [u32; RULE_WORDS] = std::array::from_fn(|index| word(position + index));
    let Some(svma) = table.base_svma.checked_add(pc.into()) else {
        return;
    };
    let rule = table.rule(svma);
    let kinds = u32::from(rule.cfa) | u32::from(rule.bp) << 8;
    assert_eq!(theirs, [kinds, rule.a as u32, rule.b as u32, rule.bp_offset as u32]);
}

fn walk(table: &Table, words: &[u64]) {
    let word = |index: u64| {
        let index = (index % STACK_WORDS as u64) as usize;
        words.get(index).copied()
    };
    // Low addresses are readable, so that small values from the file lead somewhere.
    let read = |address: u64| (address < 1 << 40).then(|| word(address / 8)).flatten();
    let mut registers = Registers {
        ip: word(0).unwrap_or(0),
        sp: word(1).unwrap_or(0),
        bp: word(2).unwrap_or(0),
        after_call: 0,
    };
    for rule in table.rules.iter().take(ROWS_MAX) {
        let _ = step(rule, &registers, read);
    }
    for _ in 0..FRAMES_MAX {
        let rule = table.rule(registers.lookup_ip());
        match step(&rule, &registers, read) {
            Step::Frame(caller) => registers = caller,
            Step::End | Step::Stop(_) => break,
        }
    }
}
