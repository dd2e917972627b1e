//! Bounds on the work for an answer.

use std::time::{Duration, Instant};

use gimli::AttributeSpecification;

use super::DwarfError;

/// Spans of units, functions, ranges, rows: each is 16 to 40 bytes in memory.
const ITEMS_MAX: u64 = 4 << 20;

/// Steps between two looks at the clock.
const STEPS_BETWEEN_LOOKS: u32 = 1024;

/// Time that is granted.
#[derive(Debug, Clone, Copy)]
pub struct WorkTime {
    /// To find out which unit covers which addresses.
    pub index: Duration,
    /// For one address.
    pub lookup: Duration,
    /// For all addresses of one file together: so much, and `mean` for each.
    pub total: Duration,
    pub mean: Duration,
}

impl Default for WorkTime {
    /// Thirty times what large honest files take.
    fn default() -> Self {
        Self {
            index: Duration::from_secs(10),
            lookup: Duration::from_secs(2),
            total: Duration::from_secs(20),
            mean: Duration::from_millis(1),
        }
    }
}

/// A bound on the work for one answer.
#[derive(Debug)]
pub(super) struct Budget {
    until: Instant,
    items: u64,
    steps: u32,
}

impl Budget {
    pub(super) fn new(time: Duration) -> Budget {
        Budget { until: Instant::now() + time, items: ITEMS_MAX, steps: 0 }
    }

    /// Accounts for something that is kept in memory.
    pub(super) fn keep(&mut self) -> Result<(), DwarfError> {
        self.items = self.items.checked_sub(1).ok_or(DwarfError::TooMuchWork)?;
        self.step()
    }

    /// Accounts for something that is looked at.
    pub(super) fn step(&mut self) -> Result<(), DwarfError> {
        self.step_by(1)
    }

    /// Accounts for the attributes of a DIE. There can be a million, and take no byte of it.
    pub(super) fn step_over(
        &mut self,
        attributes: &[AttributeSpecification],
    ) -> Result<(), DwarfError> {
        self.step_by(u32::try_from(attributes.len()).unwrap_or(u32::MAX))
    }

    pub(super) fn step_by(&mut self, steps: u32) -> Result<(), DwarfError> {
        self.steps = self.steps.saturating_add(steps);
        if self.steps >= STEPS_BETWEEN_LOOKS {
            self.steps = 0;
            self.check_time()?;
        }
        Ok(())
    }

    pub(super) fn check_time(&self) -> Result<(), DwarfError> {
        if Instant::now() > self.until {
            return Err(DwarfError::TooMuchWork);
        }
        Ok(())
    }
}
