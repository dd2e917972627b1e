//! A table as the kernel side searches it: see [`leakbpf_common::table`].

use std::{collections::HashMap, ops::Range};

use leakbpf_common::{
    table::{BLOCK_WORDS, Block, PackedPage, PackedRow, RULE_WORDS},
    unwind::{FRAME_POINTER_RULE, PAGE_BYTES, PAGE_SHIFT, Row, Rule},
};

use super::Table;

/// Rules that one row can name, and words that one page can point to.
const POSITIONS: usize = PackedPage::POSITIONS as usize;

/// The file's table is larger than the kernel side can address (64 MiB).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the unwind table takes more than 64 MiB")]
pub struct TooLarge;

/// A packed table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    pub blocks: Vec<Block>,
    /// Addresses of the file that the table answers for.
    pub svma: Range<u64>,
}

impl Packed {
    /// Packs a table. `None` when it has no rows.
    pub fn new(table: &Table) -> Result<Option<Self>, TooLarge> {
        let pages = table.pages.len();
        if pages == 0 {
            return Ok(None);
        }
        let first_rule = pages.next_multiple_of(RULE_WORDS);
        let mut words = vec![0u32; first_rule];
        for rule in &table.rules {
            words.extend(rule_words(rule));
        }
        let mut single = HashMap::new();
        let mut rows = table.rows.iter().copied().peekable();
        // The rule that holds where the page begins.
        let mut holding = FRAME_POINTER_RULE;
        let mut own = Vec::with_capacity(PackedPage::ROWS_MAX as usize);
        for page in 0..pages {
            own.clear();
            own.push((0u8, holding));
            let mut take = |Row { pc, rule }: Row| {
                let offset = (pc % PAGE_BYTES) as u8;
                if own.last().is_some_and(|last| last.0 == offset) {
                    own.pop();
                }
                own.push((offset, rule));
                holding = rule;
            };
            while let Some(row) = rows.next_if(|row| (row.pc >> PAGE_SHIFT) as usize <= page) {
                take(row);
            }
            let packed = own.iter().map(|&(offset, rule)| {
                let position = first_rule / RULE_WORDS + rule as usize;
                PackedRow::new(offset, position as u32).0
            });
            let position = match (own.len(), own.first()) {
                (1, Some(&(_, rule))) if single.contains_key(&rule) => single[&rule],
                (count, first) => {
                    // All of a page's rows lie in one block.
                    if words.len() % BLOCK_WORDS + count > BLOCK_WORDS {
                        words.resize(words.len().next_multiple_of(BLOCK_WORDS), 0);
                    }
                    let position = words.len();
                    words.extend(packed);
                    if let (1, Some(&(_, rule))) = (count, first) {
                        single.insert(rule, position);
                    }
                    position
                }
            };
            if position >= POSITIONS {
                return Err(TooLarge);
            }
            if let Some(word) = words.get_mut(page) {
                *word = PackedPage::new(position as u32, own.len() as u32).0;
            }
        }
        words.resize(words.len().next_multiple_of(BLOCK_WORDS), 0);
        let blocks = words.as_chunks::<BLOCK_WORDS>().0.to_vec();
        let end = table.base_svma.saturating_add((pages as u64) << PAGE_SHIFT);
        Ok(Some(Self { blocks, svma: table.base_svma..end }))
    }

    pub fn size_bytes(&self) -> usize {
        size_of_val(self.blocks.as_slice())
    }
}

fn rule_words(rule: &Rule) -> [u32; RULE_WORDS] {
    let kinds = u32::from(rule.cfa) | u32::from(rule.bp) << 8;
    [kinds, rule.a as u32, rule.b as u32, rule.bp_offset as u32]
}

#[cfg(test)]
mod tests {
    use leakbpf_common::table::{find_row, page_position};
    use proptest::prelude::*;

    use super::*;

    /// What the kernel side does.
    fn rule(packed: &Packed, pc: u32) -> [u32; RULE_WORDS] {
        let word = |position: usize| packed.blocks[position / BLOCK_WORDS][position % BLOCK_WORDS];
        let page = PackedPage(word(page_position(pc) as usize));
        let block = &packed.blocks[page.position() as usize / BLOCK_WORDS];
        let position = find_row(block, page, pc).rule() as usize * RULE_WORDS;
        std::array::from_fn(|index| word(position + index))
    }

    fn table(rows: Vec<Row>, rules: u32) -> Table {
        let rules = (0..rules).map(|a| Rule { a: a as i32, ..Rule::ENTRY }).collect();
        let pages = rows.last().map_or(0, |row| (row.pc >> PAGE_SHIFT) as usize + 1);
        Table {
            base_svma: 0x1000,
            rows,
            rules,
            pages: vec![Default::default(); pages],
            ..Table::default()
        }
    }

    fn agrees(table: &Table) {
        let packed = Packed::new(table).expect("small").expect("rows");
        let mut holding = FRAME_POINTER_RULE;
        let mut rows = table.rows.iter().peekable();
        for pc in 0..(table.pages.len() as u32) << PAGE_SHIFT {
            while let Some(row) = rows.next_if(|row| row.pc <= pc) {
                holding = row.rule;
            }
            let expected = rule_words(&table.rules[holding as usize]);
            assert_eq!(rule(&packed, pc), expected, "at {pc:#x}");
        }
    }

    #[test]
    fn a_page_with_a_row_for_each_byte_is_searched() {
        agrees(&table((0..3000).map(|pc| Row { pc, rule: pc % 700 }).collect(), 700));
    }

    #[test]
    fn a_file_without_rows_has_no_table() {
        assert_eq!(Packed::new(&Table::default()), Ok(None));
    }

    #[test]
    fn pages_inside_of_one_function_share_their_row() {
        let packed =
            Packed::new(&table(vec![Row { pc: 0, rule: 1 }, Row { pc: 200_000, rule: 2 }], 3));
        let words = packed.expect("small").expect("rows").blocks.len() * BLOCK_WORDS;
        assert_eq!(words, 1024);
    }

    proptest! {
        #[test]
        fn every_address_finds_the_rule_of_its_row(
            steps in proptest::collection::vec((1u32..900, 0u32..40), 1..400),
        ) {
            let mut pc = 0;
            let rows = steps.into_iter().map(|(step, rule)| {
                pc += step;
                Row { pc, rule }
            });
            agrees(&table(rows.collect(), 40));
        }
    }
}
