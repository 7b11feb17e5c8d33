//! Numbers and times as the screen writes them: unknown is `-`, zero is `0`, and widths do not dance.

use crate::engine::Micros;
use crate::lsn::Lsn;

const SECOND: i64 = 1_000_000;
const DAY: i64 = 86_400;

/// A count of rows with three digits that matter: `0`, `999`, `48.2 k`, `9.60 M`, `310 k`. At most 6 columns.
pub(super) fn rows(count: u64) -> String {
    if count < 1000 {
        return count.to_string();
    }
    let (mut value, mut unit) = (as_f64(count) / 1e3, 0);
    // 999.5 would be written as 1000.
    while value >= 999.5 && unit < 5 {
        value /= 1e3;
        unit += 1;
    }
    let unit = ["k", "M", "G", "T", "P", "E"][unit];
    let decimals = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.decimals$} {unit}")
}

/// An estimated count, marked so: `~3.1 M`, `~128 M`, `~0`. At most 6 columns.
pub(super) fn rows_about(count: u64) -> String {
    if count < 1000 {
        return format!("~{count}");
    }
    let (mut value, mut unit) = (as_f64(count) / 1e3, 0);
    while value >= 999.5 && unit < 5 {
        value /= 1e3;
        unit += 1;
    }
    let unit = ["k", "M", "G", "T", "P", "E"][unit];
    let decimals = usize::from(value < 9.95);
    format!("~{value:.decimals$} {unit}")
}

/// A count in full, with commas: `1,204`.
pub(super) fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count in full up to eight digits, [`rows`] beyond: `1,204`, `1.00 T`. At most 10 columns.
pub(super) fn short_count(value: u64) -> String {
    if value < 100_000_000 { count(value) } else { rows(value) }
}

/// A count of errors, loud unless zero: `0`, `17!`, `12k!`. At most 4 columns.
pub(super) fn errors(count: u64) -> String {
    match count {
        0 => "0".to_owned(),
        1..=999 => format!("{count}!"),
        1_000..=99_999 => format!("{}k!", count / 1000),
        _ => ">99k".to_owned(),
    }
}

/// A rate per second, without its unit: `0`, `0.3`, `12`, `61.2k`, `1.2M`. At most 6 columns.
pub(super) fn rate(per_second: f64) -> String {
    if !per_second.is_finite() {
        return unknown();
    }
    if per_second <= 0.0 {
        return "0".to_owned();
    }
    if per_second < 0.05 {
        return "<0.1".to_owned();
    }
    if per_second < 9.95 {
        return if (per_second - per_second.round()).abs() < 0.05 {
            format!("{per_second:.0}")
        } else {
            format!("{per_second:.1}")
        };
    }
    if per_second < 999.5 {
        return format!("{per_second:.0}");
    }
    let (mut value, mut unit) = (per_second / 1e3, 0);
    while value >= 999.95 && unit < 5 {
        value /= 1e3;
        unit += 1;
    }
    if value >= 999.95 {
        return ">999E".to_owned();
    }
    format!("{value:.1}{}", ["k", "M", "G", "T", "P", "E"][unit])
}

const BYTES: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// Bytes in binary units: `0 B`, `512 B`, `3.4 GiB`, `412 MiB`. At most 8 columns.
pub(super) fn bytes(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut value, mut unit) = (as_f64(bytes), 0);
    while value >= 1023.5 && unit < 6 {
        value /= 1024.0;
        unit += 1;
    }
    if value < 99.95 { format!("{value:.1} {}", BYTES[unit]) } else { format!("{value:.0} {}", BYTES[unit]) }
}

/// [`bytes`] of an unknown size.
pub(super) fn bytes_opt(size: Option<u64>) -> String {
    size.map_or_else(unknown, bytes)
}

/// Bytes per second: `4.1 MiB/s`.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate for a screen; `as` saturates")]
pub(super) fn byte_rate(per_second: f64) -> String {
    if !per_second.is_finite() {
        return unknown();
    }
    format!("{}/s", bytes(per_second.max(0.0).round() as u64))
}

/// A part of a limit in the limit's unit: `3.4 of 50 GiB`; in its own unit where it would look like nothing.
pub(super) fn bytes_of(part: u64, limit: u64) -> String {
    let (mut scale, mut unit) = (1.0_f64, 0);
    while as_f64(limit) / scale >= 1023.5 && unit < 6 {
        scale *= 1024.0;
        unit += 1;
    }
    let whole = as_f64(limit) / scale;
    let share = as_f64(part) / scale;
    let whole = if (whole - whole.round()).abs() < 0.05 { format!("{whole:.0}") } else { format!("{whole:.1}") };
    if part > 0 && share < 0.05 {
        return format!("{} of {whole} {}", bytes(part), BYTES[unit]);
    }
    let share = if part == 0 || unit == 0 { format!("{share:.0}") } else { format!("{share:.1}") };
    format!("{share} of {whole} {}", BYTES[unit])
}

/// A share between 0 and 1 as a percentage of at most 6 columns. Cut, not rounded: only the whole reads `100.0%`.
pub(super) fn percent(share: Option<f64>) -> String {
    match share {
        Some(share) if share.is_finite() => format!("{:.1}%", (share.clamp(0.0, 1.0) * 1000.0 + 1e-9).floor() / 10.0),
        _ => unknown(),
    }
}

/// A span as a clock: `00:00:27`, `03:35:00`, `5d 03h`, `412d`. At most 8 columns.
pub(super) fn clock_span(seconds: u64) -> String {
    let (days, hours) = (seconds / 86_400, seconds / 3600);
    if hours < 100 {
        format!("{:02}:{:02}:{:02}", hours, seconds / 60 % 60, seconds % 60)
    } else if days < 1000 {
        format!("{days}d {:02}h", hours % 24)
    } else if days < 1_000_000 {
        format!("{days}d")
    } else {
        ">1M days".to_owned()
    }
}

/// An estimated time to the end: `~00:00:27`; `-` while unknown. At most 9 columns.
pub(super) fn eta(seconds: Option<u64>) -> String {
    seconds.map_or_else(unknown, |seconds| format!("~{}", clock_span(seconds)))
}

/// A span in words: `40s`, `3m20s`, `3h14m`, `2d04h`, `>999d`. At most 6 columns.
pub(super) fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ if seconds / 86_400 < 100 => format!("{}d{:02}h", seconds / 86_400, seconds / 3600 % 24),
        _ if seconds / 86_400 < 1000 => format!("{}d", seconds / 86_400),
        _ => ">999d".to_owned(),
    }
}

/// Seconds with one decimal below a minute, words above: `0 s`, `14.2 s`, `3m20s`.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "finite, not negative; `as` saturates")]
pub(super) fn seconds(value: Option<f64>) -> String {
    match value {
        None => unknown(),
        Some(value) if !value.is_finite() => unknown(),
        Some(value) if value <= 0.0 => "0 s".to_owned(),
        Some(value) if value < 59.95 => format!("{value:.1} s"),
        Some(value) => span(value.round() as u64),
    }
}

/// How long one thing took: `38 ms`, `0.31 s`, `14.2 s`, `3m20s`. At most 7 columns.
pub(super) fn latency(seconds: f64) -> String {
    if !seconds.is_finite() {
        return unknown();
    }
    let seconds = seconds.max(0.0);
    if seconds < 0.0995 {
        format!("{:.0} ms", seconds * 1e3)
    } else if seconds < 9.995 {
        format!("{seconds:.2} s")
    } else {
        self::seconds(Some(seconds))
    }
}

/// Milliseconds of bulks, and the unit that they are written in: `96`, `412`, `2,310` ms; in seconds as soon as one of them
/// takes 10 s, so that a line of them stays short: `4.1`, `14.6` s.
pub(super) fn latencies<const N: usize>(values: [f64; N]) -> ([String; N], &'static str) {
    if !values.iter().any(|value| value.is_finite() && *value >= 9_999.5) {
        return (values.map(millis), "ms");
    }
    let seconds = |value: f64| match value / 1e3 {
        value if (0.0..99.95).contains(&value) => format!("{value:.1}"),
        value => rate(value),
    };
    (values.map(seconds), "s")
}

/// Milliseconds of a bulk: `0`, `96`, `412`, `2,310`; no unit.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "finite, not negative; `as` saturates")]
fn millis(value: f64) -> String {
    match value {
        _ if !value.is_finite() => unknown(),
        _ if value < 1e7 => count(value.max(0.0).round() as u64),
        _ => rate(value),
    }
}

/// A position, or `-`.
pub(super) fn lsn(position: Option<Lsn>) -> String {
    position.map_or_else(unknown, |lsn| lsn.to_string())
}

/// The clock of a moment in UTC: `10:32:07`.
pub(super) fn time(at: Micros) -> String {
    let second = at.div_euclid(SECOND).rem_euclid(DAY);
    format!("{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
}

/// The same with milliseconds: `10:32:07.412`.
pub(super) fn time_millis(at: Micros) -> String {
    format!("{}.{:03}", time(at), at.rem_euclid(SECOND) / 1000)
}

/// The clock of a moment of today, `11-22 10:32:07` of any other day.
pub(super) fn moment(at: Micros, now: Micros) -> String {
    if at.div_euclid(SECOND * DAY) == now.div_euclid(SECOND * DAY) {
        return time(at);
    }
    let (month, day) = month_day(at.div_euclid(SECOND * DAY));
    format!("{month:02}-{day:02} {}", time(at))
}

/// The clock with milliseconds of a moment of today, `11-22 10:32` of any other day. At most 12 columns.
pub(super) fn moment_millis(at: Micros, now: Micros) -> String {
    let text = moment(at, now);
    if text.len() > 8 { text.chars().take(11).collect() } else { time_millis(at) }
}

/// The clock of a moment of today, `11-22` of any other day. At most 8 columns.
pub(super) fn day_or_time(at: Micros, now: Micros) -> String {
    let text = moment(at, now);
    if text.len() > 8 { text.chars().take(5).collect() } else { text }
}

/// How long ago, in [`seconds`]; a moment to come is `0 s`.
#[allow(clippy::cast_precision_loss, reason = "a span for a screen")]
pub(super) fn age(at: Micros, now: Micros) -> String {
    seconds(Some(now.saturating_sub(at).max(0) as f64 / 1e6))
}

/// Whole seconds from `since` to `now`; 0 where that is not later.
pub(super) fn seconds_since(since: Micros, now: Micros) -> u64 {
    u64::try_from(now.saturating_sub(since) / SECOND).unwrap_or(0)
}

/// Month and day of a day number since 1970-01-01 (Hinnant's `civil_from_days`).
fn month_day(days: i64) -> (i64, i64) {
    let days = days + 719_468;
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    (if month < 10 { month + 3 } else { month - 9 }, day_of_year - (153 * month + 2) / 5 + 1)
}

/// What is not known.
pub(super) fn unknown() -> String {
    "-".to_owned()
}

const EIGHTHS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];

/// A bar of `width` cells in eighths; full only for a share of 1, not empty for a share above 0.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a share between 0 and 1 of a screen's width"
)]
pub(super) fn bar(share: f64, width: usize) -> String {
    let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
    let mut eighths = (share * (width * 8) as f64).floor() as usize;
    if share > 0.0 {
        eighths = eighths.max(1);
    }
    let full = (eighths / 8).min(width);
    let mut bar = "█".repeat(full);
    if full < width && !eighths.is_multiple_of(8) {
        bar.push(EIGHTHS[eighths % 8]);
    }
    let rest = width.saturating_sub(full + usize::from(full < width && !eighths.is_multiple_of(8)));
    bar.push_str(&"░".repeat(rest));
    bar
}

const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// A line of bars, one per value, scaled to the largest; a gap is a space and zero is the lowest bar.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share between 0 and 1 of 7")]
pub(super) fn sparkline(values: &[Option<f64>]) -> String {
    let top = values.iter().flatten().copied().filter(|value| value.is_finite()).fold(0.0, f64::max);
    values
        .iter()
        .map(|value| match value {
            Some(value) if value.is_finite() && top > 0.0 => {
                LEVELS[((value.max(0.0) / top * 7.0).round() as usize).min(7)]
            }
            Some(_) => LEVELS[0],
            None => ' ',
        })
        .collect()
}

#[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(super) fn as_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use unicode_width::UnicodeWidthStr;

    fn columns(text: &str, most: usize) {
        assert!(text.width() <= most, "`{text}` is wider than {most}");
    }

    #[test]
    fn rows_keep_three_digits_in_six_columns() {
        for (value, text) in [
            (0, "0"),
            (999, "999"),
            (1_000, "1.00 k"),
            (9_994, "9.99 k"),
            (9_996, "10.0 k"),
            (48_214, "48.2 k"),
            (310_000, "310 k"),
            (999_499, "999 k"),
            (999_500, "1.00 M"),
            (9_600_000, "9.60 M"),
            (1_000_000_000_000, "1.00 T"),
            (u64::MAX, "18.4 E"),
        ] {
            assert_eq!(rows(value), text);
            columns(text, 6);
        }
        for (value, text) in
            [(0, "~0"), (950, "~950"), (3_100_000, "~3.1 M"), (128_000_000, "~128 M"), (u64::MAX, "~18 E")]
        {
            assert_eq!(rows_about(value), text);
        }
        for shift in 0..64 {
            columns(&rows(u64::MAX >> shift), 6);
            columns(&rows_about(u64::MAX >> shift), 6);
            columns(&errors(u64::MAX >> shift), 4);
            columns(&bytes(u64::MAX >> shift), 8);
            columns(&clock_span(u64::MAX >> shift), 8);
            columns(&span(u64::MAX >> shift), 6);
            columns(&rate(as_f64(u64::MAX >> shift)), 6);
        }
    }

    #[test]
    fn counts_have_commas() {
        for (value, text) in [
            (0, "0"),
            (999, "999"),
            (1_204, "1,204"),
            (1_000_000, "1,000,000"),
            (u64::MAX, "18,446,744,073,709,551,615"),
        ] {
            assert_eq!(count(value), text);
        }
        assert_eq!((short_count(99_999_999).as_str(), short_count(u64::MAX).as_str()), ("99,999,999", "18.4 E"));
        for (value, text) in
            [(0, "0"), (17, "17!"), (999, "999!"), (1_204, "1k!"), (99_999, "99k!"), (u64::MAX, ">99k")]
        {
            assert_eq!(errors(value), text);
        }
    }

    #[test]
    fn rates_tell_zero_from_little_and_from_unknown() {
        for (value, text) in [
            (0.0, "0"),
            (-1.0, "0"),
            (0.01, "<0.1"),
            (0.3, "0.3"),
            (1.0, "1"),
            (9.96, "10"),
            (12.0, "12"),
            (999.4, "999"),
            (999.6, "1.0k"),
            (61_234.0, "61.2k"),
            (141_000.0, "141.0k"),
            (999_960.0, "1.0M"),
            (f64::NAN, "-"),
            (f64::INFINITY, "-"),
            (f64::MAX, ">999E"),
        ] {
            assert_eq!(rate(value), text, "{value}");
            columns(text, 6);
        }
        assert_eq!(byte_rate(4.1 * 1_048_576.0), "4.1 MiB/s");
        assert_eq!((byte_rate(0.0).as_str(), byte_rate(f64::NAN).as_str()), ("0 B/s", "-"));
    }

    #[test]
    fn bytes_are_binary() {
        const GIB: u64 = 1 << 30;
        for (value, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (58 << 20, "58.0 MiB"),
            (412 << 20, "412 MiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (GIB * 34 / 10, "3.4 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(value), text);
        }
        assert_eq!((bytes_opt(None).as_str(), bytes_opt(Some(0)).as_str()), ("-", "0 B"));
        assert_eq!(bytes_of(GIB * 34 / 10, 50 * GIB), "3.4 of 50 GiB");
        assert_eq!(bytes_of(0, 50 * GIB), "0 of 50 GiB");
        assert_eq!(bytes_of(12 << 20, 50 * GIB), "12.0 MiB of 50 GiB");
        assert_eq!(bytes_of(u64::MAX, u64::MAX), "16.0 of 16 EiB");
        assert_eq!(bytes_of(0, 0), "0 of 0 B");
        assert_eq!(bytes_of(100, 1000), "100 of 1000 B");
    }

    #[test]
    fn only_the_whole_is_a_hundred_percent() {
        for (share, text) in [
            (None, "-"),
            (Some(0.0), "0.0%"),
            (Some(0.203), "20.3%"),
            (Some(0.071), "7.1%"),
            (Some(0.999_99), "99.9%"),
            (Some(1.0), "100.0%"),
            (Some(7.0), "100.0%"),
            (Some(f64::NAN), "-"),
        ] {
            assert_eq!(percent(share), text);
        }
        assert_eq!(bar(0.999_99, 12), "███████████▉");
        assert_eq!(bar(1.0, 12), "████████████");
        assert_eq!(bar(0.828, 12), "█████████▉░░");
        assert_eq!(bar(0.0, 12), "░░░░░░░░░░░░");
        assert_eq!(bar(1e-9, 4), "▏░░░");
        assert_eq!(bar(0.5, 0), "");
    }

    #[test]
    fn spans() {
        for (value, clock, words) in [
            (0, "00:00:00", "0s"),
            (27, "00:00:27", "27s"),
            (200, "00:03:20", "3m20s"),
            (11_640, "03:14:00", "3h14m"),
            (359_999, "99:59:59", "4d03h"),
            (360_000, "4d 04h", "4d04h"),
            (8_640_000, "100d 00h", "100d"),
            (86_400_000, "1000d", ">999d"),
            (u64::MAX, ">1M days", ">999d"),
        ] {
            assert_eq!((clock_span(value).as_str(), span(value).as_str()), (clock, words));
        }
        assert_eq!((eta(None).as_str(), eta(Some(12_900)).as_str()), ("-", "~03:35:00"));
        for (value, text) in [
            (None, "-"),
            (Some(0.0), "0 s"),
            (Some(14.2), "14.2 s"),
            (Some(59.96), "1m00s"),
            (Some(f64::MAX), ">999d"),
            (Some(f64::NAN), "-"),
        ] {
            assert_eq!(seconds(value), text);
        }
        for (value, text) in [(0.0, "0 ms"), (0.038, "38 ms"), (0.31, "0.31 s"), (9.999, "10.0 s"), (f64::NAN, "-")] {
            assert_eq!(latency(value), text);
        }
        assert_eq!((millis(2310.4).as_str(), millis(0.0).as_str(), millis(f64::NAN).as_str()), ("2,310", "0", "-"));
        assert_eq!(latencies([96.0, 9_999.4]), (["96".to_owned(), "9,999".to_owned()], "ms"));
        let ([p50, p95, p99, max], unit) = latencies([4_145.0, 99_949.0, 99_951.0, f64::NAN]);
        assert_eq!([&p50, &p95, &p99, &max, unit], ["4.1", "99.9", "100", "-", "s"]);
        assert_eq!((millis(9_999_999.0).as_str(), millis(1e12).as_str()), ("9,999,999", "1.0T"));
    }

    #[test]
    fn clocks() {
        // 2026-11-23 10:32:07.412 UTC
        let now = 1_795_429_927_412_000;
        assert_eq!(time_millis(now), "10:32:07.412");
        assert_eq!(moment(now - 1_000_000, now), "10:32:06");
        assert_eq!(moment(now - 86_400 * 1_000_000, now), "11-22 10:32:07");
        assert_eq!(moment(0, now), "01-01 00:00:00");
        assert_eq!((moment_millis(now, now).as_str(), moment_millis(0, now).as_str()), ("10:32:07.412", "01-01 00:00"));
        assert_eq!((day_or_time(now, now).as_str(), day_or_time(0, now).as_str()), ("10:32:07", "01-01"));
        assert_eq!(time(-1), "23:59:59");
        assert_eq!(moment(951_782_400_000_000, 0), "02-29 00:00:00");
        assert_eq!(age(now - 14_200_000, now), "14.2 s");
        assert_eq!((age(now, 0).as_str(), age(i64::MIN, i64::MAX).as_str()), ("0 s", ">999d"));
        assert_eq!((seconds_since(now, 0), seconds_since(0, now)), (0, 1_795_429_927));
        assert_eq!((lsn(None).as_str(), lsn(Some(Lsn(u64::MAX))).as_str()), ("-", "FFFFFFFF/FFFFFFFF"));
    }

    #[test]
    fn a_gap_is_no_zero_in_a_sparkline() {
        assert_eq!(sparkline(&[Some(0.0), None, Some(7.0), Some(14.0), Some(f64::NAN)]), "▁ ▅█▁");
        assert_eq!(sparkline(&[Some(0.0), Some(0.0)]), "▁▁");
        assert_eq!(sparkline(&[]), "");
    }
}
