//! Gives equal things one row: names, frames and stacks repeat endlessly.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;

/// Row ids of one table, counted from 1 in the order of first appearance.
pub struct Interner<K> {
    rows: HashMap<K, i64>,
}

impl<K: Eq + Hash> Interner<K> {
    pub fn new() -> Self {
        Self { rows: HashMap::new() }
    }

    pub fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<i64>
    where
        K: Borrow<Q>,
    {
        self.rows.get(key).copied()
    }

    /// The row that `key`, which has none, gets.
    pub fn insert(&mut self, key: K) -> i64 {
        let row = self.rows.len() as i64 + 1;
        self.rows.insert(key, row);
        row
    }
}
