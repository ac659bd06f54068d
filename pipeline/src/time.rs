//! Time: microseconds since 1970 UTC everywhere, and their two texts.

use std::time::{SystemTime, UNIX_EPOCH};

use chrono::{DateTime, NaiveDateTime, SecondsFormat, Utc};

/// The wall clock, in microseconds since 1970 UTC. Only the runtime and sources read it; operators do not.
pub fn now_us() -> i64 {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_micros()).unwrap_or(i64::MAX),
        Err(before) => -i64::try_from(before.duration().as_micros()).unwrap_or(i64::MAX),
    }
}

/// RFC 3339 with Z: milliseconds, or microseconds where there are any.
pub fn format_us(us: i64) -> String {
    match DateTime::<Utc>::from_timestamp_micros(us) {
        Some(time) if us.rem_euclid(1_000) == 0 => time.to_rfc3339_opts(SecondsFormat::Millis, true),
        Some(time) => time.to_rfc3339_opts(SecondsFormat::Micros, true),
        None => us.to_string(),
    }
}

/// Reads RFC 3339, with `T` or a space; without a zone it is UTC. Digits finer than a microsecond are cut.
pub fn parse_us(text: &str) -> Option<i64> {
    let text = text.trim();
    if let Some(us) = parse_utc(text.as_bytes()) {
        return Some(us);
    }
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Some(time.timestamp_micros());
    }
    for format in ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f"] {
        if let Ok(time) = NaiveDateTime::parse_from_str(text, format) {
            return Some(time.and_utc().timestamp_micros());
        }
    }
    DateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f%#z").ok().map(|time| time.timestamp_micros())
}

/// The form that nearly all timestamps have, `2026-11-20T12:00:00.123456Z` (or no zone), many times faster than
/// the general parser: every message may hold one. `None` for any other form, right or wrong.
fn parse_utc(text: &[u8]) -> Option<i64> {
    let number = |from: usize, to: usize| -> Option<i64> {
        text[from..to].iter().try_fold(0, |n, b| b.is_ascii_digit().then(|| n * 10 + i64::from(b - b'0')))
    };
    let text_of_seconds = text.get(..19)?;
    let separators = [4, 7, 10, 13, 16].map(|at| text_of_seconds[at]);
    if !matches!(separators, [b'-', b'-', b'T' | b' ', b':', b':']) {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let rest = text[19..].strip_suffix(b"Z").unwrap_or(&text[19..]);
    let micros = match rest {
        [] => 0,
        [b'.', _, ..] if rest.len() <= 10 => {
            let digits = rest.len().min(7);
            // All digits must be some, also those that are cut.
            number(19 + digits, 19 + rest.len())?;
            number(20, 19 + digits)? * 10i64.pow(7 - digits as u32)
        }
        _ => return None,
    };
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let days = days_of(year, month, day)?;
    Some(((days * 24 + hour) * 60 + minute) * 60_000_000 + second * 1_000_000 + micros)
}

/// Days since 1970 of a day of the Gregorian calendar (Howard Hinnant's `days_from_civil`, for years from 0).
fn days_of(year: i64, month: i64, day: i64) -> Option<i64> {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let last = match month {
        2 => 28 + i64::from(leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    if !(1..=last).contains(&day) {
        return None;
    }
    // Years start in March, so that the leap day is the last one.
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year - era * 400;
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    Some(era * 146_097 + day_of_era - 719_468)
}

#[cfg(test)]
mod tests {
    use chrono::{Days, NaiveDate};

    use super::*;

    #[test]
    fn timestamps_read_with_and_without_zone_and_print_with_z() {
        let cases = [
            ("2026-11-20T12:00:00Z", "2026-11-20T12:00:00.000Z"),
            ("2026-11-20T12:00:00.1234567Z", "2026-11-20T12:00:00.123456Z"),
            ("2026-11-20 12:00:00", "2026-11-20T12:00:00.000Z"),
            ("2026-11-20T14:00:00.5+02:00", "2026-11-20T12:00:00.500Z"),
            ("2026-11-20 14:00:00.5+02", "2026-11-20T12:00:00.500Z"),
            ("1969-12-31T23:59:59.999Z", "1969-12-31T23:59:59.999Z"),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_us(text).map(format_us).as_deref(), Some(expected), "{text}");
        }
        for text in ["", "yesterday", "2026-13-01T00:00:00Z", "12:00"] {
            assert_eq!(parse_us(text), None, "{text}");
        }
    }

    #[test]
    fn the_fast_path_agrees_with_the_general_parser() {
        let days = (0..400 * 366)
            .step_by(13)
            .filter_map(|day| NaiveDate::from_ymd_opt(1900, 1, 1)?.checked_add_days(Days::new(day)));
        for day in days {
            for clock in ["T00:00:00Z", " 23:59:59.999999", "T12:30:01.5Z", "T06:07:08.123456789Z"] {
                let text = format!("{day}{clock}");
                let general = NaiveDateTime::parse_from_str(
                    &text.trim_end_matches('Z').replace('T', " "),
                    "%Y-%m-%d %H:%M:%S%.f",
                );
                assert_eq!(parse_utc(text.as_bytes()), general.ok().map(|t| t.and_utc().timestamp_micros()), "{text}");
            }
        }
        for text in [
            "2026-02-29T00:00:00Z",
            "2026-04-31T00:00:00Z",
            "2026-00-01T00:00:00Z",
            "2026-11-20T24:00:00Z",
            "2026-11-20T12:00:00.Z",
            "2026-11-20T12:00:00.1234567x",
            "2026-11-20T12:00:00+02:00",
            "2026-11-20T12:00",
        ] {
            assert_eq!(parse_utc(text.as_bytes()), None, "{text}");
        }
    }
}
