//! From what the three databases give to the cells that the declared fields want.

use std::borrow::Cow;

use chrono::{Datelike, NaiveDate};
use pipeline::json::json_string;
use pipeline::rows::Cell;
use pipeline::schema::FieldType;
use pipeline::time::format_us;

/// Days from 0001-01-01 to 1970-01-01, as chrono counts them.
const EPOCH_DAYS_FROM_CE: i32 = 719_163;
/// Microseconds of a day.
const DAY_US: i64 = 86_400_000_000;

/// The date `day` days after 1970-01-01.
pub(super) fn date_of(day: i32) -> Option<NaiveDate> {
    NaiveDate::from_num_days_from_ce_opt(day.checked_add(EPOCH_DAYS_FROM_CE)?)
}

/// Days since 1970-01-01 of a date as `2026-11-20`.
pub(super) fn day_of(text: &str) -> Option<i32> {
    NaiveDate::parse_from_str(text, "%Y-%m-%d").ok().map(day_number)
}

/// Days since 1970-01-01.
pub(super) fn day_number(date: NaiveDate) -> i32 {
    date.num_days_from_ce() - EPOCH_DAYS_FROM_CE
}

/// A day: text for `date` and `string`, midnight UTC for a timestamp.
pub(super) fn day<'a>(day: i32, wanted: FieldType) -> Result<Cell<'a>, String> {
    if let FieldType::Timestamp(_) = wanted {
        return Ok(Cell::Time(i64::from(day) * DAY_US));
    }
    let date = date_of(day).ok_or_else(|| format!("day {day} since 1970 is out of range"))?;
    Ok(Cell::Text(date.to_string().into()))
}

/// A point in time, in microseconds since 1970 UTC.
pub(super) fn time<'a>(us: i64, wanted: FieldType) -> Cell<'a> {
    match wanted {
        FieldType::String | FieldType::Json => Cell::Text(format_us(us).into()),
        FieldType::Date => match i32::try_from(us.div_euclid(DAY_US)).ok().and_then(date_of) {
            Some(date) => Cell::Text(date.to_string().into()),
            None => Cell::Time(us),
        },
        _ => Cell::Time(us),
    }
}

/// A time of day, in microseconds since midnight, as `12:30:00` or `12:30:00.250000`.
pub(super) fn time_of_day(us: i64) -> String {
    let seconds = us.div_euclid(1_000_000);
    let clock = format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
    match us.rem_euclid(1_000_000) {
        0 => clock,
        fraction => format!("{clock}.{fraction:06}"),
    }
}

/// A whole number of a database whose booleans are numbers.
pub(super) fn int_or_bool<'a>(value: i64, wanted: FieldType) -> Cell<'a> {
    match (wanted, value) {
        (FieldType::Bool, 0 | 1) => Cell::Bool(value == 1),
        _ => Cell::Int(value),
    }
}

/// An exact decimal as its digits: `sum` and `avg` of whole numbers are decimals, so every number type takes it.
/// One that does not fit stays text, which the column then refuses: never rounded to an `int`.
pub(super) fn decimal(digits: Cow<'_, str>, wanted: FieldType) -> Cell<'_> {
    let whole = match digits.split_once('.') {
        Some((whole, fraction)) if fraction.bytes().all(|b| b == b'0') => whole,
        _ => &*digits,
    };
    let (int, float) = (whole.parse().map(Cell::Int), digits.parse().map(Cell::Float));
    match (wanted, int, float) {
        (FieldType::Int | FieldType::Timestamp(Some(_)), Ok(int), _) => int,
        (FieldType::Float | FieldType::Timestamp(Some(_)), _, Ok(float)) => float,
        (FieldType::Json, _, Ok(Cell::Float(value))) if value.is_finite() => Cell::Json(digits),
        _ => Cell::Text(digits),
    }
}

/// Text; for a `json` field it must be JSON.
pub(super) fn text(text: &str, wanted: FieldType) -> Cell<'_> {
    match wanted {
        FieldType::Json => Cell::Untyped(text),
        _ => Cell::Text(Cow::Borrowed(text)),
    }
}

/// Text or bytes of a column that does not say which.
pub(super) fn text_or_bytes(bytes: &[u8], wanted: FieldType) -> Result<Cell<'_>, String> {
    match wanted {
        FieldType::Bytes => Ok(Cell::Bytes(bytes)),
        _ => std::str::from_utf8(bytes).map(|t| text(t, wanted)).map_err(|_| match wanted {
            FieldType::String => "not UTF-8; declare it as `bytes`".to_owned(),
            _ => format!("expected {wanted}, found {} bytes", bytes.len()),
        }),
    }
}

/// The text of a JSON column: kept for `json` and `string`; a JSON number or boolean is one for other types.
pub(super) fn json(text: &str, wanted: FieldType) -> Cell<'_> {
    let scalar = !text.starts_with(['{', '[', '"']);
    match wanted {
        FieldType::Json | FieldType::String => Cell::Json(Cow::Borrowed(text)),
        _ if text == "null" => Cell::Null,
        _ if scalar => Cell::Untyped(text),
        _ => Cell::Json(Cow::Borrowed(text)),
    }
}

/// A cell as JSON text, inside an array.
pub(super) fn to_json(cell: &Cell<'_>) -> String {
    match cell {
        Cell::Null => "null".into(),
        Cell::Float(value) if !value.is_finite() => "null".into(),
        Cell::Bool(_) | Cell::Int(_) | Cell::Float(_) | Cell::Number(_) => cell.to_string(),
        Cell::Text(text) => json_string(text),
        Cell::Json(text) => text.to_string(),
        Cell::Untyped(text) => (*text).to_owned(),
        Cell::Time(us) => json_string(&format_us(*us)),
        Cell::Bytes(bytes) => json_string(&String::from_utf8_lossy(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_become_the_number_that_is_wanted_or_stay_exact() {
        for (digits, wanted, expected) in [
            ("5", FieldType::Int, Cell::Int(5)),
            ("5.000", FieldType::Int, Cell::Int(5)),
            ("5.5", FieldType::Int, Cell::Text("5.5".into())),
            ("99999999999999999999", FieldType::Int, Cell::Text("99999999999999999999".into())),
            ("5", FieldType::Float, Cell::Float(5.0)),
            ("5.25", FieldType::Float, Cell::Float(5.25)),
            ("1.10", FieldType::Decimal(9, 2), Cell::Text("1.10".into())),
            ("1.10", FieldType::String, Cell::Text("1.10".into())),
            ("1.10", FieldType::Json, Cell::Json("1.10".into())),
            ("NaN", FieldType::Json, Cell::Text("NaN".into())),
        ] {
            let cell = decimal(Cow::Borrowed(digits), wanted);
            assert_eq!(cell, expected, "{digits} as {wanted}");
        }
    }

    #[test]
    fn times_and_days_follow_the_wanted_type() {
        let us = 1_795_176_000_500_000;
        assert_eq!(time(us, FieldType::Timestamp(None)), Cell::Time(us));
        assert_eq!(time(us, FieldType::String), Cell::Text("2026-11-20T12:00:00.500Z".into()));
        assert_eq!(time(us, FieldType::Date), Cell::Text("2026-11-20".into()));
        assert_eq!(day(1, FieldType::Timestamp(None)), Ok(Cell::Time(DAY_US)));
        assert_eq!(day(1, FieldType::Date), Ok(Cell::Text("1970-01-02".into())));
        assert_eq!(time_of_day(45_000_000_000), "12:30:00");
        assert_eq!(time_of_day(45_000_250_000), "12:30:00.250000");
    }
}
