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

#[cfg(test)]
mod tests {
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
}
