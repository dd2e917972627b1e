//! Processor time of processes, in nanoseconds: `/proc/PID/stat` counts hundredths of a second.

use std::time::Duration;

use super::Pid;

/// What the threads of a process have used so far, those that have ended included; `None` when it is
/// gone.
pub fn of(pid: Pid) -> Option<Duration> {
    let mut clock = 0;
    let pid = libc::pid_t::try_from(pid.0).ok()?;
    // SAFETY: the pointer is to a live clock id.
    if unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) } != 0 {
        return None;
    }
    read(clock)
}

pub fn of_this_thread() -> Duration {
    read(libc::CLOCK_THREAD_CPUTIME_ID).unwrap_or_default()
}

fn read(clock: libc::clockid_t) -> Option<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live timespec.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return None;
    }
    Some(Duration::new(u64::try_from(time.tv_sec).ok()?, u32::try_from(time.tv_nsec).ok()?))
}

/// Of this process: processor time, and the largest resident set in bytes.
pub fn own() -> (Duration, u64) {
    // SAFETY: all zeros is a valid rusage, and the pointer is to a live one.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let time = |time: libc::timeval| {
        Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0))
            + Duration::from_micros(u64::try_from(time.tv_usec).unwrap_or(0))
    };
    // In KiB: getrusage(2).
    let peak = u64::try_from(usage.ru_maxrss).unwrap_or(0) << 10;
    (time(usage.ru_utime) + time(usage.ru_stime), peak)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_passes_for_whoever_works() {
        let own_pid = Pid(std::process::id());
        let (before, own_before) = (of(own_pid).expect("alive"), own().0);
        let began = std::time::Instant::now();
        let mut sum = 0u64;
        while began.elapsed() < Duration::from_millis(30) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        let used = of(own_pid).expect("alive") - before;
        assert!(used > Duration::from_millis(2), "{used:?}");
        assert!(own().0 > own_before);
        assert!(own().1 > 1 << 20, "a resident set in bytes");
    }

    #[test]
    fn who_is_gone_has_no_time() {
        assert_eq!(of(Pid(u32::MAX)), None);
        assert_eq!(of(Pid(0x7fff_fff0)), None);
    }
}
