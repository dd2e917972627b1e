//! Rows whose values are not trusted: a recording may come from anywhere.

use rusqlite::Row;

/// What can be wrong with a row.
pub enum Fault {
    Sqlite(rusqlite::Error),
    Content(String),
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

/// A row whose values are not trusted.
pub struct RowReader<'a> {
    row: &'a Row<'a>,
    /// How much more the table may yield.
    budget_bytes: u64,
}

impl<'a> RowReader<'a> {
    pub fn new(row: &'a Row<'a>, budget_bytes: u64) -> Self {
        Self { row, budget_bytes }
    }

    pub fn budget_bytes(&self) -> u64 {
        self.budget_bytes
    }

    /// Takes what a value needs in the file from what the table may still yield.
    pub fn charge(&mut self, bytes: u64) -> Result<(), Fault> {
        let left = self.budget_bytes.checked_sub(bytes);
        self.budget_bytes = left.ok_or_else(|| self.wrong("more rows than fit the file"))?;
        Ok(())
    }

    pub fn wrong(&self, what: &str) -> Fault {
        Fault::Content(what.to_owned())
    }

    pub fn integer(&mut self, column: usize) -> Result<i64, Fault> {
        Ok(self.row.get(column)?)
    }

    /// A value that is never negative.
    pub fn count(&mut self, column: usize) -> Result<u64, Fault> {
        let value = self.integer(column)?;
        u64::try_from(value).map_err(|_| self.wrong("a negative number"))
    }

    /// A number that is never negative, and need not be whole.
    pub fn measure(&mut self, column: usize) -> Result<f64, Fault> {
        let value: f64 = self.row.get(column)?;
        if value.is_finite() && value >= 0.0 { Ok(value) } else { Err(self.wrong("no measure")) }
    }

    /// A 64-bit pattern.
    pub fn pattern(&mut self, column: usize) -> Result<u64, Fault> {
        Ok(self.integer(column)?.cast_unsigned())
    }

    pub fn u32(&mut self, column: usize) -> Result<u32, Fault> {
        let value = self.integer(column)?;
        u32::try_from(value).map_err(|_| self.wrong("a number out of range"))
    }

    pub fn text(&mut self, column: usize) -> Result<String, Fault> {
        let text: String = self.row.get(column)?;
        self.charge(text.len() as u64)?;
        Ok(text)
    }

    pub fn optional<T>(
        &mut self,
        column: usize,
        read: impl FnOnce(&mut Self, usize) -> Result<T, Fault>,
    ) -> Result<Option<T>, Fault> {
        match self.row.get_ref(column)? {
            rusqlite::types::ValueRef::Null => Ok(None),
            _ => read(self, column).map(Some),
        }
    }

    /// Ids count from 1 without gaps.
    pub fn expect_id(&mut self, column: usize, before: usize) -> Result<(), Fault> {
        self.expect_number(column, before as i64 + 1)
    }

    /// Positions count from 0 without gaps.
    pub fn expect_position(&mut self, column: usize, before: usize) -> Result<(), Fault> {
        self.expect_number(column, before as i64)
    }

    pub fn expect_number(&mut self, column: usize, expected: i64) -> Result<(), Fault> {
        if self.integer(column)? == expected {
            Ok(())
        } else {
            Err(Fault::Content(format!("row {expected} is missing")))
        }
    }

    /// Index of the row that a column refers to.
    pub fn reference(&mut self, column: usize, what: &str, rows: usize) -> Result<usize, Fault> {
        let id = self.integer(column)?;
        match usize::try_from(id) {
            Ok(id) if (1..=rows).contains(&id) => Ok(id - 1),
            _ => Err(Fault::Content(format!("{what} {id} is not there"))),
        }
    }

    pub fn by_id<'t, T>(&self, what: &str, id: i64, table: &'t [T]) -> Result<&'t T, Fault> {
        let index = usize::try_from(id).ok().and_then(|id| id.checked_sub(1));
        index
            .and_then(|index| table.get(index))
            .ok_or_else(|| Fault::Content(format!("{what} {id} is not there")))
    }

    /// The list that rows are being appended to, which `id` must name.
    pub fn last_list<'t, T>(&self, id: i64, lists: &'t mut [T]) -> Result<&'t mut T, Fault> {
        let count = lists.len();
        match lists.last_mut() {
            Some(last) if usize::try_from(id).ok() == Some(count) => Ok(last),
            _ => Err(Fault::Content(format!("list {id} is out of order"))),
        }
    }
}
