//! What time it is, by the clocks that records and reports use.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Nanoseconds after the Unix epoch.
pub fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// `CLOCK_MONOTONIC`, which is the clock of the kernel side.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let time = Duration::new(now.tv_sec as u64, now.tv_nsec as u32);
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
