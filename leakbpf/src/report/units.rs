//! Numbers as people read them.

/// `1.2 GiB`: three significant digits, binary units.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would be printed as 1024.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.digits$} {}", UNITS.get(unit).copied().unwrap_or_default())
}

/// `12,345,678`.
pub fn exact(count: u64) -> String {
    let digits = count.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// `2 mappings`, `1 mapping`.
pub fn count(number: u64, noun: &str) -> String {
    format!("{} {noun}{}", exact(number), if number == 1 { "" } else { "s" })
}

/// `12.3%`.
pub fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "0.0%".to_owned();
    }
    format!("{:.1}%", part as f64 * 100.0 / whole as f64)
}

/// `850 ms`, `12.3 s`, `4m 05s`, `3h 07m`, `2d 05h`.
pub fn duration(nanoseconds: u64) -> String {
    let milliseconds = nanoseconds / 1_000_000;
    let seconds = milliseconds / 1000;
    match seconds {
        0 if nanoseconds > 0 && milliseconds == 0 => "<1 ms".to_owned(),
        0 => format!("{milliseconds} ms"),
        1..60 => format!("{}.{} s", seconds, milliseconds % 1000 / 100),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d {:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// `2026-08-01 12:34:56 UTC`.
pub fn time(unix_ns: u64) -> String {
    let since = std::time::Duration::from_secs(unix_ns / 1_000_000_000);
    let time = std::time::UNIX_EPOCH + since;
    let text = humantime::format_rfc3339_seconds(time).to_string();
    text.trim_end_matches('Z').replace('T', " ") + " UTC"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_keep_three_digits_and_never_reach_1024() {
        let shown = [0, 1023, 1024, 1536, 1_047_552, 1_048_575, 1_048_576, u64::MAX].map(bytes);
        assert_eq!(
            shown,
            [
                "0 B", "1023 B", "1.00 KiB", "1.50 KiB", "1.00 MiB", "1.00 MiB", "1.00 MiB",
                "16.0 EiB"
            ]
        );
    }

    #[test]
    fn digits_are_grouped_from_the_right() {
        let shown = [0, 999, 1000, 1_234_567].map(exact);
        assert_eq!(shown, ["0", "999", "1,000", "1,234,567"]);
    }

    #[test]
    fn durations_show_the_two_largest_units() {
        let second = 1_000_000_000;
        let shown = [0, 1, second / 2, 12 * second + second / 3, 245 * second, 11_220 * second]
            .map(duration);
        assert_eq!(shown, ["0 ms", "<1 ms", "500 ms", "12.3 s", "4m 05s", "3h 07m"]);
    }

    #[test]
    fn any_time_can_be_shown() {
        assert_eq!(time(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(time(u64::MAX), "2554-07-21 23:34:33 UTC");
    }
}
